"""One call of the application, and what becomes of the session that goes along with it."""

from __future__ import annotations

import asyncio
import logging
import math
import sys
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_db.asgi.frameworks import describe_route, marks_of, mode_of_route, name_of_route
from asgi_db.errors import MissingMiddlewareError
from asgi_db.modes import Mode, ModeDefault
from asgi_db.types import Message, Receive, Scope, Send
from asgi_db.unit.origin import Origin
from asgi_db.unit.session import DBSession
from asgi_db.unit.unit_of_work import UnitOfWork

if TYPE_CHECKING:
    from asgi_db.asgi.middleware import DBSessionMiddleware

logger = logging.getLogger("asgi_db")


DELIVERY_TIMEOUT = 1.0
"""Seconds in which an answer may still leave, after its request was cancelled during COMMIT."""


def session_key(key: str) -> str:
    """The key of the scope under which the session stands."""
    return f"asgi_db.session.{key}"


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
