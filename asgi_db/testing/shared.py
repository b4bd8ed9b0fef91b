"""The one connection that everything in a sandbox shares.

    BEGIN
        SAVEPOINT   a transaction of the application, or of the test
        RELEASE     its COMMIT
        SAVEPOINT   …
        ROLLBACK TO its ROLLBACK
    ROLLBACK        the end of the sandbox

Only one of these transactions can be open at a time. A transaction that has only read gives way to
another one: its savepoint is released, which does no harm, and its next statement sets a new one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

from anyio.from_thread import BlockingPortal
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from asgi_db.drivers import driver_of
from asgi_db.drivers.sandbox import SandboxRules
from asgi_db.errors import SandboxError
from asgi_db.logs import logger
from asgi_db.pool.abandoned import side_connection
from asgi_db.testing.cursor import execute
from asgi_db.testing.set_up import Creator, RecordedConnection, SetUpCalls, replace_creator
from asgi_db.testing.transaction import SandboxedTransaction, Statement

WAIT_TIMEOUT = 5.0
"""Seconds that a transaction waits for the end of another one that has written."""

CLOSE_TIMEOUT = 5.0
"""Seconds that the end of a sandbox waits for a running statement."""

_SAVEPOINT = "asgi_db_sandbox"


class SharedConnection:
    """The one real connection, with a transaction that is never committed.

    Its coroutines run in the event loop of the sandbox's thread.
    """

    def __init__(
        self, engine: AsyncEngine, portal: BlockingPortal, rules: type[SandboxRules]
    ) -> None:
        """Prepare it; nothing is opened yet.

        Args:
            engine: an engine for this connection alone.
            portal: gives access to the event loop of the connection.
            rules: the rules of the engine's database.
        """
        self.portal = portal
        self.rules = rules(self)
        self.adapted: Any = None
        self.unused_cursor: Any = None
        self.set_up: list[Statement] = []
        self.set_up_calls = SetUpCalls()
        self.is_closed = False
        self._engine = engine
        self._connection: AsyncConnection | None = None
        self._floor: SandboxedTransaction | None = None
        self._turn = asyncio.Condition()

    # -- from BEGIN to ROLLBACK ----------------------------------------------------------------

    async def open(self) -> None:
        """Connect, and begin the transaction that will be rolled back."""
        replace_creator(self._engine.pool, self._recorded)
        self._connection = await self._engine.connect()
        recorded: Any = (await self._connection.get_raw_connection()).dbapi_connection
        self.adapted = recorded.adapted
        self.unused_cursor = await self.call(self.adapted.cursor)
        await self.call(self.rules.begin_nothing)
        await self.fetch(self.rules.begin)
        await self.rules.opened()

    def _recorded(self, creator: Creator) -> Creator:
        return lambda entry: RecordedConnection(creator(entry), self.set_up, self.set_up_calls)

    async def close(self) -> None:
        """Roll everything back, and disconnect."""
        self.is_closed = True
        if self._connection is None:
            return
        try:
            if self._floor is not None:
                self._floor.interrupt()
            async with asyncio.timeout(CLOSE_TIMEOUT), self._turn:
                await self.fetch("ROLLBACK")
        except Exception as error:
            # The server rolls back when the connection is closed.
            logger.warning("The sandbox's connection is terminated: %s", type(error).__name__)
            await self.rules.before_close()
            await self._connection.invalidate()
        await self._connection.close()

    @property
    def driver(self) -> Any:
        """The driver's own connection."""
        return self.adapted.driver_connection

    @property
    def is_usable(self) -> bool:
        """Whether the sandbox has not ended, and its connection is open."""
        return not (self.is_closed or self._is_disconnected())

    @property
    def is_busy(self) -> bool:
        """Whether a statement is being executed."""
        return self._turn.locked()

    def side_connection(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Open another connection to the same server, in autocommit."""
        return side_connection(self._engine)

    # -- statements ----------------------------------------------------------------------------

    async def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function of the adapted connection in a greenlet of SQLAlchemy."""
        assert self._connection is not None
        return await self._connection.run_sync(lambda _: function(*args, **kwargs))

    async def fetch(self, sql: str, parameters: Any = None) -> Sequence[Any]:
        """Execute a statement without waiting for a turn, and return its rows."""
        cursor = await self._send(Statement(sql, parameters, many=False, task=None))
        rows: Sequence[Any] = cursor.fetchall()
        return rows

    async def _send(self, statement: Statement) -> Any:
        return await self.call(execute, self.adapted, statement)

    async def execute(self, transaction: SandboxedTransaction, statement: Statement) -> Any:
        """Execute a statement in a transaction when its turn comes.

        Returns:
            the cursor, which has fetched its rows.

        Raises:
            SandboxError: another transaction has written and does not end.
        """
        async with self._turn:
            self.rules.check(statement.sql)
            await self._take_floor(transaction, statement.task)
            try:
                await self._save_settings(transaction, statement)
                cursor = await self._run(transaction, statement)
            except BaseException:
                transaction.has_failed = True
                if transaction.stands_alone and self._is_in_transaction():
                    await self._undo(transaction)
                raise
            self._check_usable(transaction)
            transaction.executed(statement)
            if transaction.stands_alone:
                await self._keep(transaction)
            return cursor

    async def _save_settings(self, transaction: SandboxedTransaction, statement: Statement) -> None:
        if not statement.many:
            for name in self.rules.local_settings(statement.sql, statement.parameters):
                if name not in transaction.settings:
                    transaction.settings[name] = await self.rules.read_setting(name)

    async def _run(self, transaction: SandboxedTransaction, statement: Statement) -> Any:
        running = asyncio.ensure_future(self._send(statement))
        interrupted = asyncio.get_running_loop().create_future()
        transaction.interrupted = interrupted
        try:
            await asyncio.wait((running, interrupted), return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                # This turn must not end before, or the interrupt could hit the next statement.
                await self._interrupt(running, statement)
                await asyncio.wait((running,))
            return running.result()
        except asyncio.CancelledError:
            raise SandboxError("The statement was cancelled.") from None
        finally:
            transaction.interrupted = None

    async def _interrupt(self, running: asyncio.Future[Any], statement: Statement) -> None:
        try:
            await self.rules.interrupt(running, only_reads=statement.only_reads)
        except (SQLAlchemyError, OSError) as error:
            logger.warning("A cancelled statement runs on: %s", type(error).__name__)

    async def use(
        self,
        transaction: SandboxedTransaction,
        task: asyncio.Task[Any] | None,
        function: Callable[[], Coroutine[Any, Any, Any]],
    ) -> Any:
        """Await a method of the real connection other than a statement, when its turn comes.

        In a transaction it counts as a write, because it may be COPY.
        """
        async with self._turn:
            if not transaction.has_begun:
                self._check_usable(transaction)
                return await function()
            await self._take_floor(transaction, task)
            transaction.has_written = True
            try:
                return await function()
            except BaseException:
                transaction.has_failed = True
                raise

    # -- transactions, as savepoints -----------------------------------------------------------

    async def _take_floor(
        self, transaction: SandboxedTransaction, task: asyncio.Task[Any] | None
    ) -> None:
        self._check_usable(transaction)
        if self._floor is not transaction:
            await self._wait_for_floor(transaction, task)
            self._check_usable(transaction)
            if self._floor is not None:
                # Its holder has only read, and sets a new savepoint with its next statement.
                await (self._undo(self._floor) if self._floor.has_failed else self._release())
            await self.fetch(f"SAVEPOINT {_SAVEPOINT}")
            self._floor = transaction
            await self.rules.begun(transaction.control)
        transaction.task = task

    async def _wait_for_floor(
        self, transaction: SandboxedTransaction, task: asyncio.Task[Any] | None
    ) -> None:
        try:
            async with asyncio.timeout(WAIT_TIMEOUT):
                while (holder := self._floor) is not None and not holder.gives_way:
                    if task is not None and holder.task is task:
                        raise _deadlock(transaction, holder)
                    await self._turn.wait()
        except TimeoutError:
            raise _deadlock(transaction, self._floor or transaction) from None

    def _check_usable(self, transaction: SandboxedTransaction) -> None:
        self.check_open()
        if transaction.is_closed:
            raise SandboxError("The connection was closed before the statement had ended.")
        if not self._is_in_transaction():
            # Anything that is sent from now on would be committed.
            self.is_closed = True
            raise SandboxError(
                "The sandbox has ended early: the database itself has ended its transaction, for"
                " instance after a deadlock, or at a statement that commits."
            )

    def _is_disconnected(self) -> bool:
        return driver_of(self._engine.dialect).is_closed(self.driver)

    def _is_in_transaction(self) -> bool:
        # On a closed connection the error of the next statement explains the problem better.
        return self._is_disconnected() or self.rules.is_in_transaction()

    def check_open(self) -> None:
        """Refuse to do anything after the end.

        Raises:
            SandboxError: the sandbox has ended.
        """
        if self.is_closed:
            raise SandboxError(
                "The sandbox has ended, and what belongs to it can do nothing more: end sessions"
                " and requests inside `database.sandbox()`."
            )

    async def commit(self, transaction: SandboxedTransaction) -> None:
        """Keep the work of a transaction until the sandbox ends."""
        async with self._turn:
            if self._floor is transaction:
                await self._keep(transaction)
            transaction.ended()

    async def rollback(self, transaction: SandboxedTransaction) -> None:
        """Undo the work of a transaction."""
        async with self._turn:
            if self._floor is transaction and self._is_in_transaction():
                await self._undo(transaction)
            transaction.ended()

    async def abandon(self, transaction: SandboxedTransaction) -> None:
        """Undo a transaction whose connection was closed, perhaps during a statement."""
        transaction.interrupt()
        if not self.is_closed:
            await self.rollback(transaction)

    async def _keep(self, transaction: SandboxedTransaction) -> None:
        try:
            if transaction.has_written:
                await self.rules.check_deferred()
            await self._release()
        except Exception as error:
            await self._undo(transaction)
            if not self.rules.is_rolled_back(error):
                raise
        else:
            await self.rules.committed(transaction.settings)
            transaction.undone()

    async def _release(self) -> None:
        await self.fetch(f"RELEASE SAVEPOINT {_SAVEPOINT}")
        self._leave_floor()

    async def _undo(self, transaction: SandboxedTransaction) -> None:
        try:
            await self.fetch(f"ROLLBACK TO SAVEPOINT {_SAVEPOINT}")
            await self.fetch(f"RELEASE SAVEPOINT {_SAVEPOINT}")
        except Exception:
            # The savepoint no longer exists, nor does the transaction around it.
            self.is_closed = True
            raise
        finally:
            transaction.undone()
            self._leave_floor()

    def _leave_floor(self) -> None:
        self._floor = None
        self._turn.notify_all()


def _deadlock(transaction: SandboxedTransaction, holder: SandboxedTransaction) -> SandboxError:
    return SandboxError(
        f"{transaction.describe()}: in a sandbox there is one connection, and {holder.describe()}"
        " has written on it, or has a savepoint open, without having ended its transaction. In"
        " production these are two connections, of which the second would not see what the first"
        " has not committed. Commit or roll back first, for instance with `await session.commit()`."
    )


async def in_thread(
    portal: BlockingPortal,
    function: Callable[..., Coroutine[Any, Any, Any]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a coroutine in the sandbox's thread, where it continues if this task is cancelled."""
    begun: Future[Any] = portal.start_task_soon(partial(function, *args, **kwargs))
    future = asyncio.wrap_future(begun)
    # This marks the exception as retrieved.
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    await asyncio.wait((future,))
    return future.result()
