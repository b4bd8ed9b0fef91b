"""Requests that are cancelled while the server commits, and what is to come of them after that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import litestar
import litestar.response
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from asgi_db import Database, DBSession, DBSessionMiddleware, transactional
from asgi_db.types import ASGIApp, Message, Receive, Scope, Send
from asgi_db_litestar import DatabasePlugin
from asgi_db_starlette import get_session
from tests.cancelling import POOL, WAYS, Site, answer, each_way, emptied, tables_on, turns
from tests.chaos.cancellation import cancellable
from tests.contract.client import scope_of
from tests.limits import set_limits
from tests.servers import DatabaseServer, assert_idle, until_active
from tests.tables import Author, Child, Deferred, Parent, authors, commits_held_back


@pytest.fixture(scope="module")
def module_url(postgresql_server: DatabaseServer) -> Iterator[str]:
    """One database for all tests of this module, to save time."""
    with tables_on(postgresql_server) as url:
        yield url


@pytest.fixture
async def site(module_url: str) -> AsyncIterator[Site]:
    async with Database(emptied(module_url), engine_options=POOL) as database:
        await database.create_tables(Deferred.metadata)
        yield Site(module_url, database)
        await assert_idle(module_url)


async def cancelled_in_its_commit(
    site: Site, app: ASGIApp, way: str, spec_version: str = "2.3"
) -> None:
    """Serve a request, and cancel it while the server works at its COMMIT, which then goes on."""
    async with commits_held_back(site.url) as let_go:
        request = asyncio.create_task(site.serve(app, spec_version))
        await until_active(site.url, "COMMIT")
        site.cancel()
        if way == "twice":
            await turns(3)
            site.cancel()
        await let_go()
        await site.assert_cancelled(request, way)


# -- a stream which waits for something to send ------------------------------------------------


async def events() -> AsyncIterator[str]:
    """Server-sent events, of which none comes."""
    await asyncio.Event().wait()
    yield "never"


def in_starlette(database: Database) -> ASGIApp:
    @transactional
    async def endpoint(request: Request) -> Response:
        get_session(request).add(Author(name="ada"))
        return StreamingResponse(events(), 201)

    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    app.add_middleware(DBSessionMiddleware, database=database)
    return app


def in_litestar(database: Database) -> ASGIApp:
    @litestar.post("/")
    @transactional
    async def endpoint(request: litestar.Request[Any, Any, Any]) -> litestar.response.Stream:
        request.state.db.add(Author(name="ada"))
        return litestar.response.Stream(events())

    return litestar.Litestar(
        [endpoint], plugins=[DatabasePlugin(database)], openapi_config=None, logging_config=None
    )


def in_asgi(database: Database) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["db"].add(Author(name="ada"))
        await send({"type": "http.response.start", "status": 201, "headers": []})
        async for event in events():
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})

    return DBSessionMiddleware(app, database, mode=transactional)


@pytest.mark.parametrize(
    ("framework", "spec_version", "way"),
    [
        *[(in_starlette, "2.3", way) for way in WAYS],  # which streams in a task of its own
        *[(in_starlette, "2.4", way) for way in ("task", "scope")],
        *[(in_litestar, "2.3", way) for way in ("task", "scope")],
        *[(in_asgi, "2.3", way) for way in ("task", "scope")],
    ],
)
async def test_cancelled_during_its_commit_a_stream_that_waits_begins_and_ends(
    site: Site, framework: Callable[[Database], ASGIApp], spec_version: str, way: str
) -> None:
    app = cancellable(way, framework(site.database), site)
    await cancelled_in_its_commit(site, app, way, spec_version)
    assert site.delivered == ["http.response.start"]
    assert await authors(site.url) == ["ada"]


# -- another task which sends to the same socket -----------------------------------------------


async def test_a_broadcast_is_not_cancelled_in_place_of_the_handler_whose_answer_leaves_slowly(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limits(monkeypatch, delivery=60)
    sends: list[Send] = []
    leaving, has_left = asyncio.Event(), asyncio.Event()
    went_on = False

    async def chat(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal went_on
        sends.append(send)
        session: DBSession = scope["state"]["db"]
        session.add(Author(name="ada"))
        await session.flush()
        await send({"type": "websocket.send", "text": "stored"})
        went_on = True

    async def receive() -> Message:
        raise AssertionError("nobody is to receive")

    async def deliver(message: Message) -> None:
        if message["text"] == "stored":
            leaving.set()
            await has_left.wait()

    async def broadcast() -> None:
        await sends[0]({"type": "websocket.send", "text": "news"})

    app = DBSessionMiddleware(chat, site.database, mode=transactional)
    scope = scope_of("websocket", "ws", "/", "2.3")
    scope["subprotocols"] = []
    async with commits_held_back(site.url) as let_go:
        handling = asyncio.create_task(app(scope, receive, deliver))
        await until_active(site.url, "COMMIT")
        handling.cancel()
        await let_go()
        await leaving.wait()
        broadcasting = asyncio.create_task(broadcast())
        await asyncio.wait((broadcasting,), timeout=20)
        has_left.set()
        await asyncio.wait((handling,), timeout=20)
    assert broadcasting.done()
    assert not broadcasting.cancelled()
    assert broadcasting.exception() is None
    assert handling.cancelled()
    assert not went_on
    assert await authors(site.url) == ["ada"]


# -- a COMMIT that fails -----------------------------------------------------------------------


@each_way
async def test_cancelled_during_a_commit_that_fails_it_is_not_answered_as_if_it_had_succeeded(
    site: Site, way: str
) -> None:
    """Another one, by hand, has succeeded before it."""

    async def endpoint(session: DBSession, send: Send) -> None:
        session.add(Parent())
        await session.commit()
        session.add(Author(name="ada"))  # makes the COMMIT wait
        session.add(Child(id=1, parent_id=404))  # makes it fail
        await answer(send)

    await cancelled_in_its_commit(site, site.app(endpoint, way), way)
    assert site.sent == []
    assert await authors(site.url) == []
