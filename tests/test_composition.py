"""Applications that are put together in ways of their own, and what still holds in them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import litestar
import pytest
from fastapi import Depends, FastAPI
from fastapi.requests import HTTPConnection
from sqlalchemy import insert, select, text
from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from asgi_db import (
    Database,
    DatabaseBusyError,
    DBSession,
    DBSessionMiddleware,
    Mode,
    ModeConflictError,
    plain,
    read_only,
    session_of,
    transactional,
)
from asgi_db.types import ASGIApp, Message, Receive, Scope, Send
from asgi_db_litestar import DatabasePlugin
from asgi_db_starlette import get_session
from tests.contract.client import call, scope_of
from tests.limits import set_limits
from tests.pools import ONE_CONNECTION, checked_out, one_connection
from tests.sockets import Socket, websocket
from tests.tables import Author, Child, authors

Endpoint = Callable[[Request], Awaitable[Response]]


@pytest.fixture
async def database(sqlite_url: str) -> AsyncIterator[Database]:
    async with one_connection(sqlite_url) as database:
        yield database


def app_with(
    database: Database,
    *routes: BaseRoute,
    mode: Mode = plain,
    below: Sequence[Middleware] = (),
    handlers: Mapping[Any, Any] | None = None,
) -> Starlette:
    """An application with our middleware above those that are `below` it."""
    ours = Middleware(DBSessionMiddleware, database=database, mode=mode)
    return Starlette(routes=routes, middleware=[ours, *below], exception_handlers=handlers)


def at_root(endpoint: Endpoint) -> Route:
    return Route("/", endpoint, methods=["POST"])


@transactional
async def create(request: Request) -> Response:
    get_session(request).add(Author(name="ada"))
    return PlainTextResponse("created", 201)


async def fail_to_commit(request: Request) -> Response:
    session_of(request.scope, transactional).add(Child(id=1, parent_id=77))
    return PlainTextResponse("never", 201)


async def conflict(request: Request, error: Exception) -> Response:
    return PlainTextResponse(f"conflict: {type(error).__name__}", 409)


# -- other middleware below ours ---------------------------------------------------------------


class Copying:
    """Makes a copy of the scope, as ASGI's specification advises."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app({**scope, "copied": True}, receive, send)


class LoggingIn:
    """Reads with the session before the route is known."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await session_of(scope).scalars(select(Author))
        await self.app(scope, receive, send)


class Passing(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)


async def test_the_mark_of_a_route_counts_below_a_middleware_that_copies_the_scope(
    database: Database, sqlite_url: str
) -> None:
    answer = await call(app_with(database, at_root(create), below=[Middleware(Copying)]))
    assert (answer.status, answer.error) == (201, None)
    assert await authors(sqlite_url) == ["ada"]


async def test_the_handler_of_the_error_answers_a_failed_commit_below_one_that_copies_the_scope(
    database: Database,
) -> None:
    app = app_with(
        database,
        at_root(fail_to_commit),
        below=[Middleware(Copying)],
        handlers={IntegrityError: conflict},
    )
    answer = await call(app)
    assert (answer.status, answer.body) == (409, b"conflict: IntegrityError")
    assert answer.error is None


async def test_a_body_that_was_read_in_an_except_block_does_not_make_the_answer_an_error(
    database: Database, sqlite_url: str
) -> None:
    @transactional
    async def endpoint(request: Request) -> Response:
        try:
            name = request.query_params["name"]
        except KeyError:
            name = (await request.body()).decode() or "ada"
        get_session(request).add(Author(name=name))
        return PlainTextResponse("created", 201)

    answer = await call(app_with(database, at_root(endpoint), below=[Middleware(Passing)]))
    assert answer.status == 201
    assert await authors(sqlite_url) == ["ada"]


# -- one application in another ----------------------------------------------------------------


@pytest.mark.parametrize("reads_first", [False, True])
async def test_a_mounted_application_has_the_mode_of_its_own_middleware(
    database: Database, sqlite_url: str, reads_first: bool
) -> None:
    async def endpoint(request: Request) -> Response:
        get_session(request).add(Author(name="ada"))
        return PlainTextResponse("created", 201)

    mounted = app_with(database, at_root(endpoint), mode=transactional)
    below = [Middleware(LoggingIn)] if reads_first else []
    answer = await call(app_with(database, Mount("/sub", mounted), below=below), "/sub/")
    assert answer.status == 201
    assert await authors(sqlite_url) == ["ada"]


def mounted_in_litestar(
    database: Database, endpoint: Endpoint, handlers: Mapping[Any, Any] | None = None
) -> ASGIApp:
    """A Starlette application below `/sub` of one of Litestar's, which has our plugin."""
    inner: Any = Starlette(routes=[at_root(endpoint)], exception_handlers=handlers)
    return litestar.Litestar(
        [litestar.asgi("/sub", is_mount=True, copy_scope=False)(inner)],
        plugins=[DatabasePlugin(database)],
        openapi_config=None,
        logging_config=None,
    )


