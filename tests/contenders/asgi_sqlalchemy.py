# Not installed where types are checked.
# mypy: ignore-errors
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

"""asgi-sqlalchemy on FastAPI.

Its dependency is for HTTP alone; sockets use its session factory.
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from asgi_sqlalchemy import DatabaseContext, SessionMiddleware
from asgi_sqlalchemy.fastapi import get_session
from fastapi import FastAPI, WebSocket

from tests.contenders.routes import add_routes
from tests.contenders.shared import POOL, URL, item


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[dict]:
    async with DatabaseContext(URL, engine_kwargs=POOL) as db:
        yield {"db": db}


site = FastAPI(lifespan=lifespan)
site.add_middleware(SessionMiddleware)
state = {}


async def app(scope: dict, receive: object, send: object) -> None:
    """The site, with lifespan state also where nobody keeps it (`cancellation.py`)."""
    if "state" not in scope:
        scope["state"] = state if scope["type"] == "lifespan" else dict(state)
    await site(scope, receive, send)


add_routes(site, get_session)


@site.websocket("/ws")
async def talk(websocket: WebSocket) -> None:
    await websocket.accept()
    async for message in websocket.iter_text():
        async with websocket.state.db.session_maker.begin() as session:
            session.add(item(int(message)))
        await websocket.send_text("ok")
