# Not installed where types are checked.
# mypy: ignore-errors
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

"""context-async-sqlalchemy on FastAPI, with its ASGI middleware.

Sockets, which its middleware leaves alone, use a session outside its context.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from context_async_sqlalchemy import DBConnect, db_session, new_non_ctx_atomic_session
from context_async_sqlalchemy.asgi_utils import ASGIHTTPDBSessionMiddleware
from fastapi import FastAPI, HTTPException, WebSocket
from fastapi.responses import StreamingResponse
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from tests.chaos.contenders.shared import (
    EVENT,
    FIRST_VALUE,
    POOL,
    URL,
    Item,
    item,
    megabytes,
    pieces,
    sleep,
)


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


@app.get("/nothing")
async def nothing() -> None:
    pass


@app.get("/items/{id}")
async def read(id: int) -> dict:
    session = await db_session(connection)
    found = await session.get(Item, id)
    if found is None:
        raise HTTPException(404)
    return {"id": found.id, "value": found.value}


@app.post("/items/{id}", status_code=201)
async def write(id: int) -> None:
    session = await db_session(connection)
    session.add(item(id))


@app.post("/slow/{id}", status_code=201)
async def write_slowly(id: int, seconds: float) -> None:
    session = await db_session(connection)
    await session.execute(sleep(seconds))
    session.add(item(id))


@app.post("/pair/{id}", status_code=201)
async def write_pair(id: int, seconds: float) -> None:
    session = await db_session(connection)
    session.add(item(id))
    await session.flush()
    await asyncio.sleep(seconds)
    session.add(item(-id))


@app.get("/stream")
async def stream(chunks: int, seconds: float) -> StreamingResponse:
    session = await db_session(connection)
    return StreamingResponse(pieces(lambda: session.scalar(FIRST_VALUE), chunks, seconds))


@app.get("/events")
async def events(chunks: int, seconds: float) -> StreamingResponse:
    session = await db_session(connection)
    body = pieces(lambda: session.scalar(FIRST_VALUE), chunks, seconds, EVENT)
    return StreamingResponse(body, media_type="text/event-stream")


@app.get("/big")
async def big() -> StreamingResponse:
    session = await db_session(connection)
    await session.scalar(FIRST_VALUE)
    return StreamingResponse(megabytes())


@app.websocket("/ws")
async def talk(websocket: WebSocket) -> None:
    await websocket.accept()
    async for message in websocket.iter_text():
        async with new_non_ctx_atomic_session(connection) as session:
            session.add(item(int(message)))
        await websocket.send_text("ok")
