"""SQLModel: its session class in requests and blocks, with `exec` and our own methods."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated

import pytest
from fastapi import Depends, FastAPI
from sqlmodel import Field, SQLModel, select
from sqlmodel.ext.asyncio.session import AsyncSession

from asgi_db import Database, DBSession, DBSessionMiddleware, ReadOnlyError, read_only
from asgi_db_fastapi import get_db_read_only, get_db_transaction
from tests.contract.client import call
from tests.servers import assert_idle, outside


class Hero(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(max_length=50)


class HeroSession(DBSession, AsyncSession):
    """SQLModel's session, and ours."""


Reading = Annotated[HeroSession, Depends(get_db_read_only)]
Writing = Annotated[HeroSession, Depends(get_db_transaction)]
OfSQLModel = Annotated[AsyncSession, Depends(get_db_read_only)]


@pytest.fixture(params=[AsyncSession, HeroSession], ids=["sqlmodel", "ours"])
async def database(
    request: pytest.FixtureRequest, database_url: str
) -> AsyncIterator[Database[HeroSession]]:
    options = {"class_": request.param}
    heroes: Database[HeroSession] = Database(database_url, session_options=options)
    async with heroes as database:
        await database.create_tables(SQLModel.metadata)
        yield database
        await assert_idle(database_url)


async def test_requests_use_exec(database: Database[HeroSession], database_url: str) -> None:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=database)
    ran: list[str] = []

    @app.post("/heroes", status_code=201)
    async def create(session: Writing) -> None:
        session.on_commit(lambda: ran.append("committed"))
        session.add(Hero(name="Deadpond"))
        await session.flush()
        assert (await session.exec(select(Hero.name))).all() == ["Deadpond"]

    @app.get("/heroes")
    async def heroes(session: Reading, same: OfSQLModel) -> list[Hero]:
        assert session is same
        return [*(await session.exec(select(Hero))).all()]

    assert (await call(app, "/heroes", method="POST")).status == 201
    assert ran == ["committed"]
    async with outside(database_url) as connection:
        assert [*await connection.execute("SELECT name FROM hero")] == [("Deadpond",)]
    exchange = await call(app, "/heroes", method="GET")
    assert exchange.status == 200
    assert json.loads(exchange.body) == [{"id": 1, "name": "Deadpond"}]


async def test_blocks_use_exec(database: Database[HeroSession]) -> None:
    async with database.transaction() as session:
        session.add(Hero(name="Deadpond"))
    async with database.session(read_only) as session:
        heroes = (await session.exec(select(Hero))).all()
        assert [hero.name for hero in heroes] == ["Deadpond"]
        session.add(Hero(name="Rusty-Man"))
        with pytest.raises(ReadOnlyError):
            await session.flush()


async def test_a_sandbox_undoes_what_exec_has_seen(database: Database[HeroSession]) -> None:
    async with database.sandbox():
        async with database.transaction() as session:
            session.add(Hero(name="Deadpond"))
        async with database.session(read_only) as session:
            assert (await session.exec(select(Hero.name))).all() == ["Deadpond"]
    async with database.session(read_only) as session:
        assert (await session.exec(select(Hero.name))).all() == []
