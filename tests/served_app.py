"""The application which the tests of real servers serve.

It has a database for each of the variables `POSTGRESQL_URL` and `MYSQL_URL`; a path begins with
the name of the one that it uses: `/postgresql/authors/1`.
"""

import asyncio
import gc
import itertools
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakSet

from sqlalchemy import insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.pool import QueuePool
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from asgi_db import Database, DBSession, DBSessionMiddleware, read_only, transactional
from asgi_db.types import ASGIApp, Receive, Scope, Send
from tests.servers import run
from tests.tables import Author, Base, Child

POOL_SIZE = 5
POOL_TIMEOUT = float(os.environ.get("POOL_TIMEOUT", "0.5"))
LOCKED = 400_000  # the author whose row may be locked
CHUNK = b"x" * 65_536
CHUNKS = 80  # 5 MB: more than all buffers between the application and a client that reads nothing

databases = {
    name: Database(
        os.environ[f"{name.upper()}_URL"],
        engine_options={"pool_size": POOL_SIZE, "max_overflow": 0, "pool_timeout": POOL_TIMEOUT},
        wait_for=float(os.environ.get("WAIT_FOR", "0")),
    )
    for name in ("postgresql", "mysql")
    if f"{name.upper()}_URL" in os.environ
}
nowhere = Database("postgresql+asyncpg://nobody@127.0.0.1:1/nothing")

running = {"requests": 0, "streams": 0, "uploads": 0}
begun: list[str] = []
sessions: WeakSet[DBSession] = WeakSet()
everybody = asyncio.Barrier(POOL_SIZE)
ids_of_streams = itertools.count(1_000_000)


