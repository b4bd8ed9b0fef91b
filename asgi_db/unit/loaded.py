"""What the objects of a session have loaded, which a rollback expires.

SQLAlchemy lets objects load again what a rollback may have changed. When a unit of work has ended
that is too late: there is no transaction any more, and whatever reads an object then, such as an
access log, cannot await anything. So they get back what they had loaded, without the changes.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import event, inspect
from sqlalchemy.orm import (
    InstanceState,
    LoaderCallableStatus,
    ORMExecuteState,
    Session,
    SessionTransaction,
)
from sqlalchemy.orm.attributes import set_committed_value

Values = dict[InstanceState[Any], dict[str, Any]]


class LoadedValues:
    """The values that objects have lost, or would lose by a rollback."""

    def __init__(self) -> None:
        self._changed: dict[SessionTransaction | None, Values] = {}
        """What objects had loaded before they were flushed, for each savepoint; None is outside."""
        self._lost: Values = {}

    def flush_begins(self, session: Session) -> None:
        """Note what the objects that will be flushed have loaded."""
        changed = self._changed.setdefault(session.get_nested_transaction(), {})
        for instance in (*session.dirty, *session.deleted):
            state = inspect(instance)
            if state not in changed:
                changed[state] = _loaded(state)

    def savepoint_ended(self, savepoint: SessionTransaction) -> None:
        """Leave the changes of a savepoint to the transaction, unless they were rolled back."""
        if (changed := self._changed.pop(savepoint, None)) is not None:
            outer = savepoint.parent
            while outer is not None and not outer.nested:
                outer = outer.parent
            self._changed[outer] = {**changed, **self._changed.get(outer, {})}

    def committed(self) -> None:
        """Note that what was changed is in the database."""
        self._changed.clear()

    def rolled_back(self, session: Session) -> None:
        """Note what the objects have loaded, right before a rollback expires it."""
        savepoint = session.get_nested_transaction()
        changed = self._changed.pop(savepoint, {})
        if savepoint is not None:
            expired = {state: _loaded(state) for state in map(inspect, session.dirty)}
        else:
            expired = {state: _loaded(state) for state in session.identity_map.all_states()}
            self._changed.clear()
        self._lost = {
            state: {**self._lost.get(state, {}), **values}
            for state, values in {**self._lost, **expired, **changed}.items()
            if state.obj() is not None
        }

    def give_back(self, session: Session) -> None:
        """Give the objects what they have lost and not loaded again.

        Args:
            session: their session; those which another one has taken are left to that one.
        """
        lost, self._lost = self._lost, {}
        for state, values in lost.items():
            if state.session in (None, session) and (instance := state.obj()) is not None:
                for key in values.keys() - state.dict.keys():
                    set_committed_value(instance, key, values[key])


def read_again(session: Session) -> None:
    """Have what is selected again in the next transaction replace what the last one has loaded.

    SQLAlchemy keeps the values that an object has, which is right within one transaction. Values
    of an earlier one are stale, and an UPDATE made of them would undo what others have committed
    meanwhile, even in SERIALIZABLE.
    """
    if not event.contains(session, "do_orm_execute", _refresh):
        event.listen(session, "do_orm_execute", _refresh)


def _refresh(execution: ORMExecuteState) -> None:
    is_own = not (execution.is_column_load or execution.is_relationship_load)
    # To refresh an object would throw away what was changed and not flushed.
    if execution.is_select and is_own and not execution.session.dirty:
        execution.update_execution_options(populate_existing=True)


def _loaded(state: InstanceState[Any]) -> dict[str, Any]:
    """What an object has loaded, without the changes that were not flushed."""
    values = dict(state.dict)
    for key, original in state.committed_state.items():
        if isinstance(original, LoaderCallableStatus):  # It was set without having been loaded.
            values.pop(key, None)
        else:
            values[key] = original
    return values
