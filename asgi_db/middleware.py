"""The middleware: from the ASGI scope to COMMIT, top to bottom.

A request's unit of work ends when its response begins, and before the status line leaves:

    await send({"type": "http.response.start", …})    the application has its answer
        COMMIT or ROLLBACK, and the connection is back in the pool
        the status line leaves only now; a failed COMMIT is raised here instead

What the session does after that, in a stream or a background task, is a new unit, which ends
before the next piece of the body, or with the ASGI call.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import math
import sys

import anyio
import anyio.lowlevel
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_db.database import Database
from asgi_db.errors import (
    MissingMiddlewareError,
    OutcomeUnknownError,
    UnavailableError,
    unavailable_in,
)
from asgi_db.frameworks import (
    answer_error,
    describe_route,
    has_handler,
    marks_of,
    mode_of_route,
    name_of_route,
    reopen_response,
)
from asgi_db.lifespan import serve_lifespan
from asgi_db.modes import Mode, ModeDefault, plain, retrying, should_commit
from asgi_db.origin import Origin
from asgi_db.readiness import refuse
from asgi_db.retry import Attempts
from asgi_db.session import DBSession
from asgi_db.statistics import Tally
from asgi_db.types import ASGIApp, Message, Receive, Scope, Send
from asgi_db.unit_of_work import UnitOfWork

logger = logging.getLogger("asgi_db")

DELIVERY_TIMEOUT = 1.0
"""Seconds in which an answer may still leave, after its request was cancelled during COMMIT."""


def session_key(key: str) -> str:
    """The key of the scope under which the session stands."""
    return f"asgi_db.session.{key}"


class DBSessionMiddleware:
    """Places a session in `request.state.db`, and ends its work before the response begins.

        app.add_middleware(DBSessionMiddleware, database=database)

    Works as Starlette, FastAPI or Litestar middleware and around any ASGI application. Makes
    the engine at the application's startup and disposes it at its shutdown.
    """

    def __init__(
        self,
        app: ASGIApp,
        database: Database | None = None,
        *,
        mode: ModeDefault = plain,
        key: str = "db",
        server_timing: bool = False,
    ) -> None:
        """Wrap an application.

        Args:
            app: the ASGI application.
            database: where the sessions come from; `Database()` if None.
            mode: the mode of routes that set none: a mode, or a callable of the scope such as
                `by_method`.
            key: the name in `request.state`. A second database is a second middleware with a
                key of its own.
            server_timing: tell the client in a `Server-Timing` header how many statements its
                request took (with `retries=`, its last attempt), and how long. Browsers show it;
                do not tell everybody.

        Raises:
            ConfigurationError: no database was given, and the environment's settings cannot work.
        """
        self.app = app
        self.database = database if database is not None else Database()
        self.mode = mode
        self.key = key
        self.server_timing = server_timing
        self.session_key = session_key(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        make_call = _CALLS.get(scope["type"])
        if make_call is None:
            await self._pass_through(scope, receive, send)
            return
        placed: DBSession | None = scope.get(self.session_key)
        if placed is not None and placed.origin.serves(self.database):
            # Installed twice, as in a mounted application too, it acts once.
            if self.mode is not plain and isinstance(placed.origin, Call):
                placed.origin.adopt(self.mode)
            await self.app(scope, receive, send)
            return
        if retrying and make_call is Exchange:
            await self._run_attempts(scope, receive, send)
            return
        call = make_call(self, scope, receive, send)
        try:
            await call.run()
        finally:
            call.close()

    async def _run_attempts(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application until an attempt has not lost against another transaction."""
        attempts = Attempts(scope, receive)
        while True:
            exchange = Exchange(self, scope, attempts.receive, send)
            exchange.join(attempts)
            try:
                await exchange.run()
            finally:
                exchange.close()
                exchange.leave()
            if not exchange.is_lost:
                return
            scope = await attempts.next()
            self.database.statistics.retried(exchange.route())

    async def _pass_through(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await serve_lifespan(self.app, self.database, self.key, scope, receive, send)
        else:
            await self.app(scope, receive, send)


def session_of(scope: Scope, mode: Mode | None = None, *, key: str = "db") -> DBSession:
    """Return the session of this connection; what the adapters are made of.

    Args:
        scope: the scope of the request or WebSocket.
        mode: the mode that the caller stands for, if any.
        key: the key of the middleware.

    Raises:
        MissingMiddlewareError: no middleware has placed a session.
        ModeConflictError: a statement has already run in a weaker mode.
        ConfigurationError: the mode has `retries=`, which a dependency cannot ask for.
    """
    session: DBSession | None = scope.get(session_key(key))
    if session is None:
        raise MissingMiddlewareError(key)
    if isinstance(session.origin, Call):
        session.origin.look_into(scope)
    if mode is not None:
        session.origin.unit_of_work(session).ask(mode)
    return session


class Call(Origin):
    """One call of the application, and what becomes of the session that goes along with it.

    A call that does not use its session costs this object and the session's empty shell.
    """

    _exception_at_receive: BaseException | None = None
    _receiver: asyncio.Task[object] | None = None
    _was_cancelled_in_commit = False
    _late_cancellation: asyncio.CancelledError | None = None
    """The cancellation that came during COMMIT and waits until the answer has left; an anyio
    scope raises its own at the next await."""
    _late_task: asyncio.Task[object] | None = None
    """The task that is to be cancelled then."""

    def __init__(
        self, middleware: DBSessionMiddleware, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self.database = middleware.database
        session = DBSession(self)
        scope[middleware.session_key] = scope.setdefault("state", {})[middleware.key] = session
        self._middleware = middleware
        self._default_mode = middleware.mode
        self._scope = scope
        self._receive = receive
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._outer_exception = sys.exc_info()[1]

    async def run(self) -> None:
        """Run the application, then end what its last event has left open."""
        raise NotImplementedError

    def close(self) -> None:
        super().close()
        # The scope has the session, which has this; and the server's functions have the scope.
        self._scope = marks_of(self._scope)
        self._receive = _DISCONNECTED[self._scope["type"]]
        self._send = _send_to_nobody
        self._late_task = None

    def engine(self) -> AsyncEngine:
        return self.database.engine_on(self._loop)  # also in a thread, which has no loop of its own

    def adopt(self, mode: ModeDefault) -> None:
        """Let the mode of a middleware that is nearer to the route be the default."""
        self._default_mode = mode

    def look_into(self, scope: Scope) -> None:
        """Look for the route in the scope that the endpoint has: on its way it may be copied."""
        if not self._is_over:
            self._scope = scope

    def route_mode(self) -> Mode | None:
        """Return the mode that the route sets."""
        return mode_of_route(self._scope, self._middleware.key)

    def default_mode(self) -> Mode:
        """Return the mode of the middleware."""
        mode = self._default_mode
        return mode if isinstance(mode, Mode) else mode(self._scope)

    def describe(self) -> str:
        """Name the route, for messages."""
        return describe_route(self._scope)

    def route(self) -> str:
        """Name the route, among the counters."""
        return name_of_route(self._scope)

    async def _end(self, *, success: bool) -> None:
        if self._unit is not None:
            await self._unit.end(success=success)

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

    async def _end_before_answer(
        self, unit: UnitOfWork, *, success: bool, answer: str = ""
    ) -> None:
        """End the unit; where the request is cancelled during its COMMIT, let the answer leave."""
        by_hand, unit.is_unanswered = unit.is_unanswered, False
        try:
            await unit.end(success=success, answer=answer)
        except asyncio.CancelledError as error:
            if not unit.is_unanswered:  # there was none, or it has failed
                raise
            self._be_cancelled_after_answer(error)
        finally:
            unit.is_unanswered = unit.is_unanswered or by_hand
        if unit.is_unanswered and self._late_task is None:
            self._was_cancelled_in_commit = anyio.current_effective_deadline() == -math.inf

    def _be_cancelled_after_answer(self, error: asyncio.CancelledError) -> None:
        self._was_cancelled_in_commit = True
        self._late_cancellation = error
        self._late_task = asyncio.current_task()
        self._loop.call_later(2 * DELIVERY_TIMEOUT, self._cancel_late)

    def _cancel_late(self) -> None:
        """Cancel the task again, which has sent nothing meanwhile, or leaves that to another."""
        task, self._late_task = self._late_task, None
        if task is not None:
            self._was_cancelled_in_commit = False
            self._late_cancellation = None
            task.uncancel()  # to its `asyncio.timeout` it is the same cancellation
            task.cancel()

    async def _send_answer(self, unit: UnitOfWork, message: Message) -> None:
        """Send what tells the client of a COMMIT."""
        try:
            if self._was_cancelled_in_commit:
                with anyio.fail_after(DELIVERY_TIMEOUT, shield=True):
                    await self._send(message)
            else:
                await self._send(message)
        except BaseException:
            self._log_unanswered()
            await self._be_cancelled_late()
            raise
        unit.is_unanswered = False

    def _log_unanswered(self) -> None:
        if self._unit is not None and self._unit.is_unanswered:
            self._unit.is_unanswered = False
            logger.warning("%s: committed, answer not delivered", self.describe())

    async def _be_cancelled_late(self) -> None:
        """Raise the cancellation that had to wait."""
        if not self._was_cancelled_in_commit:
            return
        if self._late_task not in (None, asyncio.current_task()):
            if self.task is None:  # the one that is to be cancelled only waits for this stream
                self._loop.call_soon(self._cancel_late)
            return
        self._was_cancelled_in_commit, self._late_task = False, None
        cancelled, self._late_cancellation = self._late_cancellation, None
        if cancelled is not None:
            raise cancelled from None
        await anyio.lowlevel.checkpoint()


async def _http_disconnected() -> Message:
    return {"type": "http.disconnect"}


async def _websocket_disconnected() -> Message:
    return {"type": "websocket.disconnect", "code": 1006}


async def _send_to_nobody(_: Message) -> None:
    raise ConnectionError("the request is over, or the connection is closed")


_DISCONNECTED = {"http": _http_disconnected, "websocket": _websocket_disconnected}
"""What a task is told that outlives its request and still asks."""


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
    _attempts: Attempts | None = None
    _app_task: asyncio.Task[object] | None = None
    _response = PENDING
    _commit_error: Exception | None = None
    """Why the response that the application began was refused, until it begins another."""
    _statements = 0
    _busy = 0.0

    def unit_ended(self, tally: Tally) -> None:
        """Add up what happens before the status line."""
        self._statements += tally.statements
        self._busy += tally.busy

    async def run(self) -> None:
        """Run the application, then end what its last event has left open."""
        enclosing_app = self._scope.get("app")
        app = self._middleware.app
        self._app_task = asyncio.current_task()
        try:
            await app(self._scope, self._receive_noting, self._send_after_commit)
        except BaseException as error:
            self._lose_if_it_has_lost(error)
            await self._end(success=False)
            if not isinstance(error, Exception):
                self._log_unanswered()
                raise
            if not self.is_lost:
                await self._answer(error, enclosing_app)
        else:
            if self._unit is not None:
                await self._finish(self._unit, enclosing_app)
        finally:
            if self._unit is not None:
                await self._unit.run_late_hooks()

    async def _finish(self, unit: UnitOfWork, enclosing_app: object) -> None:
        # A stream whose client has gone may just end: what it left half done is not kept.
        is_complete = self._response is COMPLETE
        await unit.end(success=is_complete and not unit.was_cut_off)
        if self.is_lost:
            return
        if self._commit_error is not None:
            await self._answer(self._commit_error, enclosing_app)
        await self._be_cancelled_late()

    # -- another attempt -----------------------------------------------------------------------

    def join(self, attempts: Attempts) -> None:
        """Be one of several attempts, should this one lose."""
        self.attempt = attempts.number
        self.ends_at = attempts.ends_at
        self._attempts = attempts
        attempts.keep_body_if(lambda: (self.route_mode() or self.default_mode()).retries > 0)

    def leave(self) -> None:
        """Be one of several attempts no more: they know this, and nothing is to go in circles."""
        self._attempts = None

    def _lose_if_it_has_lost(self, error: BaseException | None) -> None:
        """Give the attempt up if the database has preferred another transaction to it."""
        unit, attempts = self._unit, self._attempts
        if unit is None or attempts is None or unit.conflict is None or self.is_lost:
            return
        if not unit.mode.retries or not isinstance(error, Exception | None):
            return
        attempts.ends_at = unit.ends_at or attempts.ends_at
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
        if unit.is_unanswered:
            return "it has committed by hand before"
        for session in self._scope.values():
            if isinstance(session, DBSession) and session.origin is not self:
                if session.origin.was_used:
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
        unit = self._unit
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
            await (self._send(message) if unit is None else self._send_piece(unit, message))

    async def _send_piece(self, unit: UnitOfWork, message: Message) -> None:
        await self._send_answer(unit, message)
        await self._be_cancelled_late()
        # A task that only makes the stream is cancelled at its end; `run` does it then.
        if self._response is COMPLETE and asyncio.current_task() is self._app_task:
            await unit.run_late_hooks()

    def _is_at_work_beside(self, unit: UnitOfWork) -> bool:
        """Whether the body is made in a task of its own, which is not to be disturbed.

        FastAPI makes the events of an `EventSourceResponse` so, ahead of those that it sends.
        """
        return unit.is_used_by_another_task or (
            unit.is_work_of_another_task and unit.has_uncommitted_work
        )

    async def _begin_response(self, message: Message) -> None:
        if self._response is REPLACED:
            return
        status = message["status"]
        error = self._exception_being_handled()
        if status == 500 and (unavailable := self._unavailable(error)) is not None:
            if not has_handler(self._scope, unavailable):
                await self._refuse(unavailable)
                return
        if self._unit is None:
            self._response = STARTED
            await self._send(message)
            return
        await self._end_before_response(self._unit, status, error)
        self._response = STARTED
        self._commit_error = None
        if self._middleware.server_timing and self._statements:
            message = self._with_server_timing(message)
        if self._unit.commit_outlived_request and status >= 400:
            self._log_unanswered()
        await self._send_answer(self._unit, message)

    def _with_server_timing(self, message: Message) -> Message:
        """Source: https://www.w3.org/TR/server-timing/"""
        statements = f"{self._statements} statement{'s' if self._statements > 1 else ''}"
        timing = f'{self._middleware.key};dur={self._busy * 1000:.1f};desc="{statements}"'
        headers = [*message.get("headers", ()), (b"server-timing", timing.encode())]
        return {**message, "headers": headers}

    async def _end_before_response(
        self, unit: UnitOfWork, status: int, error: BaseException | None
    ) -> None:
        if not unit.in_use and unit.conflict is None:  # to find out its mode would be too much
            return
        if unit.is_used_by_another_task and not unit.mode.commits:
            return
        try:
            success = should_commit(unit.mode, status, error)
            if not success:
                self._lose_if_it_has_lost(error)
                self._warn_of_exception(unit, status, error)
            await self._end_before_answer(unit, success=success, answer=f"the response {status}")
            if self.is_lost and unit.conflict is not None:
                raise unit.conflict
        except Exception as commit_error:
            self._lose_if_it_has_lost(commit_error)
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
        has_committed = self._unit is not None and self._unit.is_unanswered
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


class Socket(Call):
    """One WebSocket: a unit ends before each event, so that waiting holds nothing."""

    async def run(self) -> None:
        """Run the application, then end what its last event has left open."""
        app = self._middleware.app
        self.task = asyncio.current_task()
        try:
            await app(self._scope, self._receive_between_units, self._send_after_commit)
        except BaseException as error:
            await self._end(success=False)
            if not isinstance(error, Exception):
                self._log_unanswered()
            raise
        else:
            await self._end(success=self._unit is None or not self._unit.was_cut_off)
        finally:
            if self._unit is not None:
                await self._unit.run_late_hooks()

    async def _receive_between_units(self) -> Message:
        unit = self._unit
        if unit is not None and not unit.is_work_of_another_task:
            await unit.end(success=self._exception_being_handled() is None)
            unit.is_unanswered = False  # the application has chosen to say nothing
        return await self._receive()

    async def _send_after_commit(self, message: Message) -> None:
        unit = self._unit
        if unit is None:
            await self._send(message)
        elif unit.is_work_of_another_task:  # this is not the answer to it: a broadcast, say
            await unit.wait_for_end()
            await self._send(message)
        else:
            error = self._exception_being_handled()
            success = error is None
            if message["type"] == "websocket.http.response.start" and unit.in_use:
                success = should_commit(unit.mode, message["status"], error)
            await self._end_before_answer(unit, success=success)
            await self._send_answer(unit, message)
            await self._be_cancelled_late()
            await unit.run_late_hooks()


_CALLS: dict[str, type[Call]] = {"http": Exchange, "websocket": Socket}
