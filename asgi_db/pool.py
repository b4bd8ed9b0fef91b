"""The pool's care: who is checked out, what is verified before use, what is ended at the server.

A connection that was cut off in the middle of a statement is closed here, but its server goes on
with the statement, and notices nothing until it has rows to send. So it is told, over another
connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import shutil
import socket
import sqlite3
import time
import weakref
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
from sqlalchemy import Engine, event, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DisconnectionError, InvalidatePoolError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, PoolResetState

from asgi_db.cancellation import (
    abandon_connect,
    background_is_over,
    connect_is_complete,
    in_background,
    running_loop,
    terminate,
)
from asgi_db.engine import has_gone, watch
from asgi_db.unit_of_work import UNIT_INFO

if TYPE_CHECKING:
    from asgi_db.unit_of_work import UnitOfWork

logger = logging.getLogger("asgi_db")

VERIFY_AFTER_IDLE = 1.0
"""Seconds of idleness after which a pooled connection is pinged before it is used."""

DISPOSE_TIMEOUT = 10.0
"""Seconds that `dispose` waits for connections which are out, before it terminates them."""

ATTEMPT_TIMEOUT = 5.0
"""Seconds that one attempt to end abandoned statements may take, and `dispose` waits for it."""

GIVE_UP_AFTER = 60.0
"""Seconds after which a server that cannot be told about abandoned statements is left alone."""

PATIENCE = 2.0
"""Seconds in which a request to cancel a statement may get through a pooler."""

SQLITE_BUSY_TIMEOUT = 30.0
"""Seconds that SQLite waits for another connection's lock."""

_CONNECTED = "asgi_db_connected"
"""The key in a connection's `info` for the event loop and the time of its making."""


@asynccontextmanager
async def connection_of(engine: AsyncEngine) -> AsyncGenerator[AsyncConnection]:
    """Take a connection of the engine, outside any unit of work."""
    try:
        async with engine.connect() as connection:
            yield connection
    except BaseException:
        abandon_connect()
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


