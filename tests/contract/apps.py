"""One and the same application in bare ASGI, Starlette, FastAPI and Litestar.

What an endpoint does is a function of the session, written once by each test; here is only glue.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import fastapi
import litestar
import litestar.background_tasks
import litestar.exceptions
import litestar.response
import starlette.exceptions
from litestar.middleware import DefineMiddleware
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route as StarletteRoute

from asgi_db import (
    DBSession,
    DBSessionMiddleware,
    Mode,
    plain,
    read_only,
    session_of,
    transactional,
)
from asgi_db.types import ASGIApp, Receive, Scope, Send
from asgi_db_fastapi import CurrentSession, CurrentSessionReadOnly, CurrentSessionTransaction
from asgi_db_litestar import DatabasePlugin
from tests.contract.endpoints import Answer, Framework, Handlers, Route, Setup, Work
from tests.versions import NamedDependency


class Before:
    """A middleware which uses the session before the route is known, as one for logins does."""

    def __init__(self, app: ASGIApp, work: Work | None) -> None:
        self._app = app
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._work is not None and scope["type"] == "http":
            await self._work(scope["state"]["db"])
        await self._app(scope, receive, send)


# -- bare ASGI ---------------------------------------------------------------------------------


class HTTPError(Exception):
    """The bare application's own exception for a status."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer


