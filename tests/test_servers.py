"""The servers, databases and probes on which every other test relies."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from tests.programs import MARIADB, POSTGRESQL
from tests.servers import (
    DatabaseServer,
    Row,
    assert_disconnected,
    assert_idle,
    outside,
    server_connections,
)

PRIVATE = {"postgresql": POSTGRESQL, "mariadb": MARIADB}


@pytest.fixture(params=["postgresql", "mysql"])
def server(request: pytest.FixtureRequest) -> DatabaseServer:
    found: DatabaseServer = request.getfixturevalue(f"{request.param}_server")
    return found


@pytest.fixture
def server_url(server: DatabaseServer) -> Iterator[str]:
    with server.fresh_database() as url:
        yield url


async def test_a_fresh_database_is_empty_and_takes_statements(database_url: str) -> None:
    async with outside(database_url) as connection:
        await connection.execute("CREATE TABLE item (id INTEGER PRIMARY KEY, name VARCHAR(9))")
        assert await connection.execute("SELECT * FROM item") == []
        assert await connection.execute("INSERT INTO item VALUES (1, 'ä 100%')") == []
    async with outside(database_url) as connection:
        assert await connection.execute("SELECT * FROM item") == [(1, "ä 100%")]


async def test_two_fresh_databases_are_separate(server: DatabaseServer) -> None:
    with server.fresh_database() as one, server.fresh_database() as other:
        async with outside(one) as first, outside(other) as second:
            await first.execute("CREATE TABLE item (id INTEGER PRIMARY KEY)")
            await second.execute("CREATE TABLE item (id INTEGER PRIMARY KEY)")


LEFT_BEHIND = [
    "CREATE TABLE item (id SERIAL PRIMARY KEY)",
    "CREATE VIEW items AS SELECT 1 AS id",
    "CREATE TYPE colour AS ENUM ('red')",
    "CREATE SEQUENCE number",
    "CREATE SCHEMA shop CREATE TABLE item (id SERIAL PRIMARY KEY)",
    "CREATE FUNCTION one() RETURNS int AS 'SELECT 1' LANGUAGE sql",
    "CREATE FUNCTION pg_catalog.two() RETURNS int AS 'SELECT 2' LANGUAGE sql",
    "SELECT lo_create(0)",
    "ALTER DATABASE {name} SET statement_timeout = 1",
    "ALTER DATABASE {name} CONNECTION LIMIT 5",
    "REVOKE ALL ON SCHEMA public FROM PUBLIC",
    "DROP SCHEMA public",
    "CREATE TEMPORARY TABLE item (id SERIAL PRIMARY KEY)",
]


@pytest.mark.parametrize("statement", LEFT_BEHIND)
async def test_nothing_that_a_test_makes_is_there_in_the_next(
    postgresql_server: DatabaseServer, statement: str
) -> None:
    """Whether the database was emptied or another one was made."""

    async def found(url: str) -> list[Row]:
        async with outside(url) as connection:
            return await connection.execute(
                "SELECT (SELECT count(*) FROM pg_class"
                " WHERE relname IN ('item', 'items', 'number')),"
                " (SELECT count(*) FROM pg_proc WHERE proname IN ('one', 'two')),"
                " (SELECT count(*) FROM pg_type WHERE typname = 'colour'),"
                " (SELECT count(*) FROM pg_largeobject_metadata),"
                " (SELECT string_agg(nspname || coalesce(nspacl::text, ''), ' ' ORDER BY nspname)"
                " FROM pg_namespace WHERE nspname !~ '^pg_'),"
                " current_setting('statement_timeout'),"
                " (SELECT datconnlimit FROM pg_database WHERE datname = current_database())"
            )

    with postgresql_server.fresh_database() as url:
        nothing = await found(url)
    with postgresql_server.empty_database() as url:
        async with outside(url) as connection:
            await connection.execute(statement.format(name=make_url(url).database))
    with postgresql_server.empty_database() as url:
        assert await found(url) == nothing


async def test_a_database_with_a_client_is_not_given_to_the_next_test(
    postgresql_server: DatabaseServer,
) -> None:
    with postgresql_server.empty_database() as first:
        engine = create_async_engine(first)
        connection = await engine.connect()
    with postgresql_server.empty_database() as second:
        assert second != first
    await connection.invalidate()
    await connection.close()
    await engine.dispose()


async def test_an_emptied_database_is_given_to_the_next_test(
    postgresql_server: DatabaseServer,
) -> None:
    with postgresql_server.empty_database() as first:
        async with outside(first) as connection:
            await connection.execute("CREATE TABLE item (id SERIAL PRIMARY KEY)")
    with postgresql_server.empty_database() as second:
        assert second == first


async def test_an_open_transaction_is_seen_until_it_ends(server_url: str) -> None:
    async with outside(server_url) as connection:
        await connection.execute("CREATE TABLE item (id INTEGER PRIMARY KEY)")
    engine = create_async_engine(server_url)
    async with engine.connect() as connection:
        await connection.execute(text("INSERT INTO item VALUES (1)"))
        assert [client.state for client in await server_connections(server_url)] == [
            "idle in transaction"
        ]
        with pytest.raises(AssertionError, match=r"still busy after 0.2 s: .*idle in transaction"):
            await assert_idle(server_url, within=0.2)
        await connection.rollback()
        await assert_idle(server_url)
        with pytest.raises(AssertionError, match="still connected"):
            await assert_disconnected(server_url, within=0.2)
    await engine.dispose()
    await assert_disconnected(server_url)


async def test_a_running_statement_is_seen(server_url: str) -> None:
    sleep = "SELECT pg_sleep(0.6)" if "postgresql" in server_url else "SELECT sleep(0.6)"
    async with outside(server_url) as connection:
        running = asyncio.create_task(connection.execute(sleep))
        await asyncio.sleep(0.2)
        assert [
            (client.state, client.query) for client in await server_connections(server_url)
        ] == [("active", sleep)]
        await assert_idle(server_url)
        await running


async def test_sqlite_has_no_server_to_ask(sqlite_url: str) -> None:
    assert await server_connections(sqlite_url) == []
    await assert_idle(sqlite_url)


async def test_a_database_is_dropped_under_its_clients(server: DatabaseServer) -> None:
    with server.fresh_database() as url:
        engine = create_async_engine(url)
        connection = await engine.connect()
        await connection.execute(text("CREATE TABLE item (id INTEGER PRIMARY KEY)"))
        await connection.execute(text("INSERT INTO item VALUES (1)"))
    await connection.invalidate()
    await connection.close()
    await engine.dispose()
    async with outside(server.url) as probe:
        rows = await probe.execute("SELECT schema_name FROM information_schema.schemata")
    assert make_url(url).database not in [name for (name,) in rows]


@pytest.mark.parametrize("start", [name for name, kind in PRIVATE.items() if not kind.url])
def test_a_killed_session_leaves_no_server_behind(start: str) -> None:
    program = f"""
import time
from tests import servers
with servers.{start}() as server:
    print(server.url, flush=True)
    time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    session = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
    )
    with session:
        assert session.stdout is not None
        url = make_url(session.stdout.readline().strip())
        session.kill()
    deadline = time.monotonic() + 10
    with pytest.raises(ConnectionRefusedError):
        while time.monotonic() < deadline:
            socket.create_connection((str(url.host), int(url.port or 0))).close()
            time.sleep(0.05)
