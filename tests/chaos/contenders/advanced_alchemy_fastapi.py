# Not installed where types are checked.
# mypy: ignore-errors
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

"""advanced-alchemy on FastAPI, with `commit_mode="autocommit"`.

Its dependency is for HTTP alone; sockets use its session factory.
"""

import asyncio
from typing import Annotated

from advanced_alchemy.extensions.fastapi import (
    AdvancedAlchemy,
    AsyncSessionConfig,
    EngineConfig,
    SQLAlchemyAsyncConfig,
)
from fastapi import Depends, FastAPI, HTTPException, WebSocket
from fastapi.responses import StreamingResponse
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

config = SQLAlchemyAsyncConfig(
    connection_string=URL,
    session_config=AsyncSessionConfig(expire_on_commit=False),
    engine_config=EngineConfig(**POOL),
    commit_mode="autocommit",
)
app = FastAPI()
alchemy = AdvancedAlchemy(config=config, app=app)
Session = Annotated[AsyncSession, Depends(alchemy.provide_session())]


def checked_out() -> int:
    return config.get_engine().pool.checkedout()


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
        async with alchemy.with_async_session() as session:
            session.add(item(int(message)))
            await session.commit()
        await websocket.send_text("ok")
