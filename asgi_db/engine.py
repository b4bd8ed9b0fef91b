"""What an engine does for the modes: how transactions begin, what may be sent, what errors mean.

One engine and one pool serve all modes. For a mode that begins in another way there is a variant
of the engine (`Engine.execution_options()`, which shares the pool). What a variant asks for, and
the unit of work that has a connection, stand in the `info` of the pooled connection.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet, ref

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import Dialect, ExceptionContext, ExecutionContext
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from asgi_db.drivers import driver_of
from asgi_db.drivers.base import BEGIN_OPTION, Beginning, Driver, cause_of, lost_connection
from asgi_db.drivers.connecting import let_driver_connect
from asgi_db.errors import (
    ConfigurationError,
    DatabaseDownError,
    DatabaseTimeoutError,
    OutcomeUnknownError,
    ReadOnlyError,
)
from asgi_db.modes import Mode
from asgi_db.statistics import Tally

UNIT_INFO = "asgi_db_unit_of_work"
"""The key in a pooled connection's `info` under which the unit stands that has it."""

_BEGINNING = "asgi_db_beginning"
"""The key in a pooled connection's `info` for how the transactions of a variant begin."""


class UnitTransaction(Protocol):
    """What the events of an engine know of a unit's transaction, and what they tell it.

    Attributes:
        has_writes: whether it holds writes.
    """

    has_writes: bool

    @property
    def commit_was_sent(self) -> bool:
        """Whether a COMMIT is on its way to the server, or at least may be."""
        ...

    def commit_is_sent(self) -> None:
        """Note that the driver is about to send COMMIT, over a connection that is open."""

    def note_failure(self, error: BaseException) -> None:
        """Note that it cannot be committed any more."""


class Unit(Protocol):
    """What the events of an engine know of a unit of work, and what they tell it.

    Attributes:
        fixed_mode: the mode that its first statement has fixed.
        conflict: the last error with which the database has preferred another transaction.
    """

    fixed_mode: Mode | None
    conflict: BaseException | None

    @property
    def mode(self) -> Mode:
        """The mode in force."""
        ...

    @property
    def transaction(self) -> UnitTransaction:
        """The transaction that is open."""
        ...

    def describe(self) -> str:
        """Name the request or block, for messages."""
        ...

    def overdue_stream(self) -> DatabaseTimeoutError | None:
        """Return the error for a server-side cursor that is read after the end of `timeout=`."""
        ...

    @property
    def tally(self) -> Tally:
        """What the unit has done so far; its connections are added when they are back."""
        ...


_units: WeakKeyDictionary[Connection, ref[Unit]] = WeakKeyDictionary()
"""Where the unit is found that has a connection, also when that was invalidated and so has no
`info` any more: what is read from a stream of a unit whose time is over tells the unit."""


def _unit_of(connection: Connection | None) -> Unit | None:
    found = None if connection is None else _units.get(connection)
    return None if found is None else found()


# -- how a transaction begins ------------------------------------------------------------------


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
    dialect = engine.dialect
    driver = driver_of(dialect)
    if mode.deferrable and not driver.has_deferrable:
        raise ConfigurationError(
            f"deferrable=True exists only on PostgreSQL, and this database is {dialect.name}: leave"
            " it out of transactional(...)."
        )
    is_prepared = BEGIN_OPTION in engine.get_execution_options()
    return driver.begin_options(mode, is_prepared=is_prepared)


def variant(engine: Engine, mode: Mode) -> Engine:
    """Return the variant of an engine on which transactions begin as the mode says.

    Raises:
        ConfigurationError: the mode asks for what this database does not have.
    """
    watch(engine)
    options = variant_options(engine, mode)
    if options.items() <= engine.get_execution_options().items():
        return engine  # which does not look up its events in another, as a variant does
    varied = engine.execution_options(**options)
    if (beginning := options.get(BEGIN_OPTION)) is not None:

        def raw_connection() -> PoolProxiedConnection:
            pooled = engine.raw_connection()
            pooled.info[_BEGINNING] = beginning  # `do_begin` sees no more than this
            return pooled

        varied.raw_connection = raw_connection  # type: ignore[method-assign]
    return varied


