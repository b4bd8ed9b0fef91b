"""The session that handlers get."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast, get_args

from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction

from asgi_db.unit.hooks import Hook, HookFunction, When
from asgi_db.unit.origin import Origin
from asgi_db.unit.sync_session import UnitSession
from asgi_db.unit.unit_of_work import UnitOfWork


class _Transaction(AsyncSessionTransaction):
    """The block of `async with session.begin()`, whose COMMIT is not cut off either."""

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
        await self._unit_of_work.run_hooks()

    async def __aexit__(
        self,
        type_: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        async def leave() -> None:
            await super(_Transaction, self).__aexit__(type_, value, traceback)

        if type_ is None:
            await self._end(leave)
        else:
            await self._watched("rollback", leave)
            with contextlib.suppress(Exception):  # it is logged, and masks no other
                await self._unit_of_work.run_hooks()

    async def _end(self, end: Callable[[], Awaitable[None]]) -> None:
        if self.nested:
            await self._watched("begin_nested", end)
        else:
            await self._unit_of_work.commit(end)

    async def _watched(self, operation: str, end: Callable[[], Awaitable[None]]) -> None:
        unit, session = self._unit_of_work, cast(UnitSession, self.session.sync_session)
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
                if self.nested and isinstance(error, Exception):  # which confines it
                    unit.transaction.failure = failure


class DBSession(AsyncSession):
    """SQLAlchemy's `AsyncSession`, inside the unit of work of a request or a block."""

    sync_session_class = UnitSession

    unit: UnitOfWork | None = None
    """What watches over it; None before its first use."""

    def __init__(self, origin: Origin) -> None:
        """Place a session; what it is made of comes with its first use.

        Args:
            origin: what it is for.
        """
        self.origin = origin

    if not TYPE_CHECKING:  # where it would make a wrong name look right

        def __getattr__(self, name: str) -> Any:
            """Make what `AsyncSession.__init__` makes, when something of it is first missed."""
            if name.startswith("__") or "sync_session" in self.__dict__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            unit = self.unit_of_work
            super().__init__(unit.life.engine, unit_of_work=unit, **self.origin.session_options)
            return getattr(self, name)

    @property
    def unit_of_work(self) -> UnitOfWork:
        """What watches over it; it is made when something first needs it."""
        unit = self.unit
        if unit is None:
            unit = self.unit = UnitOfWork(self, self.origin)
            if self.origin.is_over:
                unit.close()
        return unit

    def begin(self) -> AsyncSessionTransaction:
        """Begin a transaction in a block, at whose end it is committed or rolled back."""
        return _Transaction(self, self.unit_of_work)

    def begin_nested(self) -> AsyncSessionTransaction:
        """Begin a savepoint in a block, at whose end it is released or rolled back to."""
        return _Transaction(self, self.unit_of_work, nested=True)

    async def commit(self) -> None:
        """Commit the transaction; a cancellation waits until the database has answered.

        Raises:
            SQLAlchemyError: the commit failed, and the transaction is rolled back.
            OutcomeUnknownError: COMMIT was sent, and its answer was lost or did not come in time.
        """
        await self.unit_of_work.commit(super().commit)

    @property
    def attempt(self) -> int:
        """Which attempt at the request this is, from 1; see `transactional(retries=…)`."""
        return self.origin.attempt

    async def rollback(self) -> None:
        """Roll the transaction back, and run the hooks that wait for that."""
        await super().rollback()
        await self.unit_of_work.run_hooks()

    def on_commit(
        self,
        function: HookFunction,
        *,
        when: When = "before_response",
        robust: bool = False,
    ) -> None:
        """Call a function after the transaction that is open, or comes next, was committed.

        The functions are called in the order in which they were added. It is forgotten if the
        transaction is rolled back, or the savepoint in which it was added. Whatever it does, the
        commit stands. Where nothing is to be committed, it is called if the request succeeds.

        Args:
            function: takes nothing; may be `async`. It has `HOOKS_TIMEOUT` seconds left if the
                request is cancelled meanwhile.
            when: "before_response" (right after the COMMIT), or "after_response".
            robust: an error of the function is only logged. Otherwise it is logged too, and then
                raised like one of the endpoint, when all functions were called; after the response
                there is nobody to raise it to.

        Raises:
            TypeError: `function` cannot be called.
            SessionExpiredError: the request is over.
        """
        if when not in get_args(When):
            raise ValueError(f"when={when!r} is unknown: use one of {', '.join(get_args(When))}.")
        self._add_hook(Hook(function, "commit", when, robust))

    def on_rollback(self, function: HookFunction) -> None:
        """Call a function after the transaction that is open, or comes next, was rolled back.

        Its errors are only logged: they mask none that led there. It is forgotten with the
        savepoint in which it was added.

        Args:
            function: takes nothing; may be `async`.

        Raises:
            TypeError: `function` cannot be called.
            SessionExpiredError: the request is over.
        """
        self._add_hook(Hook(function, "rollback"))

    def _add_hook(self, hook: Hook) -> None:
        if not callable(hook.function):
            raise TypeError(
                f"session.on_{hook.outcome}() takes a function, not {hook.function!r}: leave out"
                " the brackets behind it, or use functools.partial for its arguments."
            )
        self.unit_of_work.add_hook(hook)

    async def release(self) -> None:
        """Give the connection back to the pool now, for instance around a slow outgoing call.

        The transaction ends; objects that were loaded stay usable, and the next statement
        begins anew on whichever connection is free.

        Raises:
            UncommittedWorkError: the transaction holds writes; commit or roll back first.
        """
        await self.unit_of_work.release()
