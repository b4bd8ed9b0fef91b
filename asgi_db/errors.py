"""The errors of asgi-db: each message names the cause, and then the remedy."""

from __future__ import annotations

from typing import ClassVar, Self

from sqlalchemy.exc import InvalidRequestError, OperationalError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError


class ConfigurationError(ValueError):
    """Raised when a setting cannot work; the message names the setting and the remedy."""

    @classmethod
    def without_asyncio(cls) -> Self:
        """Make the error for a coroutine that something else than asyncio runs, such as trio."""
        return cls(
            "SQLAlchemy's asyncio extension needs asyncio, and no event loop of asyncio runs here:"
            " choose the server's worker for asyncio instead of the one for trio."
        )


class MissingMiddlewareError(RuntimeError):
    """Raised when a session is asked for where no `DBSessionMiddleware` has placed one."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"There is no database session {key!r} in this connection: install the middleware with"
            f" app.add_middleware(DBSessionMiddleware, key={key!r}), or DatabasePlugin in Litestar."
        )


class ModeConflictError(RuntimeError):
    """Raised when a mode is asked for that is incompatible with an earlier one."""

    @classmethod
    def too_late(cls, asked: str, begun: str, route: str) -> Self:
        """Make the error for a mode that is asked for after work in another one."""
        return cls(
            f"{route}: the {asked} mode was asked for after work in the {begun} mode that is more"
            " than reading: a write, a lock, a setting, an isolation level, a snapshot, an open"
            " cursor or a block. For two dependencies, put"
            f" @{asked} on the route, so that the mode is known from the start. In a middleware,"
            " which comes before the route is known, commit first (`await session.commit()`), or"
            " use `async with database.transaction()` there."
        )

    @classmethod
    def at_odds(cls, asked: str, earlier: str, route: str) -> Self:
        """Make the error for two dependencies that ask for one mode with different options."""
        return cls(
            f"{route}: {asked} was asked for, and {earlier} by another dependency: put the one that"
            " is meant on the route, where it applies to both."
        )


class ReadOnlyError(InvalidRequestError):
    """Raised when a read-only unit of work is asked to do more than it can; nothing was sent."""


class SessionExpiredError(RuntimeError):
    """Raised when a session is used after the end of the request or block it belonged to."""

    def __init__(self, operation: str, owner: str) -> None:
        super().__init__(
            f"session.{operation}() was called after {owner} had ended, and its session with it."
            " Work that outlives a request opens a session of its own:"
            " `async with database.session() as session:` or `database.transaction()`."
        )


class ConcurrentUseError(RuntimeError):
    """Raised when two tasks use one session at the same time, or another event loop uses it."""

    def __init__(self, operation: str, running: str, owner: str) -> None:
        super().__init__(
            f"{owner}: session.{operation}() was called while session.{running}() was still running"
            " in another task. A session serves one task at a time: await the statements one after"
            " the other, or give each task its own `async with database.session()`."
        )

    @classmethod
    def in_another_loop(cls, what: str, remedy: str) -> Self:
        """Make the error for something that is used in another event loop than its own."""
        return cls.__new__(
            cls,
            f"{what} in another event loop than its own, such as that of `asyncio.run()` in a"
            f" thread. {remedy}",
        )

    @classmethod
    def two_writers(cls, holder: str) -> Self:
        """Make the error for a task that would wait for the lock which it holds itself."""
        return cls.__new__(
            cls,
            "SQLite has one writer at a time, and this task already has it: the transaction of"
            f" {holder}. A second one would wait for it in vain. Use the session that is there, or"
            " end its transaction first, for instance with `await session.commit()`.",
        )

    @classmethod
    def session_in_another_loop(cls, operation: str, owner: str) -> Self:
        """Make the error for a session that is used in another event loop than its own."""
        return cls.in_another_loop(
            f"{owner}: session.{operation}() was called",
            "In a synchronous endpoint call it by"
            f" `anyio.from_thread.run(session.{operation}, ...)`, or open a session in that loop:"
            " `async with database.session() as session:`.",
        )


class FailedTransactionError(PendingRollbackError):
    """Raised in place of a COMMIT that could not keep its promise.

    Either a statement of the transaction failed; its error is the `__cause__`. PostgreSQL answers
    such a COMMIT with ROLLBACK and no error, so the work would be lost silently; the rule is the
    same on every database. Or the connection was terminated because the database was disposed; or
    `session.set_rollback_only()` was called before.
    """

    @classmethod
    def rollback_only(cls) -> Self:
        """Make the error for a COMMIT by hand after `session.set_rollback_only()`."""
        error = cls(statement_failed=False)
        error.args = (
            "session.set_rollback_only() was called for this transaction, so it was rolled back and"
            " not committed. Leave out `await session.commit()`, or call `await session.rollback()`"
            " before the work that is to be committed.",
        )
        return error

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
    """Raised when a test asks a sandbox for something that it cannot do."""


class UncommittedWorkError(InvalidRequestError):
    """Raised when uncommitted work would be discarded, or has been.

    `release()` refuses to discard it, and a `transactional` request fails if its handler has closed
    a session with uncommitted work.
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
    """Raised when the database cannot serve the request now; the base of all that become 503.

    Unless the application handles it, the client gets `application/problem+json` with
    `Retry-After`; the message itself, which names routes, stays in the log.

    Attributes:
        reason: one word for the client: busy, conflict, down, timeout or outcome-unknown.
        public_message: a sentence for the client.
    """

    reason: ClassVar[str]
    public_message: ClassVar[str]


