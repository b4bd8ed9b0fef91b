"""SQLite has one writer at a time: a task that would wait for itself is told so at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import insert, text

from asgi_db import (
    ConcurrentUseError,
    Database,
    DBSession,
    Mode,
    plain,
    read_only,
    transactional,
)
from tests.contract.apps import FRAMEWORKS
from tests.contract.endpoints import Answer, Framework
from tests.contract.site import Item, Site
from tests.tables import Author, Base, authors

each_framework = pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda each: each.name)


@pytest.fixture
async def database(sqlite_url: str) -> AsyncIterator[Database]:
    async with Database(sqlite_url) as database:
        await database.create_tables(Base.metadata)
        yield database


@each_framework
async def test_a_transaction_inside_a_transactional_request_is_an_error_at_once(
    framework: Framework, sqlite_url: str
) -> None:
    async with Database(sqlite_url) as database:
        site = Site(framework, sqlite_url, database)
        await site.from_outside("CREATE TABLE item (name VARCHAR(50) PRIMARY KEY, note TEXT)")
        errors: list[str] = []

        async def order(session: DBSession) -> Answer:
            session.add(Item(name="a"))
            await session.flush()
            try:
                async with database.transaction() as other:
                    other.add(Item(name="b"))
            except ConcurrentUseError as error:
                errors.append(str(error))
                raise
            return Answer(201)

        began = time.monotonic()
        assert (await site.answer(order, transactional)).status == 500
        assert time.monotonic() - began < 10  # the busy timeout is 30 s
        (error,) = errors
        assert "POST / (" in error
        assert "session.commit()" in error
        assert await site.items() == []


async def write(session: DBSession, name: str) -> None:
    await session.execute(insert(Author).values(name=name))


async def read(session: DBSession, name: str) -> None:
    await session.execute(text("SELECT 1"))


OUTER = {
    "transactional": (transactional, write),
    "transactional that reads": (transactional, read),
    "plain": (plain, write),
}
INNER = {
    "transactional": (transactional, write),
    "transactional that reads": (transactional, read),
    "plain": (plain, write),
}


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("inner", INNER)
async def test_whatever_holds_the_write_lock_and_whatever_wants_it(
    database: Database, outer: str, inner: str
) -> None:
    outer_mode, outer_work = OUTER[outer]
    inner_mode, inner_work = INNER[inner]
    async with database.session(outer_mode) as session:
        await outer_work(session, "outer")
        with pytest.raises(ConcurrentUseError, match="already has it"):
            async with database.session(inner_mode) as other:
                await inner_work(other, "inner")
        await write(session, "goes on")
        await session.commit()
        async with database.session(inner_mode) as other:
            await inner_work(other, "afterwards")
            await other.commit()
    assert "goes on" in await authors(str(database.url))


async def test_the_engine_itself_is_told_too(database: Database) -> None:
    async with database.transaction() as session:
        await write(session, "a")
        async with database.engine.connect() as connection:
            with pytest.raises(ConcurrentUseError, match="already has it"):
                await connection.execute(insert(Author).values(name="b"))
        with pytest.raises(ConcurrentUseError, match="already has it"):
            await database.drop_tables(Base.metadata)
    async with database.engine.begin() as connection:
        await connection.execute(insert(Author).values(name="c"))
        with pytest.raises(ConcurrentUseError, match="the engine, without a session"):
            async with database.transaction() as session:
                await write(session, "d")
    assert await authors(str(database.url)) == ["a", "c"]


READERS: list[Mode] = [plain, read_only, read_only(snapshot=True), transactional(read_only=True)]


@pytest.mark.parametrize("mode", READERS, ids=str)
async def test_what_only_reads_is_not_in_the_way(database: Database, mode: Mode) -> None:
    async with database.transaction() as session:
        await write(session, "a")
        async with database.session(mode) as other:
            await read(other, "")
            await write(session, "b")
    assert await authors(str(database.url)) == ["a", "b"]


async def test_two_tasks_wait_for_each_other_as_ever(database: Database) -> None:
    async def add(name: str) -> None:
        async with database.transaction() as session:
            await write(session, name)
            await asyncio.sleep(0.01)

    await asyncio.gather(*(add(str(number)) for number in range(8)))
    assert await authors(str(database.url)) == [str(number) for number in range(8)]


@pytest.mark.parametrize("how", ["commit", "rollback", "release", "error"])
async def test_a_transaction_that_has_ended_is_not_in_the_way(database: Database, how: str) -> None:
    async with database.session(transactional if how != "error" else plain) as session:
        if how == "release":
            await read(session, "")
            await session.release()
        elif how == "error":
            with pytest.raises(ZeroDivisionError):
                async with session.begin():
                    await write(session, "rolled back")
                    raise ZeroDivisionError
        else:
            await write(session, how)
            await getattr(session, how)()
        async with database.transaction() as other:
            await write(other, "other")
    assert "other" in await authors(str(database.url))


async def test_two_databases_on_two_files_are_not_in_each_others_way(
    database: Database, tmp_path: object
) -> None:
    async with Database(f"sqlite+aiosqlite:///{tmp_path}/other.db") as other:
        await other.create_tables(Base.metadata)
        async with database.transaction() as one, other.transaction() as two:
            await write(one, "one")
            await write(two, "two")
    assert await authors(str(database.url)) == ["one"]


async def test_two_databases_on_one_file_are(database: Database, sqlite_url: str) -> None:
    async with Database(sqlite_url) as other, database.transaction() as session:
        await write(session, "a")
        with pytest.raises(ConcurrentUseError, match="already has it"):
            async with other.transaction() as second:
                await write(second, "b")


@pytest.mark.parametrize("url", ["postgresql_url", "mysql_url"])
async def test_a_server_lets_both_write(url: str, request: pytest.FixtureRequest) -> None:
    async with Database(request.getfixturevalue(url)) as database:
        await database.create_tables(Base.metadata)
        async with database.transaction() as session:
            await write(session, "a")
            async with database.transaction() as other:
                await write(other, "b")
        assert sorted(await authors(str(request.getfixturevalue(url)))) == ["a", "b"]


async def test_it_is_told_in_a_database_in_memory_too() -> None:
    async with Database("sqlite+aiosqlite://") as database:
        await database.create_tables(Base.metadata)
        async with database.transaction() as session:
            await write(session, "a")
            with pytest.raises(ConcurrentUseError, match="already has it"):
                async with database.transaction() as other:
                    await write(other, "b")
