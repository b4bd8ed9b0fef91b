"""SQLModel's models as tables and response models, with its own `AsyncSession` as the session's
class: `await session.exec(select(Hero))`.
"""

from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from sqlmodel import Field, SQLModel, select
from sqlmodel.ext.asyncio.session import AsyncSession

from asgi_db import Database, DBSessionMiddleware, read_only
from asgi_db_fastapi import get_db_read_only, get_db_transaction
from tests.ecosystem.heroes import NO_SUCH_TEAM, heroes, serving


class HeroBase(SQLModel):
    name: str = Field(max_length=50, unique=True)
    team_id: int | None = None


class Hero(HeroBase, table=True):
    __tablename__ = "hero"
    __table_args__ = {"extend_existing": True}

    id: int | None = Field(default=None, primary_key=True)


class HeroOut(HeroBase):
    id: int


Reading = Annotated[AsyncSession, Depends(get_db_read_only)]
Writing = Annotated[AsyncSession, Depends(get_db_transaction)]


def application(database: Database) -> FastAPI:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=database)

    @app.post("/heroes", status_code=201)
    async def create(hero: HeroBase, session: Writing) -> HeroOut:
        stored = Hero.model_validate(hero)
        session.add(stored)
        await session.flush()
        return HeroOut.model_validate(stored, from_attributes=True)

    @app.get("/heroes", response_model=list[HeroOut])
    async def read(session: Reading) -> Any:
        return (await session.exec(select(Hero).order_by(Hero.name))).all()

    return app


@pytest.fixture
def own(database: Database) -> Database:
    return Database(
        database.url,
        session_options={
            "class_": AsyncSession,
            "sync_session_class": AsyncSession.sync_session_class,
        },
    )


async def test_models_are_written_and_read(own: Database) -> None:
    async with serving(application(own), own) as client:
        answer = await client.post("/heroes", json={"name": "ada"})
        assert (answer.status_code, answer.json()) == (
            201,
            {"name": "ada", "team_id": None, "id": 1},
        )
        assert heroes(str(own.url)) == ["ada"]
        assert [hero["name"] for hero in (await client.get("/heroes")).json()] == ["ada"]


async def test_exec_works_in_a_block(own: Database) -> None:
    async with own:
        async with own.transaction() as session:
            session.add(Hero(name="ada"))
        async with own.session(read_only) as session:
            assert (await session.exec(select(Hero.name))).all() == ["ada"]  # type: ignore[attr-defined]


async def test_a_failed_commit_is_a_500(own: Database) -> None:
    async with serving(application(own), own) as client:
        answer = await client.post("/heroes", json={"name": "ada", "team_id": NO_SUCH_TEAM})
        assert answer.status_code == 500
    assert heroes(str(own.url)) == []
