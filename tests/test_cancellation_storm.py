"""A storm of cancelled requests, in each way, on the real servers: nothing may be left of it.

`make chaos` does the same with a thousand; here are a few, of the same kinds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse
from sqlalchemy import insert, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import QueuePool

from asgi_db import Database, DBSession, DBSessionMiddleware, plain, read_only, transactional
from asgi_db_fastapi import CurrentSession
from tests.chaos.cancellation import WAYS, Contender, Settings, run

POOL_SIZE = 5


class Base(DeclarativeBase):
    """The table of the storm, which its runner makes."""


class Item(Base):
    __tablename__ = "items"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[str]


SLEEP = {"postgresql": "SELECT pg_sleep(:seconds)", "mysql": "SELECT SLEEP(:seconds)"}


def write(id: int) -> Any:
    return insert(Item).values(id=id, value=f"value-{id}")


def make(url: str) -> Contender:
    """An application which ends its work in each of the possible ways."""
    pool = {"pool_size": POOL_SIZE, "max_overflow": 0, "pool_timeout": 10}
    database = Database(url, engine_options=pool)
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=database)

    @app.get("/nothing")
    async def nothing() -> dict[str, int]:
        return {}

    @app.get("/items/{id}")
    @read_only
    async def read_item(id: int, db: CurrentSession) -> dict[str, Any]:
        item = await db.get(Item, id)
        if item is None:
            raise HTTPException(404)
        return {"id": item.id, "value": item.value}

    @app.post("/items/{id}", status_code=201)
    @transactional
    async def write_item(id: int, db: CurrentSession) -> None:
        await db.execute(write(id))

    @app.post("/slow/{id}", status_code=201)
    @plain
    async def write_slowly(id: int, seconds: float, db: CurrentSession) -> None:
        async with db.begin():
            sleep = SLEEP[database.url.get_backend_name()]
            await db.execute(text(sleep), {"seconds": seconds})
            await db.execute(write(id))

    @app.post("/pair/{id}", status_code=201)
    @plain
    async def write_pair(id: int, seconds: float, db: CurrentSession) -> None:
        db.add(Item(id=id, value=f"value-{id}"))
        await db.flush()
        await asyncio.sleep(seconds)
        db.add(Item(id=-id, value=f"value-{-id}"))
        await db.commit()

    async def values(db: DBSession, chunks: int, seconds: float) -> AsyncIterator[str]:
        for _ in range(chunks):
            yield (await db.scalars(select(Item.value).where(Item.id == 1))).one()
            await asyncio.sleep(seconds)

    @app.get("/stream")
    async def stream(chunks: int, seconds: float, db: CurrentSession) -> StreamingResponse:
        return StreamingResponse(value + "\n" async for value in values(db, chunks, seconds))

    @app.get("/events", response_class=EventSourceResponse)
    @read_only
    async def events(chunks: int, seconds: float, db: CurrentSession) -> AsyncIterator[str]:
        async for value in values(db, chunks, seconds):
            yield value

    def checked_out() -> int:
        pool = database.engine.pool
        assert isinstance(pool, QueuePool)
        return pool.checkedout()

    return Contender(app, checked_out, POOL_SIZE)


@pytest.mark.sweep
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("server", ["postgresql", "mysql"])
def test_nothing_is_left_of_cancelled_requests(
    request: pytest.FixtureRequest, server: str, way: str
) -> None:
    url: str = request.getfixturevalue(f"{server}_url")
    # `make chaos` gives it a second; a machine that is busy with other tests may take longer.
    result = run(make, url, way, Settings(requests=50, seed=20, within=8))
    assert result.violations == [], result
    assert result.cancelled >= 10
    assert not result.skipped
