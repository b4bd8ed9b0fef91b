"""A cancelled request whose own clean-up fails: the error goes out as without a session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from fastapi import FastAPI
from litestar import Litestar, post
from litestar import Request as LitestarRequest
from sqlalchemy import insert
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

from asgi_db import Database, DBSession, DBSessionMiddleware, Mode, plain, read_only, transactional
from asgi_db.types import ASGIApp, Receive, Scope, Send
from tests.cancelling import POOL, Site, each_way, turns
from tests.chaos.cancellation import cancellable
from tests.contract.client import call
from tests.sockets import websocket
from tests.tables import Author, Base, authors


class CleanUpFailedError(Exception):
    """What the application's own `finally` raises."""


@pytest.fixture
async def site(database_url: str) -> AsyncIterator[Site]:
    async with Database(database_url, engine_options=POOL) as database:
        await database.create_tables(Base.metadata)
        yield Site(database_url, database)


async def cancelled(site: Site, way: str, running: asyncio.Task[object]) -> None:
    """Cancel what runs in the way of the test, and again during the ROLLBACK that follows."""
    site.cancel()
    if way == "twice":
        await turns(2)
        site.cancel()
    await asyncio.wait((running,), timeout=20)
    assert running.done()


@each_way
@pytest.mark.parametrize("mode", [transactional, plain, read_only], ids=lambda mode: mode.name)
async def test_the_error_of_its_clean_up_goes_out(site: Site, way: str, mode: Mode) -> None:
    async def endpoint(session: DBSession, send: Send) -> None:
        try:
            await use(session, mode)
            reached.set()
            await asyncio.Event().wait()
        finally:
            raise CleanUpFailedError

    reached = asyncio.Event()
    running = asyncio.create_task(site.serve(site.app(endpoint, way, mode)))
    await reached.wait()
    await cancelled(site, way, running)
    assert isinstance(running.result().error, CleanUpFailedError)
    assert await authors(site.url) == []
    await site.assert_clean()


@each_way
async def test_the_error_of_its_clean_up_goes_out_although_its_hooks_are_cancelled(
    site: Site, way: str
) -> None:
    async def endpoint(session: DBSession, send: Send) -> None:
        try:
            session.on_rollback(hook)
            await use(session, transactional)
            reached.set()
            await asyncio.Event().wait()
        finally:
            raise CleanUpFailedError

    async def hook() -> None:
        await asyncio.sleep(0)
        heard.append("rolled back")

    reached, heard = asyncio.Event(), list[str]()
    running = asyncio.create_task(site.serve(site.app(endpoint, way)))
    await reached.wait()
    await cancelled(site, way, running)
    assert isinstance(running.result().error, CleanUpFailedError)
    assert heard == ["rolled back"]
    await site.assert_clean()


@each_way
async def test_the_error_of_a_socket_goes_out(site: Site, way: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        try:
            await use(scope["state"]["db"], transactional)
            reached.set()
            await asyncio.Event().wait()
        finally:
            raise CleanUpFailedError

    async def noting(scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.append(task)
        await cancellable(way, DBSessionMiddleware(app, site.database, mode=transactional), site)(
            scope, receive, send
        )

    reached, running = asyncio.Event(), list["asyncio.Task[object]"]()
    async with websocket(noting) as socket:
        await reached.wait()
        await cancelled(site, way, running[0])
        assert isinstance(socket.error, CleanUpFailedError)
    assert await authors(site.url) == []
    await site.assert_clean()


@each_way
async def test_the_error_of_a_block_goes_out(site: Site, way: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async with site.database.transaction() as session:
            try:
                await use(session, transactional)
                reached.set()
                await asyncio.Event().wait()
            finally:
                raise CleanUpFailedError

    reached = asyncio.Event()
    running = asyncio.create_task(call(cancellable(way, app, site)))
    await reached.wait()
    await cancelled(site, way, running)
    assert isinstance(running.result().error, CleanUpFailedError)
    assert await authors(site.url) == []
    await site.assert_clean()


def of_starlette(endpoint: Callable[[Request], Awaitable[None]]) -> ASGIApp:
    return Starlette(routes=[Route("/", endpoint, methods=["POST"])])


def of_fastapi(endpoint: Callable[[Request], Awaitable[None]]) -> ASGIApp:
    app = FastAPI()
    app.post("/")(endpoint)
    return app


FRAMEWORKS = {"starlette": of_starlette, "fastapi": of_fastapi}


@pytest.mark.parametrize("way", ["task", "scope", "timeout"])
@pytest.mark.parametrize("framework", ["starlette", "fastapi", "litestar"])
@pytest.mark.parametrize("uses_session", [True, False], ids=["session", "no session"])
async def test_the_error_goes_out_of_a_framework_as_without_a_session(
    site: Site, way: str, framework: str, uses_session: bool
) -> None:
    """The framework's own answer to it, a 500, leaves first."""

    async def endpoint(request: Request) -> None:
        await wait_and_fail(request.state.db)

    async def wait_and_fail(session: DBSession) -> None:
        try:
            if uses_session:
                await use(session, transactional)
            reached.set()
            await asyncio.Event().wait()
        finally:
            raise CleanUpFailedError

    @post("/")
    async def handler(request: LitestarRequest[Any, Any, Any]) -> None:
        await wait_and_fail(request.scope["state"]["db"])

    reached = asyncio.Event()
    app: ASGIApp
    if framework == "litestar":
        app = Litestar([handler])
    else:
        app = FRAMEWORKS[framework](endpoint)
    wrapped = DBSessionMiddleware(app, site.database, mode=transactional)
    running = asyncio.create_task(call(cancellable(way, wrapped, site)))
    await reached.wait()
    await cancelled(site, way, running)
    exchange = running.result()
    assert exchange.status == 500
    assert framework == "litestar" or isinstance(exchange.error, CleanUpFailedError)
    assert await authors(site.url) == []
    await site.assert_clean()


async def use(session: DBSession, mode: Mode) -> None:
    """Write where the mode can; otherwise read."""
    if mode is read_only:
        await session.scalar(Author.__table__.select())
    else:
        await session.execute(insert(Author).values(name="ada"))
