"""How a transaction ends: the I/O of a COMMIT or ROLLBACK, and of giving a connection back.

Whether to commit is decided elsewhere. A connection whose transaction cannot be ended properly, or
in time, is terminated: it goes back to the pool clean, or not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

import anyio
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util.concurrency import in_greenlet

from asgi_db.drivers.describing import brief
from asgi_db.drivers.statements import Effect
from asgi_db.engine.unit import has_unseen_writes
from asgi_db.errors import (
    DatabaseDownError,
    DatabaseTimeoutError,
    FailedTransactionError,
    OutcomeUnknownError,
)
from asgi_db.logs import logger
from asgi_db.unit.deadline import Deadline
from asgi_db.unit.operation import Operation
from asgi_db.unit.transaction import Stage, Transaction

CLEANUP_TIMEOUT = 5.0
"""Seconds that a ROLLBACK may take before its connection is terminated instead."""


COMMIT_TIMEOUT = 30.0
"""Seconds that a COMMIT may take before its outcome counts as unknown, if the mode has no
`timeout=`."""

LEAST_COMMIT_TIMEOUT = 1.0
"""Seconds that a COMMIT has at least, even if the mode's `timeout=` is nearly over."""


def has_changes(session: Session | None) -> bool:
    """Return whether there are objects that a flush would write."""
    return session is not None and (
        session.identity_map.check_modified() or bool(session.new or session.deleted)
    )


def give_back(session: Session, connections: Iterable[Connection]) -> None:
    """Roll back and return the connections, but keep the loaded objects usable.

    `Session.rollback()` would expire every object, and `Session.close()` would detach them all.
    Outside SQLAlchemy's greenlets nothing can be sent, so there the connections are invalidated.

    Args:
        session: the session.
        connections: those of its transaction.
    """
    if not in_greenlet():
        for connection in connections:
            if not connection.closed:
                connection.invalidate()
    give_back_silently(session)


def give_back_silently(session: Session) -> None:
    """Return the connections of a transaction for whose end nothing is sent."""
    while (
        transaction := session.get_nested_transaction() or session.get_transaction()
    ) is not None:
        # No public method of the session itself ends a transaction in this way.
        transaction.close()


class EndableSession(AsyncSession):
    """A session as the end of its unit uses it: these two do not ask the unit of work again."""

    commit_in_unit = AsyncSession.commit
    rollback_in_unit = AsyncSession.rollback


