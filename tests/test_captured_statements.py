"""`database.capture_statements()`: how many and which statements a request sends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import Engine, event, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import selectinload
from starlette.testclient import TestClient

from asgi_db import ConfigurationError, Database, DBSessionMiddleware, ReadOnlyError, read_only
from asgi_db.testing import CapturedStatements
from asgi_db_fastapi import CurrentSessionReadOnly, CurrentSessionTransaction
from tests.contract.client import call
from tests.servers import outside, run
from tests.tables import Author, Base, Book


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with Database(database_url) as database:
        await database.create_tables(Base.metadata)
        async with database.transaction() as session:
            for number in range(3):
                author = Author(name=str(number))
                session.add(Book(title=f"{number}", author=author))
        yield database


def shop(database: Database) -> FastAPI:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=database)

    @app.get("/slow")
    async def slow(session: CurrentSessionReadOnly) -> list[str]:
        authors = (await session.scalars(select(Author))).all()
        books = [(await author.awaitable_attrs.books)[0] for author in authors]
        return [book.title for book in books]

    @app.get("/fast")
    async def fast(session: CurrentSessionReadOnly) -> list[str]:
        query = select(Author).options(selectinload(Author.books))
        return [author.books[0].title for author in await session.scalars(query)]

    @app.post("/")
    async def write(session: CurrentSessionTransaction) -> None:
        async with session.begin_nested():
            session.add(Author(name="new"))

    return app


async def test_an_n_plus_one_is_one_assertion(database: Database) -> None:
    app = shop(database)
    with database.capture_statements() as statements:
        assert (await call(app, "/slow", method="GET")).status == 200
    assert len(statements) == 4
    [(statement, times)] = statements.repeated.items()
    assert times == 3 and statement.startswith("SELECT book.id") and "\n" not in statement
    with database.capture_statements() as statements:
        assert (await call(app, "/fast", method="GET")).status == 200
    assert len(statements) == 2
    assert not statements.repeated


async def test_what_begins_and_ends_transactions_is_no_statement(database: Database) -> None:
    with database.capture_statements() as statements:
        assert (await call(shop(database), method="POST")).status == 200
    [statement] = statements
    assert statement.startswith("INSERT INTO author (name) VALUES (")
    assert statements[0] == statements[:1][0] == statement


async def test_values_are_never_shown(database: Database) -> None:
    with database.capture_statements() as statements:
        async with database.transaction() as session:
            await session.execute(insert(Author).values(name="secret"))
            await session.execute(text("SELECT 'secret' /* secret */"))
            await session.execute(text("SELECT 'other'"))
            many = [{"title": f"secret{number}", "author_id": 1} for number in range(2)]
            await session.execute(insert(Book), many)
    assert statements.repeated == {"SELECT ?": 2}
    for shown in (repr(statements), str(statements), *statements):
        assert "secret" not in shown
    assert repr(statements).startswith("<4 statements: 2 × SELECT ?; INSERT INTO author")
    assert str(statements).splitlines()[0] == "4 statements"
    assert "  2 × SELECT ?" in str(statements).splitlines()
    statements.clear()
    assert (len(statements), repr(statements)) == (0, "<0 statements: none>")


async def test_what_was_refused_was_not_sent_and_what_has_failed_was(database: Database) -> None:
    with database.capture_statements() as statements:
        async with database.session(read_only) as session:
            with pytest.raises(ReadOnlyError):
                await session.execute(insert(Author).values(name="a"))
            with pytest.raises(DBAPIError):
                await session.execute(text("SELECT * FROM nothing"))
    assert list(statements) == ["SELECT * FROM nothing"]


async def test_statements_of_the_engine_count_too(database: Database) -> None:
    with database.capture_statements() as statements:
        async with database.engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
            await connection.exec_driver_sql("SELECT 2")
    assert list(statements) == ["SELECT ?", "SELECT ?"]


async def test_statements_of_a_second_engine_of_the_session_count_too(
    database_url: str, database: Database, tmp_path: Any
) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path}/other.db"
    engine = create_async_engine(url)
    async with Database(url) as setting_up:
        await setting_up.create_tables(Base.metadata)
    async with Database(database_url, session_options={"binds": {Author: engine}}) as two:
        with two.capture_statements() as statements:
            async with two.session() as session:
                await session.scalars(select(Author.name))
                await session.scalars(select(Book.title))
    assert len(statements) == 2
    await engine.dispose()


async def test_only_the_database_and_only_the_block_count(
    database: Database, database_url: str
) -> None:
    async with Database(database_url) as other:
        with database.capture_statements() as statements:
            async with other.session() as session:
                await session.scalars(select(Author))
            with database.capture_statements() as inner:
                async with database.session() as session:
                    await session.scalars(select(Author))
            assert (len(statements), len(inner)) == (1, 1)
    async with database.session() as session:
        await session.scalars(select(Author))
    async with outside(database_url) as connection:
        await connection.execute("SELECT 1")
    assert (len(statements), len(inner)) == (1, 1)


def test_an_engine_that_is_made_meanwhile_counts_from_its_first_statement(
    database_url: str,
) -> None:
    database = Database(database_url)

    async def prepare() -> None:
        async with database:
            await database.create_tables(Base.metadata)

    run(prepare())
    with database.capture_statements() as statements, TestClient(shop(database)) as client:
        assert client.get("/fast").json() == []
        assert client.post("/").status_code == 200
    assert [statement.partition(" ")[0] for statement in statements] == ["SELECT", "INSERT"]


async def test_it_counts_in_a_sandbox(database: Database) -> None:
    async with database.sandbox():
        with database.capture_statements() as statements:
            assert (await call(shop(database), "/fast", method="GET")).status == 200
            assert (await call(shop(database), method="POST")).status == 200
    assert len(statements) == 3


async def test_side_by_side_nothing_is_missed(database: Database) -> None:
    app = shop(database)
    with database.capture_statements() as statements:
        await asyncio.gather(*(call(app, "/fast", method="GET") for _ in range(5)))
    assert len(statements) == 10
    assert set(statements.repeated.values()) == {5}


async def test_without_it_nothing_listens(database: Database) -> None:
    def listening(engine: Engine) -> int:
        return len(engine.dialect.dispatch.do_execute)

    before = listening(database.engine.sync_engine)
    with database.capture_statements() as statements:
        assert isinstance(statements, CapturedStatements)
        assert listening(database.engine.sync_engine) == before + 1
    assert listening(database.engine.sync_engine) == before
    assert database.statistics.new_engine == ()
    with pytest.raises(ZeroDivisionError), database.capture_statements():
        raise ZeroDivisionError
    assert listening(database.engine.sync_engine) == before
    assert not event.contains(database.engine.sync_engine, "do_execute", statements.attach)


# -- a database that is redirected -------------------------------------------------------------


async def test_a_database_is_redirected_before_it_is_used(database_url: str) -> None:
    database = Database("sqlite:///real.db")
    database.redirect(database_url)
    assert database.url == Database(database_url).url
    async with database:
        await database.create_tables(Base.metadata)
        async with database.transaction() as session:
            session.add(Author(name="a"))
        with pytest.raises(ConfigurationError, match="before the database is first used"):
            database.redirect("sqlite://")
    database.redirect("sqlite://")  # It has no engine any more.
    with pytest.raises(ConfigurationError, match="unknown database"):
        database.redirect("oracle://localhost/shop")
    assert database.url.database == ":memory:"


async def test_an_engine_of_the_users_own_is_not_redirected(sqlite_url: str) -> None:
    engine = create_async_engine(sqlite_url)
    with pytest.raises(ConfigurationError, match="engine= of your own"):
        Database(engine=engine).redirect("sqlite://")
