"""The routes of the contenders on FastAPI, for whatever gives them their session."""

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from sqlalchemy.ext.asyncio import AsyncSession

from tests.contenders.shared import (
    EVENT,
    FIRST_VALUE,
    Item,
    item,
    long,
    megabytes,
    pieces,
    sleep,
)


def add_routes(
    app: FastAPI,
    get_session: Callable[..., Any],
    get_reader: Callable[..., Any] | None = None,
) -> None:
    """Add all but the WebSocket, which no two of them do alike.

    Args:
        app: it may have routes of its own, which then come first.
        get_session: the dependency of the library.
        get_reader: that of routes that only read, where there is another one for them.
    """
    given: AsyncSession = Depends(get_session)
    reader: AsyncSession = Depends(get_reader or get_session)

    @app.get("/nothing")
    async def nothing() -> None:
        pass

    @app.get("/items/{id}")
    async def read(id: int, session: AsyncSession = reader) -> dict[str, Any]:
        found = await session.get(Item, id)
        if found is None:
            raise HTTPException(404)
        return {"id": found.id, "value": found.value}

    @app.post("/items/{id}", status_code=201)
    async def write(id: int, session: AsyncSession = given) -> None:
        session.add(item(id))

    @app.post("/slow/{id}", status_code=201)
    async def write_slowly(id: int, seconds: float, session: AsyncSession = given) -> None:
        await session.execute(sleep(seconds))
        session.add(item(id))

    @app.post("/pair/{id}", status_code=201)
    async def write_pair(id: int, seconds: float, session: AsyncSession = given) -> None:
        session.add(item(id))
        await session.flush()
        await asyncio.sleep(seconds)
        session.add(item(-id))

    @app.get("/long")
    async def wait(seconds: int, session: AsyncSession = given) -> StreamingResponse:
        return StreamingResponse(pieces(lambda: session.scalar(long(seconds)), 1, 0))

    @app.get("/stream")
    async def stream(
        chunks: int, seconds: float, session: AsyncSession = given
    ) -> StreamingResponse:
        return StreamingResponse(pieces(lambda: session.scalar(FIRST_VALUE), chunks, seconds))

    @app.get("/events")
    async def events(
        chunks: int, seconds: float, session: AsyncSession = given
    ) -> StreamingResponse:
        body = pieces(lambda: session.scalar(FIRST_VALUE), chunks, seconds, EVENT)
        return StreamingResponse(body, media_type="text/event-stream")

    @app.get("/big")
    async def big(session: AsyncSession = given) -> StreamingResponse:
        await session.scalar(FIRST_VALUE)
        return StreamingResponse(megabytes())
