"""A body that comes slowly: no connection waits for it, unless something would be lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from itertools import count
from typing import Any

import anyio
import fastapi
import litestar
import pytest
from sqlalchemy import exists, func, insert, select, text
from sqlalchemy.exc import DBAPIError
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from asgi_db import (
    Database,
    DBSession,
    DBSessionMiddleware,
    FailedTransactionError,
    Mode,
    plain,
    read_only,
    session_of,
    transactional,
)
from asgi_db.types import ASGIApp, Message, Receive, Scope, Send
from tests.cancelling import Counted
from tests.contract.client import call, scope_of
from tests.pools import ONE_CONNECTION, checked_out
from tests.servers import assert_idle, outside
from tests.tables import Author, Base, authors

NAME = select(Author.name)


# -- applications that read the body as their framework does -----------------------------------

Store = Callable[[DBSession, bytes], Awaitable[None]]


def asgi_app(store: Store) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        await store(session_of(scope), body)
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return app


def starlette_app(store: Store) -> ASGIApp:
    async def upload(request: Request) -> Response:
        await store(request.state.db, await request.body())
        return PlainTextResponse("", 201)

    return Starlette(routes=[Route("/", upload, methods=["POST"])])


def fastapi_app(store: Store) -> ASGIApp:
    app = fastapi.FastAPI(openapi_url=None)

    @app.post("/", status_code=201)
    async def upload(request: fastapi.Request) -> None:
        await store(request.state.db, await request.body())

    return app


def litestar_app(store: Store) -> ASGIApp:
    @litestar.post("/")
    async def upload(request: litestar.Request[Any, Any, Any]) -> None:
        await store(request.state.db, await request.body())

    return litestar.Litestar([upload], openapi_config=None, logging_config=None)


APPS = {
    "asgi": asgi_app,
    "starlette": starlette_app,
    "fastapi": fastapi_app,
    "litestar": litestar_app,
}


class Login:
    """A pure ASGI middleware that reads the user before the application is called."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await session_of(scope).scalar(NAME)
        await self.app(scope, receive, send)


class Client:
    """Sends a body in two pieces, the second when it is told to."""

    def __init__(self, app: ASGIApp, spec_version: str = "2.3") -> None:
        self.waits = asyncio.Event()
        self.goes_on = asyncio.Event()
        self.sent: list[Message] = []
        self._pieces = [b"one", b"two"]
        self._app = app
        self._spec_version = spec_version

    async def upload(self) -> int:
        scope = scope_of("http", "http", "/", self._spec_version) | {"method": "POST"}
        await self._app(scope, *self.ends)
        return int(self.sent[0]["status"])

    @property
    def ends(self) -> tuple[Receive, Send]:
        async def send(message: Message) -> None:
            self.sent.append(message)

        return self._receive, send

    async def _receive(self) -> Message:
        if not self._pieces:
            return {"type": "http.disconnect"}
        if len(self._pieces) == 1:
            self.waits.set()
            await self.goes_on.wait()
        body = self._pieces.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(self._pieces)}


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncGenerator[Database]:
    """One row, and a pool of one connection."""
    async with Database(url, engine_options=ONE_CONNECTION | options) as database:
        await database.create_tables(Base.metadata)
        async with database.transaction() as session:
            session.add(Author(id=1, name="a user"))
        yield database


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """The same on each database in turn."""
    async with opened(database_url) as database:
        yield database


async def store(session: DBSession, body: bytes) -> None:
    session.add(Author(id=2, name=body.decode()))


# -- nothing is held ---------------------------------------------------------------------------


@pytest.mark.parametrize("framework", APPS)
async def test_a_body_that_comes_slowly_holds_no_connection_after_a_login_that_read(
    database: Database, database_url: str, framework: str
) -> None:
    app = Login(APPS[framework](store))
    client = Client(DBSessionMiddleware(app, database, mode=transactional))
    request = asyncio.create_task(client.upload())
    await client.waits.wait()
    assert checked_out(database) == 0
    await assert_idle(database_url)
    async with database.transaction() as other:  # the pool has one connection
        other.add(Author(id=3, name="another request"))
    client.goes_on.set()
    assert await request == 201
    assert await authors(database_url) == ["a user", "another request", "onetwo"]


