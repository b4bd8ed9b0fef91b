"""What an error of the driver means for the unit, and what it is called."""

from __future__ import annotations

from sqlalchemy import Connection
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError

from asgi_db.drivers import driver_of
from asgi_db.drivers.describing import brief, conflict_error
from asgi_db.drivers.outages import cause_of, connection_error, wrong_settings
from asgi_db.drivers.protocol import Driver
from asgi_db.engine.unit import Unit, is_closed, unit_of, where
from asgi_db.engine.writes import is_refused_by_server, writes_of
from asgi_db.errors import (
    DatabaseConflictError,
    DatabaseDownError,
    OutcomeUnknownError,
    StatementTimeoutError,
)


def handle_error(context: ExceptionContext) -> Exception | None:
    """Note the failure of statements that bypass the session: `(await session.connection())…`.

    A savepoint confines a failure, unless the rollback to it fails as well: after a deadlock
    MariaDB has rolled back the whole transaction, including its savepoints.

    Returns:
        The error for a conflict or a timeout in a unit, in place of SQLAlchemy's.

    Raises:
        DatabaseDownError: replaces the various errors of the driver for a closed connection.
    """
    connection, original = context.connection, context.original_exception
    if isinstance(original, DatabaseDownError):  # A driver's `begin` has raised it.
        context.is_disconnect = True
        return None
    driver = driver_of(context.dialect)
    error = context.sqlalchemy_exception or original
    if context.is_pre_ping or not (isinstance(error, DBAPIError) or driver.is_own_error(original)):
        return None
    unit = unit_of(connection)
    own: DatabaseConflictError | StatementTimeoutError | None = None
    if unit is not None and driver.is_conflict(original):
        unit.conflict = error = own = conflict_error(error, unit.describe())
        unit.tally.conflicts += 1
    elif unit is not None and (limit := driver.time_limit(original)) is not None:
        error = own = StatementTimeoutError(
            f"{unit.describe()}: the server has ended the statement, because it took longer than"
            f" its limit allows ({limit}). Make the statement faster, or raise the limit.",
            original,
        )
    if unit is not None and (trace := unit.tally.trace) is not None:
        code = driver.code(original)
        name = type(original).__name__
        trace.fail(f"{name} ({code})" if code else name, context.statement)
    if connection is not None:
        savepoint_failed = (context.statement or "").startswith("ROLLBACK TO SAVEPOINT")
        if unit is not None and (savepoint_failed or not connection.in_nested_transaction()):
            unit.transaction.note_failure(error)
    if unit is not None and (overdue := unit.overdue_stream()) is not None:
        raise overdue
    if isinstance(error, DBAPIError) and (advice := driver.advice(original)) is not None:
        error.add_detail(advice)
    elif connection is None and (remedy := driver.remedy(original)) is not None:
        # SQLite opens the file only now, when the connection is set up.
        raise wrong_settings(original, remedy)
    elif unit is not None and unit.transaction.commit_was_sent and driver.is_in_doubt(original):
        context.is_disconnect, context.invalidate_pool_on_disconnect = True, False
        raise OutcomeUnknownError(
            f"{unit.describe()}: the database does not know whether COMMIT was carried out"
            f" ({brief(original)})",
            original,
        )
    elif is_refused_by_server(original, connection, unit):
        context.is_disconnect = True  # The whole pool may lead to this server.
        raise writes_of(context.dialect).refused(original, unit)
    elif context.is_disconnect or driver.is_outage(original):
        context.is_disconnect = True
        raise _outage(driver, original, connection, unit)
    return own


def _outage(
    driver: Driver, error: BaseException, connection: Connection | None, unit: Unit | None
) -> DatabaseDownError:
    """Make the error for a closed connection; after COMMIT was sent, its outcome is unknown."""
    # A connection may also be closed when a value is refused, and the error then repeats it.
    cause = cause_of(error) if driver.is_outage(error) else brief(error)
    if connection is not None and (limit := _idle_limit(driver, connection)) is not None:
        cause = f"{cause}; {limit}"
    if unit is None or not unit.transaction.commit_was_sent:
        return connection_error(error, where(unit), cause)
    return OutcomeUnknownError(
        f"{unit.describe()}: the connection was closed after COMMIT had been sent, so whether it"
        f" was carried out is unknown ({cause})",
        error,
    )


def _idle_limit(driver: Driver, connection: Connection) -> str | None:
    """Name the limit that may have closed a connection while nothing was running on it."""
    if connection.closed or connection.invalidated or not is_closed(connection):
        return None
    return driver.idle_limit(connection.connection.driver_connection, in_transaction=True)
