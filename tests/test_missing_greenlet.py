"""What SQLAlchemy can only do below an `await`, done elsewhere: an error, and no leak.

A lazy load in plain code, or a call of the synchronous half of the session, raises
`MissingGreenlet`. That is the application's fault, and it is told of nothing else. The connection
comes back all the same: to decide that it is to be given back needs no I/O.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import literal, select
from sqlalchemy.exc import DBAPIError, MissingGreenlet, StatementError
from sqlalchemy.ext.asyncio import AsyncSessionTransaction

from asgi_db import (
    Database,
    DBSession,
    DBSessionMiddleware,
    Mode,
    plain,
    read_only,
    transactional,
)
from asgi_db.types import Receive, Scope, Send
from tests.cancelling import create_tables, tables_on
from tests.contract.client import call
from tests.pools import checked_out
from tests.servers import DatabaseServer, assert_idle, sql
from tests.tables import Author, Base, authors
from tests.versions import IS_SQLALCHEMY_2_0

ONE = select(literal(1))

MODES: dict[str, Mode] = {
    "plain": plain,
    "transactional": transactional,
    "read_only": read_only,
    "snapshot": read_only(snapshot=True),
}

# aiosqlite wraps its coroutines, so that SQLAlchemy cannot close the one that it does not await.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """What a test leaves to the garbage collector is its own."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def postgresql_tables(postgresql_server: DatabaseServer) -> Iterator[str]:
    with tables_on(postgresql_server) as url:
        sql(url, "INSERT INTO author (name) VALUES ('the first')")
        yield url


@pytest.fixture(scope="module")
def mysql_tables(mysql_server: DatabaseServer) -> Iterator[str]:
    with tables_on(mysql_server) as url:
        sql(url, "INSERT INTO author (name) VALUES ('the first')")
        yield url


@pytest.fixture
def sqlite_tables(sqlite_url: str) -> str:
    create_tables(sqlite_url)
    sql(sqlite_url, "INSERT INTO author (name) VALUES ('the first')")
    return sqlite_url


@asynccontextmanager
async def with_one_connection(url: str) -> AsyncGenerator[Database]:
    """A database with one connection, for which nobody waits for long."""
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 2}
    async with Database(url, engine_options=options) as database:
        yield database


async def assert_whole(database: Database, url: str) -> None:
    """Nothing is held, and the only connection of the pool serves."""
    assert checked_out(database) == 0
    await assert_idle(url)
    name = uuid4().hex
    async with database.transaction() as session:
        session.add(Author(name=name))
    assert name in await authors(url)


async def an_author(session: DBSession) -> Author:
    return (await session.scalars(select(Author).where(Author.name == "the first"))).one()


# -- what is no error --------------------------------------------------------------------------

Use = Callable[[DBSession], Awaitable[object]]


async def rolled_back(session: DBSession) -> None:
    await session.connection()
    savepoint = await session.begin_nested()
    await savepoint.rollback()


async def released(session: DBSession) -> None:
    await session.connection()
    savepoint = await session.begin_nested()
    await savepoint.commit()


async def nested_and_released(session: DBSession) -> None:
    await session.connection()
    outer = await session.begin_nested()
    inner = await session.begin_nested()
    await inner.commit()
    await outer.commit()


async def nested_and_rolled_back(session: DBSession) -> None:
    await session.connection()
    outer = await session.begin_nested()
    inner = await session.begin_nested()
    await session.scalar(ONE)
    await inner.rollback()
    await outer.rollback()


async def nested_and_rolled_back_from_outside(session: DBSession) -> None:
    outer = await session.begin_nested()
    await session.begin_nested()
    await session.scalar(ONE)
    await outer.rollback()


async def in_a_block(session: DBSession) -> None:
    await session.connection()
    async with session.begin_nested():
        await session.scalar(ONE)


async def in_a_block_that_raises(session: DBSession) -> None:
    await session.connection()
    with pytest.raises(LookupError):
        async with session.begin_nested():
            raise LookupError


async def several(session: DBSession) -> None:
    for end in (AsyncSessionTransaction.commit, AsyncSessionTransaction.rollback) * 2:
        await end(await session.begin_nested())
        await session.scalar(ONE)


