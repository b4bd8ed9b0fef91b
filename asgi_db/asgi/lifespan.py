"""The engine's lifecycle inside the ASGI lifespan.

    lifespan.startup    the engine is made, then the application starts
    lifespan.shutdown   the application shuts down, then the engine is disposed, and only then
                        is "complete" sent, because the server exits as soon as it receives it

Source: https://asgi.readthedocs.io/en/latest/specs/lifespan.html
"""

from __future__ import annotations

import enum

from asgi_db.asgi.frameworks import check_routes, supports_lifespan
from asgi_db.database import Database
from asgi_db.logs import logger
from asgi_db.types import ASGIApp, Message, Receive, Scope, Send


async def serve_lifespan(
    app: ASGIApp, database: Database, key: str, scope: Scope, receive: Receive, send: Send
) -> None:
    """Start the database, run the application's lifespan, and dispose the database after it.

    Args:
        key: the name of the session in `request.state`; the application's own lifespan state must
            not use it.
    """
    startup = await receive()
    try:
        await database.start()
    except BaseException as error:
        await database.dispose()
        if isinstance(error, Exception):
            logger.error("The database could not be started: %s", error)
            await send({"type": "lifespan.startup.failed", "message": str(error)})
        raise
    try:
        await Lifespan(app, database, key, scope, receive, send).run(startup)
    finally:
        await database.dispose()


class Phase(enum.Enum):
    """How far the application has come in its lifespan."""

    STARTING = enum.auto()
    RUNNING = enum.auto()
    ENDED = enum.auto()


_ENDINGS = frozenset(
    {"lifespan.startup.failed", "lifespan.shutdown.complete", "lifespan.shutdown.failed"}
)


class Lifespan:
    """One lifespan of an application."""

    def __init__(
        self,
        app: ASGIApp,
        database: Database,
        key: str,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        self._app = app
        self._database = database
        self._key = key
        self._scope = scope
        self._receive = receive
        self._send = send
        self._phase = Phase.STARTING
        self._startup: Message | None = None

    async def run(self, startup: Message) -> None:
        """Run the application's lifespan, or answer in place of an application without one."""
        self._startup = startup
        try:
            await self._app(self._scope, self._receive_startup_again, self._send_after_dispose)
        except Exception:
            # By the specification, an application that raises before its first answer does not
            # support the lifespan and is served without it. A framework does support it, so there
            # something has failed, and what follows is for the server to decide.
            if self._phase is not Phase.STARTING or supports_lifespan(self._app, self._scope):
                raise
            logger.info("The application has no lifespan of its own", exc_info=True)
        if self._phase is Phase.STARTING:
            await self._send({"type": "lifespan.startup.complete"})
            await self._receive()
            await self._send_after_dispose({"type": "lifespan.shutdown.complete"})

    async def _receive_startup_again(self) -> Message:
        startup, self._startup = self._startup, None
        return startup if startup is not None else await self._receive()

    async def _send_after_dispose(self, message: Message) -> None:
        if message["type"] in _ENDINGS:
            self._phase = Phase.ENDED
            await self._database.dispose()
        else:
            check_routes(self._scope, self._key)
            self._phase = Phase.RUNNING
            self._check_state_key()
        await self._send(message)

    def _check_state_key(self) -> None:
        if self._key in self._scope.get("state", {}):
            logger.error(
                "The application's lifespan puts %r into the state, where the database session"
                " stands: rename it there, or choose another name with"
                " DBSessionMiddleware(key=...).",
                self._key,
            )
