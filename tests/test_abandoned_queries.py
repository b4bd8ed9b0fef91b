"""A query whose request was cancelled does not run on at the server.

To close a connection is not enough: a server that is busy with a query looks at its client only
when it has something to send.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any

import asyncpg
import psycopg
import pytest
from sqlalchemy import insert, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_db import Database, DBSession, Mode, plain, read_only, transactional
from asgi_db.types import Send
from tests import servers
from tests.cancelling import (
    SLEEP,
    WAYS,
    Site,
    answer,
    each_way,
    emptied,
    no_complaints,
    on_the_server,
    outcome,
    tables_on,
    turns,
)
from tests.drivers import is_psycopg
from tests.limits import set_limits
from tests.relay import Fate, Relay, once
from tests.servers import (
    DatabaseServer,
    Outside,
    assert_disconnected,
    assert_idle,
    assert_no_thread_of_sqlite,
    outside,
    server_connections,
)
from tests.tables import Author, Base, authors

GONE = 20
"""Seconds, of the 60 that a query takes which nobody ends."""

POOL_SIZE = 2
POOL = {"pool_size": POOL_SIZE, "max_overflow": 0, "pool_timeout": 5}

each_server = pytest.mark.parametrize("server", ["postgresql", "mysql"])


@pytest.fixture(scope="module")
def postgresql_tables(postgresql_server: DatabaseServer) -> Iterator[str]:
    with tables_on(postgresql_server) as url:
        yield url


@pytest.fixture(scope="module")
def mysql_tables(mysql_server: DatabaseServer) -> Iterator[str]:
    with tables_on(mysql_server) as url:
        yield url


@pytest.fixture
def postgresql_url(postgresql_tables: str) -> str:
    return emptied(postgresql_tables)


@pytest.fixture
def mysql_url(mysql_tables: str) -> str:
    return emptied(mysql_tables)


@pytest.fixture
def url(request: pytest.FixtureRequest, server: str) -> str:
    """The URL of an empty database of the server of this test."""
    url: str = request.getfixturevalue(f"{server}_url")
    return url


def tasks() -> set[str]:
    """What the event loop has to do, apart from running the tests."""
    running = {str(task.get_coro()) for task in asyncio.all_tasks()}
    return {name for name in running if "TestRunner" not in name}


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    """At its end the loop has nothing more to do than before, and nothing to complain of."""
    before = tasks()
    async with no_complaints():
        async with Database(url, engine_options=POOL) as database:
            await database.create_tables(Base.metadata)
            yield database
        assert tasks() == before
        await assert_disconnected(url)


async def sleep(session: DBSession, send: Send) -> None:
    """Run a query which does not end by itself."""
    await session.execute(text(SLEEP[session.get_bind().dialect.name]))
    await answer(send)


async def asleep(url: str, number: int = 1) -> None:
    """Wait until the server runs so many of these queries."""
    while True:
        queries = [client.query.upper() for client in await server_connections(url)]
        if sum("SLEEP(" in query for query in queries) == number:
            return
        await asyncio.sleep(0.01)


async def asleep_as(url: str) -> int:
    """The number of the connection which runs this query."""
    [number] = [each.id for each in await server_connections(url) if "SLEEP(" in each.query.upper()]
    return number


def begin(site: Site, way: str = "task", mode: Mode = transactional) -> asyncio.Task[Any]:
    """Begin a request which runs such a query."""
    return asyncio.create_task(site.serve(site.app(sleep, way, mode)))


async def ended(*requests: asyncio.Task[Any]) -> None:
    _, running = await asyncio.wait(requests, timeout=20)
    assert not running


@pytest.mark.parametrize(
    ("way", "mode"),
    [(way, transactional) for way in WAYS] + [("task", plain), ("task", read_only)],
)
@each_server
async def test_it_is_ended_whatever_cancels_its_request(
    database: Database, url: str, way: str, mode: Mode
) -> None:
    site = Site(url, database)
    request = begin(site, way, mode)
    await asleep(url)
    site.cancel()
    if way == "twice":
        await asyncio.sleep(0)
        site.cancel()
    await site.assert_cancelled(request, way)
    await assert_idle(url, GONE)
    await site.assert_clean()


@pytest.mark.parametrize("way", ["middleware-timeout", "middleware-disconnect"])
@each_server
async def test_it_is_ended_when_a_middleware_above_gives_up(
    database: Database, url: str, way: str
) -> None:
    site = Site(url, database)
    request = begin(site, way)
    await asleep(url)
    site.cancel()
    await ended(request)
    assert outcome(request) in ("TimeoutError", "ClientDisconnect")
    await assert_idle(url, GONE)
    await site.assert_clean()


@each_server
@pytest.mark.parametrize("mode", [plain, transactional, read_only])
async def test_it_is_ended_when_the_time_of_its_mode_is_over(
    database: Database, url: str, mode: Callable[..., Mode]
) -> None:
    site = Site(url, database)
    exchange = await site.serve(site.app(sleep, "task", mode(timeout=0.2)))
    assert exchange.status == 503
    await assert_idle(url, GONE)
    await site.assert_clean()


@each_server
async def test_it_is_ended_when_the_handler_itself_has_lost_patience(
    database: Database, url: str
) -> None:
    async def endpoint(session: DBSession, send: Send) -> None:
        query = asyncio.create_task(sleep(session, send))
        await asleep(url)
        query.cancel()
        await asyncio.wait((query,))
        await session.rollback()
        await answer(send)

    site = Site(url, database)
    exchange = await site.serve(site.app(endpoint, "task", plain))
    assert (exchange.status, exchange.error) == (201, None)
    await assert_idle(url, GONE)
    await site.assert_clean()


@each_server
async def test_it_is_ended_in_the_middle_of_a_stream(database: Database, url: str) -> None:
    async def endpoint(session: DBSession, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await sleep(session, send)

    site = Site(url, database)
    request = asyncio.create_task(site.serve(site.app(endpoint, "scope", read_only)))
    await asleep(url)
    site.cancel()
    await ended(request)
    await assert_idle(url, GONE)
    await site.assert_clean()


@each_server
async def test_it_is_ended_outside_requests_too(database: Database, url: str) -> None:
    async def job() -> None:
        async with database.transaction() as session:
            await session.execute(text(SLEEP[session.get_bind().dialect.name]))

    running = asyncio.create_task(job())
    await asleep(url)
    running.cancel()
    await ended(running)
    await assert_idle(url, GONE)


@each_server
async def test_it_is_ended_on_an_engine_of_the_users_own(url: str) -> None:
    engine = create_async_engine(url, **POOL)
    database = Database(engine=engine)
    await database.create_tables(Base.metadata)
    site = Site(url, database)
    request = begin(site)
    await asleep(url)
    site.cancel()
    await ended(request)
    await assert_idle(url, GONE)
    await site.assert_clean()
    await database.dispose()
    await engine.dispose()
    await assert_disconnected(url)


async def test_it_is_ended_where_the_settings_name_a_pooler(postgresql_url: str) -> None:
    async with Database(postgresql_url, engine_options=POOL, pooler="transaction") as database:
        await database.create_tables(Base.metadata)
        site = Site(postgresql_url, database)
        request = begin(site)
        await asleep(postgresql_url)
        site.cancel()
        await ended(request)
        await assert_idle(postgresql_url, GONE)
        await site.assert_clean()


# -- many, and on a pool that is full -----------------------------------------------------------


@each_server
async def test_many_at_once_are_ended_all_together(database: Database, url: str) -> None:
    """Those that are still waiting for a connection when they are cancelled never run."""
    sites = [Site(url, database) for _ in range(20)]
    requests = [begin(site) for site in sites]
    await asleep(url, POOL_SIZE)
    for site in sites:
        site.cancel()
    await ended(*requests)
    await assert_idle(url, GONE)
    await sites[0].assert_clean()


@each_server
async def test_each_wave_is_ended(url: str) -> None:
    """While one wave is being ended, the next is cut off already."""
    many = {"pool_size": 10, "max_overflow": 0}
    async with Database(url, engine_options=many) as database:
        await database.create_tables(Base.metadata)
        waves: list[asyncio.Task[Any]] = []
        for _ in range(3):
            sites = [Site(url, database) for _ in range(10)]
            waves += [begin(site) for site in sites]
            await on_the_server(url, SLEEP[database.url.get_backend_name()])
            for site in sites:
                site.cancel()
        await ended(*waves)
        await assert_idle(url, GONE)
        await Site(url, database).assert_clean()


@each_server
async def test_on_a_full_pool_it_is_ended_and_the_others_go_on(
    database: Database, url: str
) -> None:
    async def hold(session: DBSession, send: Send) -> None:
        await session.execute(insert(Author).values(name="ada"))
        holds.set()
        await let_go.wait()
        await answer(send)

    holds, let_go = asyncio.Event(), asyncio.Event()
    cancelled, held = Site(url, database), Site(url, database)
    holding = asyncio.create_task(held.serve(held.app(hold, "task")))
    await holds.wait()
    request = begin(cancelled)
    await asleep(url)
    cancelled.cancel()
    await ended(request)
    async with asyncio.timeout(GONE):
        await asleep(url, 0)
    let_go.set()
    assert (await holding).status == 201
    await held.assert_clean()


# -- when the server cannot be reached ----------------------------------------------------------


@each_server
async def test_on_a_frozen_network_it_is_ended_as_soon_as_the_network_is_back(url: str) -> None:
    async with Relay(url) as relay, Database(relay.url, engine_options=POOL) as database:
        await database.create_tables(Base.metadata)
        site = Site(relay.url, database)
        request = begin(site)
        await asleep(url)
        relay.freeze()
        site.cancel()
        await ended(request)
        await asleep(url)  # as it was
        relay.thaw()
        await assert_idle(url, GONE)
        await site.assert_clean()


@each_server
async def test_while_nobody_can_connect_it_is_tried_again(url: str) -> None:
    async with Relay(url) as relay, Database(relay.url, engine_options=POOL) as database:
        await database.create_tables(Base.metadata)
        site = Site(relay.url, database)
        request = begin(site)
        await asleep(url)
        relay.refuse()
        site.cancel()
        await ended(request)
        await asleep(url)
        await relay.start()
        await assert_idle(url, GONE)
        await site.assert_clean()


# -- at the end ---------------------------------------------------------------------------------


@each_server
async def test_dispose_waits_until_it_is_ended(database: Database, url: str) -> None:
    site = Site(url, database)
    request = begin(site)
    await asleep(url)
    site.cancel()
    await ended(request)
    await database.dispose()
    assert "SLEEP(" not in str([each.query.upper() for each in await server_connections(url)])


@each_server
async def test_dispose_ends_what_is_still_running_and_does_not_acknowledge_it(
    database: Database, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def endpoint(session: DBSession, send: Send) -> None:
        await session.execute(insert(Author).values(name="ada"))
        await sleep(session, send)

    set_limits(monkeypatch, dispose=0.1)
    site = Site(url, database)
    request = asyncio.create_task(site.serve(site.app(endpoint, "task")))
    await asleep(url)
    await database.dispose()
    assert "SLEEP(" not in str([each.query.upper() for each in await server_connections(url)])
    await ended(request)
    assert (await request).status >= 500
    assert await authors(url) == []


# -- nobody else is hit -------------------------------------------------------------------------


async def test_a_newer_connection_with_its_number_is_spared(postgresql_url: str) -> None:
    """PostgreSQL gives the number of a connection that has ended to another one, some day."""

    class Impostor(asyncpg.Connection):
        """Has the number of another connection, as one that has ended may have."""

        def get_server_pid(self) -> int:
            return int(numbers[0]) if numbers else super().get_server_pid()

    class ImpostorOfPsycopg(psycopg.AsyncConnection[Any]):
        """The same for psycopg."""

        @property
        def info(self) -> Any:
            return SimpleNamespace(backend_pid=numbers[0]) if numbers else super().info

    async def connect() -> Any:
        url = make_url(postgresql_url).set(drivername="postgresql")
        return await ImpostorOfPsycopg.connect(url.render_as_string(hide_password=False))

    numbers: list[int] = []
    own = {"connect_args": {"connection_class": Impostor}}
    options = {**POOL, **({"async_creator": connect} if is_psycopg(postgresql_url) else own)}
    async with Database(postgresql_url, engine_options=options) as database:
        await database.create_tables(Base.metadata)
        site = Site(postgresql_url, database)
        request = begin(site)
        await asleep(postgresql_url)
        async with outside(postgresql_url) as bystander:
            numbers += [number for (number,) in await bystander.execute("SELECT pg_backend_pid()")]
            site.cancel()
            await ended(request)
            await database.dispose()
            assert await bystander.execute("SELECT 1") == [(1,)]


@asynccontextmanager
async def connection_number(url: str, number: int) -> AsyncGenerator[Outside, None]:
    """A connection to a MariaDB that has counted up to it."""
    async with AsyncExitStack() as stack:
        while True:
            connection = await stack.enter_async_context(outside(url))
            [(its_own,)] = await connection.execute("SELECT connection_id()")
            assert int(its_own) <= number
            if int(its_own) == number:
                yield connection
                return


async def test_after_a_restart_nobody_is_hit_who_has_its_number_now(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """MariaDB counts its connections from the beginning again; the statement has ended with it."""
    with servers.mariadb(own=True) as server, server.fresh_database() as url:
        async with Relay(url) as relay, connection_number(url, 50):
            async with Database(relay.url, engine_options=POOL) as database:
                await database.create_tables(Base.metadata)
                site = Site(relay.url, database)
                request = begin(site)
                await asleep(url)
                number = await asleep_as(url)
                relay.refuse()
                site.cancel()
                await ended(request)
                await asyncio.to_thread(server.restart, "immediate")
                async with connection_number(url, number) as bystander:
                    await relay.start()
                    await site.assert_clean()
                    await database.dispose()
                    assert await bystander.execute("SELECT 1") == [(1,)]
        assert "may still run" not in caplog.text


@each_server
async def test_one_that_somebody_else_has_ended_is_no_trouble(
    database: Database, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    site = Site(url, database)
    request = begin(site)
    await asleep(url)
    number = await asleep_as(url)
    async with outside(url) as connection:
        kill = "SELECT pg_terminate_backend({})" if url.startswith("postgresql") else "KILL {}"
        site.cancel()
        await connection.execute(kill.format(number))
    await ended(request)
    await database.dispose()
    assert "could" not in caplog.text


async def test_a_server_that_cannot_be_told_is_left_alone_after_a_while(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_limits(monkeypatch, attempt=0.2, give_up=0)
    with servers.postgresql(own=True) as server, server.fresh_database() as url:
        async with Database(url, engine_options=POOL) as database:
            await database.create_tables(Base.metadata)
            site = Site(url, database)
            request = begin(site)
            await asleep(url)
            with server.frozen():
                site.cancel()
                await ended(request)
                async with asyncio.timeout(10):
                    while "may still run on the server" not in caplog.text:  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
            assert "1 statements" in caplog.text


# -- SQLite -------------------------------------------------------------------------------------

ENDLESS = """
    WITH RECURSIVE n(i) AS (SELECT begin() UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n
"""


async def compute(session: DBSession, send: Send) -> None:
    """Run a query which does not end by itself, in the thread of the connection."""
    connection = await (await session.connection()).get_raw_connection()
    driver: Any = connection.driver_connection
    await driver.create_function("begin", 0, begun.set)
    about_to_begin.set()
    await session.execute(text(ENDLESS))


begun = threading.Event()
about_to_begin = threading.Event()


@each_way
async def test_sqlite_stops_computing(sqlite_url: str, way: str) -> None:
    begun.clear()
    async with Database(sqlite_url) as database:
        await database.create_tables(Base.metadata)
        site = Site(sqlite_url, database)
        request = asyncio.create_task(site.serve(site.app(compute, way)))
        await asyncio.to_thread(begun.wait)
        site.cancel()
        if way == "twice":
            await asyncio.sleep(0)
            site.cancel()
        await site.assert_cancelled(request, way)
        await site.assert_clean()
    await assert_no_thread_of_sqlite()


@pytest.mark.parametrize("number", range(6))
async def test_sqlite_does_not_begin_to_compute_for_nobody(sqlite_url: str, number: int) -> None:
    """It is cancelled just when it is handed to the thread."""
    about_to_begin.clear()
    async with Database(sqlite_url) as database:
        await database.create_tables(Base.metadata)
        site = Site(sqlite_url, database)
        request = asyncio.create_task(site.serve(site.app(compute, "task")))
        while not about_to_begin.is_set():
            await turns(1)
        await turns(number)
        site.cancel()
        await site.assert_cancelled(request, "task")
        await site.assert_clean()
    await assert_no_thread_of_sqlite()


async def test_sqlite_does_not_compute_what_comes_after_the_interrupt(sqlite_url: str) -> None:
    """The thread is busy, so that the query begins long after it was cut off."""
    begun.clear()
    busy, go_on = threading.Event(), threading.Event()

    def keep_busy() -> None:
        busy.set()
        go_on.wait(10)

    async def compute_later(session: DBSession, send: Send) -> None:
        connection = await (await session.connection()).get_raw_connection()
        driver: Any = connection.driver_connection
        await driver.create_function("begin", 0, begun.set)
        await driver.create_function("keep_busy", 0, keep_busy)
        before = asyncio.ensure_future(driver.execute_fetchall("SELECT keep_busy()"))
        await asyncio.to_thread(busy.wait)
        about_to_begin.set()
        try:
            await session.execute(text(ENDLESS))
        finally:
            with suppress(sqlite3.OperationalError):  # that the interrupt has met
                await before

    about_to_begin.clear()
    async with Database(sqlite_url) as database:
        await database.create_tables(Base.metadata)
        site = Site(sqlite_url, database)
        request = asyncio.create_task(site.serve(site.app(compute_later, "task")))
        await asyncio.to_thread(about_to_begin.wait)
        await turns(5)
        site.cancel()
        await turns(5)
        assert not begun.is_set()
        go_on.set()
        await site.assert_cancelled(request, "task")
        await site.assert_clean()
    await assert_no_thread_of_sqlite()


async def test_sqlite_gives_its_lock_back_when_the_interrupt_meets_a_statement_with_rows_left(
    sqlite_url: str,
) -> None:
    """SQLite goes on to refuse whatever comes, a ROLLBACK too, until that statement is gone."""
    busy, go_on = threading.Event(), threading.Event()

    def keep_busy() -> None:
        busy.set()
        go_on.wait(10)

    async with Database(sqlite_url) as database:
        await database.create_tables(Base.metadata)
        async with database.session() as session:
            await session.execute(insert(Author).values(name="lost"))
            connection = await (await session.connection()).get_raw_connection()
            driver: Any = connection.driver_connection
            await driver.create_function("keep_busy", 0, keep_busy)
            cursor = await driver.cursor()
            await cursor.execute("SELECT 1 UNION SELECT 2")
            statement = asyncio.create_task(session.execute(text("SELECT keep_busy()")))
            await asyncio.to_thread(busy.wait)
            statement.cancel()
            await asyncio.wait((statement,))
            await turns(5)  # it has been interrupted, and cannot have been closed yet
            go_on.set()
            await database.dispose()
            async with outside(sqlite_url) as other:
                await other.execute("INSERT INTO author (name) VALUES ('kept')")
            assert await authors(sqlite_url) == ["kept"]
    await assert_no_thread_of_sqlite()


@each_server
async def test_a_query_that_was_cut_off_on_its_way_to_the_server_is_ended_there(url: str) -> None:
    """It begins at the server after it has been cut off here."""
    async with Relay(url) as relay, Database(relay.url, engine_options=POOL) as database:
        async with database.session() as session:
            await session.execute(text("SELECT 1"))
        relay.fate_of = once(b"SLEEP" if "mysql" in url else b"pg_sleep", Fate.HELD)
        async with database.session() as session:
            query = SLEEP[make_url(url).get_backend_name()]
            sleeping = asyncio.create_task(session.execute(text(query)))
            await relay.holds_something.wait()
            sleeping.cancel()
            await asyncio.wait((sleeping,))
        relay.thaw()
        await database.ping()  # what was held has arrived
        await assert_idle(url, within=GONE)
