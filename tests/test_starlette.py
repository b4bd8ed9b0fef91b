"""What is special to Starlette; what holds for every framework is in `tests/contract`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.pool import QueuePool
from starlette.applications import Starlette
from starlette.endpoints import WebSocketEndpoint
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket

from asgi_db import (
    Database,
    DBSession,
    DBSessionMiddleware,
    MissingMiddlewareError,
    transactional,
)
from asgi_db.types import ASGIApp, Receive, Scope, Send
from asgi_db_starlette import get_session, lifespan
from tests.contract.client import call
from tests.pools import checked_out, one_connection
from tests.sockets import websocket
from tests.tables import Author, Base, Child, authors

Endpoint = Callable[[Request], Awaitable[Response]]


@pytest.fixture
async def database(sqlite_url: str) -> AsyncIterator[Database]:
    async with one_connection(sqlite_url) as database:
        yield database


def app_with(
    database: Database,
    *routes: BaseRoute,
    below: Sequence[Middleware] = (),
    above: Sequence[Middleware] = (),
    handlers: Mapping[Any, Any] | None = None,
    debug: bool = False,
) -> Starlette:
    """An application with our middleware between those `above` and `below` it."""
    ours = Middleware(DBSessionMiddleware, database=database)
    return Starlette(
        routes=routes,
        middleware=[*above, ours, *below],
        exception_handlers=handlers,
        debug=debug,
    )


@transactional
async def create(request: Request) -> Response:
    get_session(request).add(Author(name="ada"))
    return PlainTextResponse("created", 201)


@transactional
async def fail_to_commit(request: Request) -> Response:
    get_session(request).add(Child(id=1, parent_id=77))
    return PlainTextResponse("never", 201)


async def conflict(request: Request, error: Exception) -> Response:
    return PlainTextResponse(f"conflict: {type(error).__name__}", 409)


def create_and(fail: Exception) -> Endpoint:
    @transactional
    async def endpoint(request: Request) -> Response:
        get_session(request).add(Author(name="ada"))
        await get_session(request).flush()
        raise fail

    return endpoint


# -- the session -------------------------------------------------------------------------------


async def test_get_session_is_the_session_of_the_state(database: Database) -> None:
    async def endpoint(request: Request) -> Response:
        session: DBSession = get_session(request)
        return JSONResponse(
            [session is request.state.db, session is get_session(request, key="db")]
        )

    async def socket_endpoint(socket: WebSocket) -> None:
        await socket.accept()
        await socket.receive_text()
        await socket.send_text(str(get_session(socket) is socket.state.db))

    app = app_with(database, Route("/", endpoint), WebSocketRoute("/socket", socket_endpoint))
    assert (await call(app, method="GET")).body == b"[true,true]"
    async with websocket(app, "/socket") as socket:
        assert await socket.ask("") == "True"


@pytest.mark.parametrize("key", ["db", "analytics"])
async def test_without_its_middleware_get_session_says_what_to_install(
    database: Database, key: str
) -> None:
    async def endpoint(request: Request) -> Response:
        get_session(request, key=key)
        return PlainTextResponse("never")

    app = Starlette(routes=[Route("/", endpoint)])
    if key == "analytics":
        app.add_middleware(DBSessionMiddleware, database=database)
    answer = await call(app, method="GET")
    assert answer.status == 500
    assert isinstance(answer.error, MissingMiddlewareError)
    assert f"app.add_middleware(DBSessionMiddleware, key='{key}')" in str(answer.error)


async def test_a_mounted_application_has_the_session_of_the_outer_one(database: Database) -> None:
    inner = Starlette(routes=[Mount("/deeper", routes=[Route("/", create, methods=["POST"])])])
    app = app_with(database, Mount("/inner", inner))
    assert (await call(app, "/inner/deeper/")).status == 201
    assert await authors(str(database.url)) == ["ada"]


# -- the lifespan ------------------------------------------------------------------------------


async def test_the_lifespan_starts_the_database_before_and_disposes_it_after_the_apps_own(
    sqlite_url: str,
) -> None:
    database = Database(sqlite_url)
    log: list[str] = []

    @asynccontextmanager
    async def own(app: Starlette) -> AsyncGenerator[dict[str, int], None]:
        await database.create_tables(Base.metadata)
        log.append("startup")
        yield {"number": 7}
        async with database.transaction() as session:
            session.add(Author(name="written at shutdown"))
        log.append(f"shutdown, on {opened()} connection")

    def opened() -> int:
        pool = database.engine.pool
        assert isinstance(pool, QueuePool)
        return pool.checkedin()

    app = Starlette(lifespan=lifespan(database, own))
    async with app.router.lifespan_context(app) as state:
        assert state == {"number": 7}
        engine = database.engine
    assert log == ["startup", "shutdown, on 1 connection"]
    assert await authors(sqlite_url) == ["written at shutdown"]
    assert database.engine is not engine  # that one was disposed
    await database.dispose()


async def test_the_lifespan_needs_none_of_the_apps_own(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    app = Starlette(lifespan=lifespan(database))
    async with app.router.lifespan_context(app) as state:
        assert state is None
        await database.ping()
        engine = database.engine
    assert database.engine is not engine
    await database.dispose()


async def test_the_lifespan_disposes_the_database_when_the_apps_own_fails(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    engines: list[Any] = []

    @asynccontextmanager
    async def own(app: Starlette) -> AsyncGenerator[None, None]:
        await database.ping()
        engines.append(database.engine)
        raise KeyError("startup")
        yield

    app = Starlette(lifespan=lifespan(database, own))
    with pytest.raises(KeyError, match="startup"):
        async with app.router.lifespan_context(app):
            raise AssertionError("it has started")
    assert database.engine is not engines[0]
    await database.dispose()


def test_the_same_application_starts_again_on_another_loop(sqlite_url: str) -> None:
    async def read(request: Request) -> Response:
        names = await get_session(request).scalars(select(Author.name))
        return JSONResponse(names.all())

    @asynccontextmanager
    async def own(app: Starlette) -> AsyncGenerator[None, None]:
        await shop.create_tables(Base.metadata)
        yield

    shop = Database(sqlite_url)
    routes = [Route("/", create, methods=["POST"]), Route("/", read)]
    app = Starlette(routes=routes, lifespan=own)
    app.add_middleware(DBSessionMiddleware, database=shop)
    with TestClient(app) as client:
        assert client.post("/").status_code == 201
    with TestClient(app) as client:
        assert client.get("/").json() == ["ada"]


# -- a failed COMMIT ---------------------------------------------------------------------------


async def test_starlette_still_says_what_it_refuses_in_the_words_that_we_look_for() -> None:
    """`_raised_by_application` of the adapter relies on them."""
    failure = ValueError("after the start")

    async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise failure

    class Endpoint:
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await endpoint(scope, receive, send)

    app = Starlette(routes=[Route("/", Endpoint())], exception_handlers={ValueError: conflict})
    answer = await call(app, method="GET")
    assert type(answer.error) is RuntimeError
    assert str(answer.error) == "Caught handled exception, but response already started."
    assert answer.error.__cause__ is failure


async def test_the_handler_of_the_error_answers_a_failed_commit(database: Database) -> None:
    seen: list[Exception] = []

    async def handler(request: Request, error: Exception) -> Response:
        seen.append(error)
        assert (await request.body(), request.url.path) == (b"", "/")
        return await conflict(request, error)

    app = app_with(
        database, Route("/", fail_to_commit, methods=["POST"]), handlers={IntegrityError: handler}
    )
    answer = await call(app)
    assert (answer.status, answer.body) == (409, b"conflict: IntegrityError")
    assert answer.error is None
    assert [type(error) for error in seen] == [IntegrityError]


def synchronous(request: Request, error: Exception) -> Response:
    return PlainTextResponse("in a thread", 409)


async def test_a_synchronous_handler_answers_a_failed_commit(database: Database) -> None:
    app = app_with(
        database,
        Route("/", fail_to_commit, methods=["POST"]),
        handlers={IntegrityError: synchronous},
    )
    assert (await call(app)).body == b"in a thread"


@pytest.mark.parametrize("key", [500, Exception])
async def test_the_handler_of_server_errors_answers_a_failed_commit(
    database: Database, key: Any
) -> None:
    async def handler(request: Request, error: Exception) -> Response:
        return PlainTextResponse(f"sorry: {type(error).__name__}", 500)

    app = app_with(database, Route("/", fail_to_commit, methods=["POST"]), handlers={key: handler})
    answer = await call(app)
    assert (answer.status, answer.body) == (500, b"sorry: IntegrityError")
    assert isinstance(answer.error, IntegrityError)  # as Starlette does, for the server's log


@pytest.mark.parametrize("debug", [True, False])
async def test_without_a_handler_the_page_for_server_errors_answers_a_failed_commit(
    database: Database, debug: bool
) -> None:
    app = app_with(database, Route("/", fail_to_commit, methods=["POST"]), debug=debug)
    answer = await call(app)
    assert answer.status == 500
    assert isinstance(answer.error, IntegrityError)
    assert (b"FOREIGN KEY constraint failed" in answer.body) is debug
    assert (answer.body == b"Internal Server Error") is not debug


@pytest.mark.parametrize("debug", [True, False])
async def test_around_an_application_a_failed_commit_has_its_page_for_server_errors(
    database: Database, debug: bool
) -> None:
    inner = Starlette(routes=[Route("/", fail_to_commit, methods=["POST"])], debug=debug)
    answer = await call(DBSessionMiddleware(inner, database))
    assert (answer.status, answer.answered_by_server) == (500, False)
    assert isinstance(answer.error, IntegrityError)
    assert (b"FOREIGN KEY constraint failed" in answer.body) is debug


class Translate:
    """A middleware of one route: the application's own error for what the database refused."""

    def __init__(self, app: ASGIApp, error: Callable[[], Exception]) -> None:
        self.app = app
        self.error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except IntegrityError as error:
            raise self.error() from error


