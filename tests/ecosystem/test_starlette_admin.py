"""The admin panel on `database.sessionmaker`: rows are made, changed, listed and deleted, and a
refused COMMIT is a 500.
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette_admin.contrib.sqla import Admin, ModelView

from asgi_db import Database, DBSessionMiddleware
from tests.ecosystem.heroes import NO_SUCH_TEAM, Hero, heroes, serving


class HeroView(ModelView):
    fields = ["id", "name"]

    async def before_create(self, request: Request, data: dict[str, Any], obj: Any) -> None:
        if data["name"] == "nobody":
            obj.team_id = NO_SUCH_TEAM


def application(database: Database) -> Starlette:
    app = Starlette()
    app.add_middleware(DBSessionMiddleware, database=database)
    admin = Admin(database.sessionmaker, secret_key="of the test")
    admin.add_view(HeroView(Hero, key="heroes"))
    admin.mount_to(app)
    return app


@asynccontextmanager
async def panel(database: Database) -> AsyncGenerator[httpx.AsyncClient]:
    """A client with the token without which the panel changes nothing."""
    async with serving(application(database), database) as client:
        assert (await client.get("/admin/heroes/list")).status_code == 200
        client.headers["X-CSRFToken"] = client.cookies["starlette_admin_csrftoken"]
        yield client


async def test_rows_are_made_listed_changed_and_deleted(database: Database) -> None:
    url = str(database.url)
    async with panel(database) as client:
        answer = await client.post("/admin/heroes/create", data={"name": "ada"})
        assert answer.status_code == 303, answer.text
        assert heroes(url) == ["ada"]
        assert "ada" in (await client.get("/admin/heroes/list")).text
        assert "ada" in (await client.get("/admin/heroes/detail?pk=1")).text
        answer = await client.post("/admin/heroes/edit?pk=1", data={"name": "eve"})
        assert answer.status_code == 303, answer.text
        assert heroes(url) == ["eve"]
        answer = await client.post("/admin/_api/heroes/action?name=delete&pks=1")
        assert answer.status_code == 200, answer.text
        assert heroes(url) == []


async def test_what_is_refused_leaves_nothing(database: Database) -> None:
    url = str(database.url)
    async with panel(database) as client:
        await client.post("/admin/heroes/create", data={"name": "ada"})
        answer = await client.post("/admin/heroes/create", data={"name": "ada"})
        assert answer.status_code == 500
        assert heroes(url) == ["ada"]


async def test_a_failed_commit_is_a_500(database: Database) -> None:
    async with panel(database) as client:
        answer = await client.post("/admin/heroes/create", data={"name": "nobody"})
        assert answer.status_code == 500
        assert heroes(str(database.url)) == []
