"""Where Starlette and FastAPI put endpoints: mounts, routers, classes; and what stands beside."""

from collections.abc import Callable
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError
from starlette.applications import Starlette
from starlette.authentication import (
    AuthCredentials,
    AuthenticationBackend,
    BaseUser,
    SimpleUser,
)
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route, Router

from asgi_db import DBSessionMiddleware, by_method, plain, read_only, transactional
from asgi_db.types import ASGIApp
from asgi_db_starlette import get_session
from tests.contract.apps import FRAMEWORKS, starlette_handlers
from tests.contract.client import call
from tests.contract.endpoints import Answer, Framework, Handlers
from tests.contract.site import BAD_STATEMENT, Item, Site, write

pytestmark = pytest.mark.parametrize(
    "framework",
    [framework for framework in FRAMEWORKS if framework.name in ("starlette", "fastapi")],
    ids=lambda framework: framework.name,
)

Endpoint = Callable[[Request], Any]


def make_app(framework: Framework, endpoint: Any, **options: Any) -> Starlette:
    """An application of the framework with this endpoint at `/`."""
    if framework.name == "starlette":
        return Starlette(routes=[Route("/", endpoint, methods=["POST"])], **options)
    app = FastAPI(openapi_url=None, **options)
    app.add_route("/", endpoint, methods=["POST"])
    return app


@transactional
async def create(request: Request) -> Response:
    """An endpoint which writes."""
    await write()(get_session(request))
    return PlainTextResponse("created", 201)


async def create_in_a_router(site: Site, framework: Framework) -> ASGIApp:
    if framework.name == "fastapi":
        app = FastAPI(openapi_url=None)
        router = APIRouter(prefix="/api")
        router.post("/items")(create)
        app.include_router(router)
        return app
    routes = [Route("/items", create, methods=["POST"])]
    return Starlette(routes=[Mount("/api", Router(routes))])


async def create_in_a_mounted_app(site: Site, framework: Framework) -> ASGIApp:
    app = make_app(framework, create)
    app.mount("/api", Starlette(routes=[Route("/items", create, methods=["POST"])]))
    return app


async def create_in_a_mount_of_a_mount(site: Site, framework: Framework) -> ASGIApp:
    inner = Starlette(routes=[Route("/items", create, methods=["POST"])])
    app = make_app(framework, create)
    app.mount("/api", Starlette(routes=[Mount("/", inner)]))
    return app


@pytest.mark.parametrize(
    "make",
    [create_in_a_router, create_in_a_mounted_app, create_in_a_mount_of_a_mount],
    ids=lambda make: make.__name__,
)
async def test_a_decorated_endpoint_commits_wherever_it_is_mounted(
    site: Site, framework: Framework, make: Any
) -> None:
    app = DBSessionMiddleware(await make(site, framework), database=site.database)
    exchange = await site.call(app, "/api/items")
    assert (exchange.status, exchange.body) == (201, b"created")
    assert await site.items() == ["a"]


class Items(HTTPEndpoint):
    """One endpoint for several HTTP methods, each with its mode."""

    async def write(self, request: Request) -> Response:
        await write()(get_session(request))
        return PlainTextResponse("written")

    @transactional
    async def post(self, request: Request) -> Response:
        return await self.write(request)

    @read_only
    async def put(self, request: Request) -> Response:
        return await self.write(request)

    async def patch(self, request: Request) -> Response:
        return await self.write(request)


@transactional
class TransactionalItems(Items):
    """The same in a class with a mode of its own."""


