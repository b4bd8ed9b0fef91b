"""Cursors whose rows are fetched at once, and the execution of their statements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from asgi_db.sqlalchemy_versions import await_
from asgi_db.tasks import current_task
from asgi_db.testing.transaction import Statement


def execute(adapted: Any, statement: Statement) -> Any:
    """Execute a statement on the real connection; called in a greenlet of SQLAlchemy.

    Returns:
        the adapted connection's cursor, which has fetched its rows. The driver's own cursor is
        closed in the same way as by SQLAlchemy's `AsyncSession`.
    """
    cursor = adapted.cursor()
    try:
        for name, value in statement.attributes.items():
            setattr(cursor, name, value)
        (cursor.executemany if statement.many else cursor.execute)(
            statement.sql, statement.parameters
        )
        await_(cursor._async_soft_close())
    except BaseException:
        cursor.close()
        raise
    return cursor


class StandInCursor:
    """Replaces a cursor, and shows the real one once a statement has been executed."""

    __slots__ = ("_asked", "_cursor", "_run", "_unused")

    def __init__(self, run: Callable[[Statement], Any], unused: Any) -> None:
        """Prepare it.

        Args:
            run: executes a statement, and returns the real cursor; None if there is none.
            unused: a real cursor that has executed nothing.
        """
        self._asked: dict[str, Any] = {}
        self._run = run
        self._cursor = self._unused = unused

    def __getattr__(self, name: str) -> Any:
        return self._asked[name] if name in self._asked else getattr(self._cursor, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # SQLAlchemy's asyncpg dialect uses an attribute of the cursor to mark stale caches.
        if name in StandInCursor.__slots__:
            super().__setattr__(name, value)
        else:
            self._asked[name] = value

    def __iter__(self) -> Iterator[Any]:
        return iter(self._cursor)

    def execute(self, sql: str, parameters: Any = None) -> None:
        """Execute a statement."""
        statement = Statement(sql, parameters, False, current_task(), self._asked)
        self._cursor = self._run(statement) or self._unused

    def executemany(self, sql: str, parameters: Any) -> None:
        """Execute a statement for each of several sets of parameters."""
        statement = Statement(sql, parameters, True, current_task(), self._asked)
        self._cursor = self._run(statement) or self._unused

    def close(self) -> None:
        """Forget the rows; the driver's own cursor is closed already."""
        self._cursor = self._unused

    async def _async_soft_close(self) -> None:
        """Do nothing, because the driver's own cursor is closed already."""
