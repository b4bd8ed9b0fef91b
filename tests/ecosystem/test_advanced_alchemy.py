"""Repositories and services in a `transactional` route: they flush, and the COMMIT comes before
the response.
"""

from __future__ import annotations

from typing import Annotated, Any

from advanced_alchemy.exceptions import IntegrityError, NotFoundError
from advanced_alchemy.filters import LimitOffset, SearchFilter
from advanced_alchemy.repository import SQLAlchemyAsyncRepository
from advanced_alchemy.service import SQLAlchemyAsyncRepositoryService
from fastapi import Depends, FastAPI, Request, Response

from asgi_db import Database, DBSessionMiddleware
from asgi_db_fastapi import CurrentSessionReadOnly, CurrentSessionTransaction
from tests.ecosystem.heroes import NO_SUCH_TEAM, Hero, Team, heroes, serving
from tests.servers import sql


class TeamRepository(SQLAlchemyAsyncRepository[Team]):
    model_type = Team


class HeroService(SQLAlchemyAsyncRepositoryService[Hero]):
    class Repository(SQLAlchemyAsyncRepository[Hero]):
        model_type = Hero

    repository_type = Repository


def for_writing(session: CurrentSessionTransaction) -> HeroService:
    return HeroService(session=session)


def for_reading(session: CurrentSessionReadOnly) -> HeroService:
    return HeroService(session=session)


Writing = Annotated[HeroService, Depends(for_writing)]
Reading = Annotated[HeroService, Depends(for_reading)]


def application(database: Database) -> FastAPI:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=database)

    @app.post("/heroes", status_code=201)
    async def create(name: str, service: Writing, team: int | None = None) -> int:
        return (await service.create({"name": name, "team_id": team})).id

    @app.post("/heroes/many", status_code=201)
    async def create_many(name: list[str], service: Writing) -> int:
        return len(await service.create_many([{"name": each} for each in name]))

    @app.post("/teams", status_code=201)
    async def create_team(name: str, session: CurrentSessionTransaction) -> int:
        team, _created = await TeamRepository(session=session).get_or_upsert(name=name)
        return team.id

    @app.get("/heroes")
    async def read(service: Reading, search: str = "") -> dict[str, Any]:
        found, total = await service.list_and_count(
            SearchFilter("name", search, ignore_case=True), LimitOffset(2, 0)
        )
        return {"names": [hero.name for hero in found], "total": total}

    @app.put("/heroes/{id}")
    async def rename(id: int, name: str, service: Writing) -> str:
        return (await service.update({"name": name}, item_id=id)).name

    @app.delete("/heroes/{id}", status_code=204)
    async def delete(id: int, service: Writing) -> None:
        await service.delete(id)

    @app.exception_handler(NotFoundError)
    async def not_found(_request: Request, _error: Exception) -> Response:
        return Response(status_code=404)

    @app.exception_handler(IntegrityError)
    async def conflict(_request: Request, error: Exception) -> Response:
        return Response(type(error).__name__, status_code=409)

    return app


async def test_services_read_and_write(database: Database) -> None:
    url = str(database.url)
    async with serving(application(database), database) as client:
        assert (await client.post("/heroes?name=ada")).status_code == 201
        answer = await client.post("/heroes/many", json=["grace", "Gail", "gwen"])
        assert (answer.status_code, answer.json()) == (201, 3)
        assert heroes(url) == ["ada", "grace", "Gail", "gwen"]
        answer = await client.get("/heroes?search=g")
        assert answer.json() == {"names": ["grace", "Gail"], "total": 3}
        assert (await client.put("/heroes/1?name=eve")).json() == "eve"
        assert (await client.delete("/heroes/2")).status_code == 204
        assert sorted(heroes(url)) == ["Gail", "eve", "gwen"]
        assert (await client.delete("/heroes/2")).status_code == 404


async def test_get_or_upsert_makes_one_row(database: Database) -> None:
    async with serving(application(database), database) as client:
        for _ in range(2):
            assert (await client.post("/teams?name=a")).json() == 1
        assert sql(str(database.url), "SELECT name FROM team") == [("a",)]


async def test_a_conflict_and_a_failed_commit_leave_nothing(database: Database) -> None:
    async with serving(application(database), database) as client:
        assert (await client.post("/heroes?name=ada")).status_code == 201
        answer = await client.post("/heroes?name=ada")
        # It looks for a part of asyncpg's message that SQLAlchemy 2.1 leaves out.
        is_named = database.url.get_backend_name() == "sqlite"
        assert answer.text == ("DuplicateKeyError" if is_named else "IntegrityError")
        assert answer.status_code == 409
        answer = await client.post(f"/heroes?name=grace&team={NO_SUCH_TEAM}")
        assert answer.status_code == 500
        assert heroes(str(database.url)) == ["ada"]
