"""One call of the application, and what happens to its session."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Mapping
from typing import Any, Protocol

import anyio

from asgi_db.asgi.frameworks import (
    describe_route,
    is_framework_task,
    marks_of,
    mode_of_route,
    name_of_route,
)
from asgi_db.asgi.late_cancellation import LateCancellation
from asgi_db.database import Database
from asgi_db.errors import ConfigurationError, MissingMiddlewareError
from asgi_db.logs import logger
from asgi_db.modes import Mode, ModeDefault, as_mode
from asgi_db.types import ASGIApp, Message, Receive, Scope, Send
from asgi_db.unit.origin import Origin, UnitLife
from asgi_db.unit.session import DBSession
from asgi_db.unit.unit_of_work import UnitOfWork


def session_key(key: str) -> str:
    """Return the key under which the scope holds the session."""
    return f"asgi_db.session.{key}"


def session_of(scope: Scope, mode: Mode | None = None, *, key: str = "db") -> DBSession:
    """Return the session of this connection; the adapters are built on this function.

    Args:
        scope: the scope of the request or WebSocket.
        mode: the mode that the caller asks for, if any.
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
        session.origin.update_scope(scope)
    if mode is not None:
        session.unit_of_work.ask(as_mode(mode, "The mode of session_of()"))
    return session


class Site(Protocol):
    """The middleware as a call sees it, with the options that it was installed with."""

    app: ASGIApp
    database: Database
    mode: ModeDefault
    key: str
    session_key: str
    server_timing: bool
    session_class: type[DBSession]


