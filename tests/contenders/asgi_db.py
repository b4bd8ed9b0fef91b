"""asgi-db on FastAPI."""

import asyncio
import os
from typing import Any

from fastapi import FastAPI, HTTPException, WebSocket
from fastapi.responses import StreamingResponse
from sqlalchemy.pool import QueuePool

from asgi_db import Database, DBSessionMiddleware, read_only, transactional
from asgi_db_fastapi import CurrentSession, CurrentSessionReadOnly, CurrentSessionTransaction
from tests.contenders.shared import (
    EVENT,
    FIRST_VALUE,
    IS_POOLED,
    POOL,
    REPLICA_URLS,
    URL,
    Item,
    item,
    long,
    megabytes,
    pieces,
    sleep,
)

TIMEOUT = float(os.environ.get("TIMEOUT", "5")) or None
"""Seconds that a unit may take; with 0 there is no limit, as with the other libraries."""

database = Database(
    URL,
    replicas=REPLICA_URLS,
    engine_options=POOL,
    pooler="transaction" if IS_POOLED else None,
)
app = FastAPI()
app.add_middleware(DBSessionMiddleware, database=database)


def checked_out() -> int:
    pool = database.engine.pool
    assert isinstance(pool, QueuePool)
    return pool.checkedout()


@app.get("/nothing")
async def nothing() -> None:
    pass


@app.get("/items/{id}")
@read_only(timeout=TIMEOUT)
async def read(id: int, session: CurrentSession) -> dict[str, Any]:
    found = await session.get(Item, id)
    if found is None:
        raise HTTPException(404)
    return {"id": found.id, "value": found.value}


@app.post("/items/{id}", status_code=201)
@transactional(timeout=TIMEOUT)
async def write(id: int, session: CurrentSession) -> None:
    session.add(item(id))


@app.post("/slow/{id}", status_code=201)
async def write_slowly(id: int, seconds: float, session: CurrentSessionTransaction) -> None:
    await session.execute(sleep(seconds))
    session.add(item(id))


@app.post("/pair/{id}", status_code=201)
@transactional(timeout=TIMEOUT)
async def write_pair(id: int, seconds: float, session: CurrentSession) -> None:
    session.add(item(id))
    await session.flush()
    await asyncio.sleep(seconds)
    session.add(item(-id))


@app.post("/count", status_code=201)
async def count(session: CurrentSessionTransaction) -> None:
    """Read, then write what was read and one more."""
    counter = await session.get_one(Item, 0)
    counter.value = str(int(counter.value) + 1)


@app.get("/long")
async def wait(seconds: int, session: CurrentSessionReadOnly) -> StreamingResponse:
    return StreamingResponse(pieces(lambda: session.scalar(long(seconds)), 1, 0))


@app.get("/stream")
async def stream(chunks: int, seconds: float, session: CurrentSessionReadOnly) -> StreamingResponse:
    return StreamingResponse(pieces(lambda: session.scalar(FIRST_VALUE), chunks, seconds))


@app.get("/events")
async def events(chunks: int, seconds: float, session: CurrentSessionReadOnly) -> StreamingResponse:
    body = pieces(lambda: session.scalar(FIRST_VALUE), chunks, seconds, EVENT)
    return StreamingResponse(body, media_type="text/event-stream")


@app.get("/big")
async def big(session: CurrentSessionReadOnly) -> StreamingResponse:
    await session.scalar(FIRST_VALUE)
    return StreamingResponse(megabytes())


@app.websocket("/ws")
async def talk(websocket: WebSocket, session: CurrentSessionTransaction) -> None:
    await websocket.accept()
    async for message in websocket.iter_text():
        session.add(item(int(message)))
        await websocket.send_text("ok")
