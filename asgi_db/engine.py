"""What an engine does for the modes: how transactions begin, what may be sent, what errors mean.

One engine and one pool serve all modes. For a mode that begins in another way there is a variant
of the engine (`Engine.execution_options()`, which shares the pool); the events below read its
options, and find the unit of work that has a connection.
"""

from __future__ import annotations

import functools
import re
import sqlite3
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet, ref

from sqlalchemy import URL, Connection, Engine, event
from sqlalchemy.engine import Dialect, ExceptionContext, ExecutionContext
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry

from asgi_db.cancellation import (
    abandon_connect,
    being_set_up,
    connect_whole,
    in_background,
    terminate,
)
from asgi_db.errors import (
    ConfigurationError,
    DatabaseDownError,
    OutcomeUnknownError,
    ReadOnlyError,
)
from asgi_db.modes import Mode
from asgi_db.retry import is_conflict

if TYPE_CHECKING:
    from asgi_db.unit_of_work import UnitOfWork

BEGIN_OPTION = "asgi_db_begin"
"""Execution option: the statements with which a transaction begins."""

AUTOCOMMIT_OPTION = "asgi_db_autocommit"
"""Execution option: whether the connection is to be in autocommit.

On MySQL it costs a round trip to change that, so a connection stays as it was last used, and each
begin makes sure. With asyncpg it costs nothing; the connection goes back to the pool as it was.
SQLAlchemy's own `isolation_level="AUTOCOMMIT"` changes it twice per request, and listens to events
of the engine (see `watch`).
"""

UNIT_INFO = "asgi_db_unit_of_work"
"""The key in a pooled connection's `info` under which the unit stands that has it."""

SQLITE_BUSY_TIMEOUT = 30.0
"""Seconds that SQLite waits for another connection's lock, unless the user has said how many."""

_units: WeakKeyDictionary[Connection, ref[UnitOfWork]] = WeakKeyDictionary()
"""Where the unit of a connection is found also when it is lost, and has no `info` any more."""


def _unit_of(connection: Connection | None) -> UnitOfWork | None:
    found = None if connection is None else _units.get(connection)
    return None if found is None else found()


# -- how a transaction begins ------------------------------------------------------------------


def base_options(url: URL) -> dict[str, Any]:
    """Return the arguments of `create_async_engine` which the modes need on this database."""
    match url.get_backend_name():
        case "sqlite":
            has_own = "timeout" in url.query  # which connect_args would override
            return {
                "execution_options": {BEGIN_OPTION: ("BEGIN",)},
                "connect_args": {} if has_own else {"timeout": SQLITE_BUSY_TIMEOUT},
            }
        case "mysql" | "mariadb":
            return {
                "execution_options": {AUTOCOMMIT_OPTION: False},
                "skip_autocommit_rollback": True,
                "pool_reset_on_return": None,  # `pool.reset_mysql` does it
            }
        case _:
            return {}


def refuse_autocommit(setting: str, options: Mapping[str, Any]) -> None:
    """Refuse an engine whose every statement is committed by itself: no mode could roll back.

    Args:
        setting: the setting of `Database` that it comes from.
        options: those of `create_engine`.

    Raises:
        ConfigurationError: its isolation level is AUTOCOMMIT.
    """
    of_connections: Mapping[str, Any] = options.get("execution_options") or {}
    for level in (options.get("isolation_level"), of_connections.get("isolation_level")):
        if str(level).replace("_", " ").upper() == "AUTOCOMMIT":  # as SQLAlchemy reads it
            raise ConfigurationError(
                f"{setting} has the isolation level AUTOCOMMIT, with which transactional could not"
                " roll back: leave it out. To read without a transaction is what read_only does."
            )


def isolation_options(engine: Engine) -> dict[str, Any]:
    """Return the options of `create_engine` which say in what isolation an engine begins.

    For one of the two there is no public way; the test of engines in autocommit, in
    `test_database.py`, breaks when this changes.
    """
    return {
        "isolation_level": getattr(engine.dialect, "_on_connect_isolation_level", None),
        "execution_options": engine.get_execution_options(),
    }


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
    if mode.autocommit:
        if _is_asyncpg(engine.dialect):
            return {}  # `begin_unit` sees to it
        if AUTOCOMMIT_OPTION in engine.get_execution_options():
            return {AUTOCOMMIT_OPTION: True}
    return _BEGIN.get(dialect, _begin_standard)(mode)


