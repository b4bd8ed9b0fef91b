"""The engine's care: how transactions begin in each mode, what may be sent, who is checked out.

One engine and one pool serve all modes. For each mode there is a variant of the engine
(`Engine.execution_options()`, which shares the pool); the events below read its options.
"""

from __future__ import annotations

import contextlib
import re
import socket
import time
from functools import lru_cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import anyio
from sqlalchemy import URL, Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, InvalidatePoolError
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, PoolResetState

from asgi_db.cancellation import connect_whole
from asgi_db.errors import ConfigurationError, ReadOnlyError
from asgi_db.modes import Mode
from asgi_db.unit_of_work import UNIT_OPTION

if TYPE_CHECKING:
    from asgi_db.unit_of_work import UnitOfWork

BEGIN_OPTION = "asgi_db_begin"
"""Execution option: the statements with which a transaction begins."""

AUTOCOMMIT_OPTION = "asgi_db_autocommit"
"""Execution option: whether a MySQL connection is to be in autocommit.

To change it costs a round trip there, so a connection stays as it was last used, and each begin
makes sure. SQLAlchemy's own `isolation_level="AUTOCOMMIT"` changes it twice per request.
"""

MODE_OPTION = "asgi_db_mode"
"""Execution option: the mode, where it restricts what may be sent."""

VERIFY_AFTER_IDLE = 1.0
"""Seconds of idleness after which a pooled connection is pinged before it is used."""

SQLITE_BUSY_TIMEOUT = 30.0
"""Seconds that SQLite waits for another connection's lock."""


# -- how a transaction begins ------------------------------------------------------------------


def base_options(url: URL) -> dict[str, Any]:
    """Return the arguments of `create_async_engine` which the modes need on this database."""
    backend = url.get_backend_name()
    driver = import_module(url.get_driver_name())
    connect = _connect_sqlite if backend == "sqlite" else driver.connect
    options: dict[str, Any] = {
        "connect_args": {"async_creator_fn": partial(connect_whole, connect)}
    }
    if backend == "sqlite":
        options["execution_options"] = {BEGIN_OPTION: ("BEGIN",)}
    elif backend in ("mysql", "mariadb"):
        options["execution_options"] = {AUTOCOMMIT_OPTION: False}
        options["skip_autocommit_rollback"] = True
        options["pool_reset_on_return"] = None  # `prepare_mysql` does it
    return options


def _connect_sqlite(*args: Any, **kwargs: Any) -> Any:
    connection = import_module("aiosqlite").connect(*args, **kwargs)
    # As SQLAlchemy does where it connects by itself; there is no public way. Otherwise a program
    # that does not dispose its database could not end.
    connection._thread.daemon = True
    return connection


def variant_options(engine: Engine, mode: Mode) -> dict[str, Any]:
    """Return the execution options with which an engine serves this mode.

    Raises:
        ConfigurationError: the mode asks for what this database does not have.
    """
    dialect = engine.dialect.name
    if mode.deferrable and dialect != "postgresql":
        raise ConfigurationError(
            f"deferrable=True exists only on PostgreSQL, and this database is {dialect}: leave it"
            " out of transactional(...)."
        )
    options = _BEGIN.get(dialect, _begin_standard)(mode)
    if mode.autocommit and AUTOCOMMIT_OPTION in engine.get_execution_options():
        options = dict[str, Any]({AUTOCOMMIT_OPTION: True})
    if mode.read_only:
        options[MODE_OPTION] = mode
    return options


def _begin_standard(mode: Mode) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if mode.autocommit:
        options["isolation_level"] = "AUTOCOMMIT"
    elif mode.snapshot:
        options["isolation_level"] = "REPEATABLE READ"
    elif mode.isolation is not None:
        options["isolation_level"] = mode.isolation
    return options


def _begin_postgresql(mode: Mode) -> dict[str, Any]:
    options = _begin_standard(mode)
    if mode.isolation == "READ UNCOMMITTED":  # PostgreSQL treats it as READ COMMITTED
        options["isolation_level"] = "READ COMMITTED"
    if mode.read_only and not mode.autocommit:
        options["postgresql_readonly"] = True
    if mode.deferrable:
        options["postgresql_deferrable"] = True
    return options


def _begin_mysql(mode: Mode) -> dict[str, Any]:
    """`SET TRANSACTION` holds for the next transaction alone, so nothing has to be set back."""
    if mode.autocommit:
        return _begin_standard(mode)
    isolation = "REPEATABLE READ" if mode.snapshot else mode.isolation
    characteristics = [f"ISOLATION LEVEL {isolation}"] if isolation is not None else []
    if mode.read_only:
        characteristics.append("READ ONLY")
    begin = [f"SET TRANSACTION {', '.join(characteristics)}"] if characteristics else []
    if mode.snapshot:
        begin.append("START TRANSACTION WITH CONSISTENT SNAPSHOT")
    return {BEGIN_OPTION: begin}


def _begin_sqlite(mode: Mode) -> dict[str, Any]:
    """SQLite has one isolation level, SERIALIZABLE, which fulfils the others too.

    A transaction that will write takes the lock at its begin: one that only finds out later
    cannot wait for the lock, and fails with "database is locked".
    """
    if mode.autocommit:
        return {BEGIN_OPTION: ()}
    immediate = mode.commits and not mode.read_only
    return {BEGIN_OPTION: ("BEGIN IMMEDIATE" if immediate else "BEGIN",)}


_BEGIN = {
    "postgresql": _begin_postgresql,
    "mysql": _begin_mysql,
    "mariadb": _begin_mysql,
    "sqlite": _begin_sqlite,
}


