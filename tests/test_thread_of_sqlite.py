"""How often a request on SQLite goes through the thread of its connection: each way costs."""

from collections.abc import Iterator
from typing import Any, cast

import aiosqlite
import pytest
from sqlalchemy import Executable, event, func, insert, select, text, update
from sqlalchemy.engine.default import DefaultExecutionContext
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_db import Database, DatabaseDownError, Mode, plain, read_only, transactional
from tests.tables import Author, Base, authors


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the threads of all connections have been asked to do."""
    asked = list[str]()
    # Everything that is done in the thread passes through this method, which is not public.
    execute: Any = getattr(aiosqlite.Connection, "_execute")  # noqa: B009

    async def note(self: aiosqlite.Connection, function: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(function.__name__)
        return await execute(self, function, *args, **kwargs)

    monkeypatch.setattr(aiosqlite.Connection, "_execute", note)
    yield asked


ONCE = "execute_and_fetch"
INSERT = insert(Author).values(name="ada")


@pytest.mark.parametrize(
    ("mode", "statement", "expected"),
    [
        (read_only, text("SELECT 1"), [ONCE]),
        (read_only, select(Author), [ONCE]),
        (read_only(snapshot=True), text("SELECT 1"), ["execute", ONCE, "rollback"]),
        (plain, text("SELECT 1"), ["execute", ONCE, "rollback"]),
        (transactional, text("SELECT 1"), ["execute", ONCE, "commit"]),
        (transactional, INSERT, ["execute", ONCE, "commit"]),
        (transactional, INSERT.returning(Author.id), ["execute", ONCE, "commit"]),
    ],
    ids=str,
)
async def test_nothing_is_asked_of_the_thread_in_vain(
    sqlite_url: str, calls: list[str], mode: Mode, statement: Executable, expected: list[str]
) -> None:
    async with Database(sqlite_url) as database:
        await database.create_tables(Base.metadata)
        calls.clear()
        async with database.session(mode) as session:
            await session.execute(statement)
        assert calls == expected


async def test_many_rows_are_written_at_once(sqlite_url: str, calls: list[str]) -> None:
    async with Database(sqlite_url) as database:
        await database.create_tables(Base.metadata)
        calls.clear()
        async with database.transaction() as session:
            await session.execute(insert(Author), [{"name": name} for name in "abc"])
        assert calls == ["execute", "execute_many", "commit"]
        assert await authors(sqlite_url) == ["a", "b", "c"]


async def test_what_is_streamed_is_not_fetched_at_once(sqlite_url: str) -> None:
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n"
    async with Database(sqlite_url) as database, database.session() as session:
        async for x in await session.stream_scalars(text(endless)):
            if x == 3:
                break


async def test_rows_are_fetched_in_each_way(sqlite_url: str) -> None:
    async with Database(sqlite_url) as database, database.engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        inserted = await connection.execute(INSERT)
        assert (inserted.rowcount, inserted.inserted_primary_key) == (1, (1,))
        more = insert(Author).returning(Author.id)
        found = await connection.execute(more, [{"name": name} for name in "bcd"])
        assert found.scalars().all() == [2, 3, 4]

        found = await connection.execute(select(Author.id).order_by(Author.id))
        assert list(found.keys()) == ["id"]
        assert found.first() == (1,)
        found = await connection.execute(select(Author.id).order_by(Author.id))
        assert (found.fetchone(), found.fetchmany(2), found.fetchall()) == (
            (1,),
            [(2,), (3,)],
            [(4,)],
        )
        found = await connection.execute(select(Author.id).order_by(Author.id))
        assert [len(rows) for rows in found.partitions(3)] == [3, 1]
        assert (await connection.execute(select(Author).where(Author.id > 4))).all() == []

        renamed = update(Author).where(Author.id < 3).values(name=Author.name + "x")
        changed = await connection.execute(renamed)
        assert changed.rowcount == 2
        with pytest.raises(IntegrityError):
            await connection.execute(insert(Author).values(id=1, name="again"))
        changed = await connection.exec_driver_sql("DELETE FROM author WHERE id = ?", [(3,), (4,)])
        assert changed.rowcount == 2
        assert await connection.scalar(select(func.count(Author.id))) == 2


async def test_a_listener_may_use_the_cursor_as_one_of_the_dbapi(sqlite_url: str) -> None:
    asked = list[Any]()

    async with Database(sqlite_url) as database, database.engine.connect() as connection:

        @event.listens_for(database.engine.sync_engine, "before_cursor_execute", retval=True)
        def before(_: Any, cursor: Any, statement: str, *__: Any) -> tuple[str, None]:
            with cursor:
                cursor.setinputsizes(1)
                cursor.execute("SELECT 1 UNION SELECT 2", None)
                asked.append(list(cursor))
                cursor.execute("SELECT 3")
                asked.append(cursor.fetchmany(-1))
                asked.append(cursor.fetchmany())
            asked.append(cursor.fetchone())
            return statement, None

        assert await connection.scalar(text("SELECT 42")) == 42
    assert asked == [[(1,), (2,)], [], [(3,)], None]


async def test_a_dialect_with_cursors_of_its_own_keeps_them(sqlite_url: str) -> None:
    engine = create_async_engine(sqlite_url)
    made = list[object]()

    base = cast("type[DefaultExecutionContext]", engine.dialect.execution_ctx_cls)

    class Context(base):  # type: ignore[valid-type, misc]
        def create_default_cursor(self) -> Any:
            made.append(cursor := super().create_default_cursor())
            return cursor

    engine.dialect.execution_ctx_cls = Context
    async with Database(engine=engine) as database, database.session() as session:
        assert await session.scalar(text("SELECT 42")) == 42
    await engine.dispose()
    assert len(made) > 0


async def test_a_value_error_of_a_statement_is_not_taken_for_a_closed_connection(
    sqlite_url: str,
) -> None:
    async with Database(sqlite_url) as database, database.engine.connect() as connection:
        with pytest.raises(UnicodeEncodeError):
            await connection.exec_driver_sql("SELECT ?", ("\udc80",))
        pooled = await connection.get_raw_connection()
        assert pooled.driver_connection is not None
        await pooled.driver_connection.close()
        with pytest.raises(DatabaseDownError):
            await connection.exec_driver_sql("SELECT 1")


async def test_a_transaction_that_is_open_is_rolled_back(sqlite_url: str) -> None:
    async with Database(sqlite_url) as database:
        async with database.transaction() as session:
            await session.execute(text("CREATE TABLE t (x int)"))
        async with database.engine.connect() as connection:
            await connection.exec_driver_sql("INSERT INTO t VALUES (1)")
            pooled = await connection.get_raw_connection()
            assert pooled.driver_connection is not None
            assert pooled.driver_connection.in_transaction
        async with database.session(read_only) as session:
            assert (await session.scalars(text("SELECT x FROM t"))).all() == []


async def test_a_detached_connection_begins_and_rolls_back(sqlite_url: str) -> None:
    async with Database(sqlite_url) as database:
        async with database.engine.connect() as connection:
            pooled = await connection.get_raw_connection()
            pooled.detach()
            await connection.exec_driver_sql("CREATE TABLE t (x int)")
            await connection.rollback()
            await connection.exec_driver_sql("CREATE TABLE t (x int)")
            await connection.commit()
