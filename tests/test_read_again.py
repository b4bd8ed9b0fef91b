"""What is selected again after the connection was given back is as others have left it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import String, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from asgi_db import (
    Database,
    DBSession,
    DBSessionMiddleware,
    Mode,
    plain,
    read_only,
    session_of,
    transactional,
)
from asgi_db.types import ASGIApp, Receive, Scope, Send
from tests.contract.client import call
from tests.internals import Transactional


class Base(DeclarativeBase):
    """The tables."""


class Counter(Base):
    """What the requests count up."""

    __tablename__ = "counter"

    name: Mapped[str] = mapped_column(String(20), primary_key=True)
    n: Mapped[int]


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with Database(database_url) as database:
        await database.create_tables(Base.metadata)
        async with database.transaction() as session:
            session.add(Counter(name="visits", n=0))
        yield database
        await database.drop_tables(Base.metadata)


async def counted(database: Database) -> int:
    async with database.session() as session:
        return (await session.scalars(select(Counter.n))).one()


def counting(
    database: Database, mode: Transactional, *, locks: bool, before: Mode = plain
) -> ASGIApp:
    """An application whose authentication has read the row that the route counts up.

    Args:
        before: the mode before the route is known.
    """

    @mode
    async def count(session: DBSession) -> None:
        statement = select(Counter).where(Counter.name == "visits")
        counter = (await session.scalars(statement.with_for_update() if locks else statement)).one()
        counter.n += 1

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        scope["endpoint"] = count
        await count(session_of(scope))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    async def authenticating(scope: Scope, receive: Receive, send: Send) -> None:
        await scope["state"]["db"].get_one(Counter, "visits")
        together.append(None)
        if len(together) == REQUESTS:
            all_have_read.set()
        await all_have_read.wait()
        await route(scope, receive, send)

    together, all_have_read = list[None](), asyncio.Event()
    return DBSessionMiddleware(authenticating, database, mode=before)


REQUESTS = 5


@pytest.mark.parametrize("before", [plain, read_only])
async def test_no_update_is_lost_to_what_a_middleware_has_read(
    database: Database, before: Mode
) -> None:
    app = counting(database, transactional, locks=True, before=before)
    answers = await asyncio.gather(*(call(app) for _ in range(REQUESTS)))
    assert [answer.status for answer in answers] == [200] * REQUESTS
    assert await counted(database) == REQUESTS


@pytest.mark.parametrize("before", [plain, read_only])
async def test_no_update_is_lost_in_serializable(database: Database, before: Mode) -> None:
    serializable = transactional(isolation="SERIALIZABLE")
    app = counting(database, serializable, locks=False, before=before)
    answers = await asyncio.gather(*(call(app) for _ in range(REQUESTS)))
    assert await counted(database) == [answer.status for answer in answers].count(200) > 0


@pytest.mark.parametrize("mode", [transactional, read_only])
async def test_what_is_read_again_after_release_is_new(database: Database, mode: Mode) -> None:
    async with database.session(mode) as session:
        counter = await session.get_one(Counter, "visits")
        await session.release()
        async with database.transaction() as other:
            (await other.get_one(Counter, "visits")).n = 7
        assert counter.n == 0  # it can still be read, without a statement
        assert (await session.scalars(select(Counter))).one() is counter
        assert counter.n == 7


async def test_a_change_that_was_not_flushed_is_not_thrown_away(database: Database) -> None:
    async with database.transaction() as session:
        counter = await session.get_one(Counter, "visits")
        await session.release()
        counter.n = 3
        await session.scalars(select(Counter))
        assert counter.n == 3
    assert await counted(database) == 3
