"""What is known of the writes of an engine: whether there are any, and whether they are refused."""

from __future__ import annotations

import re
from weakref import WeakKeyDictionary

from sqlalchemy import Connection
from sqlalchemy.engine import Dialect

from asgi_db.drivers import driver_of
from asgi_db.drivers.outages import cause_of, only_reads_error
from asgi_db.engine.unit import Unit, where
from asgi_db.errors import DatabaseDownError
from asgi_db.logs import logger

IS_READ_ONLY = "asgi_db_is_read_only"
"""The key in a pooled connection's `info` for a statement of the user's that lets it only read."""

SAYS_READ_ONLY = re.compile(r"read[\s_]+only", re.IGNORECASE)
"""What is found in the statements that let a transaction, or a connection, only read."""


class Writes:
    """The writes of an engine and its variants.

    Attributes:
        are_asked_for: whether there are any, so that a server which only reads is of no use. All
            routes of an application may also read, from a server that is meant for it.
        are_refused: whether the server has refused the last one because it only reads.
    """

    are_asked_for = False
    are_refused = False

    def refused(self, error: BaseException, unit: Unit | None) -> DatabaseDownError:
        """Note that the server has refused one; return the error for it."""
        if not self.are_refused:
            self.are_asked_for = self.are_refused = True
            logger.warning(
                "A write was refused, because this server only reads (%s): it was demoted, or is"
                " not the primary. Its connections are replaced until one takes writes again, and"
                " what writes is answered with 503.",
                cause_of(error),
            )
        return only_reads_error(error, where(unit), cause_of(error))


def writes_of(dialect: Dialect) -> Writes:
    """Return what is known of the writes of an engine; it and its variants share one dialect."""
    found = _writes.get(dialect)
    if found is None:
        found = _writes[dialect] = Writes()
    return found


_writes: WeakKeyDictionary[Dialect, Writes] = WeakKeyDictionary()


def is_refused_by_server(
    error: BaseException, connection: Connection | None, unit: Unit | None
) -> bool:
    """Return whether a write was refused because its server only reads.

    No outage is what the mode has asked for, or the user: for a transaction, a connection or a
    role. What was sent over the driver's own connection is not known here.
    """
    if connection is None or connection.invalidated or connection.closed:
        return False
    driver = driver_of(connection.dialect)
    if not driver.only_reads(error) or connection.info.get(IS_READ_ONLY):
        return False
    if unit is not None:
        mode = unit.fixed_mode or unit.mode
        if mode.read_only or unit.transaction.was_handed_out:
            return False
    return not driver.reads_by_choice(connection)
