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
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from asgi_db.errors import (
    ConcurrentUseError,
    DatabaseTimeoutError,
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
    has_changes,
)
from asgi_db.unit.hooks import Hook, HookOutcome, Hooks
from asgi_db.unit.operation import MAY_BE_LATE, Operation
from asgi_db.unit.origin import Origin
from asgi_db.unit.transaction import OUTCOMES, Stage, Transaction

logger = logging.getLogger("asgi_db")


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
    owner: asyncio.Task[object] | None = None
    left_over: LeftOver | None = None

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
        """The mode in force: fixed by the first statement, until the unit ends."""
        return self.fixed_mode or self.origin.mode()

    def ask(self, mode: Mode) -> None:
        """Note the mode that a dependency stands for; see `Origin.ask`."""
        self.origin.ask(mode, self.fixed_mode)

    def begin(self) -> Mode:
        """Fix the mode, let its time begin, and return it; once for each unit."""
        mode = self.fixed_mode
        if mode is None:
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
        """Let the operation that runs be cancelled when its time is over.

        The end of a unit has a limit of its own; an operation that ends it gets some more time.
        """
        operation = self.operation
        if self.deadline is not None and operation is not None and self.state is State.ACTIVE:
            self.deadline.watch_task(CLEANUP_TIMEOUT if operation.name in MAY_BE_LATE else 0.0)

    # -- what the engine tells -----------------------------------------------------------------

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

    def terminate_streams(self) -> None:
        # To fetch is no operation of the session, which its deadline could cancel.
        if self.operation is None and self.overdue_stream() is not None:
            for connection in self.transaction.connections:
                connection.invalidate()

    def overdue_stream(self) -> DatabaseTimeoutError | None:
        """Return the error for a server-side cursor that is read after the end of `timeout=`."""
        is_late = self.transaction.streams and self.transaction.is_open and self.is_overdue
        return self.overdue() if is_late else None

    @property
    def commit_was_sent(self) -> bool:
        """Whether a COMMIT is on its way to the server, or at least may be."""
        return self.transaction.stage is Stage.SENT

    def commit_is_sent(self) -> None:
        """Note that the driver is about to send COMMIT, over a connection that is open."""
        self.transaction.commit_is_sent()

    # -- how it stands -------------------------------------------------------------------------

    @property
    def in_use(self) -> bool:
        """Whether there is anything to end."""
        return (
            self.state in _BUSY
            or self.operation is not None
            or self.left_over is not None
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
        owner = self.owner
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
        if self.left_over is LeftOver.DISCARDED and mode.commits:
            problem = problem or UncommittedWorkError(self.describe(), is_lost=True)
        if success and not mode.commits:
            self._warn_of_lost_work()
        if straggler is not None or self._has_work():
            if success and problem is None and mode.commits:
                log_failure = functools.partial(self._log_failed_commit, answer)
                await self._end_by("commit", self._ending().commit(self._commit, log_failure))
            else:
                await self._end_by("rollback", self._ending().roll_back_unit(straggler))
        elif self.state is State.ACTIVE:
            self.become_idle()
        self.left_over = None
        if success and problem is not None:
            logger.error("Not committed: %s", brief(problem))  # it names the route
            raise problem

    def _ending(self) -> Ending:
        if self.left_over is LeftOver.KEPT and self.sync_session is not None:
            if not self.sync_session.in_transaction():
                Session.begin(self.sync_session)  # in which what was kept is flushed, or expired
        return Ending(self.session, self.transaction, self.deadline, self.describe)

    def _has_work(self) -> bool:
        session = self.sync_session
        has_transaction = session is not None and session.in_transaction()
        return has_transaction or self.left_over is LeftOver.KEPT

    def _warn_of_lost_work(self) -> None:
        has_new = self.sync_session is not None and self.sync_session.new
        has_writes = self.transaction.has_writes and self.transaction.is_open
        if has_writes or self.left_over is LeftOver.DISCARDED or has_new:
            logger.warning(
                "%s: uncommitted work was rolled back at the end of the %s unit: commit it with"
                " `await session.commit()`, or put @transactional on the route.",
                self.describe(),
                self.mode.name,
            )

    def _commit(self) -> Coroutine[Any, Any, None]:
        return AsyncSession.commit(self.session)

    def _log_failed_commit(self, answer: str, error: BaseException) -> None:
        unsent = f", and {answer} was not sent" if answer else ""
        is_retried = self.mode.retries > 0 and self.conflict is not None
        level = logging.WARNING if is_retried else logging.ERROR
        logger.log(level, "%s: COMMIT failed%s: %s", self.describe(), unsent, brief(error))

    async def commit(self, commit: Callable[[], Awaitable[None]]) -> None:
        """Commit by hand; a cancellation does not interrupt it.

        Raises:
            asyncio.CancelledError: the request was cancelled; the COMMIT has nevertheless ended.
            ConcurrentUseError: another task uses the session.
            OutcomeUnknownError: the COMMIT did not end in time.
        """
        caller = asyncio.current_task()

        def log_failure(error: BaseException) -> None:
            if caller is not None and caller.cancelling():  # it is not told of the error
                self._log_failed_commit("", error)

        self.check_free("commit")
        self.begin()
        try:
            await self._end_by("commit", self._ending().commit(commit, log_failure))
        except asyncio.CancelledError:
            if self.unanswered is not None:
                self.unanswered.was_cancelled = True
            with contextlib.suppress(Exception):  # it is logged
                await self.run_hooks()
            raise
        await self.run_hooks()

    async def release(self) -> None:
        """Give the connection back before the unit's end; see `DBSession.release`."""
        if self.state is State.CLOSED:
            return
        self.check_free("release")
        transaction, session = self.transaction, self.sync_session
        if transaction.has_writes and transaction.is_open:
            raise UncommittedWorkError(self.describe(), is_lost=False)
        if session is not None and session.in_transaction():
            try:
                await self._end_by("release", self._ending().give_back())
            finally:
                if has_changes(session) and self.left_over is None:
                    self.left_over = LeftOver.KEPT
        elif self.state is State.ACTIVE:
            self.become_idle()

    async def _end_by(self, name: str, ending: Coroutine[Any, Any, None]) -> None:
        """Run the end of the transaction to its end, in a task of its own."""
        self.move(State.ENDING)
        task = asyncio.ensure_future(ending)
        self.operation = operation = Operation(name, task, time.monotonic())
        if self.left_over is LeftOver.KEPT:
            self.left_over = None
        try:
            await finish(task)
        finally:
            self.transaction.end()
            self.end_operation(operation)
            self.become_idle()

    def close(self) -> None:
        """Close the session for good: its use is an error from now on."""
        self.move(State.CLOSED)
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
            self.owner = current_task()
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

    def check_free(self, name: str) -> None:
        """Refuse an operation of a session that has ended, or that another task uses.

        Raises:
            SessionExpiredError: the request is over.
            ConcurrentUseError: another task is in the middle of an operation.
        """
        if self.state is State.CLOSED:
            raise SessionExpiredError(name, self.describe())
        if self.operation is not None and self.operation.task is not asyncio.current_task():
            raise self._concurrent_use(name)

    def overdue(self) -> DatabaseTimeoutError:
        """Make the error for a unit whose time is over."""
        timeout = 0.0 if self.deadline is None else self.deadline.timeout
        return DatabaseTimeoutError(self.describe(), timeout)

    def _concurrent_use(self, name: str) -> ConcurrentUseError:
        running = "commit" if self.operation is None else self.operation.name
        return ConcurrentUseError(name, running, self.describe())

    def end_operation(self, operation: Operation) -> None:
        """Note that the operation has ended."""
        self.tally.busy += time.monotonic() - operation.began
        self.operation = None

    # -- the state -----------------------------------------------------------------------------

    def become_idle(self) -> None:
        """Move on first: nothing that comes of the tally may keep the unit from being idle."""
        self.move(State.IDLE)
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

    def move(self, to: State) -> None:
        if to not in TRANSITIONS[self.state]:
            raise RuntimeError(f"a unit of work cannot move from {self.state.name} to {to.name}")
        self.state = to


_BUSY = frozenset({State.ACTIVE, State.ENDING})
