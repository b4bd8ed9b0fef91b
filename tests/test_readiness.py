"""Readiness: whether the next request can be served, told truthfully, and never late."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextlib import (
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)

import fastapi
import litestar
import litestar.handlers
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from starlette.applications import Starlette
from starlette.routing import Mount, Route

from asgi_db import (
    Database,
    DatabaseBusyError,
    DatabaseDownError,
    DBSessionMiddleware,
    Readiness,
)
from asgi_db.types import ASGIApp, Message, Receive, Scope, Send
from tests import servers
from tests.contract.client import Exchange, call
from tests.limits import set_limits
from tests.pools import checked_out
from tests.relay import Fate, Relay, nth
from tests.servers import DatabaseServer, assert_disconnected, assert_idle, server_connections

POOL = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 60}
SELECT_1 = text("SELECT 1")


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A database whose requests wait for a connection for a minute."""
    async with Database(database_url, engine_options=POOL) as database:
        yield database


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What answers has the time for it, however busy the machine is."""
    set_limits(monkeypatch, ping=20)


@contextmanager
def in_vain(seconds: float = 0.3) -> Generator[None]:
    """What will not answer is not waited for long."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_limits(monkeypatch, ping=seconds)
        yield


def while_exhausted() -> AbstractContextManager[None]:
    """The pool is waited for in vain, and then the server has as long to answer another client."""
    return in_vain(1)


@asynccontextmanager
async def exhausted(database: Database, by: int = 2) -> AsyncGenerator[None, None]:
    """Sessions have all the connections of the pool."""
    async with AsyncExitStack() as stack:
        for _ in range(by):
            session = await stack.enter_async_context(database.session())
            await session.execute(SELECT_1)
        yield


async def ask(app: ASGIApp, path: str = "/ready", method: str = "GET") -> Exchange:
    """Ask whether it is ready; an answer that does not come fails the test."""
    async with asyncio.timeout(60):
        exchange = await call(app, path, method=method)
    assert (exchange.complete, exchange.error) == (True, None)
    return exchange


def said(exchange: Exchange) -> tuple[int, str]:
    """The status, and what the body says in a word; the form is checked too."""
    headers: dict[bytes, bytes] = dict(exchange.messages[0]["headers"])
    body = json.loads(exchange.body)
    assert int(headers[b"content-length"]) == len(exchange.body)
    if exchange.status == 200:
        assert headers[b"content-type"] == b"application/json"
        assert b"retry-after" not in headers
        assert body == {"status": "ready"}
        return 200, "ready"
    assert headers[b"content-type"] == b"application/problem+json"
    assert int(headers[b"retry-after"]) > 0
    assert body.pop("detail")
    reason: str = body.pop("reason")
    assert body == {"type": "about:blank", "title": "Service Unavailable", "status": 503}
    return exchange.status, reason


# -- in each framework -------------------------------------------------------------------------


def bare(database: Database) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["path"] == "/ready"
        await readiness(scope, receive, send)

    readiness = Readiness(database)
    return DBSessionMiddleware(app, database)


def starlette_route(database: Database) -> ASGIApp:
    app = Starlette(routes=[Route("/ready", Readiness(database))])
    app.add_middleware(DBSessionMiddleware, database=database)
    return app


def starlette_mount(database: Database) -> ASGIApp:
    return Starlette(routes=[Mount("/ready", Readiness(database))])


def fastapi_route(database: Database) -> ASGIApp:
    app = fastapi.FastAPI()
    app.add_middleware(DBSessionMiddleware, database=database)
    app.add_route("/ready", Readiness(database))  # type: ignore[arg-type]
    return app


def fastapi_mount(database: Database) -> ASGIApp:
    app = fastapi.FastAPI()
    app.mount("/ready", Readiness(database))
    return app


def litestar_mount(database: Database) -> ASGIApp:
    readiness = litestar.handlers.asgi("/ready", is_mount=True, copy_scope=True)(
        Readiness(database).__call__
    )
    return litestar.Litestar([readiness], openapi_config=None, logging_config=None)


def litestar_route(database: Database) -> ASGIApp:
    readiness = litestar.handlers.asgi("/ready", copy_scope=True)(Readiness(database).__call__)
    app = litestar.Litestar([readiness], openapi_config=None, logging_config=None)
    return DBSessionMiddleware(app, database)


APPS: list[Callable[[Database], ASGIApp]] = [
    bare,
    starlette_route,
    starlette_mount,
    fastapi_route,
    fastapi_mount,
    litestar_mount,
    litestar_route,
]


