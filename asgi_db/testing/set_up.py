"""How the real connection is set up: by each `connect` listener of the application, once.

SQLAlchemy calls these listeners for the real connection, and again for each stand-in. A statement
such as `ATTACH DATABASE` or `CREATE TEMPORARY TABLE` would fail the second time, so statements that
return no rows are sent only once; and a method of the connection, such as `run_async` with a codec,
is called only once.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry, Pool

from asgi_db.testing.cursor import StandInCursor, execute
from asgi_db.testing.transaction import Statement


class SetUpCalls:
    """The methods of the real connection that its set-up has called, with their results."""

    def __init__(self) -> None:
        self._results: dict[str, list[Any]] = {}

    def once(
        self, earlier: Counter[str], name: str, call: Callable[[], Any], args: Sequence[Any]
    ) -> Any:
        """Call a method unless an earlier set-up has called it as often; return its result.

        Args:
            earlier: how often this set-up has called each method before.
            name: of the method.
            call: calls it.
            args: what it is called with.
        """
        results = self._results.setdefault(name, [])
        number = earlier[name]
        earlier[name] += 1
        if number < len(results):
            for argument in args:
                if inspect.iscoroutine(argument):
                    argument.close()  # nothing will await it
        else:
            results.append(call())
        return results[number]


class RecordedConnection:
    """The real connection in its pool, which records the statements that are sent there.

    Everything else is left to SQLAlchemy's adapter of the connection.
    """

    __slots__ = ("_adapted", "_calls", "_set_up", "_set_up_calls")

    _calls: Counter[str]
    _set_up_calls: SetUpCalls

    def __init__(
        self, adapted: DBAPIConnection, set_up: list[Statement], set_up_calls: SetUpCalls
    ) -> None:
        super().__setattr__("_adapted", adapted)
        super().__setattr__("_calls", Counter[str]())
        super().__setattr__("_set_up", set_up)
        super().__setattr__("_set_up_calls", set_up_calls)

    def __getattr__(self, name: str) -> Any:
        attribute: Any = getattr(self._adapted, name)
        if name.startswith("_") or name in _CONTROL or not inspect.ismethod(attribute):
            return getattr(self._adapted, name)
        return partial(self._use, name, attribute)

    def _use(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call: Callable[[], Any] = partial(function, *args, **kwargs)
        return self._set_up_calls.once(self._calls, name, call, args)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._adapted, name, value)

    @property
    def adapted(self) -> Any:
        """The connection itself."""
        return self._adapted

    def cursor(self, *_: Any, **__: Any) -> StandInCursor:
        """Return a cursor that records its statements."""
        return StandInCursor(self._run, self._adapted.cursor())

    def execute(self, sql: str, parameters: Any = None) -> StandInCursor:
        """Execute a statement with a cursor of its own."""
        cursor = self.cursor()
        cursor.execute(sql, parameters)
        return cursor

    def _run(self, statement: Statement) -> Any:
        cursor = execute(self._adapted, statement)
        if cursor.description is None:
            self._set_up.append(statement)
        return cursor


_CONTROL = frozenset({"close", "commit", "ping", "rollback", "terminate"})
"""What a stand-in does by itself."""

Creator = Callable[[ConnectionPoolEntry], Any]


def replace_creator(pool: Pool, replacement: Callable[[Creator], Creator]) -> Creator:
    """Replace the function with which a pool makes its connections, and return the old one.

    The event `do_connect` is not sent if an engine has a `creator` or an `async_creator`, and there
    is no other public API; the test of such engines in `test_sandbox.py` breaks when this changes.
    """
    creator: Creator = pool._invoke_creator  # pyright: ignore[reportPrivateUsage]
    restore_creator(pool, replacement(creator))
    return creator


def restore_creator(pool: Pool, creator: Creator) -> None:
    """Set the function with which a pool makes its connections."""
    setattr(pool, "_creator", creator)  # noqa: B010  # Its type is private too.