class Conflict(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "key"),
    [(Conflict, Conflict), (lambda: HTTPException(409), 409), (lambda: HTTPException(409), None)],
)
async def test_a_failed_commit_may_be_translated_on_its_way_out(
    database: Database, error: Callable[[], Exception], key: Any
) -> None:
    route = Route(
        "/", fail_to_commit, methods=["POST"], middleware=[Middleware(Translate, error=error)]
    )
    handlers = {key: conflict} if key is not None else {}
    answer = await call(app_with(database, route, handlers=handlers))
    assert (answer.status, answer.error) == (409, None)
    expected = f"conflict: {type(error()).__name__}" if key is not None else "Conflict"
    assert answer.body.decode() == expected


async def test_an_error_of_the_handler_itself_is_a_server_error(database: Database) -> None:
    async def broken(request: Request, error: Exception) -> Response:
        raise KeyError("of the handler") from error

    route = Route("/", fail_to_commit, methods=["POST"])
    answer = await call(app_with(database, route, handlers={IntegrityError: broken}))
    assert answer.status == 500
    assert isinstance(answer.error, KeyError)


async def test_the_handler_of_the_inner_application_answers_a_failed_commit(
    database: Database,
) -> None:
    inner = Starlette(
        routes=[Route("/", fail_to_commit, methods=["POST"])],
        exception_handlers={IntegrityError: conflict},
    )
    answer = await call(app_with(database, Mount("/inner", inner)), "/inner/")
    assert (answer.status, answer.error) == (409, None)