def begin_unit(connection: Connection, unit: Unit, mode: Mode) -> None:
    """Let the engine and the pool find the unit that now has this connection."""
    pooled = connection.connection
    pooled.info[UNIT_INFO] = unit
    _units[connection] = ref(unit)
    if mode.autocommit and pooled.dbapi_connection is not None:
        driver_of(connection.dialect).stand_alone(pooled.dbapi_connection)


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
_NOT_CODE_WITH_HASH = re.compile(_NOT_CODE.pattern + r"|\#[^\n]*", re.DOTALL)
"""Where `#` begins a comment. Elsewhere it is an operator: `data #>> '{a}'`."""


@functools.lru_cache(maxsize=1024)
def writes(statement: str, *, has_hash_comments: bool = False) -> bool:
    """Say whether this SQL changes data or tables, or may do so, by its keywords.

    A function with side effects cannot be seen from here; in `read_only(snapshot=True)` and
    `transactional(read_only=True)` PostgreSQL and MySQL refuse those themselves.
    """
    not_code = _NOT_CODE_WITH_HASH if has_hash_comments else _NOT_CODE
    return _WRITE.match(not_code.sub(" ", statement)) is not None


def _do_execute(
    driver: Driver, _cursor: Any, statement: str, _parameters: Any, context: ExecutionContext
) -> None:
    """Hold a statement that is about to be sent against the mode."""
    found = _units.get(context.root_connection)
    unit = None if found is None else found()
    if unit is None:
        return
    mode = unit.fixed_mode or unit.mode
    is_write = writes(statement, has_hash_comments=driver.has_hash_comments)
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
    unit.tally.statements += 1
    if is_write:
        unit.transaction.has_writes = True


def _do_execute_no_params(
    driver: Driver, cursor: Any, statement: str, context: ExecutionContext
) -> None:
    _do_execute(driver, cursor, statement, None, context)


def _where(unit: Unit | None) -> str:
    return "" if unit is None else f"{unit.describe()}: "


def _handle_error(context: ExceptionContext) -> None:
    """Note the failure of statements that bypass the session: `(await session.connection())…`.

    A savepoint confines a failure, unless to roll back to it fails as well: after a deadlock
    MariaDB has rolled back the whole transaction, savepoints included.

    Raises:
        DatabaseDownError: in place of the driver's many words for a connection that is closed.
    """
    connection, original = context.connection, context.original_exception
    if isinstance(original, DatabaseDownError):  # of a driver's `begin`
        context.is_disconnect = True
        return
    driver = driver_of(context.dialect)
    error = context.sqlalchemy_exception or original
    if context.is_pre_ping or not (isinstance(error, DBAPIError) or driver.is_own_error(original)):
        return
    unit = _unit_of(connection)
    if unit is not None and driver.is_conflict(original):
        unit.conflict = error
    if connection is not None:
        savepoint_failed = (context.statement or "").startswith("ROLLBACK TO SAVEPOINT")
        if unit is not None and (savepoint_failed or not connection.in_nested_transaction()):
            unit.transaction.note_failure(error)
    if unit is not None and (overdue := unit.overdue_stream()) is not None:
        raise overdue
    if isinstance(error, DBAPIError) and (advice := driver.advice(original)) is not None:
        error.add_detail(advice)
    elif context.is_disconnect or connection is None or driver.is_outage(original):
        context.is_disconnect = True
        if unit is not None and unit.transaction.commit_was_sent:
            raise _outcome_unknown(original, unit)
        raise lost_connection(original, _where(unit))


