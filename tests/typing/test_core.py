"""What the type checkers make of the core: `assert_type` for them, and run as well."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, assert_type

import pytest
from sqlalchemy import URL, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from asgi_db import (
    Database,
    DBSession,
    DBSessionMiddleware,
    MissingMiddlewareError,
    Mode,
    PoolProfile,
    by_method,
    create_database_url,
    plain,
    read_only,
    session_of,
    transactional,
    uuid4_str,
)
from asgi_db.types import ASGIApp, Receive, Scope, Send
from tests.internals import ReadOnly, Transactional
from tests.tables import Author, Base


async def endpoint(name: str, /, number: int = 1) -> bytes:
    return name.encode() * number


async def bare_app(scope: Scope, receive: Receive, send: Send) -> None: ...


def test_a_decorator_keeps_the_type_of_what_it_marks() -> None:
    marked = transactional(endpoint)
    typed: Callable[[str], Coroutine[Any, Any, bytes]] = marked
    assert typed is endpoint

    @transactional(isolation="SERIALIZABLE", commit_on=lambda status: status < 300)
    async def handler(number: int) -> str:
        return str(number)

    @read_only(snapshot=True)
    class Handlers:
        number: int = 1

    assert_type(Handlers().number, int)
    checked: Callable[[int], Coroutine[Any, Any, str]] = handler
    assert checked is handler


def test_variants_are_modes_of_the_same_kind() -> None:
    assert_type(transactional(isolation="REPEATABLE READ"), Transactional)
    assert_type(transactional(), Transactional)
    assert_type(read_only(snapshot=True), ReadOnly)
    mode: Mode = transactional(isolation="SERIALIZABLE", read_only=True, deferrable=True)
    assert_type(mode.isolation is None, bool)
    assert_type(by_method({"method": "GET"}), Mode)


def test_what_cannot_work_is_an_error_of_the_type_checkers_too() -> None:
    with pytest.raises(ValueError):
        transactional(isolation="SNAPSHOT")  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        transactional(snapshot=True)  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        read_only(isolation="SERIALIZABLE")  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        plain(isolation="SERIALIZABLE")  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        Database("sqlite://", pools="low")  # type: ignore[call-arg]


async def test_a_database_and_its_sessions() -> None:
    database = Database("sqlite://", pool="low", engine_options={"echo": False})
    assert_type(Database("sqlite://", pool=PoolProfile(pool_size=1)), Database)
    async with database as entered:
        assert_type(entered, Database)
        assert_type(database.engine, AsyncEngine)
        await database.create_tables(Base.metadata)
        async with database.session() as session:
            assert_type(session, DBSession)
            assert_type(await session.get(Author, 1), Author | None)
            assert_type((await session.scalars(select(Author.name))).all(), Sequence[str])
            base: AsyncSession = session
            assert base is session
        async with database.session(read_only) as session:
            assert_type(await session.release(), None)
        async with database.transaction(transactional(isolation="SERIALIZABLE")) as session:
            assert_type(session, DBSession)
            session.add(Author(name=uuid4_str()))
        database.transaction(read_only)  # type: ignore[arg-type]
        await database.drop_tables(Base.metadata)


class ShopSession(DBSession, AsyncSession):
    """A session with a method of one's own."""

    async def authors(self) -> Sequence[str]:
        return (await self.scalars(select(Author.name))).all()


async def test_a_database_with_a_session_class() -> None:
    shop: Database[ShopSession] = Database("sqlite://", session_options={"class_": ShopSession})
    async with shop as database:
        assert_type(database, Database[ShopSession])
        taken: Database = database
        assert taken is shop
        await database.create_tables(Base.metadata)
        async with database.transaction() as session:
            assert_type(session, ShopSession)
            assert_type(await session.authors(), Sequence[str])
            await session.release()
        async with database.session() as session:
            assert_type(session, ShopSession)
        assert_type(database.sessionmaker, async_sessionmaker[ShopSession])
        async with database.sessionmaker() as session:
            assert_type(session, ShopSession)
        async with database.sessionmaker.begin() as session:
            assert_type(session, ShopSession)
            session.on_commit(lambda: None)
    assert Database[ShopSession]("sqlite://").url.drivername == "sqlite+aiosqlite"


def test_urls_and_keys() -> None:
    assert_type(create_database_url("postgresql", user="app", database="shop"), URL)
    assert_type(uuid4_str(), str)


async def test_the_middleware_takes_any_application_and_is_one() -> None:
    async with Database("sqlite://") as database:
        app: ASGIApp = DBSessionMiddleware(bare_app, database, mode=by_method, key="db")
        again: ASGIApp = DBSessionMiddleware(app, database=database, mode=lambda scope: plain)
        assert again is not app


def test_the_session_of_a_scope() -> None:
    with pytest.raises(MissingMiddlewareError):
        assert_type(session_of({}), DBSession)
    with pytest.raises(MissingMiddlewareError):
        assert_type(session_of({}, transactional, key="analytics"), DBSession)
