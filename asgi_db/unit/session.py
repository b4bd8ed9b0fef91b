"""The session that handlers get, and its synchronous half, which keeps it inside its unit of work.

Every operation of an `AsyncSession`, a lazy load and `run_sync` included, passes through the
public methods of the SQLAlchemy `Session` underneath. That is the one place where this module
stands: it asks the unit of work before each operation and tells it afterwards.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast, get_args

from sqlalchemy import Connection, Engine, event
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction
from sqlalchemy.orm import Session, SessionTransaction

from asgi_db.unit.ending import give_back, has_changes
from asgi_db.unit.hooks import Hook, HookFunction, When
from asgi_db.unit.origin import Origin
from asgi_db.unit.unit_of_work import UnitOfWork


class UnitSession(Session):
    """The synchronous half of `DBSession`."""

    def __init__(self, *args: Any, unit_of_work: UnitOfWork, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unit_of_work = unit_of_work
        unit_of_work.sync_session = self

    def get_bind(self, *args: Any, **kwargs: Any) -> Engine | Connection:
        """Choose the engine by the mode; SQLAlchemy asks here before it takes a connection."""
        return self.unit_of_work.bind(super().get_bind(*args, **kwargs))

    def rollback(self) -> None:
        """Roll back; also what `release` has kept, which is in no transaction."""
        if not self.in_transaction() and has_changes(self):
            Session.begin(self)
        super().rollback()

    def leave(self, error: BaseException | None) -> None:
        """End an operation; in autocommit its connection goes back at once.

        The unit decides, and the connection goes back while the operation still counts as running,
        so that no other task begins one meanwhile.
        """
        unit = self.unit_of_work
        try:
            if error is not None:
                unit.note_error(self, error)
            if unit.lets_connection_go(self, error):
                give_back(self)
        finally:
            unit.leave(error)


def _inside_the_unit(name: str) -> Callable[..., Any]:
    operation = getattr(UnitSession, name)

    @functools.wraps(operation)
    def guarded(self: UnitSession, *args: Any, **kwargs: Any) -> Any:
        unit = self.unit_of_work
        if not unit.enter(name):
            return operation(self, *args, **kwargs)
        try:
            result = operation(self, *args, **kwargs)
        except BaseException as error:
            self.leave(error)
            raise
        self.leave(None)
        options: Mapping[str, Any] | None = kwargs.get("execution_options")
        if options and options.get("stream_results"):  # `AsyncSession.stream`
            unit.stream_opened(result)
        return result

    return guarded


# Every public method of `Session` that may talk to the database; tests hold this list against
# the installed SQLAlchemy.
OPERATIONS = (
    "begin",
    "begin_nested",
    "bulk_insert_mappings",
    "bulk_save_objects",
    "bulk_update_mappings",
    "close",
    "commit",
    "connection",
    "delete",
    "delete_all",
    "execute",
    "flush",
    "get",
    "get_one",
    "invalidate",
    "merge",
    "merge_all",
    "prepare",
    "refresh",
    "reset",
    "rollback",
    "scalar",
    "scalars",
)
for _name in OPERATIONS:
    setattr(UnitSession, _name, _inside_the_unit(_name))


@event.listens_for(UnitSession, "before_flush")
def _before_flush(session: UnitSession, *_: Any) -> None:
    session.unit_of_work.check_flush()


@event.listens_for(UnitSession, "before_commit")
def _before_commit(session: UnitSession) -> None:
    if not session.in_nested_transaction():
        session.unit_of_work.commit_begins()


@event.listens_for(UnitSession, "after_commit")
def _after_commit(session: UnitSession) -> None:
    if not session.in_nested_transaction():
        session.unit_of_work.transaction_committed()


@event.listens_for(UnitSession, "after_begin")
def _after_begin(session: UnitSession, _: SessionTransaction, connection: Connection) -> None:
    session.unit_of_work.transaction_began(connection)


@event.listens_for(UnitSession, "after_transaction_create")
def _after_transaction_create(session: UnitSession, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session.unit_of_work.transaction_created()
    elif transaction.nested:
        session.unit_of_work.savepoint_began(transaction)


@event.listens_for(UnitSession, "after_transaction_end")
def _after_transaction_end(session: UnitSession, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session.unit_of_work.transaction_ended()


@event.listens_for(UnitSession, "after_soft_rollback")
def _after_soft_rollback(session: UnitSession, transaction: SessionTransaction) -> None:
    session.unit_of_work.rolled_back(transaction)


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
        unit.enter(operation)
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
