"""The unit of work: one span between two ASGI events in which one transaction may be open.

A session lives through many units, one after the other:

    IDLE ──first statement──▶ ACTIVE ──COMMIT or ROLLBACK──▶ ENDING ──▶ IDLE ──…──▶ CLOSED

`IDLE` holds nothing. `ACTIVE` may hold a connection; its first statement fixes the mode. `ENDING`
is a COMMIT, by hand too, or the ROLLBACK at the end of a unit: it runs in a task of its own, to
its end, even if the request is cancelled. `CLOSED` is final: the request is over, and the session
refuses to work.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from sqlalchemy import Connection, Engine, Result
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction, SessionTransactionOrigin

from asgi_db.drivers import is_conflict
from asgi_db.drivers.connecting import abandon_connect, raise_if_connect_failed
from asgi_db.engine import begin_unit
from asgi_db.errors import (
    ConcurrentUseError,
    ConfigurationError,
    DatabaseBusyError,
    DatabaseTimeoutError,
    ModeConflictError,
    OutcomeUnknownError,
    ReadOnlyError,
    SessionExpiredError,
    UncommittedWorkError,
)
from asgi_db.modes import Mode
from asgi_db.statistics import Tally
from asgi_db.tasks import current_task, finish
from asgi_db.unit.deadline import Deadline
from asgi_db.unit.ending import (
    CLEANUP_TIMEOUT,
    Ending,
    brief,
    close_streams,
    has_changes,
)
from asgi_db.unit.hooks import Hook, HookOutcome, Hooks
from asgi_db.unit.operation import DISCARDING, KEEPS_CONNECTION, MAY_BE_LATE, Operation
from asgi_db.unit.origin import Origin
from asgi_db.unit.transaction import OUTCOMES, Stage, Transaction

logger = logging.getLogger("asgi_db")

COMMIT_TIMEOUT = 30.0
"""Seconds that a COMMIT may take before its outcome counts as unknown, where the mode has no
`timeout=`."""

LEAST_COMMIT_TIMEOUT = 1.0
"""Seconds that a COMMIT gets at least, where the mode's `timeout=` is nearly over."""


class State(enum.Enum):
    """Where a unit of work stands; see the top of this file."""

    IDLE = enum.auto()
    ACTIVE = enum.auto()
    ENDING = enum.auto()
    CLOSED = enum.auto()


TRANSITIONS: dict[State, tuple[State, ...]] = {
    State.IDLE: (State.ACTIVE, State.ENDING, State.CLOSED),
    State.ACTIVE: (State.IDLE, State.ENDING),
    State.ENDING: (State.IDLE,),
    State.CLOSED: (),
}


class LeftOver(enum.Enum):
    """What there is of a session's work while no transaction holds it."""

    KEPT = enum.auto()
    """By `release`: changed objects which the next transaction will flush."""
    DISCARDED = enum.auto()
    """Because the handler closed the session: work that nothing will commit."""


