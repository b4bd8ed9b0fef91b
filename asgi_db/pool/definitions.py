"""How the definitions of tables are changed: by one process at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_db.drivers import driver_of
from asgi_db.engine.variants import variant
from asgi_db.modes import transactional
from asgi_db.pool.abandoned import connection_of

_DEFINING = transactional(isolation="READ COMMITTED")
"""The mode for DDL, which has to see what another process has created while this one waited."""


async def define(engine: AsyncEngine, change: Callable[[Connection], None]) -> None:
    """Change the definitions of tables while no other process does so."""
    engine = AsyncEngine(variant(engine.sync_engine, _DEFINING))
    driver = driver_of(engine.dialect)
    async with connection_of(engine) as connection, connection.begin():
        if driver.lock_definitions is not None:
            await connection.exec_driver_sql(driver.lock_definitions)
        try:
            await connection.run_sync(change)
        finally:
            if driver.unlock_definitions is not None:
                # On a connection that was closed the lock has ended by itself.
                with contextlib.suppress(SQLAlchemyError):
                    await connection.exec_driver_sql(driver.unlock_definitions)
