"""Cursors whose rows are fetched at once, and how the real connection gets their statements."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from asgi_db.tasks import current_task
from asgi_db.testing.transaction import Outcome, Statement


def execute(adapted: Any, statement: Statement) -> Outcome:
    """Execute a statement with a cursor of the real connection, in the greenlet that it needs."""
    cursor = adapted.cursor()
    try:
        for name, value in statement.attributes.items():
            setattr(cursor, name, value)
        (cursor.executemany if statement.many else cursor.execute)(
            statement.sql, statement.parameters
        )
        rows = cursor.fetchall() if cursor.description else ()
        lastrowid = getattr(cursor, "lastrowid", None)
        return Outcome(cursor.description, cursor.rowcount, lastrowid, rows)
    finally:
        cursor.close()


class StandInCursor:
    """A cursor whose rows have come as soon as its statement has been executed."""

    arraysize = 1

    def __init__(self, run: Callable[[Statement], Outcome]) -> None:
        self._run = run
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
        self._outcome = self._run(statement)
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
        return self.fetchmany(len(self._rows))

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
        """Do nothing: no cursor is open; SQLAlchemy's `AsyncSession` asks for it."""


_OF_CURSOR = frozenset({"_run", "_outcome", "_rows", "arraysize"})
