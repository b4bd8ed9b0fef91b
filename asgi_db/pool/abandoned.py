"""Ends abandoned statements at the server.

A connection that is discarded in the middle of a statement is closed, but its server continues the
statement and notices nothing until it has rows to send. So the statement is ended over another
connection, if that reaches the same server. asyncpg's own cancel request does not survive a second
cancellation, and asyncmy has none.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import anyio
from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from asgi_db.drivers import driver_of
from asgi_db.drivers.connecting import background_is_over, raise_if_connect_failed
from asgi_db.drivers.protocol import GIVE_UP_AFTER, StandIn
from asgi_db.drivers.whereabouts import MOST_ATTEMPTS, Reached, Server, reached, server_of
from asgi_db.logs import logger
from asgi_db.tasks import in_background, running_loop

ATTEMPT_TIMEOUT = 5.0
"""Seconds that one attempt may take; `dispose` waits equally long."""


_FIRST_DELAY = 0.05
"""Seconds before the second attempt."""

_LEAVE_AFTER = 4
"""Attempts after which a statement is left to a server that notices when its client has gone."""

_CONNECTED = "asgi_db_connected"
"""The key in a connection's `info` for the event loop and the time in which it was made."""


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
async def side_connection(engine: AsyncEngine) -> AsyncGenerator[AsyncConnection]:
    """Briefly open a connection outside the pool, in autocommit; it is made as the pool's are."""
    side_engine = create_async_engine(engine.url, pool=engine.pool.recreate())
    try:
        async with connection_of(side_engine) as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            yield connection
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(ATTEMPT_TIMEOUT):
            await side_engine.dispose()


class _Abandoned:
    """A connection that was discarded while its server may still run its statement.

    Attributes:
        id: its number at its server.
        server: which server that is, if it is known.
        made: when it was made, by `time.monotonic()`.
        attempts: how many connections have reached another server since.
    """

    def __init__(self, id: int, server: Server | None, made: float) -> None:
        self.id = id
        self.server = server
        self.made = made
        self.attempts = 0

    @property
    def age(self) -> float:
        """How many seconds ago it was made."""
        return time.monotonic() - self.made


class AbandonedStatements:
    """The abandoned statements of an engine, until they have been ended at their servers."""

    def __init__(self, engine: AsyncEngine, *, pooler: bool) -> None:
        """Watch an engine.

        Args:
            pooler: whether there is a pooler in between, so that the server's own connection
                numbers are unknown; see `patient_connection_class`.
        """
        self._engine = engine
        self._driver = driver_of(engine.dialect)
        self._behind_pooler = pooler
        self._abandoned: list[_Abandoned] = []
        self._ending: asyncio.Task[None] | None = None
        event.listen(engine.sync_engine, "connect", self._connect)
        event.listen(engine.sync_engine, "invalidate", self._invalidate)

    def _connect(self, adapted: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        entry.info[_CONNECTED] = running_loop(), time.monotonic()
        if not self._behind_pooler:
            self._driver.identify(self._engine.dialect, adapted)

    def _invalidate(
        self, adapted: DBAPIConnection, entry: ConnectionPoolEntry, error: BaseException | None
    ) -> None:
        """Note a connection that is discarded while its server may be executing a statement."""
        if isinstance(error, Exception):
            return  # The connection itself has failed, and its statement with it.
        connection = self._engine.dialect.get_driver_connection(adapted)
        if isinstance(connection, StandIn):
            return  # The sandbox ends its statements itself and keeps its connection.
        if error is not None and running_loop() is not None:
            if (interrupting := self._driver.interrupt(connection)) is not None:
                in_background(interrupting)
        id = None if self._behind_pooler else self._driver.id_at_server(connection)
        loop, made = entry.info.get(_CONNECTED, (None, 0.0))
        if id is None or loop is None or loop is not running_loop():
            return
        self._abandoned.append(_Abandoned(id, server_of(connection), made))
        if self._ending is None or self._ending.done() or self._ending.get_loop().is_closed():
            self._ending = asyncio.ensure_future(self._end_all())

    async def _end_all(self) -> None:
        deadline = time.monotonic() + GIVE_UP_AFTER
        delay = _FIRST_DELAY
        self._discard(lambda one: one.server is None, "it is not known on which server")
        while self._abandoned:
            try:
                with anyio.fail_after(ATTEMPT_TIMEOUT):
                    async with side_connection(self._engine) as connection:
                        await self._end_there(connection)
            except (SQLAlchemyError, OSError) as error:
                if time.monotonic() > deadline:
                    self._discard(lambda _: True, type(error).__name__)
                await asyncio.sleep(delay)
                delay = min(delay * 2, 1.0)
                continue
            self._leave_to_server(_LEAVE_AFTER)
            self._discard(
                lambda one: one.attempts >= MOST_ATTEMPTS, "each connection reaches another server"
            )
            if self._abandoned:  # A balancer may choose another server for the next one.
                await asyncio.sleep(_FIRST_DELAY)

    async def _end_there(self, connection: AsyncConnection) -> None:
        """End what runs on the server that a connection has reached, and nothing else."""
        pooled = await connection.get_raw_connection()
        here = server_of(pooled.driver_connection)
        for one in self._abandoned.copy():
            where = Reached.ANOTHER
            if one.server is not None:
                where = reached(one.server, here, one.age)
            if where is Reached.ANOTHER:
                one.attempts += 1
                continue
            if where is Reached.SAME:
                await self._driver.end_statement(connection, one.id, one.age)
            if one in self._abandoned:
                self._abandoned.remove(one)

    def _leave_to_server(self, attempts: int) -> None:
        """Forget what a server ends by itself, as its client has gone, if that is not reached."""
        self._abandoned = [
            one
            for one in self._abandoned
            if one.attempts < attempts or one.server is None or not one.server.notices_clients
        ]

    def _discard(self, is_hopeless: Callable[[_Abandoned], bool], why: str) -> None:
        hopeless = [one for one in self._abandoned if is_hopeless(one)]
        if hopeless:
            self._abandoned = [one for one in self._abandoned if one not in hopeless]
            logger.error(
                "%d statements may still run on the server, which could not be told to end them"
                " (%s)",
                len(hopeless),
                why,
            )

    async def all_ended(self) -> None:
        """Wait for a limited time until every abandoned statement has been ended at the server."""
        await background_is_over(ATTEMPT_TIMEOUT)
        if self._ending is not None and self._ending.get_loop() is running_loop():
            await asyncio.wait((self._ending,), timeout=ATTEMPT_TIMEOUT)
            if not self._ending.done():
                self._ending.cancel()
                await asyncio.wait((self._ending,))
                self._leave_to_server(1)
                self._discard(lambda _: True, "TimeoutError")
