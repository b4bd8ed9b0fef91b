"""What psycopg does in its own way, and what asgi-db makes of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_db import (
    ConfigurationError,
    Database,
    DBSession,
    Mode,
    plain,
    read_only,
    transactional,
)
from tests import drivers, servers
from tests.internals import Effect, cli, driver_of, driver_of_url
from tests.servers import assert_disconnected, assert_idle, sql
from tests.tables import Author, Base, authors

ONE_CONNECTION: dict[str, Any] = {"pool_size": 1, "max_overflow": 0}
SNAPSHOT = read_only(snapshot=True)
DEFERRABLE = transactional(isolation="SERIALIZABLE", read_only=True, deferrable=True)


def with_psycopg(url: str) -> str:
    chosen = make_url(url).set(drivername="postgresql+psycopg")
    return chosen.render_as_string(hide_password=False)


@pytest.fixture
def url(postgresql_url: str) -> str:
    return with_psycopg(postgresql_url)


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    async with Database(url, engine_options=ONE_CONNECTION) as database:
        await database.create_tables(Base.metadata)
        yield database


async def connection_of(session: DBSession) -> Any:
    """The connection of psycopg that a session uses."""
    return (await (await session.connection()).get_raw_connection()).driver_connection


async def test_a_block_of_its_own_on_the_drivers_connection_commits_nothing(
    database: Database, url: str
) -> None:
    """Without a transaction around it, `connection.transaction()` is one, and is committed."""
    async with database.session(plain) as session:
        connection = await connection_of(session)
        async with connection.transaction():
            await connection.execute("INSERT INTO author (name) VALUES ('ada')")
        assert await authors(url) == []
    assert await authors(url) == []


@pytest.mark.parametrize("mode", [plain, transactional, read_only], ids=lambda mode: mode.name)
async def test_a_cancelled_statement_does_not_wait_for_a_server_that_stands_still(
    mode: Mode,
) -> None:
    with servers.postgresql(own=True) as server, server.fresh_database() as plain_url:
        async with Database(with_psycopg(plain_url), engine_options=ONE_CONNECTION) as database:

            async def sleep() -> None:
                async with database.session(mode) as session:
                    await session.execute(text("SELECT pg_sleep(60)"))

            sleeping = asyncio.create_task(sleep())
            await servers.until_active(plain_url, "SELECT pg_sleep")
            with server.frozen():
                began = time.monotonic()
                sleeping.cancel()
                await asyncio.wait((sleeping,))
                assert sleeping.cancelled()
                assert time.monotonic() - began < 5  # psycopg itself would wait for ten
            await assert_idle(plain_url)
        await assert_disconnected(plain_url)


async def test_a_mode_that_only_reads_leaves_the_next_transaction_as_the_server_has_it(
    url: str,
) -> None:
    """SQLAlchemy would have psycopg say READ WRITE from then on, which a standby refuses."""
    arguments = drivers.server_settings(url, default_transaction_read_only="on")
    options = {**ONE_CONNECTION, "connect_args": arguments}
    async with Database(url, engine_options=options) as database:
        for mode in (SNAPSHOT, plain, DEFERRABLE, plain):
            async with database.session(mode) as session:
                assert await session.scalar(text("SHOW transaction_read_only")) == "on"


def test_a_setting_is_seen_through_the_parameters_of_psycopg(url: str) -> None:
    driver = driver_of_url(make_url(url))
    for last, effect in {"false": Effect.SETS, "true": Effect.HOLDS}.items():
        statement = f"SELECT set_config(%(name)s::VARCHAR, %(value)s, {last}) AS set_config_1"
        assert driver.effect_of(statement) is effect


@pytest.mark.parametrize("mode", [plain, transactional, read_only], ids=lambda mode: mode.name)
async def test_a_setting_with_parameters_does_not_outlive_its_session(url: str, mode: Mode) -> None:
    change = text("SELECT set_config(:name, :value, false)")
    async with Database(url, engine_options=ONE_CONNECTION) as database:
        async with database.session(plain) as session:
            await session.execute(change, {"name": "work_mem", "value": "5MB"})
            await session.commit()
        async with database.session(mode) as session:
            assert await session.scalar(text("SHOW work_mem")) != "5MB"


async def test_how_transactions_begin_is_set_without_waiting(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled there, a connection would neither be its user's nor in the pool."""
    monkeypatch.setattr("psycopg.waiting.MAX_BUSY_TIME", 0)  # It always lets others go first.
    values = {
        "autocommit": True,
        "isolation_level": psycopg.IsolationLevel.SERIALIZABLE,
        "read_only": True,
        "deferrable": True,
    }
    async with database.session() as session:
        connection = await connection_of(session)
        await connection.rollback()
        for name, value in values.items():
            with pytest.raises(StopIteration):
                getattr(connection, f"set_{name}")(value).send(None)
            assert getattr(connection, name) == value
            await getattr(connection, f"set_{name}")(None)


