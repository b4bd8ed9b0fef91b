"""The errors of asgi-db: each message names the cause, then the way out."""

from __future__ import annotations

from typing import ClassVar, Self

from sqlalchemy.exc import InvalidRequestError, OperationalError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError


class ConfigurationError(ValueError):
    """Raised when a setting cannot work; the message names the setting and the remedy."""


class MissingMiddlewareError(RuntimeError):
    """Raised when a session is asked for where no `DBSessionMiddleware` has placed one."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"There is no database session {key!r} in this connection: install the middleware with"
            f" app.add_middleware(DBSessionMiddleware, key={key!r}), or DatabasePlugin in Litestar."
        )


class ModeConflictError(RuntimeError):
    """Raised when a mode is asked for that does not go together with an earlier one."""

    @classmethod
    def too_late(cls, asked: str, begun: str, route: str) -> Self:
        """Make the error for a mode that is asked for after a weaker one has run a statement."""
        return cls(
            f"{route}: the {asked} mode was asked for after a statement had already run in the"
            f" {begun} mode. Put @{asked} on the route, so that the mode is known from the start,"
            " or call `await session.release()` after the earlier statements."
        )

    @classmethod
    def at_odds(cls, asked: str, earlier: str, route: str) -> Self:
        """Make the error for two dependencies which ask for the same mode in two ways."""
        return cls(
            f"{route}: {asked} was asked for, and {earlier} by another dependency: put the one that"
            " is meant on the route, which then holds for both."
        )


class ReadOnlyError(InvalidRequestError):
    """Raised when a read-only unit of work is asked for what it cannot do; nothing was sent."""


class SessionExpiredError(RuntimeError):
    """Raised when a session is used after the request or block that it belonged to has ended."""

    def __init__(self, operation: str, owner: str) -> None:
        super().__init__(
            f"session.{operation}() was called after {owner} had ended, and its session with it."
            " Work that outlives a request opens a session of its own:"
            " `async with database.session() as session:` or `database.transaction()`."
        )


class ConcurrentUseError(RuntimeError):
    """Raised when two tasks use one session at the same time."""

    def __init__(self, operation: str, running: str, owner: str) -> None:
        super().__init__(
            f"{owner}: session.{operation}() was called while session.{running}() was still running"
            " in another task. A session serves one task at a time: await the statements one after"
            " the other, or give each task its own `async with database.session()`."
        )


class FailedTransactionError(PendingRollbackError):
    """Raised in place of a COMMIT which could not keep what it says.

    A statement of the transaction had failed, and is the `__cause__`: PostgreSQL answers such a
    COMMIT with ROLLBACK and no error, so the work would be lost in silence; the rule is the same
    on every database. Or the connection was terminated, because the database was disposed.
    """

    def __init__(self, statement_failed: bool) -> None:
        super().__init__(
            "A statement of this transaction failed and its error was swallowed, so the transaction"
            " cannot be committed. Let the error out, or run a statement that may fail inside"
            " `async with session.begin_nested():`."
            if statement_failed
            else "The connection of this transaction was terminated when the database was disposed,"
            " so nothing can be committed. End all work before `await database.dispose()`."
        )


class SandboxError(InvalidRequestError):
    """Raised when a test asks of a sandbox what it cannot do."""


class UncommittedWorkError(InvalidRequestError):
    """Raised where work that is not committed would be thrown away, or has been.

    `release()` refuses to; a `transactional` request whose handler has closed the session with
    work in it is not acknowledged.
    """

    def __init__(self, route: str, *, is_lost: bool) -> None:
        super().__init__(
            f"{route}: the handler closed the session, which threw away work that was not"
            " committed. Leave the session open (no `async with`, no `close()`): its work is"
            " committed before the response; or call `await session.commit()` first."
            if is_lost
            else f"{route}: session.release() would throw away writes which are not committed. Call"
            " `await session.commit()` or `await session.rollback()` first."
        )


class UnavailableError(Exception):
    """Raised when the database cannot serve the request now; the base of what becomes a 503.

    Unless the application handles it, the client gets `application/problem+json` with
    `Retry-After`; the message itself, which names routes, stays in the log.

    Attributes:
        reason: one word for the client: busy, down, timeout or outcome-unknown.
        public_message: a sentence for the client.
    """

    reason: ClassVar[str]
    public_message: ClassVar[str]


def unavailable_in(error: BaseException | None) -> UnavailableError | None:
    """Return the error itself, or the first of a task group in which there is no other."""
    if isinstance(error, UnavailableError):
        return error
    errors: tuple[BaseException, ...] = getattr(error, "exceptions", ())  # an ExceptionGroup's
    found = [unavailable_in(one) for one in errors]
    return found[0] if found and all(found) else None


class DatabaseBusyError(UnavailableError, PoolTimeoutError):
    """Raised when no connection has become free within `pool_timeout`."""

    reason = "busy"
    public_message = "The database has too much to do at the moment. Try again."

    def __init__(self, route: str, holders: list[str]) -> None:
        held = "; ".join(holders) or "connections which are just being opened"
        super().__init__(
            f"{route}: no connection became free in time. The pool is held by: {held}."
            " Make those faster, let them call `await session.release()` around slow work, or"
            " raise pool_size."
        )


class DatabaseDownError(UnavailableError, OperationalError):
    """Raised when the database cannot be reached, or the connection to it is lost.

    Stands for whatever the driver raises then, which is the `orig` and the `__cause__`. Nothing
    of the transaction has been applied.
    """

    reason = "down"
    public_message = "The database cannot be reached at the moment. Try again."

    def __init__(self, message: str, orig: BaseException) -> None:
        super().__init__(None, None, orig, connection_invalidated=True)
        self.args = (message,)


class OutcomeUnknownError(DatabaseDownError):
    """Raised when COMMIT was sent and its answer was lost, or did not come in time.

    The transaction may have been applied or not. Whoever tries again has to look first, or to
    send what can be applied twice.
    """

    reason = "outcome-unknown"
    public_message = (
        "It is not known whether the request was carried out. Look before you try again."
    )


class DatabaseTimeoutError(UnavailableError, TimeoutError):
    """Raised when the `timeout=` of the mode is over; the running statement has been ended."""

    reason = "timeout"
    public_message = "The database took too long. Try again."

    def __init__(self, route: str, timeout: float) -> None:
        super().__init__(
            f"{route}: the unit of work was not finished within its timeout of {timeout:g} s, and"
            " has been rolled back."
        )