@pytest.mark.parametrize("make", APPS, ids=lambda make: make.__name__)
@pytest.mark.usefixtures("patient")
async def test_it_says_ready_busy_or_down_in_every_framework(
    make: Callable[[Database], ASGIApp], server_url: str
) -> None:
    path = "/ready/" if "mount" in make.__name__ else "/ready"
    async with Relay(server_url) as relay, Database(relay.url, engine_options=POOL) as database:
        app = make(database)
        assert said(await ask(app, path)) == (200, "ready")
        async with exhausted(database):
            with while_exhausted():
                assert said(await ask(app, path)) == (503, "busy")
        relay.refuse()
        relay.cut()
        with in_vain():
            assert said(await ask(app, path)) == (503, "down")
        await relay.start()
        assert said(await ask(app, path)) == (200, "ready")
        assert checked_out(database) == 0


# -- the truth in each state -------------------------------------------------------------------


async def test_a_database_that_answers_is_ready_as_often_as_it_is_asked(
    database: Database, database_url: str
) -> None:
    app = Readiness(database)
    for _ in range(5):
        assert said(await ask(app)) == (200, "ready")
        assert checked_out(database) == 0
    assert len(await server_connections(database_url)) <= 1
    await assert_idle(database_url)


@pytest.mark.usefixtures("patient")
async def test_an_exhausted_pool_is_busy_until_a_connection_comes_back(
    database: Database, database_url: str
) -> None:
    """It does not wait for the pool, whose own limit is a minute here."""
    app = Readiness(database)
    async with exhausted(database, by=1):
        assert said(await ask(app)) == (200, "ready")
    async with exhausted(database):
        before = len(await server_connections(database_url))
        for _ in range(3):
            with while_exhausted():
                assert said(await ask(app)) == (503, "busy")
            assert checked_out(database) == 2
        await _no_more_than(database_url, before)
    assert said(await ask(app)) == (200, "ready")
    assert checked_out(database) == 0


async def _no_more_than(url: str, number: int) -> None:
    """Wait until the connection which it made for itself is closed."""
    async with asyncio.timeout(30):
        while True:
            if len(await server_connections(url)) <= number:
                return
            await asyncio.sleep(0.01)


@pytest.mark.usefixtures("patient")
async def test_the_error_of_a_ping_names_who_holds_the_pool(database: Database) -> None:
    async with exhausted(database):
        with (
            while_exhausted(),
            pytest.raises(DatabaseBusyError, match=r"database\.session\(\)` for \d"),
        ):
            await database.ping()


@pytest.mark.usefixtures("patient")
async def test_an_exhausted_pool_before_a_server_that_has_gone_is_down(server_url: str) -> None:
    """Sessions hold all connections, which do not know yet that they are dead."""
    async with Relay(server_url) as relay, Database(relay.url, engine_options=POOL) as database:
        async with exhausted(database):
            relay.refuse()
            with in_vain():
                assert said(await ask(Readiness(database))) == (503, "down")
            await relay.start()
            with while_exhausted():
                assert said(await ask(Readiness(database))) == (503, "busy")
        assert said(await ask(Readiness(database))) == (200, "ready")


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("held", [0, 1, 2])
async def test_a_frozen_network_is_down_and_ready_again_when_it_thaws(
    server_url: str, held: int
) -> None:
    """Whatever is in the pool: idle connections, or none that is free."""
    async with Relay(server_url) as relay, Database(relay.url, engine_options=POOL) as database:
        async with exhausted(database):
            pass
        async with exhausted(database, by=held):
            relay.freeze()
            for _ in range(2):
                with in_vain():
                    assert said(await ask(Readiness(database))) == (503, "down")
                assert checked_out(database) == held
            relay.thaw()
        assert said(await ask(Readiness(database))) == (200, "ready")
        async with exhausted(database):  # its full size
            pass
        assert checked_out(database) == 0
        await assert_idle(server_url)


@pytest.mark.usefixtures("patient")
async def test_a_network_that_is_frozen_before_the_first_connection_is_down(
    server_url: str,
) -> None:
    async with Relay(server_url) as relay:
        async with Database(relay.url, engine_options=POOL) as database:
            relay.freeze()
            with in_vain():
                assert said(await ask(Readiness(database))) == (503, "down")
            assert checked_out(database) == 0
            relay.thaw()
            assert said(await ask(Readiness(database))) == (200, "ready")
        await assert_disconnected(server_url)


