# Not installed where types are checked.
# mypy: ignore-errors
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

"""context-async-sqlalchemy on FastAPI, with its ASGI middleware.

Sockets, which its middleware leaves alone, use a session outside its context.
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from context_async_sqlalchemy import DBConnect, db_session, new_non_ctx_atomic_session
from context_async_sqlalchemy.asgi_utils import ASGIHTTPDBSessionMiddleware
from fastapi import FastAPI, WebSocket
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from tests.contenders.routes import add_routes
from tests.contenders.shared import POOL, URL, item


def create_engine(host: str) -> AsyncEngine:
    return create_async_engine(make_url(URL).set(host=host), pool_pre_ping=True, **POOL)


def create_session_maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(engine, class_=AsyncSession, expire_on_commit=False)


connection = DBConnect(
    host=make_url(URL).host,
    engine_creator=create_engine,
    session_maker_creator=create_session_maker,
)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    yield
    await connection.close()


app = FastAPI(lifespan=lifespan)
app.add_middleware(ASGIHTTPDBSessionMiddleware)


async def get_session() -> AsyncSession:
    return await db_session(connection)


add_routes(app, get_session)


@app.websocket("/ws")
async def talk(websocket: WebSocket) -> None:
    await websocket.accept()
    async for message in websocket.iter_text():
        async with new_non_ctx_atomic_session(connection) as session:
            session.add(item(int(message)))
        await websocket.send_text("ok")
