"""The admin panel on `database.sessionmaker`: rows are made, changed, listed and deleted, and a
failed COMMIT is an error in the form.
"""

from typing import Any

import pytest
from fastapi import FastAPI, Request
from sqladmin import Admin, ModelView

from asgi_db import Database, DBSessionMiddleware
from tests.ecosystem.heroes import NO_SUCH_TEAM, Hero, Team, heroes, serving
from tests.servers import sql


class HeroAdmin(ModelView, model=Hero):
    column_list = ["id", "name"]
    form_columns = ["name"]
    column_searchable_list = ["name"]

    async def on_model_change(
        self, data: dict[str, Any], model: Any, is_created: bool, request: Request
    ) -> None:
        if data["name"] == "nobody":
            data["team_id"] = NO_SUCH_TEAM


class TeamAdmin(ModelView, model=Team):
    column_list = ["id"]


def application(database: Database) -> FastAPI:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=database)
    admin = Admin(app, session_maker=database.sessionmaker)
    admin.add_view(HeroAdmin)
    admin.add_view(TeamAdmin)
    return app


async def test_rows_are_made_listed_changed_and_deleted(database: Database) -> None:
    url = str(database.url)
    async with serving(application(database), database) as client:
        answer = await client.post("/admin/hero/create", data={"name": "ada"})
        assert answer.status_code == 302, answer.text
        assert heroes(url) == ["ada"]
        assert "ada" in (await client.get("/admin/hero/list")).text
        assert "ada" in (await client.get("/admin/hero/list?search=ad")).text
        assert "ada" in (await client.get("/admin/hero/details/1")).text
        answer = await client.post("/admin/hero/edit/1", data={"name": "eve"})
        assert answer.status_code == 302, answer.text
        assert heroes(url) == ["eve"]
        assert "eve" in (await client.get("/admin/hero/export/csv")).text
        answer = await client.delete("/admin/hero/delete?pks=1")
        assert answer.status_code == 200, answer.text
        assert heroes(url) == []


@pytest.mark.parametrize("name", ["ada", "nobody"], ids=["conflict", "failed_commit"])
async def test_what_is_refused_is_told_and_leaves_nothing(database: Database, name: str) -> None:
    url = str(database.url)
    async with serving(application(database), database) as client:
        await client.post("/admin/hero/create", data={"name": "ada"})
        answer = await client.post("/admin/hero/create", data={"name": name})
        assert (answer.status_code, heroes(url)) == (400, ["ada"])
        assert "IntegrityError" in answer.text or "Violation" in answer.text


async def test_a_deletion_that_fails_to_commit_leaves_the_row(database: Database) -> None:
    url = str(database.url)
    sql(url, "INSERT INTO team (id, name) VALUES (1, 'a')")
    sql(url, "INSERT INTO hero (id, name, team_id) VALUES (1, 'ada', 1)")
    async with serving(application(database), database) as client:
        answer = await client.delete("/admin/team/delete?pks=1")
        assert answer.status_code == 200 and "error=" in answer.text  # where its page goes on
        assert sql(url, "SELECT id FROM team") == [(1,)]
