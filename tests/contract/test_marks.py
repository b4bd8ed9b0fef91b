"""A mark that cannot be seen at the route is an error, and never a silent rollback."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import pytest
from fastapi import APIRouter, Depends, FastAPI
from fastapi.routing import APIRoute
from litestar import Litestar, post
from litestar import Request as LitestarRequest
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint, WebSocketEndpoint
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from asgi_db import ConfigurationError, Database, DBSessionMiddleware, read_only, transactional
from asgi_db.types import ASGIApp, Message, Receive, Scope, Send
from asgi_db_litestar import DatabasePlugin
from tests.contract.client import call
from tests.sockets import websocket
from tests.tables import Author, Base, authors


@pytest.fixture
async def database(sqlite_url: str) -> Any:
    async with Database(sqlite_url) as database:
        await database.drop_tables(Base.metadata)
        await database.create_tables(Base.metadata)
        yield database


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def hiding(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that copies nothing."""

    async def wrapper(connection: HTTPConnection) -> Any:
        return await function(connection)

    return wrapper


def hiding_in_an_attribute(function: Callable[..., Any]) -> Callable[..., Any]:
    async def wrapper(connection: HTTPConnection) -> Any:
        return await cast(Any, wrapper).original(connection)

    cast(Any, wrapper).original = function
    return wrapper


