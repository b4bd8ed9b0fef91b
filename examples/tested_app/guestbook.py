"""A guest book; its tests, beside it, are in three styles.

pip install "asgi-db[fastapi]" pytest httpx httpx2
cd examples/tested_app && pytest
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from sqlalchemy import String, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from asgi_db import Database, DBSessionMiddleware
from asgi_db_fastapi import CurrentSessionReadOnly, CurrentSessionTransaction

database = Database()  # DATABASE_URL, or else the SQLite file app.db


class Base(DeclarativeBase):
    """The tables."""


class Guest(Base):
    """Someone who was here."""

    __tablename__ = "guests"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), unique=True)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    await database.create_tables(Base.metadata)
    yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(DBSessionMiddleware, database=database)


@app.post("/guests", status_code=201)
async def sign(name: str, session: CurrentSessionTransaction) -> None:
    session.add(Guest(name=name))


@app.get("/guests")
async def read(session: CurrentSessionReadOnly) -> list[str]:
    return list(await session.scalars(select(Guest.name).order_by(Guest.id)))
