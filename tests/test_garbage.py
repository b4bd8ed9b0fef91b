"""What a request leaves behind goes at once, and does not wait for the garbage collector."""

from __future__ import annotations

import gc
import logging
import weakref
from asyncio import AbstractEventLoop
from collections.abc import Iterator
from contextlib import suppress
from types import FrameType, FunctionType, ModuleType, TracebackType
from typing import Any

import pytest
from sqlalchemy import Engine, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_db import (
    Database,
    DBSession,
    DBSessionMiddleware,
    Mode,
    plain,
    read_only,
    transactional,
    uuid4_str,
)
from asgi_db.types import Message, Receive, Scope, Send
from tests.internals import EngineLife
from tests.tables import Author, Base


class Server:
    """As a server does it: the functions that it gives to the application know the scope."""

    def __init__(self, type: str) -> None:
        self.scope: dict[str, Any] = {"type": type, "path": "/", "headers": [], "state": {}}
        if type == "http":
            self.scope["method"] = "GET"

    async def receive(self) -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(self, message: Message) -> None: ...


async def do_nothing(session: DBSession) -> None: ...


async def read(session: DBSession) -> None:
    await session.scalars(select(Author))


async def write(session: DBSession) -> None:
    await session.execute(insert(Author).values(name=uuid4_str()))


async def add(session: DBSession) -> None:
    session.add(Author(name=uuid4_str()))
    session.on_commit(lambda: None)


async def fail(session: DBSession) -> None:
    await read(session)
    raise LookupError


async def fail_in_a_statement(session: DBSession) -> None:
    await session.execute(text("SELECT * FROM no_such_table"))


async def fail_after_a_statement(session: DBSession) -> None:
    with suppress(DBAPIError):
        await fail_in_a_statement(session)
    await read(session)


async def fail_in_a_commit_by_hand(session: DBSession) -> None:
    with suppress(DBAPIError):
        await fail_in_a_statement(session)
    await session.commit()


async def fail_in_a_hook(session: DBSession) -> None:
    session.on_commit(raise_lookup_error)
    await write(session)


def raise_lookup_error() -> None:
    raise LookupError


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("type", ["http", "websocket"])
@pytest.mark.parametrize(
    ("mode", "work"),
    [
        (plain, do_nothing),
        (plain, read),
        (read_only, read),
        (read_only(timeout=10), read),
        (transactional, write),
        (transactional, add),
        (plain, fail),
        (transactional(retries=1), write),  # from here on, any request may be run again
        (plain, do_nothing),
        (plain, read),
    ],
)
async def test_nothing_of_a_request_waits_for_the_garbage_collector(
    database_url: str, type: str, mode: Mode, work: Any
) -> None:
    left: list[weakref.ref[Any]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session: DBSession = scope["state"]["db"]
        left.append(weakref.ref(session))
        await work(session)
        left.append(weakref.ref(session.sync_session)) if work is not do_nothing else None
        kind = "response.start" if type == "http" else "accept"
        await send({"type": f"{type}.{kind}", "status": 200, "headers": []})
        if type == "http":
            await send({"type": "http.response.body"})

    async def serve(database: Database) -> None:
        server = Server(type)
        left.append(weakref.ref(server))
        middleware = DBSessionMiddleware(app, database, mode=mode)
        try:
            await middleware(server.scope, server.receive, server.send)
        except LookupError as error:
            error.__traceback__ = None

    async with Database(database_url) as database:
        await database.create_tables(Base.metadata)
        for _ in range(2):  # the first opens the connection
            left.clear()
            await serve(database)
        assert [ref() for ref in left if ref() is not None] == []


_KNOWS_MORE = (
    *(type, ModuleType, FunctionType, AbstractEventLoop, logging.Logger),
    *(Database, EngineLife, AsyncEngine, Engine),
)
"""What a request does not own."""


def errors_within_reach(of: object) -> list[object]:
    """The errors, tracebacks and frames to which an object leads, but for those of its types."""
    found, seen, left = list[object](), set[int](), [of]
    while left:
        each = left.pop()
        if id(each) in seen or isinstance(each, _KNOWS_MORE):
            continue
        seen.add(id(each))
        if isinstance(each, (BaseException, TracebackType, FrameType)):
            found.append(each)
        else:
            left += gc.get_referents(each)
    return found


@pytest.mark.parametrize("type", ["http", "websocket"])
@pytest.mark.parametrize(
    ("mode", "work"),
    [
        (plain, fail),
        (plain, fail_in_a_statement),
        (read_only, fail_in_a_statement),
        (transactional, fail_in_a_statement),
        (transactional, fail_after_a_statement),
        (transactional(retries=1), fail_after_a_statement),
        (plain, fail_in_a_commit_by_hand),
        (transactional, fail_in_a_hook),
        (transactional(timeout=0.001), write),
    ],
)
async def test_nothing_leads_from_the_scope_of_a_finished_request_to_its_error(
    database_url: str, type: str, mode: Mode, work: Any
) -> None:
    """A server that keeps the scope and the error, as granian does, would else keep all of both."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await work(scope["state"]["db"])
        kind = "response.start" if type == "http" else "accept"
        await send({"type": f"{type}.{kind}", "status": 200, "headers": []})

    async with Database(database_url) as database:
        await database.create_tables(Base.metadata)
        middleware, server = DBSessionMiddleware(app, database, mode=mode), Server(type)
        try:
            raise KeyError("the server handles an error of its own")
        except KeyError:
            with suppress(Exception):
                await middleware(server.scope, server.receive, server.send)
        assert errors_within_reach(server.scope) == []
