"""The errors of asgi-db: each message names the cause, then the way out."""

from __future__ import annotations

from sqlalchemy.exc import InvalidRequestError, PendingRollbackError


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
    """Raised when a stronger mode is asked for after a weaker one has run a statement."""

    def __init__(self, asked: str, begun: str, route: str) -> None:
        super().__init__(
            f"{route}: the {asked} mode was asked for after a statement had already run in the"
            f" {begun} mode. Put @{asked} on the route, so that the mode is known from the start,"
            " or call `await session.release()` after the earlier statements."
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