class UnitOfWork:
    """Begins, ends and watches over what one session does.

    Attributes:
        session: the session that handlers get.
        sync_session: its synchronous half; there is none before the session is first used.
        origin: what the session is for.
        life: the engine of the session, with its pool.
        state: where the unit stands.
        fixed_mode: the mode that its first statement has fixed, until it ends.
        transaction: the transaction that is open, or was open last.
        operation: the operation that is running; in ENDING it is the end itself.
        deadline: the end of its time, where there is one.
        hooks: what is to be done after its end; None if there has been nothing yet.
        conflict: the last error with which the database has preferred another transaction.
        tally: what the unit has done so far.
        unanswered: the first transaction that was committed and of which the client does not know.
    """

    # Most of this is never set in a request; so it stands here, and costs nothing.
    state = State.IDLE
    sync_session: Session | None = None
    fixed_mode: Mode | None = None
    operation: Operation | None = None
    deadline: Deadline | None = None
    hooks: Hooks | None = None
    conflict: BaseException | None = None
    unanswered: Transaction | None = None
    _asked: Mode | None = None
    _owner: asyncio.Task[object] | None = None
    _left_over: LeftOver | None = None

    def __init__(self, session: AsyncSession, origin: Origin) -> None:
        """Prepare a unit; nothing is opened before the first statement.

        Args:
            session: the session.
            origin: what it is for.
        """
        self.session = session
        self.origin = origin
        self.life = origin.life()
        self.transaction = Transaction()
        self.transaction.stage = Stage.NONE
        self.tally = Tally()

    def describe(self) -> str:
        """Name what the unit is for, for messages."""
        return self.origin.describe()

    def __repr__(self) -> str:
        standing = f"{self.state.name} {self.mode.name} {self.transaction.stage.name}"
        return f"<UnitOfWork {standing} {self.describe()}>"

    # -- the mode ------------------------------------------------------------------------------

    @property
    def mode(self) -> Mode:
        """The mode in force: fixed by the first statement, until the unit ends.

        Strongest first: the route, the dependency that the handler takes, the default.
        """
        origin = self.origin
        return self.fixed_mode or origin.route_mode() or self._asked or origin.default_mode()

    def ask(self, mode: Mode) -> None:
        """Note the mode that a dependency stands for; the strongest one wins.

        Raises:
            ModeConflictError: a statement has already run in a weaker mode, or an earlier
                dependency has asked for the same mode with other options.
            ConfigurationError: the mode has `retries=`.
        """
        if mode.retries:
            raise ConfigurationError(
                f"{self.describe()}: a dependency comes too late for retries={mode.retries}, when"
                " the body may have been read: put the mode on the route, or into the middleware."
            )
        asked, begun = self._asked, self.fixed_mode
        if asked is not None and asked.covers(mode):
            return
        if self.origin.route_mode() is None:  # else the route's mode wins
            if asked is not None and not mode.covers(asked):
                raise ModeConflictError.at_odds(repr(mode), repr(asked), self.describe())
            if begun is not None and not begun.covers(mode):
                raise ModeConflictError.too_late(mode.name, begun.name, self.describe())
        self._asked = mode

    def begin(self) -> Mode:
        """Fix the mode, let its time begin, and return it; once for each unit."""
        mode = self.fixed_mode
        if mode is None:
            self.fixed_mode = mode = self.mode
            if self.state is State.IDLE:
                self._move(State.ACTIVE)
            self.deadline = None
            if mode.timeout is not None:
                self.deadline = Deadline(mode.timeout, self.origin.ends_at)
                self.origin.deadline_began(self.deadline.at)
                self._watch()
        return mode

    def _watch(self) -> None:
        """Let the operation that runs be cancelled when its time is over.

        The end of a unit has a limit of its own; an operation that ends it gets some more time.
        """
        operation = self.operation
        if self.deadline is not None and operation is not None and self.state is State.ACTIVE:
            self.deadline.watch_task(CLEANUP_TIMEOUT if operation.name in MAY_BE_LATE else 0.0)

    # -- what the session and the engine tell --------------------------------------------------

    def bind(self, bind: Engine | Connection) -> Engine | Connection:
        """Return the engine on which the mode's transactions begin as they should."""
        mode = self.begin()
        if not self.transaction.connections or not self.transaction.is_open:
            self.transaction.asked_at = now = time.monotonic()
            if self.tally.began is None:
                self.tally.began = now
        return self.life.bind_for(bind, mode)

    def check_flush(self) -> None:
        """Refuse a flush in a mode that only reads."""
        if self.mode.read_only:
            raise ReadOnlyError(
                f"{self.describe()}: there are new or changed objects to flush, but the mode is"
                f" {self.mode.name} and only reads. Put @transactional on the route, or ask for"
                " the transactional session."
            )

    def transaction_created(self) -> None:
        """Note a new transaction, and whose work it is, from before its first statement."""
        asked_at = self.transaction.asked_at
        self.transaction = Transaction()
        self.transaction.asked_at = asked_at
        self._owner = current_task()
        if self.state is State.IDLE:
            self._move(State.ACTIVE)

    def transaction_began(self, connection: Connection) -> None:
        """Note the connection, and mark it so that the events of the engine find this unit."""
        transaction = self.transaction
        if connection not in transaction.connections:
            transaction.connections += (connection,)
            begin_unit(connection, self)
            waited = time.monotonic() - transaction.asked_at
            self.tally.add_wait(waited)
            self.life.statistics.connection_taken(waited)

    def statement_comes(self, *, writes: bool) -> None:
        """Count a statement that is about to be sent."""
        self.tally.statements += 1
        if writes:
            self.transaction.has_writes = True

    def note_conflict(self, error: BaseException) -> None:
        """Note that the database has ended the transaction in favor of another one."""
        self.conflict = error

    def note_failure(self, error: BaseException) -> None:
        """Note that the transaction cannot be committed any more."""
        self.transaction.note_failure(error)

    def connection_returned(self, held: float) -> None:
        """Note that a connection is back in the pool, after so many seconds."""
        self.tally.add_hold(held)

    def stream_opened(self, stream: Result[Any]) -> None:
        """Note a result that lives on a server-side cursor; its rows are yet to come."""
        self.transaction.streams += (stream,)
        if self.deadline is not None:
            self.deadline.when_over(self._terminate_streams)

    def _terminate_streams(self) -> None:
        # To fetch is no operation of the session, which its deadline could cancel.
        if self.operation is None and self.overdue_stream() is not None:
            for connection in self.transaction.connections:
                connection.invalidate()

    def overdue_stream(self) -> DatabaseTimeoutError | None:
        """Return the error for a server-side cursor that is read after the end of `timeout=`."""
        is_late = self.transaction.streams and self.transaction.is_open and self.is_overdue
        return self._overdue() if is_late else None

    def savepoint_began(self, savepoint: SessionTransaction) -> None:
        """Note a savepoint, with which its hooks are to be forgotten."""
        if self.hooks is not None:
            self.hooks.savepoint_began(savepoint)

    def rolled_back(self, transaction: SessionTransaction) -> None:
        """Note that the session has rolled back to a savepoint, or the whole transaction."""
        if self.hooks is not None:
            while not transaction.nested and transaction.parent is not None:
                transaction = transaction.parent  # a flush that failed has rolled this back
            if transaction.nested:
                self.hooks.savepoint_rolled_back(transaction)
            else:
                self.hooks.settle("rollback")

    def commit_begins(self) -> None:
        """Begin to commit, unless the database has discarded the transaction already.

        Raises:
            FailedTransactionError: the transaction cannot be committed any more.
        """
        self.transaction.begin_commit()

    @property
    def commit_was_sent(self) -> bool:
        """Whether a COMMIT is on its way to the server, or at least may be."""
        return self.transaction.stage is Stage.SENT

    def commit_is_sent(self) -> None:
        """Note that the driver is about to send COMMIT, over a connection that is open."""
        if self.transaction.stage in (Stage.COMMITTING, Stage.SENT):  # else it is not the session's
            self.transaction.move(Stage.SENT)
            if self.deadline is None and self.state is State.ENDING:
                self.deadline = Deadline(COMMIT_TIMEOUT)
                self.deadline.watch_task()

    def transaction_committed(self) -> None:
        """Note that the session has committed; the client is to know."""
        transaction = self.transaction
        transaction.move(Stage.COMMITTED)
        if transaction.has_writes and self.unanswered is None:
            self.unanswered = transaction
        if self.hooks is not None:
            self.hooks.settle("commit")

    def transaction_ended(self) -> None:
        """Note that the session has ended its transaction, by itself or by the handler."""
        self.transaction.end()
        if self.state is State.ACTIVE:
            operation = self.operation
            if self.hooks is not None and operation is not None and operation.name in DISCARDING:
                self.hooks.settle("rollback")
            if self.fixed_mode is None or not self.fixed_mode.autocommit:
                self._become_idle()

    # -- how it stands -------------------------------------------------------------------------

    @property
    def in_use(self) -> bool:
        """Whether there is anything to end."""
        return (
            self.state in _BUSY
            or self.operation is not None
            or self._left_over is not None
            or (self.hooks is not None and self.hooks.are_waiting)
        )

    @property
    def is_overdue(self) -> bool:
        """Whether the time of the mode's `timeout=` is over."""
        return self.deadline is not None and self.deadline.is_over

    @property
    def is_used_by_another_task(self) -> bool:
        """Whether an operation runs just now in another task than this."""
        operation = self.operation
        return operation is not None and operation.task is not asyncio.current_task()

    @property
    def is_work_of_another_task(self) -> bool:
        """Whether another task than this is in the middle of the unit.

        A task that has ended, such as a statement in `asyncio.gather`, has left it to the task
        that waited.
        """
        owner = self._owner
        if owner is None or owner.done():
            owner = self.origin.task
        return self.in_use and owner not in (None, asyncio.current_task())

    @property
    def has_uncommitted_work(self) -> bool:
        """Whether there is anything that a ROLLBACK would undo."""
        has_writes = self.transaction.has_writes and self.transaction.is_open
        return has_writes or has_changes(self.sync_session)

    @property
    def was_cancelled(self) -> bool:
        """Whether a statement of the open transaction was cancelled."""
        return self.transaction.was_cancelled and self.transaction.is_open

    # -- how it ends ---------------------------------------------------------------------------

    async def wait_for_end(self) -> None:
        """Wait for a COMMIT or ROLLBACK that another task is waiting for."""
        while self.state is State.ENDING and self.operation is not None:
            assert self.operation.task is not None
            await asyncio.wait((self.operation.task,))

    async def end(self, *, success: bool, answer: str = "") -> None:
        """End the unit: COMMIT where it succeeded and its mode commits, else ROLLBACK.

        Then its hooks are run. Costs nothing if no statement has run.

        Args:
            success: whether what the unit belongs to has succeeded.
            answer: what waits for the COMMIT, for the log line of one that fails.

        Raises:
            SQLAlchemyError: the commit failed; the transaction has been rolled back.
            ConcurrentUseError: it was to succeed while another task used the session.
            UncommittedWorkError: it was to be committed, but the handler had closed the session.
            Exception: the error of a hook that is not robust.
        """
        if not self.in_use:
            return
        if self.hooks is None:
            await self._end(success, answer)
            return
        keeps = success and (self.mode.commits or self.mode.read_only)  # or there is nothing to
        outcome: HookOutcome = "rollback"
        try:
            await self._end(success, answer)
            outcome = "commit" if keeps else "rollback"
        except BaseException:
            self.hooks.settle(outcome)  # unless the COMMIT has succeeded, and they are due
            with contextlib.suppress(Exception):  # it is logged, and masks no other
                await self.hooks.run(self.describe)
            raise
        self.hooks.settle(outcome)
        await self.hooks.run(self.describe)
        # What the hooks have done with the session; if that fails, it masks no other error.
        with contextlib.nullcontext() if success else contextlib.suppress(Exception):
            await self.end(success=True)

    async def _end(self, success: bool, answer: str) -> None:
        problem: Exception | None = None
        if self.state is State.ENDING:  # another task commits or releases the session just now
            problem = self._concurrent_use("commit")
            await finish(asyncio.ensure_future(self.wait_for_end()))
        straggler = self.operation if self.is_used_by_another_task else None
        if straggler is not None:
            problem = self._concurrent_use("commit")
        mode = self.begin()
        if self._left_over is LeftOver.DISCARDED and mode.commits:
            problem = problem or UncommittedWorkError(self.describe(), is_lost=True)
        if success and not mode.commits:
            self._warn_of_lost_work()
        if straggler is not None or self._has_work():
            if success and problem is None and mode.commits:
                await self._end_by("commit", self._commit(self._session_commit, answer))
            else:
                await self._end_by("rollback", self._ending().roll_back_unit(straggler))
        elif self.state is State.ACTIVE:
            self._become_idle()
        self._left_over = None
        if success and problem is not None:
            logger.error("Not committed: %s", brief(problem))  # it names the route
            raise problem

    def _session_commit(self) -> Coroutine[Any, Any, None]:
        return AsyncSession.commit(self.session)

    def _ending(self) -> Ending:
        return Ending(self.session, self.transaction, self.describe)

    def _has_work(self) -> bool:
        session = self.sync_session
        has_transaction = session is not None and session.in_transaction()
        return has_transaction or self._left_over is LeftOver.KEPT

    def _warn_of_lost_work(self) -> None:
        has_new = self.sync_session is not None and self.sync_session.new
        has_writes = self.transaction.has_writes and self.transaction.is_open
        if has_writes or self._left_over is LeftOver.DISCARDED or has_new:
            logger.warning(
                "%s: uncommitted work was rolled back at the end of the %s unit: commit it with"
                " `await session.commit()`, or put @transactional on the route.",
                self.describe(),
                self.mode.name,
            )

    async def commit(self, commit: Callable[[], Awaitable[None]]) -> None:
        """Commit by hand; a cancellation does not interrupt it.

        Raises:
            asyncio.CancelledError: the request was cancelled; the COMMIT has nevertheless ended.
            ConcurrentUseError: another task uses the session.
            OutcomeUnknownError: the COMMIT did not end in time.
        """
        self._check_free("commit")
        self.begin()
        try:
            await self._end_by("commit", self._commit(commit, None, asyncio.current_task()))
        except asyncio.CancelledError:
            if self.unanswered is not None:
                self.unanswered.was_cancelled = True
            with contextlib.suppress(Exception):  # it is logged
                await self.run_hooks()
            raise
        await self.run_hooks()

    async def _commit(
        self,
        commit: Callable[[], Awaitable[None]],
        answer: str | None,
        caller: asyncio.Task[object] | None = None,
    ) -> None:
        """Commit, within the unit's time; one that fails is rolled back.

        Args:
            commit: commits.
            answer: what waits for the COMMIT; None if the handler does, by hand.
            caller: the handler's task.
        """
        transaction = self.transaction
        if self.deadline is not None:
            self.deadline.watch_task(LEAST_COMMIT_TIMEOUT)
        try:
            try:
                await close_streams(self.session, transaction)
                await commit()
            except BaseException as error:
                self._raise_if_overdue(error)
                raise
            self._raise_if_overdue(None)
        except BaseException as error:
            self.transaction.fail()
            if answer is not None or (caller is not None and caller.cancelling()):
                self._log_failed_commit(error, answer)
            await self._ending().roll_back()
            raise

    def _raise_if_overdue(self, error: BaseException | None) -> None:
        """Stop watching the COMMIT.

        Raises:
            OutcomeUnknownError: it was sent, and not answered in time.
            DatabaseTimeoutError: it was not even sent in time.
        """
        deadline = self.deadline
        if deadline is None or not deadline.has_cancelled(error):
            return
        if not self.commit_was_sent:
            raise DatabaseTimeoutError(self.describe(), deadline.allowed) from None
        raise OutcomeUnknownError(
            f"{self.describe()}: COMMIT was sent and not answered within {deadline.allowed:.1f} s,"
            " so whether it was carried out is unknown",
            TimeoutError(),
        ) from None

    def _log_failed_commit(self, error: BaseException, answer: str | None) -> None:
        unsent = f", and {answer} was not sent" if answer else ""
        is_retried = answer is not None and self.mode.retries > 0 and self.conflict is not None
        level = logging.WARNING if is_retried else logging.ERROR
        logger.log(level, "%s: COMMIT failed%s: %s", self.describe(), unsent, brief(error))

    async def release(self) -> None:
        """Give the connection back before the unit's end; see `DBSession.release`."""
        if self.state is State.CLOSED:
            return
        self._check_free("release")
        transaction, session = self.transaction, self.sync_session
        if transaction.has_writes and transaction.is_open:
            raise UncommittedWorkError(self.describe(), is_lost=False)
        if session is not None and session.in_transaction():
            try:
                await self._end_by("release", self._ending().give_back())
            finally:
                if has_changes(session) and self._left_over is None:
                    self._left_over = LeftOver.KEPT
        elif self.state is State.ACTIVE:
            self._become_idle()

    async def _end_by(self, name: str, ending: Coroutine[Any, Any, None]) -> None:
        """Run the end of the transaction to its end, in a task of its own."""
        self._move(State.ENDING)
        task = asyncio.ensure_future(ending)
        self.operation = operation = Operation(name, task, time.monotonic())
        if self._left_over is LeftOver.KEPT:
            self._left_over = None
        try:
            await finish(task)
        finally:
            self.transaction.end()
            self._end_operation(operation)
            self._become_idle()

    def close(self) -> None:
        """Close the session for good: its use is an error from now on."""
        self._move(State.CLOSED)
        self.sync_session = None
        del self.session

    # -- hooks ---------------------------------------------------------------------------------

    def add_hook(self, hook: Hook) -> None:
        """Let a function be called after the COMMIT, or the ROLLBACK, of what is open now.

        Raises:
            SessionExpiredError: the request is over.
        """
        if self.state is State.CLOSED:
            raise SessionExpiredError(f"on_{hook.outcome}", self.describe())
        if not self.in_use:
            self._owner = current_task()
        if self.hooks is None:
            self.hooks = Hooks()
        self.hooks.add(hook)

    async def run_hooks(self) -> None:
        """Run the hooks that are due, after the handler itself has committed or rolled back.

        Raises:
            Exception: the error of a hook that is not robust.
        """
        if self.hooks is not None:
            await self.hooks.run(self.describe)

    async def run_late_hooks(self) -> None:
        """Run the hooks that were to wait for the response."""
        if self.hooks is not None:
            try:
                await self.hooks.run_late(self.describe)
            finally:
                with contextlib.suppress(Exception):  # it is logged, and the answer has left
                    await self.end(success=True)

    # -- one task at a time --------------------------------------------------------------------

    def enter(self, name: str) -> bool:
        """Begin an operation of the session.

        Returns:
            Whether it is one of its own; otherwise it is part of what the task is doing, which is
            watched as a whole.

        Raises:
            SessionExpiredError: the request is over.
            ConcurrentUseError: another task is in the middle of an operation.
            DatabaseTimeoutError: the time of the unit is over.
        """
        task = asyncio.current_task()
        state, operation = self.state, self.operation
        if operation is not None and operation.task is task:
            return False
        if name not in DISCARDING or state is not State.CLOSED:
            self._check_free(name)
        deadline = self.deadline
        if deadline is not None and state is State.ACTIVE:
            if name not in MAY_BE_LATE and deadline.is_over:
                raise self._overdue()
        if name in DISCARDING and self.has_uncommitted_work:
            self._left_over = LeftOver.DISCARDED
        abandon_connect()  # of the engine itself: its error is no error of this operation
        self.operation = Operation(name, task, time.monotonic())
        if name == "commit":  # in `run_sync`
            self.begin()
            self._move(State.ENDING)
        elif deadline is not None:
            self._watch()
        return True

    def _check_free(self, name: str) -> None:
        """Refuse an operation of a session that has ended, or that another task uses."""
        if self.state is State.CLOSED:
            raise SessionExpiredError(name, self.describe())
        if self.operation is not None and self.operation.task is not asyncio.current_task():
            raise self._concurrent_use(name)

    def note_error(self, session: Session, error: BaseException) -> None:
        """Note the error of an operation."""
        if session.in_transaction():  # else it has ended with the error
            self.transaction.note_error(error, in_savepoint=session.in_nested_transaction())
        if isinstance(error, DBAPIError) and self.conflict is None and is_conflict(error):
            self.conflict = error  # of a BEGIN, which comes before the unit has the connection

    def lets_connection_go(self, session: Session, error: BaseException | None) -> bool:
        """Decide whether the connection goes back to the pool after an operation.

        In autocommit it does, unless the handler holds a transaction block of its own.
        """
        mode, operation = self.fixed_mode, self.operation
        if mode is None or not mode.autocommit or self.state is not State.ACTIVE:
            return False
        if operation is None or operation.name in KEEPS_CONNECTION:
            return False
        transaction = session.get_transaction()
        return (
            transaction is not None
            and transaction.origin is SessionTransactionOrigin.AUTOBEGIN
            and not session.in_nested_transaction()
            and (error is None or isinstance(error, Exception))
        )

    def leave(self, error: BaseException | None) -> None:
        """End an operation, and raise what its error means.

        Raises:
            DatabaseTimeoutError: the statement was cancelled because the unit's time is over.
            DatabaseBusyError: there was no connection for it.
            DatabaseDownError: the connection for it was closed while it was being set up.
        """
        operation = self.operation
        if operation is not None and operation.task is asyncio.current_task():
            self._end_operation(operation)
            if operation.name == "commit":  # in `run_sync`
                if error is not None:
                    self.transaction.fail()
                self._become_idle()
        if error is not None:
            raise_if_connect_failed(error)
        if (deadline := self.deadline) is not None:
            if self.state is State.IDLE:
                self.deadline = None
            if self.operation is None and deadline.has_cancelled(error):
                raise DatabaseTimeoutError(self.describe(), deadline.timeout) from error
        if isinstance(error, PoolTimeoutError) and not isinstance(error, DatabaseBusyError):
            self.tally.timeouts += 1
            self.tally.add_wait(time.monotonic() - self.transaction.asked_at)
            raise DatabaseBusyError(self.describe(), self.life.holders()) from error

    def _overdue(self) -> DatabaseTimeoutError:
        timeout = 0.0 if self.deadline is None else self.deadline.timeout
        return DatabaseTimeoutError(self.describe(), timeout)

    def _concurrent_use(self, name: str) -> ConcurrentUseError:
        running = "commit" if self.operation is None else self.operation.name
        return ConcurrentUseError(name, running, self.describe())

    # -- the state -----------------------------------------------------------------------------

    def _become_idle(self) -> None:
        """Move on first: nothing that comes of the tally may keep the unit from being idle."""
        self._move(State.IDLE)
        mode, self.fixed_mode = self.fixed_mode, None
        if self.operation is None:
            self.deadline = None
        else:  # the handler ends the transaction by hand; `leave` does the rest
            now = time.monotonic()
            self.tally.busy += now - self.operation.began
            self.operation = self.operation._replace(began=now)
        tally = self.tally
        if tally.began is not None and mode is not None:  # it has run a statement, or tried to
            if not mode.autocommit:
                tally.outcome = OUTCOMES.get(self.transaction.stage)
            self.tally = Tally()
            self.life.statistics.unit_ended(self.origin.route(), mode.name, tally)
            self.origin.unit_ended(tally)

    def _end_operation(self, operation: Operation) -> None:
        self.tally.busy += time.monotonic() - operation.began
        self.operation = None

    def _move(self, to: State) -> None:
        if to not in TRANSITIONS[self.state]:
            raise RuntimeError(f"a unit of work cannot move from {self.state.name} to {to.name}")
        self.state = to


_BUSY = frozenset({State.ACTIVE, State.ENDING})
