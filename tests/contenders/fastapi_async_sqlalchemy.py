# Not installed where types are checked.
# mypy: ignore-errors
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

"""fastapi-async-sqlalchemy.

Its session is of the request's context; a stream opens one of its own, as code outside requests
does.
"""

from fastapi import FastAPI, WebSocket
from fastapi.responses import StreamingResponse
from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, db
from sqlalchemy.ext.asyncio import AsyncSession

from tests.contenders.routes import add_routes
from tests.contenders.shared import EVENT, FIRST_VALUE, POOL, URL, item, pieces

app = FastAPI()
app.add_middleware(
    SQLAlchemyMiddleware,
    db_url=URL,
    engine_args={**POOL, "pool_pre_ping": True},
    commit_on_exit=True,
)


async def get_session() -> AsyncSession:
    return db.session


async def read_first() -> str | None:
    async with db():
        return await db.session.scalar(FIRST_VALUE)


@app.get("/stream")
async def stream(chunks: int, seconds: float) -> StreamingResponse:
    return StreamingResponse(pieces(read_first, chunks, seconds))


@app.get("/events")
async def events(chunks: int, seconds: float) -> StreamingResponse:
    body = pieces(read_first, chunks, seconds, EVENT)
    return StreamingResponse(body, media_type="text/event-stream")


add_routes(app, get_session)


@app.websocket("/ws")
async def talk(websocket: WebSocket) -> None:
    await websocket.accept()
    async for message in websocket.iter_text():
        async with db(commit_on_exit=True):
            db.session.add(item(int(message)))
        await websocket.send_text("ok")
