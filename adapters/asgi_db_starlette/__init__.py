"""asgi-db for Starlette.

`request.state.db` needs nothing from here; `get_session(request)` is the same, typed.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import HTTPConnection

from asgi_db import Database, DBSession, session_of
from asgi_db.types import ASGIApp, Receive, Scope, Send

__all__ = ["get_session", "lifespan"]

App = TypeVar("App", bound=Starlette)


def get_session(connection: HTTPConnection, *, key: str = "db") -> DBSession:
    """Return the session of a request or WebSocket.

    Args:
        key: the key of the middleware.

    Raises:
        MissingMiddlewareError: no middleware has placed a session.
    """
    return session_of(connection.scope, key=key)


def lifespan(
    database: Database,
    app_lifespan: Callable[[App], AbstractAsyncContextManager[Any]] | None = None,
) -> Callable[[App], AbstractAsyncContextManager[Any]]:
    """Make a lifespan that starts and disposes the database around the application's own.

    Only for an application without `DBSessionMiddleware`, which does the same; for example a
    worker that only uses `database.session()`.

        app = Starlette(lifespan=lifespan(database, my_lifespan))

    Args:
        database: the database to start and dispose.
        app_lifespan: the application's own lifespan, which may use the database.
    """

    @asynccontextmanager
    async def composed(app: App) -> AsyncGenerator[Any]:
        async with database:
            if app_lifespan is None:
                yield None
            else:
                async with app_lifespan(app) as state:
                    yield state

    return composed


async def answer_error(
    error: Exception,
    commit_error: Exception,
    enclosing_app: object,
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    """Answer a failed COMMIT with the application's own exception handlers.

    Starlette's error middleware is run again, around an application that raises the error, so that
    each handler is found and called exactly as for an error of the endpoint. The page for server
    errors is left to the enclosing application, if there is one.

    Raises:
        Exception: no handler takes the error; it is raised after the page for server errors too.
    """
    raised = _raised_by_application(error, commit_error)

    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise raised

    exception_handlers, status_handlers = scope["starlette.exception_handlers"]
    answering: ASGIApp = ExceptionMiddleware(fail, {**exception_handlers, **status_handlers})
    app = scope.get("app")
    if app is not None and app is not enclosing_app:
        handler = app.exception_handlers.get(500) or app.exception_handlers.get(Exception)
        answering = ServerErrorMiddleware(answering, handler=handler, debug=app.debug)
    await answering(scope, receive, send)


def _raised_by_application(error: Exception, commit_error: Exception) -> Exception:
    """Find what the application would have raised, had the response not begun.

    A dependency may have turned the commit error into one of its own. Starlette wraps an error that
    it refuses to handle once a response has begun, and so does Litestar, in which it may be
    mounted; `test_starlette.py` and `test_composition.py` break when their messages change.
    """
    while str(error) in _REFUSED and error.__cause__ is not None:
        error = error.__cause__  # type: ignore[assignment]
    seen: BaseException | None = error
    while seen is not None and not isinstance(error, ExceptionGroup):
        if seen is commit_error:
            return error
        seen = seen.__cause__ or seen.__context__
    return commit_error


_REFUSED = (
    "Caught handled exception, but response already started.",
    "Exception caught after response started",
)
