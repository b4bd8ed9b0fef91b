"""SQLAlchemy alone on FastAPI: a dependency with `yield`, as FastAPI's documentation has it.

Where there is a replica, routes that read have another one, with sessions on it.
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, WebSocket
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import QueuePool

from tests.contenders.routes import add_routes
from tests.contenders.shared import ENGINE, REPLICA_URLS, URL, Item, item

engine = create_async_engine(URL, **ENGINE)
SessionLocal = async_sessionmaker(engine, expire_on_commit=False)
replica = create_async_engine(REPLICA_URLS[0], **ENGINE) if REPLICA_URLS else engine
ReaderLocal = async_sessionmaker(replica, expire_on_commit=False)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    yield
    await engine.dispose()
    await replica.dispose()


app = FastAPI(lifespan=lifespan)


async def get_db() -> AsyncGenerator[AsyncSession]:
    async with SessionLocal() as session, session.begin():
        yield session


async def get_reader() -> AsyncGenerator[AsyncSession]:
    async with ReaderLocal() as session, session.begin():
        yield session


Session = Annotated[AsyncSession, Depends(get_db)]


def checked_out() -> int:
    assert isinstance(engine.pool, QueuePool)
    return engine.pool.checkedout()


add_routes(app, get_db, get_reader)


@app.post("/count", status_code=201)
async def count(session: Session) -> None:
    """Read, then write what was read and one more."""
    counter = await session.get_one(Item, 0)
    counter.value = str(int(counter.value) + 1)


@app.websocket("/ws")
async def talk(websocket: WebSocket, session: Session) -> None:
    await websocket.accept()
    async for message in websocket.iter_text():
        session.add(item(int(message)))
        await session.flush()  # the dependency commits when the socket ends
        await websocket.send_text("ok")
