"""The library's own error for that of an operation, where there is one."""

from __future__ import annotations

import time

from sqlalchemy.exc import DBAPIError, MissingGreenlet, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from asgi_db.drivers import driver_of
from asgi_db.drivers.connecting import raise_if_connect_failed
from asgi_db.drivers.describing import conflict_error
from asgi_db.errors import (
    DatabaseBusyError,
    DatabaseConflictError,
    DatabaseDownError,
    FailedTransactionError,
    UnavailableError,
)
from asgi_db.unit.standing import Standing


def translated(error: BaseException, unit: Standing) -> Exception | None:
    """Return the library's own error for that of an operation, where there is one.

    It is `DatabaseDownError` if the connection was closed while it was being set up,
    `DatabaseBusyError` if none became free, `DatabaseConflictError` if the database refused to
    begin a transaction beside another one, and `FailedTransactionError` after a flush that
    failed, which ends the transaction for SQLAlchemy.
    """
    if isinstance(error, PendingRollbackError):
        return _failed_transaction(error, unit)
    try:
        raise_if_connect_failed(error)
    except DatabaseDownError as down:
        return down
    if (conflict := conflict_in(error, unit)) is not None:
        return conflict
    if not isinstance(error, PoolTimeoutError) or isinstance(error, DatabaseBusyError):
        return None
    unit.tally.timeouts += 1
    unit.tally.add_wait(time.monotonic() - unit.tally.asked)
    return DatabaseBusyError(unit.describe(), unit.life.holders())


def _failed_transaction(error: PendingRollbackError, unit: Standing) -> Exception | None:
    failure = unit.transaction.failure
    if isinstance(error, FailedTransactionError) or failure is None:
        return None
    failed = FailedTransactionError(statement_failed=True)
    failed.__cause__ = failure
    return failed


def conflict_in(error: BaseException, unit: Standing) -> DatabaseConflictError | None:
    """Return the error for a conflict at BEGIN, when the unit had no connection yet."""
    if not isinstance(error, DBAPIError) or isinstance(error, UnavailableError):
        return None
    if error.orig is None or not driver_of(unit.life.engine.dialect).is_conflict(error.orig):
        return None
    conflict = unit.conflict
    if conflict is None or conflict.orig is not error.orig:
        unit.conflict = conflict = conflict_error(error, unit.describe())
        unit.tally.conflicts += 1
    return conflict


def outside_the_loop(name: str, owner: str) -> MissingGreenlet:
    """Make the error for an operation in a thread without an event loop.

    Args:
        name: the operation.
        owner: names the request or block.
    """
    return MissingGreenlet(
        f"{owner}: session.{name}() was called in a thread, where nothing can be awaited, perhaps"
        " by a lazy load in a synchronous endpoint (`def`). Make the endpoint `async def`, and"
        " await there what is to be loaded; or load it with the object: `selectinload(...)`."
    )
