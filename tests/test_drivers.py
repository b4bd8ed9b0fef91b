"""One file is enough to add a driver: here is one, which is SQLite's under another name."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, make_url, select, text
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.aiosqlite import SQLiteDialect_aiosqlite
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import PoolProxiedConnection

from asgi_db import (
    ConfigurationError,
    Database,
    DBSessionMiddleware,
    Mode,
    ReadOnlyError,
    plain,
    read_only,
    session_of,
    transactional,
)
from asgi_db.types import Receive, Scope, Send
from tests.contract.client import call
from tests.internals import BEGIN_OPTION, Aiosqlite, Beginning, driver_of, register
from tests.tables import Author, Base, authors

ONE_CONNECTION = {"pool_size": 1, "max_overflow": 0}
READING = transactional(read_only=True)


class OtherDialect(SQLiteDialect_aiosqlite):
    """What SQLAlchemy has to know of a driver."""

    driver = "other"
    supports_statement_cache = True


class Other(Aiosqlite):
    """What asgi-db has to know of it."""

    name = "other"

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def forget(self) -> None:
        self.begun: list[tuple[str, ...]] = []
        self.connected = self.interrupted = self.terminated = 0

    def connect(self, *args: Any, **kwargs: Any) -> Awaitable[Any]:
        self.connected += 1
        return super().connect(*args, **kwargs)

    def begin(self, pooled: PoolProxiedConnection, beginning: Beginning) -> None:
        self.begun.append(beginning.statements)
        super().begin(pooled, beginning)

    def is_conflict(self, error: BaseException) -> bool:
        return "UNIQUE" in str(error) or super().is_conflict(error)

    def is_outage(self, error: BaseException) -> bool:
        return "no such table" in str(error)

    def interrupt(self, connection: Any) -> Coroutine[Any, Any, None] | None:
        self.interrupted += 1
        return super().interrupt(connection)

    def terminate(self, connection: Any) -> None:
        self.terminated += 1
        super().terminate(connection)


OTHER = Other()
registry.register("sqlite.other", __name__, "OtherDialect")
register(OTHER)


@pytest.fixture
def other() -> Other:
    OTHER.forget()
    return OTHER


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite+other:///{tmp_path}/shop.db"


def of_sqlite(url: str) -> str:
    return url.replace("+other", "+aiosqlite")


@pytest.fixture
async def database(url: str, other: Other) -> AsyncIterator[Database]:
    async with Database(url, engine_options=ONE_CONNECTION) as database:
        await database.create_tables(Base.metadata)
        yield database


async def answer(send: Send, status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body"})


async def write(scope: Scope, receive: Receive, send: Send) -> None:
    await session_of(scope).execute(insert(Author).values(name="ada"))
    await answer(send, 201)


@pytest.mark.parametrize(
    ("mode", "begun", "stored"),
    [
        (transactional, ("BEGIN IMMEDIATE",), ["ada"]),
        (plain, ("BEGIN",), []),
    ],
)
async def test_a_mode_that_writes_works_with_a_driver_that_was_added(
    mode: Mode, begun: tuple[str, ...], stored: list[str], database: Database, url: str
) -> None:
    OTHER.begun.clear()
    exchange = await call(DBSessionMiddleware(write, database, mode=mode))
    assert exchange.status == 201
    assert OTHER.begun == [begun]
    assert OTHER.connected == 1
    assert await authors(of_sqlite(url)) == stored


@pytest.mark.parametrize(
    ("mode", "begun"), [(read_only, []), (read_only(snapshot=True), [("BEGIN",)])]
)
async def test_a_mode_that_reads_works_with_a_driver_that_was_added(
    mode: Mode, begun: list[tuple[str, ...]], database: Database
) -> None:
    """Where nothing is sent at its beginning, the driver is not asked to."""

    async def read(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await session_of(scope).scalars(select(Author))).all() == []
        await answer(send)

    OTHER.begun.clear()
    exchange = await call(DBSessionMiddleware(read, database, mode=mode), method="GET")
    assert exchange.status == 200
    assert OTHER.begun == begun
    exchange = await call(DBSessionMiddleware(write, database, mode=mode))
    assert exchange.was_caused_by(ReadOnlyError)


async def test_what_the_driver_calls_a_conflict_is_run_again(database: Database, url: str) -> None:
    attempts: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = session_of(scope)
        attempts.append(session.attempt)
        if session.attempt == 1:
            await session.execute(insert(Author).values(id=1, name="grace"))
            await session.execute(insert(Author).values(id=1, name="alan"))
        await write(scope, receive, send)

    mode = transactional(retries=1)
    exchange = await call(DBSessionMiddleware(app, database, mode=mode))
    assert (exchange.status, attempts) == (201, [1, 2])
    assert await authors(of_sqlite(url)) == ["ada"]


async def test_what_the_driver_calls_an_outage_is_answered_503(database: Database) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await session_of(scope).execute(text("SELECT * FROM nowhere"))

    exchange = await call(DBSessionMiddleware(app, database))
    assert exchange.status == 503
    assert OTHER.terminated == 1
    exchange = await call(DBSessionMiddleware(write, database, mode=transactional))
    assert (exchange.status, OTHER.connected) == (201, 2)


async def test_a_cancelled_statement_is_interrupted_by_the_driver(
    database: Database, url: str
) -> None:
    runs = threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = session_of(scope)
        await session.execute(insert(Author).values(name="ada"))
        connection = await (await session.connection()).get_raw_connection()
        driver: Any = connection.driver_connection
        await driver.create_function("runs", 0, runs.set)
        await session.execute(text(ENDLESS))

    middleware = DBSessionMiddleware(app, database, mode=transactional)
    request = asyncio.create_task(call(middleware))
    await asyncio.to_thread(runs.wait)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    exchange = await call(DBSessionMiddleware(write, database, mode=transactional))
    assert exchange.status == 201
    assert (OTHER.interrupted, OTHER.terminated, OTHER.connected) == (1, 1, 2)
    assert await authors(of_sqlite(url)) == ["ada"]


ENDLESS = """
    WITH RECURSIVE n(i) AS (SELECT runs() UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n
"""


async def test_an_engine_of_the_users_own_may_have_a_driver_that_was_added(
    database: Database, url: str
) -> None:
    engine = create_async_engine(url)
    async with Database(engine=engine) as given:
        OTHER.begun.clear()
        exchange = await call(DBSessionMiddleware(write, given, mode=transactional))
        assert (exchange.status, OTHER.begun) == (201, [("BEGIN IMMEDIATE",)])
    await engine.dispose()
    assert await authors(of_sqlite(url)) == ["ada"]


class UnknownDialect(SQLiteDialect_aiosqlite):
    """One of a driver that nobody has registered."""

    driver = "unknown"
    supports_statement_cache = True


registry.register("sqlite.unknown", __name__, "UnknownDialect")


def test_a_url_that_names_an_unknown_driver_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigurationError, match=r'the driver "unknown".* write sqlite\+aiosqlite'):
        Database("sqlite+unknown://")


async def test_an_engine_with_an_unknown_driver_is_used_as_sqlalchemy_makes_it(
    database: Database, url: str
) -> None:
    engine = create_async_engine(url.replace("+other", "+unknown"))
    async with Database(engine=engine) as given:
        exchange = await call(DBSessionMiddleware(write, given, mode=transactional))
        assert exchange.status == 201
    await engine.dispose()
    assert await authors(of_sqlite(url)) == ["ada"]


@pytest.mark.parametrize(
    ("url", "mode", "expected"),
    [
        ("postgresql+pg8000://", read_only, {"isolation_level": "AUTOCOMMIT"}),
        ("postgresql+pg8000://", READING, {"postgresql_readonly": True}),
        ("mysql+aiomysql://", read_only, {"isolation_level": "AUTOCOMMIT"}),
        ("mysql+aiomysql://", READING, {BEGIN_OPTION: Beginning(("SET TRANSACTION READ ONLY",))}),
        ("oracle+oracledb://", read_only, {"isolation_level": "AUTOCOMMIT"}),
        ("oracle+oracledb://", plain, {}),
        ("oracle+oracledb://", read_only(snapshot=True), {"isolation_level": "REPEATABLE READ"}),
    ],
)
def test_a_mode_begins_on_each_database_also_with_an_unknown_driver(
    url: str, mode: Mode, expected: dict[str, Any]
) -> None:
    dialect = make_url(url).get_dialect()()
    assert driver_of(dialect).begin_options(mode, is_prepared=False) == expected


# What SQLAlchemy's own users of the engine ask for


async def test_autocommit_on_the_engine_itself_begins_no_transaction(sqlite_url: str) -> None:
    async with Database(sqlite_url, engine_options=ONE_CONNECTION) as database:
        await database.create_tables(Base.metadata)
        for _ in range(2):  # the second time on a connection that has been in autocommit
            async with database.engine.connect() as connection:
                await connection.execution_options(isolation_level="AUTOCOMMIT")
                await connection.execute(text("VACUUM"))
            async with database.engine.execution_options(isolation_level="AUTOCOMMIT").begin() as c:
                await c.execute(text("VACUUM"))
            async with database.session() as session:
                options = {"isolation_level": "AUTOCOMMIT"}
                await session.connection(execution_options=options)
                await session.execute(text("VACUUM"))
            async with database.engine.connect() as connection:
                await connection.execute(select(Author))
                with pytest.raises(OperationalError, match="within a transaction"):
                    await connection.execute(text("VACUUM"))


async def test_autocommit_on_the_engine_itself_ends_with_its_use(database_url: str) -> None:
    async with Database(database_url, engine_options=ONE_CONNECTION) as database:
        await database.create_tables(Base.metadata)
        for name in ("ada", "grace"):
            async with database.engine.connect() as connection:
                await connection.execution_options(isolation_level="AUTOCOMMIT")
                await connection.execute(insert(Author).values(name=name))
            async with database.engine.connect() as connection:
                await connection.execute(insert(Author).values(name="rolled back"))
            async with database.session() as session:
                session.add(Author(name="rolled back"))
                await session.flush()
                session.expunge_all()
                await session.rollback()
            async with database.session(read_only) as session:
                await session.scalars(select(Author))
        assert await authors(database_url) == ["ada", "grace"]


async def test_an_engine_has_no_event_for_which_each_turn_would_pay(database_url: str) -> None:
    async with Database(database_url) as database:
        for mode in (plain, transactional, read_only):
            async with database.session(mode) as session:
                await session.execute(text("SELECT 1"))
                engine = (await session.connection()).sync_connection.engine  # type: ignore[union-attr]
                assert not engine._has_events  # pyright: ignore[reportPrivateUsage]