async def test_the_handler_may_use_the_session_but_its_work_is_rolled_back(
    database: Database,
) -> None:
    async def handler(request: Request, error: Exception) -> Response:
        session = get_session(request)
        session.add(Author(name="of the handler"))
        await session.flush()
        return await conflict(request, error)

    route = Route("/", fail_to_commit, methods=["POST"])
    answer = await call(app_with(database, route, handlers={IntegrityError: handler}))
    assert answer.status == 409
    assert await authors(str(database.url)) == []


# -- other middleware --------------------------------------------------------------------------


class Passing(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        response.headers["x-passed"] = "yes"
        return response


BASE = [Middleware(Passing)]
placed = pytest.mark.parametrize("place", ["above", "below"])


@placed
async def test_a_base_http_middleware_changes_nothing_about_a_commit(
    database: Database, place: str
) -> None:
    async def look(message: Any) -> None:
        if message["type"] == "http.response.start":
            visible.extend(await authors(str(database.url)))

    visible: list[str] = []
    app = app_with(database, Route("/", create, methods=["POST"]), **{place: BASE})  # type: ignore[arg-type]
    answer = await call(app, watch=look)
    assert (answer.status, answer.body) == (201, b"created")
    assert (b"x-passed", b"yes") in answer.messages[0]["headers"]
    assert visible == ["ada"]


@placed
@pytest.mark.parametrize("registered", [True, False])
async def test_a_base_http_middleware_changes_nothing_about_a_failed_commit(
    database: Database, place: str, registered: bool
) -> None:
    handlers = {IntegrityError: conflict} if registered else {}
    route = Route("/", fail_to_commit, methods=["POST"])
    app = app_with(database, route, handlers=handlers, **{place: BASE})  # type: ignore[arg-type]
    answer = await call(app)
    assert answer.status == (409 if registered else 500)
    assert isinstance(answer.error, type(None) if registered else IntegrityError)


@placed
@pytest.mark.parametrize(
    ("error", "status"),
    [(HTTPException(404), 404), (ValueError("handled"), 409), (KeyError("not handled"), 500)],
)
async def test_a_base_http_middleware_changes_nothing_about_an_error(
    database: Database, place: str, error: Exception, status: int
) -> None:
    route = Route("/", create_and(error), methods=["POST"])
    app = app_with(database, route, handlers={ValueError: conflict}, **{place: BASE})  # type: ignore[arg-type]
    answer = await call(app)
    assert answer.status == status
    assert await authors(str(database.url)) == []


async def test_a_base_http_middleware_above_leaves_streams_their_session(
    database: Database,
) -> None:
    @transactional
    async def endpoint(request: Request) -> Response:
        session = get_session(request)
        session.add(Author(name="ada"))

        async def stream() -> AsyncIterator[str]:
            for number in range(3):
                yield f"{await session.scalar(select(Author.name))} {number}\n"

        return StreamingResponse(stream())

    app = app_with(database, Route("/", endpoint, methods=["POST"]), above=BASE)
    answer = await call(app)
    assert (answer.status, answer.body) == (200, b"ada 0\nada 1\nada 2\n")
    assert answer.error is None


async def test_a_base_http_middleware_above_may_cancel_the_request(database: Database) -> None:
    class Impatient(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
            async with asyncio.timeout(60) as timeout:
                timeouts.append(timeout)
                return await call_next(request)

    @transactional
    async def endpoint(request: Request) -> Response:
        get_session(request).add(Author(name="ada"))
        await get_session(request).flush()
        timeouts[0].reschedule(0)
        await asyncio.Event().wait()
        raise AssertionError

    timeouts: list[asyncio.Timeout] = []
    route = Route("/", endpoint, methods=["POST"])
    answer = await call(app_with(database, route, above=[Middleware(Impatient)]))
    assert answer.status == 500
    assert isinstance(answer.error, TimeoutError)
    assert checked_out(database) == 0
    assert await authors(str(database.url)) == []


async def from_elsewhere(app: ASGIApp) -> dict[str, str]:
    """The headers of the answer to a request from another origin."""

    async def with_origin(scope: Scope, receive: Receive, send: Send) -> None:
        scope["headers"].append((b"origin", b"https://elsewhere.test"))
        await app(scope, receive, send)

    answer = await call(with_origin)
    headers = {name.decode(): value.decode() for name, value in answer.messages[0]["headers"]}
    return {"status": str(answer.status), **headers}


@pytest.mark.parametrize(
    ("endpoint", "status"),
    [(create, "201"), (fail_to_commit, "409"), (create_and(ValueError()), "409")],
)
async def test_below_a_cors_middleware_every_answer_has_its_headers(
    database: Database, endpoint: Endpoint, status: str
) -> None:
    cors = Middleware(CORSMiddleware, allow_origins=["https://elsewhere.test"])
    handlers = {IntegrityError: conflict, ValueError: conflict}
    route = Route("/", endpoint, methods=["POST"])
    headers = await from_elsewhere(app_with(database, route, above=[cors], handlers=handlers))
    assert headers["status"] == status
    assert headers["access-control-allow-origin"] == "https://elsewhere.test"


async def test_what_is_sent_before_the_response_does_not_commit(database: Database) -> None:
    """A push promise is no status line: the handler may still fail."""

    @transactional
    async def endpoint(request: Request) -> Response:
        get_session(request).add(Author(name="ada"))
        await get_session(request).flush()
        await request.send_push_promise("/style.css")
        raise HTTPException(409)

    async def with_push(scope: Scope, receive: Receive, send: Send) -> None:
        async def note_promise(message: Any) -> None:
            if message["type"] == "http.response.push":
                promised.append(message["path"])
            else:
                await send(message)

        scope["extensions"] = {"http.response.push": {}}
        await app(scope, receive, note_promise)

    promised: list[str] = []
    app = app_with(database, Route("/", endpoint, methods=["POST"]))
    answer = await call(with_push)
    assert (answer.status, promised) == (409, ["/style.css"])
    assert await authors(str(database.url)) == []


# -- WebSockets --------------------------------------------------------------------------------


@transactional
async def chat(socket: WebSocket) -> None:
    """Stores each message, and answers with what another connection sees of it."""
    await socket.accept()
    session = get_session(socket)
    async for name in socket.iter_text():
        session.add(Author(name=name))
        try:
            await session.flush()
            if name == "refused":
                raise ValueError(name)
        except ValueError as error:
            await socket.send_text(f"error: {error}")
        else:
            await socket.send_text(f"stored {name}")


async def test_a_message_is_committed_before_its_answer_leaves(database: Database) -> None:
    app = app_with(database, WebSocketRoute("/", chat))
    async with websocket(app) as socket:
        for count, name in enumerate(["ada", "grace"], 1):
            assert await socket.ask(name) == f"stored {name}"
            assert len(await authors(str(database.url))) == count
    assert socket.error is None


async def test_an_idle_socket_holds_no_connection(database: Database) -> None:
    app = app_with(database, WebSocketRoute("/", chat), Route("/create", create, methods=["POST"]))
    async with websocket(app) as one, websocket(app) as other:
        await one.ask("one")
        await other.ask("other")
        await one.waits.wait()
        await other.waits.wait()
        assert checked_out(database) == 0
        assert (await call(app, "/create")).status == 201


async def test_a_message_without_an_answer_is_committed_before_the_next_one_is_awaited(
    database: Database,
) -> None:
    @transactional
    async def endpoint(socket: WebSocket) -> None:
        await socket.accept()
        async for name in socket.iter_text():
            get_session(socket).add(Author(name=name))

    async with websocket(app_with(database, WebSocketRoute("/", endpoint))) as socket:
        socket.send({"type": "websocket.receive", "text": "ada"})
        await socket.waits.wait()
        assert checked_out(database) == 0
        assert await authors(str(database.url)) == ["ada"]


async def test_a_message_that_fails_rolls_back_only_itself(database: Database) -> None:
    app = app_with(database, WebSocketRoute("/", chat))
    async with websocket(app) as socket:
        assert await socket.ask("before") == "stored before"
        assert await socket.ask("refused") == "error: refused"
        assert await socket.ask("after") == "stored after"
    assert await authors(str(database.url)) == ["after", "before"]


async def test_a_handler_that_breaks_rolls_back_its_last_message(database: Database) -> None:
    @transactional
    async def endpoint(socket: WebSocket) -> None:
        await socket.accept()
        async for name in socket.iter_text():
            get_session(socket).add(Author(name=name))
            await get_session(socket).flush()
            if name == "broken":
                raise ValueError
            await socket.send_text("stored")

    app = app_with(database, WebSocketRoute("/", endpoint))
    async with websocket(app) as socket:
        assert await socket.ask("ada") == "stored"
        socket.send({"type": "websocket.receive", "text": "broken"})
    assert isinstance(socket.error, ValueError)
    assert await authors(str(database.url)) == ["ada"]


async def test_a_failed_commit_keeps_the_answer_from_leaving(database: Database) -> None:
    @transactional
    async def endpoint(socket: WebSocket) -> None:
        await socket.accept()
        async for name in socket.iter_text():
            get_session(socket).add(Author(name=name))
            get_session(socket).add(Child(id=1, parent_id=77))
            try:
                await socket.send_text(f"stored {name}")
            except IntegrityError:
                await socket.send_text("not stored")

    app = app_with(database, WebSocketRoute("/", endpoint))
    async with websocket(app) as socket:
        assert await socket.ask("ada") == "not stored"
    assert await authors(str(database.url)) == []


async def test_what_is_left_when_the_client_goes_is_committed(database: Database) -> None:
    @transactional
    async def endpoint(socket: WebSocket) -> None:
        await socket.accept()
        async for _ in socket.iter_text():
            pass
        get_session(socket).add(Author(name="at the end"))

    app = app_with(database, WebSocketRoute("/", endpoint))
    async with websocket(app):
        pass
    assert await authors(str(database.url)) == ["at the end"]


async def test_a_websocket_endpoint_class_may_be_marked(database: Database) -> None:
    @transactional
    class Chat(WebSocketEndpoint):
        encoding = "text"

        async def on_receive(self, websocket: WebSocket, data: Any) -> None:
            get_session(websocket).add(Author(name=data))
            await websocket.send_text("stored")

    app = app_with(database, WebSocketRoute("/", Chat))
    async with websocket(app) as socket:
        assert await socket.ask("ada") == "stored"
        assert await authors(str(database.url)) == ["ada"]
        assert checked_out(database) == 0
