"""The engine's life inside the ASGI lifespan, in raw ASGI and in each framework."""

import asyncio
import functools
import gc
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import pytest
import uvicorn
import uvloop
from fastapi import FastAPI
from litestar import Litestar
from litestar import Request as LitestarRequest
from litestar import get as litestar_get
from litestar.middleware import DefineMiddleware
from sqlalchemy import insert, make_url, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import QueuePool
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from uvicorn.lifespan.on import LifespanOn

from asgi_db import Database, DBSession, DBSessionMiddleware, read_only, session_of, transactional
from asgi_db.types import ASGIApp, Message, Receive, Scope, Send
from asgi_db_fastapi import CurrentSession
from asgi_db_litestar import DatabasePlugin
from asgi_db_starlette import lifespan as with_database
from tests.contract.client import Watch, call
from tests.limits import set_limits
from tests.loops import every_loop
from tests.relay import Relay
from tests.servers import assert_disconnected, server_connections
from tests.tables import Author, Base, authors

COMPLETE = ["lifespan.startup.complete", "lifespan.shutdown.complete"]


# The server's end


class Server:
    """Starts and shuts down an application, which runs in a task of its own.

    Attributes:
        messages: what the application has sent.
        error: what came out of the application.
        state: the lifespan state.
    """

    def __init__(self, app: ASGIApp, watch: Watch | None = None) -> None:
        self.messages: list[Message] = []
        self.error: Exception | None = None
        self.state: dict[str, Any] = {}
        self._watch = watch
        self._events: asyncio.Queue[Message] = asyncio.Queue()
        self._answers: asyncio.Queue[str | None] = asyncio.Queue()
        self.task = asyncio.create_task(self._run(app))

    @property
    def types(self) -> list[str]:
        """The types of what the application has sent."""
        return [message["type"] for message in self.messages]

    async def startup(self) -> str | None:
        """Start the application, and return what it answers; None if it has ended instead."""
        self._events.put_nowait({"type": "lifespan.startup"})
        return await self._answers.get()

    async def shutdown(self) -> str | None:
        """Shut the application down, wait until it has ended, and return what it answered."""
        self._events.put_nowait({"type": "lifespan.shutdown"})
        answer = await self._answers.get()
        await self.task
        return answer

    async def _run(self, app: ASGIApp) -> None:
        scope = {
            "type": "lifespan",
            "asgi": {"version": "3.0", "spec_version": "2.0"},
            "state": self.state,
        }
        try:
            await app(scope, self._events.get, self._send)
        except Exception as error:
            self.error = error
        finally:
            self._answers.put_nowait(None)

    async def _send(self, message: Message) -> None:
        if self._watch is not None:
            await self._watch(message)
        self.messages.append(message)
        self._answers.put_nowait(message["type"])


def is_or_holds(error: Exception | None, kind: type[Exception]) -> bool:
    """Whether the error is of this kind; Litestar packs it into a group."""
    if not isinstance(error, ExceptionGroup):
        return isinstance(error, kind)
    group = cast("ExceptionGroup[Exception]", error)
    return any(is_or_holds(each, kind) for each in group.exceptions)


async def assert_no_connection(url: str) -> None:
    """Nobody is connected: SQLite keeps a `-wal` file for as long as somebody is."""
    file = make_url(url).database if "sqlite" in url else None
    deadline = time.monotonic() + 2
    while os.path.exists(f"{file}-wal"):  # noqa: ASYNC240 - nothing tells when it goes
        assert time.monotonic() < deadline, "somebody has the file open"
        await asyncio.sleep(0.01)
    await assert_disconnected(url)


def at_the_end(look: Callable[[], Awaitable[None]]) -> Watch:
    """Look at the world from within `send`, before a last message leaves."""

    async def watch(message: Message) -> None:
        if message["type"] != "lifespan.startup.complete":
            await look()

    return watch


# The applications: each answers the names of all authors


OwnLifespan = Callable[[], AbstractAsyncContextManager[Any]]
"""The application's own lifespan."""

MakeApp = Callable[[Database, OwnLifespan], ASGIApp]


@asynccontextmanager
async def no_lifespan() -> AsyncGenerator[None, None]:
    yield


async def all_names(session: DBSession) -> str:
    return ",".join((await session.scalars(select(Author.name).order_by(Author.name))).all())


