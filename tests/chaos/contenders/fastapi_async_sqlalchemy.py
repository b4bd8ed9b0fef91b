# Not installed where types are checked.
# mypy: ignore-errors
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

"""fastapi-async-sqlalchemy.

Its session is of the request's context; a stream opens one of its own, as code outside requests
does.
"""

import asyncio

from fastapi import FastAPI, HTTPException, WebSocket
from fastapi.responses import StreamingResponse
from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, db

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

app = FastAPI()
app.add_middleware(
    SQLAlchemyMiddleware,
    db_url=URL,
    engine_args={**POOL, "pool_pre_ping": True},
    commit_on_exit=True,
)


@app.get("/nothing")
async def nothing() -> None:
    pass


@app.get("/items/{id}")
async def read(id: int) -> dict:
    session = db.session
    found = await session.get(Item, id)
    if found is None:
        raise HTTPException(404)
    return {"id": found.id, "value": found.value}


@app.post("/items/{id}", status_code=201)
async def write(id: int) -> None:
    session = db.session
    session.add(item(id))


@app.post("/slow/{id}", status_code=201)
async def write_slowly(id: int, seconds: float) -> None:
    session = db.session
    await session.execute(sleep(seconds))
    session.add(item(id))


@app.post("/pair/{id}", status_code=201)
async def write_pair(id: int, seconds: float) -> None:
    session = db.session
    session.add(item(id))
    await session.flush()
    await asyncio.sleep(seconds)
    session.add(item(-id))


async def read_first() -> str | None:
    async with db():
        return await db.session.scalar(FIRST_VALUE)


@app.get("/stream")
async def stream(chunks: int, seconds: float) -> StreamingResponse:
    return StreamingResponse(pieces(read_first, chunks, seconds))


@app.get("/events")
async def events(chunks: int, seconds: float) -> StreamingResponse:
    body = pieces(read_first, chunks, seconds, EVENT)
    return StreamingResponse(body, media_type="text/event-stream")


@app.get("/big")
async def big() -> StreamingResponse:
    session = db.session
    await session.scalar(FIRST_VALUE)
    return StreamingResponse(megabytes())


@app.websocket("/ws")
async def talk(websocket: WebSocket) -> None:
    await websocket.accept()
    async for message in websocket.iter_text():
        async with db(commit_on_exit=True):
            db.session.add(item(int(message)))
        await websocket.send_text("ok")
