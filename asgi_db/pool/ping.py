"""Asking a database whether it answers, even if every connection of the pool is in use."""

from __future__ import annotations

import time
from contextlib import AbstractAsyncContextManager

import anyio
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection

from asgi_db.drivers import driver_of
from asgi_db.drivers.describing import conflict_error
from asgi_db.drivers.outages import connection_error, only_reads_error, wrong_settings
from asgi_db.engine.writes import writes_of
from asgi_db.errors import DatabaseBusyError, UnavailableError
from asgi_db.logs import logger
from asgi_db.pool.abandoned import connection_of, side_connection
from asgi_db.pool.life import EngineLife

PING_TIMEOUT = 2.0
"""Seconds for the answer over a pooled connection, and then again over a side connection."""


async def wait_for_database(life: EngineLife, seconds: float, name: str) -> None:
    """Wait until the database of an engine answers, and leave no connection in the pool.

    One that was pooled before the application has added its listeners would lack what they set up.

    Args:
        seconds: how long to wait.
        name: names the database, for messages.

    Raises:
        ConnectionError: it did not come up in time.
        ConfigurationError: no connection can be made with these settings.
    """
    deadline = time.monotonic() + seconds
    delay, cause = 0.1, "no answer"
    while True:
        left = deadline - time.monotonic()
        try:
            with anyio.fail_after(max(left, 0.1)):  # a server may accept, and never answer
                return await _ask(life, side_connection(life.engine))
        except (UnavailableError, OSError) as error:
            cause = str(error).partition("\n")[0] or cause
            left = deadline - time.monotonic()
            if left <= 0:
                raise ConnectionError(
                    f"{name} did not come up within {seconds:g} s: {cause}"
                ) from error
            logger.warning("%s is not there yet (%s); trying for %.1f s more", name, cause, left)
            await anyio.sleep(min(delay, left))
            delay = min(delay * 2, 2.0)


async def ping(life: EngineLife) -> None:
    """Check that the database of an engine answers.

    Raises:
        DatabaseBusyError: it answers, but the pool had no connection free in time.
        DatabaseDownError: it cannot be reached, or did not answer in time.
        DatabaseConflictError: another connection keeps it locked.
        Exception: the application's own code has failed, such as a listener of `connect`.
    """
    try:
        return await _ask(life, connection_of(life.engine))
    except (PoolTimeoutError, TimeoutError) as error:
        busy = DatabaseBusyError("database.ping()", life.holders())
        cause = error
    try:
        await _ask(life, side_connection(life.engine))
    except (PoolTimeoutError, TimeoutError) as error:
        raise connection_error(error) from error
    raise busy from cause


async def _ask(life: EngineLife, connecting: AbstractAsyncContextManager[AsyncConnection]) -> None:
    driver, writes = driver_of(life.engine.dialect), writes_of(life.engine.dialect)
    try:
        with anyio.fail_after(PING_TIMEOUT):
            async with connecting as connection:
                takes_writes = await connection.scalar(text(driver.ping))
                if writes.are_asked_for:
                    if not takes_writes and await connection.run_sync(_refuses_writes):
                        raise only_reads_error(None, "", "database.ping()")
                    writes.are_refused = False
    except DBAPIError as error:
        if error.orig is None:
            raise
        if (remedy := driver.remedy(error.orig)) is not None:
            # SQLite opens the file only now, and a side connection's engine translates nothing.
            raise wrong_settings(error.orig, remedy) from error
        if not driver.is_conflict(error.orig):
            raise
        # SQLite refuses to set up a connection to a locked file.
        raise conflict_error(error, "database.ping()") from error


def _refuses_writes(connection: Connection) -> bool:
    return driver_of(connection.dialect).refuses_writes(connection.connection)