async def test_copy_in_a_sandbox_is_undone_with_it(database: Database, url: str) -> None:
    async with database.sandbox():
        async with database.transaction() as session:
            await drivers.copy(await connection_of(session), "author", [("ada",), ("ben",)], "name")
        async with database.session(read_only) as session:
            names = await session.scalars(text("SELECT name FROM author ORDER BY name"))
            assert list(names) == ["ada", "ben"]
        async with database.session(plain) as session:
            connection = await connection_of(session)
            async with connection.cursor() as cursor:
                await cursor.execute("SELECT name FROM author ORDER BY name")
                assert [row async for row in cursor] == [("ada",), ("ben",)]
                await cursor.execute("SELECT name FROM author ORDER BY name")
                assert await cursor.fetchone() == ("ada",)
    assert await authors(url) == []


async def test_a_setting_of_a_transaction_ends_with_it_in_a_sandbox(database: Database) -> None:
    change = text("SELECT set_config(:name, :value, true)")
    async with database.sandbox():
        async with database.transaction() as session:
            await session.execute(change, {"name": "work_mem", "value": "5MB"})
            assert await session.scalar(text("SHOW work_mem")) == "5MB"
        async with database.transaction() as session:
            assert await session.scalar(text("SHOW work_mem")) != "5MB"


async def test_the_type_of_hstore_is_known_also_if_the_first_connection_is_of_a_sandbox(
    url: str,
) -> None:
    sql(url, "CREATE EXTENSION IF NOT EXISTS hstore")
    statement = text("SELECT 'a=>1'::hstore")
    try:
        for _ in range(2):
            async with Database(url) as database, database.sandbox():
                async with database.session(plain) as session:
                    assert await session.scalar(statement) == {"a": "1"}
    finally:
        sql(url, "DROP EXTENSION hstore")


async def test_a_connection_that_a_function_of_ones_own_has_made_is_looked_after_too(
    url: str,
) -> None:
    async def connect() -> Any:
        return await drivers.connect(url)

    engine = create_async_engine(url, async_creator=connect, **ONE_CONNECTION)
    async with Database(engine=engine) as database:
        await database.create_tables(Base.metadata)
        async with database.session(read_only) as session:
            assert await session.scalar(text("SELECT 1")) == 1
        async with database.transaction() as session:
            session.add(Author(name="ada"))
        sleeping = asyncio.create_task(sleep_in(database))
        await servers.until_active(url, "SELECT pg_sleep")
        sleeping.cancel()
        await asyncio.wait((sleeping,))
        await assert_idle(url)
        assert await authors(url) == ["ada"]
    await engine.dispose()
    await assert_disconnected(url)


async def sleep_in(database: Database) -> None:
    async with database.session(transactional) as session:
        await session.execute(text("SELECT pg_sleep(60)"))


async def test_on_windows_the_error_names_the_event_loop_that_it_needs(url: str) -> None:
    async def connect() -> Any:
        raise psycopg.InterfaceError("Psycopg cannot use the 'ProactorEventLoop'")

    async with Database(url, engine_options={"async_creator": connect}) as database:
        with pytest.raises(ConfigurationError, match="SelectorEventLoop"):
            await database.ping()


def test_a_name_that_two_hosts_refuse_keeps_the_reason(url: str) -> None:
    """The last of several failures decides what kind of failure it is."""
    driver = driver_of(create_async_engine(url).dialect)
    refused = psycopg.OperationalError('connection failed: FATAL:  database "a" does not exist')
    full = psycopg.OperationalError("connection failed: FATAL:  sorry, too many clients already")
    starting = psycopg.OperationalError("FATAL:  the database system is starting up")
    assert "CREATE DATABASE" in str(driver.remedy(refused))
    assert (driver.remedy(full), driver.is_full(full), driver.is_outage(full)) == (None, True, True)
    assert (driver.remedy(starting), driver.is_outage(starting)) == (None, True)


def test_the_check_of_the_command_line_knows_it(url: str) -> None:
    result = CliRunner().invoke(cli, ["check", "--url", url])
    assert f"psycopg {psycopg.__version__}" in result.output
    assert "the settings are right" in result.output or result.exit_code in (0, 1)
