"""The unit of work: one span between two ASGI events in which one transaction may be open.

A session lives through many units, one after the other:

    IDLE ──first statement──▶ ACTIVE ──COMMIT or ROLLBACK──▶ ENDING ──▶ IDLE ──…──▶ CLOSED

`IDLE` holds nothing. `ACTIVE` has fixed the mode and may hold a connection. `ENDING` is the
COMMIT or ROLLBACK itself, which runs to its end even if the request is cancelled. `CLOSED` is
final: the request is over, and the session refuses to work.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

import anyio
from sqlalchemy import Connection, Engine, Result
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from asgi_db.drivers import driver_of, error_code, is_conflict
from asgi_db.drivers.connecting import abandon_connect, raise_if_connect_failed
from asgi_db.engine import begin_unit
from asgi_db.errors import (
    ConcurrentUseError,
    ConfigurationError,
    DatabaseBusyError,
    DatabaseTimeoutError,
    FailedTransactionError,
    ModeConflictError,
    OutcomeUnknownError,
    ReadOnlyError,
    SessionExpiredError,
    UncommittedWorkError,
)
from asgi_db.modes import Mode
from asgi_db.statistics import Outcome, Tally
from asgi_db.tasks import current_task, run_to_completion
from asgi_db.unit.deadline import Deadline
from asgi_db.unit.hooks import Hook, Hooks
from asgi_db.unit.session import DBSession, UnitSession

if TYPE_CHECKING:
    from asgi_db.unit.origin import Origin

logger = logging.getLogger("asgi_db")

CLEANUP_TIMEOUT = 5.0
"""Seconds that a ROLLBACK may take before its connection is terminated instead."""

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


class Transaction:
    """What a unit knows of its open transaction.

    Attributes:
        connections: those on which it is open.
        failure: why it cannot be committed any more, if it cannot.
        has_writes: whether it holds writes.
        streams: its results which live on a server-side cursor.
        was_cut_off: whether a statement of it was cancelled in the middle.
    """

    __slots__ = ("connections", "failure", "has_writes", "streams", "was_cut_off")

    def __init__(self) -> None:
        self.connections: list[Connection] = []
        self.failure: BaseException | None = None
        self.has_writes = False
        self.streams: list[Result[Any]] = []
        self.was_cut_off = False

    def note_failure(self, error: BaseException) -> None:
        """Note that it cannot be committed; the first reason is the cause."""
        if self.failure is None:
            self.failure = error


class UnitOfWork:
    """Begins, ends and watches over what one session does.

    Attributes:
        session: the session that handlers get.
        sync_session: its synchronous half; there is none before the session is first used.
        transaction: the open transaction.
        hooks: what is to be done after its end; None if there has been nothing yet.
        conflict: the last error with which the database has preferred another transaction.
        tally: what the unit has done so far.
        commit_sent: whether the last COMMIT has reached the connection.
        is_unanswered: whether writes were committed which the client does not know of yet.
        commit_outlived_request: whether a COMMIT by hand was still under way when the request
            was cancelled.
    """

    def __init__(self, session: DBSession, origin: Origin) -> None:
        """Prepare a unit; nothing is opened before the first statement.

        Args:
            session: the session.
            origin: what it is for.
        """
        self.database = origin.database
        self.engine = origin.engine()
        self.session = session
        self.sync_session: UnitSession | None = None
        self.transaction = Transaction()
        self.hooks: Hooks | None = None
        self.conflict: BaseException | None = None
        self.tally = Tally()
        self.commit_sent = False
        self.is_unanswered = False
        self.commit_outlived_request = False
        self._origin = origin
        self._asked: Mode | None = None
        self._active_mode: Mode | None = None
        self._state = State.IDLE
        self._operations: list[str] = []
        self._task: asyncio.Task[object] | None = None
        self._owner: asyncio.Task[object] | None = None
        self._commit_limit: asyncio.Timeout | None = None
        self._ended: asyncio.Event | None = None  # of the ENDING that is under way
        self._is_committing = False
        self._has_lost_work = False  # because the handler closed the session
        self._kept_changes = False  # by `release`, for the next transaction
        self._deadline: Deadline | None = None
        self._ends_at: float | None = None  # of the first unit with a `timeout=`
        self._asked_at = 0.0  # for a connection
        self._entered_at = 0.0  # the operation that is running

    def describe(self) -> str:
        """Name what the unit is for, for messages."""
        return self._origin.describe()

    def __repr__(self) -> str:
        return f"<UnitOfWork {self._state.name} {self.mode.name} {self.describe()}>"

    # -- the mode ------------------------------------------------------------------------------

    @property
    def mode(self) -> Mode:
        """The mode in force: fixed by the first statement, until the unit ends.

        Strongest first: the route, the dependency that the handler takes, the default.
        """
        origin = self._origin
        return self._active_mode or origin.route_mode() or self._asked or origin.default_mode()

    def ask(self, mode: Mode) -> None:
        """Take note of the mode that a dependency stands for; the strongest asked for wins.

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
        asked, begun = self._asked, self._active_mode
        if asked is not None and asked.covers(mode):
            return
        if self._origin.route_mode() is None:  # else it wins, whatever they ask for
            if asked is not None and not mode.covers(asked):
                raise ModeConflictError.at_odds(repr(mode), repr(asked), self.describe())
            if begun is not None and not begun.covers(mode):
                raise ModeConflictError.too_late(mode.name, begun.name, self.describe())
        self._asked = mode

    # -- what the session asks and tells -------------------------------------------------------

    def bind(self, bind: Engine | Connection) -> Engine | Connection:
        """Return the engine on which the mode's transactions begin as they should."""
        self._begin()
        self._watch()
        if not self.transaction.connections:
            self._asked_at = time.monotonic()
            if self.tally.began is None:
                self.tally.began = self._asked_at
        return self.database.bind_for(bind, self.mode)

    def _begin(self) -> None:
        """Fix the mode, and let its time begin, unless that has been done."""
        if self._active_mode is not None:
            return
        self._active_mode = mode = self.mode
        if self._state is State.IDLE:
            self._move(State.ACTIVE)
        self._deadline = None
        if mode.timeout is not None:
            self._deadline = Deadline(mode.timeout, self._origin.ends_at)
            self._origin.ends_at = None
            if self._ends_at is None:
                self._ends_at = self._deadline.at

    def _watch(self) -> None:
        """Let the operation that runs be cut off when its time is over.

        A COMMIT has a limit of its own, after which it says what is known of it; and what ends a
        unit whose time is over already gets some more.
        """
        if self._deadline is None or self._state is not State.ACTIVE or not self._operations:
            return
        operation = self._operations[0]
        if operation != "commit":
            least = CLEANUP_TIMEOUT if operation in _MAY_BE_LATE else 0.0
            self._deadline.watch_task(least)

    def check_flush(self) -> None:
        """Refuse a flush in a mode that only reads."""
        if self.mode.read_only:
            raise ReadOnlyError(
                f"{self.describe()}: there are new or changed objects to flush, but the mode is"
                f" {self.mode.name} and only reads. Put @transactional on the route, or ask for"
                " the transactional session."
            )

    def check_commit(self) -> None:
        """Refuse to commit what the database has given up already."""
        transaction = self.transaction
        if transaction.failure is not None:
            raise FailedTransactionError(statement_failed=True) from transaction.failure
        for connection in transaction.connections:
            if not connection.invalidated and not connection.connection.is_valid:
                raise FailedTransactionError(statement_failed=False)
        self._is_committing = True
        self.commit_sent = self._commit_comes_next()
        self._limit_commit(COMMIT_TIMEOUT)

    def _commit_comes_next(self) -> bool:
        """Whether the session is in its COMMIT, on a connection that is still there."""
        return self._is_committing and not any(
            connection.invalidated
            or driver_of(connection.dialect).is_closed(connection.connection.driver_connection)
            for connection in self.transaction.connections
        )

    def transaction_created(self) -> None:
        """Note whose work the transaction is, from before its first statement."""
        self._owner = current_task()

    def transaction_began(self, connection: Connection) -> None:
        """Note the connection, and mark it so that the events of the engine find this unit."""
        if connection not in self.transaction.connections:
            self.transaction.connections.append(connection)
            begin_unit(connection, self)
            waited = time.monotonic() - self._asked_at
            self.tally.add_wait(waited)
            self.database.statistics.connection_taken(waited)

    @property
    def commit_was_sent(self) -> bool:
        """Whether a COMMIT is on its way to the server, or at least may be."""
        return self.commit_sent

    def statement_comes(self, *, writes: bool) -> None:
        """Count a statement that is about to be sent."""
        self.tally.statements += 1
        if writes:
            self.transaction.has_writes = True

    def commit_is_sent(self) -> None:
        """Note that the driver is about to send COMMIT, over a connection that is open."""
        self.commit_sent = True

    def note_conflict(self, error: BaseException) -> None:
        """Note that the database has ended the transaction in favor of another one."""
        self.conflict = error

    def note_failure(self, error: BaseException) -> None:
        """Note that the transaction cannot be committed any more."""
        self.transaction.note_failure(error)

    def overdue_stream(self) -> DatabaseTimeoutError | None:
        """Return the error for a server-side cursor that is read after the end of `timeout=`."""
        return self.overdue() if self.transaction.streams and self.is_overdue else None

    def connection_returned(self, held: float) -> None:
        """Note that a connection is back in the pool, after so many seconds."""
        self.tally.add_hold(held)

    def stream_opened(self, stream: Result[Any]) -> None:
        """Note a result that lives on a server-side cursor; its rows are yet to come."""
        self.transaction.streams.append(stream)
        if self._deadline is not None:
            self._deadline.when_over(self._cut_off_streams)

    def _cut_off_streams(self) -> None:
        # To fetch is no operation of the session, which its deadline could cancel.
        if self.transaction.streams and not self._operations and self.is_overdue:
            for connection in self.transaction.connections:
                connection.invalidate()

    def transaction_committed(self) -> None:
        """Note that the session has committed; the client is to know."""
        self.is_unanswered = self.is_unanswered or self.transaction.has_writes
        self._note_outcome("committed")
        if self.hooks is not None:
            self.hooks.settle("commit")

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

    def transaction_ended(self) -> None:
        """Forget the transaction that the session has ended, by itself or by the handler."""
        if self.tally.outcome is None:
            self._note_outcome("failed" if self._is_committing else "rolled_back")
        if self.hooks is not None and self._operations[:1] and self._operations[0] in _LETS_GO:
            self.hooks.settle("rollback")
        self._is_committing = False
        self.transaction = Transaction()
        if self._state is State.ACTIVE and not self.mode.autocommit:
            self._become_idle()

    # -- how it ends ---------------------------------------------------------------------------

    @property
    def in_use(self) -> bool:
        """Whether there is anything to end."""
        if self.hooks is not None and self.hooks.are_waiting:
            return True
        if self.sync_session is None:
            return False
        is_busy = self._state in (State.ACTIVE, State.ENDING) or bool(self._operations)
        return is_busy or self._has_lost_work or self._has_work()

    @property
    def ends_at(self) -> float | None:
        """When the time of the mode's `timeout=` is over, in the event loop's time."""
        return self._ends_at

    @property
    def is_overdue(self) -> bool:
        """Whether the time of the mode's `timeout=` is over."""
        return self._deadline is not None and self._deadline.is_over

    def overdue(self) -> DatabaseTimeoutError:
        """Make the error for a unit whose time is over."""
        timeout = self._deadline.timeout if self._deadline is not None else 0.0
        return DatabaseTimeoutError(self.describe(), timeout)

    @property
    def is_used_by_another_task(self) -> bool:
        """Whether an operation runs just now in another task than this."""
        return self._other_task() is not None

    @property
    def is_work_of_another_task(self) -> bool:
        """Whether another task than this is in the middle of the unit.

        One that has ended, such as a statement in `asyncio.gather`, has left it to who waited.
        """
        owner = self._owner
        if owner is None or owner.done():
            owner = self._origin.task
        return self.in_use and owner not in (None, asyncio.current_task())

    @property
    def has_uncommitted_work(self) -> bool:
        """Whether there is anything that a ROLLBACK would undo."""
        return self.transaction.has_writes or self._has_changes()

    async def wait_for_end(self) -> None:
        """Wait for a COMMIT or ROLLBACK that another task has under way."""
        if self._ended is not None:
            await self._ended.wait()

    @property
    def was_cut_off(self) -> bool:
        """Whether a statement of the open transaction was cancelled in the middle."""
        return self.transaction.was_cut_off

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
        try:
            await self._end(success, answer)
        except BaseException:
            self.hooks.settle("rollback")  # unless the COMMIT has succeeded, and they are due
            with contextlib.suppress(Exception):  # it is logged, and masks no other
                await self.hooks.run(self.describe)
            raise
        self.hooks.settle("commit" if keeps else "rollback")
        await self.hooks.run(self.describe)
        # What the hooks have done with the session; if that fails, it masks no other error.
        with contextlib.nullcontext() if success else contextlib.suppress(Exception):
            await self.end(success=True)

    async def run_late_hooks(self) -> None:
        """Run the hooks that were to wait for the response."""
        if self.hooks is not None:
            try:
                await self.hooks.run_late(self.describe)
            finally:
                with contextlib.suppress(Exception):  # it is logged, and the answer has left
                    await self.end(success=True)

    def add_hook(self, hook: Hook) -> None:
        """Let a function be called after the COMMIT, or the ROLLBACK, of what is open now.

        Raises:
            SessionExpiredError: the request is over.
        """
        if self._state is State.CLOSED:
            raise SessionExpiredError(f"on_{hook.outcome}", self.describe())
        if not self.in_use:
            self._owner = current_task()
        if self.hooks is None:
            self.hooks = Hooks()
        self.hooks.add(hook)

    async def _end(self, success: bool, answer: str) -> None:
        problem: Exception | None = None
        if self._has_lost_work and self.mode.commits:
            problem = UncommittedWorkError(self.describe(), is_lost=True)
        if self._ended is not None:  # another task releases the session just now
            problem = self._concurrent_use("commit")
            await run_to_completion(self._ended.wait())
        straggler = self._other_task()
        if straggler is not None:
            problem = self._concurrent_use("commit")
        self._begin()
        if success and not self.mode.commits:
            self._warn_of_lost_work()
        if straggler is not None or self._has_work():
            commit = success and problem is None and self.mode.commits
            await self._end_by(self._commit(answer) if commit else self._roll_back(straggler))
        elif self._state is State.ACTIVE:
            self._become_idle()
        self._has_lost_work = False
        if success and problem is not None:
            logger.error("Not committed: %s", _brief(problem))  # it names the route
            raise problem

    def _warn_of_lost_work(self) -> None:
        has_new = self.sync_session is not None and self.sync_session.new
        if self.transaction.has_writes or self._has_lost_work or has_new:
            logger.warning(
                "%s: uncommitted work was rolled back at the end of the %s unit: commit it with"
                " `await session.commit()`, or put @transactional on the route.",
                self.describe(),
                self.mode.name,
            )

    async def release(self) -> None:
        """Give the connection back before the unit's end; see `DBSession.release`."""
        if self._other_task() is not None or self._state is State.ENDING:
            raise self._concurrent_use("release")
        if self.transaction.has_writes:
            raise UncommittedWorkError(self.describe(), is_lost=False)
        if self.sync_session is not None and self.sync_session.in_transaction():
            try:
                await self._end_by(self._give_back())
            finally:
                self._kept_changes = self._has_changes()
        elif self._state is State.ACTIVE:
            self._become_idle()

    def close(self) -> None:
        """Let the session go for good: whoever still uses it gets an error."""
        self._move(State.CLOSED)
        self.sync_session = None
        del self.session

    async def _end_by(self, ending: Coroutine[Any, Any, None]) -> None:
        self._move(State.ENDING)
        self._ended = ended = asyncio.Event()
        self._task = None  # until the task that ends the unit puts itself there
        try:
            await run_to_completion(ending)
        finally:
            self._become_idle()
            self._ended = None
            ended.set()

    async def commit(self, commit: Callable[[], Awaitable[None]]) -> None:
        """Commit by hand, without being cut off by a cancellation.

        Raises:
            asyncio.CancelledError: the request was cancelled; the COMMIT has nevertheless ended.
            ConcurrentUseError: another task uses the session.
            OutcomeUnknownError: the COMMIT did not end in time.
        """
        caller = asyncio.current_task()

        async def whole() -> None:
            self._task = asyncio.current_task()
            try:
                self._begin()
                await self._limit(commit)
            except BaseException as error:
                if caller is not None and caller.cancelling():  # it is not told of the error
                    logger.error("%s: COMMIT failed: %s", self.describe(), _brief(error))
                await self._close_by(AsyncSession.rollback(self.session))
                raise
            finally:
                self._leave_operation()
                if self._state is State.ACTIVE and not self.mode.autocommit:
                    if not self._has_work():  # not even a transaction to be committed
                        self._become_idle()

        self.enter("commit")
        try:
            await run_to_completion(whole())
        except asyncio.CancelledError:
            self.commit_outlived_request = self.is_unanswered
            with contextlib.suppress(Exception):  # it is logged
                await self.run_hooks()
            raise
        await self.run_hooks()

    async def run_hooks(self) -> None:
        """Run the hooks that are due, after the handler itself has committed or rolled back.

        Raises:
            Exception: the error of a hook that is not robust.
        """
        if self.hooks is not None:
            await self.hooks.run(self.describe)

    async def _limit(self, commit: Callable[[], Awaitable[None]]) -> None:
        """Wait for a COMMIT, but not for ever on a server that does not answer."""
        left = COMMIT_TIMEOUT
        if self._deadline is not None:
            left = max(self._deadline.left, LEAST_COMMIT_TIMEOUT)
        self._commit_limit = limit = asyncio.timeout(left)
        try:
            async with limit:
                await self._close_streams()
                self._limit_commit(None)
                await commit()
        except BaseException as error:
            self._note_outcome("failed")
            if isinstance(error, TimeoutError) and limit.expired():
                raise self._overdue(left) from None
            raise
        finally:
            self._commit_limit = None
            self._is_committing = False
            self.commit_sent = False

    def _limit_commit(self, seconds: float | None) -> None:
        """Let the COMMIT itself have a limit, but without `timeout=` not what goes before it."""
        if self._commit_limit is not None and self._deadline is None:
            now = asyncio.get_running_loop().time()
            self._commit_limit.reschedule(None if seconds is None else now + seconds)

    def _overdue(self, seconds: float) -> Exception:
        if not self.commit_sent:
            return DatabaseTimeoutError(self.describe(), seconds)
        message = (
            f"{self.describe()}: COMMIT was sent and not answered within {seconds:.1f} s, so"
            " whether it was carried out is unknown"
        )
        return OutcomeUnknownError(message, TimeoutError())

    async def _commit(self, answer: str) -> None:
        self._task = asyncio.current_task()
        try:
            await self._limit(lambda: AsyncSession.commit(self.session))
        except BaseException as error:
            unsent = f", and {answer} was not sent" if answer else ""
            expected = self.mode.retries > 0 and self.conflict is not None
            level = logging.WARNING if expected else logging.ERROR
            logger.log(level, "%s: COMMIT failed%s: %s", self.describe(), unsent, _brief(error))
            await self._close_by(AsyncSession.rollback(self.session))
            raise

    async def _roll_back(self, straggler: asyncio.Task[object] | None) -> None:
        self._task = asyncio.current_task()
        await self._close_by(self._roll_back_after(straggler))

    async def _give_back(self) -> None:
        self._task = asyncio.current_task()
        await self._close_by(self._give_back_after_streams(), let_go=self._keep_objects)

    async def _give_back_after_streams(self) -> None:
        await self._close_streams()
        await self._give_back_whole()

    async def _keep_objects(self) -> None:
        """End a transaction without writes whose connection has gone: nothing is lost with it."""
        with contextlib.suppress(SQLAlchemyError):
            await self._give_back_whole()
        self.transaction_ended()

    async def _roll_back_after(self, straggler: asyncio.Task[object] | None) -> None:
        if straggler is not None:
            # To end a session in the middle of another task's statement breaks it.
            if self._operations[:1] != ["commit"]:  # which is never cut off
                straggler.cancel()
            await asyncio.wait((straggler,))
        await self._close_streams()
        if self.has_uncommitted_work or self.transaction.failure is not None:
            await AsyncSession.rollback(self.session)
        else:  # what was only loaded stays usable
            await self._give_back_whole()

    async def _give_back_whole(self) -> None:
        if (session := self.sync_session) is not None:
            await self.session.run_sync(lambda _: session.give_back())

    async def _close_streams(self) -> None:
        """Close what lives on a cursor: MariaDB's would seem to be at its end, not cut off."""

        def close(_: Session) -> None:
            for stream in streams:
                stream.close()

        if streams := self.transaction.streams:
            await self.session.run_sync(close)

    def _has_work(self) -> bool:
        """Whether there is a transaction; a change of an object begins one too, in SQLAlchemy."""
        session = self.sync_session
        return session is not None and (session.in_transaction() or self._kept_changes)

    def _has_changes(self) -> bool:
        session = self.sync_session
        return session is not None and session.has_changes

    async def _close_by(
        self,
        closing: Coroutine[Any, Any, None],
        let_go: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Close the transaction; where that fails or takes too long, terminate the connection.

        Args:
            closing: closes it.
            let_go: ends it for the session when its connection has gone; else that is closed.
        """
        connections = list(self.transaction.connections)
        try:
            async with asyncio.timeout(CLEANUP_TIMEOUT):
                await closing
        except Exception as error:
            logger.error("%s: ROLLBACK failed: %s", self.describe(), _brief(error))
            await self._terminate(connections, let_go or self.session.close)

    async def _terminate(
        self, connections: list[Connection], let_go: Callable[[], Awaitable[None]]
    ) -> None:
        self._operations.clear()
        try:
            with anyio.move_on_after(CLEANUP_TIMEOUT):
                await self.session.run_sync(lambda _: _terminate(connections))
            await let_go()
        except SQLAlchemyError as error:  # a task that took no notice of its cancellation
            logger.error("%s: the session is still in use: %s", self.describe(), _brief(error))

    # -- one task at a time --------------------------------------------------------------------

    def enter(self, operation: str) -> None:
        """Begin an operation of the session.

        Raises:
            SessionExpiredError: the request is over.
            ConcurrentUseError: another task is in the middle of an operation.
        """
        if self._state is State.CLOSED and operation not in _LETS_GO:
            raise SessionExpiredError(operation, self.describe())
        if self.is_overdue and self._state is State.ACTIVE and operation not in _MAY_BE_LATE:
            raise self.overdue()
        task = asyncio.current_task()
        if self._operations or self._state is State.ENDING:
            if task is not self._task:
                raise self._concurrent_use(operation)
        if not self._operations:
            self._entered_at = time.monotonic()
            abandon_connect()  # of the engine itself: its error is no error of this operation
        if operation in _LETS_GO and self._state in (State.IDLE, State.ACTIVE):
            self._has_lost_work = self._has_lost_work or self.has_uncommitted_work
        self._task = task
        self._operations.append(operation)
        self.commit_sent = False  # what is done within a COMMIT comes before it: a flush, above all
        self._limit_commit(None)
        self._watch()

    def is_part(self, operation: str) -> bool:
        """Whether this is but a part of what the task is doing, which is watched as a whole.

        Reads are: `get` is made of an `execute`, and that of a `flush`.
        """
        return (
            bool(self._operations)
            and operation in _PARTS
            and self._state in (State.IDLE, State.ACTIVE)
            and not self._is_committing
            and self._task is asyncio.current_task()
        )

    def leave(self, session: UnitSession, error: BaseException | None) -> None:
        """End an operation; in autocommit the connection goes back at once."""
        if error is not None and session.in_transaction():  # else it has ended with the error
            transaction = self.transaction
            if isinstance(error, asyncio.CancelledError):
                transaction.was_cut_off = True
            if _is_failure(error) and not session.in_nested_transaction():
                transaction.note_failure(error)
        if isinstance(error, DBAPIError) and self.conflict is None and is_conflict(error):
            self.conflict = error  # of a BEGIN, which comes before the unit has the connection
        try:
            outermost = len(self._operations) == 1 and self._state is State.ACTIVE
            if outermost and self.mode.autocommit and (error is None or _is_ordinary(error)):
                if self._operations[0] not in _KEEPS_CONNECTION:
                    session.give_back_between_statements()
        finally:
            self._leave_operation()
            if error is None and self._is_committing:
                self.commit_sent = self._commit_comes_next()
                self._limit_commit(COMMIT_TIMEOUT)
            if error is not None or self._deadline is not None:
                self._raise_instead_of(error)

    def _leave_operation(self) -> None:
        if self._operations:  # not so if the connection had to be terminated under it
            self._operations.pop()
            if not self._operations:
                self._note_busy()

    def _note_busy(self) -> None:
        now = time.monotonic()
        self.tally.busy += now - self._entered_at
        self._entered_at = now

    def _raise_instead_of(self, error: BaseException | None) -> None:
        """Raise what the error of an operation means.

        Raises:
            DatabaseTimeoutError: the statement was cut off because the unit's time is over.
            DatabaseBusyError: there was no connection for it.
            DatabaseDownError: the connection for it was lost while it was being set up.
        """
        if error is not None:
            raise_if_connect_failed(error)
        deadline = self._deadline
        if deadline is not None and not self._operations:
            if self._state is State.IDLE:
                self._deadline = None
            if deadline.has_cut_off(error):
                raise DatabaseTimeoutError(self.describe(), deadline.timeout) from error
        if isinstance(error, PoolTimeoutError) and not isinstance(error, DatabaseBusyError):
            self.tally.timeouts += 1
            self.tally.add_wait(time.monotonic() - self._asked_at)
            raise DatabaseBusyError(self.describe(), self.database.holders()) from error

    def _other_task(self) -> asyncio.Task[object] | None:
        return self._task if self._operations and self._task is not asyncio.current_task() else None

    def _concurrent_use(self, operation: str) -> ConcurrentUseError:
        running = self._operations[-1] if self._operations else "commit"
        return ConcurrentUseError(operation, running, self.describe())

    # -- the state -----------------------------------------------------------------------------

    def _become_idle(self) -> None:
        self._count()
        self._kept_changes = False
        self._active_mode = None
        if not self._operations:  # else `leave` does it
            self._deadline = None
        self._move(State.IDLE)

    def _note_outcome(self, outcome: Outcome) -> None:
        if self.tally.began is not None and not self.mode.autocommit:
            self.tally.outcome = outcome

    def _count(self) -> None:
        if self._operations:  # a commit by hand
            self._note_busy()
        tally = self.tally
        if tally.began is not None:  # it has run a statement, or tried to
            self.tally = Tally()
            self.database.statistics.unit_ended(self._origin.route(), self.mode.name, tally)
            self._origin.unit_ended(tally)

    def _move(self, to: State) -> None:
        if to not in TRANSITIONS[self._state]:
            raise RuntimeError(f"a unit of work cannot move from {self._state.name} to {to.name}")
        self._state = to


_LETS_GO = frozenset({"close", "invalidate", "reset"})
"""Operations which are harmless on a session whose request is over."""

_PARTS = frozenset({"execute", "flush", "get"})
"""Operations of which others are made."""

_MAY_BE_LATE = frozenset({"commit", "rollback", *_LETS_GO})
"""Operations which end the unit, and may do so when its time is over."""

_KEEPS_CONNECTION = frozenset({"connection", "begin", "begin_nested"})
"""Operations whose very result is the open connection or transaction."""


def _is_failure(error: BaseException) -> bool:
    """Whether the error means that a statement failed or was cut off, not that a row is missing."""
    return isinstance(error, (DBAPIError, PoolTimeoutError)) or not _is_ordinary(error)


def _is_ordinary(error: BaseException) -> bool:
    """Whether the error is none that ends the task, such as a cancellation."""
    return isinstance(error, Exception)


def _terminate(connections: list[Connection]) -> None:
    for connection in connections:
        if not connection.closed:
            connection.invalidate()
            connection.close()


def _brief(error: BaseException) -> str:
    """The error for a log line; a database's own words may repeat what was to be written."""
    if not isinstance(error, DBAPIError):
        return f"{type(error).__name__}: {error}"
    code = "no code" if error.orig is None else error_code(error.orig) or "no code"
    return f"{type(error).__name__} ({type(error.orig).__name__}, {code})"
