"""What an engine does for the modes: how transactions begin, what may be sent, what errors mean.

One engine and one pool serve all modes. For a mode that begins in another way there is a variant
of the engine (`Engine.execution_options()`, which shares the pool); the events below read its
options, and find the unit of work that has a connection.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet, ref

from sqlalchemy import URL, Connection, Engine, event
from sqlalchemy.engine import Dialect, ExceptionContext, ExecutionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import PoolProxiedConnection

from asgi_db.drivers.base import (
    BEGIN_OPTION,
    _begin_standard,
    _is_farewell,
    cause_of,
    has_gone,
    is_conflict,
    lost_connection,
)
from asgi_db.drivers.connecting import DRIVERS, _connect, terminate_adapted
from asgi_db.drivers.mysql import AUTOCOMMIT_OPTION, _begin, _begin_mysql
from asgi_db.drivers.postgresql import (
    _begin_postgresql,
    _is_about_a_prepared_statement,
    _is_asyncpg,
    _leave_autocommit,
    _set_autocommit,
)
from asgi_db.drivers.sqlite import SQLITE_BUSY_TIMEOUT, _begin_sqlite
from asgi_db.errors import (
    ConfigurationError,
    DatabaseTimeoutError,
    OutcomeUnknownError,
    ReadOnlyError,
)
from asgi_db.modes import Mode

UNIT_INFO = "asgi_db_unit_of_work"
"""The key in a pooled connection's `info` under which the unit stands that has it."""


class Unit(Protocol):
    """What the events of an engine know of a unit of work, and what they tell it."""

    @property
    def mode(self) -> Mode:
        """The mode in force."""
        ...

    @property
    def commit_was_sent(self) -> bool:
        """Whether a COMMIT is on its way to the server, or at least may be."""
        ...

    def describe(self) -> str:
        """Name the request or block, for messages."""
        ...

    def statement_comes(self, *, writes: bool) -> None:
        """Count a statement that is about to be sent."""

    def commit_is_sent(self) -> None:
        """Note that the driver is about to send COMMIT, over a connection that is open."""

    def note_conflict(self, error: BaseException) -> None:
        """Note that the database has ended the transaction in favor of another one."""

    def note_failure(self, error: BaseException) -> None:
        """Note that the transaction cannot be committed any more."""

    def overdue_stream(self) -> DatabaseTimeoutError | None:
        """Return the error for a server-side cursor that is read after the end of `timeout=`."""
        ...

    def connection_returned(self, held: float) -> None:
        """Count a connection that is back in the pool, after so many seconds."""


_units: WeakKeyDictionary[Connection, ref[Unit]] = WeakKeyDictionary()
"""Where the unit of a connection is found also when it is lost, and has no `info` any more."""


def _unit_of(connection: Connection | None) -> Unit | None:
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


def begin_unit(connection: Connection, unit: Unit) -> None:
    """Let the events of the engine and of the pool find the unit that now has this connection."""
    pooled = connection.connection
    pooled.info[UNIT_INFO] = unit
    _units[connection] = ref(unit)
    if unit.mode.autocommit and _is_asyncpg(connection.dialect):
        _set_autocommit(pooled.dbapi_connection, True)


_BEGIN = {
    "postgresql": _begin_postgresql,
    "mysql": _begin_mysql,
    "mariadb": _begin_mysql,
    "sqlite": _begin_sqlite,
}


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
    mode = unit.mode
    is_write = writes(statement, is_for_mysql=context.dialect.name in ("mysql", "mariadb"))
    if is_write:
        if mode.read_only and (mode.autocommit or _CALL.match(statement) is None):
            raise ReadOnlyError(
                f"{unit.describe()}: this statement writes, but the mode is {mode.name} and only"
                f" reads: {statement[:60]!r}. Put @transactional on the route, or ask for the"
                " transactional session."
            )
    elif mode.autocommit and context.execution_options.get("stream_results"):
        raise ReadOnlyError(
            f"{unit.describe()}: a server-side cursor lives in a transaction, and the read_only"
            " mode has none: use read_only(snapshot=True), or fetch the rows at once."
        )
    unit.statement_comes(writes=is_write)


