"""What an engine does for the modes: how transactions begin, what may be sent, what errors mean.

One engine and one pool serve all modes. A mode whose transactions begin differently has a variant
of the engine (`Engine.execution_options()`, which shares the pool). The `info` of a pooled
connection holds what the variant asks for, and the unit of work that uses the connection.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet, ref

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import Dialect, ExceptionContext, ExecutionContext
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from asgi_db.drivers import driver_of
from asgi_db.drivers.base import (
    BEGIN_OPTION,
    Beginning,
    Driver,
    StandIn,
    cause_of,
    connection_error,
    wrong_settings,
)
from asgi_db.drivers.connecting import check_loop, let_driver_connect
from asgi_db.drivers.describing import brief, conflict_error, opening_of
from asgi_db.drivers.statements import Effect, Judge
from asgi_db.errors import (
    ConcurrentUseError,
    ConfigurationError,
    DatabaseConflictError,
    DatabaseDownError,
    DatabaseTimeoutError,
    OutcomeUnknownError,
    ReadOnlyError,
    StatementTimeoutError,
)
from asgi_db.modes import Mode
from asgi_db.statistics import WITHOUT_SESSION, Tally
from asgi_db.writers import OneWriter, writer_of

UNIT_INFO = "asgi_db_unit_of_work"
"""The key in a pooled connection's `info` for the unit that uses the connection."""

_IS_CHANGED = "asgi_db_is_changed"
"""The key in a pooled connection's `info` for whether a statement has changed a setting of the
connection: true if it lasts, false if the transaction may still be rolled back."""


class _SettingsChanged(Exception):
    """Why a connection is closed: a statement has changed it, which no other request asked for."""


_BEGINNING = "asgi_db_beginning"
"""The key in a pooled connection's `info` for how the transactions of a variant begin."""


class UnitTransaction(Protocol):
    """What the events of an engine know about a unit's transaction, and what they report to it.

    Attributes:
        effect: the greatest effect of its statements.
        was_handed_out: whether its connection was handed out, over which anything may be sent.
    """

    effect: Effect
    was_handed_out: bool

    @property
    def commit_was_sent(self) -> bool:
        """Whether a COMMIT is, or may be, on its way to the server."""
        ...

    def commit_is_sent(self) -> None:
        """Note that the driver is about to send COMMIT over an open connection."""

    def note_failure(self, error: BaseException) -> None:
        """Note that it can no longer be committed."""


class Unit(Protocol):
    """What the events of an engine know about a unit of work, and what they report to it.

    Attributes:
        loop: the event loop of its session.
        fixed_mode: the mode that its first statement has fixed.
        conflict: the last error of the database about a conflict with another transaction.
    """

    loop: asyncio.AbstractEventLoop
    fixed_mode: Mode | None
    conflict: DatabaseConflictError | None

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
        """Return the error for reading a server-side cursor after the end of `timeout=`."""
        ...

    @property
    def tally(self) -> Tally:
        """What the unit has done so far; its connections are added when they are returned."""
        ...


_units: WeakKeyDictionary[Connection, ref[Unit]] = WeakKeyDictionary()
"""The unit that uses a connection. This also finds the unit of an invalidated connection, which no
longer has an `info`: reading from a stream of a unit whose time is over has to raise its error."""


def _unit_of(connection: Connection | None) -> Unit | None:
    found = None if connection is None else _units.get(connection)
    return None if found is None else found()


# -- how a transaction begins ------------------------------------------------------------------


def refuse_autocommit(setting: str, options: Mapping[str, Any]) -> None:
    """Refuse an engine that commits each statement by itself, so that no mode could roll back.

    Args:
        setting: the setting of `Database` that the options come from.
        options: the options of `create_engine`.

    Raises:
        ConfigurationError: its isolation level is AUTOCOMMIT.
    """
    of_connections: Mapping[str, Any] = options.get("execution_options") or {}
    for level in (options.get("isolation_level"), of_connections.get("isolation_level")):
        # SQLAlchemy reads the level in the same way.
        if str(level).replace("_", " ").upper() == "AUTOCOMMIT":
            raise ConfigurationError(
                f"{setting} has the isolation level AUTOCOMMIT, with which transactional could not"
                " roll back: leave it out. To read without a transaction, use read_only."
            )


def isolation_options(engine: Engine) -> dict[str, Any]:
    """Return the options of `create_engine` that set the isolation level of an engine.

    One of the two cannot be read through a public API; the test of engines in autocommit in
    `test_database.py` breaks when this changes.
    """
    return {
        "isolation_level": getattr(engine.dialect, "_on_connect_isolation_level", None),
        "execution_options": engine.get_execution_options(),
    }


