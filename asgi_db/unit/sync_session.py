"""The synchronous half of a session, which keeps the session inside its unit of work.

Every operation of an `AsyncSession`, including a lazy load and `run_sync`, passes through the
public methods of the SQLAlchemy `Session` underneath. This module wraps these methods: it asks the
unit of work before each operation, and reports to it afterwards. SQLAlchemy's events report the
steps of the transaction.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session, SessionTransaction, SessionTransactionOrigin
from sqlalchemy.util.concurrency import in_greenlet

from asgi_db.drivers.connecting import abandon_connect, being_set_up
from asgi_db.engine.returning import returns_silently
from asgi_db.engine.unit import begin_now, begin_unit
from asgi_db.errors import DatabaseTimeoutError, FailedTransactionError, ReadOnlyError
from asgi_db.sqlalchemy_versions import NEW_OPERATIONS, await_
from asgi_db.tasks import current_task
from asgi_db.unit.deadline import Deadline
from asgi_db.unit.ending import give_back, has_changes
from asgi_db.unit.failed_operation import discard_transaction, is_half_ended, note_error
from asgi_db.unit.loaded import LoadedValues
from asgi_db.unit.operation import (
    DISCARDING,
    ENDS_UNIT,
    KEEPS_CONNECTION,
    MAY_BE_LATE,
    READS,
    Operation,
)
from asgi_db.unit.state import LeftOver, State
from asgi_db.unit.transaction import Stage, Transaction
from asgi_db.unit.translating import outside_the_loop, translated
from asgi_db.unit.unit_of_work import UnitOfWork


class EngineChoice(Session):
    """Chooses the engine, or the variant of it, on which a transaction begins as the mode says."""

    unit_of_work: UnitOfWork

    def get_bind(self, *args: Any, **kwargs: Any) -> Engine | Connection:
        """Choose the engine for the mode; SQLAlchemy calls this before it takes a connection.

        Outside of any operation this is a mere question, which begins nothing.
        """
        bind = super().get_bind(*args, **kwargs)
        unit = self.unit_of_work
        if unit.operation is None:
            return bind if unit.fixed_mode is None else unit.life.bind_for(bind, unit.fixed_mode)
        mode = unit.fixed_mode
        if mode is None:
            if unit.origin.before_unit is not None and in_greenlet():
                await_(unit.origin.before_unit())
            mode = unit.begin()
        chosen = unit.life.bind_for(bind, mode)
        if unit.transaction.stage is Stage.KEPT:
            unit.take_kept(chosen)
        tally = unit.tally
        if not unit.transaction.connections or not unit.transaction.is_open:
            tally.asked = now = time.monotonic()
            if tally.began is None:
                tally.began = now
        return chosen


class UnitSession(Session):
    """A session every operation of which is part of a unit of work."""

    def __init__(self, *args: Any, unit_of_work: UnitOfWork, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unit_of_work = unit_of_work
        unit_of_work.sync_session = self

    def connection(self, *args: Any, **kwargs: Any) -> Connection:
        """Hand out the connection, on which the driver's own may be used too."""
        connection = super().connection(*args, **kwargs)
        begin_now(connection, self.unit_of_work)
        return connection

    def rollback(self) -> None:
        """Roll back, including the changes that `release` has kept outside any transaction."""
        if not self.in_transaction() and has_changes(self):
            Session.begin(self)
        super().rollback()
        unit = self.unit_of_work
        unit.is_rollback_only = False
        if unit.left_over is LeftOver.KEPT:
            unit.left_over = None

    def enter(self, name: str) -> bool:
        """Begin an operation.

        Returns:
            Whether it is a new operation; otherwise it is part of the one that this task is
            running, which is watched as a whole.

        Raises:
            SessionExpiredError: the request is over.
            ConcurrentUseError: another task is in the middle of an operation, or this is another
                event loop.
            DatabaseTimeoutError: the time of the unit is over.
            ModeConflictError: another mode is asked for by now, and the unit holds work.
            MissingGreenlet: there is no event loop here.
        """
        unit = self.unit_of_work
        try:
            task = asyncio.current_task()
        except RuntimeError:
            raise outside_the_loop(name, unit.describe()) from None
        operation = unit.operation
        if asyncio.get_running_loop() is not unit.loop:
            unit.check_free(name)
        if operation is not None:
            if operation.task is task:
                return False
            if in_greenlet():
                await_(unit.wait_for_turn())
            unit.check_free(name)
        elif unit.state is State.CLOSED and name not in DISCARDING:
            unit.check_free(name)
        if unit.fixed_mode is not None and name not in ENDS_UNIT and unit.is_outdated():
            if in_greenlet():  # Outside of it nothing can be sent, and the operation fails.
                await_(unit.change_mode())
        deadline = unit.deadline
        if deadline is not None and unit.state is State.ACTIVE:
            if name not in MAY_BE_LATE and deadline.is_over:
                raise unit.overdue()
        if name in DISCARDING and unit.has_uncommitted_work:
            unit.left_over = LeftOver.DISCARDED
        if being_set_up:
            # The engine itself has tried to connect, which has nothing to do with this operation.
            abandon_connect()
        if unit.transaction.stage is Stage.KEPT and name not in READS:
            unit.give_back_kept()
        unit.operation = Operation(name, task, time.monotonic())
        if name == "commit":  # It was called inside `run_sync`.
            unit.begin()
            unit.move(State.ENDING)
        elif deadline is not None:
            unit.watch()
        return True

    def leave(self, error: BaseException | None) -> None:
        """End an operation; in autocommit its connection is not held any longer.

        The operation counts as running until the connection is back, so that no other task begins
        one meanwhile.
        """
        unit = self.unit_of_work
        running = unit.operation
        try:
            if error is not None:
                note_error(error, self, unit)
            if error is not None and is_half_ended(unit):
                discard_transaction(self, unit)
            elif self._should_give_back(running, error):
                # Most units have only one statement: the first is no reason to expect another.
                if error is None and unit.tally.statements > 1 and self._may_keep(running):
                    unit.keep_connection()
                else:
                    give_back(self, unit.transaction.connections)
        finally:
            operation, deadline = unit.operation, unit.deadline
            if operation is not None and operation.task is asyncio.current_task():
                unit.end_operation(operation)
                if operation.name == "commit":  # It was called inside `run_sync`.
                    if error is not None:
                        unit.transaction.fail()
                    unit.become_idle()
            if error is not None or deadline is not None:
                self._raise_translated(error, deadline)

    def _should_give_back(self, operation: Operation | None, error: BaseException | None) -> bool:
        """Decide whether the connection goes back to the pool after an operation.

        In autocommit it does, unless the handler is in a transaction block of its own.
        """
        unit = self.unit_of_work
        mode = unit.fixed_mode
        if mode is None or not mode.autocommit or unit.state is not State.ACTIVE:
            return False
        if operation is None or operation.name in KEEPS_CONNECTION:
            return False
        transaction = self.get_transaction()
        return (
            transaction is not None
            and transaction.origin is SessionTransactionOrigin.AUTOBEGIN
            and not self.in_nested_transaction()
            and (error is None or isinstance(error, Exception))
        )

    def _may_keep(self, operation: Operation | None) -> bool:
        """Whether the connection is kept for the next read, and later given back silently.

        Over one that was handed out something may be running by then, and a listener of the user's
        own to the end of the transaction may send something.
        """
        transaction = self.unit_of_work.transaction
        return (
            operation is not None
            and operation.name in READS
            and not transaction.was_handed_out
            and len(self.dispatch.after_transaction_end) == 1  # the listener below
            and all(map(returns_silently, transaction.connections))
        )

    def _raise_translated(self, error: BaseException | None, deadline: Deadline | None) -> None:
        """Raise the library's own error in place of that of an operation, where there is one.

        Raises:
            DatabaseTimeoutError: the statement was cancelled because the unit's time is over.
            DatabaseBusyError: no connection became free.
            DatabaseDownError: the connection was closed while it was being set up.
        """
        unit = self.unit_of_work
        if error is not None and (own := translated(error, unit)) is not None:
            raise own from own.__cause__ or error
        if deadline is not None:
            if unit.state is State.IDLE:
                unit.deadline = None
            if unit.operation is None and deadline.has_cancelled(error):
                raise DatabaseTimeoutError(unit.describe(), deadline.timeout) from error


