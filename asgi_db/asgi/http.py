"""One HTTP request and its response."""

from __future__ import annotations

import asyncio
import enum
import sys

from asgi_db.asgi.call import Call
from asgi_db.asgi.frameworks import answer_error, has_handler, reopen_response
from asgi_db.asgi.readiness import refuse
from asgi_db.asgi.retry import Attempts
from asgi_db.errors import (
    FailedTransactionError,
    OutcomeUnknownError,
    UnavailableError,
    unavailable_in,
)
from asgi_db.logs import logger
from asgi_db.modes import should_commit
from asgi_db.statistics import Tally
from asgi_db.types import Message
from asgi_db.unit.session import DBSession
from asgi_db.unit.unit_of_work import UnitOfWork


class Response(enum.Enum):
    """How far the response to a request has come."""

    PENDING = enum.auto()
    STARTED = enum.auto()
    COMPLETE = enum.auto()
    REPLACED = enum.auto()
    """A 503 or another attempt takes its place, and what the application sends is dropped."""


PENDING, STARTED, COMPLETE, REPLACED = Response


_BODY = frozenset({"http.response.body", "http.response.zerocopysend", "http.response.pathsend"})


class Exchange(Call):
    """One HTTP request and its response, or one attempt at it; see `Attempts`.

    Attributes:
        needs_retry: whether the request is to be run again; nothing has been sent.
    """

    needs_retry = False
    _may_stream_from_another_task = True
    _attempts: Attempts | None = None
    _app_task: asyncio.Task[object] | None = None
    _response = PENDING
    _has_whole_body = False
    _commit_error: Exception | None = None
    """Why the response that the application began was not sent, until it begins another one."""
    _exception_at_receive: BaseException | None = None
    _receiver: asyncio.Task[object] | None = None
    _statements = 0
    _busy = 0.0

    def unit_ended(self, tally: Tally) -> None:
        """Add up the statements for `Server-Timing`, and the time that they took."""
        self._statements += tally.statements
        self._busy += tally.busy

    async def run(self) -> None:
        """Run the application, then end the work that is still open after its last event."""
        enclosing_app = self._scope.get("app")
        self._app_task = asyncio.current_task()
        try:
            await self._site.app(self._scope, self._receive_body, self._send_after_commit)
        except BaseException as error:
            self._note_conflict(error)
            if (unit := self._session.unit) is not None and isinstance(error, Exception):
                unit.tally.raised = type(error).__name__
            await self._end(success=False)
            if not isinstance(error, Exception):
                self._log_unanswered()
                raise
            if not self.needs_retry:
                await self._answer(error, enclosing_app)
        else:
            if (unit := self._session.unit) is not None:
                await self._finish(unit, enclosing_app)
        finally:
            self._app_task = self._commit_error = None  # see `close`
            if (unit := self._session.unit) is not None and unit.hooks is not None:
                await unit.run_late_hooks()

    async def _finish(self, unit: UnitOfWork, enclosing_app: object) -> None:
        # A stream may simply end when its client disconnects; its unfinished work is rolled back.
        if unit.in_use:
            is_complete = self._response is COMPLETE
            await unit.end(success=is_complete and not unit.was_cancelled)
        if self.needs_retry:
            return
        if self._commit_error is not None:
            await self._answer(self._commit_error, enclosing_app)
        if self._late is not None:
            await self._late.raise_now()

    # -- another attempt -----------------------------------------------------------------------

    def join(self, attempts: Attempts) -> None:
        """Join the attempts at the request; a conflict may make another one necessary."""
        self.attempt = attempts.number
        self.ends_at = attempts.ends_at
        self._attempts = attempts
        if attempts.number > 1:
            self.before_unit = attempts.wait_for_turn
        elif attempts.others_go_alone:
            self.before_unit = lambda: attempts.let_others_go_alone(self.route())
        attempts.keep_body_if(lambda: (self.route_mode() or self.default_mode()).retries > 0)

    def leave(self) -> None:
        """Drop the reference to the attempts, which would otherwise be part of a cycle."""
        self._attempts = self.before_unit = None

    def deadline_began(self, at: float) -> None:
        """Apply the `timeout=` of the first unit to all attempts together."""
        self.ends_at = None
        if self._attempts is not None and self._attempts.ends_at is None:
            self._attempts.ends_at = at

    def begins_anew(self) -> None:
        """Let the `timeout=` of the route count, and not one that came before the route."""
        if self._attempts is not None:
            if self.attempt == 1:
                self._attempts.ends_at = None
            self.ends_at = self._attempts.ends_at

    def _note_conflict(self, error: BaseException | None) -> None:
        """Have the request run again if the database rolled it back in favor of another one."""
        unit, attempts = self._session.unit, self._attempts
        if unit is None or attempts is None or unit.conflict is None or self.needs_retry:
            return
        if not unit.mode.retries or not isinstance(error, Exception | None):
            return
        obstacle = self._obstacle(unit) or attempts.obstacle(unit.mode.retries)
        if obstacle:
            self._attempts = None
            note = f"{self.describe()}: will not be run again after a conflict: {obstacle}."
            unit.conflict.add_note(note)
            logger.warning(note)
            return
        logger.info("%s: attempt %d failed in a conflict", self.describe(), attempts.number)
        self.needs_retry = True
        self._response = REPLACED

    def _obstacle(self, unit: UnitOfWork) -> str:
        """Name what has happened in this attempt that must not happen twice, if anything has."""
        if self._response is not PENDING:
            return "its response has begun"
        if unit.unanswered is not None:
            return "it has committed by hand before"
        for session in self._scope.values():
            if isinstance(session, DBSession) and session.origin is not self and session.unit:
                return "it has used another database too"
        return ""

    # -- receive and send ----------------------------------------------------------------------

    async def _receive_body(self) -> Message:
        """Receive; until the whole body has come, no connection waits for it."""
        if self._has_whole_body:
            return await self._receive_noting_exception()
        unit = self._session.unit
        if unit is not None and (
            # A task that sends a stream may be at work beside one that listens for a disconnect.
            self._response is PENDING or not unit.is_work_of_another_task
        ):
            await unit.give_back_before_waiting()
        message = await self._receive_noting_exception()
        self._has_whole_body = not message.get("more_body")
        return message

    async def _receive_noting_exception(self) -> Message:
        error = sys.exc_info()[1]
        if error is None:
            return await self._receive()
        self._exception_at_receive, self._receiver = error, asyncio.current_task()
        try:
            return await self._receive()
        finally:
            self._exception_at_receive = self._receiver = None

    async def _send_after_commit(self, message: Message) -> None:
        unit = self._session.unit
        if message["type"] == "http.response.start":
            if unit is None and self._response is PENDING and message["status"] != 500:
                self._response = STARTED
                await self._send(message)
            else:
                await self._begin_response(message)
        elif self._commit_error is not None:
            raise self._commit_error
        elif self._response is PENDING:
            # Early hints come before the status line.
            self._attempts = None
            await self._send(message)
        elif self._response is not REPLACED:
            if unit is not None and unit.in_use and not self._is_used_by_body_task(unit):
                await unit.end(success=self._exception_being_handled() is None)
            if message["type"] in _BODY and not message.get("more_body"):
                self._response = COMPLETE
            if unit is None or not (unit.unanswered or unit.hooks or self._late):
                await self._send(message)
            else:
                await self._send_piece(unit, message)

    async def _send_piece(self, unit: UnitOfWork, message: Message) -> None:
        await self._send_answer(unit, message)
        if self._late is not None:
            await self._late.raise_now()
        # A task that only produces the stream is cancelled at the end of the stream, so there the
        # hooks are left to `run`.
        if self._response is COMPLETE and asyncio.current_task() is self._app_task:
            await unit.run_late_hooks()

    def _is_used_by_body_task(self, unit: UnitOfWork) -> bool:
        """Whether the body is produced in a task of its own, which must not be disturbed.

        FastAPI does so with an `EventSourceResponse`: it produces events while it sends others.
        """
        return unit.is_used_by_another_task or (
            unit.is_work_of_another_task and unit.has_uncommitted_work
        )

    def _exception_being_handled(self) -> BaseException | None:
        """The exception that the application is handling while it makes its response, if any.

        A stream may be sent from a task of its own, which handles no exception. The application's
        task then waits in `receive` until the client disconnects, as in Starlette's
        `StreamingResponse`.
        """
        error = sys.exc_info()[1]
        if error is None and self._exception_at_receive is not None:
            if asyncio.current_task() is not self._receiver:
                error = self._exception_at_receive
        return None if error is self._outer_exception else error

    async def _begin_response(self, message: Message) -> None:
        if self._response is REPLACED:
            return
        status = message["status"]
        error = self._exception_being_handled()
        if status == 500 and (unavailable := self._unavailable(error)) is not None:
            failed = error if isinstance(error, FailedTransactionError) else unavailable
            if not has_handler(self._scope, failed):
                self._note_conflict(error)
                if not self.needs_retry:
                    await self._refuse(unavailable)
                    return
        unit = self._session.unit
        if unit is None:
            self._response = STARTED
            await self._send(message)
            return
        if unit.in_use or unit.conflict is not None:
            await self._end_before_response(unit, status, error)
        if self._attempts is not None:  # The handler may have committed by hand.
            self._attempts.end_turn()
        self._response = STARTED
        self._commit_error = None
        if self._site.server_timing and self._statements:
            message = _with_server_timing(message, self._site.key, self._statements, self._busy)
        if unit.unanswered is None and self._late is None:
            await self._send(message)
            return
        if unit.unanswered is not None and unit.unanswered.was_cancelled and status >= 400:
            self._log_unanswered()
        await self._send_answer(unit, message)

    async def _end_before_response(
        self, unit: UnitOfWork, status: int, error: BaseException | None
    ) -> None:
        try:
            mode = unit.fixed_mode or unit.begin()
            unit.tally.status = status
            if not mode.commits and unit.operation is not None and unit.is_used_by_another_task:
                if not unit.is_giving_back:
                    return
                await unit.wait_for_end()
            success = should_commit(mode, status, error)
            if unit.next_mode is not None or self.has_moved():
                mode = unit.wanted_mode() or mode
                success = should_commit(mode, status, error)
            if not success:
                self._note_conflict(error)
                if error is not None and mode.commits:
                    _warn_of_exception(unit, status, error)
            await self._end_before_answer(unit, success=success, answer=f"the response {status}")
            if self.needs_retry and unit.conflict is not None:
                raise unit.conflict
        except Exception as commit_error:
            self._note_conflict(commit_error)
            if not self.needs_retry:
                self._commit_error = commit_error
            reopen_response(self._scope)
            raise

    async def _answer(self, error: Exception, enclosing_app: object) -> None:
        """Let the application answer a failed COMMIT, and answer an unavailable database with 503.

        Raises:
            Exception: the framework or the server has to handle the error.
        """
        try:
            if self._commit_error is None:
                raise error
            send = self._send_after_commit
            commit_error = self._commit_error
            try:
                await answer_error(
                    error, commit_error, enclosing_app, self._scope, self._receive, send
                )
            finally:
                await self._end(success=False)
        except Exception as unanswered:
            unavailable = self._unavailable(unanswered)
            if unavailable is not None and self._response is PENDING:
                await self._refuse(unavailable)
            elif unavailable is None or self._response is not REPLACED:
                raise

    def _unavailable(self, error: BaseException | None) -> UnavailableError | None:
        """Why the database was unavailable; None after a COMMIT, which must not be repeated."""
        found = unavailable_in(error)
        unit = self._session.unit
        has_committed = unit is not None and unit.unanswered is not None
        return found if isinstance(found, OutcomeUnknownError) or not has_committed else None

    async def _refuse(self, error: UnavailableError) -> None:
        await self._end(success=False)
        self._response = REPLACED
        self._commit_error = None
        logger.error("%s: answered with 503: %s", self.describe(), error)
        await refuse(self._send, error)
        # Another task of the handler may have begun a unit meanwhile.
        await self._end(success=False)


def _warn_of_exception(unit: UnitOfWork, status: int, error: BaseException) -> None:
    if status < 400 and unit.has_uncommitted_work:
        logger.warning(
            "%s: rolled back although the response is %d, because it was made while a %s was being"
            " handled. Raise a redirect, or answer after the `except` block.",
            unit.describe(),
            status,
            type(error).__name__,
        )


def _with_server_timing(message: Message, key: str, statements: int, busy: float) -> Message:
    """Add the header `Server-Timing`.

    Source: https://www.w3.org/TR/server-timing/
    """
    description = f"{statements} statement{'s' if statements > 1 else ''}"
    timing = f'{key};dur={busy * 1000:.1f};desc="{description}"'
    headers = [*message.get("headers", ()), (b"server-timing", timing.encode())]
    return {**message, "headers": headers}