@pytest.fixture(params=[servers.postgresql, servers.mariadb], scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[DatabaseServer]:
    """A server that may be restarted and frozen."""
    with request.param(own=True) as server:
        yield server


@pytest.mark.usefixtures("patient")
async def test_a_server_which_is_stopped_frozen_and_started_is_seen_as_it_is(
    server: DatabaseServer,
) -> None:
    with server.empty_database() as url:
        async with Database(url, engine_options=POOL) as database:
            app = Readiness(database)
            assert said(await ask(app)) == (200, "ready")
            await asyncio.to_thread(server.stop, "immediate")
            try:
                assert said(await ask(app)) == (503, "down")
            finally:
                await asyncio.to_thread(server.start)
            assert said(await ask(app)) == (200, "ready")
            with server.frozen(), in_vain():
                assert said(await ask(app)) == (503, "down")
            assert said(await ask(app)) == (200, "ready")
            async with exhausted(database):
                with while_exhausted():
                    assert said(await ask(app)) == (503, "busy")
            assert checked_out(database) == 0


@pytest.mark.parametrize("fate", [Fate.LOST, Fate.ANSWER_LOST])
async def test_a_connection_that_breaks_while_it_asks_is_down_once(
    server_url: str, fate: Fate, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limits(monkeypatch, ping=20)
    async with Relay(server_url) as relay, Database(relay.url, engine_options=POOL) as database:
        await database.ping()
        relay.fate_of = nth(1, fate)
        with pytest.raises(DatabaseDownError):
            await database.ping()
        await database.ping()
        assert checked_out(database) == 0


async def test_a_dead_connection_in_the_pool_does_not_make_the_database_down(
    server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limits(monkeypatch, verify_after_idle=-1)
    async with Relay(server_url) as relay, Database(relay.url, engine_options=POOL) as database:
        for _ in range(3):
            await database.ping()
            relay.cut()
        await database.ping()


async def test_checks_at_the_same_time_do_not_take_each_other_for_load(
    database: Database, database_url: str
) -> None:
    exchanges = await asyncio.gather(*(ask(Readiness(database)) for _ in range(20)))
    assert {said(exchange) for exchange in exchanges} == {(200, "ready")}
    assert checked_out(database) == 0
    await assert_idle(database_url)


async def test_a_check_that_is_cancelled_leaves_nothing(server_url: str) -> None:
    async with Relay(server_url) as relay, Database(relay.url, engine_options=POOL) as database:
        await database.ping()
        for holding in (0, 2):
            async with exhausted(database, by=holding):
                relay.freeze()
                asking = asyncio.create_task(database.ping())
                await relay.holds_something.wait()
                asking.cancel()
                await asyncio.wait((asking,))
                assert asking.cancelled()
                relay.thaw()
            assert checked_out(database) == 0
        await database.ping()
        await database.dispose()
        await assert_disconnected(server_url)


async def test_the_engine_of_ones_own_is_asked_too(database_url: str) -> None:
    engine = create_async_engine(database_url, poolclass=NullPool)
    async with Database(engine=engine) as database:
        assert said(await ask(Readiness(database))) == (200, "ready")
    await engine.dispose()


async def test_a_database_that_is_down_is_told_without_its_address_or_password(
    postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    relay = Relay(postgresql_url)  # never started
    async with Database(relay.url) as database:
        exchange = await ask(Readiness(database))
    assert said(exchange) == (503, "down")
    assert b"127.0.0.1" not in exchange.body and b"tester" not in exchange.body
    assert "password" not in caplog.text
    await relay.stop()


# -- as an ASGI application --------------------------------------------------------------------


@pytest.mark.usefixtures("patient")
async def test_a_head_request_gets_the_same_headers(database: Database) -> None:
    app = Readiness(database)
    get, head = await ask(app), await ask(app, method="HEAD")
    assert head.status == get.status == 200
    assert dict(head.messages[0]["headers"]) == dict(get.messages[0]["headers"])
    async with exhausted(database):
        with while_exhausted():
            get, head = await ask(app), await ask(app, method="HEAD")
        assert head.status == get.status == 503
        assert dict(head.messages[0]["headers"]) == dict(get.messages[0]["headers"])


async def test_no_cache_keeps_the_answer(database: Database) -> None:
    headers = dict((await ask(Readiness(database))).messages[0]["headers"])
    assert headers[b"cache-control"] == b"no-store"


async def test_a_websocket_is_turned_away(database: Database) -> None:
    messages: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        messages.append(message)

    await Readiness(database)({"type": "websocket", "path": "/ready"}, receive, send)
    assert [message["type"] for message in messages] == ["websocket.close"]


async def test_it_takes_no_part_in_a_lifespan_or_in_what_it_does_not_know(
    database: Database,
) -> None:
    async def never(_: object = None) -> Message:
        raise AssertionError("it has nothing to say, and nothing to hear")

    for kind in ("lifespan", "something new"):
        await Readiness(database)({"type": kind}, never, never)
