"""Two databases in one application: two middlewares, each with its own key, session and outcome.

There is no two-phase commit. The inner middleware commits first, and in every framework the one
installed first is the inner one; here that is `analytics`.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from litestar import Litestar, post
from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from asgi_db import (
    DBSession,
    DBSessionMiddleware,
    session_of,
    transactional,
)
from asgi_db.types import ASGIApp
from asgi_db_fastapi import CurrentSessionTransaction
from asgi_db_litestar import DatabasePlugin
from asgi_db_starlette import get_session
from tests.contract.apps import (
    InFastAPI,
    InLitestar,
    InStarlette,
    litestar_handlers,
    starlette_handlers,
)
from tests.contract.client import Exchange, call
from tests.contract.endpoints import Answer, Framework, Handlers
from tests.contract.site import Item, Site, write
from tests.versions import NamedDependency

Work = Callable[[DBSession, DBSession], Awaitable[None]]
"""What the endpoint does with the session of `db` and that of `analytics`."""

NO_HANDLERS: Handlers = {}


def starlette_app(middleware: list[dict[str, Any]], work: Work, handlers: Handlers) -> ASGIApp:
    @transactional  # in both
    async def visit(request: Request) -> Response:
        await work(get_session(request), get_session(request, key="analytics"))
        return PlainTextResponse("visited", 201)

    routes = [Route("/", visit, methods=["POST"])]
    app = Starlette(routes=routes, exception_handlers=starlette_handlers(handlers))
    for options in middleware:
        app.add_middleware(DBSessionMiddleware, **options)
    return app


async def get_analytics(connection: HTTPConnection) -> DBSession:
    return session_of(connection.scope, transactional, key="analytics")


def fastapi_app(middleware: list[dict[str, Any]], work: Work, handlers: Handlers) -> ASGIApp:
    app = FastAPI(openapi_url=None, exception_handlers=starlette_handlers(handlers))
    for options in middleware:
        app.add_middleware(DBSessionMiddleware, **options)

    @app.post("/", status_code=201)
    async def visit(
        session: CurrentSessionTransaction, analytics: Annotated[DBSession, Depends(get_analytics)]
    ) -> str:
        await work(session, analytics)
        return "visited"

    return app


def litestar_app(middleware: list[dict[str, Any]], work: Work, handlers: Handlers) -> ASGIApp:
    @post("/")
    async def visit(
        db_session_transaction: NamedDependency[DBSession],
        analytics_session_transaction: NamedDependency[DBSession],
    ) -> str:
        await work(db_session_transaction, analytics_session_transaction)
        return "visited"

    return Litestar(
        [visit],
        plugins=[DatabasePlugin(**options) for options in middleware],
        exception_handlers=litestar_handlers(handlers),
        openapi_config=None,
        logging_config=None,
    )


MakeApp = Callable[[list[dict[str, Any]], Work, Handlers], ASGIApp]
APPS: list[tuple[Framework, MakeApp]] = [
    (InStarlette(), starlette_app),
    (InFastAPI(), fastapi_app),
    (InLitestar(), litestar_app),
]


@dataclass(frozen=True)
class Pair:
    """One framework on two databases."""

    make_app: MakeApp
    db: Site
    analytics: Site

    async def answer(self, work: Work, handlers: Handlers = NO_HANDLERS) -> Exchange:
        """Serve one request, after which neither database is held."""
        middleware: list[dict[str, Any]] = [
            {"database": self.analytics.database, "key": "analytics"},
            {"database": self.db.database},
        ]
        exchange = await call(self.make_app(middleware, work, handlers))
        await self.db.assert_nothing_held()
        await self.analytics.assert_nothing_held()
        return exchange

    async def items(self) -> tuple[list[str], list[str]]:
        """What others see in `db` and in `analytics`."""
        return await self.db.items(), await self.analytics.items()


def second_url(folder: Path) -> str:
    return f"sqlite+aiosqlite:///{folder}/analytics.db"


@pytest.fixture(params=APPS, ids=lambda app: app[0].name)
async def pair(
    request: pytest.FixtureRequest, database_url: str, tmp_path: Path
) -> AsyncIterator[Pair]:
    """Each framework on each database, with a file of SQLite as the second one."""
    framework, make_app = request.param
    async with (
        Site.on(framework, database_url) as db,
        Site.on(framework, second_url(tmp_path)) as analytics,
    ):
        yield Pair(make_app, db, analytics)


async def write_in_both(db: DBSession, analytics: DBSession) -> None:
    await write(name="order")(db)
    await write(name="visit")(analytics)


async def test_each_key_has_a_session_on_its_own_database(pair: Pair) -> None:
    async def work(db: DBSession, analytics: DBSession) -> None:
        assert db is not analytics
        await write_in_both(db, analytics)
        await db.flush()
        await analytics.flush()
        assert (pair.db.checked_out, pair.analytics.checked_out) == (1, 1)

    exchange = await pair.answer(work)
    assert (exchange.status, exchange.error) == (201, None)
    assert await pair.items() == (["order"], ["visit"])


async def test_a_database_that_is_not_used_is_not_connected_to(pair: Pair) -> None:
    async def work(db: DBSession, analytics: DBSession) -> None:
        await write(name="order")(db)

    assert (await pair.answer(work)).status == 201
    assert (pair.db.opened, pair.analytics.opened) == (1, 0)


async def test_an_error_rolls_back_both(pair: Pair) -> None:
    async def work(db: DBSession, analytics: DBSession) -> None:
        await write_in_both(db, analytics)
        await db.flush()
        await analytics.flush()
        raise KeyError

    assert (await pair.answer(work)).status == 500
    assert await pair.items() == ([], [])


handled = pytest.mark.parametrize(
    ("handlers", "status"),
    [(NO_HANDLERS, 500), ({DBAPIError: Answer(409)}, 409)],
    ids=["no handler", "handler"],
)


@handled
async def test_the_outer_database_is_rolled_back_when_the_inner_commit_fails(
    pair: Pair, handlers: Handlers, status: int
) -> None:
    async def work(db: DBSession, analytics: DBSession) -> None:
        await write_in_both(db, analytics)
        await db.flush()
        await pair.analytics.spoil_commit(analytics)

    exchange = await pair.answer(work, handlers)
    expected = status if handlers else pair.analytics.unhandled
    assert (exchange.status, exchange.complete) == (expected, True)
    assert b"visited" not in exchange.body
    assert await pair.items() == ([], [])


@handled
async def test_what_the_inner_database_has_committed_stands_when_the_outer_commit_fails(
    pair: Pair, handlers: Handlers, status: int
) -> None:
    async def work(db: DBSession, analytics: DBSession) -> None:
        await write_in_both(db, analytics)
        await pair.db.spoil_commit(db)

    exchange = await pair.answer(work, handlers)
    expected = status if handlers else pair.db.unhandled
    assert (exchange.status, exchange.complete) == (expected, True)
    assert b"visited" not in exchange.body
    assert await pair.items() == ([], ["visit"])


async def test_each_middleware_has_a_mode_of_its_own(sqlite_url: str, tmp_path: Path) -> None:
    async def visit(request: Request) -> Response:
        await write_in_both(get_session(request), get_session(request, key="analytics"))
        return PlainTextResponse("visited", 201)

    async with (
        Site.on(InStarlette(), sqlite_url) as db,
        Site.on(InStarlette(), second_url(tmp_path)) as analytics,
    ):
        app = Starlette(routes=[Route("/", visit, methods=["POST"])])
        app.add_middleware(DBSessionMiddleware, database=analytics.database, key="analytics")
        app.add_middleware(DBSessionMiddleware, database=db.database, mode=transactional)
        assert (await db.call(app)).status == 201
        await analytics.assert_nothing_held()
        assert await db.items() == ["order"]
        assert await analytics.items() == []  # plain: the handler has not committed


async def test_the_same_middleware_twice_acts_once(pair: Pair) -> None:
    """One session, one BEGIN and one COMMIT."""
    log: list[str] = []
    engine = pair.db.database.engine.sync_engine

    @event.listens_for(engine, "begin")
    def begin(_: Connection) -> None:
        log.append("begin")

    @event.listens_for(engine, "commit")
    def commit(_: Connection) -> None:
        log.append("commit")

    sessions: list[DBSession] = []

    async def work(db: DBSession, analytics: DBSession) -> None:
        sessions.append(db)
        db.add(Item(name="order"))

    once = {"database": pair.db.database}
    other = {"database": pair.analytics.database, "key": "analytics"}
    app = pair.make_app([once, other, once], work, NO_HANDLERS)

    async def look(scope: Any, receive: Any, send: Any) -> None:
        sessions.append(scope["state"]["db"])  # the outermost one's
        await app(scope, receive, send)

    exchange = await pair.db.call(DBSessionMiddleware(look, pair.db.database))
    assert (exchange.status, exchange.error) == (201, None)
    assert sessions[0] is sessions[1]
    assert log == ["begin", "commit"]
    assert await pair.items() == (["order"], [])