async def test_each_method_of_an_http_endpoint_has_its_mode(
    site: Site, framework: Framework, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(framework, create)
    app.router.routes.append(Route("/items", Items))
    app.router.routes.append(Route("/transactional", TransactionalItems))
    app.add_middleware(DBSessionMiddleware, database=site.database, mode=plain)

    assert (await site.call(app, "/items", method="PATCH")).status == 200
    assert await site.items() == []
    assert "PATCH /items" in caplog.text
    assert (await site.call(app, "/items", method="POST")).status == 200
    assert await site.items() == ["a"]
    await site.from_outside("DELETE FROM item")
    assert (await site.call(app, "/transactional", method="PATCH")).status == 200
    assert await site.items() == ["a"]


async def test_the_mode_of_a_method_wins_over_that_of_its_class(
    site: Site, framework: Framework
) -> None:
    app = make_app(framework, create)
    app.router.routes.append(Route("/transactional", TransactionalItems))
    app.add_middleware(DBSessionMiddleware, database=site.database)
    exchange = await site.call(app, "/transactional", method="PUT")
    assert (exchange.status, exchange.body) == (200, b"written")
    assert await site.items() == []


# -- a failed COMMIT is answered as what the endpoint raises ------------------------------------

HANDLED = Answer(409, b"handled inside")
HANDLED_OUTSIDE = Answer(418, b"handled outside")


@transactional
async def fail_at_once(request: Request) -> Response:
    """An endpoint which raises an error of the database."""
    session = get_session(request)
    await write()(session)
    await session.execute(BAD_STATEMENT)
    raise AssertionError


def fail_at_commit(site: Site) -> Endpoint:
    """An endpoint which goes well, all but its COMMIT."""

    @transactional
    async def fail_at_commit(request: Request) -> Response:
        session = get_session(request)
        await write()(session)
        await site.spoil_commit(session)
        return PlainTextResponse("done")

    return fail_at_commit


@pytest.mark.parametrize("inside", [None, HANDLED], ids=["", "handled inside"])
@pytest.mark.parametrize("outside", [None, HANDLED_OUTSIDE], ids=["", "handled outside"])
async def test_in_a_mounted_app_a_failed_commit_is_answered_as_a_raised_error(
    site: Site, framework: Framework, inside: Answer | None, outside: Answer | None
) -> None:
    def make(endpoint: Endpoint) -> ASGIApp:
        def handlers(answer: Answer | None) -> dict[Any, Any]:
            chosen: Handlers = {} if answer is None else {DBAPIError: answer}
            return starlette_handlers(chosen)

        mounted = make_app(framework, endpoint, exception_handlers=handlers(inside))
        app = Starlette(routes=[Mount("/", mounted)], exception_handlers=handlers(outside))
        app.add_middleware(DBSessionMiddleware, database=site.database)
        return app

    raised = await call(make(fail_at_once))
    failed = await site.call(make(fail_at_commit(site)))
    if inside is None and site.unhandled == 503:
        assert (failed.status, failed.error) == (503, None)
    else:
        assert (failed.status, failed.body) == (raised.status, raised.body)
        assert (failed.error is None) == (raised.error is None)
        assert failed.status >= 400
    assert await site.items() == []


@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
async def test_the_page_of_an_unhandled_error_is_that_of_the_application(
    site: Site, framework: Framework, debug: bool
) -> None:
    def make(endpoint: Endpoint) -> ASGIApp:
        app = make_app(framework, endpoint, debug=debug)
        app.add_middleware(DBSessionMiddleware, database=site.database)
        return app

    raised = await call(make(fail_at_once))
    failed = await site.call(make(fail_at_commit(site)))
    assert (failed.status, raised.status) == (site.unhandled, 500)
    assert (b"Traceback" in failed.body) == (debug and site.unhandled == 500)
    assert (b"Traceback" in raised.body) == debug
    assert await site.items() == []


@pytest.mark.parametrize("commits", [False, True], ids=["", "with a commit of its own"])
async def test_an_exception_handler_may_use_the_session_and_commits_only_by_hand(
    site: Site, framework: Framework, commits: bool
) -> None:
    async def audit(request: Request, error: Exception) -> Response:
        session = get_session(request)
        await write(name="audit")(session)
        await session.flush()
        if commits:
            await session.commit()
        return PlainTextResponse("audited", 200)

    app = make_app(framework, fail_at_commit(site), exception_handlers={DBAPIError: audit})
    app.add_middleware(DBSessionMiddleware, database=site.database)
    failed = await site.call(app)
    assert (failed.status, failed.body, failed.error) == (200, b"audited", None)
    assert await site.items() == (["audit"] if commits else [])


async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


@pytest.mark.parametrize("handled", [False, True], ids=["unhandled", "handled"])
@pytest.mark.parametrize(
    "between",
    [Middleware(GZipMiddleware, minimum_size=1), Middleware(BaseHTTPMiddleware, dispatch=pass_on)],
    ids=["gzip", "BaseHTTPMiddleware"],
)
@pytest.mark.parametrize("place", ["inside", "outside"])
async def test_another_middleware_beside_changes_nothing_of_a_failed_commit(
    site: Site, framework: Framework, between: Middleware, place: str, handled: bool
) -> None:
    ours = Middleware(DBSessionMiddleware, database=site.database)
    middleware = [ours, between] if place == "inside" else [between, ours]

    handlers = starlette_handlers({DBAPIError: HANDLED} if handled else {})
    endpoint = fail_at_commit(site)
    app = make_app(framework, endpoint, exception_handlers=handlers, middleware=middleware)
    failed = await site.call(app)
    assert failed.status == (409 if handled else site.unhandled)
    assert failed.complete
    assert b"done" not in failed.body
    assert await site.items() == []


# -- what reads the user before the route is known ---------------------------------------------


class Backend(AuthenticationBackend):
    """Finds the user in the database, with the session of the request."""

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser] | None:
        user = await get_session(conn).scalar(select(Item.name))
        return AuthCredentials(), SimpleUser(str(user))


async def log_in(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """The same in a function."""
    await get_session(request).scalar(select(Item.name))
    return await call_next(request)


@pytest.mark.parametrize(
    "login",
    [
        Middleware(AuthenticationMiddleware, backend=Backend()),
        Middleware(BaseHTTPMiddleware, dispatch=log_in),
    ],
    ids=["AuthenticationMiddleware", "BaseHTTPMiddleware"],
)
@pytest.mark.parametrize("flush", [False, True])
async def test_who_the_user_is_may_be_read_before_the_route_is_known(
    site: Site, login: Middleware, flush: bool
) -> None:
    @transactional
    async def endpoint(request: Request) -> Response:
        session = get_session(request)
        await write()(session)
        if flush:
            await session.flush()
        return PlainTextResponse("created", 201)

    for default in plain, by_method:
        ours = Middleware(DBSessionMiddleware, database=site.database, mode=default)
        app = make_app(site.framework, endpoint, middleware=[ours, login])
        assert (await site.call(app)).status == 201
        assert await site.items() == ["a"]
        await site.from_outside("DELETE FROM item")
