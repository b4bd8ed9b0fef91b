# Not installed where types are checked.
# mypy: ignore-errors
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

"""asgi-sqlalchemy on FastAPI.

Its dependency is for HTTP alone; sockets use its session factory.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from asgi_sqlalchemy import DatabaseContext, SessionMiddleware
from asgi_sqlalchemy.fastapi import SessionDependency
from fastapi import FastAPI, HTTPException, WebSocket
from fastapi.responses import StreamingResponse

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


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[dict]:
    async with DatabaseContext(URL, engine_kwargs=POOL) as db:
        yield {"db": db}


app = FastAPI(lifespan=lifespan)
app.add_middleware(SessionMiddleware)


@app.get("/nothing")
async def nothing() -> None:
    pass


@app.get("/items/{id}")
async def read(id: int, session: SessionDependency) -> dict:
    found = await session.get(Item, id)
    if found is None:
        raise HTTPException(404)
    return {"id": found.id, "value": found.value}


@app.post("/items/{id}", status_code=201)
async def write(id: int, session: SessionDependency) -> None:
    session.add(item(id))


@app.post("/slow/{id}", status_code=201)
async def write_slowly(id: int, seconds: float, session: SessionDependency) -> None:
    await session.execute(sleep(seconds))
    session.add(item(id))


@app.post("/pair/{id}", status_code=201)
async def write_pair(id: int, seconds: float, session: SessionDependency) -> None:
    session.add(item(id))
    await session.flush()
    await asyncio.sleep(seconds)
    session.add(item(-id))


@app.get("/stream")
async def stream(chunks: int, seconds: float, session: SessionDependency) -> StreamingResponse:
    return StreamingResponse(pieces(lambda: session.scalar(FIRST_VALUE), chunks, seconds))


@app.get("/events")
async def events(chunks: int, seconds: float, session: SessionDependency) -> StreamingResponse:
    body = pieces(lambda: session.scalar(FIRST_VALUE), chunks, seconds, EVENT)
    return StreamingResponse(body, media_type="text/event-stream")


@app.get("/big")
async def big(session: SessionDependency) -> StreamingResponse:
    await session.scalar(FIRST_VALUE)
    return StreamingResponse(megabytes())


@app.websocket("/ws")
async def talk(websocket: WebSocket) -> None:
    await websocket.accept()
    async for message in websocket.iter_text():
        async with websocket.state.db.session_maker.begin() as session:
            session.add(item(int(message)))
        await websocket.send_text("ok")
