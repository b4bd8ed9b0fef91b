"""What is special to Litestar; what holds for every framework is in `tests/contract`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from litestar import (
    Controller,
    Litestar,
    MediaType,
    Request,
    Response,
    Router,
    WebSocket,
    get,
    post,
)
from litestar import websocket as websocket_route
from litestar.config.cors import CORSConfig
from litestar.config.response_cache import ResponseCacheConfig
from litestar.datastructures import State
from litestar.di import Provide
from litestar.exceptions import HTTPException, LitestarException
from litestar.handlers import WebsocketListener, websocket_listener
from litestar.middleware import DefineMiddleware
from litestar.utils.scope.state import ScopeState
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_db import (
    Database,
    DBSession,
    DBSessionMiddleware,
    MissingMiddlewareError,
    by_method,
    read_only,
    transactional,
)
from asgi_db.types import ASGIApp, Receive, Scope, Send
from asgi_db_litestar import DatabasePlugin
from tests import deferred_annotations
from tests.contract.client import Exchange, call
from tests.internals import session_key
from tests.pools import checked_out, one_connection
from tests.sockets import websocket
from tests.tables import Author, Base, Child, Parent, authors
from tests.versions import NamedDependency

AnyRequest = Request[Any, Any, State]
AnySocket = WebSocket[Any, Any, State]
Session = NamedDependency[DBSession]


@pytest.fixture
async def database(sqlite_url: str) -> AsyncIterator[Database]:
    async with one_connection(sqlite_url) as database:
        yield database


def app_with(database: Database, *handlers: Any, **options: Any) -> Litestar:
    options = {"openapi_config": None, "logging_config": None, **options}
    plugins = [DatabasePlugin(database), *options.pop("plugins", [])]
    return Litestar(handlers, plugins=plugins, **options)


def app_without_plugin(database: Database, *handlers: Any, **options: Any) -> Litestar:
    ours = DefineMiddleware(DBSessionMiddleware, database=database)
    options = {"openapi_config": None, "logging_config": None, **options}
    return Litestar(handlers, middleware=[ours], **options)


def mode_in_force(connection: AnyRequest | AnySocket) -> str:
    scope: Scope = connection.scope
    session: DBSession = scope[session_key("db")]
    return session.unit_of_work.mode.name


@post("/")
@transactional
async def create(request: AnyRequest) -> str:
    request.state.db.add(Author(name="ada"))
    return "created"


@post("/fails")
@transactional
async def fail_to_commit(request: AnyRequest) -> str:
    request.state.db.add(Child(id=1, parent_id=77))
    return "never"


def conflict(request: AnyRequest, error: Exception) -> Response[str]:
    return Response(f"conflict: {type(error).__name__}", media_type=MediaType.TEXT, status_code=409)


# -- the plugin --------------------------------------------------------------------------------


async def test_the_plugin_provides_each_session_in_its_mode_and_the_engine(
    database: Database,
) -> None:
    @get("/plain")
    async def in_plain(request: AnyRequest, db_session: Session) -> list[bool | str]:
        return [mode_in_force(request), db_session is request.state.db]

    @get("/transactional")
    async def in_transaction(
        request: AnyRequest, db_session_transaction: Session
    ) -> list[bool | str]:
        return [mode_in_force(request), db_session_transaction is request.state.db]

    @get("/read_only")
    async def in_read_only(request: AnyRequest, db_session_read_only: Session) -> list[bool | str]:
        return [mode_in_force(request), db_session_read_only is request.state.db]

    @get("/engine")
    async def with_engine(db_engine: NamedDependency[AsyncEngine]) -> bool:
        return db_engine is database.engine

    app = app_with(database, in_plain, in_transaction, in_read_only, with_engine)
    for mode in ("plain", "transactional", "read_only"):
        answer = await call(app, f"/{mode}", method="GET")
        assert answer.body == f'["{mode}",true]'.encode()
    assert (await call(app, "/engine", method="GET")).body == b"true"


async def test_the_providers_work_in_websocket_handlers(database: Database) -> None:
    @websocket_route("/")
    async def handler(socket: AnySocket, db_session_transaction: Session) -> None:
        await socket.accept()
        while True:
            db_session_transaction.add(Author(name=await socket.receive_text()))
            await socket.send_text("stored")

    async with websocket(app_with(database, handler)) as socket:
        assert await socket.ask("ada") == "stored"
        assert await authors(str(database.url)) == ["ada"]


@pytest.mark.parametrize(
    "path",
    ["/ours", "/sqlalchemys", "/engine", "/provided", "/renamed", "/controller"],
)
async def test_annotations_for_type_checkers_alone_are_understood(
    database: Database, path: str
) -> None:
    app = app_with(database, *deferred_annotations.HANDLERS)
    answer = await call(app, path, method="GET")
    assert (answer.status, answer.body) == (200, b"1")
    assert checked_out(database) == 0


async def test_annotations_for_type_checkers_alone_are_understood_at_a_socket(
    database: Database,
) -> None:
    app = app_with(database, *deferred_annotations.HANDLERS)
    async with websocket(app, "/socket") as socket:
        assert await socket.ask("ada") == "1"


async def test_a_name_of_the_apps_own_signature_namespace_wins(database: Database) -> None:
    async def provide_text() -> str:
        return "of the app"

    app = app_with(
        database,
        deferred_annotations.as_text,
        dependencies={"db_session": Provide(provide_text)},
        signature_namespace={"DBSession": str},
    )
    assert (await call(app, "/text", method="GET")).body == b"of the app"


async def test_another_key_names_the_state_and_the_providers(database: Database) -> None:
    @get("/")
    async def handler(
        request: AnyRequest,
        analytics_session: Session,
        analytics_session_transaction: Session,
        analytics_session_read_only: Session,
        analytics_engine: NamedDependency[AsyncEngine],
    ) -> list[bool]:
        session = request.state.analytics
        return [
            analytics_session is session,
            analytics_session_transaction is session,
            analytics_session_read_only is session,
            analytics_engine is database.engine,
            "db" in request.scope["state"],
        ]

    plugin = DatabasePlugin(database, key="analytics")
    app = Litestar([handler], plugins=[plugin], openapi_config=None, logging_config=None)
    assert (await call(app, method="GET")).body == b"[true,true,true,true,false]"


async def test_the_plugin_takes_the_default_mode(database: Database) -> None:
    @get("/")
    async def read(request: AnyRequest) -> str:
        return mode_in_force(request)

    @post("/")
    async def write(request: AnyRequest) -> str:
        return mode_in_force(request)

    plugin = DatabasePlugin(database, mode=by_method)
    app = Litestar([read, write], plugins=[plugin], openapi_config=None, logging_config=None)
    assert (await call(app, method="GET")).body == b"read_only"
    assert (await call(app, method="POST")).body == b"transactional"


async def test_a_provider_of_the_apps_own_wins_over_the_plugins(database: Database) -> None:
    async def provide_text() -> str:
        return "of the app"

    @get("/")
    async def handler(db_session: NamedDependency[str]) -> str:
        return db_session

    app = app_with(database, handler, dependencies={"db_session": Provide(provide_text)})
    assert (await call(app, method="GET")).body == b"of the app"


async def test_the_plugin_starts_and_disposes_the_database_around_the_apps_own_lifespan(
    sqlite_url: str,
) -> None:
    @asynccontextmanager
    async def own(app: Litestar) -> AsyncGenerator[None, None]:
        await database.create_tables(Base.metadata)
        yield
        async with database.transaction() as session:
            session.add(Author(name="written at shutdown"))
        engines.append(database.engine)

    database = Database(sqlite_url)
    engines: list[AsyncEngine] = []
    app = app_with(database, create, lifespan=[own])
    async with app.lifespan():
        engines.append(database.engine)
        assert (await call(app)).status == 201
    assert engines[0] is engines[1]
    assert await authors(sqlite_url) == ["ada", "written at shutdown"]
    assert database.engine is not engines[0]  # that one was disposed
    await database.dispose()


async def test_the_plugin_disposes_the_database_when_the_apps_own_startup_fails(
    sqlite_url: str,
) -> None:
    @asynccontextmanager
    async def own(app: Litestar) -> AsyncGenerator[None, None]:
        await database.ping()
        engines.append(database.engine)
        raise KeyError("startup")
        yield

    database = Database(sqlite_url)
    engines: list[AsyncEngine] = []
    app = app_with(database, create, lifespan=[own])
    with pytest.raises(ExceptionGroup) as failed:
        async with app.lifespan():
            raise AssertionError("it has started")
    assert failed.group_contains(KeyError, match="startup")
    assert database.engine is not engines[0]
    await database.dispose()


# -- where the mode stands ---------------------------------------------------------------------


async def test_opt_sets_the_mode_on_any_layer_and_the_nearest_wins(database: Database) -> None:
    @get("/own", opt={"db": transactional})
    async def own(request: AnyRequest) -> str:
        return mode_in_force(request)

    @get("/router")
    async def of_router(request: AnyRequest) -> str:
        return mode_in_force(request)

    class OfController(Controller):
        path = "/controller"
        opt = {"db": transactional(isolation="SERIALIZABLE")}

        @get("/")
        async def handler(self, request: AnyRequest) -> str:
            return mode_in_force(request)

    @get("/app")
    async def of_app(request: AnyRequest, db_session: Session) -> str:
        return mode_in_force(request)

    router = Router("/", route_handlers=[own, of_router, OfController], opt={"db": read_only})
    app = app_with(database, router, of_app, opt={"db": transactional})
    for path, mode in {
        "/own": "transactional",
        "/router": "read_only",
        "/controller": "transactional",
        "/app": "transactional",
    }.items():
        assert (await call(app, path, method="GET")).body.decode() == mode


async def test_a_decorator_on_a_controller_holds_for_all_its_handlers(database: Database) -> None:
    @transactional
    class Authors(Controller):
        path = "/authors"

        @post("/")
        async def create(self, request: AnyRequest) -> str:
            request.state.db.add(Author(name="ada"))
            return mode_in_force(request)

        @get("/")
        @read_only
        async def read(self, db_session: Session) -> list[str]:
            return list(await db_session.scalars(select(Author.name)))

    class Inherited(Authors):
        path = "/inherited"

    app = app_with(database, Authors, Inherited)
    assert (await call(app, "/authors")).body == b"transactional"
    assert await authors(str(database.url)) == ["ada"]
    assert (await call(app, "/authors", method="GET")).body == b'["ada"]'
    assert (await call(app, "/inherited", method="GET")).body == b'["ada"]'


async def test_a_synchronous_handler_adds_objects_which_are_committed(database: Database) -> None:
    @post("/", sync_to_thread=True)
    @transactional
    def handler(request: AnyRequest) -> str:
        request.state.db.add(Author(name="ada"))
        return "created"

    assert (await call(app_with(database, handler))).status == 201
    assert await authors(str(database.url)) == ["ada"]


# -- without the plugin ------------------------------------------------------------------------


async def test_the_middleware_works_without_the_plugin(database: Database) -> None:
    app = app_without_plugin(
        database, create, fail_to_commit, exception_handlers={IntegrityError: conflict}
    )
    assert (await call(app)).status == 201
    assert await authors(str(database.url)) == ["ada"]
    answer = await call(app, "/fails")
    assert (answer.status, answer.body) == (409, b"conflict: IntegrityError")


async def test_the_middleware_works_around_the_application(database: Database) -> None:
    inner = Litestar(
        [create, fail_to_commit],
        exception_handlers={IntegrityError: conflict},
        openapi_config=None,
        logging_config=None,
    )
    app = DBSessionMiddleware(inner, database)
    assert (await call(app)).status == 201
    assert await authors(str(database.url)) == ["ada"]
    answer = await call(app, "/fails")
    assert (answer.status, answer.body) == (409, b"conflict: IntegrityError")


async def test_the_middleware_may_stand_on_a_single_handler(database: Database) -> None:
    ours = DefineMiddleware(DBSessionMiddleware, database=database)

    @post("/with", middleware=[ours])
    @transactional
    async def handler(request: AnyRequest) -> str:
        request.state.db.add(Author(name="ada"))
        return "created"

    @get("/without")
    async def without(request: AnyRequest) -> bool:
        return "db" in request.scope["state"]

    app = Litestar([handler, without], openapi_config=None, logging_config=None)
    assert (await call(app, "/with")).status == 201
    assert (await call(app, "/without", method="GET")).body == b"false"
    assert await authors(str(database.url)) == ["ada"]


async def test_a_provider_without_the_middleware_says_what_to_install(database: Database) -> None:
    raised: list[BaseException] = []

    async def note(error: Exception, scope: Any) -> None:
        raised.append(error)

    class Forget:
        """A middleware which takes away what ours has placed."""

        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            del scope[session_key("db")]
            await self.app(scope, receive, send)

    @get("/")
    async def handler(db_session: Session) -> None: ...

    app = app_with(database, handler, middleware=[DefineMiddleware(Forget)], after_exception=[note])
    assert (await call(app, method="GET")).status == 500
    assert isinstance(raised[0], MissingMiddlewareError)
    assert "DatabasePlugin" in str(raised[0])


# -- a failed COMMIT ---------------------------------------------------------------------------


async def test_litestar_still_notes_a_response_as_begun_before_it_is_sent() -> None:
    """`reopen_response` of the adapter takes this note back."""
    failure = ValueError("after the start")
    noted: list[object] = []

    class Watch:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def refuse(message: Any) -> None:
                noted.append(ScopeState.from_scope(scope).response_started)
                raise failure

            noted.append(ScopeState.from_scope(scope).response_started)
            await self.app(scope, receive, refuse)

    @get("/")
    async def handler() -> str:
        return ""

    app = Litestar(
        [handler], middleware=[DefineMiddleware(Watch)], openapi_config=None, logging_config=None
    )
    answer = await call(app, method="GET")
    assert noted == [False, True]
    assert answer.answered_by_server
    assert isinstance(answer.error, LitestarException)
    assert "Exception caught after response started" in str(answer.error)


LAYERS = ["handler", "controller", "router", "app"]


@pytest.mark.parametrize("layer", LAYERS)
async def test_the_handler_of_any_layer_answers_a_failed_commit(
    database: Database, layer: str
) -> None:
    handlers: dict[str, Any] = {
        each: {IntegrityError: conflict} if each == layer else None for each in LAYERS
    }

    class Authors(Controller):
        exception_handlers = handlers["controller"]

        @post("/", exception_handlers=handlers["handler"])
        @transactional
        async def create(self, request: AnyRequest) -> str:
            request.state.db.add(Child(id=1, parent_id=77))
            return "never"

    router = Router("/", route_handlers=[Authors], exception_handlers=handlers["router"])
    answer = await call(app_with(database, router, exception_handlers=handlers["app"]))
    assert (answer.status, answer.body) == (409, b"conflict: IntegrityError")
    assert answer.error is None


@pytest.mark.parametrize("key", [500, Exception])
async def test_the_handler_of_server_errors_answers_a_failed_commit(
    database: Database, key: Any
) -> None:
    app = app_with(database, fail_to_commit, exception_handlers={key: conflict})
    answer = await call(app, "/fails")
    assert (answer.status, answer.body) == (409, b"conflict: IntegrityError")


@pytest.mark.parametrize("debug", [True, False])
async def test_without_a_handler_litestars_own_page_answers_a_failed_commit(
    database: Database, debug: bool
) -> None:
    answer = await call(app_with(database, fail_to_commit, debug=debug), "/fails")
    assert (answer.status, answer.error, answer.answered_by_server) == (500, None, False)
    assert (b"FOREIGN KEY constraint failed" in answer.body) is debug


async def test_the_hooks_for_exceptions_are_called_for_a_failed_commit(database: Database) -> None:
    seen: list[tuple[str, str]] = []

    async def note(error: Exception, scope: Any) -> None:
        seen.append((type(error).__name__, scope["path"]))

    app = app_with(database, create, fail_to_commit, after_exception=[note])
    assert (await call(app)).status == 201
    assert seen == []
    assert (await call(app, "/fails")).status == 500
    assert seen == [("IntegrityError", "/fails")]


async def test_the_hooks_after_a_response_do_not_run_for_one_that_was_refused(
    database: Database,
) -> None:
    ran: list[str] = []

    async def after_response(request: AnyRequest) -> None:
        ran.append(request.url.path)

    app = app_with(database, create, fail_to_commit, after_response=after_response)
    await call(app)
    await call(app, "/fails")
    assert ran == ["/"]


async def test_below_cors_every_answer_has_its_headers(database: Database) -> None:
    app = app_with(
        database,
        create,
        fail_to_commit,
        cors_config=CORSConfig(allow_origins=["https://elsewhere.test"]),
        exception_handlers={IntegrityError: conflict},
    )

    async def from_elsewhere(scope: Scope, receive: Receive, send: Send) -> None:
        scope["headers"].append((b"origin", b"https://elsewhere.test"))
        await app(scope, receive, send)

    for path, status in {"/": 201, "/fails": 409}.items():
        answer = await call(from_elsewhere, path)
        headers = dict(answer.messages[0]["headers"])
        assert answer.status == status
        assert headers[b"access-control-allow-origin"] == b"https://elsewhere.test"


# -- cached responses --------------------------------------------------------------------------


@pytest.mark.parametrize("registered", [True, False])
async def test_a_refused_response_is_not_cached(database: Database, registered: bool) -> None:
    calls: list[str] = []

    @get("/", cache=60)
    @transactional
    async def handler(request: AnyRequest) -> str:
        calls.append("called")
        request.state.db.add(Child(id=1, parent_id=77 if len(calls) == 1 else 1))
        return f"call {len(calls)}"

    handlers: dict[Any, Any] = {IntegrityError: conflict} if registered else {}
    app = app_with(database, handler, exception_handlers=handlers)
    async with database.transaction() as session:
        session.add(Parent(id=1))
    first = await call(app, method="GET")
    assert first.status == (409 if registered else 500)
    second = await call(app, method="GET")
    assert (second.status, second.body, second.complete) == (200, b"call 2", True)


async def test_a_good_response_is_cached_and_takes_no_connection(database: Database) -> None:
    @get("/", cache=60)
    @transactional
    async def handler(request: AnyRequest) -> str:
        request.state.db.add(Author(name="once"))
        return "answer"

    async def answers() -> list[Exchange]:
        return [await call(app, method="GET") for _ in range(2)]

    app = app_with(database, handler, response_cache_config=ResponseCacheConfig())
    assert [(answer.status, answer.body) for answer in await answers()] == [(200, b"answer")] * 2
    assert await authors(str(database.url)) == ["once"]


# -- WebSockets --------------------------------------------------------------------------------


@websocket_route("/chat")
@transactional
async def chat(socket: AnySocket) -> None:
    """Stores each message before it answers."""
    await socket.accept()
    while True:
        name = await socket.receive_text()
        socket.state.db.add(Author(name=name))
        try:
            await socket.state.db.flush()
            if name == "refused":
                raise ValueError(name)
            if name == "broken":
                raise HTTPException(name)
        except ValueError as error:
            await socket.send_text(f"error: {error}")
        else:
            await socket.send_text(f"stored {name}")


async def test_a_message_is_committed_before_its_answer_leaves(database: Database) -> None:
    async with websocket(app_with(database, chat), "/chat") as socket:
        for count, name in enumerate(["ada", "grace"], 1):
            assert await socket.ask(name) == f"stored {name}"
            assert len(await authors(str(database.url))) == count


async def test_an_idle_socket_holds_no_connection(database: Database) -> None:
    app = app_with(database, chat, create)
    async with websocket(app, "/chat") as one, websocket(app, "/chat") as other:
        await one.ask("one")
        await other.ask("other")
        await one.waits.wait()
        await other.waits.wait()
        assert checked_out(database) == 0
        assert (await call(app)).status == 201


async def test_a_message_without_an_answer_is_committed_before_the_next_one_is_awaited(
    database: Database,
) -> None:
    @websocket_route("/")
    @transactional
    async def handler(socket: AnySocket) -> None:
        await socket.accept()
        while True:
            socket.state.db.add(Author(name=await socket.receive_text()))

    async with websocket(app_with(database, handler)) as socket:
        socket.send({"type": "websocket.receive", "text": "ada"})
        await socket.waits.wait()
        assert checked_out(database) == 0
        assert await authors(str(database.url)) == ["ada"]


async def test_a_message_that_fails_rolls_back_only_itself(database: Database) -> None:
    async with websocket(app_with(database, chat), "/chat") as socket:
        assert await socket.ask("before") == "stored before"
        assert await socket.ask("refused") == "error: refused"
        assert await socket.ask("after") == "stored after"
    assert await authors(str(database.url)) == ["after", "before"]


async def test_a_handler_that_breaks_rolls_back_its_last_message(database: Database) -> None:
    """Litestar answers the error itself, with a close event: which commits nothing either."""
    async with websocket(app_with(database, chat), "/chat") as socket:
        assert await socket.ask("ada") == "stored ada"
        socket.send({"type": "websocket.receive", "text": "broken"})
        closed = await socket.receive()
        assert closed is not None and closed["type"] == "websocket.close"
    assert await authors(str(database.url)) == ["ada"]


async def test_a_failed_commit_keeps_the_answer_from_leaving(database: Database) -> None:
    @websocket_route("/")
    @transactional
    async def handler(socket: AnySocket) -> None:
        await socket.accept()
        await socket.receive_text()
        socket.state.db.add(Child(id=1, parent_id=77))
        await socket.send_text("never")

    async with websocket(app_with(database, handler)) as socket:
        socket.send({"type": "websocket.receive", "text": "ada"})
        closed = await socket.receive()
        assert closed is not None and closed["type"] == "websocket.close"


@websocket_listener("/listener")
@transactional
async def listener(data: str, socket: AnySocket) -> str:
    socket.state.db.add(Author(name=data))
    return mode_in_force(socket)


async def test_the_mark_on_a_listener_counts(database: Database) -> None:
    async with websocket(app_with(database, listener), "/listener") as socket:
        assert await socket.ask("ada") == "transactional"
        assert await authors(str(database.url)) == ["ada"]


async def test_a_listener_takes_its_session_from_a_provider(database: Database) -> None:
    class Chat(WebsocketListener):
        path = "/"

        async def on_receive(self, data: str, db_session_transaction: Session) -> str:
            db_session_transaction.add(Author(name=data))
            return "stored"

    async with websocket(app_with(database, Chat)) as socket:
        for count, name in enumerate(["ada", "grace"], 1):
            assert await socket.ask(name) == "stored"
            assert len(await authors(str(database.url))) == count
