"""The database goes away: restarted, frozen, behind a network that fails; and it comes back."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_db import (
    Database,
    DatabaseDownError,
    DatabaseTimeoutError,
    DBSession,
    DBSessionMiddleware,
    FailedTransactionError,
    Mode,
    OutcomeUnknownError,
    UnavailableError,
    plain,
    read_only,
    transactional,
)
from asgi_db.types import ASGIApp, Receive, Scope, Send
from tests import servers
from tests.contract.client import Exchange, call
from tests.drivers import until_closed
from tests.limits import set_limits
from tests.loops import every_loop
from tests.pools import checked_out
from tests.relay import Fate, Relay, nth, once
from tests.servers import DatabaseServer, HowToStop, assert_disconnected, assert_idle, outside
from tests.tables import Author, Base, Child, Deferred, authors

POOL = {"pool_size": 5, "max_overflow": 0, "pool_timeout": 5}
ONE_CONNECTION = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}
SELECT_1 = text("SELECT 1")


@pytest.fixture(params=[servers.postgresql, servers.mariadb], scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[DatabaseServer]:
    """A server that may be restarted and frozen."""
    with request.param(own=True) as server:
        yield server


@pytest.fixture
def url_of_server(server: DatabaseServer) -> Iterator[str]:
    """An empty database on it."""
    with server.empty_database() as url:
        yield url


@pytest.fixture
def no_ping(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection counts as idle, however slow the machine is."""
    set_limits(monkeypatch, verify_after_idle=1000)


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncGenerator[Database, None]:
    """A database with its tables, whose pool has its one connection."""
    async with Database(url, engine_options={**ONE_CONNECTION, **options}) as database:
        await database.create_tables(Base.metadata)
        yield database


@asynccontextmanager
async def relayed(url: str, **options: Any) -> AsyncGenerator[tuple[Relay, Database], None]:
    """The same through a relay."""
    async with Relay(url) as relay, opened(relay.url, **options) as database:
        yield relay, database


def writing(database: Database, mode: Mode = transactional) -> ASGIApp:
    """An application which writes the author whose number the path is, and answers 201."""

    async def write(scope: Scope, receive: Receive, send: Send) -> None:
        number = int(scope["path"][1:])
        session: DBSession = scope["state"]["db"]
        await session.execute(insert(Author).values(id=number, name=str(number)))
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body"})

    return DBSessionMiddleware(write, database, mode=mode)


def reason(exchange: Exchange) -> str:
    """Why a request was refused."""
    assert (exchange.status, exchange.complete, exchange.error) == (503, True, None), exchange
    return str(json.loads(exchange.body)["reason"])


async def assert_full_size(database: Database, size: int = 5) -> None:
    """As many sessions as the pool has connections work at the same time, and nothing is held."""

    async def work() -> None:
        async with database.session() as session:
            assert await session.scalar(SELECT_1) == 1
            await everybody.wait()

    assert checked_out(database) == 0
    everybody = asyncio.Barrier(size)
    async with asyncio.timeout(30):
        await asyncio.gather(*(work() for _ in range(size)))
    assert checked_out(database) == 0


# -- a restart under writers -------------------------------------------------------------------


@dataclass
class Writers:
    """Clients which write one row after the other, and remember what they were answered."""

    app: ASGIApp
    acknowledged: set[int] = field(default_factory=set[int])
    unknown: set[int] = field(default_factory=set[int])
    refused: set[int] = field(default_factory=set[int])

    def __post_init__(self) -> None:
        self._numbers = itertools.count(1)  # 0 is no number to MariaDB
        self._news = asyncio.Condition()
        self.goes_on = True

    async def write(self) -> int:
        """Write a row; return its number."""
        number = next(self._numbers)
        exchange = await call(self.app, f"/{number}")
        if exchange.status == 201 and exchange.error is None:
            self.acknowledged.add(number)
        elif reason(exchange) == "outcome-unknown":
            self.unknown.add(number)
        else:
            self.refused.add(number)
        async with self._news:
            self._news.notify_all()
        return number

    async def __call__(self) -> None:
        while self.goes_on:
            await self.write()

    async def acknowledge(self, more: int) -> None:
        """Wait until so many writes more have succeeded."""
        enough = len(self.acknowledged) + more
        async with asyncio.timeout(30), self._news:
            await self._news.wait_for(lambda: len(self.acknowledged) >= enough)

    def stop(self) -> None:
        self.goes_on = False

    async def assert_honest(self, url: str) -> None:
        """What was acknowledged is there, and nothing is there which was refused."""
        there = {int(name) for name in await authors(url)}
        assert self.acknowledged - there == set(), "acknowledged, and lost"
        assert there - self.acknowledged - self.unknown == set(), "refused, and applied"


async def read_again_and_again(database: Database, writers: Writers) -> None:
    """Ask for a number; whoever is answered gets his own."""

    async def read(scope: Scope, receive: Receive, send: Send) -> None:
        session: DBSession = scope["state"]["db"]
        answer = await session.scalar(text(f"SELECT {scope['path'][1:]}"))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(answer).encode()})

    app = DBSessionMiddleware(read, database, mode=read_only)
    for number in itertools.count(next(starts), 1000):
        if not writers.goes_on:
            return
        exchange = await call(app, f"/{number}")
        if exchange.status == 200:
            assert exchange.body == str(number).encode()
        else:
            assert reason(exchange) in ("down", "busy")


starts = itertools.count(1)


