"""Statements that were cut off here are ended at the server.

A connection that is given up in the middle of a statement is closed, but its server goes on with
the statement, and notices nothing until it has rows to send. So it is told, over another
connection. The driver's own way, asyncpg's cancel request, is cut off itself by a cancellation
that comes twice, and asyncmy has none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import sqlite3
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from sqlalchemy import event, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from asgi_db.cancellation import background_is_over, in_background, running_loop
from asgi_db.engine import raise_if_connect_failed

logger = logging.getLogger("asgi_db")

ATTEMPT_TIMEOUT = 5.0
"""Seconds that one attempt may take; `dispose` waits as long."""

GIVE_UP_AFTER = 60.0
"""Seconds after which a server that cannot be told is left alone."""

INTERRUPT_AGAIN = 0.05
"""Seconds after which SQLite is interrupted again: time enough to end a statement and to close."""

PATIENCE = 2.0
"""Seconds in which a request to cancel a statement may get through a pooler."""

_CONNECTED = "asgi_db_connected"
"""The key in a connection's `info` for the event loop and the time of its making."""

# The server gives the number of a connection that has ended to another: PostgreSQL at any time,
# MySQL after it was started again.
_TERMINATE = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = :id
    AND backend_start <= clock_timestamp() - make_interval(secs => :age)
"""
_HAS_NUMBERS = ("postgresql", "mysql", "mariadb")
_UNKNOWN_THREAD = 1094  # MySQL: it has ended already


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


async def _latest_start(connection: AsyncConnection) -> float:
    """The time at which a MySQL server was running for sure; it says so in whole seconds."""
    uptime = (await connection.execute(text("SHOW GLOBAL STATUS LIKE 'Uptime'"))).one()[1]
    return time.monotonic() - float(uptime) + 1


async def _runs(connection: AsyncConnection, id: int, age: float) -> bool:
    """Say whether a connection's statement has run for so many seconds.

    That of another connection with the same number has begun after ours was cut off.
    """
    is_mariadb = getattr(connection.dialect, "is_mariadb", False)
    seconds = "time_ms / 1000" if is_mariadb else "time + 1"  # MySQL counts whole ones
    statement = (
        f"SELECT 1 FROM information_schema.processlist WHERE id = {id} AND {seconds} >= {age}"
    )
    return bool(await connection.scalar(text(f"{statement} AND command <> 'Sleep'")))


async def _interrupt(driver: Any) -> None:
    """Interrupt what an SQLite connection runs, until it is closed.

    SQLite forgets an interrupt that comes before the statement has begun, and the statement may
    still be on its way to the connection's thread. There it is closed too, after the statement.
    """
    with contextlib.suppress(ValueError, sqlite3.Error):  # it is closed
        with anyio.move_on_after(GIVE_UP_AFTER):
            while True:
                await driver.interrupt()
                await anyio.sleep(INTERRUPT_AGAIN)


def id_at_server(driver: Any) -> int | None:
    """The number by which the server knows this connection."""
    with contextlib.suppress(AttributeError, TypeError):  # it is closed already
        return int(driver.get_server_pid() if hasattr(driver, "is_closed") else driver.thread_id())
    return None


def patient_connection_class() -> type[Any]:
    """Make the class of asyncpg's connections behind a pooler.

    There the server's own numbers are not known, so it is left to asyncpg to ask that a statement
    which was cut off be cancelled: `terminate` gives it the time.
    """
    from asyncpg import Connection

    class PatientConnection(Connection):
        """Closes in the background, so that the request to cancel gets out."""

        __slots__ = ("_closing",)

        def terminate(self) -> None:
            if running_loop() is None:
                super().terminate()
            else:
                self._close_once()

        async def close(self, *, timeout: float | None = None) -> None:  # noqa: ASYNC109
            await asyncio.wait((self._close_once(),))

        def _close_once(self) -> asyncio.Future[None]:
            # A second `close` would cut off the request of the first to cancel the statement,
            # at which PgBouncer 1.18 falls over (its issue 801).
            if not hasattr(self, "_closing"):
                self._closing = in_background(self._close_in_time())
            return self._closing

        async def _close_in_time(self) -> None:
            try:
                await super().close(timeout=PATIENCE)
            except Exception:  # whatever it is, the connection goes
                super().terminate()

    return PatientConnection
