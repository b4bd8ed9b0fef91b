"""How the modes are installed in an engine of SQLAlchemy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import Dialect, ExecutionContext
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from asgi_db.drivers import driver_of
from asgi_db.drivers.connecting import let_driver_connect
from asgi_db.drivers.protocol import BEGIN_OPTION, Beginning, Driver, StandIn
from asgi_db.drivers.statements import Judge
from asgi_db.engine.failures import handle_error
from asgi_db.engine.statements import IS_CHANGED, SettingsChanged, do_execute, do_execute_no_params
from asgi_db.engine.unit import UNIT_INFO, Unit, unit_of
from asgi_db.engine.writers import OneWriter, writer_of
from asgi_db.engine.writes import IS_READ_ONLY, writes_of
from asgi_db.statistics import WITHOUT_SESSION

BEGINNING = "asgi_db_beginning"
"""The key in a pooled connection's `info` for how the transactions of a variant begin."""


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
        unit = unit_of(context.root_connection)
        if unit is not None and (trace := unit.tally.trace) is not None:
            trace.end()


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
    writes = writes_of(dialect)
    check = functools.partial(do_execute, judge, writer, writes)
    event.listen(engine, "do_execute", check)
    event.listen(engine, "do_executemany", check)
    no_params = functools.partial(do_execute_no_params, judge, writer, writes)
    event.listen(engine, "do_execute_no_params", no_params)
    event.listen(engine, "handle_error", handle_error)
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
    beginning = pooled.info.get(BEGINNING, beginning)
    if beginning is not None:
        if beginning.writes and writer is not None:
            writer.claim(pooled)
        if beginning.statements or beginning.autocommit is not None:
            driver.begin(pooled, beginning)
    begin(pooled)


def _commit(
    commit: Callable[[PoolProxiedConnection], None], driver: Driver, pooled: PoolProxiedConnection
) -> None:
    """Commit; tell the unit that uses this connection first, if COMMIT can be sent at all."""
    unit: Unit | None = pooled.info.get(UNIT_INFO)
    if IS_CHANGED in pooled.info:
        pooled.info[IS_CHANGED] = True
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
    entry.info.pop(BEGINNING, None)
    entry.info.pop(IS_READ_ONLY, None)
    is_changed = entry.info.pop(IS_CHANGED, False)
    if connection is not None:
        if driver.tells_autocommit:
            driver.leave_autocommit(connection)
        if is_changed and not isinstance(entry.driver_connection, StandIn):
            # Only the statement's author knows what it was before; a new connection does, too.
            entry.invalidate(SettingsChanged())
