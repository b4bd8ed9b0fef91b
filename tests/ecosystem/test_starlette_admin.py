"""The admin panel on `database.sessionmaker`: rows are made, changed, listed and deleted, and a
refused COMMIT is a 500.
"""

from starlette.applications import Starlette
from starlette_admin.contrib.sqla import Admin, ModelView

from asgi_db import Database, DBSessionMiddleware
from tests.ecosystem.heroes import NO_SUCH_TEAM, Hero, heroes, serving


class HeroView(ModelView):
    fields = ["id", "name", "team_id"]


def application(database: Database) -> Starlette:
    app = Starlette()
    app.add_middleware(DBSessionMiddleware, database=database)
    admin = Admin(database.sessionmaker)
    admin.add_view(HeroView(Hero, identity="hero"))
    admin.mount_to(app)
    return app


async def test_rows_are_made_listed_changed_and_deleted(database: Database) -> None:
    url = str(database.url)
    async with serving(application(database), database) as client:
        answer = await client.post("/admin/hero/create", data={"name": "ada"})
        assert answer.status_code == 303, answer.text
        assert heroes(url) == ["ada"]
        assert (await client.get("/admin/hero/list")).status_code == 200
        rows = (await client.get("/admin/api/hero")).json()
        assert [row["name"] for row in rows["items"]] == ["ada"]
        assert "ada" in (await client.get("/admin/hero/detail/1")).text
        answer = await client.post("/admin/hero/edit/1", data={"name": "eve"})
        assert answer.status_code == 303, answer.text
        assert heroes(url) == ["eve"]
        answer = await client.post("/admin/api/hero/action?name=delete&pks=1")
        assert answer.status_code == 200, answer.text
        assert heroes(url) == []


async def test_a_refused_commit_is_a_500(database: Database) -> None:
    async with serving(application(database), database) as client:
        form = {"name": "ada", "team_id": str(NO_SUCH_TEAM)}
        answer = await client.post("/admin/hero/create", data=form)
        assert answer.status_code == 500
        assert heroes(str(database.url)) == []
