"""Who holds what: `database.stats()`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from litestar import Litestar, get
from litestar.params import FromPath
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool, QueuePool
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from asgi_db import (
    Database,
    DatabaseBusyError,
    DBSession,
    DBSessionMiddleware,
    PoolProfile,
    read_only,
)
from asgi_db.types import Receive, Scope, Send
from asgi_db_fastapi import CurrentSession
from asgi_db_litestar import DatabasePlugin
from asgi_db_starlette import get_session
from tests.contract.client import call
from tests.internals import WITHOUT_SESSION, Outcome, PoolStats, RouteStats, Statistics, Tally
from tests.versions import NamedDependency

QUERY = text("SELECT 1")
POOL = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 30}


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A database with one connection."""
    async with Database(database_url, engine_options=POOL) as database:
        yield database


async def waiting(database: Database, number: int) -> None:
    """Let the others run until so many of them wait for a connection."""
    while database.stats().pool.waiting != number:  # noqa: ASYNC110 - the pool gives no event for it
        await asyncio.sleep(0)


def session_counters(database: Database) -> RouteStats:
    return database.stats().routes["`async with database.session()`"]


# -- the pool ----------------------------------------------------------------------------------


async def test_the_pool_is_counted(database_url: str) -> None:
    pool = PoolProfile(pool_size=2, max_overflow=3)
    async with Database(database_url, pool=pool) as database:
        assert database.stats().pool == PoolStats(size=2, limit=5)
        async with database.session() as one, database.session() as other:
            await one.execute(QUERY)
            await other.execute(QUERY)
            assert database.stats().pool == PoolStats(size=2, limit=5, checked_out=2)
            await one.rollback()
            assert database.stats().pool == PoolStats(size=2, limit=5, checked_out=1, idle=1)
        assert database.stats().pool == PoolStats(size=2, limit=5, idle=2)
    assert database.stats().pool == PoolStats()


