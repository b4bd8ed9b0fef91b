# Not installed where types are checked.
# mypy: ignore-errors
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

"""fastapi-sqla.

Sockets, which its middleware leaves alone, use its context manager.
"""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import structlog
from fastapi import FastAPI, WebSocket
from fastapi_sqla import AsyncSessionDependency, open_async_session, setup_middlewares, startup

from tests.contenders.routes import add_routes
from tests.contenders.shared import POOL, URL, item

# Its log would be rendered by Rich, which others have brought along: seconds for each traceback.
structlog.configure(
    processors=[structlog.processors.format_exc_info, structlog.processors.KeyValueRenderer()]
)

# Its settings come from the environment.
os.environ["sqlalchemy_url"] = URL
for name, value in POOL.items():
    os.environ[f"sqlalchemy_{name}"] = str(value)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    await startup()
    yield


app = FastAPI(lifespan=lifespan)
setup_middlewares(app)


add_routes(app, AsyncSessionDependency())


@app.websocket("/ws")
async def talk(websocket: WebSocket) -> None:
    await websocket.accept()
    async for message in websocket.iter_text():
        async with open_async_session() as session:
            session.add(item(int(message)))
        await websocket.send_text("ok")
