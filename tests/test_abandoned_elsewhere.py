"""A statement is only ever ended on the server on which it runs, though others are at its address.

Behind a balancer, in a URL of several hosts and after a failover the connection over which it is to
be ended may reach another server, where its number is that of somebody else's connection.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import asyncpg
import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from asgi_db import Database
from tests import servers
from tests.cancelling import SLEEP
from tests.drivers import is_psycopg, server_settings
from tests.internals import Reached, Server, reached
from tests.relay import Fate, Relay, once
from tests.servers import Outside, assert_disconnected, assert_idle, outside, server_connections

POOL = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 5}


@pytest.fixture(scope="module")
def two_postgresql() -> Iterator[list[str]]:
    """One database on each of two servers."""
    with (
        servers.postgresql(own=True) as first,
        servers.postgresql(own=True) as second,
        first.fresh_database() as url,
        servers.same_database(url, second) as other,
    ):
        yield [url, other]


@pytest.fixture(scope="module")
def two_mariadb() -> Iterator[list[str]]:
    """The same, on two MariaDB servers, which count their connections alike."""
    with (
        servers.mariadb(own=True) as first,
        servers.mariadb(own=True) as second,
        first.fresh_database() as url,
        servers.same_database(url, second) as other,
    ):
        yield [url, other]


@pytest.fixture
def postgresql_urls(two_postgresql: list[str], postgresql_driver: str) -> list[str]:
    driver = f"postgresql+{postgresql_driver}"
    named = (make_url(url).set(drivername=driver) for url in two_postgresql)
    return [url.render_as_string(hide_password=False) for url in named]


@asynccontextmanager
async def sleeping(database: Database, statement: str = "") -> AsyncGenerator[asyncio.Task[None]]:
    """A statement that runs, and is then cancelled."""

    async def sleep() -> None:
        async with database.session() as session:
            await session.execute(text(statement or SLEEP[database.url.get_backend_name()]))

    task = asyncio.create_task(sleep())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait((task,))


async def sleepers(url: str) -> list[int]:
    """The numbers of the connections that run such a statement."""
    clients = await server_connections(url)
    return [client.id for client in clients if re.search(r"SLEEP\(|held", client.query, re.I)]


WAIT = "SELECT id FROM held FOR UPDATE"
"""Waits for a row. MariaDB looks at the client of a SLEEP() every five seconds, but not here."""


@asynccontextmanager
async def held(*urls: str) -> AsyncGenerator[None]:
    """Hold the row for which it waits, on each of the servers."""
    async with AsyncExitStack() as stack:
        for url in urls:
            holder = await stack.enter_async_context(outside(url))
            await holder.execute("CREATE TABLE IF NOT EXISTS held (id int)")
            await holder.execute("INSERT INTO held VALUES (1)")
            await holder.execute("BEGIN")
            await holder.execute(f"{WAIT} /* */")
            await holder.execute("SELECT 1")
        yield


async def asleep(url: str, number: int = 1) -> list[int]:
    """Wait until so many of them run there; return their numbers."""
    async with asyncio.timeout(30):
        while len(found := await sleepers(url)) != number:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return found


@asynccontextmanager
async def connection_number(url: str, number: int) -> AsyncGenerator[Outside]:
    """A connection to a MariaDB that has counted up to it."""
    while True:
        async with outside(url) as connection:
            [(its_own,)] = await connection.execute("SELECT connection_id()")
            assert int(its_own) <= number
            if int(its_own) == number:
                yield connection
                return


async def counted_alike(*urls: str) -> None:
    """Let the servers give the same number to their next connections."""

    async def last_of(url: str) -> int:
        async with outside(url) as connection:
            return int((await connection.execute("SELECT connection_id()"))[0][0])

    lasts = [await last_of(url) for url in urls]
    for url, last in zip(urls, lasts, strict=True):
        while last < max(lasts):
            last = await last_of(url)


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    messages = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    return [message for message in messages if "may still run" in message]


async def is_alive(connection: Outside) -> bool:
    return await connection.execute("SELECT 1") == [(1,)]


# -- MariaDB ------------------------------------------------------------------------------------


async def test_behind_a_balancer_nobody_else_is_killed_and_it_is_ended(
    two_mariadb: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    here, there = two_mariadb
    async with held(here), Relay(here) as relay:
        await counted_alike(here, there)
        async with Database(relay.url, engine_options=POOL) as database:
            relay.turn_to(here, there)
            async with sleeping(database, WAIT) as task:
                [number] = await asleep(here)
                async with connection_number(there, number) as bystander:
                    task.cancel()
                    await asleep(here, 0)
                    await database.dispose()
                    assert await is_alive(bystander)
                    assert not complaints(caplog)


async def test_two_of_one_number_are_both_ended(two_mariadb: list[str]) -> None:
    first, second = two_mariadb
    async with held(first, second), Relay(first) as relay:
        await counted_alike(first, second)
        async with Database(relay.url, engine_options=POOL) as database:
            relay.turn_to(first, second)
            async with sleeping(database, WAIT) as one:
                await asleep(first)
                async with sleeping(database, WAIT) as other:
                    await asleep(second)
                    one.cancel()
                    other.cancel()
                    await asleep(first, 0)
                    await asleep(second, 0)


async def test_one_whose_server_is_not_reached_any_more_is_told_once(
    two_mariadb: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = two_mariadb
    await counted_alike(first, second)
    async with Relay(first) as relay, Database(relay.url, engine_options=POOL) as database:
        async with sleeping(database) as task:
            [number] = await asleep(first)
            relay.turn_to(second)
            async with connection_number(second, number) as bystander:
                task.cancel()
                async with asyncio.timeout(30):
                    while not complaints(caplog):  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
                await database.dispose()
                assert await is_alive(bystander)
                assert len(complaints(caplog)) == 1
    await assert_idle(first)


async def test_behind_a_proxy_with_numbers_of_its_own_nobody_is_killed(
    two_mariadb: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    url = make_url(two_mariadb[0])
    base: Any = import_module("asyncmy.connection").Connection
    numbers: list[int] = []

    class Impostor(base):  # type: ignore[misc]
        def thread_id(self) -> int:
            return numbers[0]

    async def connect() -> Any:
        names = {"host": url.host, "port": url.port, "user": url.username, "db": url.database}
        connection = Impostor(**names, password=url.password)
        await connection.connect()
        return connection

    async with outside(two_mariadb[0]) as bystander:
        numbers += [id for (id,) in await bystander.execute("SELECT connection_id()")]
        options = {**POOL, "async_creator": connect}
        async with Database(two_mariadb[0], engine_options=options) as database:
            async with sleeping(database) as task:
                await asleep(two_mariadb[0])
                task.cancel()
                await asyncio.wait((task,))
                await database.dispose()
                assert await is_alive(bystander)
                assert len(complaints(caplog)) == 1
    await assert_idle(two_mariadb[0])


async def test_a_new_connection_that_is_cancelled_when_it_asks_for_its_server_is_closed(
    two_mariadb: list[str],
) -> None:
    await _cancel_when_it_asks(two_mariadb[0], b"session_status")


async def test_so_it_is_on_postgresql(postgresql_urls: list[str]) -> None:
    await _cancel_when_it_asks(postgresql_urls[0], b"pg_postmaster_start_time")


async def _cancel_when_it_asks(url: str, words: bytes) -> None:
    async with Relay(url) as relay, Database(relay.url, engine_options=POOL) as database:
        relay.fate_of = once(words, Fate.HELD)
        async with sleeping(database, "SELECT 1") as task:
            async with asyncio.timeout(20):
                await relay.holds_something.wait()
            task.cancel()
            await asyncio.wait((task,))
        relay.thaw()
        await assert_disconnected(url)


async def test_in_a_sandbox_no_other_query_is_ended(two_mariadb: list[str]) -> None:
    first, second = two_mariadb
    await counted_alike(first, second)
    async with Relay(first) as relay, Database(relay.url, engine_options=POOL) as database:
        async with database.sandbox(), sleeping(database) as task:
            [number] = await asleep(first)
            relay.turn_to(second, first)
            async with connection_number(second, number) as bystander:
                query = asyncio.create_task(bystander.execute("SELECT SLEEP(4)"))
                await asleep(second)
                task.cancel()
                await assert_idle(first)
                assert await query == [(0,)]  # 1 if it was ended


# -- which server was reached -------------------------------------------------------------------

THEIRS = Server(("db", 3306), started=1000, uptime=50)
REACHED = {
    "the same": (Server(("db", 3306), started=1000, uptime=60), Reached.SAME),
    "at another place": (Server(("db2", 3306), started=1000, uptime=60), Reached.ANOTHER),
    "at the same place, started since": (
        Server(("db", 3306), started=1055, uptime=5),
        Reached.RESTARTED,
    ),
    # Two containers may have the same names.
    "at the same place, but older than the connection": (
        Server(("db", 3306), started=1001, uptime=59),
        Reached.ANOTHER,
    ),
    "at another place, started since": (
        Server(("db2", 3306), started=1055, uptime=5),
        Reached.ANOTHER,
    ),
    "one that says nothing": (None, Reached.ANOTHER),
}


@pytest.mark.parametrize(("here", "expected"), REACHED.values(), ids=REACHED)
def test_which_server_was_reached(here: Server | None, expected: Reached) -> None:
    assert reached(THEIRS, here, age=10) is expected


# -- PostgreSQL ---------------------------------------------------------------------------------


def with_numbers_of(numbers: list[int], url: str) -> dict[str, Any]:
    """The options with which each connection takes itself for that of the first of these numbers.

    PostgreSQL gives no number that one could wish for.
    """

    class Impostor(asyncpg.Connection):
        def get_server_pid(self) -> int:
            return numbers[0] if numbers else super().get_server_pid()

    class ImpostorOfPsycopg(psycopg.AsyncConnection[Any]):
        @property
        def info(self) -> Any:
            return SimpleNamespace(backend_pid=numbers[0]) if numbers else super().info

    async def connect() -> Any:
        plain = make_url(url).set(drivername="postgresql")
        return await ImpostorOfPsycopg.connect(plain.render_as_string(hide_password=False))

    if is_psycopg(url):
        return {"async_creator": connect}
    return {"connect_args": {"connection_class": Impostor}}


async def test_on_postgresql_nobody_else_is_terminated_behind_a_balancer(
    postgresql_urls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = postgresql_urls
    async with AsyncExitStack() as stack:
        bystander = await stack.enter_async_context(outside(second))
        [(number,)] = await bystander.execute("SELECT pg_backend_pid()")
        relay = await stack.enter_async_context(Relay(first))
        numbers: list[int] = []
        options = {**POOL, **with_numbers_of(numbers, relay.url)}
        database = await stack.enter_async_context(Database(relay.url, engine_options=options))
        async with sleeping(database) as task:
            await asleep(first)
            numbers.append(number)
            relay.turn_to(second)
            task.cancel()
            await assert_idle(first)
            await database.dispose()
            assert await is_alive(bystander)
            assert not complaints(caplog)


async def test_on_postgresql_it_is_ended_behind_a_balancer(
    postgresql_urls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = postgresql_urls
    async with Relay(first) as relay, Database(relay.url, engine_options=POOL) as database:
        relay.turn_to(first, second)
        async with sleeping(database) as task:
            await asleep(first)
            task.cancel()
            await assert_idle(first)
            await database.dispose()
            assert not complaints(caplog)


@pytest.mark.parametrize("checks", ["0", "1h"])
async def test_it_is_ended_on_the_second_host_though_the_first_one_is_back(
    postgresql_urls: list[str], caplog: pytest.LogCaptureFixture, checks: str
) -> None:
    """Also by a server that does not look soon whether its client is there."""
    first, second = postgresql_urls
    there = make_url(second)
    async with Relay(first) as relay:
        relay.refuse()
        own = make_url(relay.url)
        hosts = [f"{url.host}:{url.port}" for url in (own, there)]
        url = own.set(host=None, port=None, query={"host": tuple(hosts)})
        settings = server_settings(second, client_connection_check_interval=checks)
        options = {**POOL, "connect_args": settings}
        async with Database(url, engine_options=options) as database:
            async with sleeping(database) as task:
                await asleep(second)
                await relay.start()
                task.cancel()
                await assert_idle(second)
                await database.dispose()
                if checks == "0":  # which we make a second
                    assert not complaints(caplog)