@pytest.mark.parametrize("mode", [plain, transactional, transactional(read_only=True)], ids=str)
async def test_an_endpoint_that_reads_before_the_body_keeps_its_objects(
    database: Database, mode: Mode
) -> None:
    seen: list[object] = []

    async def upload(request: Request) -> Response:
        user = await request.state.db.get(Author, 1)
        async for _ in request.stream():
            seen.append((user.name, user in request.state.db))
        assert await request.state.db.get(Author, 1) is user
        return PlainTextResponse("", 201)

    app = Starlette(routes=[Route("/", upload, methods=["POST"])])
    client = Client(DBSessionMiddleware(app, database, mode=mode))
    request = asyncio.create_task(client.upload())
    await client.waits.wait()
    assert checked_out(database) == 0
    client.goes_on.set()
    assert await request == 201
    assert seen == [("a user", True)] * 3


async def test_a_login_in_a_task_of_its_own_holds_nothing_either(
    database: Database, database_url: str
) -> None:
    """`BaseHTTPMiddleware` runs the endpoint in another task, and waits for it."""

    async def login(request: Request, call_next: RequestResponseEndpoint) -> Response:
        await request.state.db.scalar(NAME)
        return await call_next(request)

    app = BaseHTTPMiddleware(starlette_app(store), login)
    client = Client(DBSessionMiddleware(app, database, mode=transactional))
    request = asyncio.create_task(client.upload())
    await client.waits.wait()
    assert checked_out(database) == 0
    await assert_idle(database_url)
    client.goes_on.set()
    assert await request == 201
    assert await authors(database_url) == ["a user", "onetwo"]


async def test_a_stream_that_reads_its_request_body_holds_nothing_while_it_waits(
    database: Database,
) -> None:
    async def echo(request: Request) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            async for piece in request.stream():
                await request.state.db.scalar(NAME)
                yield piece

        return StreamingResponse(pieces())

    app = Starlette(routes=[Route("/", echo, methods=["POST"])])
    # Before 2.4 Starlette itself receives beside a stream.
    client = Client(DBSessionMiddleware(app, database), spec_version="2.4")
    request = asyncio.create_task(client.upload())
    await client.waits.wait()
    assert checked_out(database) == 0
    client.goes_on.set()
    assert await request == 200


@pytest.mark.parametrize("mode", [plain, transactional], ids=str)
async def test_a_stream_whose_request_body_is_not_read_begins_when_nothing_is_held(
    database: Database, mode: Mode
) -> None:
    """Starlette receives, to hear of a disconnect, before the stream begins."""
    held: list[int] = []

    async def download(request: Request) -> Response:
        await request.state.db.scalar(NAME)
        return StreamingResponse(pieces())

    async def pieces() -> AsyncIterator[bytes]:
        yield b"one"

    async def watch(message: Message) -> None:
        held.append(checked_out(database))

    app = Starlette(routes=[Route("/", download, methods=["POST"])])
    middleware = DBSessionMiddleware(app, database, mode=mode)
    assert (await call(middleware, watch=watch)).body == b"one"
    assert held == [0, 0, 0]


async def test_a_task_that_uses_the_session_beside_the_reading_of_the_body_is_never_refused(
    database: Database,
) -> None:
    """The connection is given back for the body while another task begins its next statement."""
    names: list[object] = []

    @transactional
    async def upload(request: Request) -> Response:
        async def use() -> None:
            for _ in range(40):
                names.append(await request.state.db.scalar(NAME))
                await asyncio.sleep(0)

        async def read() -> None:
            async for _ in request.stream():
                pass

        async with asyncio.TaskGroup() as group:
            group.create_task(use())
            group.create_task(read())
        return PlainTextResponse("", 201)

    app = DBSessionMiddleware(Starlette(routes=[Route("/", upload, methods=["POST"])]), database)
    sent: list[Message] = []
    pieces = iter(range(40, -1, -1))

    async def receive() -> Message:
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b".", "more_body": next(pieces) > 0}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope_of("http", "http", "/", "2.3") | {"method": "POST"}, receive, send)
    assert (sent[0]["status"], names) == (201, ["a user"] * 40)
    assert checked_out(database) == 0


async def test_no_connection_is_taken_or_given_back_after_the_whole_body_has_come(
    database: Database, database_url: str
) -> None:
    """What is received then says only that the client has gone."""
    held: list[int] = []

    async def upload(request: Request) -> Response:
        await request.body()
        await request.state.db.scalar(NAME)
        await request.is_disconnected()
        held.append(checked_out(database))
        return PlainTextResponse("", 201)

    app = Starlette(routes=[Route("/", upload, methods=["POST"])])
    client = Client(DBSessionMiddleware(app, database))
    client.goes_on.set()
    assert await client.upload() == 201
    assert held == [1]
    routes = database.stats().routes.items()
    assert [stats.units for route, stats in routes if "upload" in route] == [1]


