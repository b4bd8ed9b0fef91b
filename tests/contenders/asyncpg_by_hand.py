"""asyncpg by hand on FastAPI, without SQLAlchemy: the limit of what a library could reach.

Each statement stands alone, and a connection goes back into the pool as it is: one round trip.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse

from tests.contenders.shared import POOL, URL, megabytes

pool: asyncpg.Pool[asyncpg.Record]
"""Made by the application's lifespan, on its loop."""


async def leave_as_it_is(connection: object) -> None:
    """The pool would reset it otherwise, which is a round trip."""


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    global pool
    url = URL.replace("+asyncpg", "")
    async with asyncpg.create_pool(
        url, min_size=0, max_size=POOL["pool_size"], reset=leave_as_it_is
    ) as pool:
        yield


app = FastAPI(lifespan=lifespan)


def checked_out() -> int:
    return pool.get_size() - pool.get_idle_size()


@app.get("/nothing")
async def nothing() -> None:
    pass


@app.get("/items/{id}")
async def read(id: int) -> dict[str, Any]:
    found = await pool.fetchrow("SELECT id, value FROM items WHERE id = $1", id)
    if found is None:
        raise HTTPException(404)
    return {"id": found["id"], "value": found["value"]}


@app.post("/items/{id}", status_code=201)
async def write(id: int) -> None:
    await pool.execute("INSERT INTO items (id, value) VALUES ($1, $2)", id, f"value-{id}")


@app.get("/big")
async def big() -> StreamingResponse:
    await pool.fetchval("SELECT value FROM items WHERE id = 1")
    return StreamingResponse(megabytes())
