"""The tables of the applications, and what each test does with an application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from sqlalchemy import ForeignKey, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from asgi_db import Database
from asgi_db.types import ASGIApp
from tests.pools import checked_out
from tests.servers import sql

NO_SUCH_TEAM = 77
"""A hero of this team is flushed, and refused at COMMIT."""


class Base(DeclarativeBase):
    """The tables."""


class Team(Base):
    __tablename__ = "team"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50))


class Hero(Base):
    __tablename__ = "hero"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), unique=True)
    team_id: Mapped[int | None] = mapped_column(
        ForeignKey(Team.id, deferrable=True, initially="DEFERRED")
    )


def heroes(url: str) -> list[str]:
    """Their names, as another connection sees them at this moment."""
    return [name for (name,) in sql(url, "SELECT name FROM hero ORDER BY id")]


@asynccontextmanager
async def serving(app: ASGIApp, *databases: Database) -> AsyncGenerator[httpx.AsyncClient]:
    """Start an application, and end it: at the end of the block no connection is out of a pool."""
    async with lifespan(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://heroes") as client:
            yield client
        for database in databases:
            assert checked_out(database) == 0


@asynccontextmanager
async def lifespan(app: ASGIApp) -> AsyncGenerator[None]:
    """What a server sends before the first request and after the last one."""
    incoming, outgoing = asyncio.Queue[Any](), asyncio.Queue[Any]()
    running = asyncio.create_task(
        app(
            {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}},
            incoming.get,
            outgoing.put,
        )  # type: ignore[arg-type]
    )
    for event in "startup", "shutdown":
        if event == "shutdown":
            yield
        incoming.put_nowait({"type": f"lifespan.{event}"})
        answer = await outgoing.get()
        assert answer["type"] == f"lifespan.{event}.complete", answer
    await running