def unavailable_in(error: BaseException | None) -> UnavailableError | None:
    """Return the error itself, or the first of a group that contains no other kind of error.

    For a failed COMMIT it is the error of the statement that failed before, and was swallowed.
    """
    if isinstance(error, UnavailableError):
        return error
    if isinstance(error, FailedTransactionError):
        return unavailable_in(error.__cause__)
    # Only an `ExceptionGroup` has this attribute.
    errors: tuple[BaseException, ...] = getattr(error, "exceptions", ())
    found = [unavailable_in(one) for one in errors]
    return found[0] if found and all(found) else None


class DatabaseBusyError(UnavailableError, PoolTimeoutError):
    """Raised when no connection became free within `pool_timeout`."""

    reason = "busy"
    public_message = "The database has too much to do at the moment. Try again."

    def __init__(self, route: str, holders: list[str]) -> None:
        held = "; ".join(holders) or "connections which are just being opened"
        super().__init__(
            f"{route}: no connection became free in time. The pool is held by: {held}."
            " Make those faster, let them call `await session.release()` around slow work, or"
            " raise pool_size."
        )


class DatabaseConflictError(UnavailableError, OperationalError):
    """Raised when a transaction has lost a conflict with another one; nothing has been applied.

    It failed to be serialized, was the victim of a deadlock, or did not get a lock in time. The
    error of the driver is the `orig`.
    """

    reason = "conflict"
    public_message = "Another request was working on the same data. Try again."

    def __init__(self, message: str, orig: BaseException) -> None:
        super().__init__(None, None, orig)
        self.args = (message,)


class DatabaseDownError(UnavailableError, OperationalError):
    """Raised when the database cannot be reached, or has closed the connection.

    The error of the driver is the `orig` and the `__cause__`. Nothing in the transaction has been
    applied.
    """

    reason = "down"
    public_message = "The database cannot be reached at the moment. Try again."

    def __init__(self, message: str, orig: BaseException) -> None:
        super().__init__(None, None, orig, connection_invalidated=True)
        self.args = (message,)


class OutcomeUnknownError(DatabaseDownError):
    """Raised when COMMIT was sent, but its answer did not arrive, or not in time.

    The transaction may or may not have been applied. Before trying again, the client has to check
    which, unless the request may be applied twice.
    """

    reason = "outcome-unknown"
    public_message = (
        "It is not known whether the request was carried out. Look before you try again."
    )


class DatabaseTimeoutError(UnavailableError, TimeoutError):
    """Raised when the `timeout=` of the mode is over; the running statement was cancelled.

    A `StatementTimeoutError` is one, too.
    """

    reason = "timeout"
    public_message = "The database took too long. Try again."

    def __init__(self, route: str, timeout: float) -> None:
        super().__init__(
            f"{route}: the unit of work was not finished within its timeout of {timeout:g} s, and"
            " has been rolled back."
        )


class StatementTimeoutError(DatabaseTimeoutError, OperationalError):
    """Raised when the server has ended a statement, because its own limit of time was over.

    The limit is PostgreSQL's `statement_timeout`, MySQL's `max_execution_time` or MariaDB's
    `max_statement_time`. The error of the driver is the `orig`.
    """

    def __init__(self, message: str, orig: BaseException) -> None:
        OperationalError.__init__(self, None, None, orig)
        self.args = (message,)