@pytest.mark.parametrize("how", ["immediate", "fast"])
async def test_a_restart_under_writers_loses_nothing_that_was_acknowledged(
    server: DatabaseServer, url_of_server: str, how: HowToStop
) -> None:
    async with Database(url_of_server, engine_options=POOL) as database:
        await database.create_tables(Base.metadata)
        writers = Writers(writing(database))
        tasks = [asyncio.create_task(writers()) for _ in range(20)]
        tasks += [asyncio.create_task(read_again_and_again(database, writers)) for _ in range(5)]
        for _ in range(2):
            await writers.acknowledge(50)
            await asyncio.to_thread(server.restart, how)
        await writers.acknowledge(50)
        writers.stop()
        async with asyncio.timeout(30):
            await asyncio.gather(*tasks)
        assert writers.refused or writers.unknown  # else nobody has noticed anything
        await writers.assert_honest(url_of_server)
        await assert_full_size(database)
        await assert_idle(url_of_server)


@pytest.mark.parametrize("how", ["immediate", "fast"])
@pytest.mark.usefixtures("no_ping")
async def test_the_first_requests_after_a_restart_succeed_without_a_ping(
    server: DatabaseServer, url_of_server: str, how: HowToStop
) -> None:
    """The five connections of the pool are dead, and the driver has heard of it."""
    async with Database(url_of_server, engine_options=POOL) as database:
        await database.create_tables(Base.metadata)
        writers = Writers(writing(database))
        for _ in range(2):
            await assert_full_size(database)
            await asyncio.to_thread(server.restart, how)
            await asyncio.gather(*(writers.write() for _ in range(5)))
        assert writers.acknowledged == set(range(1, 11))
        await writers.assert_honest(url_of_server)


async def test_the_first_read_after_a_restart_succeeds_in_each_mode(
    server: DatabaseServer, url_of_server: str
) -> None:
    async with Database(url_of_server, engine_options=ONE_CONNECTION) as database:
        for mode in (plain, transactional, read_only, read_only(snapshot=True)):
            for _ in range(2):  # the second time on the connection of the first
                async with database.session(mode) as session:
                    assert await session.scalar(SELECT_1) == 1
            await asyncio.to_thread(server.restart, "immediate")
        await database.ping()


async def test_while_the_server_is_away_each_request_is_refused_at_once_and_then_served(
    server: DatabaseServer, url_of_server: str
) -> None:
    async with Database(url_of_server, engine_options=POOL) as database:
        await database.create_tables(Base.metadata)
        writers = Writers(writing(database))
        await writers.write()
        await asyncio.to_thread(server.stop, "fast")
        try:
            async with asyncio.timeout(30):
                for exchange in await asyncio.gather(
                    *(call(writers.app, f"/{number}") for number in range(1000, 1050))
                ):
                    assert reason(exchange) == "down"
            assert checked_out(database) == 0
        finally:
            await asyncio.to_thread(server.start)
        await asyncio.gather(*(writers.write() for _ in range(5)))
        assert writers.acknowledged == set(range(1, 7))
        await writers.assert_honest(url_of_server)


async def test_a_statement_is_ended_at_a_server_which_has_just_been_restarted(
    server: DatabaseServer, url_of_server: str
) -> None:
    """The server counts its connections anew, but these are the pool's own."""
    sleep = "SELECT pg_sleep(60)" if "postgresql" in url_of_server else "SELECT SLEEP(60)"
    async with opened(url_of_server) as database:
        await asyncio.to_thread(server.restart, "immediate")
        with pytest.raises(DatabaseTimeoutError):
            async with database.session(plain(timeout=0.2)) as session:
                await session.execute(text(sleep))
        await assert_idle(url_of_server)


# -- dead connections are noticed for nothing --------------------------------------------------


COSTS = {"postgresql": 3, "mysql": 2}  # BEGIN, statement, COMMIT


@pytest.mark.usefixtures("no_ping")
async def test_a_busy_connection_costs_no_round_trip_for_its_health(server_url: str) -> None:
    cost = COSTS["postgresql" if "postgresql" in server_url else "mysql"]
    async with relayed(server_url) as (relay, database):
        app = writing(database)
        for number in range(1, 11):  # psycopg prepares what is often executed
            assert (await call(app, f"/{number}")).status == 201
        before = relay.round_trips
        for number in range(11, 31):
            assert (await call(app, f"/{number}")).status == 201
        assert relay.round_trips - before == 20 * cost
        assert relay.connections == 1


@every_loop
@pytest.mark.usefixtures("no_ping")
async def test_a_connection_that_was_just_used_and_is_closed_by_the_server_is_replaced(
    server_url: str,
) -> None:
    async with relayed(server_url) as (relay, database):
        app = writing(database)
        for number in (1, 2, 3):
            assert (await call(app, f"/{number}")).status == 201
            await cut_and_noticed(relay, await driver_of(database))
        assert relay.connections == 3
        assert checked_out(database) == 0


@pytest.mark.usefixtures("no_ping")
async def test_so_it_is_in_the_pool_of_an_engine_of_ones_own(server_url: str) -> None:
    async with Relay(server_url) as relay:
        engine = create_async_engine(relay.url, pool_size=1, max_overflow=0)
        async with Database(engine=engine) as database:
            for _ in range(3):
                async with database.session() as session:
                    assert await session.scalar(SELECT_1) == 1
                await cut_and_noticed(relay, await driver_of(database))
            assert relay.connections == 3
        await engine.dispose()


async def driver_of(database: Database) -> Any:
    """The driver's own connection, of a pool that has one."""
    async with database.engine.connect() as connection:
        return (await connection.get_raw_connection()).driver_connection


async def cut_and_noticed(relay: Relay, driver: Any) -> None:
    """Cut every connection, and wait until the driver has seen it."""
    relay.cut()
    await until_closed(driver)