async def upload_cancelled_at(step: int, client: Client, way: str) -> None:
    """Cancel an upload when it has been resumed so often, or else when it waits for its body."""
    loop, scope = asyncio.get_running_loop(), anyio.CancelScope()

    async def upload() -> None:
        with scope:
            await client.upload()

    def cancel() -> None:
        if counted.resumed == step or client.waits.is_set():
            loop.call_soon(scope.cancel if way == "scope" else request.cancel)

    counted = Counted(upload(), cancel)
    request: asyncio.Task[None] = asyncio.create_task(counted)
    await asyncio.wait((request,))
    assert request.cancelled() == (way == "task")


@pytest.mark.parametrize("way", ["task", "scope"])
async def test_a_request_that_is_cancelled_while_it_waits_or_gives_back_leaves_nothing(
    database: Database, database_url: str, way: str
) -> None:
    """At every await, from the read until the second piece is waited for."""
    app = DBSessionMiddleware(Login(starlette_app(store)), database, mode=transactional)
    for step in count(1):
        client = Client(app)
        await upload_cancelled_at(step, client, way)
        assert checked_out(database) == 0
        if client.waits.is_set():
            break
    await assert_idle(database_url)
    assert await authors(database_url) == ["a user"]


# -- what would be lost is kept ----------------------------------------------------------------

Work = Callable[[DBSession], Awaitable[object]]


def statement(sql: str) -> Work:
    return lambda session: session.execute(text(sql))


async def adds(session: DBSession) -> None:
    await session.scalar(NAME)
    session.add(Author(id=2, name="not flushed"))


async def flushes(session: DBSession) -> None:
    await adds(session)
    await session.flush()


async def inserts(session: DBSession) -> None:
    await session.execute(insert(Author).values(id=2, name="inserted"))


async def changes(session: DBSession) -> None:
    (await session.get_one(Author, 1)).name = "changed"


async def begins_a_savepoint(session: DBSession) -> None:
    await session.begin_nested().start()
    await session.scalar(NAME)


async def begins_a_block(session: DBSession) -> None:
    await session.begin().start()
    await session.scalar(NAME)


async def takes_the_connection(session: DBSession) -> None:
    await (await session.connection()).scalar(NAME)


async def swallows_a_failure(session: DBSession) -> None:
    with suppress(DBAPIError):
        await session.execute(text("SELECT * FROM no_such_table"))


KEEPS: dict[str, Work] = {
    "an object that is not flushed": adds,
    "a flush": flushes,
    "an INSERT": inserts,
    "a changed attribute": changes,
    "a savepoint": begins_a_savepoint,
    "a block of its own": begins_a_block,
    "the connection itself": takes_the_connection,
    "a failed statement": swallows_a_failure,
}
POSTGRESQL_KEEPS: dict[str, Work] = {
    "a row lock": lambda session: session.get(Author, 1, with_for_update=True),
    "a shared row lock": statement("SELECT * FROM author FOR NO KEY UPDATE"),
    "a lock of the table": statement("LOCK TABLE author"),
    "an advisory lock": statement("SELECT pg_advisory_xact_lock(1)"),
    "a setting": statement("SET LOCAL app.tenant = '1'"),
    "a setting by a function": statement("SELECT set_config('app.tenant', '1', true)"),
    "a function that may write": statement("SELECT store_author()"),
    "a function in a schema that may write": statement("SELECT public.store_author () AS a"),
    "a number of a sequence": statement("SELECT nextval('numbers')"),
    "a server-side cursor": lambda session: session.stream(NAME),
    "a cursor in SQL": statement("DECLARE c CURSOR FOR SELECT 1"),
    "an isolation level": statement("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"),
    "a temporary table": statement("SELECT name INTO TEMPORARY names FROM author"),
    "a notification": statement("NOTIFY somebody"),
}
MYSQL_KEEPS: dict[str, Work] = {
    "a row lock": lambda session: session.get(Author, 1, with_for_update=True),
    "a shared row lock": statement("SELECT * FROM author LOCK IN SHARE MODE"),
    "a named lock": statement("SELECT GET_LOCK('a', 1)"),
    "a variable": statement("SELECT name INTO @name FROM author"),
    "another variable": statement("SELECT @name := name FROM author"),
}
SQLITE_KEEPS: dict[str, Work] = {"a pragma": statement("PRAGMA defer_foreign_keys = ON")}