async def test_the_mark_of_a_starlette_route_counts_inside_litestar(
    database: Database, sqlite_url: str
) -> None:
    answer = await call(mounted_in_litestar(database, create), "/sub/")
    assert (answer.status, answer.error) == (201, None)
    assert await authors(sqlite_url) == ["ada"]


async def test_the_handler_of_a_starlette_application_answers_a_failed_commit_inside_litestar(
    database: Database,
) -> None:
    app = mounted_in_litestar(database, fail_to_commit, {IntegrityError: conflict})
    answer = await call(app, "/sub/")
    assert (answer.status, answer.body) == (409, b"conflict: IntegrityError")


async def test_a_scope_may_be_used_for_a_second_call(database: Database, sqlite_url: str) -> None:
    inner = app_with(database, at_root(create))

    async def fallback(scope: Scope, receive: Receive, send: Send) -> None:
        """Asks again at another path when there is nothing at this one."""
        held: list[Message] = []

        async def hold(message: Message) -> None:
            held.append(message)

        await inner(scope, receive, hold)
        assert held[0]["status"] == 404
        scope["path"] = "/"
        await inner(scope, receive, send)

    answer = await call(fallback, "/nowhere")
    assert (answer.status, answer.error) == (201, None)
    assert await authors(sqlite_url) == ["ada"]


# -- where the mark may stand ------------------------------------------------------------------


class Create:
    @transactional
    async def __call__(self, connection: HTTPConnection) -> None:
        connection.state.db.add(Author(name="ada"))


class Authors:
    @transactional
    @staticmethod
    async def create_static(connection: HTTPConnection) -> None:
        connection.state.db.add(Author(name="ada"))

    @transactional
    @classmethod
    async def create_in_class(cls, connection: HTTPConnection) -> None:
        connection.state.db.add(Author(name="ada"))


@pytest.mark.parametrize(
    "endpoint",
    [Create(), Authors.create_static, Authors.create_in_class],
    ids=["__call__", "staticmethod", "classmethod"],
)
async def test_the_mark_on_any_kind_of_method_counts(
    database: Database, sqlite_url: str, endpoint: Callable[..., Any]
) -> None:
    app = FastAPI()
    app.post("/", status_code=201)(endpoint)
    app.add_middleware(DBSessionMiddleware, database=database)
    answer = await call(app)
    assert (answer.status, answer.error) == (201, None)
    assert await authors(sqlite_url) == ["ada"]


# -- two dependencies of the same strength -----------------------------------------------------

SERIALIZABLE = transactional(isolation="SERIALIZABLE")
SNAPSHOT = read_only(snapshot=True)


def asking_for(mode: Mode) -> Any:
    """A dependency that asks for this mode."""

    async def dependency(connection: HTTPConnection) -> DBSession:
        return session_of(connection.scope, mode)

    return Depends(dependency)