class Call(Origin):
    """One call of the application, and what happens to its session.

    A call that does not use its session costs no more than this object and an empty session.
    """

    _late: LateCancellation | None = None
    _chosen_for: tuple[object, object] = None, None
    """The endpoint for which a mode was chosen last, and Litestar's handler; see `mode`."""
    _may_stream_from_another_task = False

    def __init__(self, site: Site, scope: Scope, receive: Receive, send: Send) -> None:
        session_class = site.session_class
        self._session = session = session_class(self)
        scope[site.session_key] = scope.setdefault("state", {})[site.key] = session
        self._site = site
        self._default_mode = site.mode
        self._scope = scope
        self._receive = receive
        self._send = send
        try:
            self.loop = asyncio.get_running_loop()
        except RuntimeError:
            raise ConfigurationError.without_asyncio() from None
        self._outer_exception = sys.exc_info()[1]

    async def run(self) -> None:
        """Run the application, then end the work that is still open after its last event."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the session for good; using it is an error from now on.

        This also breaks the reference cycles, so that no object waits for the garbage collector
        and the next request reuses memory that is still warm: the scope refers to the session,
        the session to this call, and the server's functions to the scope. Nothing leads from here
        to an error or a task any more, because a server may keep those, out of the collector's
        sight, together with all that their frames refer to.
        """
        self.is_over = True
        self.task = self._outer_exception = None
        if (unit := self._session.unit) is not None:
            unit.close()
        self._session = _NO_SESSION
        self._scope = marks_of(self._scope)
        self._receive = _DISCONNECTED[self._scope["type"]]
        self._send = _refuse_to_send
        if self._late is not None:
            self._late.end()

    # -- what the unit of work needs to know ---------------------------------------------------

    @property
    def session_options(self) -> Mapping[str, Any]:
        """The arguments for the constructor of SQLAlchemy's session."""
        return self._site.database.session_options

    def life(self) -> UnitLife:
        """Return the engine of the call's event loop; this works in a thread without a loop too."""
        return self._site.database.life_on(self.loop)

    def serves(self, database: Database) -> bool:
        """Return whether the call is still running and its session belongs to this database."""
        return self._site.database is database and not self.is_over

    def adopt(self, mode: ModeDefault) -> None:
        """Make the mode of a middleware that is nearer to the route the default."""
        self._default_mode = mode
        self.is_asked_anew = True

    def update_scope(self, scope: Scope) -> None:
        """Find the route in the endpoint's scope from now on, which may be a copy of the first."""
        if not self.is_over:
            self._scope = scope

    def route_mode(self) -> Mode | None:
        """Return the mode that the route sets."""
        return mode_of_route(self._scope, self._site.key)

    def default_mode(self) -> Mode:
        """Return the mode of the middleware."""
        mode = self._default_mode
        return mode if isinstance(mode, Mode) else as_mode(mode(self._scope), "What mode= returned")

    def mode(self) -> Mode:
        """Return the mode for a unit that begins now."""
        scope = self._scope
        self.is_asked_anew = False
        self._chosen_for = scope.get("endpoint"), scope.get("route_handler")
        return mode_of_route(scope, self._site.key) or self.asked or self.default_mode()

    def has_moved(self) -> bool:
        """Return whether the mode may be another one: the route has become known, for example."""
        get, (endpoint, handler) = self._scope.get, self._chosen_for
        return (
            self.is_asked_anew
            or get("endpoint") is not endpoint
            or get("route_handler") is not handler
        )

    def describe(self) -> str:
        """Name the route, for messages."""
        return describe_route(self._scope)

    def route(self) -> str:
        """Name the route, for the counters."""
        return name_of_route(self._scope)

    def takes_turns(self, task: asyncio.Task[object]) -> bool:
        """Return whether a task waits for the others; those of the framework itself do so."""
        return is_framework_task(task)

    # -- how a unit ends before an answer ------------------------------------------------------

    async def _end(self, *, success: bool) -> None:
        if (unit := self._session.unit) is not None:
            await unit.end(success=success)

    async def _end_before_answer(
        self, unit: UnitOfWork, *, success: bool, answer: str = ""
    ) -> None:
        """End the unit; if the request is cancelled during its COMMIT, still send the answer."""
        transaction = unit.transaction
        before = transaction.stage
        try:
            await unit.end(success=success, answer=answer)
        except asyncio.CancelledError as error:
            if transaction.stage is before or not transaction.has_committed_writes:
                raise
            self._late = LateCancellation(belongs_to_stream=self._may_stream_from_another_task)
            self._late.hold(error)
        else:
            if unit.unanswered is not None and self._late is None:
                # This deadline means that the task is in a cancelled scope.
                if anyio.current_effective_deadline() == -math.inf:
                    self._late = LateCancellation(
                        belongs_to_stream=self._may_stream_from_another_task
                    )

    async def _send_answer(self, unit: UnitOfWork, message: Message) -> None:
        """Send the message that tells the client about a COMMIT."""
        late = self._late
        try:
            if late is not None and late.is_pending:
                await late.send(self._send, message)
            else:
                await self._send(message)
        except BaseException:
            self._log_unanswered()
            if late is not None:
                await late.raise_now()
            raise
        unit.unanswered = None

    def _log_unanswered(self) -> None:
        unit = self._session.unit
        if unit is not None and unit.unanswered is not None:
            unit.unanswered = None
            logger.warning("%s: committed, answer not delivered", self.describe())

    def _exception_being_handled(self) -> BaseException | None:
        """The exception that the application is handling while it makes its answer, if any."""
        error = sys.exc_info()[1]
        return None if error is self._outer_exception else error


async def _http_disconnected() -> Message:
    return {"type": "http.disconnect"}


async def _websocket_disconnected() -> Message:
    return {"type": "websocket.disconnect", "code": 1006}


async def _refuse_to_send(_: Message) -> None:
    raise ConnectionError("the request is over, or the connection is closed")


_NO_SESSION = DBSession.__new__(DBSession)
"""Replaces the session of a call that has ended; it is never used."""

_DISCONNECTED = {"http": _http_disconnected, "websocket": _websocket_disconnected}
"""What `receive` returns in a task that outlives its request."""
