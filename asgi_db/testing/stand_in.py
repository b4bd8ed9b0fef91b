"""What stands in the pools in place of the drivers' connections while a sandbox lasts.

    every pool of the database ──▶ SandboxedConnection ─┐
    in whichever event loop    ──▶ SandboxedConnection ─┼──▶ SharedConnection, in its own thread
                               ──▶ SandboxedConnection ─┘

The engine, its pools, its events and the units of work run as in production: only what is under
them is another. To it a transaction is a savepoint of the shared connection.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

from anyio.from_thread import BlockingPortal
from sqlalchemy.engine import Dialect
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util import await_

from asgi_db.drivers.base import StandIn
from asgi_db.engine import UNIT_INFO
from asgi_db.tasks import current_task
from asgi_db.testing.shared import Outcome, SharedConnection, Statement

_TRANSACTION = re.compile(
    r"\s*(?:(?P<begin>BEGIN|START\s+TRANSACTION)\b|(?P<commit>COMMIT|END)\b"
    r"|(?P<rollback>ROLLBACK|ABORT)(?!.*\bTO\b)|(?P<set>SET\s+(?:SESSION\s+|LOCAL\s+)?TRANSACTION)\b)",
    re.IGNORECASE | re.DOTALL,
)


class SandboxedConnection:
    """Stands for a driver's connection, as SQLAlchemy adapts it to its pools.

    Attributes:
        readonly: the transactions only read.
        has_begun: whether a transaction is open, as far as SQLAlchemy knows.
        has_written: whether it has done more than to read.
        savepoint: the outermost savepoint of its own that is open.
        has_failed: whether a statement of it has failed.
        is_closed: whether it was given up.
        settings: what the transaction has set until its end, and the values from before.
        task: the task that has begun it.
        cut_off: done when nobody waits any more for its statement; None while none runs.
    """

    def __init__(self, shared: SharedConnection, entry: ConnectionPoolEntry | None) -> None:
        self.readonly = False
        self.deferrable = False
        self.has_begun = False
        self.has_written = False
        self.has_failed = False
        self.savepoint: str | None = None
        self.settings: dict[str, str] = {}
        self.task: asyncio.Task[Any] | None = None
        self.cut_off: asyncio.Future[None] | None = None
        self.is_closed = False
        self._shared = shared
        self._entry = entry
        self._connection = SandboxedDriver(self, shared)  # where SQLAlchemy looks for it

    def __getattr__(self, name: str) -> Any:
        """Return what else the adapted connection has: `create_function`, for one."""
        if name.startswith("_"):
            raise AttributeError(name)
        attribute = self._shared.adapted(name)
        return partial(self._wait_for, self._shared.use, name) if callable(attribute) else attribute

    @property
    def driver_connection(self) -> SandboxedDriver:
        """What stands for the driver's own connection."""
        return self._connection

    @property
    def stands_alone(self) -> bool:
        """Whether a statement that comes now stands alone, in autocommit."""
        raise NotImplementedError

    @property
    def gives_way(self) -> bool:
        """Whether its transaction may begin anew with its next statement."""
        return not self.has_written and self.savepoint is None

    def describe(self) -> str:
        """Name who has it, for messages."""
        unit = None if self._entry is None else self._entry.info.get(UNIT_INFO)
        return "the engine, without a session" if unit is None else str(unit.describe())

    def forget(self) -> None:
        """Note that the transaction is over."""
        self.has_begun = self.has_written = self.has_failed = False
        self.savepoint = None
        self.settings.clear()
        self.task = None

    def cursor(self, server_side: Any = False) -> SandboxedCursor:
        """Return a cursor; its rows are fetched at once, also where it is for a server's cursor."""
        return SandboxedCursor(self)

    def execute(self, sql: str, parameters: Any = None) -> SandboxedCursor:
        """Execute a statement with a cursor of its own."""
        cursor = self.cursor()
        cursor.execute(sql, parameters)
        return cursor

    def run(self, statement: Statement) -> Outcome:
        """Execute a statement in the transaction, or alone."""
        if found := _TRANSACTION.match(statement.sql):
            self._control(found.lastgroup or "")
            return Outcome()
        self.has_begun = self.has_begun or not self.stands_alone
        outcome: Outcome = self._wait_for(self._shared.execute, self, statement)
        return outcome

    def _control(self, verb: str) -> None:
        if verb == "begin":
            self.has_begun = True  # the savepoint comes with the first statement
        elif verb == "commit":
            self.commit()
        elif verb == "rollback":
            self.rollback()
        # What SET TRANSACTION asks for cannot be had in the middle of one.

    def commit(self) -> None:
        """Commit, as far as the sandbox lets anything be committed."""
        if self.has_begun:
            self._wait_for(self._shared.commit, self)

    def rollback(self) -> None:
        """Roll back."""
        if self.has_begun and not self._shared.is_closed:
            self._wait_for(self._shared.rollback, self)

    def ping(self, reconnect: bool = False) -> None:
        """Give a sign of life, if the sandbox has not ended."""

    def close(self) -> None:
        """Give it up."""
        self.is_closed = True
        if not self._shared.is_closed:
            self._shared.portal.start_task_soon(self._shared.abandon, self)

    terminate = close

    def _wait_for(
        self, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any, **kwargs: Any
    ) -> Any:
        self._shared.check_open()
        return await_(in_thread(self._shared.portal, partial(function, *args, **kwargs)))


async def in_thread(
    portal: BlockingPortal, function: Callable[[], Coroutine[Any, Any, Any]]
) -> Any:
    """Await something in the sandbox's thread, where it goes on if this task is cancelled."""
    begun: Future[Any] = portal.start_task_soon(function)
    future = asyncio.wrap_future(begun)
    future.add_done_callback(lambda done: done.cancelled() or done.exception())  # taken note of
    await asyncio.wait((future,))
    return future.result()