def app_asking_for(database: Database, *modes: Mode) -> tuple[ASGIApp, list[Mode]]:
    """An application whose route has a dependency for each mode, and what it has seen in force."""
    seen: list[Mode] = []
    app = FastAPI()

    @app.post("/", dependencies=[asking_for(mode) for mode in modes])
    async def endpoint(connection: HTTPConnection) -> None:
        session: DBSession = connection.state.db
        await session.execute(text("SELECT 1"))
        seen.append(session.unit_of_work.mode)

    app.add_middleware(DBSessionMiddleware, database=database)
    return app, seen


@pytest.mark.parametrize(
    ("one", "other", "in_force"),
    [
        (transactional, SERIALIZABLE, SERIALIZABLE),
        (SERIALIZABLE, transactional, SERIALIZABLE),
        (SERIALIZABLE, SERIALIZABLE, SERIALIZABLE),
        (read_only, SNAPSHOT, SNAPSHOT),
        (SNAPSHOT, read_only, SNAPSHOT),
    ],
    ids=["transaction first", "transaction last", "the same", "read first", "read last"],
)
async def test_of_two_dependencies_of_equal_strength_the_one_with_options_wins(
    database: Database, one: Mode, other: Mode, in_force: Mode
) -> None:
    app, seen = app_asking_for(database, one, other)
    assert (await call(app)).status == 200
    assert seen == [in_force]


@pytest.mark.parametrize("reverse", [False, True])
async def test_two_dependencies_with_different_options_are_a_conflict(
    database: Database, reverse: bool
) -> None:
    modes: list[Mode] = [SERIALIZABLE, transactional(timeout=30)]
    if reverse:
        modes.reverse()
    app, seen = app_asking_for(database, *modes)
    answer = await call(app)
    assert answer.status == 500
    assert isinstance(answer.error, ModeConflictError)
    assert seen == []


# -- a rule of the user's that raises ----------------------------------------------------------


def broken_rule(status: int) -> bool:
    raise KeyError(status)


def breaking_in_starlette(database: Database) -> ASGIApp:
    @transactional(commit_on=broken_rule)
    async def endpoint(request: Request) -> Response:
        get_session(request).add(Author(name="ada"))
        return PlainTextResponse("created", 201)

    return app_with(database, at_root(endpoint))


def breaking_in_litestar(database: Database) -> ASGIApp:
    @litestar.post("/")
    @transactional(commit_on=broken_rule)
    async def endpoint(request: litestar.Request[Any, Any, Any]) -> str:
        request.state.db.add(Author(name="ada"))
        return "created"

    return litestar.Litestar(
        [endpoint], plugins=[DatabasePlugin(database)], openapi_config=None, logging_config=None
    )


@pytest.mark.parametrize("app", [breaking_in_starlette, breaking_in_litestar])
async def test_a_commit_on_that_raises_is_answered_by_the_framework_and_rolled_back(
    database: Database, sqlite_url: str, app: Callable[[Database], ASGIApp]
) -> None:
    answer = await call(app(database))
    assert (answer.status, answer.answered_by_server) == (500, False)
    assert await authors(sqlite_url) == []


# -- after the call ----------------------------------------------------------------------------


async def test_who_asks_after_the_answer_is_told_that_the_client_has_gone(
    database: Database,
) -> None:
    """As a task does that outlives its request."""
    requests: list[Request] = []

    async def endpoint(request: Request) -> Response:
        await request.body()
        requests.append(request)
        return PlainTextResponse("accepted", 202)

    assert (await call(app_with(database, at_root(endpoint)))).status == 202
    assert await requests[0].is_disconnected()


async def test_a_broadcast_to_a_socket_that_has_ended_gets_the_error_of_one_that_has_gone(
    database: Database,
) -> None:
    sockets: list[WebSocket] = []

    async def chat(socket: WebSocket) -> None:
        await socket.accept()
        sockets.append(socket)
        await socket.receive_text()

    async with websocket(app_with(database, WebSocketRoute("/", chat))) as client:
        client.tell("bye")
        assert await client.receive() is None
    with pytest.raises(WebSocketDisconnect):
        await sockets[0].send_text("news")


