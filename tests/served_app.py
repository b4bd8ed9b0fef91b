"""The application which `test_uvicorn.py` serves; its database is `DATABASE_URL`."""

import os
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.pool import QueuePool

from asgi_db import Database, DBSessionMiddleware
from asgi_db_fastapi import CurrentSession, CurrentSessionReadOnly, CurrentSessionTransaction
from tests.tables import Author, Child

CHUNK = b"x" * 65_536
CHUNKS = 80  # 5 MB: more than all buffers between the application and a client that reads nothing

database = Database(
    engine_options={"pool_size": 5, "max_overflow": 0, "pool_timeout": 5},
    wait_for=float(os.environ.get("WAIT_FOR", "0")),
)
app = FastAPI()
app.add_middleware(DBSessionMiddleware, database=database)

streams = {"begun": 0, "ended": 0}


@app.exception_handler(IntegrityError)
async def answer_conflict(_: Request, error: IntegrityError) -> JSONResponse:
    return JSONResponse({"conflict": True}, 409)


@app.get("/state")
async def state() -> dict[str, int]:
    """How things stand; uses no database."""
    pool = database.engine.pool
    assert isinstance(pool, QueuePool)
    return {**streams, "checked_out": pool.checkedout()}


@app.post("/authors/{id}", status_code=201)
async def create_author(id: int, session: CurrentSessionTransaction) -> None:
    session.add(Author(id=id, name=f"author {id}"))


@app.get("/authors/{id}")
async def read_author(id: int, session: CurrentSessionReadOnly) -> str:
    author = await session.get(Author, id)
    if author is None:
        raise HTTPException(404)
    return author.name


@app.post("/children", status_code=201)
async def create_child(session: CurrentSessionTransaction) -> dict[str, Any]:
    """Its parent does not exist, which PostgreSQL finds out at COMMIT."""
    session.add(child := Child(parent_id=404))
    await session.flush()
    return {"id": child.id}


@app.get("/download")
async def download(session: CurrentSession) -> StreamingResponse:
    """Read in a transaction, then send 5 MB."""
    await session.execute(select(Author))
    await session.execute(text("SELECT 1"))

    async def chunks() -> AsyncIterator[bytes]:
        streams["begun"] += 1
        try:
            for _ in range(CHUNKS):
                yield CHUNK
        finally:
            streams["ended"] += 1

    return StreamingResponse(chunks())