async def test_a_killed_connection_fails_one_statement_and_is_replaced(server_url: str) -> None:
    """The server itself ends it, in the middle of the statement."""
    on_postgresql = "postgresql" in server_url
    sleep = "SELECT pg_sleep(60)" if on_postgresql else "SELECT SLEEP(60)"
    async with opened(server_url) as database:
        async with database.session() as session:
            sleeping = asyncio.create_task(session.execute(text(sleep)))
            await servers_clients(server_url, sleep)
            with pytest.raises(DatabaseDownError) as caught:
                await sleeping
            assert not isinstance(caught.value, OutcomeUnknownError)
            assert caught.value.connection_invalidated
        assert checked_out(database) == 0
        await database.ping()


async def servers_clients(url: str, query: str) -> None:
    """Wait until the server runs this statement, and kill the connection that it runs on."""
    while True:
        for client in await servers.server_connections(url):
            if client.state == "active" and query in client.query:
                kill = "SELECT pg_terminate_backend" if "postgresql" in url else "KILL "
                async with outside(url) as connection:
                    await connection.execute(f"{kill}({client.id})")
                return
        await asyncio.sleep(0.01)


# -- frozen ------------------------------------------------------------------------------------


@contextmanager
def frozen_relay(relay: Relay) -> Generator[None, None, None]:
    """Nothing comes through until the end of the block."""
    relay.freeze()
    try:
        yield
    finally:
        relay.thaw()


QUICK = transactional(timeout=0.3)


async def write_into_the_cold(database: Database, first: int) -> list[Exchange]:
    """20 requests, on a pool of 5, at a database that does not answer."""
    app = writing(database, QUICK)
    async with asyncio.timeout(30):
        return await asyncio.gather(*(call(app, f"/{first + n}") for n in range(1, 21)))