# -- a socket that is not accepted -------------------------------------------------------------


@pytest.mark.parametrize(("status", "stored"), [(403, []), (303, ["ada"])])
async def test_the_status_of_a_denial_decides_as_that_of_any_response(
    database: Database, sqlite_url: str, status: int, stored: list[str]
) -> None:
    @transactional
    async def endpoint(socket: WebSocket) -> None:
        session = get_session(socket)
        session.add(Author(name="ada"))
        await session.flush()
        await socket.send_denial_response(PlainTextResponse("elsewhere", status))

    scope = scope_of("websocket", "ws", "/", "2.3")
    scope |= {"subprotocols": [], "extensions": {"websocket.http.response": {}}}
    client = Socket(app_with(database, WebSocketRoute("/", endpoint)), scope)
    client.send({"type": "websocket.connect"})
    denial = await client.receive()
    assert denial is not None
    assert (denial["type"], denial["status"]) == ("websocket.http.response.start", status)
    assert await authors(sqlite_url) == stored
    await client.close()
    assert client.error is None


# -- what is committed is not refused ----------------------------------------------------------


@pytest.fixture
async def crowded(database: Database, sqlite_url: str) -> AsyncIterator[Database]:
    """The same tables with a pool of one connection, for which nobody waits long."""
    async with Database(
        sqlite_url, engine_options=ONE_CONNECTION | {"pool_timeout": 0.1}
    ) as crowded:
        yield crowded
        assert checked_out(crowded) == 0


@pytest.mark.parametrize("place", ["in a hook", "after a commit by hand"])
async def test_a_busy_pool_after_the_commit_is_not_answered_with_503(
    crowded: Database, sqlite_url: str, place: str
) -> None:
    """Which says that the request may be sent again."""

    async def take_two_connections() -> None:
        async with crowded.session() as one, crowded.session() as other:
            await one.execute(text("SELECT 1"))
            await other.execute(text("SELECT 1"))

    @transactional
    async def endpoint(request: Request) -> Response:
        session = get_session(request)
        session.add(Author(name="ada"))
        if place == "in a hook":
            session.on_commit(take_two_connections)
        else:
            await session.commit()
            await take_two_connections()
        return PlainTextResponse("created", 201)

    answer = await call(app_with(crowded, at_root(endpoint)))
    assert answer.status == 500
    assert answer.was_caused_by(DatabaseBusyError)
    assert await authors(sqlite_url) == ["ada"]


# -- hooks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "raised"),
    [(HTTPException(404), 404, type(None)), (LookupError("no author"), 500, LookupError)],
    ids=["answered", "not answered"],
)
async def test_work_of_a_hook_for_rollback_that_fails_masks_no_other_error(
    database: Database, error: Exception, status: int, raised: type[object]
) -> None:
    @transactional
    async def endpoint(request: Request) -> Response:
        session = get_session(request)
        session.on_rollback(lambda: session.add(Child(id=1, parent_id=77)))
        session.add(Author(name="ada"))
        await session.flush()
        raise error

    answer = await call(app_with(database, at_root(endpoint)))
    assert answer.status == status
    assert type(answer.error) is raised