async def answer_names(scope: Scope, receive: Receive, send: Send) -> None:
    """Serve a request without any framework."""
    body = (await all_names(session_of(scope))).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def bare(database: Database, lifespan: OwnLifespan) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await answer_names(scope, receive, send)
            return
        await receive()
        started = False
        try:
            async with lifespan() as state:
                scope["state"].update(state or {})
                await send({"type": "lifespan.startup.complete"})
                started = True
                await receive()
        except Exception as error:
            failed = "lifespan.shutdown.failed" if started else "lifespan.startup.failed"
            await send({"type": failed, "message": str(error)})
            raise
        await send({"type": "lifespan.shutdown.complete"})

    return DBSessionMiddleware(app, database=database)


def starlette(database: Database, lifespan: OwnLifespan) -> ASGIApp:
    async def index(request: Request) -> PlainTextResponse:
        return PlainTextResponse(await all_names(request.state.db))

    app = Starlette(routes=[Route("/", index)], lifespan=lambda _: lifespan())
    app.add_middleware(DBSessionMiddleware, database=database)
    return app


def fastapi(database: Database, lifespan: OwnLifespan) -> ASGIApp:
    app = FastAPI(lifespan=lambda _: lifespan())
    app.add_middleware(DBSessionMiddleware, database=database)

    @app.get("/", response_class=PlainTextResponse)
    async def index(session: CurrentSession) -> str:  # pyright: ignore[reportUnusedFunction]
        return await all_names(session)

    return app


@litestar_get("/")
async def litestar_index(request: LitestarRequest[Any, Any, Any]) -> str:
    return await all_names(request.state.db)


def litestar(database: Database, lifespan: OwnLifespan) -> ASGIApp:
    return Litestar(
        [litestar_index],
        plugins=[DatabasePlugin(database)],
        lifespan=[lambda _: lifespan()],
        logging_config=None,
    )


def litestar_from_outside(database: Database, lifespan: OwnLifespan) -> ASGIApp:
    app = Litestar([litestar_index], lifespan=[lambda _: lifespan()], logging_config=None)
    return DBSessionMiddleware(app, database=database)


APPS: list[MakeApp] = [bare, starlette, fastapi, litestar, litestar_from_outside]

every_app = pytest.mark.parametrize("make", APPS, ids=lambda make: make.__name__)


async def answer(app: ASGIApp, path: str = "/") -> str:
    """What a client gets for a request."""
    exchange = await call(app, path, method="GET")
    assert exchange.status == 200, exchange
    return exchange.body.decode()