class BareASGI:
    """An application without framework: what handles its errors is an `except` of its own."""

    name = "asgi"
    reraises = True

    def http_error(self, answer: Answer) -> Exception:
        return HTTPError(answer)

    def app(self, setup: Setup, *, around: bool = False) -> ASGIApp:
        endpoints = {
            route.path: (route, route.decorate(self._endpoint(route))) for route in setup.routes
        }

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            route, scope["endpoint"] = endpoints[scope["path"]]
            try:
                answer = await scope["endpoint"](session_of(scope, route.dependency))
                await self._respond(answer, send)
            except Exception as error:
                handled = self._handle(error, setup.handlers)
                if handled is None:
                    raise
                await self._respond(handled, send)
            else:
                if answer.background is not None:
                    await answer.background()

        inner = Before(app, setup.before)
        return DBSessionMiddleware(inner, database=setup.database, mode=setup.mode)

    def _endpoint(self, route: Route) -> Callable[[DBSession], Awaitable[Answer]]:
        async def endpoint(session: DBSession) -> Answer:
            return await route.work(session) or Answer()

        return endpoint

    def _handle(self, error: Exception, handlers: Handlers) -> Answer | None:
        if isinstance(error, HTTPError):
            return error.answer
        return next((handlers[kind] for kind in type(error).__mro__ if kind in handlers), None)

    async def _respond(self, answer: Answer, send: Send) -> None:
        headers = [(name.encode(), value.encode()) for name, value in answer.headers.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        if answer.stream is None:
            await send({"type": "http.response.body", "body": answer.body})
        else:
            async for chunk in answer.stream():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


# -- Starlette ---------------------------------------------------------------------------------


def starlette_response(answer: Answer) -> Response:
    """The answer as Starlette and FastAPI say it."""
    background = None if answer.background is None else BackgroundTask(answer.background)
    options: dict[str, Any] = {
        "status_code": answer.status,
        "headers": answer.headers,
        "background": background,
    }
    if answer.stream is None:
        return Response(answer.body, **options)
    return StreamingResponse(answer.stream(), **options)


def starlette_handlers(handlers: Handlers) -> dict[Any, Any]:
    """The exception handlers as Starlette and FastAPI take them."""

    def handler(answer: Answer) -> Any:
        async def handle(request: Request, error: Exception) -> Response:
            return starlette_response(answer)

        return handle

    return {kind: handler(answer) for kind, answer in handlers.items()}


class InStarlette:
    """An application in Starlette."""

    name = "starlette"
    reraises = True

    def http_error(self, answer: Answer) -> Exception:
        return starlette.exceptions.HTTPException(answer.status, headers=answer.headers)

    def app(self, setup: Setup, *, around: bool = False) -> ASGIApp:
        routes = [
            StarletteRoute(route.path, route.decorate(self._endpoint(route)), methods=["POST"])
            for route in setup.routes
        ]
        app = Starlette(routes=routes, exception_handlers=starlette_handlers(setup.handlers))
        return starlette_middleware(app, setup, around)

    def _endpoint(self, route: Route) -> Callable[..., Any]:
        async def endpoint(request: Request) -> Response:
            session = session_of(request.scope, route.dependency)
            return starlette_response(await route.work(session) or Answer())

        return endpoint


def starlette_middleware(app: Starlette, setup: Setup, around: bool) -> ASGIApp:
    """Install the middleware as Starlette and FastAPI do, or around the application."""
    if setup.before is not None:
        app.add_middleware(Before, work=setup.before)
    if around:
        return DBSessionMiddleware(app, database=setup.database, mode=setup.mode)
    app.add_middleware(DBSessionMiddleware, database=setup.database, mode=setup.mode)
    return app


# -- FastAPI -----------------------------------------------------------------------------------


class InFastAPI:
    """An application in FastAPI."""

    name = "fastapi"
    reraises = True

    def http_error(self, answer: Answer) -> Exception:
        return fastapi.HTTPException(answer.status, headers=answer.headers)

    def app(self, setup: Setup, *, around: bool = False) -> ASGIApp:
        handlers = starlette_handlers(setup.handlers)
        app = fastapi.FastAPI(openapi_url=None, exception_handlers=handlers)
        for route in setup.routes:
            app.post(route.path)(route.decorate(self._endpoint(route)))
        return starlette_middleware(app, setup, around)

    def _endpoint(self, route: Route) -> Callable[..., Any]:
        async def respond(session: DBSession) -> Response:
            return starlette_response(await route.work(session) or Answer())

        async def undeclared(request: Request) -> Response:
            return await respond(request.state.db)

        async def in_plain(session: CurrentSession) -> Response:
            return await respond(session)

        async def in_transaction(session: CurrentSessionTransaction) -> Response:
            return await respond(session)

        async def only_reading(session: CurrentSessionReadOnly) -> Response:
            return await respond(session)

        endpoints: dict[Mode | None, Callable[..., Any]] = {
            None: undeclared,
            plain: in_plain,
            transactional: in_transaction,
            read_only: only_reading,
        }
        return endpoints[route.dependency]


# -- Litestar ----------------------------------------------------------------------------------


LitestarRequest = litestar.Request[Any, Any, Any]


def litestar_response(answer: Answer) -> litestar.Response[Any]:
    """The answer as Litestar says it."""
    background = (
        None
        if answer.background is None
        else litestar.background_tasks.BackgroundTask(answer.background)
    )
    options: dict[str, Any] = {
        "status_code": answer.status,
        "headers": answer.headers,
        "background": background,
    }
    if answer.stream is None:
        return litestar.Response(answer.body, **options)
    return litestar.response.Stream(answer.stream(), **options)


def litestar_handlers(handlers: Handlers) -> dict[Any, Any]:
    """The exception handlers as Litestar takes them."""

    def handler(answer: Answer) -> Any:
        def handle(request: LitestarRequest, error: Exception) -> litestar.Response[Any]:
            return litestar_response(answer)

        return handle

    return {kind: handler(answer) for kind, answer in handlers.items()}


class InLitestar:
    """An application in Litestar."""

    name = "litestar"
    reraises = False

    def http_error(self, answer: Answer) -> Exception:
        return litestar.exceptions.HTTPException(status_code=answer.status, headers=answer.headers)

    def app(self, setup: Setup, *, around: bool = False) -> ASGIApp:
        plugin = DatabasePlugin(setup.database, mode=setup.mode)
        app = litestar.Litestar(
            [
                litestar.post(route.path)(route.decorate(self._endpoint(route)))
                for route in setup.routes
            ],
            plugins=[] if around else [plugin],
            middleware=[] if around else [DefineMiddleware(Before, work=setup.before)],
            exception_handlers=litestar_handlers(setup.handlers),
            openapi_config=None,
            logging_config=None,
        )
        if around:
            inner = Before(app, setup.before)
            return DBSessionMiddleware(inner, database=setup.database, mode=setup.mode)
        return app

    def _endpoint(self, route: Route) -> Callable[..., Any]:
        async def respond(session: DBSession) -> litestar.Response[Any]:
            return litestar_response(await route.work(session) or Answer())

        async def undeclared(request: LitestarRequest) -> litestar.Response[Any]:
            return await respond(request.state.db)

        async def in_plain(db_session: NamedDependency[DBSession]) -> litestar.Response[Any]:
            return await respond(db_session)

        async def in_transaction(
            db_session_transaction: NamedDependency[DBSession],
        ) -> litestar.Response[Any]:
            return await respond(db_session_transaction)

        async def only_reading(
            db_session_read_only: NamedDependency[DBSession],
        ) -> litestar.Response[Any]:
            return await respond(db_session_read_only)

        endpoints: dict[Mode | None, Callable[..., Any]] = {
            None: undeclared,
            plain: in_plain,
            transactional: in_transaction,
            read_only: only_reading,
        }
        return endpoints[route.dependency]


FRAMEWORKS: list[Framework] = [BareASGI(), InStarlette(), InFastAPI(), InLitestar()]