async def left_open(session: DBSession) -> None:
    await session.connection()
    await session.begin_nested()


SAVEPOINTS: list[Use] = [
    rolled_back,
    released,
    nested_and_released,
    nested_and_rolled_back,
    nested_and_rolled_back_from_outside,
    in_a_block,
    in_a_block_that_raises,
    several,
    left_open,
]


@dataclass(frozen=True)
class Case:
    """What is done on which database in which mode."""

    what: Callable[..., Any]
    mode: str
    database: str


def cases(functions: Sequence[Callable[..., Any]]) -> pytest.MarkDecorator:
    """Each function in each mode on each database."""
    params = list[Any]()
    for what, mode, database in itertools.product(functions, MODES, DATABASES):
        case = Case(what, mode, database)
        params.append(pytest.param(case, id=f"{what.__name__}-{mode}-{database}", marks=GARBAGE))
    return pytest.mark.parametrize("case", params)


DATABASES = ("sqlite", "postgresql", "mysql")

GARBAGE = pytest.mark.filterwarnings("ignore:")
"""SQLAlchemy leaves coroutines that were never awaited, for which the collector warns."""


@cases(SAVEPOINTS)
async def test_a_savepoint_gives_the_connection_back_however_it_ends(
    request: pytest.FixtureRequest, case: Case
) -> None:
    """In `read_only`, which has no transaction, the database itself may refuse it."""
    url: str = request.getfixturevalue(f"{case.database}_tables")
    mode = MODES[case.mode]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await case.what(scope["state"]["db"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    async with with_one_connection(url) as database:
        for _ in range(2):
            exchange = await call(DBSessionMiddleware(app, database, mode=mode))
            if exchange.error is None or mode is not read_only:
                assert (exchange.status, exchange.error) == (200, None)
            else:
                assert isinstance(exchange.error, DBAPIError)
            await assert_whole(database, url)
        with nullcontext() if mode is not read_only else suppress(DBAPIError):
            async with database.session(mode) as session:
                await case.what(session)
                assert await session.scalar(ONE) == 1
        await assert_whole(database, url)


# -- what is an error of the application -------------------------------------------------------

Misuse = Callable[[DBSession, Author], Any]


def lazy_load(_: DBSession, author: Author) -> object:
    return author.books


def expired_attribute(session: DBSession, author: Author) -> object:
    session.expire(author)
    return author.name


def lazy_load_in_a_thread(_: DBSession, author: Author) -> object:
    return asyncio.to_thread(lambda: author.books)


def synchronous_execute(session: DBSession, _: Author) -> object:
    return session.sync_session.execute(ONE)


def synchronous_connection(session: DBSession, _: Author) -> object:
    return session.sync_session.connection().execute(ONE)


def synchronous_refresh(session: DBSession, author: Author) -> None:
    session.sync_session.refresh(author)


def synchronous_flush(session: DBSession, _: Author) -> None:
    session.add(Author(name=uuid4().hex))
    session.sync_session.flush()


def synchronous_savepoint(session: DBSession, _: Author) -> object:
    with session.sync_session.begin_nested():
        return session.sync_session.execute(ONE)


async def synchronous_commit(session: DBSession, _: Author) -> None:
    await session.connection()
    session.sync_session.commit()


async def synchronous_rollback(session: DBSession, _: Author) -> None:
    await session.connection()
    session.sync_session.rollback()


async def synchronous_close(session: DBSession, _: Author) -> None:
    await session.connection()
    session.sync_session.close()


async def on_the_synchronous_connection(session: DBSession, _: Author) -> object:
    connection = await session.connection()
    assert connection.sync_connection is not None
    return connection.sync_connection.execute(ONE)


async def lazy_load_in_a_savepoint(session: DBSession, author: Author) -> object:
    async with session.begin_nested():
        return author.books


MISUSES: list[Misuse] = [
    lazy_load,
    expired_attribute,
    lazy_load_in_a_thread,
    synchronous_execute,
    synchronous_connection,
    synchronous_refresh,
    synchronous_flush,
    synchronous_savepoint,
    synchronous_commit,
    synchronous_rollback,
    synchronous_close,
    on_the_synchronous_connection,
    lazy_load_in_a_savepoint,
]


def is_the_applications(error: BaseException | None) -> bool:
    """Whether it is the error of SQLAlchemy, which also wraps it."""
    return isinstance(error, MissingGreenlet) or (
        type(error) is StatementError and isinstance(error.orig, MissingGreenlet)
    )


async def misuse(session: DBSession, case: Case, *, swallows: bool) -> None:
    """Misuse the session, which is an error; pass it on, or go on regardless."""
    author = await an_author(session)
    try:
        result = case.what(session, author)
        if isinstance(result, Awaitable):
            await result
    except Exception as error:
        assert is_the_applications(error), repr(error)
        if not swallows:
            raise
    else:
        may_do_without_io = (synchronous_commit, synchronous_rollback, synchronous_close)
        assert case.what in may_do_without_io and case.mode == "read_only"


def refuses(case: Case) -> bool:
    """Whether the mode refuses it before anything else: a flush in one that only reads."""
    return case.what is synchronous_flush and MODES[case.mode].read_only


@cases(MISUSES)
async def test_a_misuse_is_an_error_of_the_application_and_confined_to_its_request(
    request: pytest.FixtureRequest, case: Case
) -> None:
    url: str = request.getfixturevalue(f"{case.database}_tables")
    mode = MODES[case.mode]
    if refuses(case):
        return

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session: DBSession = scope["state"]["db"]
        if mode.commits:
            session.add(Author(name=name))
            await session.flush()
        await misuse(session, case, swallows=scope["path"] == "/swallowed")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    async with with_one_connection(url) as database:
        for path in "/passed on", "/swallowed":
            name = uuid4().hex
            exchange = await call(DBSessionMiddleware(app, database, mode=mode), path)
            if path == "/passed on":
                assert exchange.error is None or is_the_applications(exchange.error)
            elif not mode.commits:
                assert (exchange.status, exchange.error) == (200, None)
            elif case.what is not synchronous_rollback:  # which the application wanted
                assert (exchange.status == 200) == (name in await authors(url))
            await assert_whole(database, url)
        with suppress(MissingGreenlet, StatementError):
            async with database.session(mode) as session:
                await misuse(session, case, swallows=False)
        await assert_whole(database, url)


THIRTY: list[Misuse] = [lazy_load]


@cases(THIRTY)
async def test_thirty_lazy_loads_in_plain_code_leave_the_default_pool_whole(
    request: pytest.FixtureRequest, case: Case
) -> None:
    url: str = request.getfixturevalue(f"{case.database}_tables")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await misuse(scope["state"]["db"], case, swallows=False)

    async with Database(url, engine_options={"pool_timeout": 2}) as database:
        for _ in range(30):
            exchange = await call(DBSessionMiddleware(app, database, mode=MODES[case.mode]))
            assert is_the_applications(exchange.error)
        await assert_whole(database, url)


@cases(THIRTY)
async def test_a_session_goes_on_after_a_misuse(request: pytest.FixtureRequest, case: Case) -> None:
    url: str = request.getfixturevalue(f"{case.database}_tables")
    mode = MODES[case.mode]
    async with with_one_connection(url) as database:
        async with database.session(mode) as session:
            for _ in range(3):
                await misuse(session, case, swallows=True)
                await session.rollback()
                assert await session.scalar(ONE) == 1
                await asyncio.sleep(0)
                assert checked_out(database) == (0 if mode is read_only else 1)
            author = await an_author(session)
            assert await author.awaitable_attrs.books == []
        await assert_whole(database, url)


@pytest.mark.skipif(IS_SQLALCHEMY_2_0, reason="its cursor fails after the statement is counted")
async def test_what_was_not_sent_does_not_count_as_a_write(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Database(sqlite_url) as database:
        await database.create_tables(Base.metadata)
        async with database.session() as session:
            await session.scalar(ONE)
            session.add(Author(name="ada"))
            with pytest.raises((MissingGreenlet, StatementError)):
                session.sync_session.flush()
            async with database.transaction() as another:  # SQLite has one writer at a time
                another.add(Author(name="grace"))
        assert await authors(sqlite_url) == ["grace"]
    assert caplog.messages == []
