# Not installed where types are checked.
# mypy: ignore-errors
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

"""fastapi-toolsets, which is for PostgreSQL alone.

Sockets use its context manager for sessions outside of requests.
"""

from fastapi import FastAPI, WebSocket
from fastapi_toolsets.db import Database
from fastapi_toolsets.exceptions import init_exceptions_handlers

from tests.contenders.routes import add_routes
from tests.contenders.shared import POOL, URL, item

db = Database(URL, **POOL)
app = FastAPI()
init_exceptions_handlers(app)
db.install(app)


def checked_out() -> int:
    return db.engine.pool.checkedout()


add_routes(app, db)


@app.websocket("/ws")
async def talk(websocket: WebSocket) -> None:
    await websocket.accept()
    async for message in websocket.iter_text():
        async with db.begin() as session:
            session.add(item(int(message)))
        await websocket.send_text("ok")