def messages(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    """What the library has logged, from this level up."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "asgi_db" and record.levelno >= level
    ]


async def add(session: DBSession, name: str) -> None:
    session.add(Author(name=name))
    await session.flush()


# The engine lives around the application


@every_app
async def test_the_applications_own_startup_and_shutdown_may_use_the_database(
    make: MakeApp, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database(database_url)
    engines: list[AsyncEngine] = []
    left = list[list[str]]()

    @asynccontextmanager
    async def own() -> AsyncGenerator[None, None]:
        engines.append(database.engine)
        await database.create_tables(Base.metadata)
        async with database.transaction() as session:
            await add(session, "startup")
        async with database.session(read_only) as session:
            assert await all_names(session) == "startup"
        yield
        engines.append(database.engine)
        async with database.transaction() as session:
            assert await all_names(session) == "startup"
            await add(session, "shutdown")

    async def look() -> None:
        await assert_no_connection(database_url)
        left.append(await authors(database_url))

    app = make(database, own)
    server = Server(app, at_the_end(look))
    assert await server.startup() == "lifespan.startup.complete"
    engines.append(database.engine)
    assert await answer(app) == "startup"
    assert await server.shutdown() == "lifespan.shutdown.complete"
    assert (server.types, server.error) == (COMPLETE, None)
    assert left == [["shutdown", "startup"]]
    assert len(engines) == 3 and len(set(engines)) == 1
    assert messages(caplog) == []


@every_app
async def test_the_database_is_up_before_the_application_starts(
    make: MakeApp, postgresql_url: str
) -> None:
    """Also in an order which is not ours: the application's own startup does not touch it."""
    found: list[int] = []

    @asynccontextmanager
    async def own() -> AsyncGenerator[None, None]:
        found.append(relay.connections)
        yield

    async with Relay(postgresql_url) as relay:
        app = make(Database(relay.url, wait_for=5), own)
        server = Server(app, at_the_end(lambda: assert_no_connection(postgresql_url)))
        await server.startup()
        await server.shutdown()
    assert (server.types, found) == (COMPLETE, [1])


@every_app
async def test_an_existing_engine_is_not_disposed_at_shutdown(
    make: MakeApp, database_url: str
) -> None:
    engine = create_async_engine(database_url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    pool = engine.pool
    app = make(Database(engine=engine), no_lifespan)
    server = Server(app)
    await server.startup()
    assert await answer(app) == ""
    await server.shutdown()
    assert (server.types, server.error) == (COMPLETE, None)
    assert engine.pool is pool and isinstance(pool, QueuePool)
    assert (pool.checkedin(), pool.checkedout()) == (1, 0)
    await engine.dispose()
    await assert_no_connection(database_url)


async def test_two_databases_of_one_application_both_live_with_it(
    postgresql_url: str, mysql_url: str
) -> None:
    async def index(request: Request) -> PlainTextResponse:
        one = await request.state.db.scalar(text("SELECT 'one'"))
        other = await request.state.analytics.scalar(text("SELECT 'other'"))
        return PlainTextResponse(f"{one} {other}")

    async def look() -> None:
        for url in (postgresql_url, mysql_url):
            await assert_no_connection(url)

    app = Starlette(routes=[Route("/", index)])
    app.add_middleware(DBSessionMiddleware, database=Database(postgresql_url))
    app.add_middleware(DBSessionMiddleware, database=Database(mysql_url), key="analytics")
    server = Server(app, at_the_end(look))
    await server.startup()
    assert await answer(app) == "one other"
    assert len(await server_connections(mysql_url)) == 1
    await server.shutdown()
    assert (server.types, server.error) == (COMPLETE, None)


async def test_the_lifespan_for_an_application_without_the_middleware_does_the_same(
    database_url: str,
) -> None:
    database = Database(database_url, wait_for=5)

    @asynccontextmanager
    async def own(_: Starlette) -> AsyncGenerator[dict[str, str], None]:
        await database.create_tables(Base.metadata)
        yield {"name": "of the application"}
        async with database.transaction() as session:
            await add(session, "shutdown")

    app = Starlette(lifespan=with_database(database, own))
    server = Server(app, at_the_end(lambda: assert_no_connection(database_url)))
    await server.startup()
    assert server.state == {"name": "of the application"}
    await server.shutdown()
    assert (server.types, server.error) == (COMPLETE, None)
    assert await authors(database_url) == ["shutdown"]


# What fails in the lifespan


class Boom(Exception):
    """What goes wrong in the application."""


async def refuse_connection() -> Any:
    raise ConnectionRefusedError("the database is not ready")


@every_app
async def test_a_database_that_cannot_be_started_fails_the_startup(
    make: MakeApp, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The application is not started at all, and no connection stays."""
    started = list[str]()

    @asynccontextmanager
    async def own() -> AsyncGenerator[None, None]:
        started.append("the application")
        yield

    never_up = {"async_creator": refuse_connection}
    app = make(Database(database_url, wait_for=0.8, engine_options=never_up), own)
    server = Server(app, at_the_end(lambda: assert_no_connection(database_url)))
    assert await server.startup() == "lifespan.startup.failed"
    await server.task
    assert server.types == ["lifespan.startup.failed"]
    reason = server.messages[0]["message"]
    assert "did not come up within 0.8 s: " in reason and "the database is not ready" in reason
    assert is_or_holds(server.error, ConnectionError)
    assert started == []
    if make is not litestar:  # whose plugin is a lifespan like any other, so Litestar reports it
        (line,) = messages(caplog, logging.ERROR)
        assert line.startswith("The database could not be started: ") and line.endswith(reason)


@every_app
async def test_no_connection_is_left_when_the_applications_own_startup_fails(
    make: MakeApp, database_url: str
) -> None:
    database = Database(database_url)

    @asynccontextmanager
    async def own() -> AsyncGenerator[None, None]:
        await database.create_tables(Base.metadata)
        async with database.transaction() as session:
            await add(session, "lost")
            raise Boom("no licence")
        yield

    server = Server(make(database, own), at_the_end(lambda: assert_no_connection(database_url)))
    assert await server.startup() == "lifespan.startup.failed"
    await server.task
    assert server.types == ["lifespan.startup.failed"]
    assert "no licence" in server.messages[0]["message"]
    assert is_or_holds(server.error, Boom)
    assert await authors(database_url) == []


@every_app
async def test_no_connection_is_left_when_the_applications_own_shutdown_fails(
    make: MakeApp, database_url: str
) -> None:
    database = Database(database_url)

    @asynccontextmanager
    async def own() -> AsyncGenerator[None, None]:
        yield
        await database.ping()
        raise Boom("cannot say goodbye")

    server = Server(make(database, own), at_the_end(lambda: assert_no_connection(database_url)))
    await server.startup()
    assert await server.shutdown() == "lifespan.shutdown.failed"
    assert server.types == ["lifespan.startup.complete", "lifespan.shutdown.failed"]
    assert is_or_holds(server.error, Boom)
    await assert_no_connection(database_url)


@every_app
async def test_no_connection_is_left_when_the_server_cancels_the_lifespan(
    make: MakeApp, database_url: str
) -> None:
    database = Database(database_url, wait_for=5)
    server = Server(make(database, no_lifespan))
    await server.startup()
    await database.ping()
    assert len(await server_connections(database_url)) == ("sqlite" not in database_url)
    server.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await server.task
    await assert_no_connection(database_url)


@every_app
async def test_no_connection_is_left_when_the_server_cancels_the_startup(
    make: MakeApp, database_url: str
) -> None:
    waiting = asyncio.Event()

    class Slow(Database):
        async def start(self) -> None:
            async with self.engine.connect() as connection:
                await connection.execute(text("SELECT 1"))
                waiting.set()
                await asyncio.Event().wait()

    server = Server(make(Slow(database_url, wait_for=5), no_lifespan))
    starting = asyncio.create_task(server.startup())
    await waiting.wait()
    server.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await server.task
    assert await starting in (None, "lifespan.startup.failed")
    await assert_no_connection(database_url)


# Applications and servers that know no lifespan


async def refuse_lifespan(scope: Scope, receive: Receive, send: Send) -> None:
    assert scope["type"] == "http"
    await answer_names(scope, receive, send)


async def ignore_lifespan(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await answer_names(scope, receive, send)


async def fail_after_reading(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await receive()
        raise KeyError("path")
    await answer_names(scope, receive, send)


async def return_after_reading(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await receive()
    else:
        await answer_names(scope, receive, send)


@pytest.mark.parametrize(
    "inner", [refuse_lifespan, ignore_lifespan, fail_after_reading, return_after_reading]
)
async def test_an_application_without_a_lifespan_is_stood_in_for(
    inner: ASGIApp, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database(database_url, wait_for=5)
    app = DBSessionMiddleware(inner, database=database)
    server = Server(app, at_the_end(lambda: assert_no_connection(database_url)))
    assert await server.startup() == "lifespan.startup.complete"
    await database.create_tables(Base.metadata)
    assert await answer(app) == ""
    assert await server.shutdown() == "lifespan.shutdown.complete"
    assert (server.types, server.error) == (COMPLETE, None)
    assert messages(caplog) == []


class Failing:
    """Middleware of the application's own, which fails at startup before it calls anything."""

    def __init__(self, app: ASGIApp, *, after_reading: bool = False) -> None:
        self.app = app
        self._after_reading = after_reading

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            if self._after_reading:
                await receive()
            raise ConnectionError("the cache is not there")
        await self.app(scope, receive, send)


def failing_in_starlette(database: Database, **options: Any) -> ASGIApp:
    app = Starlette()
    app.add_middleware(Failing, **options)
    app.add_middleware(DBSessionMiddleware, database=database)
    return app


def failing_in_fastapi(database: Database, **options: Any) -> ASGIApp:
    app = FastAPI()
    app.add_middleware(Failing, **options)
    app.add_middleware(DBSessionMiddleware, database=database)
    return app


def failing_around_starlette(database: Database, **options: Any) -> ASGIApp:
    return DBSessionMiddleware(Failing(Failing(Starlette()), **options), database=database)


def failing_around_litestar(database: Database, **options: Any) -> ASGIApp:
    app = Litestar([], logging_config=None)
    return DBSessionMiddleware(Failing(app, **options), database=database)


@pytest.mark.parametrize("after_reading", [False, True], ids=["", "after_reading"])
@pytest.mark.parametrize(
    "make",
    [failing_in_starlette, failing_in_fastapi, failing_around_starlette, failing_around_litestar],
)
async def test_middleware_that_fails_at_startup_fails_it_as_without_the_database(
    make: Callable[..., ASGIApp], after_reading: bool, database_url: str
) -> None:
    """What the server makes of it is the server's business: uvicorn does not serve with "on"."""
    database = Database(database_url, wait_for=5)
    server = Server(make(database, after_reading=after_reading))
    assert await server.startup() is None
    await server.task
    assert (server.types, str(server.error)) == ([], "the cache is not there")
    await assert_no_connection(database_url)


@pytest.mark.parametrize("make", [failing_in_starlette, failing_around_litestar])
async def test_uvicorn_does_not_serve_where_it_insists_on_the_lifespan(
    make: Callable[..., ASGIApp], sqlite_url: str
) -> None:
    config = uvicorn.Config(make(Database(sqlite_url)), lifespan="on", log_config=None)
    config.load()
    lifespan = LifespanOn(config)
    await lifespan.startup()
    assert lifespan.should_exit


def litestar_without_plugin(database: Database, lifespan: OwnLifespan) -> ASGIApp:
    middleware = DefineMiddleware(DBSessionMiddleware, database=database)
    return Litestar([litestar_index], middleware=[middleware], logging_config=None)


@pytest.mark.parametrize("make", [*APPS, litestar_without_plugin], ids=lambda make: make.__name__)
async def test_where_the_server_sends_no_lifespan_the_engine_is_made_at_first_use(
    make: MakeApp, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Database(database_url) as tables:
        await tables.create_tables(Base.metadata)
    await assert_no_connection(database_url)
    database = Database(database_url)
    app = make(database, no_lifespan)
    for _ in range(3):
        assert await answer(app) == ""
    assert len(await server_connections(database_url)) == ("sqlite" not in database_url)
    await database.dispose()
    await assert_no_connection(database_url)
    assert messages(caplog) == []


def mounted_starlette(inner: ASGIApp, outer: Database | None) -> ASGIApp:
    routes = [Mount("/shop", inner)]
    return Starlette(routes=routes, lifespan=None if outer is None else with_database(outer))


def mounted_fastapi(inner: ASGIApp, outer: Database | None) -> ASGIApp:
    app = FastAPI(lifespan=None if outer is None else with_database(outer))
    app.mount("/shop", inner)
    return app


@pytest.mark.parametrize("mount", [mounted_starlette, mounted_fastapi])
@pytest.mark.parametrize("make", [bare, starlette, fastapi])
async def test_a_mounted_sub_application_works_without_a_lifespan_of_its_own(
    make: MakeApp, mount: Callable[[ASGIApp, Database | None], ASGIApp], database_url: str
) -> None:
    """No framework hands the lifespan down: the engine is made at first use."""
    database = Database(database_url)
    app = mount(make(database, no_lifespan), None)
    server = Server(app)
    assert await server.startup() == "lifespan.startup.complete"
    await database.create_tables(Base.metadata)
    assert await answer(app, "/shop/") == ""
    assert await server.shutdown() == "lifespan.shutdown.complete"
    await database.dispose()
    await assert_no_connection(database_url)


@pytest.mark.parametrize("mount", [mounted_starlette, mounted_fastapi])
async def test_the_outer_application_can_own_the_database_of_a_mounted_one(
    mount: Callable[[ASGIApp, Database | None], ASGIApp], database_url: str
) -> None:
    database = Database(database_url)
    app = mount(starlette(database, no_lifespan), database)
    server = Server(app, at_the_end(lambda: assert_no_connection(database_url)))
    await server.startup()
    await database.create_tables(Base.metadata)
    assert await answer(app, "/shop/") == ""
    await server.shutdown()
    assert (server.types, server.error) == (COMPLETE, None)


# A second start in the same process


def run_on_a_new_loop(
    main: Callable[[], Coroutine[Any, Any, None]],
    new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
) -> None:
    """Run to the end, and close the loop without a word to anybody, as a process does not."""
    loop = new_loop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()


@every_app
def test_an_application_starts_again_on_another_loop_after_its_shutdown(
    make: MakeApp, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database(database_url)
    app = make(database, no_lifespan)

    async def serve() -> None:
        server = Server(app, at_the_end(lambda: assert_no_connection(database_url)))
        assert await server.startup() == "lifespan.startup.complete"
        await database.create_tables(Base.metadata)
        assert await answer(app) == ""
        assert await server.shutdown() == "lifespan.shutdown.complete"
        assert server.error is None

    for _ in range(3):
        run_on_a_new_loop(serve)
    assert messages(caplog) == []


def abandons_a_loop(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that closes a loop under its connections, of which asyncio itself complains."""

    @functools.wraps(test)
    def collecting(**fixtures: Any) -> None:
        test(**fixtures)
        gc.collect()

    for complaint in ("unclosed", ".* was deleted before being closed"):
        pytest.mark.filterwarnings(f"ignore:{complaint}:ResourceWarning")(collecting)
    return collecting


@every_app
@abandons_a_loop
def test_an_application_starts_again_on_another_loop_though_it_was_never_shut_down(
    make: MakeApp, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And the connections which the earlier loops have left behind are gone then."""
    abandon_twice_then_serve(make, database_url, asyncio.new_event_loop, caplog)


@abandons_a_loop
def test_so_it_does_on_uvloop(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    abandon_twice_then_serve(starlette, database_url, uvloop.new_event_loop, caplog)


def abandon_twice_then_serve(
    make: MakeApp,
    database_url: str,
    new_loop: Callable[[], asyncio.AbstractEventLoop],
    caplog: pytest.LogCaptureFixture,
) -> None:
    database = Database(database_url)
    app = make(database, no_lifespan)
    connected = list[int]()

    async def abandon() -> None:
        await database.create_tables(Base.metadata)
        assert await answer(app) == ""

    async def serve() -> None:
        server = Server(app, at_the_end(lambda: assert_no_connection(database_url)))
        assert await server.startup() == "lifespan.startup.complete"
        assert await answer(app) == ""
        connected.append(len(await server_connections(database_url)))
        assert await server.shutdown() == "lifespan.shutdown.complete"
        assert server.error is None

    run_on_a_new_loop(abandon, new_loop)
    run_on_a_new_loop(abandon, new_loop)
    run_on_a_new_loop(serve, new_loop)
    assert connected == [0 if "sqlite" in database_url else 1]
    assert messages(caplog) == []  # nobody had them


@pytest.mark.filterwarnings("ignore:The garbage collector is trying to clean up")
@pytest.mark.parametrize("forgotten", [False, True], ids=["kept", "forgotten"])
@abandons_a_loop
def test_a_transaction_that_its_loop_has_left_behind_ends_at_the_server_too(
    forgotten: bool, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database(database_url)
    taken = list[AsyncConnection]()

    async def abandon() -> None:
        await database.create_tables(Base.metadata)
        connection = await database.engine.connect()
        await connection.execute(insert(Author).values(name="lost"))
        taken.append(connection)

    async def serve() -> None:
        async with database, database.transaction() as session:
            await add(session, "next")
        await assert_no_connection(database_url)
        assert await authors(database_url) == ["next"]

    run_on_a_new_loop(abandon)
    if forgotten:
        taken.clear()
        gc.collect()
    run_on_a_new_loop(serve)
    assert [record for record in caplog.records if record.exc_info] == []
    if not forgotten:
        (line,) = messages(caplog)
        assert "They were held by: the engine, without a session for " in line


def test_two_loops_at_the_same_time_have_an_engine_each(database_url: str) -> None:
    """A test client runs the application in a thread of its own, beside the test's loop."""
    database = Database(database_url)
    app = starlette(database, no_lifespan)

    async def serve() -> AsyncEngine:
        server = Server(app)
        await server.startup()
        engine = database.engine
        assert await answer(app) == ""
        await server.shutdown()
        return engine

    async def main() -> None:
        async with database:
            await database.create_tables(Base.metadata)
            mine = database.engine
            assert await asyncio.to_thread(asyncio.run, serve()) is not mine
            assert database.engine is mine
            async with database.session() as session:
                assert await all_names(session) == ""

    run_on_a_new_loop(main)


# Connections which are out at shutdown


@dataclass
class Straggler:
    """A task which holds a transaction open."""

    task: "asyncio.Task[None]"
    finish: asyncio.Event

    @classmethod
    async def begin(cls, database: Database, name: str) -> "Straggler":
        """Begin, and write."""
        begun, finish = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            async with database.session(transactional) as session:
                await add(session, name)
                begun.set()
                await finish.wait()

        task = asyncio.create_task(hold())
        await asyncio.wait(
            (task, asyncio.ensure_future(begun.wait())), return_when="FIRST_COMPLETED"
        )
        assert begun.is_set()
        return cls(task, finish)


@every_app
@pytest.mark.timing
async def test_a_connection_that_stays_out_is_terminated_within_the_bound(
    make: MakeApp,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whoever has it gets an error, also at COMMIT."""
    set_limits(monkeypatch, dispose=0.2)
    await shut_down_under_a_straggler(make, database_url)
    (line, *rollback) = messages(caplog)
    assert line.startswith("1 connections were terminated")
    assert all("COMMIT failed" in line or "ROLLBACK failed" in line for line in rollback)


@every_loop
async def test_so_it_is_on_every_loop(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_limits(monkeypatch, dispose=0.2)
    await shut_down_under_a_straggler(starlette, database_url)


async def shut_down_under_a_straggler(make: MakeApp, database_url: str) -> None:
    database = Database(database_url)
    server = Server(
        make(database, no_lifespan), at_the_end(lambda: assert_no_connection(database_url))
    )
    await server.startup()
    await database.create_tables(Base.metadata)
    straggler = await Straggler.begin(database, "lost")
    before = time.monotonic()
    assert await server.shutdown() == "lifespan.shutdown.complete"
    assert time.monotonic() - before >= 0.2
    assert server.error is None
    straggler.finish.set()
    with pytest.raises(SQLAlchemyError):
        await asyncio.wait_for(straggler.task, 5)
    assert await authors(database_url) == []
    await assert_no_connection(database_url)


@every_app
async def test_the_shutdown_waits_for_a_connection_that_comes_back(
    make: MakeApp, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database(database_url)
    server = Server(
        make(database, no_lifespan), at_the_end(lambda: assert_no_connection(database_url))
    )
    await server.startup()
    await database.create_tables(Base.metadata)
    straggler = await Straggler.begin(database, "in time")
    asyncio.get_running_loop().call_later(0.1, straggler.finish.set)
    assert await server.shutdown() == "lifespan.shutdown.complete"
    await straggler.task
    assert await authors(database_url) == ["in time"]
    assert messages(caplog) == []


async def test_the_shutdown_leaves_a_connection_alone_that_was_detached_from_the_pool(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As one does to LISTEN on it."""
    async with Database(database_url) as database, database.engine.connect() as connection:
        (await connection.get_raw_connection()).detach()
        assert (database.stats().holders, database.stats().pool.idle) == ((), 0)
        await database.dispose()
        await connection.execute(text("SELECT 1"))
    assert messages(caplog) == []
    await assert_no_connection(database_url)


# wait_for


def tries(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """The lines which say that the database is not there yet."""
    return [record for record in caplog.records if "is not there yet" in record.getMessage()]


@every_app
@pytest.mark.timing
async def test_a_database_that_does_not_come_up_is_tried_again_and_then_a_clear_failure(
    make: MakeApp, server_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    relay = Relay(server_url)  # which is never started, so its port refuses
    server = Server(make(Database(relay.url, wait_for=0.5), no_lifespan))
    before = time.monotonic()
    assert await server.startup() == "lifespan.startup.failed"
    assert time.monotonic() - before >= 0.5
    await server.task
    assert is_or_holds(server.error, ConnectionError)
    assert "did not come up within 0.5 s" in server.messages[0]["message"]
    assert str(make_url(relay.url).port) in server.messages[0]["message"]
    assert 1 <= len(tries(caplog)) <= 5  # at its busiest the machine has time for one
    for line in tries(caplog):
        assert line.exc_info is None
        assert "\n" not in line.getMessage()
        assert str(make_url(relay.url).port) in line.getMessage()
    await relay.stop()


@contextmanager
def first_log_line() -> Generator[asyncio.Event, None, None]:
    """An event which is set as soon as the library logs anything."""
    logged = asyncio.Event()

    class Hear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.set()

    hear = Hear()
    logging.getLogger("asgi_db").addHandler(hear)
    try:
        yield logged
    finally:
        logging.getLogger("asgi_db").removeHandler(hear)


@every_app
async def test_a_database_that_comes_up_later_is_waited_for(
    make: MakeApp, server_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Database(server_url) as tables:
        await tables.create_tables(Base.metadata)
    relay = Relay(server_url)
    app = make(Database(relay.url, wait_for=30), no_lifespan)
    server = Server(app, at_the_end(lambda: assert_no_connection(server_url)))
    with first_log_line() as refused:
        starting = asyncio.create_task(server.startup())
        await refused.wait()
        assert not starting.done()
        await relay.start()
        assert await starting == "lifespan.startup.complete"
    assert relay.connections == 1
    assert await answer(app) == ""
    assert await server.shutdown() == "lifespan.shutdown.complete"
    assert len(tries(caplog)) >= 1
    await relay.stop()


async def test_a_database_behind_a_proxy_that_sends_clients_away_is_waited_for(
    server_url: str,
) -> None:
    """The proxy is there from the beginning, but it has nobody to forward to."""
    relay = Relay(server_url)
    async with Relay(relay.url) as proxy:
        server = Server(bare(Database(proxy.url, wait_for=30), no_lifespan))
        with first_log_line() as refused:
            starting = asyncio.create_task(server.startup())
            await asyncio.wait(
                (starting, asyncio.ensure_future(refused.wait())),
                return_when=asyncio.FIRST_COMPLETED,
            )
            await relay.start()
            assert await starting == "lifespan.startup.complete"
        assert await server.shutdown() == "lifespan.shutdown.complete"
    await relay.stop()


@pytest.mark.timing
async def test_a_database_that_takes_connections_but_never_answers_fails_in_time(
    server_url: str,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = make_url(server_url).set(host="127.0.0.1", port=silent.getsockname()[1])
        server = Server(bare(Database(url, wait_for=0.5), no_lifespan))
        before = time.monotonic()
        assert await asyncio.wait_for(server.startup(), 15) == "lifespan.startup.failed"
        assert time.monotonic() - before >= 0.5
        await server.task
        assert "did not come up within 0.5 s: " in server.messages[0]["message"]


async def test_without_wait_for_an_application_starts_though_its_database_is_down(
    server_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its other routes work, and the rest from the moment at which the database does."""
    async with Database(server_url) as tables:
        await tables.create_tables(Base.metadata)

    async def hello(_: Request) -> PlainTextResponse:
        return PlainTextResponse("hello")

    relay = Relay(server_url)
    inner = starlette(Database(relay.url), no_lifespan)
    app = Starlette(routes=[Route("/hello", hello), Mount("/", inner)])
    server = Server(app)
    assert await server.startup() == "lifespan.startup.complete"
    assert await answer(app, "/hello") == "hello"
    assert (await call(app, method="GET")).status == 503
    assert await answer(app, "/hello") == "hello"
    await relay.start()
    assert await answer(app) == ""
    await server.shutdown()
    assert tries(caplog) == []
    await relay.stop()


# Keys that collide


@pytest.mark.parametrize("make", [bare, starlette, fastapi])
async def test_a_state_key_that_collides_is_one_clear_line_in_the_log(
    make: MakeApp, sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    @asynccontextmanager
    async def own() -> AsyncGenerator[dict[str, object], None]:
        yield {"db": "the application's own", "other": 1}

    database = Database(sqlite_url)
    app = make(database, own)
    server = Server(app)
    assert await server.startup() == "lifespan.startup.complete"
    await database.create_tables(Base.metadata)
    for _ in range(2):
        assert await answer(app) == ""
    await server.shutdown()
    (line,) = messages(caplog)
    assert "lifespan puts 'db' into the state" in line
    assert "DBSessionMiddleware(key=...)" in line


@pytest.mark.parametrize("make", [bare, starlette, fastapi])
async def test_a_lifespan_state_without_the_key_is_left_alone(
    make: MakeApp, sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    @asynccontextmanager
    async def own() -> AsyncGenerator[dict[str, object], None]:
        yield {"database": "the application's own"}

    server = Server(make(Database(sqlite_url), own))
    await server.startup()
    assert server.state == {"database": "the application's own"}
    await server.shutdown()
    assert (server.types, server.error) == (COMPLETE, None)
    assert messages(caplog) == []


async def test_only_the_middleware_whose_key_collides_reports_it(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    @asynccontextmanager
    async def own(_: Starlette) -> AsyncGenerator[dict[str, object], None]:
        yield {"analytics": "the application's own"}

    app = Starlette(lifespan=own)
    app.add_middleware(DBSessionMiddleware, database=Database(sqlite_url))
    app.add_middleware(DBSessionMiddleware, database=Database("sqlite://"), key="analytics")
    server = Server(app)
    await server.startup()
    await server.shutdown()
    (line,) = messages(caplog)
    assert "'analytics'" in line


@pytest.mark.parametrize("make_app", [Starlette, FastAPI])
async def test_one_application_whose_stack_of_middlewares_is_built_twice_has_one_database(
    make_app: Callable[[], Starlette], database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As instrumentation does it, before or after the startup."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    found: list[object] = []

    async def read(request: Request) -> PlainTextResponse:
        session: DBSession = request.state.db
        found.extend((await session.scalar(text("SELECT 1")), session.bind))
        return PlainTextResponse("")

    app = make_app()
    app.add_route("/", read, methods=["POST"])
    app.add_middleware(DBSessionMiddleware)
    app.middleware_stack = app.build_middleware_stack()
    server = Server(app)
    assert await server.startup() == "lifespan.startup.complete"
    assert (await call(app)).status == 200
    app.middleware_stack = app.build_middleware_stack()
    assert (await call(app)).status == 200
    assert await server.shutdown() == "lifespan.shutdown.complete"
    assert found == [1, found[1], 1, found[1]]
    await assert_disconnected(database_url)


async def test_applications_that_the_environment_configures_otherwise_have_others(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None: ...

    databases: list[Database] = []
    for url in sqlite_url, f"{sqlite_url}.other", sqlite_url:
        monkeypatch.setenv("DATABASE_URL", url)
        databases.append(DBSessionMiddleware(app).database)
    monkeypatch.setenv("DATABASE_ECHO", "true")
    databases.append(DBSessionMiddleware(app).database)
    assert databases[0] is databases[2]
    assert len(set(databases)) == 3
