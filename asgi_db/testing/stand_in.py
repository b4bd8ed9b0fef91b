"""The stand-ins that replace the drivers' connections in the pools during a sandbox.

    every pool of the database ──▶ StandInConnection ─┐
    in each of its event loops ──▶ StandInConnection ─┼──▶ SharedConnection, in its own thread
                               ──▶ StandInConnection ─┘

The engine, its pools, its events and the units of work run as in production; only the connections
under them differ. A stand-in intercepts the control of transactions, and maps them to savepoints of
the shared connection. Everything else it takes from there, so that it looks like the real
connection with every driver.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from sqlalchemy.pool import ConnectionPoolEntry

from asgi_db.drivers.protocol import StandIn
from asgi_db.engine.unit import UNIT_INFO
from asgi_db.sqlalchemy_versions import await_
from asgi_db.tasks import current_task
from asgi_db.testing.cursor import StandInCursor
from asgi_db.testing.elsewhere import called_elsewhere
from asgi_db.testing.shared import SharedConnection, in_thread
from asgi_db.testing.transaction import SandboxedTransaction, Statement

_CONTROL = re.compile(
    r"\s*(?:(?P<begin>BEGIN|START\s+TRANSACTION)\b|(?P<commit>COMMIT|END)\b"
    r"|(?P<rollback>ROLLBACK|ABORT)(?!.*\bTO\b)|(?P<set>SET\s+(?:SESSION\s+|LOCAL\s+)?TRANSACTION)\b)",
    re.IGNORECASE | re.DOTALL,
)


class StandInConnection:
    """Replaces SQLAlchemy's adapter of a driver's connection."""

    __slots__ = ("_calls", "_connection", "_control", "_setting_up", "_shared", "_transaction")

    def __init__(self, shared: SharedConnection, entry: ConnectionPoolEntry | None) -> None:
        """Replace a connection that a pool asks for.

        Args:
            entry: the place of the connection in the pool.
        """
        self._shared = shared
        self._setting_up: list[Statement] | None = []
        self._calls = Counter[str]()
        self._control = control = shared.rules.control(self)
        self._transaction = SandboxedTransaction(partial(_describe, entry), control)
        # SQLAlchemy uses the same name.
        self._connection = StandInDriver(self, shared, self._transaction)

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute of the adapted connection, such as `create_function`."""
        if not name.startswith("_") and hasattr(self._control, name):
            return getattr(self._control, name)
        attribute = getattr(self._shared.adapted, name)
        return partial(self._use, name, attribute) if inspect.ismethod(attribute) else attribute

    def __setattr__(self, name: str, value: Any) -> None:
        if name in StandInConnection.__slots__:
            super().__setattr__(name, value)
        elif hasattr(self._control, name):
            setattr(self._control, name, value)
        else:
            self._use(name, partial(setattr, self._shared.adapted), name, value)

    def _use(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = partial(self._shared.call, function, *args, **kwargs)
        wait = partial(self._wait_for, self._shared.use, self._transaction, current_task(), call)
        if self._setting_up is None:
            return wait()
        return self._shared.set_up_calls.once(self._calls, name, wait, args)

    def _wait_for(self, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> Any:
        self._shared.check_open()
        return await_(in_thread(self._shared.portal, function, *args))

    @property
    def driver_connection(self) -> StandInDriver:
        """The stand-in for the driver's own connection."""
        return self._connection

    def cursor(self, server_side: Any = False) -> StandInCursor:
        """Return a cursor; its rows are fetched at once, even if it is a server-side cursor."""
        return StandInCursor(self._run, self._shared.unused_cursor)

    def execute(self, sql: str, parameters: Any = None) -> StandInCursor:
        """Execute a statement with a cursor of its own."""
        cursor = self.cursor()
        cursor.execute(sql, parameters)
        return cursor

    def _run(self, statement: Statement) -> Any:
        if found := _CONTROL.match(statement.sql):
            self._control_by(found.lastgroup or "")
            return None
        if self._shared.rules.is_ignored(statement.sql):
            return None
        if self._setting_up is None:
            return self._execute(statement)
        if statement in self._shared.set_up:
            return None
        cursor = self._execute(statement)
        if cursor.description is None:
            self._setting_up.append(statement)
        return cursor

    def _execute(self, statement: Statement) -> Any:
        transaction = self._transaction
        transaction.has_begun = transaction.has_begun or not transaction.stands_alone
        return self._wait_for(self._shared.execute, transaction, statement)

    def _control_by(self, verb: str) -> None:
        if verb == "begin":
            # The savepoint is set with the first statement.
            self._transaction.has_begun = True
        elif verb == "commit":
            self.commit()
        elif verb == "rollback":
            self.rollback()
        # SET TRANSACTION is ignored, because it has no effect in the middle of a transaction.

    def is_set_up(self) -> None:
        """Record the statements that have set up the connection."""
        self.commit()
        self._shared.set_up.extend(self._setting_up or ())
        self._setting_up = None

    def commit(self) -> None:
        """Commit: keep the work until the sandbox ends."""
        if self._transaction.has_begun:
            self._wait_for(self._shared.commit, self._transaction)

    def rollback(self) -> None:
        """Roll back."""
        if self._transaction.has_begun and not self._shared.is_closed:
            self._wait_for(self._shared.rollback, self._transaction)

    def ping(self, *_: Any, **__: Any) -> None:
        """Raise an error if the sandbox has ended."""
        self._shared.check_open()

    def close(self) -> None:
        """Close the stand-in; the shared connection stays open."""
        self._transaction.is_closed = True
        if not self._shared.is_closed:
            self._shared.portal.start_task_soon(self._shared.abandon, self._transaction)

    terminate = close


def _describe(entry: ConnectionPoolEntry | None) -> str:
    unit = None if entry is None else entry.info.get(UNIT_INFO)
    return "the engine, without a session" if unit is None else str(unit.describe())


class StandInDriver(StandIn):
    """Replaces the driver's own connection."""

    def __init__(
        self, of: StandInConnection, shared: SharedConnection, transaction: SandboxedTransaction
    ) -> None:
        self._of = of
        self._shared = shared
        self._transaction = transaction

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute of the driver's connection, unless it would harm others."""
        if name.startswith("_") or name in ("interrupt", "close", "stop"):
            raise AttributeError(name)
        attribute = getattr(self._shared.driver, name)
        return called_elsewhere(attribute, self._use, self._shared.rules.lives_in_loop)

    async def _use(self, function: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        use = partial(self._shared.use, self._transaction, current_task(), function)
        return await in_thread(self._shared.portal, use)

    async def lend(self, function: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        """Await what a function does with the driver's own connection, in its event loop."""
        return await self._use(partial(function, self._shared.driver))

    def is_closed(self) -> bool:
        """Whether it can no longer be used."""
        return self._transaction.is_closed or not self._shared.is_usable

    def terminate(self) -> None:
        """Close the stand-in; the shared connection stays open."""
        self._of.terminate()

    def begin_now(self) -> None:
        """Begin a transaction, unless each statement stands alone."""
        transaction = self._transaction
        transaction.has_begun = transaction.has_begun or not transaction.stands_alone

    def get_transaction_status(self) -> bool:
        """Whether a transaction is open."""
        return self._transaction.has_begun
