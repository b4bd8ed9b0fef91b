"""Handlers for Litestar whose annotations exist for type checkers alone.

Litestar looks such names up in its signature namespace. It does so when the application is made,
and for a listener at a WebSocket already when that is defined, before any plugin can say a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from litestar import Controller, WebSocket, get, websocket
from litestar.datastructures import State
from litestar.di import Provide
from sqlalchemy import text

from tests.versions import NamedDependency

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    from asgi_db import DBSession


Socket = WebSocket[Any, Any, State]


async def one(session: AsyncSession) -> int:
    return int((await session.execute(text("SELECT 1"))).scalar_one())


async def provide_one(db_session_read_only: NamedDependency[DBSession]) -> int:
    return await one(db_session_read_only)


async def provide_session_by_its_old_name(
    db_session_transaction: NamedDependency[AsyncSession],
) -> AsyncSession:
    return db_session_transaction


@get("/ours")
async def ours(db_session: NamedDependency[DBSession]) -> int:
    return await one(db_session)


@get("/sqlalchemys")
async def sqlalchemys(db_session: NamedDependency[AsyncSession]) -> int:
    return await one(db_session)


@get("/text")
async def as_text(db_session: NamedDependency[DBSession]) -> str:
    return str(db_session)


@get("/engine")
async def engine(db_engine: NamedDependency[AsyncEngine]) -> int:
    async with db_engine.connect() as connection:
        return int((await connection.execute(text("SELECT 1"))).scalar_one())


@get("/provided", dependencies={"number": Provide(provide_one)})
async def provided(number: NamedDependency[int]) -> int:
    return number


@get("/renamed", dependencies={"tx": Provide(provide_session_by_its_old_name)})
async def renamed(tx: NamedDependency[AsyncSession]) -> int:
    return await one(tx)


class InController(Controller):
    path = "/controller"

    @get()
    async def read(self, db_session_read_only: NamedDependency[AsyncSession]) -> int:
        return await one(db_session_read_only)


@websocket("/socket")
async def socket(socket: Socket, db_session: NamedDependency[DBSession]) -> None:
    await socket.accept()
    await socket.receive_text()
    await socket.send_text(str(await one(db_session)))


HANDLERS: list[Any] = [ours, sqlalchemys, engine, provided, renamed, InController, socket]