class Connections:
    """The open connections of an engine, and those of them which are out of the pool."""

    def __init__(self, engine: AsyncEngine, *, pooler: bool = False) -> None:
        """Watch an engine.

        Args:
            pooler: there is one in between, so that the server's own numbers of connections are
                not known; see `patient_connection_class`.
        """
        self._engine = engine
        self._behind_pooler = pooler
        self._open: dict[ConnectionPoolEntry, DBAPIConnection] = {}
        self._out: dict[ConnectionPoolEntry, tuple[PoolProxiedConnection, float]] = {}
        self._returned = anyio.Event()
        self._abandoned: dict[int, float] = {}
        self._ending: asyncio.Task[None] | None = None
        target = engine.sync_engine
        event.listen(target, "connect", self._connect)
        event.listen(target, "close", self._close)
        event.listen(target, "checkout", self._checkout)
        event.listen(target, "checkin", self._checkin)
        event.listen(target, "invalidate", self._invalidate)

    def _connect(self, connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        connect_is_complete()
        entry.info[_CONNECTED] = running_loop(), time.monotonic()
        self._open[entry] = connection

    def _close(self, _: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        self._open.pop(entry, None)

    def _checkout(
        self, connection: DBAPIConnection, entry: ConnectionPoolEntry, proxy: PoolProxiedConnection
    ) -> None:
        if has_gone(self._engine.dialect.get_driver_connection(connection)):
            raise DisconnectionError("the server has closed this connection")
        self._out[entry] = proxy, time.monotonic()

    def _checkin(self, _: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
        entry.info.pop(UNIT_INFO, None)
        self._out.pop(entry, None)
        self._returned.set()

    def holders(self) -> list[str]:
        """Say who has the connections that are out: `POST /orders (create_order) for 2.1 s`."""
        now = time.monotonic()
        held: list[str] = []
        for entry, (_, since) in self._out.items():
            unit: UnitOfWork | None = entry.info.get(UNIT_INFO)
            name = "the engine, without a session" if unit is None else unit.describe()
            held.append(f"{name} for {now - since:.1f} s")
        return held

    async def all_returned(self) -> None:
        """Wait until every connection is back in the pool."""
        while self._out:
            self._returned = anyio.Event()
            await self._returned.wait()

    def terminate(self) -> int:
        """Close what is open without a word to the server; return how many."""
        connections = list(self._open.items())
        for entry, connection in connections:
            driver = self._engine.dialect.get_driver_connection(connection)
            try:
                if self._behind_pooler:
                    terminate(driver)
                elif entry in self._out:  # whoever still has it gets an error, also at COMMIT
                    self._out[entry][0].invalidate()
                else:
                    self._engine.dialect.do_terminate(connection)
            except RuntimeError:  # its event loop is closed
                _shut_socket(driver)
        self._open.clear()
        self._out.clear()
        return len(connections)

    def leave_to_parent(self) -> None:
        """Take each connection for closed, without a move.

        An asyncpg connection that is collected leaves its event loop, which the parent still
        uses. There is no public way to keep it from that; the test of forked processes in
        `test_shutdown.py` breaks when this changes.
        """
        for connection in self._open.values():
            driver = self._engine.dialect.get_driver_connection(connection)
            if hasattr(driver, "_aborted"):
                driver._aborted = True

    # -- what was cut off ----------------------------------------------------------------------

    def _invalidate(
        self, connection: DBAPIConnection, entry: ConnectionPoolEntry, error: BaseException | None
    ) -> None:
        """Take note of a connection that is given up while its server may be busy for it."""
        if isinstance(error, Exception):
            return  # the connection itself has failed: there is nobody to tell
        driver = self._engine.dialect.get_driver_connection(connection)
        if hasattr(driver, "interrupt") and running_loop() is not None:  # SQLite, in its thread
            in_background(_interrupt(driver))
        if self._behind_pooler or self._engine.dialect.name not in _END_AT_SERVER:
            return
        id = _id_at_server(driver)
        loop, connected = entry.info.get(_CONNECTED, (None, 0.0))
        if id is None or loop is None or loop is not running_loop():
            return
        self._abandoned[id] = connected
        if self._ending is None or self._ending.done() or self._ending.get_loop().is_closed():
            self._ending = asyncio.ensure_future(self._end_abandoned())
        # Else SQLAlchemy would wait for a server that may not answer any more.
        terminate(driver)

    async def _end_abandoned(self) -> None:
        deadline = time.monotonic() + GIVE_UP_AFTER
        delay = 0.05
        while self._abandoned:
            try:
                with anyio.fail_after(ATTEMPT_TIMEOUT):
                    async with connection_aside(self._engine) as connection:
                        await self._end_abandoned_over(connection)
            except (SQLAlchemyError, OSError) as error:
                if time.monotonic() > deadline:
                    logger.error(
                        "%d statements that were cut off may still run on the server, which could"
                        " not be told: %s",
                        len(self._abandoned),
                        type(error).__name__,
                    )
                    self._abandoned.clear()
                await asyncio.sleep(delay)
                delay = min(delay * 2, 1.0)

    async def _end_abandoned_over(self, connection: AsyncConnection) -> None:
        statement = text(_END_AT_SERVER[connection.dialect.name])
        started = -math.inf
        if connection.dialect.name != "postgresql":
            row = (await connection.execute(text("SHOW GLOBAL STATUS LIKE 'Uptime'"))).one()
            started = time.monotonic() - int(row[1]) + 1  # it counts in whole seconds
        while self._abandoned:
            id, connected = next(iter(self._abandoned.items()))
            try:
                if connected >= started:
                    age = time.monotonic() - connected
                    await connection.execute(statement, {"id": id, "age": age})
            except SQLAlchemyError as error:
                if getattr(error.__cause__, "args", (0,))[0] != _UNKNOWN_THREAD:
                    raise
            self._abandoned.pop(id, None)

    async def abandoned_ended(self) -> None:
        """Wait, within a bound, until the server knows of every statement that was cut off."""
        await background_is_over()
        if self._ending is not None and self._ending.get_loop() is running_loop():
            await asyncio.wait((self._ending,), timeout=ATTEMPT_TIMEOUT)
            if not self._ending.done():
                self._ending.cancel()
                await asyncio.wait((self._ending,))


# The age is there because the server gives the number of a connection that has ended to the next.
# MySQL counts up, from 1 after each start of the server.
_END_AT_SERVER = {
    "postgresql": """
        SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = :id
        AND backend_start <= clock_timestamp() - make_interval(secs => :age)
    """,
    "mysql": "KILL :id",
    "mariadb": "KILL :id",
}
_UNKNOWN_THREAD = 1094  # MySQL: it has ended already


async def _interrupt(driver: Any) -> None:
    with contextlib.suppress(ValueError, sqlite3.Error):  # it is closed already
        await driver.interrupt()


def _id_at_server(driver: Any) -> int | None:
    """The number by which the server knows this connection."""
    with contextlib.suppress(AttributeError, TypeError):  # it is closed already
        return int(driver.get_server_pid() if hasattr(driver, "is_closed") else driver.thread_id())
    return None


def _shut_socket(driver: Any) -> None:
    """End a connection without its event loop, so that the server at least sees it go.

    There is no public way to the transport; the test of applications that start again without
    having been shut down, in `test_lifespan.py`, breaks when this changes.
    """
    with contextlib.suppress(OSError, TypeError, AttributeError):  # it is closed; uvloop sees to it
        driver._transport.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


def _remove_folder(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not in a process that was forked
        shutil.rmtree(folder, ignore_errors=True)


class EngineLife:
    """An engine in the event loop that uses it, with its connections, until it is disposed."""

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        given: bool = False,
        pooler: bool = False,
        folder: str | None = None,
    ) -> None:
        """Look after an engine.

        Args:
            given: it belongs to the user: it is not disposed.
            pooler: there is a pooler between it and its server.
            folder: removed with it, at the latest when the program ends.
        """
        watch(engine.sync_engine)
        self.engine = engine
        self.connections = Connections(engine, pooler=pooler)
        self._given = given
        self._remove_folder = (
            None if folder is None else weakref.finalize(self, _remove_folder, folder, os.getpid())
        )

    def leave_to_parent(self) -> None:
        """Let this process, which was forked, not touch the sockets that it shares."""
        self.connections.leave_to_parent()

    async def dispose(self) -> None:
        """Close every connection; those that are out get `DISPOSE_TIMEOUT` to come back."""
        if not self._given:
            with anyio.move_on_after(DISPOSE_TIMEOUT):
                await self.connections.all_returned()
            with anyio.move_on_after(DISPOSE_TIMEOUT):
                await self.engine.dispose()
            await self.connections.abandoned_ended()
            self.terminate()
        await self.connections.abandoned_ended()

    def terminate(self) -> None:
        """Cut off whatever is still open."""
        if self._given:
            return
        terminated = self.connections.terminate()
        if terminated:
            logger.warning(
                "%d connections were terminated: they were not returned to the pool in %.0f s, or"
                " their event loop was closed without `await database.dispose()`.",
                terminated,
                DISPOSE_TIMEOUT,
            )
        if self._remove_folder is not None:
            self._remove_folder()


def prepare_postgresql(engine: Engine) -> None:
    """Let the server look after its clients, and notice a pooler that the settings do not name.

    A statement runs on at the server when its client's process is killed, unless the server looks
    now and then whether the client is still there (PostgreSQL 14 and later; a value of the user's
    own stays).

    In transaction pooling asyncpg's prepared statements fail, or answer with the rows of other
    clients' statements. PgBouncer invents the process number that it tells its clients.
    """
    warned = False

    def connect(connection: Any, _: ConnectionPoolEntry) -> None:
        nonlocal warned
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute(_LOOK_AFTER_CLIENT)
        ((_, id),) = cursor.fetchall()
        cursor.close()
        connection.autocommit = False
        if id != _id_at_server(engine.dialect.get_driver_connection(connection)) and not warned:
            warned = True
            logger.warning(
                "There is a pooler between this application and PostgreSQL. If it pools"
                ' transactions, as PgBouncer can, say so: Database(..., pooler="transaction");'
                " otherwise statements fail, or get the rows of others."
            )

    event.listen(engine, "connect", connect)


_LOOK_AFTER_CLIENT = """
    SELECT CASE WHEN current_setting('client_connection_check_interval', true) = '0'
    THEN set_config('client_connection_check_interval', '1s', false) END, pg_backend_pid()
"""


def patient_connection_class() -> type[Any]:
    """Make the class of asyncpg's connections behind a pooler.

    There the server's own numbers are not known, so it is left to asyncpg to ask that a statement
    which was cut off be cancelled: `terminate` gives it the time.
    """
    from asyncpg import Connection

    class PatientConnection(Connection):
        """Closes in the background, so that the request to cancel gets out."""

        __slots__ = ("_is_closing",)

        def terminate(self) -> None:
            if running_loop() is None:
                super().terminate()
            elif not hasattr(self, "_is_closing"):
                self._is_closing = True
                in_background(self._close_in_time())

        async def _close_in_time(self) -> None:
            try:
                await super().close(timeout=PATIENCE)
            except Exception:  # whatever it is, the connection goes
                super().terminate()

    return PatientConnection


def verify_before_use(engine: Engine) -> None:
    """Ping a connection before it is used, but only if it has been idle for a while.

    SQLAlchemy's `pool_pre_ping` pings each time, which triples the round trips of a short read.
    """
    returned = "asgi_db_returned"

    def note_return(_connection: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
        entry.info[returned] = time.monotonic()

    def ping(connection: DBAPIConnection, entry: ConnectionPoolEntry, _proxy: Any) -> None:
        since = entry.info.pop(returned, None)
        if since is not None and time.monotonic() - since > VERIFY_AFTER_IDLE:
            try:
                engine.dialect.do_ping(connection)
            except Exception as error:  # whatever it is: the pool replaces this and all older ones
                raise InvalidatePoolError(str(error)) from error

    event.listen(engine, "checkin", note_return)
    event.listen(engine, "checkout", ping)


def reset_mysql(engine: Engine) -> None:
    """Roll back on return to the pool only what is open; SQLAlchemy does so after each COMMIT too.

    The server says in each answer whether a transaction is open.
    """

    def reset(connection: DBAPIConnection, _: ConnectionPoolEntry, state: PoolResetState) -> None:
        driver: Any = engine.dialect.get_driver_connection(connection)
        if state.asyncio_safe and not state.terminate_only and driver.get_transaction_status():
            connection.rollback()

    event.listen(engine, "reset", reset)


def prepare_sqlite(engine: Engine, *, durable: bool) -> None:
    """Set up SQLite's connections: explicit BEGIN, foreign keys, WAL and a busy timeout.

    The driver's own transaction control starts none for a SELECT, which loses updates.
    Source: https://docs.sqlalchemy.org/en/21/dialects/sqlite.html#pysqlite-serializable
    """

    def connect(connection: Any, _entry: ConnectionPoolEntry) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {SQLITE_BUSY_TIMEOUT * 1000:.0f}")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute("PRAGMA journal_mode = WAL")
        if not durable:
            cursor.execute("PRAGMA synchronous = OFF")
        cursor.close()

    def roll_back(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
        # To SQLite a connection is closed only when its last statement is gone: one that was cut
        # off would keep the transaction, and its lock, until the garbage collector finds it.
        with contextlib.suppress(Exception):
            connection.rollback()

    event.listen(engine, "connect", connect)
    event.listen(engine, "close", roll_back)