class Ending:
    """The end of one transaction of a session."""

    def __init__(
        self,
        session: EndableSession,
        transaction: Transaction,
        deadline: Deadline | None,
        describe: Callable[[], str],
        translate: Callable[[BaseException], Exception | None],
    ) -> None:
        """Prepare it.

        Args:
            session: the session.
            transaction: the open transaction.
            deadline: the deadline of the unit, if it has one; a COMMIT has
                `LEAST_COMMIT_TIMEOUT` in any case.
            describe: names the request or block, for messages.
            translate: returns the library's own error in place of another, if there is one.
        """
        self._session = session
        self._transaction = transaction
        self._deadline = deadline
        self._describe = describe
        self._translate = translate

    async def commit(
        self,
        commit: Callable[[], Awaitable[None]],
        log_failure: Callable[[BaseException], None],
    ) -> None:
        """Commit in time, or roll back.

        Without a `timeout=` only the COMMIT itself is limited, not the flush before it.

        Args:
            commit: commits.
            log_failure: called with the error before the ROLLBACK.

        Raises:
            OutcomeUnknownError: COMMIT was sent but not answered in time.
            DatabaseTimeoutError: COMMIT was not sent in time.
            Exception: the commit failed.
        """
        transaction = self._transaction
        if self._deadline is None:
            transaction.when_sent = self._limit_commit
        else:
            self._deadline.watch_task(LEAST_COMMIT_TIMEOUT)
        try:
            if transaction.streams:
                await self._close_streams_in_time()
            if transaction.was_handed_out and transaction.failure is None:
                await self._session.run_sync(self._refuse_unseen_failure)
            await commit()
        except BaseException as error:
            own = self._overdue(error) or self._translate(error)
            transaction.fail()
            log_failure(own or error)
            await self._close_by(self._session.rollback_in_unit(), self._session.close)
            if own is not None:
                raise own from own.__cause__ or error
            raise
        else:
            self._overdue(None)
        finally:
            transaction.when_sent = None

    def _limit_commit(self) -> None:
        if self._deadline is None:
            self._deadline = Deadline(COMMIT_TIMEOUT)
            self._deadline.watch_task()

    def _overdue(self, error: BaseException | None) -> Exception | None:
        """Stop watching the COMMIT, and return the error for one that took too long."""
        deadline = self._deadline
        if deadline is None or not deadline.has_cancelled(error):
            return None
        if self._transaction.stage is not Stage.SENT:
            return DatabaseTimeoutError(self._describe(), deadline.allowed)
        return OutcomeUnknownError(
            f"{self._describe()}: COMMIT was sent and not answered within {deadline.allowed:.1f} s,"
            " so whether it was carried out is unknown",
            TimeoutError(),
        )

    async def roll_back_unit(
        self, straggler: Operation | None, *, looks_for_writes: bool = False
    ) -> None:
        """Roll back at the end of a unit; after mere reads the loaded objects stay usable.

        Args:
            straggler: an operation still running in another task; it is cancelled first.
            looks_for_writes: note first whether the driver's own connection was used to write.
        """
        rollback = self._roll_back_after(straggler, looks_for_writes=looks_for_writes)
        await self._close_by(rollback, self._session.close)

    async def give_back(self) -> None:
        """Give the connection back, but keep the loaded objects usable."""
        await self._close_by(self._give_back_after_streams(), self._keep_objects)

    async def _roll_back_after(
        self, straggler: Operation | None, *, looks_for_writes: bool
    ) -> None:
        if straggler is not None and straggler.task is not None:
            # Ending a session in the middle of another task's statement would break it.
            straggler.task.cancel()
            await asyncio.wait((straggler.task,))
        transaction = self._transaction
        await self._close_streams()
        if looks_for_writes and transaction.was_handed_out and transaction.failure is None:
            await self._session.run_sync(self._note_unseen_writes)
        has_work = transaction.effect.writes or has_changes(self._session.sync_session)
        if has_work or transaction.failure is not None:
            await self._session.rollback_in_unit()
        else:
            await self._session.run_sync(give_back, self._transaction.connections)

    def _refuse_unseen_failure(self, _: Session) -> None:
        """Refuse the COMMIT of a transaction that the database has aborted unseen.

        PostgreSQL answers it with a ROLLBACK, and the driver takes that for a success.
        """
        for connection in self._transaction.connections:
            try:
                has_unseen_writes(connection)
            except DatabaseDownError:
                raise
            except Exception as error:
                raise FailedTransactionError(statement_failed=True) from error

    def _note_unseen_writes(self, _: Session) -> None:
        # In a transaction that the database has aborted, this question fails too.
        with contextlib.suppress(Exception):
            if any(map(has_unseen_writes, self._transaction.connections)):
                self._transaction.effect = Effect.WRITES

    async def _give_back_after_streams(self) -> None:
        await self._close_streams()
        await self._session.run_sync(give_back, self._transaction.connections)

    async def _keep_objects(self) -> None:
        """End a transaction without writes after its connection was closed; keep the objects."""
        with contextlib.suppress(SQLAlchemyError):
            await self._session.run_sync(give_back, self._transaction.connections)

    async def _close_streams_in_time(self) -> None:
        try:
            async with asyncio.timeout(COMMIT_TIMEOUT):
                await self._close_streams()
        except TimeoutError:
            raise DatabaseTimeoutError(self._describe(), COMMIT_TIMEOUT) from None

    async def _close_streams(self) -> None:
        """Close the open cursors, which on MariaDB would otherwise seem to be exhausted."""

        def close(_: Session) -> None:
            for stream in streams:
                stream.close()

        if streams := self._transaction.streams:
            await self._session.run_sync(close)

    async def _close_by(
        self, closing: Coroutine[Any, Any, None], after_termination: Callable[[], Awaitable[None]]
    ) -> None:
        """Close the transaction; if that fails or takes too long, terminate its connections.

        Args:
            closing: closes the transaction.
            after_termination: ends it for the session once its connections are closed.
        """
        connections = self._transaction.connections
        try:
            async with asyncio.timeout(CLEANUP_TIMEOUT):
                await closing
        except Exception as error:
            logger.error("%s: ROLLBACK failed: %s", self._describe(), brief(error))
            await self._terminate(connections, after_termination)

    async def _terminate(
        self,
        connections: tuple[Connection, ...],
        after_termination: Callable[[], Awaitable[None]],
    ) -> None:
        try:
            with anyio.move_on_after(CLEANUP_TIMEOUT):
                await self._session.run_sync(lambda _: terminate(connections))
            await after_termination()
        except SQLAlchemyError as error:
            # Another task has ignored its cancellation.
            logger.error("%s: the session is still in use: %s", self._describe(), brief(error))


def terminate(connections: tuple[Connection, ...]) -> None:
    """Invalidate connections, and let the pool know; nothing is sent."""
    for connection in connections:
        if not connection.closed:
            connection.invalidate()
            connection.close()
