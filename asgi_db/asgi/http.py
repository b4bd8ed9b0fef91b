"""One HTTP request and its response."""

from __future__ import annotations

import asyncio
import enum
import sys

from asgi_db.asgi.call import Call
from asgi_db.asgi.frameworks import answer_error, has_handler, reopen_response
from asgi_db.asgi.readiness import refuse
from asgi_db.asgi.retry import Attempts
from asgi_db.errors import OutcomeUnknownError, UnavailableError, unavailable_in
from asgi_db.logs import logger
from asgi_db.modes import should_commit
from asgi_db.statistics import Tally
from asgi_db.types import Message
from asgi_db.unit.session import DBSession
from asgi_db.unit.unit_of_work import UnitOfWork


class Response(enum.Enum):
    """How far the response of a request has come."""

    PENDING = enum.auto()
    STARTED = enum.auto()
    COMPLETE = enum.auto()
    REPLACED = enum.auto()
    """By a refusal, or by another attempt: what the application sends instead is dropped."""


PENDING, STARTED, COMPLETE, REPLACED = Response


_BODY = frozenset({"http.response.body", "http.response.zerocopysend", "http.response.pathsend"})


class Exchange(Call):
    """One HTTP request and its response; or one attempt at it, see `Attempts`.

    Attributes:
        is_lost: whether it is to be run again; nothing has been sent.
    """

    is_lost = False
    _may_stream_from_another_task = True
    _attempts: Attempts | None = None
    _app_task: asyncio.Task[object] | None = None
    _response = PENDING
    _commit_error: Exception | None = None
    """Why the response that the application began was refused, until it begins another."""
    _exception_at_receive: BaseException | None = None
    _receiver: asyncio.Task[object] | None = None
    _statements = 0
    _busy = 0.0

    def unit_ended(self, tally: Tally) -> None:
        """Add up what happens before the status line."""
        self._statements += tally.statements
        self._busy += tally.busy

    async def run(self) -> None:
        """Run the application, then end what its last event has left open."""
        enclosing_app = self._scope.get("app")
        self._app_task = asyncio.current_task()
        try:
            await self._site.app(self._scope, self._receive_noting, self._send_after_commit)
        except BaseException as error:
            self._note_conflict(error)
            await self._end(success=False)
            if not isinstance(error, Exception):
                self._log_unanswered()
                raise
            if not self.is_lost:
                await self._answer(error, enclosing_app)
        else:
            if (unit := self._session.unit) is not None:
                await self._finish(unit, enclosing_app)
        finally:
            if (unit := self._session.unit) is not None and unit.hooks is not None:
                await unit.run_late_hooks()

    async def _finish(self, unit: UnitOfWork, enclosing_app: object) -> None:
        # A stream whose client has gone may just end: what it left half done is not kept.
        if unit.in_use:
            is_complete = self._response is COMPLETE
            await unit.end(success=is_complete and not unit.was_cancelled)
        if self.is_lost:
            return
        if self._commit_error is not None:
            await self._answer(self._commit_error, enclosing_app)
        if self._late is not None:
            await self._late.raise_now()

    # -- another attempt -----------------------------------------------------------------------

    def join(self, attempts: Attempts) -> None:
        """Be one of several attempts, should this one meet a conflict."""
        self.attempt = attempts.number
        self.ends_at = attempts.ends_at
        self._attempts = attempts
        attempts.keep_body_if(lambda: (self.route_mode() or self.default_mode()).retries > 0)

    def leave(self) -> None:
        """Be one of several attempts no more: they know this, and nothing is to go in circles."""
        self._attempts = None

    def deadline_began(self, at: float) -> None:
        """Let the `timeout=` of the first unit hold for all attempts together."""
        self.ends_at = None
        if self._attempts is not None and self._attempts.ends_at is None:
            self._attempts.ends_at = at

    def _note_conflict(self, error: BaseException | None) -> None:
        """Let the request be run again if the database has preferred another transaction to it."""
        unit, attempts = self._session.unit, self._attempts
        if unit is None or attempts is None or unit.conflict is None or self.is_lost:
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
        logger.info("%s: attempt %d has lost in a conflict", self.describe(), attempts.number)
        self.is_lost = True
        self._response = REPLACED

    def _obstacle(self, unit: UnitOfWork) -> str:
        """Say what has happened in this attempt that must not happen twice."""
        if self._response is not PENDING:
            return "its response has begun"
        if unit.unanswered is not None:
            return "it has committed by hand before"
        for session in self._scope.values():
            if isinstance(session, DBSession) and session.origin is not self:
                if session.unit is not None:
                    return "it has used another database too"
        return ""

    # -- what comes and goes -------------------------------------------------------------------

    async def _receive_noting(self) -> Message:
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
        elif self._response is PENDING:  # early hints come before the status line
            self._attempts = None
            await self._send(message)
        elif self._response is not REPLACED:
            if unit is not None and unit.in_use and not self._is_at_work_beside(unit):
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
        # A task that only makes the stream is cancelled at its end; `run` does it then.
        if unit.hooks is not None and self._response is COMPLETE:
            if asyncio.current_task() is self._app_task:
                await unit.run_late_hooks()

    def _is_at_work_beside(self, unit: UnitOfWork) -> bool:
        """Whether the body is made in a task of its own, which is not to be disturbed.

        FastAPI makes the events of an `EventSourceResponse` so, ahead of those that it sends.
        """
        return unit.is_used_by_another_task or (
            unit.is_work_of_another_task and unit.has_uncommitted_work
        )

    def _exception_being_handled(self) -> BaseException | None:
        """The exception of which the application is making a response, if it is.

        A stream may be sent from a task of its own, which has no exception; the application's
        task then waits in `receive` for the client to go (Starlette's `StreamingResponse`).
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
            if not has_handler(self._scope, unavailable):
                await self._refuse(unavailable)
                return
        unit = self._session.unit
        if unit is None:
            self._response = STARTED
            await self._send(message)
            return
        if unit.in_use or unit.conflict is not None:
            await self._end_before_response(unit, status, error)
        self._response = STARTED
        self._commit_error = None
        if self._site.server_timing and self._statements:
            message = self._with_server_timing(message)
        if unit.unanswered is None and self._late is None:
            await self._send(message)
            return
        if unit.unanswered is not None and unit.unanswered.was_cancelled and status >= 400:
            self._log_unanswered()
        await self._send_answer(unit, message)

    def _with_server_timing(self, message: Message) -> Message:
        """Source: https://www.w3.org/TR/server-timing/"""
        statements = f"{self._statements} statement{'s' if self._statements > 1 else ''}"
        timing = f'{self._site.key};dur={self._busy * 1000:.1f};desc="{statements}"'
        headers = [*message.get("headers", ()), (b"server-timing", timing.encode())]
        return {**message, "headers": headers}

    async def _end_before_response(
        self, unit: UnitOfWork, status: int, error: BaseException | None
    ) -> None:
        mode = unit.fixed_mode or unit.begin()
        if not mode.commits and unit.operation is not None and unit.is_used_by_another_task:
            return
        try:
            success = should_commit(mode, status, error)
            if not success:
                self._note_conflict(error)
                self._warn_of_exception(unit, status, error)
            await self._end_before_answer(unit, success=success, answer=f"the response {status}")
            if self.is_lost and unit.conflict is not None:
                raise unit.conflict
        except Exception as commit_error:
            self._note_conflict(commit_error)
            if not self.is_lost:
                self._commit_error = commit_error
            reopen_response(self._scope)
            raise

    async def _answer(self, error: Exception, enclosing_app: object) -> None:
        """Answer a failed COMMIT as any other error, and what nobody answers with 503.

        Raises:
            Exception: the error is for the framework, or the server.
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
        """Why the database was not there; None if there is a COMMIT that is not to be repeated."""
        found = unavailable_in(error)
        unit = self._session.unit
        has_committed = unit is not None and unit.unanswered is not None
        return found if isinstance(found, OutcomeUnknownError) or not has_committed else None

    def _warn_of_exception(
        self, unit: UnitOfWork, status: int, error: BaseException | None
    ) -> None:
        if error is not None and status < 400 and unit.mode.commits and unit.has_uncommitted_work:
            logger.warning(
                "%s: rolled back, though the response is %d: it was made while a %s was handled."
                " Raise a redirect, or answer after the `except` block.",
                self.describe(),
                status,
                type(error).__name__,
            )

    async def _refuse(self, error: UnavailableError) -> None:
        await self._end(success=False)
        self._response = REPLACED
        self._commit_error = None
        logger.error("%s: answered with 503: %s", self.describe(), error)
        await refuse(self._send, error)
        await self._end(success=False)  # what another task of the handler has begun meanwhile