class CountRequests:
    """Counts the requests which have not ended with all their clean-up."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        counted = scope["type"] == "http" and scope["path"] != "/state"
        running["requests"] += counted
        if counted:
            begun.append(scope["path"])
        try:
            await self.app(scope, receive, send)
        finally:
            running["requests"] -= counted


def session_of(request: Request) -> DBSession:
    """The session of the database which the path names."""
    session: DBSession = getattr(request.state, request.path_params["database"])
    sessions.add(session)
    return session


def id_of(request: Request) -> int:
    """The number in the path."""
    id: int = request.path_params["id"]
    return id


async def state(_: Request) -> Response:
    """How things stand; uses no database."""
    pools = [database.engine.pool for database in databases.values()]
    checked_out = sum(pool.checkedout() for pool in pools if isinstance(pool, QueuePool))
    found = {"begun": len(begun), "checked_out": checked_out, "process": os.getpid()}
    return JSONResponse({**running, **found})


async def left(_: Request) -> Response:
    """How many sessions are left, after the garbage collector has looked for them."""
    gc.collect()
    return JSONResponse(len(sessions))


@transactional
async def create_author(request: Request) -> Response:
    session_of(request).add(Author(id=id_of(request), name=f"author {id_of(request)}"))
    return PlainTextResponse("created", 201)


@read_only
async def read_author(request: Request) -> Response:
    author = await session_of(request).get(Author, id_of(request))
    return Response(status_code=404) if author is None else PlainTextResponse(author.name)


@transactional
async def create_child(request: Request) -> Response:
    """Its parent does not exist, which PostgreSQL finds out at COMMIT."""
    session_of(request).add(Child(parent_id=404))
    return PlainTextResponse("created", 201)


@transactional
async def fail(request: Request) -> Response:
    """Fail in a statement, or at COMMIT, which no handler answers."""
    if request.path_params["where"] == "statement":
        await session_of(request).execute(text("SELECT * FROM no_such_table"))
    return await create_child(request)


async def answer_conflict(request: Request, error: Exception) -> Response:
    if "where" in request.path_params:
        raise error
    return PlainTextResponse("conflict", 409)


async def hold_a_connection_together(request: Request) -> Response:
    """Hold a connection until as many requests do as the pool has connections."""
    await session_of(request).execute(text("SELECT 1"))
    await everybody.wait()
    return Response()


# Two writes each, of which never one alone may stay


async def write(session: DBSession, id: int) -> None:
    await session.execute(insert(Author).values(id=id, name=f"author {id}"))


async def sleep_there(session: DBSession, seconds: float) -> None:
    """Let the database sleep."""
    function = "pg_sleep" if session.get_bind().dialect.name == "postgresql" else "SLEEP"
    await session.execute(text(f"SELECT {function}(:seconds)"), {"seconds": seconds})


@transactional
async def run_a_query(request: Request) -> Response:
    """Write, run a query for a while, write again."""
    session, id = session_of(request), id_of(request)
    await write(session, id)
    await sleep_there(session, request.path_params["seconds"])
    await write(session, -id)
    return PlainTextResponse("created", 201)


@transactional
async def wait_for_a_lock(request: Request) -> Response:
    """Write, lock a row which somebody else may have locked, write again."""
    session, id = session_of(request), id_of(request)
    await write(session, id)
    await session.execute(select(Author).where(Author.id == LOCKED).with_for_update())
    await write(session, -id)
    return PlainTextResponse("created", 201)


@transactional
async def wait_for_the_client_to_go(request: Request) -> Response:
    """Write, wait until the server says that the client has gone, write again."""
    session, id = session_of(request), id_of(request)
    await write(session, id)
    while (await request.receive())["type"] != "http.disconnect":
        pass
    await write(session, -id)
    return PlainTextResponse("created", 201)


@transactional
async def upload_author(request: Request) -> Response:
    """Look for the user, then read the body, then write."""
    await session_of(request).get(Author, LOCKED)
    running["uploads"] += 1
    try:
        name = (await request.body()).decode()
    finally:
        running["uploads"] -= 1
    session_of(request).add(Author(id=id_of(request), name=name))
    return PlainTextResponse("created", 201)


@transactional
async def stream(request: Request) -> Response:
    """Between two pieces: write, run a query for a while if it is to, write again; for ever."""
    session, seconds = session_of(request), request.path_params["seconds"]

    async def pieces() -> AsyncIterator[str]:
        running["streams"] += 1
        try:
            for id in ids_of_streams:
                await write(session, id)
                if seconds:
                    await sleep_there(session, seconds)
                await write(session, -id)
                yield f"{id}\n"
                await asyncio.sleep(0.01)  # the processor is also for others
        finally:
            running["streams"] -= 1

    return StreamingResponse(pieces())


async def events(request: Request) -> Response:
    """Send an event, then wait for the next one, which does not come."""

    async def pieces() -> AsyncIterator[str]:
        running["streams"] += 1
        try:
            await session_of(request).scalars(select(Author).limit(1))
            yield "data: read\n\n"
            await asyncio.Event().wait()
        finally:
            running["streams"] -= 1

    return StreamingResponse(pieces(), media_type="text/event-stream")


async def download(request: Request) -> Response:
    """Read in a transaction, then send 5 MB."""
    await session_of(request).scalars(select(Author).limit(1))

    async def pieces() -> AsyncIterator[bytes]:
        running["streams"] += 1
        try:
            for _ in range(CHUNKS):
                yield CHUNK
        finally:
            running["streams"] -= 1

    return StreamingResponse(pieces())


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncGenerator[None]:
    """Write at startup and at shutdown, where it is to."""
    if "LIFESPAN_WRITES" in os.environ:
        await write_into_all(1, "at startup")
    yield
    if "LIFESPAN_WRITES" in os.environ:
        await write_into_all(2, "at shutdown")


async def write_into_all(id: int, name: str) -> None:
    for database in databases.values():
        async with database.transaction() as session:
            session.add(Author(id=id, name=name))


app = Starlette(
    routes=[
        Route("/state", state),
        Route("/left", left),
        Route("/{database}/authors/{id:int}", create_author, methods=["POST"]),
        Route("/{database}/authors/{id:int}", read_author),
        Route("/{database}/children", create_child, methods=["POST"]),
        Route("/{database}/fails/{where}", fail, methods=["POST"]),
        Route("/{database}/together", hold_a_connection_together),
        Route("/{database}/queries/{id:int}/{seconds:float}", run_a_query, methods=["POST"]),
        Route("/{database}/locks/{id:int}", wait_for_a_lock, methods=["POST"]),
        Route("/{database}/until-gone/{id:int}", wait_for_the_client_to_go, methods=["POST"]),
        Route("/{database}/uploads/{id:int}", upload_author, methods=["POST"]),
        Route("/{database}/streams/{seconds:float}", stream),
        Route("/{database}/events", events),
        Route("/{database}/download", download),
    ],
    middleware=[
        Middleware(CountRequests),
        Middleware(DBSessionMiddleware, database=nowhere, key="nowhere"),
        *(
            Middleware(DBSessionMiddleware, database=database, key=name)
            for name, database in databases.items()
        ),
    ],
    exception_handlers={IntegrityError: answer_conflict},
    lifespan=lifespan,
)


# A module which uses its databases while it is imported


async def create_tables() -> None:
    """Create the tables, and clean up or not."""
    for database in databases.values():
        await database.create_tables(Base.metadata)
        if os.environ["AT_IMPORT"] == "dispose":
            await database.dispose()


if "AT_IMPORT" in os.environ:
    run(create_tables())
