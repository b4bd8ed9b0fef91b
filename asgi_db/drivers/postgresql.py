"""PostgreSQL, by asyncpg."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from asgi_db.drivers.base import _begin_standard, has_gone, id_at_server
from asgi_db.modes import Mode
from asgi_db.tasks import in_background, running_loop

logger = logging.getLogger("asgi_db")


def _is_asyncpg(dialect: Dialect) -> bool:
    return dialect.driver == "asyncpg"


def _set_autocommit(connection: Any, value: bool) -> None:
    connection.autocommit = value


def _leave_autocommit(connection: DBAPIConnection | None, _: ConnectionPoolEntry) -> None:
    if connection is not None:
        _set_autocommit(connection, False)


def _begin_postgresql(mode: Mode) -> dict[str, Any]:
    options = _begin_standard(mode)
    if mode.isolation == "READ UNCOMMITTED":  # PostgreSQL treats it as READ COMMITTED
        options["isolation_level"] = "READ COMMITTED"
    if mode.read_only and not mode.autocommit:
        options["postgresql_readonly"] = True
    if mode.deferrable:
        options["postgresql_deferrable"] = True
    return options


def _is_about_a_prepared_statement(error: BaseException) -> bool:
    """Whether it is not where it was prepared, or another one of its name is."""
    state = getattr(error, "sqlstate", None)
    return state in ("26000", "42P05") or (state == "08P01" and "prepared stat" in str(error))


def prepare_postgresql(engine: Engine) -> None:
    """Let the server look after its clients, and notice a pooler that the settings do not name.

    A statement runs on at the server when its client's process is killed, unless the server looks
    now and then whether the client is still there (PostgreSQL 14 and later; a value of the user's
    own stays).

    In transaction pooling asyncpg's prepared statements fail, or answer with the rows of other
    clients' statements. PgBouncer invents the process number that it tells its clients.
    """
    warned = False

    def connect(connection: Any, _: ConnectionPoolEntry) -> None:
        nonlocal warned
        connection.autocommit = True
        cursor = connection.cursor()
        try:
            cursor.execute(_LOOK_AFTER_CLIENT)
            ((_, id),) = cursor.fetchall()
        except engine.dialect.loaded_dbapi.Error:
            if has_gone(engine.dialect.get_driver_connection(connection)):
                raise
            return  # not on every system can the server look
        finally:
            cursor.close()
            connection.autocommit = False
        if id != id_at_server(engine.dialect.get_driver_connection(connection)) and not warned:
            warned = True
            logger.warning(
                "There is a pooler between this application and PostgreSQL. If it pools"
                ' transactions, as PgBouncer can, say so: Database(..., pooler="transaction");'
                " otherwise statements fail, or get the rows of others."
            )

    event.listen(engine, "connect", connect)


_LOOK_AFTER_CLIENT = """
    SELECT CASE WHEN current_setting('client_connection_check_interval', true) = '0'
    THEN set_config('client_connection_check_interval', '1s', false) END, pg_backend_pid()
"""


PATIENCE = 2.0
"""Seconds in which a request to cancel a statement may get through a pooler."""


# The server gives the number of a connection that has ended to another: PostgreSQL at any time,
# MySQL after it was started again.
_TERMINATE = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = :id
    AND backend_start <= clock_timestamp() - make_interval(secs => :age)
"""


def patient_connection_class() -> type[Any]:
    """Make the class of asyncpg's connections behind a pooler.

    There the server's own numbers are not known, so it is left to asyncpg to ask that a statement
    which was cut off be cancelled: `terminate` gives it the time.
    """
    from asyncpg import Connection

    class PatientConnection(Connection):
        """Closes in the background, so that the request to cancel gets out."""

        __slots__ = ("_closing",)

        def terminate(self) -> None:
            if running_loop() is None:
                super().terminate()
            else:
                self._close_once()

        async def close(self, *, timeout: float | None = None) -> None:  # noqa: ASYNC109
            await asyncio.wait((self._close_once(),))

        def _close_once(self) -> asyncio.Future[None]:
            # A second `close` would cut off the request of the first to cancel the statement,
            # at which PgBouncer 1.18 falls over (its issue 801).
            if not hasattr(self, "_closing"):
                self._closing = in_background(self._close_in_time())
            return self._closing

        async def _close_in_time(self) -> None:
            try:
                await super().close(timeout=PATIENCE)
            except Exception:  # whatever it is, the connection goes
                super().terminate()

    return PatientConnection
