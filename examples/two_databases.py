"""Two databases in one application: `uvicorn --app-dir examples two_databases:app`.

Each has a middleware, a key and a transaction of its own. The inner one, which is added first,
commits first; if it fails, the outer one rolls back too. If the outer COMMIT fails, the inner one
stands: there is no two-phase commit. So the inner database is the one in which a row too many does
no harm: here a visit that came to nothing.
"""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from asgi_db import Database, DBSession, DBSessionMiddleware, transactional
from asgi_db_fastapi import CurrentSessionTransaction
from models import Account, Base

database = Database()  # DATABASE_URL, or else the SQLite file app.db
analytics = Database(os.environ.get("ANALYTICS_URL", "sqlite:///analytics.db"))


class AnalyticsBase(DeclarativeBase):
    """The base of the tables in the second database."""


class Visit(AnalyticsBase):
    """One call of a route."""

    __tablename__ = "visits"
    id: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str] = mapped_column(String(200))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    await database.create_tables(Base.metadata)
    await analytics.create_tables(AnalyticsBase.metadata)
    yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(DBSessionMiddleware, database=analytics, key="analytics")
app.add_middleware(DBSessionMiddleware, database=database)


@app.post("/accounts", status_code=201)
@transactional  # in both databases
async def open_account(
    owner: str, request: Request, session: CurrentSessionTransaction
) -> dict[str, str]:
    visits: DBSession = request.state.analytics
    visits.add(Visit(path=request.url.path))
    session.add(Account(owner=owner))
    return {"owner": owner}
