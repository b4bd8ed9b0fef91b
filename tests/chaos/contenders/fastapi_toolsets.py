# Not installed where types are checked.
# mypy: ignore-errors
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

"""fastapi-toolsets, which is for PostgreSQL alone.

Sockets use its context manager for sessions outside of requests.
"""

import asyncio
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, WebSocket
from fastapi.responses import StreamingResponse
from fastapi_toolsets.db import Database
from fastapi_toolsets.exceptions import init_exceptions_handlers
from sqlalchemy.ext.asyncio import AsyncSession

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

db = Database(URL, **POOL)
app = FastAPI()
init_exceptions_handlers(app)
db.install(app)
Session = Annotated[AsyncSession, Depends(db)]


def checked_out() -> int:
    return db.engine.pool.checkedout()


@app.get("/nothing")
async def nothing() -> None:
    pass


@app.get("/items/{id}")
async def read(id: int, session: Session) -> dict:
    found = await session.get(Item, id)
    if found is None:
        raise HTTPException(404)
    return {"id": found.id, "value": found.value}


@app.post("/items/{id}", status_code=201)
async def write(id: int, session: Session) -> None:
    session.add(item(id))


@app.post("/slow/{id}", status_code=201)
async def write_slowly(id: int, seconds: float, session: Session) -> None:
    await session.execute(sleep(seconds))
    session.add(item(id))


@app.post("/pair/{id}", status_code=201)
async def write_pair(id: int, seconds: float, session: Session) -> None:
    session.add(item(id))
    await session.flush()
    await asyncio.sleep(seconds)
    session.add(item(-id))


@app.get("/stream")
async def stream(chunks: int, seconds: float, session: Session) -> StreamingResponse:
    return StreamingResponse(pieces(lambda: session.scalar(FIRST_VALUE), chunks, seconds))


@app.get("/events")
async def events(chunks: int, seconds: float, session: Session) -> StreamingResponse:
    body = pieces(lambda: session.scalar(FIRST_VALUE), chunks, seconds, EVENT)
    return StreamingResponse(body, media_type="text/event-stream")


@app.get("/big")
async def big(session: Session) -> StreamingResponse:
    await session.scalar(FIRST_VALUE)
    return StreamingResponse(megabytes())


@app.websocket("/ws")
async def talk(websocket: WebSocket) -> None:
    await websocket.accept()
    async for message in websocket.iter_text():
        async with db.begin() as session:
            session.add(item(int(message)))
        await websocket.send_text("ok")
