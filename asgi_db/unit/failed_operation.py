"""What an operation that has failed leaves of the transaction of its session."""

from __future__ import annotations

from sqlalchemy.orm import Session
from sqlalchemy.util.concurrency import in_greenlet

from asgi_db.unit.ending import give_back, terminate
from asgi_db.unit.operation import MAY_BE_LATE
from asgi_db.unit.state import LeftOver, State
from asgi_db.unit.translating import conflict_in
from asgi_db.unit.unit_of_work import UnitOfWork


def note_error(error: BaseException, session: Session, unit: UnitOfWork) -> None:
    """Note the error of an operation in its transaction, if it has not ended it."""
    if session.in_transaction():
        error = conflict_in(error, unit) or error
        in_savepoint = session.in_nested_transaction()
        unit.transaction.note_error(error, in_savepoint=in_savepoint)
        if not session.is_active and not in_savepoint:  # A flush has failed, whatever the reason.
            unit.transaction.note_failure(error)


def is_half_ended(unit: UnitOfWork) -> bool:
    """Return whether its failed operation has left a transaction which nothing ends any more."""
    operation = unit.operation
    if operation is None or operation.name not in MAY_BE_LATE:
        return False
    return operation.name == "commit" or not in_greenlet()


def discard_transaction(session: Session, unit: UnitOfWork) -> None:
    """End the transaction; outside a greenlet nothing can be sent, so it is terminated."""
    if unit.has_uncommitted_work:
        unit.left_over = LeftOver.DISCARDED
    connections = unit.transaction.connections
    give_back(session, connections)
    if not in_greenlet():
        terminate(connections)
    unit.transaction.end()
    if unit.state is State.ACTIVE:
        unit.become_idle()
