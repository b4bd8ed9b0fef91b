"""Blocks of the database inside a request, and in scripts: what they read, and what is told."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import Any

import anyio.from_thread
import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.responses import Response

from asgi_db import (
    Database,
    DBSession,
    DBSessionMiddleware,
    by_method,
    read_only,
    transactional,
)
from asgi_db.drivers.replication import UNKNOWN, Position
from asgi_db.replicas.own_writes import OwnWrites
from asgi_db.types import Scope
from tests.clusters import Cluster, Urls
from tests.own_writes import read, tables, write
from tests.test_replicas_after_writes import database as database
from tests.test_replicas_after_writes import ports
from tests.test_replicas_after_writes import urls as urls

NAME = "asgi-db-db"

Work = Callable[[Database, int], Awaitable[None]]


async def with_session(database: Database, version: int) -> None:
    async with database.session() as session:
        await write(session, 1, version)
        await session.commit()


async def with_transaction(database: Database, version: int) -> None:
    async with database.transaction() as session:
        await write(session, 1, version)


async def with_sessionmaker(database: Database, version: int) -> None:
    async with database.sessionmaker.begin() as session:
        await write(session, 1, version)


async def with_gather(database: Database, version: int) -> None:
    await asyncio.gather(with_transaction(database, version))


WRITES = [with_session, with_transaction, with_sessionmaker, with_gather]


async def found(database: Database) -> str:
    """What a block reads: the last write, and the port of the server that says so."""
    async with database.session(read_only) as session:
        return await read(session, 1)


def make_app(database: Database) -> FastAPI:
    app = FastAPI(openapi_url=None)

    @app.post("/session")
    @transactional
    async def written(request: Request) -> None:
        await write(request.state.db, 1, 1)

    @app.post("/block/{number}")
    async def written_by_block(number: int) -> list[str]:
        await WRITES[number](database, 1)
        return [await found(database), *await asyncio.gather(found(database))]

    @app.post("/both")
    @read_only
    async def read_write_read(request: Request) -> list[str]:
        session: DBSession = request.state.db
        before = await read(session, 1)
        await with_transaction(database, 1)
        return [before, await read(session, 1)]

    @app.get("/block")
    async def block() -> str:
        return await found(database)

    @app.get("/gather")
    async def gathered() -> str:
        first, second = await asyncio.gather(found(database), found(database))
        assert first.split()[0] == second.split()[0]
        return first

    @app.get("/thread")
    def in_thread() -> str:
        return anyio.from_thread.run(found, database)

    return app


class Passing(BaseHTTPMiddleware):
    """Runs what is inside in a task of its own."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)


def served(app: FastAPI, database: Database, key: str = "db") -> httpx.AsyncClient:
    app.add_middleware(DBSessionMiddleware, database=database, key=key)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app")


@pytest.fixture
async def late(cluster: Cluster) -> AsyncIterator[None]:
    """Replicas that get no further."""
    for replica in cluster.replicas:
        await asyncio.to_thread(replica.pause)
    yield


@pytest.mark.parametrize("passing", [False, True])
@pytest.mark.parametrize("path", ["/block", "/gather", "/thread"])
async def test_a_block_reads_what_the_client_of_its_request_was_told(
    urls: Urls, database: Database, late: None, path: str, passing: bool
) -> None:
    app = make_app(database)
    if passing:
        app.add_middleware(Passing)
    primary, replicas = ports(urls)
    async with served(app, database) as client:
        version, port = map(int, (await client.get(path)).json().split())
        assert (version, port in replicas) == (0, True)
        assert NAME in (await client.post("/session")).headers
        for _ in range(2):
            assert (await client.get(path)).json() == f"1 {primary}"
        client.cookies.clear()
        assert (await client.get(path)).json().startswith("0 ")  # This one was told nothing.


@pytest.mark.parametrize("number", range(len(WRITES)), ids=[each.__name__ for each in WRITES])
async def test_what_a_block_commits_is_told_to_the_client_and_read_in_its_request(
    urls: Urls, database: Database, late: None, number: int
) -> None:
    primary, _ = ports(urls)
    async with served(make_app(database), database) as client:
        written = await client.post(f"/block/{number}")
        assert written.json() == [f"1 {primary}"] * 2
        assert written.headers[NAME] in written.headers["set-cookie"]
        assert (await client.get("/block")).json() == f"1 {primary}"
        assert NAME not in (await client.get("/block")).headers