def variant_options(engine: Engine, mode: Mode) -> dict[str, Any]:
    """Return the execution options with which an engine serves this mode.

    Raises:
        ConfigurationError: the mode asks for a feature that this database does not have.
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
    """Return the variant of an engine whose transactions begin as the mode requires.

    Raises:
        ConfigurationError: the mode asks for a feature that this database does not have.
    """
    watch(engine)
    options = variant_options(engine, mode)
    if options.items() <= engine.get_execution_options().items():
        # The engine itself is faster than a variant, which looks up its events in the engine.
        return engine
    varied = engine.execution_options(**options)
    if (beginning := options.get(BEGIN_OPTION)) is not None:

        def raw_connection() -> PoolProxiedConnection:
            pooled = engine.raw_connection()
            # `do_begin` sees only this connection.
            pooled.info[_BEGINNING] = beginning
            return pooled

        varied.raw_connection = raw_connection  # type: ignore[method-assign]
    return varied


def begin_unit(connection: Connection, unit: Unit, mode: Mode) -> None:
    """Mark a connection so that the engine and the pool can find the unit that now uses it."""
    pooled = connection.connection
    pooled.info[UNIT_INFO] = unit
    _units[connection] = ref(unit)
    if mode.autocommit and pooled.dbapi_connection is not None:
        driver_of(connection.dialect).enter_autocommit(pooled.dbapi_connection)


def begin_now(connection: Connection, unit: Unit) -> None:
    """Have the transaction begin at the server, before the connection itself is handed out.

    Raises:
        DatabaseDownError: the connection was closed.
    """
    driver, pooled = driver_of(connection.dialect), connection.connection
    try:
        driver.begin_now(pooled)
    except Exception as error:
        if not driver.is_closed(pooled.driver_connection):
            raise
        connection.invalidate(error)
        raise connection_error(error, _where(unit)) from error
    unit.transaction.effect = max(unit.transaction.effect, Effect.HOLDS)
    unit.transaction.was_handed_out = True


def has_unseen_writes(connection: Connection) -> bool:
    """Return whether the open transaction has written over the connection of the driver."""
    return driver_of(connection.dialect).has_written(connection.connection)


# -- statements and errors ---------------------------------------------------------------------


def _do_execute(
    judge: Judge,
    writer: OneWriter | None,
    _cursor: Any,
    statement: str,
    _parameters: Any,
    context: ExecutionContext,
) -> None:
    """Check a statement against the mode before it is sent."""
    found = _units.get(context.root_connection)
    unit = None if found is None else found()
    if unit is None:
        if writer is not None and judge.effect_of(statement).writes:
            writer.claim(context.root_connection.connection)
        pool = context.root_connection.engine.pool
        check_loop(getattr(pool, "loop", None), "A connection of the engine was used")
        return
    if asyncio.get_running_loop() is not unit.loop:
        raise ConcurrentUseError.session_in_another_loop("execute", unit.describe())
    mode = unit.fixed_mode or unit.mode
    effect = judge.effect_of(statement)
    if mode.read_only:
        if effect < Effect.LOCKS and judge.drops_lock(context.compiled):
            effect = Effect.LOCKS
        # In a read-only transaction the server itself checks what a statement calls.
        if effect in _REFUSED or (mode.autocommit and effect > Effect.UNSURE):
            raise _not_read_only(effect, unit, mode, statement, driver_of(context.dialect))
        if mode.autocommit and context.execution_options.get("stream_results"):
            raise ReadOnlyError(
                f"{unit.describe()}: a server-side cursor lives in a transaction, and the read_only"
                " mode has none: use read_only(snapshot=True), or fetch the rows at once."
            )
    tally = unit.tally
    tally.statements += 1
    if tally.trace is not None:
        quotes = driver_of(context.dialect).has_double_quoted_strings
        tally.trace.begin(statement, has_double_quoted_strings=quotes)
    if effect > unit.transaction.effect:
        if writer is not None and effect.writes and not mode.commits:
            writer.claim(context.root_connection.connection)  # others have begun with it
        unit.transaction.effect = effect
    if effect is Effect.SETS:
        driver = driver_of(context.dialect)
        info = context.root_connection.connection.info
        info.setdefault(_IS_CHANGED, not driver.settings_are_transactional)


def _do_execute_no_params(
    judge: Judge,
    writer: OneWriter | None,
    cursor: Any,
    statement: str,
    context: ExecutionContext,
) -> None:
    _do_execute(judge, writer, cursor, statement, None, context)


_REFUSED = (Effect.LOCKS, Effect.WRITES)
"""What no mode that only reads may do."""


def _not_read_only(
    effect: Effect, unit: Unit, mode: Mode, statement: str, driver: Driver
) -> ReadOnlyError:
    shown = opening_of(statement, has_double_quoted_strings=driver.has_double_quoted_strings)
    if effect in (Effect.HOLDS, Effect.SETS):
        return ReadOnlyError(
            f"{unit.describe()}: what this statement takes, such as a lock or a setting, lasts as"
            f" long as its transaction or connection, and the read_only mode keeps neither:"
            f" {shown!r}. Use read_only(snapshot=True), or put @transactional on the route."
        )
    does = "locks rows" if effect is Effect.LOCKS else "writes"
    return ReadOnlyError(
        f"{unit.describe()}: this statement {does}, but the mode is {mode.name} and only reads:"
        f" {shown!r}. Put @transactional on the route, or ask for the transactional session."
    )


def _where(unit: Unit | None) -> str:
    return "" if unit is None else f"{unit.describe()}: "


def _handle_error(context: ExceptionContext) -> Exception | None:
    """Note the failure of statements that bypass the session: `(await session.connection())…`.

    A savepoint confines a failure, unless the rollback to it fails as well: after a deadlock
    MariaDB has rolled back the whole transaction, including its savepoints.

    Returns:
        The error for a conflict or a timeout in a unit, in place of SQLAlchemy's.

    Raises:
        DatabaseDownError: replaces the various errors of the driver for a closed connection.
    """
    connection, original = context.connection, context.original_exception
    if isinstance(original, DatabaseDownError):  # A driver's `begin` has raised it.
        context.is_disconnect = True
        return None
    driver = driver_of(context.dialect)
    error = context.sqlalchemy_exception or original
    if context.is_pre_ping or not (isinstance(error, DBAPIError) or driver.is_own_error(original)):
        return None
    unit = _unit_of(connection)
    own: DatabaseConflictError | StatementTimeoutError | None = None
    if unit is not None and driver.is_conflict(original):
        unit.conflict = error = own = conflict_error(error, unit.describe())
        unit.tally.conflicts += 1
    elif unit is not None and (limit := driver.time_limit(original)) is not None:
        error = own = StatementTimeoutError(
            f"{unit.describe()}: the server has ended the statement, because it took longer than"
            f" its limit allows ({limit}). Make the statement faster, or raise the limit.",
            original,
        )
    if unit is not None and (trace := unit.tally.trace) is not None:
        code = driver.code(original)
        name = type(original).__name__
        trace.fail(f"{name} ({code})" if code else name, context.statement)
    if connection is not None:
        savepoint_failed = (context.statement or "").startswith("ROLLBACK TO SAVEPOINT")
        if unit is not None and (savepoint_failed or not connection.in_nested_transaction()):
            unit.transaction.note_failure(error)
    if unit is not None and (overdue := unit.overdue_stream()) is not None:
        raise overdue
    if isinstance(error, DBAPIError) and (advice := driver.advice(original)) is not None:
        error.add_detail(advice)
    elif connection is None and (remedy := driver.remedy(original)) is not None:
        # SQLite opens the file only now, when the connection is set up.
        raise wrong_settings(original, remedy)
    elif context.is_disconnect or driver.is_outage(original):
        context.is_disconnect = True
        # A connection may also be closed when a value is refused, and the error then repeats it.
        cause = cause_of(original) if driver.is_outage(original) else brief(original)
        if connection is not None and (limit := _idle_limit(driver, connection)) is not None:
            cause = f"{cause}; {limit}"
        if unit is not None and unit.transaction.commit_was_sent:
            raise _outcome_unknown(original, unit, cause)
        raise connection_error(original, _where(unit), cause)
    return own


def _idle_limit(driver: Driver, connection: Connection) -> str | None:
    """Name the limit that may have closed a connection while nothing was running on it."""
    if connection.closed or connection.invalidated:
        return None
    pooled = connection.connection
    if pooled.driver_connection is None or not driver.is_closed(pooled.driver_connection):
        return None
    return driver.idle_limit(pooled.driver_connection, in_transaction=True)


def _outcome_unknown(error: BaseException, unit: Unit, cause: str) -> OutcomeUnknownError:
    return OutcomeUnknownError(
        f"{unit.describe()}: the connection was closed after COMMIT had been sent, so whether it"
        f" was carried out is unknown ({cause})",
        error,
    )


_timed: WeakSet[Dialect] = WeakSet()


def time_statements(engine: Engine) -> None:
    """Have the units that are traced told when each of their statements has ended."""
    dialect = engine.dialect
    if dialect not in _timed:
        _timed.add(dialect)
        for name in "do_execute", "do_executemany", "do_execute_no_params":
            setattr(dialect, name, functools.partial(_execute, getattr(dialect, name)))


def _execute(execute: Callable[..., None], *args: Any) -> None:
    try:
        execute(*args)
    finally:
        context: ExecutionContext = args[-1]
        unit = _unit_of(context.root_connection)
        if unit is not None and (trace := unit.tally.trace) is not None:
            trace.end()


# -- installation in SQLAlchemy's engine -------------------------------------------------------

_watched: WeakSet[Dialect] = WeakSet()
"""The dialects of all watched engines; an engine and its variants share one dialect."""


def watch(engine: Engine) -> None:
    """Apply the modes to this engine and its variants, without harm to other users of it.

    A single event of the engine itself, such as `begin`, slows down every step of every
    connection. Events of its dialect and its pool, and methods of its dialect, have no such cost.
    """
    dialect = engine.dialect
    if dialect in _watched:
        return
    _watched.add(dialect)
    driver = driver_of(dialect)
    driver.extend(dialect)
    writer = None
    if driver.has_one_writer:
        writer = writer_of(str(engine.url.database), driver, _describe_holder)
    _wrap(dialect, driver, writer, engine.get_execution_options().get(BEGIN_OPTION))
    event.listen(engine, "do_connect", let_driver_connect)
    judge = Judge(driver.effect_of, drops_row_locks=driver.drops_row_locks)
    do_execute = functools.partial(_do_execute, judge, writer)
    event.listen(engine, "do_execute", do_execute)
    event.listen(engine, "do_executemany", do_execute)
    no_params = functools.partial(_do_execute_no_params, judge, writer)
    event.listen(engine, "do_execute_no_params", no_params)
    event.listen(engine, "handle_error", _handle_error)
    event.listen(engine, "checkin", functools.partial(_checkin, driver))


def _describe_holder(pooled: PoolProxiedConnection) -> str:
    unit: Unit | None = pooled.info.get(UNIT_INFO)
    return WITHOUT_SESSION if unit is None else unit.describe()


def _wrap(
    dialect: Dialect, driver: Driver, writer: OneWriter | None, beginning: Beginning | None
) -> None:
    """Extend the methods of a dialect where no event would do.

    Args:
        beginning: how transactions begin where no variant says otherwise.
    """
    if driver.is_supported:
        dialect.do_terminate = functools.partial(_terminate, dialect, driver)  # type: ignore[method-assign]
    begin, commit = dialect.do_begin, dialect.do_commit
    dialect.do_begin = functools.partial(_begin, begin, driver, writer, beginning)  # type: ignore[method-assign]
    dialect.do_commit = functools.partial(_commit, commit, driver)  # type: ignore[method-assign]
    commit_twophase = dialect.do_commit_twophase
    dialect.do_commit_twophase = functools.partial(_commit_twophase, commit_twophase, driver)  # type: ignore[method-assign]


def _terminate(dialect: Dialect, driver: Driver, connection: DBAPIConnection) -> None:
    """Close a discarded connection without waiting for anything.

    SQLAlchemy itself says goodbye to the server first. If a cancellation interrupts that, the pool
    has permanently one connection less.
    """
    driver.terminate(dialect.get_driver_connection(connection))


def _begin(
    begin: Callable[[PoolProxiedConnection], None],
    driver: Driver,
    writer: OneWriter | None,
    beginning: Beginning | None,
    pooled: PoolProxiedConnection,
) -> None:
    beginning = pooled.info.get(_BEGINNING, beginning)
    if beginning is not None:
        if beginning.writes and writer is not None:
            writer.claim(pooled)
        driver.begin(pooled, beginning)
    begin(pooled)


def _commit(
    commit: Callable[[PoolProxiedConnection], None], driver: Driver, pooled: PoolProxiedConnection
) -> None:
    """Commit; tell the unit that uses this connection first, if COMMIT can be sent at all."""
    unit: Unit | None = pooled.info.get(UNIT_INFO)
    if _IS_CHANGED in pooled.info:
        pooled.info[_IS_CHANGED] = True
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
    is_changed = entry.info.pop(_IS_CHANGED, False)
    if connection is not None:
        driver.leave_autocommit(connection)
        if is_changed and not isinstance(entry.driver_connection, StandIn):
            # Only the statement's author knows what it was before; a new connection does, too.
            entry.invalidate(_SettingsChanged())
