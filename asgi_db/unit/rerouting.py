"""The synchronous half of a session whose database has replicas.

It chooses the server before each unit of work. If the replica fails in an operation, the operation
runs again on another server; nothing is lost by that, because a replica only reads.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

from sqlalchemy import Connection, Engine, select, tuple_
from sqlalchemy.orm import Mapper
from sqlalchemy.util.concurrency import in_greenlet

from asgi_db.drivers.statements import Effect
from asgi_db.errors import DatabaseTimeoutError
from asgi_db.modes import Mode
from asgi_db.replicas.choice import Choice
from asgi_db.sqlalchemy_versions import await_
from asgi_db.unit.ending import give_back
from asgi_db.unit.operation import MAY_BE_LATE
from asgi_db.unit.sync_session import OPERATIONS, UnitSession
from asgi_db.unit.unit_of_work import UnitOfWork


def rerouting(sync_class: type[UnitSession]) -> type[UnitSession]:
    """Return the class of synchronous halves for a database with replicas.

    Args:
        sync_class: the class for one without.
    """
    operations = {
        name: _moving(getattr(sync_class, name)) for name in OPERATIONS if name not in MAY_BE_LATE
    }
    routed: type[UnitSession] = type(sync_class.__name__, (_Rerouting, sync_class), operations)
    return routed


class _Rerouting(UnitSession):
    """Chooses the server before the engine is chosen; see the top of this file."""

    def get_bind(self, *args: Any, **kwargs: Any) -> Engine | Connection:
        unit = self.unit_of_work
        if unit.operation is not None and unit.fixed_mode is None and in_greenlet():
            await_(_choice_of(self).choose(unit.mode))
        return super().get_bind(*args, **kwargs)


def _choice_of(session: UnitSession) -> Choice:
    return cast(Choice, session.unit_of_work.life)


def _moving(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Return an operation that runs again on another server if its replica has failed."""

    @functools.wraps(operation)
    def moving(self: UnitSession, *args: Any, **kwargs: Any) -> Any:
        unit = self.unit_of_work
        if unit.operation is not None:  # It is part of another one, which runs again as a whole.
            return operation(self, *args, **kwargs)
        choice = _choice_of(self)
        if choice.has_read and not _mode_of_next(unit).may_use_replica and in_greenlet():
            choice.has_read = False
            _read_from_primary(self)
        while True:
            try:
                result = operation(self, *args, **kwargs)
            except Exception as error:
                if isinstance(error, DatabaseTimeoutError):
                    choice.has_not_answered()
                if not _can_run_again(self) or not await_(choice.move(error)):
                    raise
                give_back(self, unit.transaction.connections)
            except BaseException:
                choice.has_not_answered()
                raise
            else:
                choice.has_answered()
                return result

    return moving


def _mode_of_next(unit: UnitOfWork) -> Mode:
    """Return the mode in which the next operation runs."""
    return unit.wanted_mode() or unit.mode


def _read_from_primary(session: UnitSession) -> None:
    """Read again what a replica has shown, before anything is decided by it on the primary.

    The replica may be seconds behind. An object that the session has already would keep its values,
    and an UPDATE made of them would undo what others have committed. What the handler has changed
    stays as it is, and so does what the primary does not have any more.
    """
    identities: defaultdict[Mapper[Any], list[tuple[Any, ...]]] = defaultdict(list)
    for state in session.identity_map.all_states():
        if state.identity is not None and not state.modified:
            identities[state.mapper].append(state.identity)
    for mapper, keys in identities.items():
        columns = mapper.primary_key
        is_one = columns[0].in_([key[0] for key in keys])
        if len(columns) > 1:
            is_one = tuple_(*columns).in_(keys)
        statement = select(mapper.class_).where(is_one)
        found = session.execute(statement, execution_options={"populate_existing": True})
        found.unique().all()


def _can_run_again(session: UnitSession) -> bool:
    """Whether the unit has nothing that would be lost with its connection."""
    unit = session.unit_of_work
    mode = unit.fixed_mode
    return (
        mode is not None
        and (mode.autocommit or not _choice_of(session).has_read)
        and unit.operation is None
        and not unit.holds_more_than(Effect.UNSURE)
        and in_greenlet()
    )
