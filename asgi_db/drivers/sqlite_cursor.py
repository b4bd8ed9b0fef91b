"""A cursor for SQLAlchemy that goes through aiosqlite's thread once for each statement.

SQLAlchemy's own goes there four times: to be made, to execute, to fetch its rows, and to be closed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import islice
from typing import Any, Self, cast

from sqlalchemy.engine import Dialect
from sqlalchemy.engine.default import DefaultExecutionContext
from sqlalchemy.util.concurrency import in_greenlet

from asgi_db.sqlalchemy_versions import await_


def execute_and_fetch(connection: Any, statement: str, parameters: Any) -> Any:
    """Execute a statement in the thread, and return its outcome with its rows."""
    cursor = connection.cursor()
    try:
        cursor.execute(statement, parameters)
        rows = () if cursor.description is None else cursor.fetchall()
        return cursor.description, cursor.rowcount, cursor.lastrowid, rows
    finally:
        cursor.close()


def execute_many(connection: Any, statement: str, parameters: Any) -> Any:
    """Execute a statement in the thread once with each of the parameters."""
    cursor = connection.cursor()
    try:
        cursor.executemany(statement, parameters)
        return cursor.description, cursor.rowcount, cursor.lastrowid, ()
    finally:
        cursor.close()


class OneTripCursor:
    """A cursor of the DBAPI that holds the rows of its last statement.

    Attributes:
        connection: the connection of aiosqlite.
        description: the columns of the rows; None if the statement returns none.
        rowcount: how many rows the statement has changed; -1 if it cannot change any.
        lastrowid: the number of the row that was inserted last.
        arraysize: how many rows `fetchmany` returns if it is not told.
    """

    connection: Any
    description: Any = None
    rowcount = -1
    lastrowid: int | None = None
    arraysize = 1
    _rows: Iterator[Any] = iter(())

    def execute(
        self, statement: str, parameters: Any = None, run: Callable[..., Any] = execute_and_fetch
    ) -> None:
        """Execute a statement, and fetch its rows.

        Args:
            statement: the statement.
            parameters: its parameters, if it has any.
            run: executes it in the thread.
        """
        connection = self.connection
        if parameters is None:
            parameters = ()
        try:
            # There is no public API for the thread; the tests of the trips in
            # `test_thread_of_sqlite.py` break when this changes.
            outcome = await_(connection._execute(run, connection._conn, statement, parameters))
        except ValueError as error:
            raise_if_closed(error)
            raise
        self.description, self.rowcount, self.lastrowid, rows = outcome
        self._rows = iter(rows)

    def executemany(self, statement: str, parameters: Any) -> None:
        """Execute a statement once with each of the parameters."""
        self.execute(statement, parameters, execute_many)

    def setinputsizes(self, *_: Any) -> None:
        """Do nothing, as sqlite3's own cursor does."""

    def __iter__(self) -> Iterator[Any]:
        return self._rows

    def fetchone(self) -> Any:
        """Return the next row; None after the last one."""
        return next(self._rows, None)

    def fetchmany(self, size: int | None = None) -> list[Any]:
        """Return the next rows."""
        return list(islice(self._rows, max(0, self.arraysize if size is None else size)))

    def fetchall(self) -> list[Any]:
        """Return all rows that are left."""
        return list(self._rows)

    def close(self) -> None:
        """Forget the rows; sqlite3's own cursor is closed already."""
        self._rows = iter(())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _async_soft_close(self) -> None:
        """Do nothing: SQLAlchemy closes a cursor in this way whose rows are still to be read."""


def raise_if_closed(error: ValueError) -> None:
    """Raise an error of the DBAPI in place of aiosqlite's for a closed connection.

    Raises:
        sqlite3.OperationalError: the connection is closed.
    """
    if str(error) in ("Connection closed", "no active connection"):
        raise sqlite3.OperationalError(*error.args) from error


def use_one_trip(dialect: Dialect) -> None:
    """Let an engine execute its statements with this cursor, except for those that it streams.

    A connection or a dialect of the user's own that makes its cursors in another way keeps doing
    so; and outside a greenlet SQLAlchemy's cursor fails before the statement counts as sent.
    """
    base = cast("type[DefaultExecutionContext]", dialect.execution_ctx_cls)
    if base.create_default_cursor is not DefaultExecutionContext.create_default_cursor:
        return
    plain_connection = import_module("aiosqlite").Connection

    class Context(base):  # type: ignore[valid-type, misc]
        def create_default_cursor(self) -> Any:
            adapted = self._dbapi_connection.dbapi_connection
            connection = getattr(adapted, "driver_connection", None)
            if type(connection) is not plain_connection or not in_greenlet():
                return super().create_default_cursor()
            cursor = OneTripCursor()
            cursor.connection = connection
            return cursor

    dialect.execution_ctx_cls = Context
