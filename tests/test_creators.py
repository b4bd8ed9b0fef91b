"""Connections that a function of the user's own makes, on SQLite: `async_creator`."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from typing import Any

import aiosqlite
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from asgi_db import Database, read_only
from tests.tables import Author, Base, authors

SLOW = """
    INSERT INTO author (id, name) WITH RECURSIVE n(x) AS
    (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 1000000000) SELECT count(*), 'never' FROM n
"""


def creator(url: str) -> Callable[..., Awaitable[aiosqlite.Connection]]:
    """A function that connects to the file of this URL in its own way."""

    async def connect(*_: object, **__: object) -> aiosqlite.Connection:
        return await aiosqlite.connect(url.partition("///")[2], timeout=2)

    return connect


@pytest.mark.parametrize("writes", [True, False], ids=["write", "read"])
@pytest.mark.parametrize("is_given", [False, True], ids=["own", "given"])
async def test_a_connection_of_the_users_own_making_leaves_no_lock_when_it_is_interrupted(
    sqlite_url: str, is_given: bool, writes: bool
) -> None:
    """The error, which leads to the cursor of the statement, is kept."""
    connect = creator(sqlite_url)
    engine = create_async_engine(sqlite_url, async_creator=connect)
    database = (
        Database(engine=engine)
        if is_given
        else Database(sqlite_url, engine_options={"async_creator": connect})
    )
    kept: list[BaseException] = []
    statement = SLOW if writes else SLOW.partition("name)")[2]
    async with database:
        await database.create_tables(Base.metadata)
        for number in range(3):
            try:
                async with asyncio.timeout(0.3), database.transaction() as session:
                    session.add(Author(id=100 + number, name="interrupted"))
                    await session.flush()
                    await session.execute(text(statement))
            except TimeoutError as error:
                kept.append(error)
            async with database.transaction() as session:  # after 2 s "database is locked"
                session.add(Author(id=number, name=str(number)))
        assert await authors(sqlite_url) == ["0", "1", "2"]
    await engine.dispose()
    assert len(kept) == 3


async def test_a_result_outlives_a_connection_of_the_users_own_making(sqlite_url: str) -> None:
    options = {"async_creator": creator(sqlite_url), "poolclass": NullPool}
    async with Database(sqlite_url, engine_options=options) as database:
        async with database.session(read_only) as session:
            assert (await session.execute(text("SELECT 1"))).scalar_one() == 1


async def test_a_connection_that_its_owner_closes_after_its_pool_did_is_closed(
    sqlite_url: str,
) -> None:
    """So is one of ours; and cursors may be closed after their connection."""
    for options in ({}, {"async_creator": creator(sqlite_url)}):
        async with Database(sqlite_url, engine_options=options) as database:
            async with database.engine.connect() as connection:
                made = (await connection.get_raw_connection()).driver_connection
                assert isinstance(made, aiosqlite.Connection)
                cursor = await made.execute("SELECT 1")
                await connection.invalidate()
                async with asyncio.timeout(20):
                    await made.close()
                await cursor.close()
                with pytest.raises(ValueError, match="no active connection"):
                    await made.execute("SELECT 1")


class Wrapper:
    """Some library's own connection, around one of aiosqlite."""

    def __init__(self, connection: aiosqlite.Connection) -> None:
        self.connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)

    def cursor(self) -> Any:
        return self.connection.cursor()


class Traced(aiosqlite.Connection):
    """Counts its cursors."""

    cursors = 0

    def cursor(self) -> Any:
        self.cursors += 1
        return super().cursor()


@pytest.mark.parametrize("is_wrapped", [False, True], ids=["derived", "wrapped"])
async def test_a_connection_with_cursors_of_its_own_keeps_them(
    sqlite_url: str, is_wrapped: bool
) -> None:
    path = sqlite_url.partition("///")[2]

    async def connect(*_: object, **__: object) -> Any:
        connection = Traced(lambda: sqlite3.connect(path, isolation_level=None), 64)
        await connection
        return Wrapper(connection) if is_wrapped else connection

    engine = create_async_engine(sqlite_url, async_creator=connect, pool_size=1)
    async with Database(engine=engine) as database, database.session() as session:
        pooled = await (await session.connection()).get_raw_connection()
        made: Any = pooled.driver_connection
        traced: Traced = made.connection if is_wrapped else made
        before = traced.cursors
        assert await session.scalar(text("SELECT 42")) == 42
        assert traced.cursors == before + 1
    await engine.dispose()
