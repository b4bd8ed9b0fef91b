"""Filters, a search and an order in the query string, on a `read_only` session."""

from typing import Annotated

from fastapi import FastAPI
from fastapi_filter import FilterDepends
from fastapi_filter.contrib.sqlalchemy import Filter
from sqlalchemy import select

from asgi_db import Database, DBSessionMiddleware
from asgi_db_fastapi import CurrentSessionReadOnly, CurrentSessionTransaction
from tests.ecosystem.heroes import NO_SUCH_TEAM, Hero, heroes, serving


class HeroFilter(Filter):
    name__ilike: str | None = None
    name__in: list[str] | None = None
    search: str | None = None
    order_by: list[str] | None = None

    class Constants(Filter.Constants):
        model = Hero
        search_model_fields = ["name"]


def application(database: Database) -> FastAPI:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=database)

    @app.get("/heroes")
    async def read(
        chosen: Annotated[HeroFilter, FilterDepends(HeroFilter)], session: CurrentSessionReadOnly
    ) -> list[str]:
        statement = chosen.sort(chosen.filter(select(Hero)))
        return [hero.name for hero in await session.scalars(statement)]

    @app.delete("/heroes")
    async def move(
        chosen: Annotated[HeroFilter, FilterDepends(HeroFilter)],
        session: CurrentSessionTransaction,
        team: int | None = None,
    ) -> None:
        for hero in await session.scalars(chosen.filter(select(Hero))):
            if team is None:
                await session.delete(hero)
            else:
                hero.team_id = team

    @app.post("/heroes")
    async def create(names: list[str], session: CurrentSessionTransaction) -> None:
        session.add_all([Hero(name=name) for name in names])

    return app


async def test_rows_are_filtered_sorted_and_written(database: Database) -> None:
    async with serving(application(database), database) as client:
        await client.post("/heroes", json=["ada", "grace", "gwen"])
        assert (await client.get("/heroes?name__ilike=G%25")).json() == ["grace", "gwen"]
        assert (await client.get("/heroes?name__in=ada,gwen")).json() == ["ada", "gwen"]
        found = await client.get("/heroes?search=g&order_by=-name")
        assert found.json() == ["gwen", "grace"]
        assert (await client.delete("/heroes?name__ilike=g%25")).status_code == 200
        assert heroes(str(database.url)) == ["ada"]


async def test_a_failed_commit_is_a_500(database: Database) -> None:
    async with serving(application(database), database) as client:
        await client.post("/heroes", json=["ada", "eve"])
        answer = await client.delete(f"/heroes?name__in=ada&team={NO_SUCH_TEAM}")
        assert answer.status_code == 500
        assert heroes(str(database.url)) == ["ada", "eve"]
        left = await client.get("/heroes")
        assert left.json() == ["ada", "eve"]