def inside_the_unit(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of `Session` as an operation of the unit of work.

    Args:
        name: its name.
        operation: the method itself.
    """

    @functools.wraps(operation)
    def guarded(self: UnitSession, *args: Any, **kwargs: Any) -> Any:
        if not self.enter(name):
            return operation(self, *args, **kwargs)
        try:
            result = operation(self, *args, **kwargs)
        except BaseException as error:
            self.leave(error)
            raise
        self.leave(None)
        options: Mapping[str, Any] | None = kwargs.get("execution_options")
        if options and options.get("stream_results"):
            # `AsyncSession.stream` sets this option.
            unit = self.unit_of_work
            unit.transaction.streams += (result,)
            if unit.deadline is not None:
                unit.deadline.when_over(functools.partial(_terminate_streams, unit))
        return result

    return guarded


def _terminate_streams(unit: UnitOfWork) -> None:
    """Close the connections of server-side cursors which are read after their time is over.

    Fetching is not an operation of the session, so the deadline cannot cancel it.
    """
    if unit.operation is None and unit.overdue_stream() is not None:
        for connection in unit.transaction.connections:
            connection.invalidate()


# Every public method of `Session` that may talk to the database; a test compares this list with
# the installed SQLAlchemy.
OPERATIONS = (
    "begin",
    "begin_nested",
    "bulk_insert_mappings",
    "bulk_save_objects",
    "bulk_update_mappings",
    "close",
    "commit",
    "connection",
    "delete",
    "execute",
    "flush",
    "get",
    "get_one",
    "invalidate",
    "merge",
    "prepare",
    "refresh",
    "reset",
    "rollback",
    "scalar",
    "scalars",
    *NEW_OPERATIONS,
)
for _name in OPERATIONS:
    _guarded = inside_the_unit(_name, getattr(UnitSession, _name))
    setattr(UnitSession, _name, functools.update_wrapper(_guarded, getattr(Session, _name)))


class PlainUnitSession(UnitSession, EngineChoice):
    """The synchronous half of a `DBSession`, if the user has no class for it."""


# -- SQLAlchemy's events of the transaction ----------------------------------------------------


@event.listens_for(UnitSession, "after_transaction_create")
def _transaction_created(session: UnitSession, transaction: SessionTransaction) -> None:
    """Note a new transaction and its owner, before its first statement."""
    unit = session.unit_of_work
    if transaction.parent is None:
        unit.transaction = Transaction()
        operation = unit.operation
        unit.owner = current_task() if operation is None else operation.task
        if unit.state is State.IDLE:
            unit.move(State.ACTIVE)
    elif transaction.nested and unit.hooks is not None:
        unit.hooks.savepoint_began(transaction)


@event.listens_for(UnitSession, "after_begin")
def _transaction_began(session: UnitSession, _: SessionTransaction, connection: Connection) -> None:
    """Note the connection, and mark it so that the events of the engine can find the unit."""
    unit = session.unit_of_work
    transaction = unit.transaction
    if connection not in transaction.connections:
        transaction.connections += (connection,)
        begin_unit(connection, unit, unit.fixed_mode or unit.mode)
        waited = time.monotonic() - unit.tally.asked
        unit.tally.add_wait(waited)
        if unit.life.statistics.observers:
            unit.life.statistics.connection_taken(waited)


@event.listens_for(UnitSession, "before_flush")
def _check_flush(session: UnitSession, *_: Any) -> None:
    """Refuse a flush in a mode that only reads."""
    unit = session.unit_of_work
    if unit.mode.read_only:
        raise ReadOnlyError(
            f"{unit.describe()}: there are new or changed objects to flush, but the mode is"
            f" {unit.mode.name} and only reads. Put @transactional on the route, or ask for the"
            " transactional session."
        )
    if unit.loaded is None:
        unit.loaded = LoadedValues()
    unit.loaded.flush_begins(session)


@event.listens_for(UnitSession, "before_commit")
def _commit_begins(session: UnitSession) -> None:
    if not session.in_nested_transaction():
        unit = session.unit_of_work
        if unit.is_rollback_only:
            raise FailedTransactionError.rollback_only()
        unit.transaction.begin_commit()


@event.listens_for(UnitSession, "after_commit")
def _transaction_committed(session: UnitSession) -> None:
    """Note that the session has committed; the client has to be told."""
    if session.in_nested_transaction():
        return
    unit = session.unit_of_work
    transaction = unit.transaction
    transaction.move(Stage.COMMITTED)
    if unit.loaded is not None:
        unit.loaded.committed()
    if transaction.effect.writes and unit.unanswered is None:
        unit.unanswered = transaction
    if unit.hooks is not None:
        unit.hooks.settle("commit")


@event.listens_for(UnitSession, "after_rollback")
def _objects_expire(session: UnitSession) -> None:
    """Keep what the objects have loaded; SQLAlchemy expires it right after this event."""
    unit = session.unit_of_work
    if unit.loaded is None:
        unit.loaded = LoadedValues()
    unit.loaded.rolled_back(session)


@event.listens_for(UnitSession, "after_soft_rollback")
def _rolled_back(session: UnitSession, transaction: SessionTransaction) -> None:
    """Note that the session has rolled back to a savepoint, or the whole transaction."""
    hooks = session.unit_of_work.hooks
    if hooks is not None:
        while not transaction.nested and transaction.parent is not None:
            # A failed flush has rolled this part back.
            transaction = transaction.parent
        if transaction.nested:
            hooks.savepoint_rolled_back(transaction)
        else:
            hooks.settle("rollback")


@event.listens_for(UnitSession, "after_transaction_end")
def _transaction_ended(session: UnitSession, transaction: SessionTransaction) -> None:
    """Note that the session has ended its transaction, by itself or for the handler."""
    unit = session.unit_of_work
    if transaction.parent is not None:
        if transaction.nested and unit.loaded is not None:
            unit.loaded.savepoint_ended(transaction)
        return
    if unit.transaction.stage is not Stage.COMMITTED:
        unit.transaction.end()
    if unit.state is State.ACTIVE:
        operation = unit.operation
        if unit.hooks is not None and operation is not None and operation.name in MAY_BE_LATE:
            unit.hooks.settle("rollback")  # also where the ROLLBACK itself was cancelled
        if unit.fixed_mode is None or not unit.fixed_mode.autocommit:
            unit.become_idle()