def _is_asyncpg(dialect: Dialect) -> bool:
    return dialect.driver == "asyncpg"


def begin_unit(connection: Connection, unit: UnitOfWork) -> None:
    """Let the events of the engine and of the pool find the unit that now has this connection."""
    pooled = connection.connection
    pooled.info[UNIT_INFO] = unit
    _units[connection] = ref(unit)
    if unit.mode.autocommit and _is_asyncpg(connection.dialect):
        _set_autocommit(pooled.dbapi_connection, True)


def _set_autocommit(connection: Any, value: bool) -> None:
    connection.autocommit = value


def _leave_autocommit(connection: DBAPIConnection | None, _: ConnectionPoolEntry) -> None:
    if connection is not None:
        _set_autocommit(connection, False)


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
    return {BEGIN_OPTION: begin} if begin else {}


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
        try:
            driver.autocommit(asked or options[AUTOCOMMIT_OPTION])  # nothing is sent if it is so
        except Exception as error:  # SQLAlchemy does not look after what an event does
            connection.invalidate(error)
            raise lost_connection(error) from error
    for statement in options.get(BEGIN_OPTION, ()):
        connection.exec_driver_sql(statement)


# -- what is sent, and what comes of it --------------------------------------------------------

_WRITING = "INSERT|UPDATE|DELETE|MERGE|REPLACE"
_WRITE = re.compile(
    r"\s*(?:(?:EXPLAIN\b[^;]*?)?\bANALY[SZ]E\b(?:[^)]*\))?(?:\s+VERBOSE)?\s*)?"  # which executes it
    rf"(?:(?:{_WRITING}|TRUNCATE|CREATE|ALTER|DROP|RENAME|LOAD|GRANT|REVOKE|CALL|DO)\b"
    r"|WITH\b.*?(?:\bAS\s*(?:NOT\s+)?(?:MATERIALIZED\s*)?\(|\))"
    rf"\s*(?:{_WRITING})\b)",
    re.IGNORECASE | re.DOTALL,
)
_CALL = re.compile(r"\s*(?:CALL|DO)\b", re.IGNORECASE)
"""What may write or not; in a transaction that only reads the server itself knows."""
_NOT_CODE = re.compile(r"""'[^']*'|"[^"]*"|/\*.*?\*/|--[^\n]*""", re.DOTALL)
"""Literals, quoted names and comments."""
_NOT_CODE_OF_MYSQL = re.compile(_NOT_CODE.pattern + r"|\#[^\n]*", re.DOTALL)
"""Elsewhere `#` is an operator: `data #>> '{a}'`."""


@functools.lru_cache(maxsize=1024)
def writes(statement: str, *, is_for_mysql: bool = False) -> bool:
    """Say whether this SQL changes data or tables, or may do so, by its keywords.

    A function with side effects cannot be seen from here; in `read_only(snapshot=True)` and
    `transactional(read_only=True)` PostgreSQL and MySQL refuse those themselves.
    """
    not_code = _NOT_CODE_OF_MYSQL if is_for_mysql else _NOT_CODE
    return _WRITE.match(not_code.sub(" ", statement)) is not None


def _check_statement(statement: str, context: ExecutionContext) -> None:
    """Hold a statement that is about to be sent against the mode."""
    unit = _unit_of(context.root_connection)
    if unit is None:
        return
    unit.tally.statements += 1
    mode = unit.mode
    if writes(statement, is_for_mysql=context.dialect.name in ("mysql", "mariadb")):
        if mode.read_only and (mode.autocommit or _CALL.match(statement) is None):
            raise ReadOnlyError(
                f"{unit.describe()}: this statement writes, but the mode is {mode.name} and only"
                f" reads: {statement[:60]!r}. Put @transactional on the route, or ask for the"
                " transactional session."
            )
        unit.transaction.has_writes = True
    elif mode.autocommit and context.execution_options.get("stream_results"):
        raise ReadOnlyError(
            f"{unit.describe()}: a server-side cursor lives in a transaction, and the read_only"
            " mode has none: use read_only(snapshot=True), or fetch the rows at once."
        )


def _do_execute(_cursor: Any, statement: str, _parameters: Any, context: ExecutionContext) -> None:
    _check_statement(statement, context)


