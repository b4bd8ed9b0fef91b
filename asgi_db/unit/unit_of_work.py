"""The unit of work: a span between two ASGI events in which one transaction may be open.

Whether to commit is decided here, once. `Ending` then does the I/O in a task of its own, which a
cancellation of the request does not interrupt.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any
from weakref import ref

from sqlalchemy import Connection
from sqlalchemy.orm import Session

from asgi_db.drivers.describing import brief
from asgi_db.drivers.statements import Effect
from asgi_db.engine.variants import isolation_options
from asgi_db.errors import (
    ModeConflictError,
    OutcomeUnknownError,
    UncommittedWorkError,
)
from asgi_db.logs import about_a_raised_error, logger
from asgi_db.tasks import acting_for, cancelled_once, finish
from asgi_db.unit.ending import Ending, has_changes
from asgi_db.unit.hooks import Hook, HookOutcome, Hooks
from asgi_db.unit.loaded import read_again
from asgi_db.unit.lost_work import log_failed_commit, loses_work, warn_of_lost_work
from asgi_db.unit.operation import WAITING, Operation
from asgi_db.unit.standing import Standing
from asgi_db.unit.state import LeftOver, State
from asgi_db.unit.transaction import STAGES, Stage
from asgi_db.unit.translating import translated


class UnitOfWork(Standing):
    """Begins and ends the work of one session."""

    # -- how it ends ---------------------------------------------------------------------------

    async def end(self, *, success: bool, answer: str = "") -> None:
        """End the unit: COMMIT if it succeeded and its mode commits, otherwise ROLLBACK.

        Its hooks run afterwards. If no statement has run, this costs nothing. The end of a unit
        that has failed leaves the error that goes out in its place; see `cancelled_once`.

        Args:
            success: whether the request or block has succeeded.
            answer: the response that waits for the COMMIT, to be named in the log if it fails.

        Raises:
            SQLAlchemyError: the commit failed, and the transaction has been rolled back.
            ConcurrentUseError: the unit succeeded, but another task was using the session.
            UncommittedWorkError: there was work to commit, but the handler had closed the session.
            Exception: the error of a hook that is not robust.
        """
        if self.transaction.stage is Stage.KEPT:
            self.give_back_kept()
        if not self.in_use:
            return
        if self.is_rollback_only:
            success = self.is_rollback_only = False
        if not success:
            with cancelled_once():
                await self._end_with_hooks(success, answer)
        elif self.hooks is None:
            await self._end(success, answer)
        else:
            await self._end_with_hooks(success, answer)

    async def _end_with_hooks(self, success: bool, answer: str) -> None:
        if self.hooks is None:
            await self._end(success, answer)
            return
        # A mode that only reads has nothing to commit, and counts as committed.
        mode = self.next_mode or self.mode
        keeps = success and (mode.commits or mode.read_only)
        outcome: HookOutcome = "rollback"
        try:
            await self._end(success, answer)
            outcome = "commit" if keeps else "rollback"
        except BaseException:
            # After a COMMIT that succeeded they are settled already.
            self.hooks.settle(outcome)
            # An error of a hook is logged, and does not mask this one.
            with contextlib.suppress(Exception):
                await self.hooks.run(self.describe)
            raise
        self.hooks.settle(outcome)
        await self.hooks.run(self.describe)
        # The hooks may have used the session. If this end fails, it must not mask another error.
        with contextlib.nullcontext() if success else contextlib.suppress(Exception):
            await self.end(success=True)

    async def _end(self, success: bool, answer: str) -> None:
        problem: Exception | None = None
        if self.state is State.ENDING:
            # Another task is committing or releasing the session.
            problem = None if self.is_giving_back else self.concurrent_use("commit")
            await finish(asyncio.ensure_future(self.wait_for_end()))
        straggler = self.operation
        if straggler is not None:
            if straggler.task is asyncio.current_task():
                straggler = None
            else:
                problem = self.concurrent_use("commit")
        if success and problem is None and self.next_mode is not None:
            try:
                await self.change_mode()
            except ModeConflictError as conflict:
                problem = conflict
        # A failure is rolled back in any mode, also where the route's mode cannot be found.
        mode = self.fixed_mode or (self.begin() if success else None)
        commits = mode is not None and mode.commits
        if self.left_over is LeftOver.DISCARDED and commits:
            problem = problem or UncommittedWorkError(self.describe(), is_lost=True)
        warns = success and problem is None and not commits
        is_lost = warns and loses_work(self)
        session = self.sync_session
        has_transaction = session is not None and session.in_transaction()
        if has_transaction or straggler is not None or self.left_over is LeftOver.KEPT:
            try:
                if success and problem is None and commits:
                    caller = asyncio.current_task()
                    log_failure = functools.partial(log_failed_commit, self, answer, caller)
                    commit = self._ending().commit(self.session.commit_in_unit, log_failure)
                    await self._end_by("commit", commit)
                else:
                    rollback = self._ending().roll_back_unit(straggler, looks_for_writes=warns)
                    await self._end_by("rollback", rollback)
            finally:
                if self.loaded is not None and session is not None:
                    self.loaded.give_back(session)
        elif self.state is State.ACTIVE:
            self.become_idle()
        self.left_over = None
        if mode is not None and (is_lost or (warns and self.transaction.effect.writes)):
            warn_of_lost_work(self, mode)
        if success and problem is not None:
            with about_a_raised_error():
                logger.error("Not committed: %s", brief(problem))
            raise problem

    def _ending(self) -> Ending:
        session = self.sync_session
        if self.left_over is LeftOver.KEPT and session is not None:
            if not session.in_transaction():  # in which what was kept is flushed, or expired
                Session.begin(session)
        translate = functools.partial(translated, unit=self)
        return Ending(self.session, self.transaction, self.deadline, self.describe, translate)

    async def commit(self, commit: Callable[[], Awaitable[None]]) -> None:
        """Commit by hand; a cancellation does not interrupt it.

        Raises:
            asyncio.CancelledError: the request was cancelled; the COMMIT has nevertheless ended.
            ConcurrentUseError: another task is using the session.
            OutcomeUnknownError: the COMMIT was not answered in time.
        """
        caller = asyncio.current_task()

        def log_failure(error: BaseException) -> None:
            # A cancelled caller does not get the error, so it is logged.
            if caller is not None and caller.cancelling():
                log_failed_commit(self, "", caller, error)

        if self.operation is not None:
            await self.wait_for_turn()
        self.check_free("commit")
        self.give_back_kept()
        if self.is_outdated():
            await self.change_mode()
        self.begin()
        try:
            await self._end_by("commit", self._ending().commit(commit, log_failure))
        except asyncio.CancelledError:
            if self.unanswered is not None:
                self.unanswered.was_cancelled = True
            # An error of a hook is logged, and does not replace the cancellation.
            with contextlib.suppress(Exception):
                await self.run_hooks()
            raise
        await self.run_hooks()

    async def release(self) -> None:
        """Give the connection back before the unit's end; see `DBSession.release`."""
        if self.state is State.CLOSED:
            return
        if self.operation is not None:
            await self.wait_for_turn()
        self.check_free("release")
        self.give_back_kept()
        transaction, session = self.transaction, self.sync_session
        if transaction.effect.writes and transaction.is_open:
            raise UncommittedWorkError(self.describe(), is_lost=False)
        try:
            if session is not None and session.in_transaction():
                await self._end_by("release", self._ending().give_back())
            elif self.state is State.ACTIVE:
                self.become_idle()
        finally:
            if session is not None:
                read_again(session)
            self.keep_changes()

    async def change_mode(self) -> None:
        """Give the connection back if another mode is asked for by now; the next unit has it.

        Raises:
            ModeConflictError: the unit holds more than reads.
        """
        if self.needs_other_mode():
            await self.release()
            self.origin.begins_anew()

    async def give_back_before_waiting(self) -> None:
        """Give the connection back before a wait for the network, unless something would be lost.

        What the user has asked to last stays: an isolation level, a snapshot, a block, a savepoint,
        a cursor, a lock, and every change.
        """
        self.give_back_kept()
        session, transaction = self.sync_session, self.transaction
        mode = self.fixed_mode
        if (
            session is not None
            and mode is not None
            and self.state is State.ACTIVE
            and self.operation is None
            and not (transaction.failure or transaction.was_cancelled)
            and not (mode.isolation or mode.snapshot or self.left_over)
            and not (self.holds_more_than(Effect.READS) or has_changes(session))
            and session.in_transaction()
            and not any(map(_has_isolation_level, transaction.connections))
        ):
            read_again(session)
            await self._end_by(WAITING, self._ending().give_back())

    async def _end_by(self, name: str, ending: Coroutine[Any, Any, None]) -> None:
        """End the transaction in a task of its own, and wait until that is complete."""
        self.move(State.ENDING)
        # No task has it before the new one begins, and an eager task begins at once.
        self.operation = operation = Operation(name, None, time.monotonic())
        caller = asyncio.current_task()
        if self.left_over is LeftOver.KEPT:
            self.left_over = None
        try:
            await finish(asyncio.ensure_future(self._run_as_operation(ending, caller)))
        finally:
            ending.close()  # The task may have been cancelled before it began.
            if STAGES[self.transaction.stage]:
                # It is open: the connection was terminated, so that no event has reported the end.
                self.transaction.end()
                if self.transaction.is_open:  # a COMMIT that began its transaction itself
                    self.transaction.fail()
            self.end_operation(operation)
            self.become_idle()

    async def _run_as_operation(
        self, ending: Coroutine[Any, Any, None], caller: asyncio.Task[Any] | None
    ) -> None:
        acting_for.set(None if caller is None else ref(caller))
        if self.operation is not None:
            self.operation = self.operation._replace(task=asyncio.current_task())
        try:
            await ending
        except OutcomeUnknownError:
            self.tally.is_unknown = True
            raise

    def set_rollback_only(self) -> None:
        """Have the unit rolled back at its end, although it succeeds.

        Raises:
            SessionExpiredError: the request is over.
        """
        self.own("set_rollback_only")
        self.is_rollback_only = True

    # -- hooks ---------------------------------------------------------------------------------

    def add_hook(self, hook: Hook) -> None:
        """Have a function called after the COMMIT or ROLLBACK of the current transaction.

        Raises:
            SessionExpiredError: the request is over.
        """
        self.own(f"on_{hook.outcome}")
        if self.hooks is None:
            self.hooks = Hooks()
        self.hooks.add(hook)

    async def run_hooks(self) -> None:
        """Run the hooks that are due after the handler itself has committed or rolled back.

        Raises:
            Exception: the error of a hook that is not robust.
        """
        if self.hooks is not None:
            await self.hooks.run(self.describe)

    async def run_late_hooks(self) -> None:
        """Run the hooks that waited for the response."""
        if self.hooks is not None:
            with cancelled_once():
                try:
                    await self.hooks.run_late(self.describe)
                finally:
                    # The response has been sent, so an error here is only logged.
                    with contextlib.suppress(Exception):
                        await self.end(success=True)


def _has_isolation_level(connection: Connection) -> bool:
    """Whether the user has asked for an isolation level on this connection or its engine."""
    of_engine = isolation_options(connection.engine)["isolation_level"]
    return (of_engine or connection.get_execution_options().get("isolation_level")) is not None
