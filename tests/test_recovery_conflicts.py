"""A read that a hot standby cancels, because it is in the way of what the primary has done."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import text

from asgi_db import Database, DBSession, DBSessionMiddleware, Mode, plain, read_only, transactional
from asgi_db.types import Receive, Scope, Send
from tests.clusters import Cluster, Urls
from tests.contract.client import Exchange, assert_refused, call
from tests.drivers import until_closed
from tests.pools import checked_out
from tests.servers import assert_idle, outside, sql

POOL = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}
READ = "SELECT count(*), pg_sleep(3) FROM kept GROUP BY id > 0"


@pytest.fixture
async def urls(postgresql_cluster: Cluster, postgresql_driver: str) -> AsyncIterator[Urls]:
    """A database with a table of ten rows; its prompt standby waits for no reader."""
    standby = postgresql_cluster.prompt.server.url
    patience = "ALTER SYSTEM SET max_standby_streaming_delay", "SELECT pg_reload_conf()"
    sql(standby, f"{patience[0]} = 0", patience[1])
    with postgresql_cluster.fresh_database() as urls:
        sql(urls.primary, "CREATE TABLE kept (id int)", "INSERT INTO kept VALUES (1), (2)")
        postgresql_cluster.wait_until_caught_up(postgresql_cluster.prompt)
        yield urls
    sql(standby, f"{patience[0]} TO DEFAULT", patience[1])


async def get_in_the_way(urls: Urls) -> None:
    """Remove rows that a statement which runs on the standby now might still need."""
    async with outside(urls.primary) as primary:
        await primary.execute("INSERT INTO kept VALUES (0)")
        await primary.execute("DELETE FROM kept WHERE id = 0")
        await primary.execute("VACUUM kept")


@asynccontextmanager
async def always_in_the_way(urls: Urls) -> AsyncGenerator[None]:
    enough = asyncio.Event()

    async def go_on() -> None:
        while not enough.is_set():
            await get_in_the_way(urls)

    going_on = asyncio.create_task(go_on())
    try:
        yield
    finally:
        enough.set()  # asyncpg leaves an exception behind where its connecting is cancelled
        await going_on


async def serve(database: Database, mode: Mode, *statements: str) -> Exchange:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session: DBSession = scope["state"]["db"]
        for statement in statements:
            await session.execute(text(statement))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    async with asyncio.timeout(60):
        return await call(DBSessionMiddleware(app, database, mode=mode))


def reason(exchange: Exchange) -> str:
    reason = str(json.loads(exchange.body)["reason"])
    assert reason in ("conflict", "down")
    return reason


async def assert_in_order(database: Database) -> None:
    assert checked_out(database) == 0
    assert (await serve(database, read_only, "SELECT 1")).status == 200
    await assert_idle(database.url.render_as_string(hide_password=False))


async def until_asleep(urls: Urls) -> None:
    """Wait until the standby is in the middle of the statement, and not between two messages."""
    query = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    async with asyncio.timeout(20), outside(urls.prompt) as connection:
        while True:
            if await connection.execute(query):
                return
            await asyncio.sleep(0.01)


async def test_in_autocommit_it_is_sent_again(urls: Urls) -> None:
    async with Database(urls.prompt, engine_options=POOL) as database:
        for _ in range(5):
            reading = asyncio.create_task(serve(database, read_only, "SELECT 1", READ))
            await until_asleep(urls)
            before = await conflicts(urls)
            await get_in_the_way(urls)
            exchange = await reading
            assert await conflicts(urls) > before
            if exchange.status == 200:
                assert exchange.error is None
                break
            # A read that is not sent again is refused as a conflict. This one was, and the standby
            # has closed its connection between two messages.
            assert_refused(exchange, "down")
        else:
            pytest.fail("it was never sent again")
        await assert_in_order(database)


async def conflicts(urls: Urls) -> int:
    """How many statements the standby says it has cancelled."""
    async with outside(urls.prompt) as connection:
        rows = await connection.execute(
            "SELECT conflicts FROM pg_stat_database WHERE datname = current_database()"
        )
    return int(rows[0][0])


@pytest.mark.parametrize("mode", [read_only, read_only(snapshot=True), transactional, plain])
async def test_one_that_is_always_in_the_way_is_a_503(urls: Urls, mode: Mode) -> None:
    async with Database(urls.prompt, engine_options=POOL) as database:
        async with always_in_the_way(urls):
            exchange = await serve(database, mode, READ)
        # In between the messages of a transaction the standby closes its connection.
        assert_refused(exchange, reason(exchange))
        await assert_in_order(database)


@pytest.mark.parametrize("mode", [read_only(snapshot=True), transactional, plain])
async def test_in_a_transaction_it_is_a_503_at_once(urls: Urls, mode: Mode) -> None:
    """What was read before would not be of the same moment."""
    async with Database(urls.prompt, engine_options=POOL) as database:
        reading = asyncio.create_task(serve(database, mode, "SELECT 1", READ))
        await until_asleep(urls)
        await get_in_the_way(urls)
        assert_refused(await reading, "conflict")
        await assert_in_order(database)


async def test_a_snapshot_that_is_in_the_way_while_nothing_runs_is_a_503(urls: Urls) -> None:
    """The standby closes its connection."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session: DBSession = scope["state"]["db"]
        await session.execute(text("SELECT * FROM kept"))
        raw = await (await session.connection()).get_raw_connection()
        await get_in_the_way(urls)
        await until_closed(raw.driver_connection)
        await session.execute(text("SELECT * FROM kept"))

    async with Database(urls.prompt, engine_options=POOL) as database:
        in_snapshot = DBSessionMiddleware(app, database, mode=read_only(snapshot=True))
        async with asyncio.timeout(60):
            assert_refused(await call(in_snapshot), "down")
        await assert_in_order(database)