def _begin(connection: Connection) -> None:
    options = connection.get_execution_options()
    if AUTOCOMMIT_OPTION in options:
        asked = options.get("isolation_level") == "AUTOCOMMIT"  # by a user of the engine itself
        driver: Any = connection.connection.dbapi_connection
        driver.autocommit(asked or options[AUTOCOMMIT_OPTION])  # nothing is sent if it is so
    for statement in options.get(BEGIN_OPTION, ()):
        connection.exec_driver_sql(statement)


# -- what is sent, and what comes of it --------------------------------------------------------

_WRITING = "INSERT|UPDATE|DELETE|MERGE|REPLACE"
_WRITE = re.compile(
    rf"\s*(?:(?:{_WRITING}|TRUNCATE|CREATE|ALTER|DROP|RENAME|LOAD|GRANT|REVOKE)\b"
    r"|WITH\b.*?(?:\bAS\s*(?:NOT\s+)?(?:MATERIALIZED\s*)?\(|\))"
    rf"\s*(?:{_WRITING})\b)",
    re.IGNORECASE | re.DOTALL,
)
_NOT_CODE = re.compile(r"""'[^']*'|"[^"]*"|/\*.*?\*/|--[^\n]*|\#[^\n]*""", re.DOTALL)
"""Literals, quoted names and comments (`#` begins one in MySQL only)."""


@lru_cache(maxsize=1024)
def writes(statement: str) -> bool:
    """Say whether this SQL changes data or tables, by its keywords.

    A function with side effects cannot be seen from here; in `read_only(snapshot=True)` and
    `transactional(read_only=True)` PostgreSQL and MySQL refuse those themselves.
    """
    return _WRITE.match(_NOT_CODE.sub(" ", statement)) is not None


def _before_cursor_execute(
    connection: Connection, _cursor: Any, statement: str, _params: Any, context: Any, _many: bool
) -> None:
    options = connection.get_execution_options()
    mode: Mode | None = options.get(MODE_OPTION)
    unit: UnitOfWork | None = options.get(UNIT_OPTION)
    if writes(statement):
        if mode is not None:
            raise ReadOnlyError(
                f"{_where(unit)}this statement writes, but the mode is {mode.name} and only reads:"
                f" {statement[:60]!r}. Put @transactional on the route, or ask for the"
                " transactional session."
            )
        if unit is not None:
            unit.has_writes = True
    elif mode is not None and mode.autocommit and context.execution_options.get("stream_results"):
        raise ReadOnlyError(
            f"{_where(unit)}a server-side cursor lives in a transaction, and the read_only mode has"
            " none: use read_only(snapshot=True), or fetch the rows at once."
        )


def _where(unit: UnitOfWork | None) -> str:
    return "" if unit is None else f"{unit.describe()}: "


def _handle_error(context: ExceptionContext) -> None:
    """Note the failure of statements that bypass the session: `(await session.connection())…`.

    A savepoint confines a failure, unless to roll back to it fails as well: after a deadlock
    MariaDB has rolled back the whole transaction, savepoints included.
    """
    connection, error = context.connection, context.sqlalchemy_exception
    if connection is not None and isinstance(error, DBAPIError):
        unit: UnitOfWork | None = connection.get_execution_options().get(UNIT_OPTION)
        lost_savepoint = (context.statement or "").startswith("ROLLBACK TO SAVEPOINT")
        if unit is not None and (lost_savepoint or not connection.in_nested_transaction()):
            unit.note_failure(error)


def watch(engine: Engine) -> None:
    """Let the modes take effect on this engine and its variants; harmless to other users of it."""
    event.listen(engine, "begin", _begin)
    event.listen(engine, "before_cursor_execute", _before_cursor_execute)
    event.listen(engine, "handle_error", _handle_error)


# -- the pool ----------------------------------------------------------------------------------


class Connections:
    """The open connections of an engine, and those of them which are out of the pool."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._open: dict[ConnectionPoolEntry, DBAPIConnection] = {}
        self._out: dict[ConnectionPoolEntry, PoolProxiedConnection] = {}
        self._returned = anyio.Event()
        event.listen(engine, "connect", self._connect)
        event.listen(engine, "close", self._close)
        event.listen(engine, "checkout", self._checkout)
        event.listen(engine, "checkin", self._checkin)

    def _connect(self, connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        self._open[entry] = connection

    def _close(self, _: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        self._open.pop(entry, None)

    def _checkout(
        self, _: DBAPIConnection, entry: ConnectionPoolEntry, proxy: PoolProxiedConnection
    ) -> None:
        self._out[entry] = proxy

    def _checkin(self, _: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
        self._out.pop(entry, None)
        self._returned.set()

    async def all_returned(self) -> None:
        """Wait until every connection is back in the pool."""
        while self._out:
            self._returned = anyio.Event()
            await self._returned.wait()

    def terminate(self) -> int:
        """Close what is open without a word to the server; return how many."""
        connections = list(self._open.items())
        for entry, connection in connections:
            try:
                if entry in self._out:  # whoever still has it gets an error, also at COMMIT
                    self._out[entry].invalidate()
                else:
                    self._engine.dialect.do_terminate(connection)
            except RuntimeError:  # its event loop is closed
                _shut_socket(self._engine.dialect.get_driver_connection(connection))
        self._open.clear()
        self._out.clear()
        return len(connections)


def _shut_socket(driver: Any) -> None:
    """End a connection without its event loop, so that the server at least sees it go.

    There is no public way to the transport; the test of applications that start again without
    having been shut down, in `test_lifespan.py`, breaks when this changes.
    """
    is_asyncpg = hasattr(driver, "_transport")
    transport = driver._transport if is_asyncpg else driver._writer.transport
    with contextlib.suppress(OSError, TypeError):  # it is closed already; uvloop sees to it itself
        transport.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


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


def prepare_mysql(engine: Engine) -> None:
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
