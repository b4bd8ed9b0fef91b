"""The middleware: from the ASGI scope to COMMIT, top to bottom.

A request's unit of work ends when its response begins, and before the status line leaves:

    await send({"type": "http.response.start", …})    the application has its answer
        COMMIT or ROLLBACK, and the connection is back in the pool
        only now the status line is sent; a failed COMMIT is raised here instead

Whatever the session does after that, in a stream or a background task, is a new unit, which ends
before the next piece of the body is sent, or with the ASGI call.
"""

from __future__ import annotations

from asgi_db.asgi.call import Call, session_key
from asgi_db.asgi.frameworks import surrounded
from asgi_db.asgi.http import Exchange
from asgi_db.asgi.lifespan import serve_lifespan
from asgi_db.asgi.positions import RoutedExchange, RoutedSocket, check_name
from asgi_db.asgi.retry import Attempts
from asgi_db.asgi.turns import Gates
from asgi_db.asgi.websocket import Socket
from asgi_db.configured import as_database
from asgi_db.database import Database
from asgi_db.errors import ConfigurationError
from asgi_db.modes import ModeDefault, as_mode_default, plain, retrying
from asgi_db.types import ASGIApp, Receive, Scope, Send
from asgi_db.unit.session import DBSession


class DBSessionMiddleware:
    """Places a session in `request.state.db` and ends its work before the response begins.

        app.add_middleware(DBSessionMiddleware, database=database)

    Works as middleware of Starlette, FastAPI or Litestar, and around any other ASGI application.
    Makes the engine when the application starts, and disposes it when the application shuts down.
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
            database: where the sessions come from. If None, the one `Database()` that the
                environment configures, which all middlewares without one share: a framework may
                build its stack of middlewares more than once.
            mode: the mode of routes that set none: a mode, or a function that chooses one by the
                scope, such as `by_method`.
            key: the name in `request.state`. A second database needs a second middleware with a
                key of its own.
            server_timing: tell the client in a `Server-Timing` header how many statements its
                request (with `retries=`, the last attempt) sent, and how long they took. Browsers
                show the header; do not send it to everyone.

        Raises:
            ConfigurationError: an argument cannot work; or no database was given, and the settings
                of the environment cannot; or the application has another database under this key.
        """
        self.app = app
        self.mode = as_mode_default(mode)
        self.key = checked_key(key)
        self.database = as_database(database)
        _refuse_another_database(app, key, self.database)
        self.server_timing = server_timing
        self.session_key = session_key(key)
        self.gates = Gates()
        self.session_class = self.database.session_class  # without a step in between
        self._calls = _CALLS
        if self.database.has_replicas:
            check_name(key)
            self._calls = {"http": RoutedExchange, "websocket": RoutedSocket}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        make_call = self._calls.get(scope["type"])
        if make_call is None:
            await self._pass_through(scope, receive, send)
            return
        placed: DBSession | None = scope.get(self.session_key)
        if (
            placed is not None
            and isinstance(placed.origin, Call)
            and placed.origin.serves(self.database)
        ):
            # The middleware is installed twice, perhaps in a mounted application; it acts once.
            if self.mode is not plain:
                placed.origin.adopt(self.mode)
            await self.app(scope, receive, send)
            return
        try:
            if retrying and issubclass(make_call, Exchange):
                await self._run_attempts(make_call, scope, receive, send)
                return
            call = make_call(self, scope, receive, send)
            try:
                await call.run()
            finally:
                call.close()
        finally:
            if placed is not None:
                # A mounted application has another database under this key.
                scope[self.session_key] = scope["state"][self.key] = placed

    async def _run_attempts(
        self, make_exchange: type[Exchange], scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Run the application until an attempt needs no retry."""
        attempts = Attempts(scope, receive, self.gates)
        try:
            while True:
                exchange = make_exchange(self, scope, attempts.receive, send)
                exchange.join(attempts)
                try:
                    await exchange.run()
                finally:
                    exchange.close()
                    exchange.leave()
                if not exchange.needs_retry:
                    return
                scope = await attempts.next(exchange.route())
                self.database.statistics.retried(exchange.route())
        finally:
            attempts.end_turn()

    async def _pass_through(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await serve_lifespan(self.app, self.database, self.key, scope, receive, send)
        else:
            await self.app(scope, receive, send)


def checked_key(key: object) -> str:
    """Return the key of a middleware.

    Raises:
        ConfigurationError: it cannot be a name in `request.state`.
    """
    if not (isinstance(key, str) and key):
        shown = repr(key) if isinstance(key, str) else f"of type {type(key).__name__}"
        raise ConfigurationError(
            f"key= is {shown}; it takes the name of the session in request.state, such as 'db'."
        )
    return key


def _refuse_another_database(app: object, key: str, database: Database) -> None:
    """Refuse two databases under one key in one application; the inner one alone would be used.

    Raises:
        ConfigurationError: a middleware inside this one has another database under this key.
    """
    for inner in surrounded(app):
        if isinstance(inner, DBSessionMiddleware) and inner.key == key:
            if inner.database is not database:
                raise ConfigurationError(
                    f"Two DBSessionMiddleware with key={key!r} have different databases: give one"
                    " of them a key of its own, such as key='analytics', or the same database."
                )


_CALLS: dict[str, type[Exchange] | type[Socket]] = {"http": Exchange, "websocket": Socket}
