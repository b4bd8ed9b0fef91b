"""Pages of a statement, each on a connection that is given back between its two statements."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi_pagination import LimitOffsetPage, Page, add_pagination
from fastapi_pagination.cursor import CursorPage
from fastapi_pagination.ext.sqlalchemy import apaginate
from pydantic import BaseModel, ConfigDict
from sqlalchemy import insert, select

from asgi_db import Database, DBSessionMiddleware
from asgi_db_fastapi import CurrentSessionReadOnly, CurrentSessionTransaction
from tests.ecosystem.heroes import NO_SUCH_TEAM, Hero, heroes, serving


class HeroOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: int
    name: str


def application(database: Database) -> FastAPI:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=database)

    @app.get("/heroes")
    async def read(session: CurrentSessionReadOnly) -> Page[HeroOut]:
        return await apaginate(session, select(Hero).order_by(Hero.id))

    @app.get("/heroes/by-offset")
    async def read_by_offset(session: CurrentSessionReadOnly) -> LimitOffsetPage[HeroOut]:
        return await apaginate(session, select(Hero).order_by(Hero.id))

    @app.get("/heroes/by-cursor")
    async def read_by_cursor(session: CurrentSessionReadOnly) -> CursorPage[HeroOut]:
        return await apaginate(session, select(Hero).order_by(Hero.id))

    @app.post("/heroes")
    async def create(
        number: int, session: CurrentSessionTransaction, team: int | None = None
    ) -> Page[HeroOut]:
        rows = [{"name": f"hero {n}", "team_id": team} for n in range(number)]
        await session.execute(insert(Hero), rows)
        return await apaginate(session, select(Hero).order_by(Hero.id))

    add_pagination(app)
    return app


async def test_pages_are_read_and_written(database: Database) -> None:
    async with serving(application(database), database) as client:
        answer = await client.post("/heroes", params={"number": 5, "size": 2})
        assert (answer.status_code, answer.json()["total"]) == (200, 5)
        assert len(heroes(str(database.url))) == 5
        page = (await client.get("/heroes", params={"page": 2, "size": 2})).json()
        assert [hero["name"] for hero in page["items"]] == ["hero 2", "hero 3"]
        assert (page["total"], page["pages"]) == (5, 3)
        page = (await client.get("/heroes/by-offset", params={"offset": 4})).json()
        assert ([hero["name"] for hero in page["items"]], page["total"]) == (["hero 4"], 5)


async def test_a_cursor_leads_through_all_rows(database: Database) -> None:
    async with serving(application(database), database) as client:
        await client.post("/heroes", params={"number": 5})
        names, cursor = list[str](), None
        while cursor is not None or not names:
            params = {"size": 2} | ({"cursor": cursor} if cursor else {})
            page = (await client.get("/heroes/by-cursor", params=params)).json()
            names += [hero["name"] for hero in page["items"]]
            cursor = page["next_page"]
        assert names == heroes(str(database.url))


async def test_a_page_of_what_is_refused_at_commit_is_a_500(database: Database) -> None:
    async with serving(application(database), database) as client:
        answer = await client.post("/heroes", params={"number": 5, "team": NO_SUCH_TEAM})
        assert answer.status_code == 500
    assert heroes(str(database.url)) == []