@pytest.mark.parametrize("connections", ["just used", "pinged", "new"])
async def test_requests_end_at_their_timeout_when_the_network_is_frozen(
    server_url: str, connections: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not answered when it is made, or pinged, does not keep its place in the pool."""
    verify_after = -1 if connections == "pinged" else 1000
    set_limits(monkeypatch, verify_after_idle=verify_after)
    async with relayed(server_url, pool_size=5) as (relay, database):
        if connections != "new":
            await assert_full_size(database)
        else:
            await database.dispose()
        with frozen_relay(relay):
            for round in range(2):
                exchanges = await write_into_the_cold(database, 100 * round)
                assert {reason(exchange) for exchange in exchanges} <= {"timeout", "busy"}
                assert "timeout" in {reason(exchange) for exchange in exchanges}
                assert checked_out(database) == 0
        assert (await call(writing(database), "/1000")).status == 201
        await assert_full_size(database)
        assert await authors(server_url) == ["1000"]
        await database.dispose()
        await assert_disconnected(server_url)


async def test_requests_end_at_their_timeout_when_the_server_stands_still(
    server: DatabaseServer, url_of_server: str
) -> None:
    async with Database(url_of_server, engine_options=POOL) as database:
        await database.create_tables(Base.metadata)
        await assert_full_size(database)
        with server.frozen():
            for round in range(2):
                exchanges = await write_into_the_cold(database, 100 * round)
                assert {reason(exchange) for exchange in exchanges} <= {"timeout", "busy"}
                assert checked_out(database) == 0
        assert (await call(writing(database), "/1000")).status == 201
        await assert_full_size(database)
        assert await authors(url_of_server) == ["1000"]
        await assert_idle(url_of_server)


async def test_a_rollback_that_meets_a_frozen_network_does_not_keep_its_connection(
    server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limits(monkeypatch, cleanup=0.2)

    async def write_and_fail(scope: Scope, receive: Receive, send: Send) -> None:
        await scope["state"]["db"].execute(insert(Author).values(name="ada"))
        relay.freeze()
        raise LookupError("of the application")

    async with relayed(server_url) as (relay, database):
        async with asyncio.timeout(30):
            exchange = await call(DBSessionMiddleware(write_and_fail, database, mode=transactional))
        assert isinstance(exchange.error, LookupError)  # it is not masked
        assert checked_out(database) == 0
        relay.thaw()
        await assert_full_size(database, 1)
        await assert_idle(server_url)
        assert await authors(server_url) == []


async def test_an_answer_is_not_spoilt_when_the_connection_breaks_while_nothing_is_at_stake(
    server_url: str,
) -> None:
    """The ROLLBACK after a read is clean-up."""

    async def read(scope: Scope, receive: Receive, send: Send) -> None:
        answer = await scope["state"]["db"].scalar(text("SELECT 41 + 1"))
        relay.cut()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(answer).encode()})

    async with relayed(server_url) as (relay, database):
        for mode in (plain, read_only, read_only(snapshot=True)):
            exchange = await call(DBSessionMiddleware(read, database, mode=mode))
            assert (exchange.status, exchange.body, exchange.error) == (200, b"42", None)
            assert checked_out(database) == 0
            await database.dispose()


async def test_the_error_of_the_application_is_not_masked_when_the_connection_is_lost(
    server_url: str,
) -> None:
    async def write_and_fail(scope: Scope, receive: Receive, send: Send) -> None:
        await scope["state"]["db"].execute(add("ada"))
        relay.cut()
        raise LookupError("of the application")

    async with relayed(server_url) as (relay, database):
        exchange = await call(DBSessionMiddleware(write_and_fail, database, mode=transactional))
        assert isinstance(exchange.error, LookupError)
        assert checked_out(database) == 0
        await assert_full_size(database, 1)


@pytest.mark.usefixtures("no_ping")
async def test_a_connection_that_breaks_when_its_mode_is_changed_is_a_503(server_url: str) -> None:
    """To change autocommit is a statement of its own on MariaDB."""

    async def read(scope: Scope, receive: Receive, send: Send) -> None:
        await scope["state"]["db"].execute(SELECT_1)

    async with relayed(server_url) as (relay, database):
        for before, after in ((transactional, read_only), (read_only, transactional)):
            async with database.session(before) as session:
                await session.execute(SELECT_1)
            relay.fate_of = nth(1, Fate.LOST)
            exchange = await call(DBSessionMiddleware(read, database, mode=after))
            assert reason(exchange) == "down"
            assert checked_out(database) == 0
            await assert_full_size(database, 1)


async def test_a_fetch_that_fails_is_a_failed_statement(postgresql_url: str) -> None:
    """PostgreSQL would answer the COMMIT with ROLLBACK and no error."""
    divisions = "SELECT 1 / (500 - i) FROM generate_series(1, 1000) i"
    async with opened(postgresql_url) as database:
        with pytest.raises(FailedTransactionError):
            async with database.transaction() as session:
                await session.execute(add("ada"))
                rows = await session.stream(text(divisions), execution_options={"yield_per": 10})
                with pytest.raises(Exception, match="division by zero"):
                    async for _ in rows:
                        pass
        assert await authors(postgresql_url) == []
        await assert_full_size(database, 1)


async def test_a_connection_that_breaks_while_rows_are_fetched_is_a_503(server_url: str) -> None:
    """A cursor on the server is asked again and again."""

    async def export(scope: Scope, receive: Receive, send: Send) -> None:
        authors = await scope["state"]["db"].stream(
            select(Author.name), execution_options={"yield_per": 10}
        )
        await anext(authors)
        relay.cut()
        async for _ in authors:
            pass

    async with relayed(server_url) as (relay, database):
        async with database.transaction() as session:
            await session.execute(insert(Author), [{"name": str(n)} for n in range(50_000)])
        exchange = await call(DBSessionMiddleware(export, database, mode=plain))
        assert reason(exchange) == "down"
        assert checked_out(database) == 0
        await assert_full_size(database, 1)


async def test_the_pool_is_disposed_though_the_network_is_frozen(
    server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limits(monkeypatch, dispose=0.2, attempt=0.2)
    async with relayed(server_url, pool_size=5) as (relay, database):
        await assert_full_size(database)
        relay.freeze()
        async with asyncio.timeout(30):
            await database.dispose()
        relay.thaw()
        await assert_disconnected(server_url)


# -- a network that drops and delays -----------------------------------------------------------


@pytest.mark.parametrize("warm", [True, False], ids=["pooled connection", "new connection"])
@pytest.mark.parametrize("fate", [Fate.LOST, Fate.ANSWER_LOST])
@pytest.mark.usefixtures("no_ping")
async def test_a_connection_that_breaks_at_each_message_of_a_write_in_turn(
    server_url: str, fate: Fate, warm: bool
) -> None:
    """Refused and not there, or unknown, or acknowledged and there; the next is always served."""
    async with relayed(server_url) as (relay, database):
        writers = Writers(writing(database))
        number = 0
        while relay.faults == number:  # until it has ended before its nth message
            number += 1
            if not warm:
                await database.dispose()
            relay.fate_of = nth(number, fate)
            await writers.write()
            relay.fate_of = lambda _: Fate.FORWARDED
            assert await writers.write() in writers.acknowledged, "the next is refused"
        assert number > (2 if warm else 3)
        assert len(writers.unknown) == 1  # at COMMIT, and only there
        await writers.assert_honest(server_url)
        assert checked_out(database) == 0


async def test_a_network_that_breaks_again_and_again_loses_nothing(server_url: str) -> None:
    """Each 11th message finds its connection cut, before the server has it or after."""
    fates = itertools.cycle([*[Fate.FORWARDED] * 10, Fate.LOST, *[Fate.FORWARDED] * 10])
    async with relayed(server_url, pool_size=5) as (relay, database):
        every = itertools.cycle([Fate.LOST, Fate.ANSWER_LOST])
        relay.fate_of = lambda _: next(every) if next(fates) is Fate.LOST else Fate.FORWARDED
        writers = Writers(writing(database))
        await asyncio.gather(*(write_times(writers, 10) for _ in range(20)))
        relay.fate_of = lambda _: Fate.FORWARDED
        assert writers.refused and writers.acknowledged
        await writers.assert_honest(server_url)
        await assert_full_size(database)
        await assert_idle(server_url)


async def write_times(writers: Writers, times: int) -> None:
    for _ in range(times):
        await writers.write()


async def test_a_slow_network_loses_nothing_and_refuses_nobody(server_url: str) -> None:
    async with relayed(server_url, pool_size=5) as (relay, database):
        relay.delay = 0.01
        writers = Writers(writing(database))
        await asyncio.gather(*(writers.write() for _ in range(20)))
        assert writers.acknowledged == set(range(1, 21))
        await writers.assert_honest(server_url)


async def test_a_port_that_refuses_connections_for_a_while_is_a_503_for_a_while(
    server_url: str,
) -> None:
    async with relayed(server_url, pool_size=5) as (relay, database):
        writers = Writers(writing(database))
        await asyncio.gather(*(writers.write() for _ in range(5)))
        relay.refuse()
        relay.cut()
        for exchange in await asyncio.gather(*(call(writers.app, f"/{9 + n}") for n in range(9))):
            assert reason(exchange) == "down"
        await relay.start()
        await asyncio.gather(*(writers.write() for _ in range(5)))
        assert writers.acknowledged == set(range(1, 11))
        await assert_full_size(database)


# -- whether COMMIT was sent -------------------------------------------------------------------


def add(name: str) -> Any:
    return insert(Author).values(name=name)


Work = Callable[[Database], Awaitable[None]]


async def by_the_block(database: Database) -> None:
    async with database.transaction() as session:
        await session.execute(add("ada"))


async def by_hand(database: Database) -> None:
    async with database.session() as session:
        await session.execute(add("ada"))
        await session.commit()


async def by_a_transaction_of_ones_own(database: Database) -> None:
    async with database.session() as session, session.begin():
        await session.execute(add("ada"))


each_way = pytest.mark.parametrize("work", [by_the_block, by_hand, by_a_transaction_of_ones_own])


@each_way
@pytest.mark.parametrize("fate", [Fate.LOST, Fate.ANSWER_LOST])
async def test_the_outcome_is_unknown_when_the_answer_to_commit_is_lost(
    server_url: str, fate: Fate, work: Work
) -> None:
    async with relayed(server_url) as (relay, database):
        relay.fate_of = once(b"COMMIT", fate)
        with pytest.raises(OutcomeUnknownError) as caught:
            await work(database)
        assert isinstance(caught.value, OperationalError)
        assert caught.value.orig is caught.value.__cause__ is not None
        assert caught.value.connection_invalidated
        assert "COMMIT" in str(caught.value) and "async with database." in str(caught.value)
        assert await authors(server_url) == (["ada"] if fate is Fate.ANSWER_LOST else [])
        await assert_full_size(database, 1)


MESSAGES = {"the statement": b"INSERT", "BEGIN": b"BEGIN", "a savepoint": b"RELEASE SAVEPOINT"}


@pytest.mark.parametrize("words", MESSAGES.values(), ids=MESSAGES)
@pytest.mark.parametrize("fate", [Fate.LOST, Fate.ANSWER_LOST])
async def test_the_outcome_is_known_when_anything_else_is_lost(
    server_url: str, fate: Fate, words: bytes
) -> None:
    """Without COMMIT nothing is applied."""
    async with relayed(server_url) as (relay, database):
        relay.fate_of = once(words, fate)
        if words == b"BEGIN" and "mysql" in server_url:
            return  # it has none
        with pytest.raises(DatabaseDownError) as caught:
            async with database.transaction() as session:
                await session.execute(add("grace"))
                async with session.begin_nested():
                    await session.execute(add("ada"))
        assert type(caught.value) is DatabaseDownError
        assert await authors(server_url) == []
        await assert_full_size(database, 1)


async def test_a_connection_that_is_lost_while_it_is_handed_out_is_down(
    postgresql_url: str,
) -> None:
    """Its transaction begins at once, for what is sent on the driver's own connection."""
    async with relayed(postgresql_url) as (relay, database):
        relay.fate_of = once(b"BEGIN", Fate.LOST)
        with pytest.raises(DatabaseDownError):
            async with database.transaction() as session:
                await session.connection()
        await assert_full_size(database, 1)


async def test_the_outcome_is_known_when_the_flush_inside_the_commit_is_lost(
    server_url: str,
) -> None:
    """`session.commit()` writes first what was added; COMMIT itself was not sent then."""
    async with relayed(server_url) as (relay, database):
        relay.fate_of = once(b"INSERT", Fate.ANSWER_LOST)
        with pytest.raises(DatabaseDownError) as caught:
            async with database.session() as session:
                await session.execute(SELECT_1)
                session.add(Author(name="ada"))
                await session.commit()
        assert type(caught.value) is DatabaseDownError
        assert await authors(server_url) == []


@each_way
async def test_the_outcome_is_known_when_the_connection_was_seen_to_close_before_commit(
    server_url: str, work: Work
) -> None:
    async with relayed(server_url) as (relay, database):

        async def cut_and_notice(session: DBSession) -> None:
            connection = await (await session.connection()).get_raw_connection()
            await cut_and_noticed(relay, connection.driver_connection)

        with pytest.raises(DatabaseDownError) as caught:
            if work is by_the_block:
                async with database.transaction() as session:
                    await session.execute(add("ada"))
                    await cut_and_notice(session)
            elif work is by_hand:
                async with database.session() as session:
                    await session.execute(add("ada"))
                    await cut_and_notice(session)
                    await session.commit()
            else:
                async with database.session() as session, session.begin():
                    await session.execute(add("ada"))
                    await cut_and_notice(session)
        assert type(caught.value) is DatabaseDownError
        assert await authors(server_url) == []
        await assert_full_size(database, 1)


async def test_a_commit_which_the_server_refuses_is_neither(postgresql_url: str) -> None:
    async with opened(postgresql_url) as database:
        await database.create_tables(Deferred.metadata)
        with pytest.raises(IntegrityError):
            async with database.transaction() as session:
                session.add(Child(parent_id=404))
        await assert_full_size(database, 1)


@each_way
@pytest.mark.parametrize("state", ["40003", "08007"])
async def test_the_outcome_is_unknown_when_the_server_itself_does_not_know_it(
    postgresql_url: str, state: str, work: Work
) -> None:
    """CockroachDB answers COMMIT so; here a trigger does that runs when COMMIT does."""
    async with opened(postgresql_url) as database, outside(postgresql_url) as connection:
        await connection.execute(
            "CREATE FUNCTION doubt() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$BEGIN RAISE EXCEPTION 'result is ambiguous' USING ERRCODE = '{state}'; END$$"
        )
        await connection.execute(
            "CREATE CONSTRAINT TRIGGER doubt AFTER INSERT ON author"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION doubt()"
        )
        with pytest.raises(OutcomeUnknownError, match="whether COMMIT was carried out"):
            await work(database)
        exchange = await call(writing(database), "/1")
        assert reason(exchange) == "outcome-unknown"
        await connection.execute("DROP TRIGGER doubt ON author")
        assert (await call(writing(database), "/2")).status == 201
        await assert_full_size(database, 1)


@pytest.mark.parametrize("state", ["40003", "08007"])
async def test_it_is_known_when_only_a_statement_has_failed_so(
    postgresql_url: str, state: str
) -> None:
    async with opened(postgresql_url) as database:
        with pytest.raises(DBAPIError) as caught:
            async with database.transaction() as session:
                await session.execute(add("ada"))
                await session.execute(
                    text(f"DO $$BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{state}'; END$$")
                )
        assert not isinstance(caught.value, OutcomeUnknownError)
        assert await authors(postgresql_url) == []
        await assert_full_size(database, 1)


async def test_a_session_that_lost_a_commit_knows_the_outcome_of_the_next(server_url: str) -> None:
    """That COMMIT was sent once says nothing about the transaction after it."""
    async with relayed(server_url) as (relay, database), database.session() as session:
        relay.fate_of = once(b"COMMIT", Fate.LOST)
        await session.execute(add("ada"))
        with pytest.raises(OutcomeUnknownError):
            await session.commit()
        await session.rollback()
        relay.fate_of = once(b"INSERT", Fate.LOST)
        with pytest.raises(DatabaseDownError) as caught:
            await session.execute(add("grace"))
        assert type(caught.value) is DatabaseDownError
        await session.rollback()
        await session.execute(add("joan"))
        await session.commit()
        relay.fate_of = nth(1, Fate.LOST)
        with pytest.raises(DatabaseDownError) as caught:
            await session.execute(add("mary"))
        assert type(caught.value) is DatabaseDownError
        assert await authors(server_url) == ["joan"]


def hold_commit(relay: Relay, fate: Fate) -> None:
    """Hold COMMIT or its answer back; not for ever, so that whoever waits for it fails the test."""
    relay.fate_of = once(b"COMMIT", fate)
    asyncio.get_running_loop().call_later(10, relay.thaw)


@each_way
@pytest.mark.parametrize("fate", [Fate.HELD, Fate.ANSWER_HELD])
async def test_a_commit_that_is_not_answered_in_time_is_of_unknown_outcome(
    server_url: str, fate: Fate, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection is terminated: nothing waits for ever, and nobody else gets its answer."""
    set_limits(monkeypatch, commit=0.3, cleanup=0.3)
    async with relayed(server_url) as (relay, database):
        hold_commit(relay, fate)
        with pytest.raises(OutcomeUnknownError, match="COMMIT"):
            await work(database)
        assert checked_out(database) == 0
        relay.thaw()
        await assert_full_size(database, 1)
        await assert_idle(server_url)
        if fate is Fate.ANSWER_HELD:
            assert await authors(server_url) == ["ada"]


async def test_a_request_whose_commit_is_not_answered_in_time_says_that_it_does_not_know(
    server_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_limits(monkeypatch, commit=0.3)
    async with relayed(server_url) as (relay, database):
        hold_commit(relay, Fate.ANSWER_HELD)
        assert reason(await call(writing(database), "/1")) == "outcome-unknown"
        relay.thaw()
        assert (await call(writing(database), "/2")).status == 201
        assert await authors(server_url) == ["1", "2"]
        assert "POST /1" in caplog.text


async def test_the_timeout_of_a_mode_does_not_cut_off_its_commit(
    server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To say "timeout", which promises that nothing was applied, would be a lie."""
    set_limits(monkeypatch, commit=0.6)
    async with relayed(server_url) as (relay, database):
        hold_commit(relay, Fate.ANSWER_HELD)
        exchange = await call(writing(database, transactional(timeout=0.2)), "/1")
        assert reason(exchange) == "outcome-unknown"
        relay.thaw()
        assert await authors(server_url) == ["1"]


async def add_alone(database: Database, way: str) -> None:
    """Send a write with the COMMIT, which is by hand or at the unit's end, and not before."""
    if way.startswith("by hand"):
        async with database.session(plain(timeout=0.2)) as session:
            if way == "by hand, as the second":
                await session.execute(SELECT_1)
            session.add(Author(name="ada"))
            await session.commit()
    else:
        async with database.transaction(transactional(timeout=0.2)) as session:
            session.add(Author(name="ada"))


each_commit = pytest.mark.parametrize("way", ["by hand", "by hand, as the second", "at the end"])


@each_commit
async def test_the_timeout_covers_what_is_first_sent_by_the_commit(
    server_url: str, way: str
) -> None:
    async with relayed(server_url) as (relay, database):
        relay.fate_of = once(b"INSERT", Fate.HELD)
        async with asyncio.timeout(10):
            with pytest.raises(DatabaseTimeoutError):
                await add_alone(database, way)
        assert checked_out(database) == 0
        relay.thaw()
        await assert_full_size(database, 1)
        assert await authors(server_url) == []


@each_commit
async def test_the_timeout_does_not_cut_off_a_commit_which_it_has_begun_with(
    server_url: str, way: str
) -> None:
    async with relayed(server_url) as (relay, database):
        hold_commit(relay, Fate.ANSWER_HELD)
        with pytest.raises(OutcomeUnknownError):
            await add_alone(database, way)
        relay.thaw()
        assert await authors(server_url) == ["ada"]


async def test_what_comes_before_a_commit_has_no_limit_where_the_mode_has_none(
    server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flush of the COMMIT waits for a lock."""
    set_limits(monkeypatch, commit=1)
    async with opened(server_url) as database, outside(server_url) as other:
        async with database.transaction() as session:
            session.add(Author(id=1, name="ada"))
        await other.execute("BEGIN")
        await other.execute("UPDATE author SET name = 'locked' WHERE id = 1")

        async def rename() -> None:
            async with database.transaction() as session:
                ada = await session.get_one(Author, 1)
                ada.name = "grace"

        renaming = asyncio.create_task(rename())
        await asyncio.wait((renaming,), timeout=2)
        assert not renaming.done()
        await other.execute("ROLLBACK")
        async with asyncio.timeout(30):
            await renaming
        assert await authors(server_url) == ["grace"]


async def test_a_busy_pool_is_no_commit_that_takes_too_long(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both limits are 30 s as they come, and what was only added is first sent by the COMMIT."""
    set_limits(monkeypatch, commit=0.3)

    async def add_author(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["db"].add(Author(name="ada"))
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body"})

    async with opened(sqlite_url, pool_timeout=1) as database:
        app = DBSessionMiddleware(add_author, database, mode=transactional)
        async with database.engine.connect():
            assert reason(await call(app)) == "busy"
        assert checked_out(database) == 0
        assert await authors(sqlite_url) == []


async def test_a_commit_does_not_wait_for_ever_for_the_rest_of_a_stream(
    mysql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MariaDB sends all rows, and takes no other command before the last was read."""
    many = "SELECT a.name FROM author a CROSS JOIN author b"  # more than all buffers take
    async with relayed(mysql_url) as (relay, database):
        async with database.transaction() as session:
            await session.execute(insert(Author), [{"name": str(n)} for n in range(3000)])
        set_limits(monkeypatch, commit=0.5, cleanup=0.5)
        thawing = asyncio.get_running_loop().call_later(20, relay.thaw)
        with suppress(DatabaseTimeoutError):
            async with database.transaction() as session:
                rows = await session.stream(text(many), execution_options={"yield_per": 10})
                await anext(rows)
                relay.freeze()
        assert relay.holds_something.is_set()  # else it has waited for the network
        thawing.cancel()
        assert checked_out(database) == 0
        relay.thaw()
        await assert_full_size(database, 1)


# -- what the errors are -----------------------------------------------------------------------


async def test_a_database_that_is_down_raises_one_error_whatever_the_driver_says(
    server_url: str,
) -> None:
    relay = Relay(server_url)  # never started
    async with Database(relay.url, engine_options=POOL) as database:
        for open_it in (database.session, database.transaction):
            with pytest.raises(DatabaseDownError) as caught:
                async with open_it() as session:
                    await session.execute(SELECT_1)
            assert isinstance(caught.value, UnavailableError | DBAPIError)
            assert not isinstance(caught.value, OSError)
            assert caught.value.orig is caught.value.__cause__ is not None
            assert "password" not in str(caught.value)
        with pytest.raises(DatabaseDownError):
            await database.ping()
        with pytest.raises(DatabaseDownError):
            await database.create_tables(Base.metadata)
    await relay.stop()


async def test_what_went_wrong_on_the_engine_itself_is_no_error_of_the_session(
    postgresql_url: str,
) -> None:
    async with relayed(postgresql_url, max_overflow=1) as (relay, database):
        async with database.session() as session:
            await session.execute(add("ada"))
            relay.fate_of = once(b"client_connection_check_interval", Fate.LOST)
            with pytest.raises(DBAPIError):
                async with database.engine.connect():
                    pass
            with pytest.raises(IntegrityError):
                await session.execute(add("ada"))


async def test_an_engine_of_ones_own_raises_it_too(server_url: str) -> None:
    relay = Relay(server_url)
    engine = create_async_engine(relay.url)
    async with Database(engine=engine) as database:
        with pytest.raises(DatabaseDownError):
            async with database.session() as session:
                await session.execute(SELECT_1)
        with pytest.raises(DatabaseDownError):
            await database.ping()
    await engine.dispose()
    await relay.stop()


async def test_a_full_server_is_down_as_far_as_a_request_can_tell(postgresql_url: str) -> None:
    """`too many connections`: the request may be tried again."""
    async with outside(postgresql_url) as connection:
        await connection.execute("CREATE ROLE narrow LOGIN CONNECTION LIMIT 0")
        try:
            url = postgresql_url.split("@")[1]
            async with Database(f"postgresql+asyncpg://narrow:x@{url}") as database:
                with pytest.raises(DatabaseDownError):
                    await database.ping()
        finally:
            await connection.execute("DROP ROLE narrow")


@pytest.mark.parametrize("mode", [plain, transactional, read_only], ids=lambda mode: mode.name)
async def test_the_timeout_of_a_unit_is_an_error_that_names_it(server_url: str, mode: Any) -> None:
    sleep = "SELECT pg_sleep(60)" if "postgresql" in server_url else "SELECT SLEEP(60)"
    async with opened(server_url) as database:
        async with asyncio.timeout(30):
            with pytest.raises(DatabaseTimeoutError, match=r"async with database\..*0\.2 s"):
                async with database.session(mode(timeout=0.2)) as session:
                    await session.execute(text(sleep))
        assert checked_out(database) == 0
        await assert_idle(server_url)
        await assert_full_size(database, 1)


async def test_the_timeout_covers_a_wait_for_a_lock(postgresql_url: str) -> None:
    async with opened(postgresql_url) as database, outside(postgresql_url) as connection:
        await connection.execute("BEGIN")
        await connection.execute("LOCK TABLE author")
        assert reason(await call(writing(database, QUICK), "/1")) == "timeout"
        await connection.execute("COMMIT")
        assert (await call(writing(database, QUICK), "/2")).status == 201
        assert await authors(postgresql_url) == ["2"]


async def test_the_timeout_covers_rows_that_are_fetched_one_after_the_other(
    server_url: str,
) -> None:
    """The statement itself has ended long ago, as far as the session can tell."""
    many = "SELECT a.name FROM author a CROSS JOIN author b"  # more than all buffers take
    async with relayed(server_url) as (relay, database):
        async with database.transaction() as session:
            await session.execute(insert(Author), [{"name": str(n)} for n in range(3000)])
        async with asyncio.timeout(30):
            with pytest.raises(DatabaseTimeoutError):
                async with database.session(plain(timeout=0.3)) as session:
                    rows = await session.stream(text(many), execution_options={"yield_per": 10})
                    await anext(rows)
                    relay.freeze()
                    async for _ in rows:
                        pass
        assert checked_out(database) == 0
        relay.thaw()
        await assert_full_size(database, 1)


async def test_a_unit_that_ends_in_time_is_not_timed_out_by_what_comes_after_it(
    server_url: str,
) -> None:
    async with opened(server_url) as database:
        async with database.session(plain(timeout=0.2)) as session:
            await session.execute(add("ada"))
            await session.commit()
            await asyncio.sleep(0.3)  # no unit is open
            assert (await session.scalars(select(Author.name))).all() == ["ada"]


async def test_a_statement_that_comes_when_the_time_is_over_is_not_sent(server_url: str) -> None:
    async with relayed(server_url) as (relay, database):
        with pytest.raises(DatabaseTimeoutError):
            async with database.transaction(transactional(timeout=0.1)) as session:
                await session.execute(SELECT_1)
                await asyncio.sleep(0.2)
                relay.fate_of = once(b"INSERT", Fate.HELD)
                await session.execute(add("ada"))
        assert not relay.holds_something.is_set()


async def test_what_is_open_when_the_time_is_over_can_still_be_rolled_back(server_url: str) -> None:
    async with opened(server_url) as database:
        async with database.session(plain(timeout=1)) as session:
            await session.execute(add("ada"))
            await asyncio.sleep(1.2)
            await session.rollback()
            await session.execute(add("bob"))
            await session.commit()
        assert await authors(server_url) == ["bob"]


async def test_a_rollback_by_hand_does_not_wait_for_ever_when_the_time_is_over(
    server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limits(monkeypatch, cleanup=0.3)
    async with relayed(server_url) as (relay, database):
        async with asyncio.timeout(10):
            with pytest.raises(DatabaseTimeoutError):
                async with database.session(plain(timeout=0.1)) as session:
                    await session.execute(add("ada"))
                    await asyncio.sleep(0.2)
                    relay.freeze()
                    await session.rollback()
        assert checked_out(database) == 0
        relay.thaw()
        await assert_full_size(database, 1)


async def release_a_savepoint(session: DBSession) -> None:
    async with session.begin_nested():
        await session.execute(add("ada"))


async def roll_back_to_a_savepoint(session: DBSession) -> None:
    async with session.begin_nested():
        await session.execute(add("ada"))
        raise LookupError


async def roll_back_a_transaction_of_ones_own(session: DBSession) -> None:
    async with session.begin():
        await session.execute(add("ada"))
        raise LookupError


ENDS = {
    "a savepoint is released": (release_a_savepoint, b"RELEASE SAVEPOINT"),
    "a savepoint is rolled back to": (roll_back_to_a_savepoint, b"ROLLBACK TO SAVEPOINT"),
    "a block is rolled back": (roll_back_a_transaction_of_ones_own, b"ROLLBACK"),
}


@pytest.mark.parametrize(("work", "words"), ENDS.values(), ids=ENDS)
async def test_the_timeout_covers_the_end_of_a_savepoint_and_of_a_block(
    server_url: str,
    work: Callable[[DBSession], Awaitable[None]],
    words: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What rolls back gets some more time than that, so that its connection can be kept."""
    set_limits(monkeypatch, cleanup=0.3)
    async with relayed(server_url) as (relay, database):
        relay.fate_of = once(words, Fate.HELD)
        asyncio.get_running_loop().call_later(10, relay.thaw)
        with pytest.raises((DatabaseTimeoutError, LookupError)):
            async with database.session(plain(timeout=1)) as session:
                await work(session)
        assert relay.holds_something.is_set()  # else it has waited for the network
        assert checked_out(database) == 0
        relay.thaw()
        await assert_full_size(database, 1)
        assert await authors(server_url) == []


async def test_to_ask_for_the_engine_is_nothing_that_could_time_out(sqlite_url: str) -> None:
    async with opened(sqlite_url) as database:
        async with database.session(plain(timeout=0.1)) as session:
            session.sync_session.get_bind()
            await asyncio.sleep(0.3)


async def test_a_task_whose_statement_timed_out_is_not_left_cancelled(server_url: str) -> None:
    """It can go on; also inside a timeout of its own, which knows its own cancellations."""
    sleep = "SELECT pg_sleep(60)" if "postgresql" in server_url else "SELECT SLEEP(60)"
    async with opened(server_url) as database:
        async with asyncio.timeout(30), database.session(plain(timeout=1)) as session:
            with pytest.raises(DatabaseTimeoutError):
                await session.execute(text(sleep))
            task = asyncio.current_task()
            assert task is not None and task.cancelling() == 0
            await asyncio.sleep(0)
            await session.rollback()
            assert await session.scalar(SELECT_1) == 1
        await assert_full_size(database, 1)


@pytest.fixture
async def unhandled() -> AsyncIterator[list[dict[str, Any]]]:
    """What the event loop has to complain of: nothing, at the end."""
    complaints: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    yield complaints
    loop.set_exception_handler(None)
    assert complaints == []


@pytest.mark.usefixtures("unhandled")
async def test_a_connect_that_fails_or_hangs_leaves_no_complaint_of_the_event_loop(
    server_url: str,
) -> None:
    async with relayed(server_url, pool_size=5) as (relay, database):
        await database.dispose()
        with frozen_relay(relay):
            await write_into_the_cold(database, 0)
            relay.refuse()
            relay.cut()
            await write_into_the_cold(database, 100)
        await relay.start()
        await assert_full_size(database)