class _OnAsyncpg(SandboxedConnection):
    isolation_level: str | None = None

    @property
    def autocommit(self) -> bool:
        """Whether each statement stands alone."""
        return self.isolation_level == "autocommit"

    @autocommit.setter
    def autocommit(self, value: bool) -> None:
        self.isolation_level = "autocommit" if value else None

    def set_isolation_level(self, level: str) -> None:
        """Take note of autocommit; no other level can be had in a sandbox."""
        self.rollback()
        self.isolation_level = level

    @property
    def stands_alone(self) -> bool:
        return self.autocommit and not self.has_begun


class _OnAsyncmy(SandboxedConnection):
    _autocommit = False

    def autocommit(self, value: Any) -> None:
        """Let each statement stand alone, or not."""
        if value and not self._autocommit:
            self.commit()  # as the server does
        self._autocommit = bool(value)

    def get_autocommit(self) -> bool:
        """Whether each statement stands alone."""
        return self._autocommit

    @property
    def stands_alone(self) -> bool:
        return self._autocommit and not self.has_begun


class _OnAiosqlite(SandboxedConnection):
    isolation_level: str | None = ""

    @property
    def stands_alone(self) -> bool:
        return self.isolation_level is None and not self.has_begun

    def run(self, statement: Statement) -> Outcome:
        if _PRAGMA.match(statement.sql):
            return Outcome()  # the shared connection has its settings, which hold for a transaction
        return super().run(statement)


_PRAGMA = re.compile(
    r"\s*PRAGMA\s+(?:journal_mode|synchronous|foreign_keys|busy_timeout)\s*=", re.IGNORECASE
)

_KINDS: dict[str, type[SandboxedConnection]] = {
    "asyncpg": _OnAsyncpg,
    "asyncmy": _OnAsyncmy,
    "aiosqlite": _OnAiosqlite,
}


def sandboxed_connection(
    shared: SharedConnection, dialect: Dialect, entry: ConnectionPoolEntry | None
) -> SandboxedConnection:
    """Make what stands in the pool for a connection of this dialect's driver."""
    return _KINDS[dialect.driver](shared, entry)


class SandboxedDriver(StandIn):
    """Stands for the driver's own connection."""

    def __init__(self, connection: SandboxedConnection, shared: SharedConnection) -> None:
        self._of = connection
        self._shared = shared

    def __getattr__(self, name: str) -> Any:
        """Return what else the driver's connection has; what would end it, it has not."""
        if name.startswith("_") or name in ("interrupt", "close", "stop"):
            raise AttributeError(name)
        attribute = getattr(self._shared.driver, name)
        if not inspect.iscoroutinefunction(attribute):
            return attribute

        async def call(*args: Any, **kwargs: Any) -> Any:
            use = partial(self._shared.use_driver, name, *args, **kwargs)
            return await in_thread(self._shared.portal, use)

        return call

    def is_closed(self) -> bool:
        """Whether it can be used no more."""
        return self._of.is_closed or self._shared.has_gone

    def terminate(self) -> None:
        """Give it up; the shared connection goes on."""
        self._of.terminate()

    def get_transaction_status(self) -> bool:
        """Whether a transaction is open."""
        return self._of.has_begun


class SandboxedCursor:
    """A cursor whose rows have come as soon as its statement has been executed."""

    arraysize = 1

    def __init__(self, connection: SandboxedConnection) -> None:
        self._of = connection
        self._outcome = Outcome()
        self._rows: deque[Any] = deque()

    def execute(self, sql: str, parameters: Any = None) -> None:
        """Execute a statement."""
        self._execute(sql, parameters, many=False)

    def executemany(self, sql: str, parameters: Any) -> None:
        """Execute a statement for each of several parameters."""
        self._execute(sql, parameters, many=True)

    def _execute(self, sql: str, parameters: Any, *, many: bool) -> None:
        # SQLAlchemy's asyncpg dialect says in an attribute of the cursor when its caches are stale.
        attributes = {k: v for k, v in vars(self).items() if k not in _OF_CURSOR}
        statement = Statement(sql, parameters, many, current_task(), attributes)
        self._outcome = self._of.run(statement)
        self._rows = deque(self._outcome.rows)

    @property
    def description(self) -> Any:
        """The columns."""
        return self._outcome.description

    @property
    def rowcount(self) -> int:
        """How many rows were changed, or found."""
        return self._outcome.rowcount

    @property
    def lastrowid(self) -> Any:
        """The number that the database has given to a new row."""
        return self._outcome.lastrowid

    def fetchone(self) -> Any:
        """Return the next row."""
        return self._rows.popleft() if self._rows else None

    def fetchmany(self, size: int | None = None) -> list[Any]:
        """Return the next rows."""
        count = min(self.arraysize if size is None else size, len(self._rows))
        return [self._rows.popleft() for _ in range(count)]

    def fetchall(self) -> list[Any]:
        """Return all further rows."""
        rows = list(self._rows)
        self._rows.clear()
        return rows

    def __iter__(self) -> Iterator[Any]:
        while self._rows:
            yield self._rows.popleft()

    def nextset(self) -> None:
        """There is no further result."""

    def setinputsizes(self, *_: Any) -> None:
        """Do nothing: the drivers need it no more than this."""

    def close(self) -> None:
        """Forget the rows."""
        self._rows.clear()

    async def _async_soft_close(self) -> None:
        """Do nothing: there is no cursor open; SQLAlchemy's `AsyncSession` asks for it."""


_OF_CURSOR = frozenset({"_of", "_outcome", "_rows", "arraysize"})
