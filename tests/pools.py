"""A database whose pool the smaller tests look at."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from sqlalchemy.pool import QueuePool

from asgi_db import Database
from tests.tables import Base, Deferred

ONE_CONNECTION = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}


def checked_out(database: Database) -> int:
    """How many connections are out of the pool of this event loop."""
    pool = database.engine.pool
    assert isinstance(pool, QueuePool)
    return pool.checkedout()


@asynccontextmanager
async def one_connection(url: str) -> AsyncGenerator[Database]:
    """A database with all tables and one connection, which is back at the end."""
    async with Database(url, engine_options=ONE_CONNECTION) as database:
        await database.create_tables(Base.metadata)
        await database.create_tables(Deferred.metadata)
        yield database
        assert checked_out(database) == 0
