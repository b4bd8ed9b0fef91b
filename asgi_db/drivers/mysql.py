"""MySQL and MariaDB, by asyncmy."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.pool import ConnectionPoolEntry, PoolResetState

from asgi_db.drivers.base import BEGIN_OPTION, _begin_standard, lost_connection
from asgi_db.modes import Mode

AUTOCOMMIT_OPTION = "asgi_db_autocommit"
"""Execution option: whether the connection is to be in autocommit.

On MySQL it costs a round trip to change that, so a connection stays as it was last used, and each
begin makes sure. With asyncpg it costs nothing; the connection goes back to the pool as it was.
SQLAlchemy's own `isolation_level="AUTOCOMMIT"` changes it twice per request, and listens to events
of the engine (see `watch`).
"""


def _begin_mysql(mode: Mode) -> dict[str, Any]:
    """`SET TRANSACTION` holds for the next transaction alone, so nothing has to be set back."""
    if mode.autocommit:
        return _begin_standard(mode)
    isolation = "REPEATABLE READ" if mode.snapshot else mode.isolation
    characteristics = [f"ISOLATION LEVEL {isolation}"] if isolation is not None else []
    if mode.read_only:
        characteristics.append("READ ONLY")
    begin = [f"SET TRANSACTION {', '.join(characteristics)}"] if characteristics else []
    if mode.snapshot:
        begin.append("START TRANSACTION WITH CONSISTENT SNAPSHOT")
    return {BEGIN_OPTION: begin} if begin else {}


def _begin(connection: Connection) -> None:
    options = connection.get_execution_options()
    if AUTOCOMMIT_OPTION in options:
        asked = options.get("isolation_level") == "AUTOCOMMIT"  # by a user of the engine itself
        driver: Any = connection.connection.dbapi_connection
        try:
            driver.autocommit(asked or options[AUTOCOMMIT_OPTION])  # nothing is sent if it is so
        except Exception as error:  # SQLAlchemy does not look after what an event does
            connection.invalidate(error)
            raise lost_connection(error) from error
    for statement in options.get(BEGIN_OPTION, ()):
        connection.exec_driver_sql(statement)


def reset_mysql(engine: Engine) -> None:
    """Roll back on return to the pool only what is open; SQLAlchemy does so after each COMMIT too.

    The server says in each answer whether a transaction is open.
    """

    def reset(connection: DBAPIConnection, _: ConnectionPoolEntry, state: PoolResetState) -> None:
        driver: Any = engine.dialect.get_driver_connection(connection)
        if state.asyncio_safe and not state.terminate_only and driver.get_transaction_status():
            connection.rollback()

    event.listen(engine, "reset", reset)


_UNKNOWN_THREAD = 1094  # MySQL: it has ended already


async def _latest_start(connection: AsyncConnection) -> float:
    """The time at which a MySQL server was running for sure; it says so in whole seconds."""
    uptime = (await connection.execute(text("SHOW GLOBAL STATUS LIKE 'Uptime'"))).one()[1]
    return time.monotonic() - float(uptime) + 1


async def _runs(connection: AsyncConnection, id: int, age: float) -> bool:
    """Say whether a connection's statement has run for so many seconds.

    That of another connection with the same number has begun after ours was cut off.
    """
    is_mariadb = getattr(connection.dialect, "is_mariadb", False)
    seconds = "time_ms / 1000" if is_mariadb else "time + 1"  # MySQL counts whole ones
    statement = (
        f"SELECT 1 FROM information_schema.processlist WHERE id = {id} AND {seconds} >= {age}"
    )
    return bool(await connection.scalar(text(f"{statement} AND command <> 'Sleep'")))