def _do_execute(_cursor: Any, statement: str, _parameters: Any, context: ExecutionContext) -> None:
    _check_statement(statement, context)


def _do_execute_no_params(_cursor: Any, statement: str, context: ExecutionContext) -> None:
    _check_statement(statement, context)


def _where(unit: Unit | None) -> str:
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
        unit.note_conflict(error)
    if connection is not None:
        lost_savepoint = (context.statement or "").startswith("ROLLBACK TO SAVEPOINT")
        if unit is not None and (lost_savepoint or not connection.in_nested_transaction()):
            unit.note_failure(error)
    if unit is not None and (overdue := unit.overdue_stream()) is not None:
        raise overdue
    if isinstance(error, DBAPIError) and _is_about_a_prepared_statement(original):
        error.add_detail(
            "If there is a PgBouncer in between, in transaction pooling, say so:"
            ' Database(..., pooler="transaction").'
        )
    elif context.is_disconnect or connection is None or _is_farewell(original):
        context.is_disconnect = True
        if unit is not None and unit.commit_was_sent:
            raise _outcome_unknown(original, unit)
        raise lost_connection(original, _where(unit))


def _outcome_unknown(error: BaseException, unit: Unit) -> OutcomeUnknownError:
    return OutcomeUnknownError(
        f"{unit.describe()}: the connection was lost after COMMIT had been sent, so whether it"
        f" was carried out is unknown ({cause_of(error)})",
        error,
    )


def watch(engine: Engine) -> None:
    """Let the modes take effect on this engine and its variants; harmless to other users of it.

    An engine that has a single event of its own (`begin`) pays at each turn of each connection;
    those of its dialect and its pool cost no more than what they do.
    """
    dialect = engine.dialect
    if dialect not in _wrapped:
        _wrapped.add(dialect)
        _wrap(dialect)
    event.listen(engine, "do_connect", _connect)
    event.listen(engine, "do_execute", _do_execute)
    event.listen(engine, "do_executemany", _do_execute)
    event.listen(engine, "do_execute_no_params", _do_execute_no_params)
    event.listen(engine, "handle_error", _handle_error)
    if _is_asyncpg(dialect):
        event.listen(engine, "checkin", _leave_autocommit)
    else:
        event.listen(engine, "begin", _begin)


_wrapped: WeakSet[Dialect] = WeakSet()
"""The dialects whose methods have been wrapped: an engine and its variants share theirs."""


def _wrap(dialect: Dialect) -> None:
    if dialect.driver in DRIVERS:
        dialect.do_terminate = functools.partial(terminate_adapted, dialect)  # type: ignore[method-assign]
    commit, commit_twophase = dialect.do_commit, dialect.do_commit_twophase
    dialect.do_commit = functools.partial(_commit, commit)  # type: ignore[method-assign]
    dialect.do_commit_twophase = functools.partial(_commit_twophase, commit_twophase)  # type: ignore[method-assign]


def _commit(send: Callable[[PoolProxiedConnection], None], pooled: PoolProxiedConnection) -> None:
    _tell_of_commit(pooled)
    send(pooled)


def _commit_twophase(
    send: Callable[..., None], connection: Connection, *args: Any, **kwargs: Any
) -> None:
    _tell_of_commit(connection.connection)
    send(connection, *args, **kwargs)


def _tell_of_commit(pooled: PoolProxiedConnection) -> None:
    """Tell the unit that has this connection that its COMMIT is sent now, if it is."""
    unit: Unit | None = pooled.info.get(UNIT_INFO)
    if unit is not None and pooled.is_valid and not has_gone(pooled.driver_connection):
        unit.commit_is_sent()


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


# -- how it connects ---------------------------------------------------------------------------