async def test_the_session_of_a_request_reads_what_a_block_in_it_has_committed(
    urls: Urls, database: Database, late: None
) -> None:
    """Also where it has read from a replica before."""
    primary, replicas = ports(urls)
    async with served(make_app(database), database) as client:
        before, after = (await client.post("/both")).json()
    version, port = map(int, before.split())
    assert (version, port in replicas) == (0, True)
    assert after == f"1 {primary}"


@pytest.mark.parametrize("kind", WRITES[:3])
async def test_a_script_reads_what_it_has_written(
    cluster: Cluster, urls: Urls, database: Database, late: None, kind: Work
) -> None:
    """From a replica again as soon as one has it."""
    primary, replicas = ports(urls)
    await kind(database, 1)
    for _ in range(2):
        assert await found(database) == f"1 {primary}"
    for replica in cluster.replicas:
        await asyncio.to_thread(replica.resume)
    await asyncio.to_thread(cluster.wait_until_caught_up)
    while True:
        version, port = map(int, (await found(database)).split())
        assert version == 1
        if port in replicas:
            break
        await asyncio.sleep(0.05)


async def test_a_request_knows_nothing_of_the_one_before_nor_of_what_serves_it(
    urls: Urls, database: Database, late: None
) -> None:
    """Although all of them run in one context, as in a test."""
    primary, _ = ports(urls)
    async with served(make_app(database), database) as client:
        await client.post("/block/1")
        client.cookies.clear()
        assert (await client.get("/block")).json().startswith("0 ")
        await with_transaction(database, 2)
        assert (await client.get("/block")).json().startswith("0 ")
    assert await found(database) == f"2 {primary}"


async def test_requests_at_the_same_time_do_not_mix(
    urls: Urls, database: Database, late: None
) -> None:
    app, has_written, has_read = make_app(database), asyncio.Event(), asyncio.Event()

    @app.post("/first")
    async def first() -> None:
        await with_transaction(database, 1)
        has_written.set()
        await has_read.wait()

    @app.get("/second")
    async def second() -> str:
        await has_written.wait()
        try:
            return await found(database)
        finally:
            has_read.set()

    async with served(app, database) as client:
        first_answer, second_answer = await asyncio.gather(
            client.post("/first"), client.get("/second")
        )
    assert NAME in first_answer.headers
    assert NAME not in second_answer.headers
    assert second_answer.json().startswith("0 ")


@pytest.mark.parametrize("is_inner", [False, True])
async def test_two_databases_in_one_request_do_not_mix(
    urls: Urls, database: Database, late: None, is_inner: bool
) -> None:
    async with Database(urls.primary, replicas=urls.replicas) as other:
        app, inner = FastAPI(openapi_url=None), FastAPI(openapi_url=None)
        writes, reads = (other, database) if is_inner else (database, other)

        @inner.post("/")
        async def endpoint() -> str:
            await with_transaction(writes, 1)
            return await found(reads)

        inner.add_middleware(DBSessionMiddleware, database=other, key="other")
        app.mount("/inner", inner)
        async with served(app, database) as client:
            answer = await client.post("/inner/")
        told = {name for name in answer.headers if name.startswith("asgi-db-")}
        assert told == {"asgi-db-other" if is_inner else NAME}
        assert answer.json().startswith("0 ")


async def test_two_keys_of_one_database_are_told_the_same(
    urls: Urls, database: Database, late: None
) -> None:
    primary, _ = ports(urls)
    app = FastAPI(openapi_url=None)

    @app.post("/{key}")
    async def written(request: Request, key: str) -> None:
        await write(request.scope["state"][key], 1, 1)

    @app.get("/{key}")
    async def item(request: Request, key: str) -> str:
        return await read(request.scope["state"][key], 1)

    for key in "inner", "db":
        app.add_middleware(DBSessionMiddleware, database=database, key=key, mode=by_method)
    transport = httpx.ASGITransport(app)
    for wrote in "db", "inner":
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            assert (await client.get(f"/{wrote}")).json().split()[1] != str(primary)
            assert f"asgi-db-{wrote}" in (await client.post(f"/{wrote}")).headers
            for reads in "db", "inner":
                assert (await client.get(f"/{reads}")).json() == f"1 {primary}"