def _do_execute_no_params(_cursor: Any, statement: str, context: ExecutionContext) -> None:
    _check_statement(statement, context)


def _where(unit: UnitOfWork | None) -> str:
    return "" if unit is None else f"{unit.describe()}: "


def _handle_error(context: ExceptionContext) -> None:
    """Note the failure of statements that bypass the session: `(await session.connection())…`.

    A savepoint confines a failure, unless to roll back to it fails as well: after a deadlock
    MariaDB has rolled back the whole transaction, savepoints included.

    Raises:
        DatabaseDownError: in place of the driver's many words for a connection that is lost.
    """
    connection, original = context.connection, context.original_exception
    error = context.sqlalchemy_exception or original
    is_the_drivers = hasattr(original, "sqlstate")  # asyncpg's own, out of a server-side cursor
    if context.is_pre_ping or not (isinstance(error, DBAPIError) or is_the_drivers):
        return
    unit = _unit_of(connection)
    if unit is not None and is_conflict(error):
        unit.conflict = error
    if connection is not None:
        lost_savepoint = (context.statement or "").startswith("ROLLBACK TO SAVEPOINT")
        if unit is not None and (lost_savepoint or not connection.in_nested_transaction()):
            unit.transaction.note_failure(error)
    if unit is not None and unit.transaction.streams and unit.is_overdue:
        raise unit.overdue()
    if isinstance(error, DBAPIError) and _is_about_a_prepared_statement(original):
        error.add_detail(
            "If there is a PgBouncer in between, in transaction pooling, say so:"
            ' Database(..., pooler="transaction").'
        )
    elif context.is_disconnect or connection is None or _is_farewell(original):
        context.is_disconnect = True
        raise lost_connection(original, unit)


def lost_connection(error: BaseException, unit: UnitOfWork | None = None) -> DatabaseDownError:
    """Make the error for a connection which is lost, or could not be made."""
    cause = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if unit is not None and unit.commit_sent:
        return OutcomeUnknownError(
            f"{unit.describe()}: the connection was lost after COMMIT had been sent, so whether it"
            f" was carried out is unknown ({cause})",
            error,
        )
    return DatabaseDownError(f"{_where(unit)}the database cannot be reached ({cause})", error)


_FAREWELLS = frozenset(
    {"08000", "08001", "08003", "08004", "08006", "57P01", "57P02", "57P03", "53300", 1040, 1053}
)
"""SQLSTATEs and MySQL's error numbers of a server which shuts down, starts, is full or has gone."""


def _is_farewell(error: BaseException) -> bool:
    return (getattr(error, "sqlstate", None) or next(iter(error.args), None)) in _FAREWELLS


def _is_about_a_prepared_statement(error: BaseException) -> bool:
    """Whether it is not where it was prepared, or another one of its name is."""
    state = getattr(error, "sqlstate", None)
    return state in ("26000", "42P05") or (state == "08P01" and "prepared stat" in str(error))


def has_gone(driver: Any) -> bool:
    """Whether the driver has seen the server close this connection: it costs no round trip.

    asyncmy has no public word for it; the test of closed connections in `test_engine.py` breaks
    when this changes.
    """
    if hasattr(driver, "is_closed"):  # asyncpg
        return bool(driver.is_closed())
    return bool(getattr(driver, "_stream_broken", False))


def watch(engine: Engine) -> None:
    """Let the modes take effect on this engine and its variants; harmless to other users of it.

    An engine that has a single event of its own (`begin`) pays at each turn of each connection;
    those of its dialect and its pool cost no more than what they do.
    """
    dialect = engine.dialect
    if dialect.driver in _DRIVERS:
        dialect.do_terminate = functools.partial(_terminate, dialect)  # type: ignore[method-assign]
    event.listen(engine, "do_connect", _connect)
    event.listen(engine, "do_execute", _do_execute)
    event.listen(engine, "do_executemany", _do_execute)
    event.listen(engine, "do_execute_no_params", _do_execute_no_params)
    event.listen(engine, "handle_error", _handle_error)
    if _is_asyncpg(dialect):
        event.listen(engine, "checkin", _leave_autocommit)
    else:
        event.listen(engine, "begin", _begin)


