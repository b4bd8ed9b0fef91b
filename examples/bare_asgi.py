"""Any ASGI application, wrapped: `uvicorn --app-dir examples bare_asgi:app`."""

import json

from sqlalchemy import select

from asgi_db import Database, DBSession, DBSessionMiddleware, by_method
from asgi_db.types import Receive, Scope, Send
from models import Account, Base

database = Database()  # DATABASE_URL, or else the SQLite file app.db


async def accounts(scope: Scope, receive: Receive, send: Send) -> None:
    """GET lists the accounts, POST opens one for the owner in the query string."""
    if scope["type"] == "lifespan":
        await serve_lifespan(receive, send)
        return
    session: DBSession = scope["state"]["db"]
    status = 200
    if scope["method"] == "POST":  # transactional: committed before the status line leaves
        session.add(Account(owner=scope["query_string"].decode()))
        await session.flush()
        status = 201
    owners = (await session.scalars(select(Account.owner).order_by(Account.id))).all()
    content_type = (b"content-type", b"application/json")
    await send({"type": "http.response.start", "status": status, "headers": [content_type]})
    await send({"type": "http.response.body", "body": json.dumps(owners).encode()})


async def serve_lifespan(receive: Receive, send: Send) -> None:
    await receive()
    await database.create_tables(Base.metadata)
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


app = DBSessionMiddleware(accounts, database=database, mode=by_method)
