"""Statements that were cut off here are ended at the server.

A connection that is given up in the middle of a statement is closed, but its server goes on with
the statement, and notices nothing until it has rows to send. So it is told, over another
connection. The driver's own way, asyncpg's cancel request, is cut off itself by a cancellation
that comes twice, and asyncmy has none.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
from sqlalchemy import event, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from asgi_db.drivers.base import GIVE_UP_AFTER, id_at_server
from asgi_db.drivers.connecting import background_is_over, raise_if_connect_failed
from asgi_db.drivers.mysql import _UNKNOWN_THREAD, _latest_start, _runs
from asgi_db.drivers.postgresql import _TERMINATE
from asgi_db.drivers.sqlite import _interrupt
from asgi_db.tasks import in_background, running_loop

logger = logging.getLogger("asgi_db")

ATTEMPT_TIMEOUT = 5.0
"""Seconds that one attempt may take; `dispose` waits as long."""


_CONNECTED = "asgi_db_connected"
"""The key in a connection's `info` for the event loop and the time of its making."""

_HAS_NUMBERS = ("postgresql", "mysql", "mariadb")


@asynccontextmanager
async def connection_of(engine: AsyncEngine) -> AsyncGenerator[AsyncConnection]:
    """Take a connection of the engine, outside any unit of work."""
    try:
        async with engine.connect() as connection:
            yield connection
    except BaseException as error:
        raise_if_connect_failed(error)
        raise


@asynccontextmanager
async def connection_aside(engine: AsyncEngine) -> AsyncGenerator[AsyncConnection]:
    """Open a connection beside the pool, in autocommit, for a moment; made as the pool's are."""
    aside = create_async_engine(engine.url, pool=engine.pool.recreate())
    try:
        async with connection_of(aside) as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            yield connection
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(ATTEMPT_TIMEOUT):
            await aside.dispose()


class AbandonedStatements:
    """The statements of an engine that were cut off, until the server knows of it."""

    def __init__(self, engine: AsyncEngine, *, pooler: bool) -> None:
        """Watch an engine.

        Args:
            pooler: there is one in between, so that the server's own numbers of connections are
                not known; see `patient_connection_class`.
        """
        self._engine = engine
        self._numbers_are_known = not pooler and engine.dialect.name in _HAS_NUMBERS
        self._cut_off: dict[int, tuple[float, float]] = {}
        self._ending: asyncio.Task[None] | None = None
        event.listen(engine.sync_engine, "connect", self._connect)
        event.listen(engine.sync_engine, "invalidate", self._invalidate)

    def _connect(self, _: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        entry.info[_CONNECTED] = running_loop(), time.monotonic()

    def _invalidate(
        self, connection: DBAPIConnection, entry: ConnectionPoolEntry, error: BaseException | None
    ) -> None:
        """Take note of a connection that is given up while its server may be busy for it."""
        if isinstance(error, Exception):
            return  # the connection itself has failed: there is nobody to tell
        driver = self._engine.dialect.get_driver_connection(connection)
        if getattr(driver, "is_sandboxed", False):
            return  # the sandbox ends its statements itself, and goes on
        if error is not None and hasattr(driver, "interrupt") and running_loop() is not None:
            # SQLite, in its thread; one that is idle would not close in good order afterwards.
            in_background(_interrupt(driver))
        if not self._numbers_are_known:
            return
        id = id_at_server(driver)
        loop, connected = entry.info.get(_CONNECTED, (None, 0.0))
        if id is None or loop is None or loop is not running_loop():
            return
        self._cut_off[id] = connected, time.monotonic()
        if self._ending is None or self._ending.done() or self._ending.get_loop().is_closed():
            self._ending = asyncio.ensure_future(self._end_all())

    async def _end_all(self) -> None:
        deadline = time.monotonic() + GIVE_UP_AFTER
        delay = 0.05
        while self._cut_off:
            try:
                with anyio.fail_after(ATTEMPT_TIMEOUT):
                    async with connection_aside(self._engine) as connection:
                        await self._end_all_over(connection)
            except (SQLAlchemyError, OSError) as error:
                if time.monotonic() > deadline:
                    self._give_up(error)
                await asyncio.sleep(delay)
                delay = min(delay * 2, 1.0)

    def _give_up(self, error: Exception) -> None:
        logger.error(
            "%d statements that were cut off may still run on the server, which cannot be told: %s",
            len(self._cut_off),
            type(error).__name__,
        )
        self._cut_off.clear()

    async def _end_all_over(self, connection: AsyncConnection) -> None:
        is_postgresql = connection.dialect.name == "postgresql"
        started = -math.inf if is_postgresql else await _latest_start(connection)
        while self._cut_off:
            id, (connected, cut_off) = next(iter(self._cut_off.items()))
            now = time.monotonic()
            if is_postgresql:
                await connection.execute(text(_TERMINATE), {"id": id, "age": now - connected})
            elif connected >= started or await _runs(connection, id, now - cut_off):
                await self._kill(connection, id)
            self._cut_off.pop(id, None)

    async def _kill(self, connection: AsyncConnection, id: int) -> None:
        try:
            await connection.execute(text(f"KILL {id}"))
        except SQLAlchemyError as error:
            if getattr(error.__cause__, "args", (0,))[0] != _UNKNOWN_THREAD:
                raise

    async def all_ended(self) -> None:
        """Wait, within a bound, until the server knows of every statement that was cut off."""
        await background_is_over(ATTEMPT_TIMEOUT)
        if self._ending is not None and self._ending.get_loop() is running_loop():
            await asyncio.wait((self._ending,), timeout=ATTEMPT_TIMEOUT)
            if not self._ending.done():
                self._ending.cancel()
                await asyncio.wait((self._ending,))
                self._give_up(TimeoutError())