async def test_a_connection_that_could_not_be_set_up_is_not_counted(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    def set_up(*_: object) -> None:
        raise LookupError("no such role")

    async with Database(database_url) as database:
        event.listen(database.engine.sync_engine, "connect", set_up)
        for _ in range(2):
            with pytest.raises(LookupError, match="no such role"):
                async with database.session() as session:
                    await session.execute(QUERY)
            assert database.stats().pool.idle == 0
        event.remove(database.engine.sync_engine, "connect", set_up)
        async with database.session() as session:
            await session.execute(QUERY)
        assert database.stats().pool.idle == 1
    assert [record for record in caplog.records if record.name == "asgi_db"] == []


async def test_who_waits_for_a_connection_is_counted(database: Database) -> None:
    async def read() -> None:
        async with database.session() as session:
            await session.execute(QUERY)

    async with database.session() as holder:
        await holder.execute(QUERY)
        readers = [asyncio.create_task(read()) for _ in range(2)]
        await waiting(database, 2)
        readers.pop().cancel()
        await waiting(database, 1)
    await asyncio.gather(*readers)
    assert database.stats().pool.waiting == 0


@pytest.mark.parametrize(
    ("max_overflow", "limit"), [(3, 5), (-1, None)], ids=["bounded", "unbounded"]
)
async def test_a_pool_of_the_users_own_is_counted_as_far_as_it_says(
    sqlite_url: str, max_overflow: int, limit: int | None
) -> None:
    engine = create_async_engine(sqlite_url, pool_size=2, max_overflow=max_overflow)
    assert isinstance(engine.pool, QueuePool)
    try:
        async with Database(engine=engine) as database, database.session() as session:
            await session.execute(QUERY)
            assert database.stats().pool == PoolStats(2, limit, checked_out=1, waiting=None)
    finally:
        await engine.dispose()


async def test_a_pool_that_keeps_nothing_has_no_bounds(sqlite_url: str) -> None:
    options = {"poolclass": NullPool}
    async with Database(sqlite_url, engine_options=options) as database:
        async with database.session() as session:
            await session.execute(QUERY)
            assert database.stats().pool == PoolStats(checked_out=1, waiting=None)
        assert database.stats().pool == PoolStats(waiting=None)


def test_the_loops_of_a_process_are_added_up(sqlite_url: str) -> None:
    database = Database(sqlite_url, engine_options=POOL)

    async def hold() -> None:
        async with database.session() as session:
            await session.execute(QUERY)
            await asyncio.to_thread(asyncio.run, look())
        await database.dispose()

    async def look() -> None:
        async with database, database.session() as session:
            await session.execute(QUERY)
            stats = database.stats()
            assert stats.pool == PoolStats(size=2, limit=2, checked_out=2)
            assert stats.holders[0].age > stats.holders[1].age

    asyncio.run(hold())


def test_to_ask_makes_no_engine_and_needs_no_loop() -> None:
    database = Database("postgresql://app:secret@db.example.org:5432/shop")
    stats = database.stats()
    assert (stats.name, stats.pool) == ("db.example.org:5432/shop", PoolStats())
    assert (stats.holders, stats.routes, database.engines()) == ((), {}, [])


# -- who holds, and who waits ------------------------------------------------------------------


async def test_what_is_held_while_something_else_is_done_shows(database: Database) -> None:
    async with database.session() as session:
        await session.execute(QUERY)
        (holder,) = database.stats().holders
        assert holder.route == "`async with database.session()`"
        await asyncio.sleep(0.1)
        (later,) = database.stats().holders
        assert later.age >= holder.age + 0.09
    found = session_counters(database)
    assert found.held - (found.busy - found.waited) >= 0.05
    assert database.stats().holders == ()


async def test_who_waited_for_a_connection_is_known(database: Database) -> None:
    async def read() -> None:
        async with database.session(read_only) as session:
            await session.execute(QUERY)

    async with database.transaction() as holder:
        await holder.execute(QUERY)
        reader = asyncio.create_task(read())
        await waiting(database, 1)
        await asyncio.sleep(0.1)
    await reader
    found = session_counters(database)
    assert 0.1 <= found.waited_max <= found.busy
    assert found.held < found.waited


async def test_who_got_no_connection_is_known(database_url: str) -> None:
    options = {**POOL, "pool_timeout": 0.1}
    async with Database(database_url, engine_options=options) as database:
        async with database.transaction() as holder:
            await holder.execute(QUERY)
            with pytest.raises(DatabaseBusyError):
                async with database.session() as session:
                    await session.execute(QUERY)
        found = session_counters(database)
        assert (found.units, found.timeouts, found.connections) == (1, 1, 0)
        assert found.waited >= 0.1


async def test_who_uses_the_engine_itself_has_a_name_of_its_own(database: Database) -> None:
    async with database.engine.connect() as connection:
        await connection.execute(QUERY)
        (holder,) = database.stats().holders
        assert holder.route == WITHOUT_SESSION
    found = database.stats().routes[WITHOUT_SESSION]
    assert (found.units, found.connections) == (0, 1)
    assert found.held_max == found.held > 0


async def test_a_connection_that_is_cut_off_is_counted_all_the_same(database: Database) -> None:
    async with database.session() as session:
        await session.execute(QUERY)
        await session.invalidate()
    assert session_counters(database).connections == 1
    assert database.stats().holders == ()


async def test_a_retry_is_counted(database: Database) -> None:
    database.statistics.retried("POST /orders")
    assert database.stats().routes["POST /orders"] == RouteStats(retries=1)


async def test_what_was_counted_does_not_change_any_more(database: Database) -> None:
    async with database.session() as session:
        await session.execute(QUERY)
    before = database.stats()
    async with database.session() as session:
        await session.execute(QUERY)
    assert before.routes["`async with database.session()`"].units == 1
    assert session_counters(database).units == 2


def test_who_reads_while_a_unit_is_counted_sees_its_outcome_or_nothing() -> None:
    statistics = Statistics()
    seen: list[RouteStats] = []

    class ReadInBetween(Tally):
        """At each step of the counting somebody reads, as another thread may."""

        def __getattribute__(self, name: str) -> Any:
            seen.extend(statistics.routes.values())
            return super().__getattribute__(name)

    outcomes: list[Outcome | None] = ["committed", "failed", None]
    for outcome in outcomes:
        tally = ReadInBetween()
        tally.outcome = outcome
        statistics.unit_ended("GET /", "transactional", tally)
    seen.extend(statistics.routes.values())
    for before, after in pairwise(seen):
        assert after.units == sum(after.outcomes().values())
        assert all(count >= before.outcomes()[how] for how, count in after.outcomes().items())
    assert seen[-1].outcomes() == {"committed": 1, "rolled_back": 0, "failed": 1, "none": 1}


# -- observers -----------------------------------------------------------------------------------


class Faulty:
    """An observer that fails whatever it is told."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def connection_taken(self, waited: float) -> None:
        raise self._error

    def connection_returned(self, held: float) -> None:
        raise self._error

    def used_without_session(self, held: float) -> None:
        raise self._error

    def unit_ended(self, route: str, mode: str, tally: Tally) -> None:
        raise self._error

    def retried(self, route: str) -> None:
        raise self._error


class Watchful(Faulty):
    """An observer that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def connection_taken(self, waited: float) -> None:
        self.told.append("taken")

    def connection_returned(self, held: float) -> None:
        self.told.append("returned")

    def used_without_session(self, held: float) -> None:
        self.told.append("used without a session")

    def unit_ended(self, route: str, mode: str, tally: Tally) -> None:
        self.told.append("ended")

    def retried(self, route: str) -> None:
        self.told.append("retried")


async def test_an_error_of_an_observer_is_logged_once_and_reaches_nothing_else(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    watchful = Watchful()
    database.statistics.observers = (Faulty(LookupError("its own fault")), watchful)
    for _ in range(2):
        async with database.transaction() as session:
            await session.execute(QUERY)
    assert sorted(watchful.told) == ["ended", "ended", "returned", "returned", "taken", "taken"]
    async with database.engine.connect():
        pass
    database.statistics.retried("POST /orders")
    assert watchful.told[-3:] == ["used without a session", "returned", "retried"]
    found = database.stats().routes["`async with database.transaction()`"]
    assert (found.committed, found.connections) == (2, 2)
    assert database.stats().holders == ()
    lines = [record for record in caplog.records if record.name == "asgi_db"]
    events = [
        "connection_taken",
        "connection_returned",
        "unit_ended",
        "used_without_session",
        "retried",
    ]
    assert {line.getMessage().partition("()")[0] for line in lines} == {
        f"Faulty.{event}" for event in events
    }
    assert len(lines) == len(events)
    assert all(line.levelname == "ERROR" and line.exc_info for line in lines)


def test_another_kind_of_error_of_an_observer_is_logged_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    statistics = Statistics()
    for error in LookupError(), ValueError(), ValueError():
        statistics.observers = statistics.observers or (Faulty(error),)
        vars(statistics.observers[0]).update(_error=error)
        statistics.connection_taken(0.0)
    assert len(caplog.records) == 2


def test_a_cancellation_out_of_an_observer_is_none_of_its_errors() -> None:
    statistics = Statistics()
    statistics.observers = (Faulty(asyncio.CancelledError()),)
    with pytest.raises(asyncio.CancelledError):
        statistics.connection_taken(0.0)


# -- the names of routes -----------------------------------------------------------------------


async def read_in_starlette(request: Request) -> Response:
    await get_session(request).execute(QUERY)
    return Response()


def in_starlette(database: Database) -> Starlette:
    sub = Mount("/sub", routes=[Route("/orders/{id}", read_in_starlette)])
    app = Starlette(routes=[Route("/orders/{id}", read_in_starlette), sub])
    app.add_middleware(DBSessionMiddleware, database=database)
    return app


def in_fastapi(database: Database) -> FastAPI:
    async def read_in_fastapi(id: int, session: CurrentSession) -> None:
        await session.execute(QUERY)

    app, router = FastAPI(), APIRouter()
    app.add_api_route("/orders/{id}", read_in_fastapi)
    router.add_api_route("/orders/{id}", read_in_fastapi)
    app.include_router(router, prefix="/sub")
    app.add_middleware(DBSessionMiddleware, database=database)
    return app


def in_litestar(database: Database) -> Litestar:
    @get(["/orders/{id:int}", "/sub/orders/{id:int}"])
    async def read_in_litestar(id: FromPath[int], db_session: NamedDependency[DBSession]) -> None:
        await db_session.execute(QUERY)

    return Litestar([read_in_litestar], plugins=[DatabasePlugin(database)])


@pytest.mark.parametrize("make_app", [in_starlette, in_fastapi, in_litestar])
async def test_a_route_has_one_name_whatever_the_path_of_the_request(
    sqlite_url: str, make_app: type
) -> None:
    async with Database(sqlite_url) as database:
        app = make_app(database)
        for number in range(5):
            assert (await call(app, f"/orders/{number}", method="GET")).status == 200
            assert (await call(app, f"/sub/orders/{number}", method="GET")).status == 200
            assert (await call(app, f"/no/{number}", method="GET")).status == 404
        routes = database.stats().routes
        assert sum(found.units for found in routes.values()) == 10
        assert len(routes) in (1, 2)  # Starlette does not tell where a sub-application is mounted
        for route in routes:
            assert route.startswith("GET /")
            assert "orders/{id" in route and make_app.__name__.removeprefix("in_") in route


async def test_without_routes_nothing_that_a_client_sends_becomes_a_name(sqlite_url: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await scope["state"]["db"].execute(QUERY)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with Database(sqlite_url) as database:
        for number in range(5):
            wrapped = DBSessionMiddleware(app, database)
            await call(wrapped, f"/{number}", method=f"METHOD{number}")
            await call(wrapped, f"/{number}", method="GET")
        assert set(database.stats().routes) == {"_OTHER", "GET"}


async def test_what_runs_before_the_routing_belongs_to_the_route(sqlite_url: str) -> None:
    async with Database(sqlite_url) as database:
        app = in_starlette(database)

        async def authenticated(scope: Scope, receive: Receive, send: Send) -> None:
            await scope["state"]["db"].execute(QUERY)
            await app(scope, receive, send)

        for mode in read_only, read_only(snapshot=True):
            await call(
                DBSessionMiddleware(authenticated, database, mode=mode), "/orders/1", method="GET"
            )
        ((route, found),) = database.stats().routes.items()
        assert route == "GET /orders/{id} (read_in_starlette)"
        assert (found.units, found.statements, found.connections) == (2, 4, 3)
