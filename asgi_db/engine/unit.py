"""The unit of work as an engine sees it, and the connection that it uses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator
from typing import Protocol
from weakref import WeakKeyDictionary, ref

from sqlalchemy import Connection

from asgi_db.drivers import driver_of
from asgi_db.drivers.outages import connection_error
from asgi_db.drivers.statements import Effect
from asgi_db.errors import DatabaseConflictError, DatabaseTimeoutError
from asgi_db.modes import Mode
from asgi_db.statistics import Tally

UNIT_INFO = "asgi_db_unit_of_work"
"""The key in a pooled connection's `info` for the unit that uses the connection."""


class UnitTransaction(Protocol):
    """What the events of an engine know about a unit's transaction, and what they report to it.

    Attributes:
        effect: the greatest effect of its statements.
        was_handed_out: whether its connection was handed out, over which anything may be sent.
    """

    effect: Effect
    was_handed_out: bool

    @property
    def commit_was_sent(self) -> bool:
        """Whether a COMMIT is, or may be, on its way to the server."""
        ...

    def commit_is_sent(self) -> None:
        """Note that the driver is about to send COMMIT over an open connection."""

    def note_failure(self, error: BaseException) -> None:
        """Note that it can no longer be committed."""


class Unit(Protocol):
    """What the events of an engine know about a unit of work, and what they report to it.

    Attributes:
        loop: the event loop of its session.
        fixed_mode: the mode that its first statement has fixed.
        conflict: the last error of the database about a conflict with another transaction.
    """

    loop: asyncio.AbstractEventLoop
    fixed_mode: Mode | None
    conflict: DatabaseConflictError | None

    @property
    def mode(self) -> Mode:
        """The mode in force."""
        ...

    @property
    def transaction(self) -> UnitTransaction:
        """The transaction that is open."""
        ...

    def describe(self) -> str:
        """Name the request or block, for messages."""
        ...

    def overdue_stream(self) -> DatabaseTimeoutError | None:
        """Return the error for reading a server-side cursor after the end of `timeout=`."""
        ...

    @property
    def tally(self) -> Tally:
        """What the unit has done so far; its connections are added when they are returned."""
        ...


units: WeakKeyDictionary[Connection, ref[Unit]] = WeakKeyDictionary()
"""The unit that uses a connection. This also finds the unit of an invalidated connection, which no
longer has an `info`: reading from a stream of a unit whose time is over has to raise its error."""


def unit_of(connection: Connection | None) -> Unit | None:
    """Return the unit that uses a connection, if there is one."""
    found = None if connection is None else units.get(connection)
    return None if found is None else found()


def where(unit: Unit | None) -> str:
    """Name the request or block at the beginning of a message, if there is one."""
    return "" if unit is None else f"{unit.describe()}: "


def begin_unit(connection: Connection, unit: Unit, mode: Mode) -> None:
    """Mark a connection so that the engine and the pool can find the unit that now uses it."""
    pooled = connection.connection
    pooled.info[UNIT_INFO] = unit
    units[connection] = ref(unit)
    if mode.autocommit and pooled.dbapi_connection is not None:
        driver = driver_of(connection.dialect)
        if driver.tells_autocommit:
            driver.enter_autocommit(pooled.dbapi_connection)


def begin_now(connection: Connection, unit: Unit) -> None:
    """Have the transaction begin at the server, before the connection itself is handed out.

    Raises:
        DatabaseDownError: the connection was closed.
    """
    pooled = connection.connection
    with _telling_a_closed_connection(connection):
        driver_of(connection.dialect).begin_now(pooled)
    unit.transaction.effect = max(unit.transaction.effect, Effect.HOLDS)
    unit.transaction.was_handed_out = True


def is_closed(connection: Connection) -> bool:
    """Return whether a connection has been closed, by the server or by anything else."""
    if connection.closed or connection.invalidated:
        return True
    driver_connection = connection.connection.driver_connection
    return driver_connection is None or driver_of(connection.dialect).is_closed(driver_connection)


def has_unseen_writes(connection: Connection) -> bool:
    """Return whether the open transaction has written over the connection of the driver.

    Raises:
        DatabaseDownError: the connection was closed. SQLAlchemy's adapters forget the transaction
            then, so that a COMMIT after it would do nothing and still succeed.
        Exception: the database has aborted the transaction.
    """
    pooled = connection.connection
    with _telling_a_closed_connection(connection):
        return driver_of(connection.dialect).has_written(pooled)


@contextlib.contextmanager
def _telling_a_closed_connection(connection: Connection) -> Generator[None]:
    """Raise a `DatabaseDownError` in place of an error for a connection that was closed."""
    try:
        yield
    except Exception as error:
        if not is_closed(connection):
            raise
        connection.invalidate(error)
        raise connection_error(error, where(unit_of(connection))) from error