def _outcome_unknown(error: BaseException, unit: Unit) -> OutcomeUnknownError:
    return OutcomeUnknownError(
        f"{unit.describe()}: the connection was closed after COMMIT had been sent, so whether it"
        f" was carried out is unknown ({cause_of(error)})",
        error,
    )


# -- where it takes effect ---------------------------------------------------------------------

_watched: WeakSet[Dialect] = WeakSet()
"""The dialects of the engines that are watched: an engine and its variants share theirs."""


def watch(engine: Engine) -> None:
    """Let the modes take effect on this engine and its variants; harmless to other users of it.

    An engine that has a single event of its own, such as `begin`, pays at each turn of each
    connection. The events of its dialect and its pool, and the methods of its dialect, cost no
    more than what they do.
    """
    dialect = engine.dialect
    if dialect in _watched:
        return
    _watched.add(dialect)
    driver = driver_of(dialect)
    _wrap(dialect, driver, engine.get_execution_options().get(BEGIN_OPTION))
    event.listen(engine, "do_connect", let_driver_connect)
    do_execute = functools.partial(_do_execute, driver)
    event.listen(engine, "do_execute", do_execute)
    event.listen(engine, "do_executemany", do_execute)
    event.listen(engine, "do_execute_no_params", functools.partial(_do_execute_no_params, driver))
    event.listen(engine, "handle_error", _handle_error)
    event.listen(engine, "checkin", functools.partial(_checkin, driver))


def _wrap(dialect: Dialect, driver: Driver, beginning: Beginning | None) -> None:
    """Let the methods of a dialect do what no event does.

    Args:
        beginning: how transactions begin where no variant says otherwise.
    """
    if driver.is_supported:
        dialect.do_terminate = functools.partial(_terminate, dialect, driver)  # type: ignore[method-assign]
    begin, commit = dialect.do_begin, dialect.do_commit
    dialect.do_begin = functools.partial(_begin, begin, driver, beginning)  # type: ignore[method-assign]
    dialect.do_commit = functools.partial(_commit, commit, driver)  # type: ignore[method-assign]
    commit_twophase = dialect.do_commit_twophase
    dialect.do_commit_twophase = functools.partial(_commit_twophase, commit_twophase, driver)  # type: ignore[method-assign]


def _terminate(dialect: Dialect, driver: Driver, connection: DBAPIConnection) -> None:
    """Close a connection that is discarded, without waiting for anything.

    SQLAlchemy's own way says goodbye to the server first; and if a cancellation interrupts it
    there, the pool has one connection less for ever.
    """
    driver.terminate(dialect.get_driver_connection(connection))


def _begin(
    begin: Callable[[PoolProxiedConnection], None],
    driver: Driver,
    beginning: Beginning | None,
    pooled: PoolProxiedConnection,
) -> None:
    beginning = pooled.info.get(_BEGINNING, beginning)
    if beginning is not None:
        driver.begin(pooled, beginning)
    begin(pooled)


def _commit(
    commit: Callable[[PoolProxiedConnection], None], driver: Driver, pooled: PoolProxiedConnection
) -> None:
    """Commit, and tell the unit that has this connection that its COMMIT is sent now, if it is."""
    unit: Unit | None = pooled.info.get(UNIT_INFO)
    if unit is not None and pooled.is_valid and not driver.is_closed(pooled.driver_connection):
        unit.transaction.commit_is_sent()
    commit(pooled)


def _commit_twophase(
    commit: Callable[..., None], driver: Driver, connection: Connection, *args: Any, **kwargs: Any
) -> None:
    def commit_second_phase(_: PoolProxiedConnection) -> None:
        commit(connection, *args, **kwargs)

    _commit(commit_second_phase, driver, connection.connection)


def _checkin(
    driver: Driver, connection: DBAPIConnection | None, entry: ConnectionPoolEntry
) -> None:
    entry.info.pop(_BEGINNING, None)
    if connection is not None:
        driver.returned(connection)
