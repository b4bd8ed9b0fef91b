"""`@inject` above or below the decorator of a mode, with the session of the request or one of
the container's own.
"""

from collections.abc import Callable
from typing import Any

import pytest
from dishka import Provider, Scope, from_context, make_async_container, provide
from dishka.integrations.fastapi import FastapiProvider, FromDishka, inject, setup_dishka
from dishka.integrations.litestar import FromDishka as FromDishkaInLitestar
from dishka.integrations.litestar import LitestarProvider
from dishka.integrations.litestar import inject as inject_in_litestar
from dishka.integrations.litestar import setup_dishka as setup_in_litestar
from fastapi import FastAPI, Request
from litestar import Litestar, post
from litestar import Request as LitestarRequest
from litestar.params import FromQuery
from sqlalchemy import func, select

from asgi_db import Database, DBSession, DBSessionMiddleware, transactional
from asgi_db_litestar import DatabasePlugin
from tests.ecosystem.heroes import NO_SUCH_TEAM, Hero, heroes, serving


class Heroes:
    """A repository, to which dishka gives the session of the request."""

    def __init__(self, session: DBSession) -> None:
        self._session = session

    async def hire(self, name: str, team: int | None) -> int:
        hero = Hero(name=name, team_id=team)
        self._session.add(hero)
        await self._session.flush()
        return hero.id


class Log:
    """Counts in a session of its own, which the container opens and ends."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def count(self) -> int:
        async with self._database.session() as session:
            return (await session.scalar(select(func.count(Hero.id)))) or 0


class InFastAPI(Provider):
    scope = Scope.REQUEST

    @provide
    def session(self, request: Request) -> DBSession:
        session: DBSession = request.state.db
        return session

    heroes = provide(Heroes)


class InLitestar(Provider):
    scope = Scope.REQUEST

    @provide
    def session(self, request: LitestarRequest) -> DBSession:
        session: DBSession = request.state.db
        return session

    heroes = provide(Heroes)


class ForTheApplication(Provider):
    scope = Scope.APP
    database = from_context(Database)
    log = provide(Log)


Decorator = Callable[[Any], Any]
BOTH_ORDERS = pytest.mark.parametrize("mode_is_above", [True, False], ids=["above", "below"])


def decorated(handler: Any, injects: Decorator, mode_is_above: bool) -> Any:
    above, below = (transactional, injects) if mode_is_above else (injects, transactional)
    return above(below(handler))


def fastapi_application(database: Database, mode_is_above: bool) -> FastAPI:
    async def create(
        name: str, heroes: FromDishka[Heroes], log: FromDishka[Log], team: int | None = None
    ) -> int:
        await heroes.hire(name, team)
        return await log.count()

    app = FastAPI()
    app.post("/heroes", status_code=201)(decorated(create, inject, mode_is_above))
    container = make_async_container(
        InFastAPI(), ForTheApplication(), FastapiProvider(), context={Database: database}
    )
    setup_dishka(container, app)
    app.add_middleware(DBSessionMiddleware, database=database)
    return app


def litestar_application(database: Database, mode_is_above: bool) -> Litestar:
    async def create(
        name: FromQuery[str],
        heroes: FromDishkaInLitestar[Heroes],
        log: FromDishkaInLitestar[Log],
        team: FromQuery[int | None] = None,
    ) -> int:
        await heroes.hire(name, team)
        return await log.count()

    handler = post("/heroes")(decorated(create, inject_in_litestar, mode_is_above))
    app = Litestar([handler], plugins=[DatabasePlugin(database)], openapi_config=None)
    container = make_async_container(
        InLitestar(), ForTheApplication(), LitestarProvider(), context={Database: database}
    )
    setup_in_litestar(container, app)
    return app


@BOTH_ORDERS
@pytest.mark.parametrize(
    "make", [fastapi_application, litestar_application], ids=["fastapi", "litestar"]
)
async def test_the_session_of_the_request_is_injected(
    make: Callable[[Database, bool], Any], mode_is_above: bool, database: Database
) -> None:
    async with serving(make(database, mode_is_above), database) as client:
        answer = await client.post("/heroes?name=ada")
        assert (answer.status_code, answer.json()) == (201, 0), answer.text
        assert heroes(str(database.url)) == ["ada"]
        answer = await client.post(f"/heroes?name=eve&team={NO_SUCH_TEAM}")
        assert answer.status_code == 500
        assert heroes(str(database.url)) == ["ada"]