GIVES_BACK: dict[str, Work] = {
    "a query": lambda session: session.scalars(select(Author).where(Author.id.in_([1, 2]))),
    "an object": lambda session: session.get(Author, 1),
    "an aggregate": lambda session: session.scalar(
        select(func.coalesce(func.max(Author.id), 0)).where(func.lower(Author.name) != "x")
    ),
    "a subquery": lambda session: session.scalar(
        select(exists(select(Author.id).where(Author.name == "for update")))
    ),
    "a common table expression": lambda session: session.scalar(
        select(func.count()).select_from(select(Author.id).cte("some"))
    ),
    "a literal": statement("SELECT 'FOR UPDATE', 'f(x)' /* set_config(x) */"),
}


async def held_before_the_body(
    database: Database, work: Work, mode: Mode = transactional, *, fails: bool = False
) -> int:
    """How many connections a request holds while it waits for its body."""

    async def upload(request: Request) -> Response:
        await work(request.state.db)
        await request.body()
        return PlainTextResponse("", 201)

    app = Starlette(routes=[Route("/", upload, methods=["POST"])])
    client = Client(DBSessionMiddleware(app, database, mode=mode))
    request = asyncio.create_task(client.upload())
    await asyncio.wait(
        (request, waits := asyncio.create_task(client.waits.wait())),
        return_when=asyncio.FIRST_COMPLETED,
    )
    waits.cancel()
    held = checked_out(database)
    client.goes_on.set()
    if fails:
        with pytest.raises(FailedTransactionError):
            await request
    else:
        assert await request == 201
    assert checked_out(database) == 0
    return held


@pytest.mark.parametrize("what", KEEPS)
async def test_a_unit_that_would_lose_something_keeps_its_connection(
    database: Database, what: str
) -> None:
    fails = what == "a failed statement"
    assert await held_before_the_body(database, KEEPS[what], fails=fails) == 1


@pytest.mark.parametrize("what", POSTGRESQL_KEEPS)
async def test_on_postgresql_a_unit_that_would_lose_something_keeps_its_connection(
    postgresql_url: str, what: str
) -> None:
    async with opened(postgresql_url) as database:
        async with outside(postgresql_url) as connection:
            await connection.execute("CREATE SEQUENCE numbers")
            await connection.execute(
                "CREATE FUNCTION store_author() RETURNS void LANGUAGE sql AS"
                " $$ INSERT INTO author (id, name) VALUES (2, 'by a function') $$"
            )
        assert await held_before_the_body(database, POSTGRESQL_KEEPS[what]) == 1
        if "function in" in what or what == "a function that may write":
            assert await authors(postgresql_url) == ["a user", "by a function"]


@pytest.mark.parametrize("what", MYSQL_KEEPS)
async def test_on_mariadb_a_unit_that_would_lose_something_keeps_its_connection(
    mysql_url: str, what: str
) -> None:
    async with opened(mysql_url) as database:
        assert await held_before_the_body(database, MYSQL_KEEPS[what]) == 1


@pytest.mark.parametrize("what", SQLITE_KEEPS)
async def test_on_sqlite_a_unit_that_would_lose_something_keeps_its_connection(
    sqlite_url: str, what: str
) -> None:
    async with opened(sqlite_url) as database:
        assert await held_before_the_body(database, SQLITE_KEEPS[what]) == 1


@pytest.mark.parametrize("what", GIVES_BACK)
async def test_a_unit_that_has_only_read_gives_its_connection_back(
    database: Database, what: str
) -> None:
    assert await held_before_the_body(database, GIVES_BACK[what]) == 0


VIEWS = {
    "isolation": transactional(isolation="SERIALIZABLE"),
    "snapshot": read_only(snapshot=True),
}


@pytest.mark.parametrize("mode", VIEWS.values(), ids=VIEWS)
async def test_a_view_that_was_asked_for_lasts_over_the_body(
    database: Database, mode: Mode
) -> None:
    assert await held_before_the_body(database, GIVES_BACK["a query"], mode) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"isolation_level": "SERIALIZABLE"},
        {"execution_options": {"isolation_level": "SERIALIZABLE"}},
    ],
    ids=["level", "execution options"],
)
async def test_an_isolation_level_of_the_engine_lasts_over_the_body(
    postgresql_url: str, options: dict[str, Any]
) -> None:
    async with opened(postgresql_url, **options) as database:
        assert await held_before_the_body(database, GIVES_BACK["a query"]) == 1