def variant(engine: Engine, mode: Mode) -> Engine:
    """Return the variant of an engine on which transactions begin as the mode says.

    Raises:
        ConfigurationError: the mode asks for what this database does not have.
    """
    watch(engine)
    options = variant_options(engine, mode)
    if options.items() <= engine.get_execution_options().items():
        return engine  # which does not look up its events in another, as a variant does
    return engine.execution_options(**options)


def _terminate(dialect: Dialect, connection: DBAPIConnection) -> None:
    """Close a connection that is given up, without waiting for anything.

    SQLAlchemy's own way takes leave of the server first; and cut off there by a cancellation, the
    pool has one connection less for ever.
    """
    terminate(dialect.get_driver_connection(connection))


# -- how it connects ---------------------------------------------------------------------------


def _connect(
    dialect: Dialect, _: ConnectionPoolEntry | None, __: list[Any], parameters: dict[str, Any]
) -> None:
    """Let the driver connect in its own way, but whole; SQLAlchemy keeps the parameters."""
    if dialect.driver in _DRIVERS and not isinstance(parameters.get(_CREATOR), Connector):
        driver = import_module(dialect.driver)
        connect = _connect_sqlite if dialect.driver == "aiosqlite" else driver.connect
        parameters[_CREATOR] = Connector(parameters.get(_CREATOR, connect), driver)


_DRIVERS = ("asyncpg", "asyncmy", "aiosqlite")
_CREATOR = "async_creator_fn"


class Connector:
    """Connects, undisturbed by cancellation, and with one error for all that can go wrong."""

    def __init__(self, connect: Any, driver: Any) -> None:
        self._connect = connect
        self._errors: tuple[type[Exception], ...] = (OSError,)
        if hasattr(driver, "PostgresError"):  # asyncpg: SQLAlchemy leaves those as they are
            self._errors = OSError, driver.PostgresError, driver.InterfaceError

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the driver's connection.

        Raises:
            DatabaseDownError: there is none.
            ConfigurationError: the driver does not take what the URL asks for.
        """
        try:
            return await connect_whole(self._connect, *args, **kwargs)
        except self._errors as error:
            raise lost_connection(error) from error
        except UnicodeEncodeError as error:
            encoding = error.encoding
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                "The driver does not take the options in the URL, in connect_args or of"
                f" async_creator: {error}."
            ) from error
        # Outside the `except`: Python's error has the whole password in it, and would stay
        # reachable as the `__context__` of ours even with `from None`.
        raise ConfigurationError(
            "The user name, the password or another part of the URL has a character that the"
            f" driver, which sends it as {encoding}, cannot send: change it."
        )


def raise_if_connect_failed(error: BaseException) -> None:
    """Look after the connection that was being set up when this error came, if one was.

    SQLAlchemy leaves what the driver says there as it is.

    Raises:
        DatabaseDownError: the server had closed it.
    """
    driver = being_set_up()
    has_failed = driver is not None and has_gone(driver)
    abandon_connect()
    if has_failed and isinstance(error, Exception) and not isinstance(error, DatabaseDownError):
        raise lost_connection(error) from error


class _SQLiteConnection(sqlite3.Connection):
    """Is closed, and its transaction over, once `close` returns.

    To SQLite a connection is closed only when its last statement is gone: one that was cut off
    would keep the transaction, and its lock, until the garbage collector finds it. And while it
    is there, a connection that has been interrupted refuses to roll back.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._cursors = WeakSet[sqlite3.Cursor]()

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        cursor: sqlite3.Cursor = super().cursor(*args, **kwargs)
        self._cursors.add(cursor)
        return cursor

    def close(self) -> None:
        for cursor in tuple(self._cursors):
            cursor.close()
        super().close()


def _connect_sqlite(*args: Any, **kwargs: Any) -> Any:
    kwargs.setdefault("factory", _SQLiteConnection)
    connection = import_module("aiosqlite").connect(*args, **kwargs)
    # As SQLAlchemy does where it connects by itself; there is no public way. Otherwise a program
    # that does not dispose its database could not end.
    connection._thread.daemon = True
    stop = connection.stop

    def stop_once() -> Any:
        # Its `close` ends with a `stop`, and waits for a thread that an earlier one has ended.
        stopped = stop() if connection._running else None
        if stopped is not None:
            in_background(stopped)
        return stopped

    connection.stop = stop_once
    return connection
