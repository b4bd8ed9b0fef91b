"""What all drivers have in common."""

from __future__ import annotations

import contextlib
from typing import Any

from sqlalchemy.exc import DBAPIError

from asgi_db.errors import DatabaseDownError
from asgi_db.modes import Mode

BEGIN_OPTION = "asgi_db_begin"
"""Execution option: the statements with which a transaction begins."""


def _begin_standard(mode: Mode) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if mode.autocommit:
        options["isolation_level"] = "AUTOCOMMIT"
    elif mode.snapshot:
        options["isolation_level"] = "REPEATABLE READ"
    elif mode.isolation is not None:
        options["isolation_level"] = mode.isolation
    return options


_FAREWELLS = frozenset(
    {"08000", "08001", "08003", "08004", "08006", "57P01", "57P02", "57P03", "53300", 1040, 1053}
)
"""SQLSTATEs and MySQL's error numbers of a server which shuts down, starts, is full or has gone."""


def _is_farewell(error: BaseException) -> bool:
    return (getattr(error, "sqlstate", None) or next(iter(error.args), None)) in _FAREWELLS


def has_gone(driver: Any) -> bool:
    """Whether the driver has seen the server close this connection: it costs no round trip.

    asyncmy has no public word for it; the test of closed connections in `test_engine.py` breaks
    when this changes.
    """
    if hasattr(driver, "is_closed"):  # asyncpg
        return bool(driver.is_closed())
    return bool(getattr(driver, "_stream_broken", False))


GIVE_UP_AFTER = 60.0
"""Seconds after which a server that cannot be told is left alone."""


def id_at_server(driver: Any) -> int | None:
    """The number by which the server knows this connection."""
    with contextlib.suppress(AttributeError, TypeError):  # it is closed already
        return int(driver.get_server_pid() if hasattr(driver, "is_closed") else driver.thread_id())
    return None


_SQLSTATES = frozenset({"40001", "40P01"})  # PostgreSQL: serialization failure, deadlock


_NUMBERS = (1213, 1205)  # MySQL: deadlock, lock wait timeout


_SQLITE_BUSY = 5


def is_conflict(error: BaseException) -> bool:
    """Say whether the database has ended a transaction in favour of another one."""
    original = error.orig if isinstance(error, DBAPIError) else error
    code: object = getattr(original, "sqlite_errorcode", None)
    if isinstance(code, int):
        return code & 0xFF == _SQLITE_BUSY  # the higher bits say more closely why
    number: Any = next(iter(getattr(original, "args", ())), None)
    return getattr(original, "sqlstate", None) in _SQLSTATES or number in _NUMBERS


def cause_of(error: BaseException) -> str:
    """Name an error of the driver, for a message."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def lost_connection(error: BaseException, where: str = "") -> DatabaseDownError:
    """Make the error for a connection which is closed, or could not be made.

    Args:
        error: what the driver or the network says.
        where: the request or block, as the beginning of the message.
    """
    return DatabaseDownError(f"{where}the database cannot be reached ({cause_of(error)})", error)