class Hiding:
    """A decorator that is a class."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    async def __call__(self, connection: HTTPConnection) -> Any:
        return await self.function(connection)


async def _call_in_container(function: Callable[..., Any], connection: HTTPConnection) -> Any:
    return await function(connection)


def hiding_in_a_partial(function: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(_call_in_container, function)


def hiding_twice(function: Callable[..., Any]) -> Callable[..., Any]:
    return hiding(hiding_in_an_attribute(function))


HIDING: list[Decorator] = [
    hiding,
    hiding_in_an_attribute,
    Hiding,
    hiding_in_a_partial,
    hiding_twice,
]


def copying(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def wrapper(connection: HTTPConnection) -> Any:
        return await function(connection)

    return wrapper


def leaving_wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    wrapper = hiding(function)
    cast(Any, wrapper).__wrapped__ = function
    return wrapper


def as_dishka(function: Callable[..., Any]) -> Callable[..., Any]:
    """What `dishka.integrations.base.wrap_injection` leaves."""
    wrapper = hiding(function)
    cast(Any, wrapper).__dishka_orig_func__ = function
    return wrapper


FOLLOWED: list[Decorator] = [copying, leaving_wrapped, as_dishka]

each_hiding = pytest.mark.parametrize("hide", HIDING, ids=lambda hide: hide.__name__)
each_followed = pytest.mark.parametrize("wrap", FOLLOWED, ids=lambda wrap: wrap.__name__)


@transactional
async def create(connection: HTTPConnection) -> Response:
    connection.state.db.add(Author(name="ada"))
    return PlainTextResponse("created", 201)


def starlette_app(endpoint: Any, database: Database) -> Starlette:
    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    app.add_middleware(DBSessionMiddleware, database=database)
    return app


def mounted_app(endpoint: Any, database: Database) -> Starlette:
    inner = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    app = Starlette(routes=[Mount("/", app=inner)])
    app.add_middleware(DBSessionMiddleware, database=database)
    return app


def fastapi_app(endpoint: Any, database: Database) -> FastAPI:
    app = FastAPI(openapi_url=None)
    app.post("/", response_model=None)(endpoint)
    app.add_middleware(DBSessionMiddleware, database=database)
    return app


def included_app(endpoint: Any, database: Database) -> FastAPI:
    inner, outer = APIRouter(), APIRouter()
    inner.post("/", response_model=None)(endpoint)
    outer.include_router(inner)
    app = FastAPI(openapi_url=None)
    app.include_router(outer)
    app.add_middleware(DBSessionMiddleware, database=database)
    return app


def app_around(endpoint: Any, database: Database) -> ASGIApp:
    app = FastAPI(openapi_url=None)
    app.post("/", response_model=None)(endpoint)
    return DBSessionMiddleware(app, database)


APPS = [starlette_app, mounted_app, fastapi_app, included_app, app_around]

each_app = pytest.mark.parametrize("make", APPS, ids=lambda make: make.__name__)

ADVICE = "Put @transactional above that decorator, directly below the route"


async def started(app: ASGIApp) -> list[Message]:
    """What an application answers to the server when it is started, and then stopped."""
    answers: list[Message] = []
    requests: list[Message] = [{"type": "lifespan.shutdown"}, {"type": "lifespan.startup"}]

    async def receive() -> Message:
        return requests.pop()

    async def send(message: Message) -> None:
        answers.append(message)

    try:
        await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)
    except Exception as error:
        answers.append({"type": "raised", "message": str(error)})
    return answers


# -- what is followed --------------------------------------------------------------------------


@each_app
@each_followed
async def test_a_mark_is_seen_below_a_decorator_that_leaves_what_it_wraps(
    database: Database, sqlite_url: str, make: Any, wrap: Decorator
) -> None:
    app = make(wrap(create), database)
    assert (await call(app)).status == 201
    assert await authors(sqlite_url) == ["ada"]
    types = [message["type"] for message in await started(app)]
    assert types == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_a_mark_is_seen_below_a_route_class_that_wraps_the_endpoint(
    database: Database, sqlite_url: str
) -> None:
    class Injecting(APIRoute):
        def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
            super().__init__(path, as_dishka(endpoint), **options)

    router = APIRouter(route_class=Injecting)
    router.post("/", response_model=None)(create)
    app = FastAPI(openapi_url=None)
    app.include_router(router)
    app.add_middleware(DBSessionMiddleware, database=database)
    assert (await call(app)).status == 201
    assert await authors(sqlite_url) == ["ada"]


def as_cbv(view: type[Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """What the `@cbv(router)` of fastapi-utils does with each method of a class."""
    first, *others = inspect.signature(method).parameters.values()
    others = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in others]
    signature = inspect.Signature([first.replace(default=Depends(view)), *others])
    cast(Any, method).__signature__ = signature
    return method


@pytest.mark.parametrize("marked", ["before", "after", "below"])
async def test_a_mark_on_the_class_of_a_class_based_view_counts_for_its_methods(
    database: Database, sqlite_url: str, marked: str
) -> None:
    class Orders:
        async def create(self, connection: HTTPConnection) -> Response:
            return await create(connection)

    class Inherited(Orders):
        pass

    view = Inherited if marked == "below" else Orders
    if marked != "after":
        transactional(view)
    app = fastapi_app(as_cbv(view, Orders.create), database)
    if marked == "after":
        transactional(view)
    assert (await call(app)).status == 201
    assert await authors(sqlite_url) == ["ada"]


async def test_a_mark_on_a_class_counts_for_the_functions_of_a_view_that_does_not_name_it(
    database: Database, sqlite_url: str
) -> None:
    @transactional
    class Orders:
        @staticmethod
        async def create(connection: Request) -> Response:
            return await create(connection)

    assert (await call(starlette_app(Orders.create, database))).status == 201
    assert await authors(sqlite_url) == ["ada"]


async def test_the_mark_of_a_method_is_stronger_than_that_of_its_class(
    database: Database, sqlite_url: str
) -> None:
    @read_only
    class Orders:
        @transactional
        async def create(self, connection: HTTPConnection) -> Response:
            return await create(connection)

    async def endpoint(connection: Request) -> Response:
        return await Orders().create(connection)

    functools.update_wrapper(endpoint, Orders.create)
    assert (await call(starlette_app(endpoint, database))).status == 201
    assert await authors(sqlite_url) == ["ada"]


async def test_the_mark_of_a_method_of_an_endpoint_is_seen_below_a_decorator(
    database: Database, sqlite_url: str
) -> None:
    class Orders(HTTPEndpoint):
        @transactional
        async def original(self, request: Request) -> Response:
            return await create(request)

        async def post(self, request: Request) -> Response:
            return await self.original(request)

        cast(Any, post).__wrapped__ = original

    assert (await call(starlette_app(Orders, database))).status == 201
    assert await authors(sqlite_url) == ["ada"]


# -- what is an error --------------------------------------------------------------------------


@each_app
@each_hiding
async def test_a_hidden_mark_is_an_error_at_the_startup_that_says_where_to_put_it(
    database: Database, make: Any, hide: Decorator
) -> None:
    answers = await started(make(hide(create), database))
    assert answers[0]["type"] == "lifespan.startup.failed"
    message = str(answers[-1]["message"])
    assert message.startswith("@transactional stands on create, and another decorator hides it")
    assert ADVICE in message


@each_app
@each_hiding
async def test_a_hidden_mark_is_an_error_at_the_first_request_where_there_is_no_startup(
    database: Database, sqlite_url: str, make: Any, hide: Decorator
) -> None:
    if hide is Hiding and make in (starlette_app, mounted_app):
        pytest.skip("Starlette takes a callable object for an ASGI application")
    exchange = await call(make(hide(create), database))
    assert exchange.status == 500
    assert exchange.was_caused_by(ConfigurationError)
    assert await authors(sqlite_url) == []


@each_hiding
async def test_a_route_with_a_mark_of_its_own_may_hide_another(
    database: Database, sqlite_url: str, hide: Decorator
) -> None:
    async def outermost(connection: Request) -> Response:
        response: Response = await hide(create)(connection)
        return response

    assert (await call(starlette_app(transactional(outermost), database))).status == 201
    assert await authors(sqlite_url) == ["ada"]


async def test_a_route_may_name_another_that_is_defined_beside_it(database: Database) -> None:
    @transactional
    async def order(request: Request) -> Response:
        return await create(request)

    async def where(request: Request) -> Response:
        await request.state.db.connection()
        return PlainTextResponse(order.__name__)

    app = starlette_app(where, database)
    assert (await call(app)).body == b"order"
    assert (await started(app))[0]["type"] == "lifespan.startup.complete"


@pytest.mark.parametrize("name", ["on_connect", "on_receive", "on_disconnect"])
async def test_a_mark_on_a_method_of_a_socket_is_an_error_that_names_the_class(
    database: Database, name: str
) -> None:
    class Chat(WebSocketEndpoint):
        encoding = "text"

        async def on_receive(self, websocket: WebSocket, data: Any) -> None:
            websocket.state.db.add(Author(name=data))

    async def marked(self: Any, *args: Any) -> None:
        raise AssertionError("is never called")

    setattr(Chat, name, transactional(marked))
    app = Starlette(routes=[WebSocketRoute("/", Chat)])
    app.add_middleware(DBSessionMiddleware, database=database)
    answers = await started(app)
    assert answers[0]["type"] == "lifespan.startup.failed"
    assert "put @transactional on the class" in str(answers[-1]["message"])


async def test_a_mark_on_the_class_of_a_socket_counts(database: Database, sqlite_url: str) -> None:
    @transactional
    class Chat(WebSocketEndpoint):
        encoding = "text"

        async def on_receive(self, websocket: WebSocket, data: Any) -> None:
            websocket.state.db.add(Author(name=data))
            await websocket.send_text("stored")

    app = Starlette(routes=[WebSocketRoute("/", Chat)])
    app.add_middleware(DBSessionMiddleware, database=database)
    async with websocket(app) as client:
        client.tell("ada")
        answer = await client.receive()
        assert answer is not None and answer["text"] == "stored"
        assert await authors(sqlite_url) == ["ada"]


@pytest.mark.parametrize("make", [fastapi_app, included_app, app_around])
@pytest.mark.parametrize("depth", [1, 2])
async def test_a_mark_on_a_dependency_is_an_error_at_the_startup_that_names_the_route(
    database: Database, make: Any, depth: int
) -> None:
    @transactional
    async def log_in(connection: HTTPConnection) -> None:
        raise AssertionError("is never called")

    user = Depends(log_in)

    async def check(user: Any = user) -> None:
        raise AssertionError("is never called")

    checked = user if depth == 1 else Depends(check)

    async def order(user: Any = checked) -> str:
        raise AssertionError("is never called")

    @read_only
    async def read_orders(user: Any = checked) -> str:
        raise AssertionError("is never called")

    answers = await started(make(order, database))
    assert answers[0]["type"] == "lifespan.startup.failed"
    message = str(answers[-1]["message"])
    assert "log_in, which is a dependency" in message
    assert "put @transactional on test_a_mark_on_a_dependency" in message
    answers = await started(make(read_orders, database))
    assert answers[0]["type"] == "lifespan.startup.complete"


# -- Litestar ----------------------------------------------------------------------------------

AnyRequest = LitestarRequest[Any, Any, Any]


@transactional
async def create_in_litestar(request: AnyRequest) -> str:
    request.state.db.add(Author(name="ada"))
    return "created"


def in_litestar(function: Callable[..., Any]) -> Callable[..., Any]:
    async def wrapper(request: AnyRequest) -> str:
        return str(await function(request))

    return wrapper


def litestar_app(database: Database, *handlers: Any) -> Litestar:
    return Litestar(
        list(handlers),
        plugins=[DatabasePlugin(database)],
        openapi_config=None,
        logging_config=None,
    )


async def test_a_mark_that_is_hidden_in_litestar_is_an_error(
    database: Database, sqlite_url: str
) -> None:
    app = litestar_app(database, post("/")(in_litestar(create_in_litestar)))
    assert (await call(app)).status == 500
    assert await authors(sqlite_url) == []
    answers = await started(app)
    assert answers[0]["type"] == "lifespan.startup.failed"
    assert "@transactional stands on create_in_litestar" in str(answers[0]["message"])


async def test_a_mark_is_seen_in_litestar_below_a_decorator_that_leaves_what_it_wraps(
    database: Database, sqlite_url: str
) -> None:
    wrapper = in_litestar(create_in_litestar)
    cast(Any, wrapper).__dishka_orig_func__ = create_in_litestar

    app = litestar_app(database, post("/")(wrapper))
    assert (await call(app)).status == 201
    assert await authors(sqlite_url) == ["ada"]
    assert (await started(app))[0]["type"] == "lifespan.startup.complete"


async def scope_only(scope: Scope, receive: Receive, send: Send) -> None:
    raise NotImplementedError


async def test_an_application_without_routes_starts(database: Database) -> None:
    answers = await started(DBSessionMiddleware(scope_only, database))
    assert answers[0]["type"] == "lifespan.startup.complete"
