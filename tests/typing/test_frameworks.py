"""What the type checkers make of the adapters: `assert_type` for them, and run as well."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeAlias, TypedDict, assert_type

from fastapi import Depends, FastAPI
from litestar import Controller, Litestar, get, post
from litestar import Request as LitestarRequest
from litestar.di import NamedDependency
from litestar.middleware import DefineMiddleware
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.websockets import WebSocket
from uvicorn import Config

from asgi_db import Database, DBSession, DBSessionMiddleware, by_method, read_only, transactional
from asgi_db_fastapi import (
    CurrentSession,
    CurrentSessionReadOnly,
    CurrentSessionTransaction,
    get_db,
    get_db_read_only,
    get_db_transaction,
)
from asgi_db_litestar import DatabasePlugin
from asgi_db_starlette import get_session, lifespan
from tests.contract.client import call

DATABASE = "sqlite://"


class State(TypedDict):
    number: int


@asynccontextmanager
async def own_lifespan(app: Starlette) -> AsyncGenerator[State, None]:
    yield {"number": 1}


@asynccontextmanager
async def fastapi_lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
    yield


async def typed(request: Request) -> Response:
    assert_type(get_session(request), DBSession)
    assert_type(get_session(request, key="db"), DBSession)
    return PlainTextResponse("")


async def typed_socket(socket: WebSocket) -> None:
    assert_type(get_session(socket), DBSession)


async def test_starlette() -> None:
    async with Database(DATABASE) as database:
        app = Starlette(
            routes=[Route("/", transactional(typed))],
            middleware=[Middleware(DBSessionMiddleware, database=database, key="other")],
            lifespan=lifespan(database, own_lifespan),
        )
        app.add_middleware(DBSessionMiddleware, database=database, mode=by_method)
        assert (await call(app, method="GET")).status == 200
        around = DBSessionMiddleware(app, database)
        assert (await call(around, method="GET")).status == 200
        Starlette(lifespan=lifespan(database))
        Config(app)
        Config(around)


async def test_fastapi() -> None:
    async with Database(DATABASE) as database:
        app = FastAPI(lifespan=lifespan(database, fastapi_lifespan))
        app.add_middleware(DBSessionMiddleware, database=database)

        @app.get("/")
        @read_only
        async def endpoint(
            session: CurrentSession,
            writing: CurrentSessionTransaction,
            reading: CurrentSessionReadOnly,
            spelled_out: Annotated[DBSession, Depends(get_db)],
            defaulted: DBSession = Depends(get_db_transaction),  # noqa: B008, as users write it
            reading_too: DBSession = Depends(get_db_read_only),  # noqa: B008
        ) -> dict[str, bool]:
            assert_type(session, DBSession)
            assert_type(writing, DBSession)
            assert_type(reading, DBSession)
            return {"same": session is writing is reading is spelled_out is defaulted}

        assert (await call(app, method="GET")).body == b'{"same":true}'
        around = DBSessionMiddleware(app, database)
        assert (await call(around, method="GET")).status == 200


class Orders(Controller):
    path = "/orders"

    @post("/")
    @transactional(isolation="SERIALIZABLE")
    async def create(self, db_session: NamedDependency[DBSession]) -> None:
        assert_type(db_session, DBSession)


async def test_litestar() -> None:
    @get("/", opt={"db": read_only})
    async def handler(
        request: LitestarRequest[Any, Any, Any],
        db_session: NamedDependency[DBSession],
        db_session_transaction: NamedDependency[DBSession],
        db_session_read_only: NamedDependency[DBSession],
        db_engine: NamedDependency[AsyncEngine],
    ) -> bool:
        return db_session is request.state.db and db_engine is database.engine

    async with Database(DATABASE) as database:
        plugin = DatabasePlugin(database, mode=by_method, key="db")
        assert_type(plugin.database, Database)
        app = Litestar([handler, Orders], plugins=[plugin], openapi_config=None)
        assert (await call(app, method="GET")).body == b"true"
        assert (await call(app, "/orders", method="POST")).status == 201
        plain_app = Litestar(
            [],
            middleware=[DefineMiddleware(DBSessionMiddleware, database=database)],
            openapi_config=None,
        )
        DBSessionMiddleware(plain_app, database)
        Config(app)


# -- a session class of one's own --------------------------------------------------------------


class ShopSession(DBSession, AsyncSession):
    """A session with a method of one's own: for SQLModel, with its AsyncSession beside ours."""

    async def one(self) -> int:
        return int(await self.scalar(text("SELECT 1")) or 0)


CurrentShopSession: TypeAlias = Annotated[ShopSession, Depends(get_db_transaction)]


async def test_fastapi_with_a_session_class() -> None:
    options = {"class_": ShopSession}
    shop: Database[ShopSession] = Database(DATABASE, session_options=options)
    async with shop as database:
        app = FastAPI()
        app.add_middleware(DBSessionMiddleware, database=database)

        @app.get("/")
        async def endpoint(session: CurrentShopSession, request: Request) -> int:
            assert_type(session, ShopSession)
            of_state: ShopSession = request.state.db
            assert of_state is session
            await session.release()
            return await session.one()

        assert (await call(app, method="GET")).body == b"1"


async def test_litestar_with_a_session_class() -> None:
    @get("/")
    async def handler(
        request: LitestarRequest[Any, Any, Any], db_session: NamedDependency[ShopSession]
    ) -> int:
        assert_type(db_session, ShopSession)
        of_state: ShopSession = request.state.db
        return await of_state.one()

    options = {"class_": ShopSession}
    shop: Database[ShopSession] = Database(DATABASE, session_options=options)
    async with shop as database:
        app = Litestar([handler], plugins=[DatabasePlugin(database)], openapi_config=None)
        assert (await call(app, method="GET")).body == b"1"
