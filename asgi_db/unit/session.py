"""The session that handlers use."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast, get_args

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    AsyncSessionTransaction,
)

from asgi_db.errors import ConfigurationError, FailedTransactionError
from asgi_db.unit.ending import EndableSession
from asgi_db.unit.hooks import Hook, HookFunction, When
from asgi_db.unit.origin import Origin
from asgi_db.unit.sync_session import PlainUnitSession, UnitSession
from asgi_db.unit.unit_of_work import UnitOfWork

_completing = threading.RLock()
"""Held while a session is completed, which a thread with another event loop may try as well. That
thread then gets an error; two halves of one session would lose what the other half does."""

_BINDS = (AsyncEngine, AsyncConnection, Engine, Connection)


class _Transaction(AsyncSessionTransaction):
    """The block of `async with session.begin()`; a cancellation does not interrupt its COMMIT."""

    __slots__ = ("_unit_of_work",)

    def __init__(
        self, session: AsyncSession, unit_of_work: UnitOfWork, *, nested: bool = False
    ) -> None:
        super().__init__(session, nested=nested)
        self._unit_of_work = unit_of_work

    async def commit(self) -> None:
        await self._end(super().commit)

    async def rollback(self) -> None:
        await self._watched("rollback", super().rollback)
        if not self.nested:
            self._unit_of_work.is_rollback_only = False
        await self._unit_of_work.run_hooks()

    async def __aexit__(
        self,
        type_: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        async def exit_block() -> None:
            was_rolled_back = type_ is None and not self.session.is_active
            await super(_Transaction, self).__aexit__(type_, value, traceback)
            if was_rolled_back:
                # A flush in the block has failed, and SQLAlchemy would end the block in silence.
                raise FailedTransactionError(statement_failed=True) from failure

        failure = self._unit_of_work.transaction.failure
        if type_ is None and not self.nested and self._unit_of_work.is_rollback_only:
            await self.rollback()
            await super().__aexit__(type_, value, traceback)
        elif type_ is None:
            await self._end(exit_block)
        else:
            await self._watched("rollback", exit_block)
            # An error of a hook is logged, and does not mask the error of the block.
            with contextlib.suppress(Exception):
                await self._unit_of_work.run_hooks()

    async def _end(self, end: Callable[[], Awaitable[None]]) -> None:
        if self.nested:
            await self._watched("begin_nested", end)
        else:
            await self._unit_of_work.commit(end)

    async def _watched(self, operation: str, end: Callable[[], Awaitable[None]]) -> None:
        unit, session = self._unit_of_work, cast(UnitSession, self.session.sync_session)
        if unit.operation is not None:
            await unit.wait_for_turn()
        if not session.enter(operation):
            await end()
            return
        error: BaseException | None = None
        try:
            await end()
        except BaseException as raised:
            error = raised
            raise
        finally:
            failure = unit.transaction.failure
            try:
                await self.session.run_sync(lambda _: session.leave(error))
            finally:
                if self.nested and isinstance(error, Exception):
                    # The savepoint has confined the failure.
                    unit.transaction.failure = failure


class DBSession(EndableSession):
    """SQLAlchemy's `AsyncSession`, inside the unit of work of a request or a block."""

    sync_session_class: type[Any] = PlainUnitSession

    unit: UnitOfWork | None = None
    """The unit of work of the session; None before its first use."""

    def __init__(self, origin: Origin | None = None, **options: Any) -> None:
        """Make an empty session, which is completed at its first use.

        Args:
            origin: the request or block that the session is for; asgi-db itself gives it.
            options: none; SQLAlchemy's own are refused with the remedy.

        Raises:
            ConfigurationError: it is made by hand, as an `AsyncSession` is.
        """
        if options or origin is None or isinstance(origin, _BINDS):
            raise ConfigurationError(
                "A DBSession belongs to a request or a block, and is not made by hand: take"
                " `request.state.db`, or use `async with database.session()`. With an engine of its"
                " own, use SQLAlchemy's AsyncSession."
            )
        self.origin = origin

    if not TYPE_CHECKING:  # A type checker would accept every misspelt name.

        def __getattr__(self, name: str) -> Any:
            """Complete the session when an attribute is needed that `AsyncSession` itself sets."""
            if name.startswith("__") or "sync_session" in self.__dict__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            with _completing:
                if "sync_session" not in self.__dict__:
                    unit = self.unit_of_work
                    options = self.origin.session_options
                    super().__init__(bind=unit.life.engine, unit_of_work=unit, **options)
            return getattr(self, name)

    @property
    def unit_of_work(self) -> UnitOfWork:
        """The unit of work of the session, made when it is first needed."""
        unit = self.unit
        if unit is None:
            with _completing:
                unit = self.unit
                if unit is None:
                    unit = self.unit = UnitOfWork(self, self.origin)
                    if self.origin.is_over:
                        unit.close()
        return unit

    def begin(self) -> AsyncSessionTransaction:
        """Begin a transaction for a block, which commits or rolls back at its end."""
        return _Transaction(self, self.unit_of_work)

    def begin_nested(self) -> AsyncSessionTransaction:
        """Begin a savepoint for a block, which releases it or rolls back to it at its end."""
        return _Transaction(self, self.unit_of_work, nested=True)

    async def commit(self) -> None:
        """Commit the transaction; a cancellation waits until the database has answered.

        Raises:
            SQLAlchemyError: the commit failed, and the transaction is rolled back.
            OutcomeUnknownError: COMMIT was sent, but its answer did not arrive, or not in time.
        """
        await self.unit_of_work.commit(self.commit_in_unit)

    @property
    def attempt(self) -> int:
        """The number of this attempt at the request, from 1; see `transactional(retries=…)`."""
        return self.origin.attempt

    async def rollback(self) -> None:
        """Roll the transaction back, and run the hooks that wait for the rollback."""
        await super().rollback()
        await self.unit_of_work.run_hooks()

    def set_rollback_only(self) -> None:
        """Have the work of this request, message or block rolled back at its end.

        The answer leaves as it is, whatever its status, and nothing warns of lost work: for an
        answer that reports an error in its body, as GraphQL does with status 200. A block of
        `begin()` rolls back, and `commit()` raises an error. What comes after a rollback by hand
        is not concerned.

        Raises:
            SessionExpiredError: the request is over.
        """
        self.unit_of_work.set_rollback_only()

    def on_commit(
        self,
        function: HookFunction,
        *,
        when: When = "before_response",
        robust: bool = False,
    ) -> None:
        """Call a function after the current or next transaction has been committed.

        Functions are called in the order in which they were added. A function is discarded if the
        transaction, or the savepoint in which it was added, is rolled back. It cannot undo the
        commit. If there is nothing to commit, it is called if the request succeeds.

        Args:
            function: takes no arguments and may be `async`. If the request is cancelled meanwhile,
                the function still has `HOOKS_TIMEOUT` seconds.
            when: "before_response" (right after the COMMIT), or "after_response".
            robust: only log an error of the function. Otherwise the error is logged, and once all
                functions have been called it is raised like an error of the endpoint. After the
                response errors are only logged.

        Raises:
            TypeError: `function` cannot be called.
            SessionExpiredError: the request is over.
        """
        if when not in get_args(When):
            raise ValueError(f"when={when!r} is unknown: use one of {', '.join(get_args(When))}.")
        self._add_hook(Hook(function, "commit", when, robust))

    def on_rollback(self, function: HookFunction) -> None:
        """Call a function after the current or next transaction has been rolled back.

        Its errors are only logged, so that they do not mask the error that led to the rollback. It
        is discarded if the savepoint in which it was added is rolled back.

        Args:
            function: takes no arguments and may be `async`.

        Raises:
            TypeError: `function` cannot be called.
            SessionExpiredError: the request is over.
        """
        self._add_hook(Hook(function, "rollback"))

    def _add_hook(self, hook: Hook) -> None:
        if not callable(hook.function):
            raise TypeError(
                f"session.on_{hook.outcome}() takes a function, not {hook.function!r}: leave out"
                " the parentheses after its name, or use functools.partial for its arguments."
            )
        self.unit_of_work.add_hook(hook)

    async def release(self) -> None:
        """Give the connection back to the pool now, for example before a slow outgoing call.

        The transaction ends and the loaded objects stay usable. The next statement begins a new
        transaction on any free connection.

        Raises:
            UncommittedWorkError: the transaction holds writes; commit or roll back first.
        """
        await self.unit_of_work.release()
