"""A session that is bound to a second engine: both are looked after in the same way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import NamedTuple

import pytest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from asgi_db import (
    ConfigurationError,
    Database,
    DBSession,
    SandboxError,
    read_only,
    transactional,
)
from tests.contract.apps import FRAMEWORKS
from tests.contract.client import call
from tests.contract.endpoints import Answer, Framework, Route, Setup
from tests.pools import checked_out
from tests.servers import assert_idle
from tests.tables import Author, Base, Book, authors

PAIRS = [("postgresql", "mysql"), ("mysql", "postgresql"), ("sqlite", "other_sqlite")]


class Two(NamedTuple):
    """A database, and the engine on which its authors live."""

    database: Database
    engine: AsyncEngine
    url: str
    other_url: str

    @property
    def other_checked_out(self) -> int:
        return int(getattr(self.engine.pool, "checkedout")())  # noqa: B009


@pytest.fixture
def other_sqlite_url(sqlite_url: str) -> str:
    return sqlite_url.replace("test.db", "other.db")


@pytest.fixture(params=PAIRS, ids="-".join)
async def two(request: pytest.FixtureRequest) -> AsyncIterator[Two]:
    """The engine opens its connections during the test, and none before."""
    url, other_url = (request.getfixturevalue(f"{name}_url") for name in request.param)
    async with Database(other_url) as setting_up:
        await setting_up.create_tables(Base.metadata)
    engine = create_async_engine(other_url, pool_size=2)
    async with Database(url, session_options={"binds": {Author: engine}}) as database:
        await database.create_tables(Base.metadata)
        yield Two(database, engine, url, other_url)
        assert checked_out(database) == 0
        await assert_idle(url)
        await assert_idle(other_url)
    await engine.dispose()


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda each: each.name)
async def test_requests_that_write_over_both_engines_succeed(
    two: Two, framework: Framework
) -> None:
    names = iter(range(100))

    async def order(session: DBSession) -> Answer:
        session.add(Author(name=f"{next(names):02}"))
        await session.flush()
        await session.execute(text("SELECT 1"), bind_arguments={"mapper": Book})
        await session.scalars(select(Author))
        return Answer(201)

    app = framework.app(Setup(two.database, [Route("/", order, transactional)], {}))
    for _ in range(3):
        assert (await call(app)).status == 201
    exchanges = await asyncio.gather(*(call(app) for _ in range(10)))
    assert [exchange.status for exchange in exchanges] == [201] * 10
    assert await authors(two.other_url) == [f"{number:02}" for number in range(13)]


async def test_each_engine_keeps_or_loses_the_work_with_the_other(two: Two) -> None:
    for works in range(8):
        with suppress(ZeroDivisionError):
            async with two.database.transaction() as session:
                session.add(Author(id=works + 1, name=str(works)))
                await session.flush()
                await session.execute(text("SELECT 1"), bind_arguments={"mapper": Book})
                if works % 2:
                    raise ZeroDivisionError
    assert await authors(two.other_url) == ["0", "2", "4", "6"]
    assert two.other_checked_out == 0


async def test_a_read_only_session_reads_from_both(two: Two) -> None:
    async with two.database.session(read_only) as session:
        for _ in range(3):
            assert (await session.scalars(select(Author))).all() == []
            assert (await session.scalars(select(Book))).all() == []
            assert two.other_checked_out == 0  # at most the last one is kept
            await asyncio.sleep(0)
            assert (checked_out(two.database), two.other_checked_out) == (0, 0)


@pytest.mark.parametrize("two", PAIRS[:2], ids="-".join, indirect=True)
async def test_a_cancelled_statement_on_the_other_engine_ends_at_its_server(two: Two) -> None:
    sleep = "SELECT pg_sleep(60)" if "postgresql" in two.other_url else "SELECT SLEEP(60)"
    async with two.database.session() as session:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await session.execute(text(sleep), bind_arguments={"mapper": Author})
    assert two.other_checked_out == 0
    await assert_idle(two.other_url)


async def test_the_holders_of_the_other_engine_are_told(two: Two) -> None:
    async with two.database.session() as session:
        await session.scalars(select(Author))
        (holder,) = two.database.stats().holders
        assert holder.route == "`async with database.session()`"


async def test_a_sandbox_refuses_what_it_does_not_cover(two: Two) -> None:
    async with two.database.session() as session:
        await session.scalars(select(Author))
    async with two.database.sandbox(), two.database.session() as session:
        await session.scalars(select(Book))
        with pytest.raises(SandboxError, match="does not undo"):
            await session.scalars(select(Author))
    async with two.database.session() as session:
        assert (await session.scalars(select(Author))).all() == []


async def test_an_engine_in_autocommit_is_refused(sqlite_url: str) -> None:
    engine = create_async_engine(sqlite_url, isolation_level="AUTOCOMMIT")
    async with Database(sqlite_url) as database, database.transaction() as session:
        with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
            await session.execute(text("SELECT 1"), bind_arguments={"bind": engine.sync_engine})
    await engine.dispose()