async def test_a_hook_that_waits_for_the_end_of_a_stream_is_not_cut_off_with_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starlette cancels the task that has sent the stream, as soon as that is complete."""
    set_limits(monkeypatch, hooks=0.01)
    done: list[str] = []

    @transactional
    async def endpoint(request: Request) -> Response:
        session = get_session(request)

        async def hook() -> None:
            await asyncio.sleep(0.3)
            done.append("hook")

        async def stream() -> AsyncIterator[str]:
            yield "ada"

        session.add(Author(name="ada"))
        session.on_commit(hook, when="after_response")
        return StreamingResponse(stream())

    answer = await call(app_with(database, at_root(endpoint)))
    assert (answer.status, answer.complete, answer.error) == (200, True, None)
    assert done == ["hook"]


# -- statements in tasks of their own ----------------------------------------------------------

Execute = Callable[[Awaitable[object]], Awaitable[object]]


async def in_gather(statement: Awaitable[object]) -> None:
    await asyncio.gather(statement)


async def in_wait_for(statement: Awaitable[object]) -> None:
    await asyncio.wait_for(statement, 20)


in_a_task = pytest.mark.parametrize("execute", [in_gather, in_wait_for])


@in_a_task
async def test_a_message_whose_statement_ran_in_a_task_is_committed_before_its_answer_leaves(
    database: Database, sqlite_url: str, execute: Execute
) -> None:
    @transactional
    async def chat(socket: WebSocket) -> None:
        await socket.accept()
        async for name in socket.iter_text():
            await execute(get_session(socket).execute(insert(Author).values(name=name)))
            await socket.send_text(f"stored {name}")

    async with websocket(app_with(database, WebSocketRoute("/", chat))) as client:
        assert await client.ask("ada") == "stored ada"
        assert await authors(sqlite_url) == ["ada"]
        await client.waits.wait()
        assert checked_out(database) == 0
        assert await client.ask("grace") == "stored grace"
        assert await authors(sqlite_url) == ["ada", "grace"]


@in_a_task
async def test_a_chunk_whose_statement_ran_in_a_task_is_committed_before_it_leaves(
    database: Database, sqlite_url: str, execute: Execute
) -> None:
    seen: list[tuple[list[str], int]] = []

    @transactional
    async def endpoint(request: Request) -> Response:
        session = get_session(request)

        async def stream() -> AsyncIterator[str]:
            for name in "abc":
                await execute(session.execute(insert(Author).values(name=name)))
                yield name

        return StreamingResponse(stream())

    async def look(message: Message) -> None:
        if message.get("body"):
            seen.append((await authors(sqlite_url), checked_out(database)))

    answer = await call(app_with(database, at_root(endpoint)), watch=look)
    assert answer.error is None
    assert seen == [(["a"], 0), (["a", "b"], 0), (["a", "b", "c"], 0)]


async def test_a_broadcast_does_not_end_a_message_whose_statement_ran_in_a_task(
    database: Database, sqlite_url: str
) -> None:
    sockets: list[WebSocket] = []
    reached, go_on = asyncio.Event(), asyncio.Event()

    @transactional
    async def chat(socket: WebSocket) -> None:
        await socket.accept()
        sockets.append(socket)
        name = await socket.receive_text()
        await in_gather(get_session(socket).execute(insert(Author).values(name=name)))
        reached.set()
        await go_on.wait()
        raise ValueError(name)

    async with websocket(app_with(database, WebSocketRoute("/", chat))) as client:
        client.tell("ada")
        await reached.wait()
        await sockets[0].send_text("news")
        assert await client.hear() == "news"
        go_on.set()
        assert await client.receive() is None
        assert isinstance(client.error, ValueError)
    assert await authors(sqlite_url) == []


async def test_a_broadcast_does_not_run_the_hook_of_a_message_that_has_just_begun(
    database: Database, sqlite_url: str
) -> None:
    sockets: list[WebSocket] = []
    called: list[str] = []
    reached, go_on = asyncio.Event(), asyncio.Event()

    @transactional
    async def chat(socket: WebSocket) -> None:
        await socket.accept()
        sockets.append(socket)
        session = get_session(socket)
        name = await socket.receive_text()
        session.on_commit(lambda: called.append(name))
        reached.set()
        await go_on.wait()
        session.add(Author(name=name))
        await session.flush()
        raise ValueError(name)

    async with websocket(app_with(database, WebSocketRoute("/", chat))) as client:
        client.tell("ada")
        await reached.wait()
        await sockets[0].send_text("news")
        assert await client.hear() == "news"
        go_on.set()
        assert await client.receive() is None
        assert isinstance(client.error, ValueError)
    assert called == []
    assert await authors(sqlite_url) == []