async def test_what_is_committed_after_the_status_line_is_read_there(
    urls: Urls, database: Database, late: None
) -> None:
    """In a stream and in the task behind it; the client is not told."""
    primary, _ = ports(urls)
    app, read_later = make_app(database), list[str]()

    async def in_background() -> None:
        read_later.append(await found(database))
        await with_transaction(database, 2)
        read_later.append(await found(database))

    @app.post("/stream")
    async def stream() -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            yield "begun "
            await with_transaction(database, 1)
            yield await found(database)

        return StreamingResponse(lines(), background=BackgroundTask(in_background))

    async with served(app, database) as client:
        answer = await client.post("/stream")
    assert NAME not in answer.headers
    assert answer.text == f"begun 1 {primary}"
    assert read_later[-1] == f"2 {primary}"


async def test_what_an_earlier_attempt_has_committed_in_a_block_is_told(
    postgresql_cluster: Cluster,
) -> None:
    with postgresql_cluster.fresh_database() as urls:
        async with (
            tables(postgresql_cluster, urls),
            Database(urls.primary, replicas=urls.replicas) as database,
        ):
            for replica in postgresql_cluster.replicas:
                await asyncio.to_thread(replica.pause)
            app, attempts = make_app(database), list[str]()

            @app.post("/retried")
            @transactional(isolation="REPEATABLE READ", retries=2)
            async def retried(request: Request) -> None:
                attempts.append(await found(database))
                await read(request.state.db, 1)
                if len(attempts) == 1:
                    await with_transaction(database, 1)
                await write(request.state.db, 2, 1)
                await write(request.state.db, 1, 2)  # a conflict with that of the block
                request.state.db.set_rollback_only()

            async with served(app, database) as client:
                answer = await client.post("/retried")
            assert answer.status_code == 200
            assert attempts[0].startswith("0 ")
            assert attempts[1:] == [f"1 {ports(urls)[0]}"]
            assert NAME in answer.headers


async def test_a_block_reads_what_another_one_has_committed_since_it_began(
    urls: Urls, database: Database, late: None
) -> None:
    async with database.session(read_only) as session:
        assert (await read(session, 1)).startswith("0 ")
        await with_transaction(database, 1)
        assert await read(session, 1) == f"1 {ports(urls)[0]}"
    assert [each.pool.checked_out for each in database.stats().replicas] == [0] * len(urls.replicas)


def test_a_position_is_forgotten_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise one that no server reaches any more would count in a worker for ever."""
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    own_writes = OwnWrites()
    own_writes.know(UNKNOWN)
    assert own_writes.needed == UNKNOWN
    now += 20
    own_writes.has_committed(Position("a", 2))
    own_writes.has_committed(Position("a", 1))
    assert own_writes.needed == UNKNOWN
    now += 20
    assert own_writes.needed == Position("a", 2)
    now += 20
    assert own_writes.needed is None


@contextmanager
def unchanged_context() -> Generator[None]:
    before = dict(contextvars.copy_context().items())
    yield
    after = dict(contextvars.copy_context().items())
    changed = [var.name for var in after if after[var] != before.get(var)]
    assert not [name for name in changed if "asgi_db" in name]


async def test_a_request_leaves_nothing_in_the_context_that_it_ran_in(database: Database) -> None:
    async with served(make_app(database), database) as client:
        for path in "/block/1", "/both":
            with unchanged_context():
                assert (await client.post(path)).status_code == 200


async def test_a_call_that_is_dropped_in_the_middle_ends_without_an_error(
    database: Database,
) -> None:
    """As one that the garbage collector ends, in a context of its own."""

    class Forever:
        def __await__(self) -> Generator[Any, Any, Any]:
            while True:
                yield None

    async def app(*_: object) -> None:
        await Forever()

    async def unused(*_: object) -> Any:
        raise AssertionError

    middleware = DBSessionMiddleware(app, database)
    for type in "http", "websocket":
        scope: Scope = {"type": type, "path": "/", "headers": []}
        call: Any = middleware(scope, unused, unused)
        contextvars.Context().run(call.send, None)
        with unchanged_context():
            call.close()
