"""What may be sent in a mode, and what a statement leaves on its connection."""

from __future__ import annotations

import asyncio
from typing import Any

from sqlalchemy.engine import ExecutionContext

from asgi_db.drivers import driver_of
from asgi_db.drivers.connecting import check_loop
from asgi_db.drivers.describing import opening_of
from asgi_db.drivers.protocol import Driver
from asgi_db.drivers.statements import Effect, Judge
from asgi_db.engine.unit import Unit, units
from asgi_db.engine.writers import OneWriter
from asgi_db.engine.writes import IS_READ_ONLY, SAYS_READ_ONLY, Writes
from asgi_db.errors import ConcurrentUseError, ReadOnlyError
from asgi_db.modes import Mode

IS_CHANGED = "asgi_db_is_changed"
"""The key in a pooled connection's `info` for whether a statement has changed a setting of the
connection: true if it lasts, false if the transaction may still be rolled back."""


class SettingsChanged(Exception):
    """Why a connection is closed: a statement has changed it, which no other request asked for."""


def do_execute(
    judge: Judge,
    writer: OneWriter | None,
    writes: Writes,
    _cursor: Any,
    statement: str,
    _parameters: Any,
    context: ExecutionContext,
) -> None:
    """Check a statement against the mode before it is sent."""
    found = units.get(context.root_connection)
    unit = None if found is None else found()
    if unit is None:
        effect = judge.effect_of(statement)
        if effect.writes:
            writes.are_asked_for = True
            if writer is not None:
                writer.claim(context.root_connection.connection)
        elif effect in _SETTING:
            _note_read_only(statement, context)
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
        if effect.writes and not mode.read_only:
            writes.are_asked_for = True
        if writer is not None and effect.writes and not mode.commits:
            writer.claim(context.root_connection.connection)  # others have begun with it
        unit.transaction.effect = effect
    if effect in _SETTING:
        _note_read_only(statement, context)
    if effect is Effect.SETS:
        driver = driver_of(context.dialect)
        info = context.root_connection.connection.info
        info.setdefault(IS_CHANGED, not driver.settings_are_transactional)


def do_execute_no_params(
    judge: Judge,
    writer: OneWriter | None,
    writes: Writes,
    cursor: Any,
    statement: str,
    context: ExecutionContext,
) -> None:
    """Check a statement that has no parameters; SQLAlchemy has an event of its own for it."""
    do_execute(judge, writer, writes, cursor, statement, None, context)


_SETTING = (Effect.HOLDS, Effect.SETS)
"""What can change something of its transaction, or of its connection."""


def _note_read_only(statement: str, context: ExecutionContext) -> None:
    """Note a statement that lets its transaction, or its connection, only read."""
    if SAYS_READ_ONLY.search(statement) is not None:
        context.root_connection.info[IS_READ_ONLY] = True


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
    remedy = "Put @transactional on the route, or ask for the transactional session."
    if mode.commits:
        remedy = "Leave out read_only=True of transactional(...)."
    return ReadOnlyError(
        f"{unit.describe()}: this statement {does}, but the mode is {mode.name} and only reads:"
        f" {shown!r}. {remedy}"
    )
