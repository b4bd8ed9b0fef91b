"""Where a unit of work stands: its state, its mode, its transaction and its time.

Nothing here is awaited; `UnitOfWork` does the I/O.
"""

from __future__ import annotations

import time

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session, SessionTransactionOrigin

from asgi_db.drivers.statements import Effect
from asgi_db.errors import DatabaseConflictError, DatabaseTimeoutError, ModeConflictError
from asgi_db.logs import logger
from asgi_db.modes import Mode
from asgi_db.unit.deadline import Deadline
from asgi_db.unit.ending import (
    CLEANUP_TIMEOUT,
    EndableSession,
    give_back_silently,
    has_changes,
    terminate,
)
from asgi_db.unit.hooks import Hooks
from asgi_db.unit.loaded import LoadedValues
from asgi_db.unit.one_task import OneTask
from asgi_db.unit.operation import MAY_BE_LATE, Operation
from asgi_db.unit.origin import Origin
from asgi_db.unit.state import TRANSITIONS, LeftOver, State
from asgi_db.unit.transaction import OUTCOMES, Stage, Transaction


class Standing(OneTask):
    """Where a unit of work stands.

    Attributes:
        session: the session that handlers use.
        sync_session: its synchronous half; None before the session is first used.
        life: the engine of the session, with its pool.
        fixed_mode: the mode that the first statement has fixed until the unit ends.
        next_mode: another mode that was asked for meanwhile, in which the next one has to begin.
        transaction: the transaction that is open, or was open last.
        deadline: the deadline of the unit, if its mode has a `timeout=`.
        hooks: the functions to call after its end; None before the first one is added.
        conflict: the last error of the database about a conflict with another transaction.
        tally: what the unit has done so far.
        unanswered: the first committed transaction that the client has not been told about.
        left_over: work of the session that belongs to no transaction.
        is_rollback_only: whether the handler has asked for a ROLLBACK, whatever the answer.
        loaded: what its objects had loaded; None before the first flush or rollback.
    """

    # Most requests never set these, so that as class attributes they cost nothing.
    sync_session: Session | None = None
    fixed_mode: Mode | None = None
    next_mode: Mode | None = None
    deadline: Deadline | None = None
    hooks: Hooks | None = None
    conflict: DatabaseConflictError | None = None
    unanswered: Transaction | None = None
    left_over: LeftOver | None = None
    is_rollback_only = False
    loaded: LoadedValues | None = None

    def __init__(self, session: EndableSession, origin: Origin) -> None:
        """Prepare a unit; nothing is opened before the first statement."""
        self.session = session
        self.origin = origin
        self.life = origin.life()
        self.loop = origin.loop  # known from now on, if it is that of the first use
        self.transaction = Transaction()
        self.transaction.stage = Stage.NONE
        self.tally = self.life.statistics.new_tally()

    def __repr__(self) -> str:
        standing = f"{self.state.name} {self.mode.name} {self.transaction.stage.name}"
        return f"<UnitOfWork {standing} {self.describe()}>"

    # -- the mode ------------------------------------------------------------------------------

    @property
    def mode(self) -> Mode:
        """The mode in force: fixed by the first statement, until the unit ends."""
        return self.fixed_mode or self.origin.mode()

    def ask(self, mode: Mode) -> None:
        """Note the mode that a dependency asks for; see `Origin.ask`.

        Raises:
            ModeConflictError: the unit holds work in a weaker mode, or an isolation level.
        """
        origin, fixed = self.origin, self.fixed_mode
        earlier = origin.asked
        origin.ask(mode)
        if fixed is not None:
            try:
                self.needs_other_mode(keep=bool(fixed.isolation or fixed.snapshot))
            except ModeConflictError:
                origin.asked = earlier
                raise

    def is_outdated(self) -> bool:
        """Return whether another mode may be asked for by now than the unit has."""
        return self.fixed_mode is not None and (
            self.next_mode is not None or self.origin.has_moved()
        )

    def wanted_mode(self) -> Mode | None:
        """Return the mode that is asked for by now, if it is another one than the unit has.

        The route was not known when the unit began, for example.
        """
        if self.fixed_mode is not None and self.origin.has_moved():
            mode = self.origin.mode()
            self.next_mode = None if mode == self.fixed_mode else mode
        return self.next_mode

    def needs_other_mode(self, *, keep: bool = False) -> bool:
        """Return whether the unit has to be given back, and the next one begins in another mode.

        A unit that holds more than reads stays as it is, if its mode does as well; the mode of the
        route is exact.

        Args:
            keep: nothing but reads has to be kept too, for example a snapshot.

        Raises:
            ModeConflictError: the unit holds more than reads.
        """
        mode, fixed = self.wanted_mode(), self.fixed_mode
        if mode is None or fixed is None:
            return False
        # What a function that is not known has done, is undone without a COMMIT in any case.
        harmless = Effect.READS if fixed.commits else Effect.UNSURE
        if not (keep or self.holds_more_than(harmless)):
            return True
        self.next_mode = None
        if self.origin.route_mode() is None and fixed.covers(mode):
            return False
        self.origin.is_asked_anew = True
        raise ModeConflictError.too_late(mode.name, fixed.name, self.describe())

    def begin(self) -> Mode:
        """Fix the mode, start its clock, and return it; this happens once in each unit."""
        mode = self.fixed_mode
        if mode is None:
            self.next_mode = None
            self.fixed_mode = mode = self.origin.mode()
            if self.state is State.IDLE:
                self.move(State.ACTIVE)
            self.deadline = None
            if mode.timeout is not None:
                self.deadline = Deadline(mode.timeout, self.origin.ends_at)
                self.origin.deadline_began(self.deadline.at)
                self.watch()
        return mode

    def watch(self) -> None:
        """Have the running operation cancelled when its time is over.

        The end of a unit has a limit of its own; an operation that ends it has some more time.
        """
        operation = self.operation
        if self.deadline is not None and operation is not None and self.state is State.ACTIVE:
            self.deadline.watch_task(CLEANUP_TIMEOUT if operation.name in MAY_BE_LATE else 0.0)

    def overdue(self) -> DatabaseTimeoutError:
        """Make the error for a unit whose time is over."""
        timeout = 0.0 if self.deadline is None else self.deadline.timeout
        return DatabaseTimeoutError(self.describe(), timeout)

    def end_operation(self, operation: Operation) -> None:
        """Note that the operation has ended."""
        self.tally.busy += time.monotonic() - operation.began
        self.operation = None
        if self.origin.waiting:
            self.origin.end_turn()

    def overdue_stream(self) -> DatabaseTimeoutError | None:
        """Return the error for reading a server-side cursor after the end of `timeout=`."""
        transaction, deadline = self.transaction, self.deadline
        if transaction.streams and transaction.is_open and deadline is not None:
            return self.overdue() if deadline.is_over else None
        return None

    # -- the connection between two reads ------------------------------------------------------

    def keep_connection(self) -> None:
        """Keep the connection for the next read, until the event loop turns."""
        transaction = self.transaction
        if transaction.stage is Stage.OPEN:  # An object that is loaded already is read without one.
            transaction.move(Stage.KEPT)
        if not transaction.goes_back_soon:
            transaction.goes_back_soon = True
            self.loop.call_soon(self._loop_has_turned, transaction)

    def _loop_has_turned(self, transaction: Transaction) -> None:
        transaction.goes_back_soon = False
        if transaction is self.transaction:
            self.give_back_kept()

    def take_kept(self, engine: Engine | Connection) -> None:
        """Let a read have the connection that is kept, if it is one of its own engine.

        Else it goes back first: who holds one must not wait for another.
        """
        if all(connection.engine is engine for connection in self.transaction.connections):
            self.transaction.move(Stage.OPEN)
        else:
            self.give_back_kept()

    def give_back_kept(self) -> None:
        """Give back a connection that is kept for the next read; nothing is sent."""
        transaction, session = self.transaction, self.sync_session
        if transaction.stage is Stage.KEPT and session is not None:
            transaction.move(Stage.OPEN)
            try:
                give_back_silently(session)
            except Exception:  # of a listener to SQLAlchemy's events
                logger.exception("%s: a connection could not be given back", self.describe())
                terminate(transaction.connections)
            self.keep_changes()

    def keep_changes(self) -> None:
        """Leave what is not flushed to the next transaction, after the last one was given back."""
        if has_changes(self.sync_session) and self.left_over is None:
            self.left_over = LeftOver.KEPT

    # -- how it stands -------------------------------------------------------------------------

    @property
    def in_use(self) -> bool:
        """Whether there is anything to end."""
        return (
            self.state in _BUSY
            or self.operation is not None
            or self.left_over is not None
            or self.is_rollback_only
            or (self.hooks is not None and self.hooks.are_waiting)
        )

    @property
    def has_uncommitted_work(self) -> bool:
        """Whether there is anything that a ROLLBACK would undo."""
        has_writes = self.transaction.effect.writes and self.transaction.is_open
        return has_writes or has_changes(self.sync_session)

    def holds_more_than(self, effect: Effect) -> bool:
        """Return whether giving the connection back would undo more, or break a block."""
        if self.transaction.holds_more_than(effect):
            return True
        session = self.sync_session
        transaction = None if session is None else session.get_transaction()
        return transaction is not None and (
            transaction.origin is not SessionTransactionOrigin.AUTOBEGIN
            or (session is not None and session.in_nested_transaction())
        )

    @property
    def was_cancelled(self) -> bool:
        """Whether a statement of the open transaction was cancelled."""
        return self.transaction.was_cancelled and self.transaction.is_open

    # -- the state -----------------------------------------------------------------------------

    def become_idle(self) -> None:
        """Become idle, and report what the unit has done.

        The state changes first, so that no error in the report can prevent it.
        """
        self.move(State.IDLE)
        mode, self.fixed_mode = self.fixed_mode, None
        if self.operation is None:
            self.deadline = None
        else:
            # The handler ends the transaction by hand, and `leave` does the rest.
            now = time.monotonic()
            self.tally.busy += now - self.operation.began
            self.operation = self.operation._replace(began=now)
        tally = self.tally
        if tally.began is not None and mode is not None:
            # The unit has run a statement, or tried to.
            if not mode.autocommit:
                tally.outcome = OUTCOMES.get(self.transaction.stage)
            if tally.trace is not None:
                tally.trace.has_writes = self.transaction.effect.writes
                tally.trace.attempt = self.origin.attempt
            self.tally = self.life.statistics.new_tally()
            self.life.statistics.unit_ended(self.origin.route(), mode.name, tally)
            self.origin.unit_ended(tally)

    def close(self) -> None:
        """Close the session for good, and forget it and all that leads to a task or an error.

        Its objects are detached, and keep what they have loaded.
        """
        if self.transaction.stage is Stage.KEPT:
            self.give_back_kept()
        self.move(State.CLOSED)
        session = self.sync_session
        self.sync_session = self.owner = self.deadline = self.conflict = None
        self.transaction.failure = None
        self.transaction.connections = self.transaction.streams = ()
        del self.session
        if session is not None:
            try:
                session.expunge_all()
            except Exception:  # of a listener to SQLAlchemy's events
                logger.exception("%s: an object could not be detached", self.describe())
            if self.loaded is not None:
                self.loaded.give_back(session)
                self.loaded = None

    def move(self, to: State) -> None:
        """Go on to another state.

        Raises:
            RuntimeError: the table has no way from this state to that one.
        """
        if to not in TRANSITIONS[self.state]:
            raise RuntimeError(f"a unit of work cannot move from {self.state.name} to {to.name}")
        self.state = to


_BUSY = frozenset({State.ACTIVE, State.ENDING})
