"""`FastCRUD` in a `transactional` route with `commit=False`, and `crud_router`, which commits
itself, in the mode `plain`.
"""

from typing import Any

from fastapi import FastAPI
from fastcrud import FastCRUD, crud_router
from pydantic import BaseModel

from asgi_db import Database, DBSessionMiddleware
from asgi_db_fastapi import CurrentSessionReadOnly, CurrentSessionTransaction, get_db
from tests.ecosystem.heroes import NO_SUCH_TEAM, Hero, heroes, serving


class NewHero(BaseModel):
    name: str
    team_id: int | None = None


class ChangedHero(BaseModel):
    name: str | None = None


crud: Any = FastCRUD(Hero)


def application(database: Database) -> FastAPI:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=database)
    app.include_router(
        crud_router(
            session=get_db,
            model=Hero,
            create_schema=NewHero,
            update_schema=ChangedHero,
            path="/heroes",
        )
    )

    @app.post("/pairs", status_code=201)
    async def create_pair(
        name: str, session: CurrentSessionTransaction, team: int | None = None
    ) -> None:
        for each in name, f"{name}'s friend":
            await crud.create(session, NewHero(name=each, team_id=team), commit=False)

    @app.get("/names")
    async def read_names(session: CurrentSessionReadOnly) -> dict[str, Any]:
        return await crud.get_multi(session, limit=2, sort_columns="id")

    return app


async def test_the_router_makes_changes_and_deletes_rows(database: Database) -> None:
    url = str(database.url)
    async with serving(application(database), database) as client:
        answer = await client.post("/heroes", json={"name": "ada"})
        assert answer.status_code == 200, answer.text
        assert heroes(url) == ["ada"]
        assert (await client.patch("/heroes/1", json={"name": "eve"})).status_code == 200
        assert heroes(url) == ["eve"]
        assert (await client.get("/heroes/1")).json()["name"] == "eve"
        assert (await client.get("/heroes")).json()["data"][0]["name"] == "eve"
        assert (await client.delete("/heroes/1")).status_code == 200
        assert heroes(url) == []


async def test_two_rows_are_one_transaction(database: Database) -> None:
    url = str(database.url)
    async with serving(application(database), database) as client:
        assert (await client.post("/pairs?name=ada")).status_code == 201
        assert heroes(url) == ["ada", "ada's friend"]
        names = (await client.get("/names")).json()
        assert (len(names["data"]), names["total_count"]) == (2, 2)
        await client.post("/heroes", json={"name": "eve's friend"})
        assert (await client.post("/pairs?name=eve")).status_code == 500
        assert heroes(url) == ["ada", "ada's friend", "eve's friend"]


async def test_a_failed_commit_is_an_error(database: Database) -> None:
    async with serving(application(database), database) as client:
        answer = await client.post(f"/pairs?name=ada&team={NO_SUCH_TEAM}")
        assert answer.status_code == 500
        answer = await client.post("/heroes", json={"name": "eve", "team_id": NO_SUCH_TEAM})
        assert answer.status_code == 500
    assert heroes(str(database.url)) == []
