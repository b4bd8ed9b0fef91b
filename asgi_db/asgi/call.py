"""One call of the application, and what becomes of the session that goes along with it."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Mapping
from typing import Any, Protocol, cast

import anyio

from asgi_db.asgi.frameworks import describe_route, marks_of, mode_of_route, name_of_route
from asgi_db.asgi.late_cancellation import LateCancellation
from asgi_db.database import Database
from asgi_db.errors import MissingMiddlewareError
from asgi_db.logs import logger
from asgi_db.modes import Mode, ModeDefault
from asgi_db.pool.life import EngineLife
from asgi_db.types import ASGIApp, Message, Receive, Scope, Send
from asgi_db.unit.origin import Origin
from asgi_db.unit.session import DBSession
from asgi_db.unit.unit_of_work import UnitOfWork


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
        session.origin.update_scope(scope)
    if mode is not None:
        session.unit_of_work.ask(mode)
    return session


class Site(Protocol):
    """Where a call happens: the middleware, with what it was installed with."""

    app: ASGIApp
    database: Database
    mode: ModeDefault
    key: str
    session_key: str
    server_timing: bool


class Call(Origin):
    """One call of the application, and what becomes of the session that goes along with it.

    A call that does not use its session costs this object and the session's empty shell.
    """

    _late: LateCancellation | None = None
    _may_stream_from_another_task = False

    def __init__(self, site: Site, scope: Scope, receive: Receive, send: Send) -> None:
        self._session = session = DBSession(self)
        scope[site.session_key] = scope.setdefault("state", {})[site.key] = session
        self._site = site
        self._default_mode = site.mode
        self._scope = scope
        self._receive = receive
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._outer_exception = sys.exc_info()[1]

    async def run(self) -> None:
        """Run the application, then end what its last event has left open."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the session for good: its use is an error from now on.

        What refers to each other comes apart here, so that nothing waits for the garbage
        collector, and the memory serves the next request while it is warm: the scope has the
        session, which has this; and the server's functions have the scope.
        """
        self.is_over = True
        if (unit := self._session.unit) is not None:
            unit.close()
        self._session = _NO_SESSION
        self._scope = marks_of(self._scope)
        self._receive = _DISCONNECTED[self._scope["type"]]
        self._send = _send_to_nobody
        if self._late is not None:
            self._late.end()

    # -- what the unit of work asks ------------------------------------------------------------

    @property
    def session_options(self) -> Mapping[str, Any]:
        """The arguments with which SQLAlchemy's session is made."""
        return self._site.database.session_options

    def life(self) -> EngineLife:
        """Return the engine of the call's event loop; a thread, which has no loop, may ask too."""
        return self._site.database.life_on(self._loop)

    def serves(self, database: Database) -> bool:
        """Whether the call still runs, and its session is one of this database."""
        return self._site.database is database and not self.is_over

    def adopt(self, mode: ModeDefault) -> None:
        """Let the mode of a middleware that is nearer to the route be the default."""
        self._default_mode = mode

    def update_scope(self, scope: Scope) -> None:
        """Look for the route in the endpoint's scope, which may be a copy of the first one."""
        if not self.is_over:
            self._scope = scope

    def route_mode(self) -> Mode | None:
        """Return the mode that the route sets."""
        return mode_of_route(self._scope, self._site.key)

    def default_mode(self) -> Mode:
        """Return the mode of the middleware."""
        mode = self._default_mode
        return mode if isinstance(mode, Mode) else mode(self._scope)

    def mode(self) -> Mode:
        """Return the mode for a unit that begins now."""
        of_route = mode_of_route(self._scope, self._site.key)
        return of_route or self.asked or self.default_mode()

    def describe(self) -> str:
        """Name the route, for messages."""
        return describe_route(self._scope)

    def route(self) -> str:
        """Name the route, among the counters."""
        return name_of_route(self._scope)

    # -- how a unit ends before an answer ------------------------------------------------------

    async def _end(self, *, success: bool) -> None:
        if (unit := self._session.unit) is not None:
            await unit.end(success=success)

    async def _end_before_answer(
        self, unit: UnitOfWork, *, success: bool, answer: str = ""
    ) -> None:
        """End the unit; where the request is cancelled during its COMMIT, let the answer leave."""
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
                if anyio.current_effective_deadline() == -math.inf:  # in a cancelled scope
                    self._late = LateCancellation(
                        belongs_to_stream=self._may_stream_from_another_task
                    )

    async def _send_answer(self, unit: UnitOfWork, message: Message) -> None:
        """Send what tells the client of a COMMIT."""
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
        """The exception of which the application is making an answer, if it is."""
        error = sys.exc_info()[1]
        return None if error is self._outer_exception else error


async def _http_disconnected() -> Message:
    return {"type": "http.disconnect"}


async def _websocket_disconnected() -> Message:
    return {"type": "websocket.disconnect", "code": 1006}


async def _send_to_nobody(_: Message) -> None:
    raise ConnectionError("the request is over, or the connection is closed")


_NO_SESSION = DBSession(cast(Any, None))
"""What a call has when it has ended; it is never used."""

_DISCONNECTED = {"http": _http_disconnected, "websocket": _websocket_disconnected}
"""What a task that outlives its request receives."""
