"""SQLAlchemy alone on FastAPI: a dependency with `yield`, as FastAPI's documentation has it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, WebSocket
from fastapi.responses import StreamingResponse
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import QueuePool

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

engine = create_async_engine(URL, **POOL)
SessionLocal = async_sessionmaker(engine, expire_on_commit=False)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


async def get_db() -> AsyncGenerator[AsyncSession]:
    async with SessionLocal() as session, session.begin():
        yield session


Session = Annotated[AsyncSession, Depends(get_db)]


def checked_out() -> int:
    assert isinstance(engine.pool, QueuePool)
    return engine.pool.checkedout()


@app.get("/nothing")
async def nothing() -> None:
    pass


@app.get("/items/{id}")
async def read(id: int, session: Session) -> dict[str, Any]:
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


@app.post("/count", status_code=201)
async def count(session: Session) -> None:
    """Read, then write what was read and one more."""
    counter = await session.get_one(Item, 0)
    counter.value = str(int(counter.value) + 1)


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
async def talk(websocket: WebSocket, session: Session) -> None:
    await websocket.accept()
    async for message in websocket.iter_text():
        session.add(item(int(message)))
        await session.flush()  # the dependency commits when the socket ends
        await websocket.send_text("ok")
