"""Connections of sqlite3 that really end with `close`, and do not leave cursors behind."""

from __future__ import annotations

import sqlite3
from typing import Any
from weakref import WeakSet


class _Cursors:
    """The cursors of a connection."""

    def __init__(self) -> None:
        self._open = WeakSet[Any]()
        self._is_interrupted = False

    def interrupted(self) -> None:
        """Note that the statement which is running is interrupted."""
        self._is_interrupted = True

    def before_next(self) -> None:
        """Close the cursor of an interrupted statement, before the next statement runs.

        SQLAlchemy 2.0 leaves it to the garbage collector, which would wait for that statement's
        end, and keep the whole process waiting, if it came to it meanwhile.
        """
        if self._is_interrupted:
            self._is_interrupted = False
            self.close()

    def add(self, cursor: Any) -> None:
        """Note a new cursor."""
        self._open.add(cursor)

    def close(self) -> None:
        """Close all of them."""
        for cursor in tuple(self._open):
            cursor.close()


class ClosingConnection(sqlite3.Connection):
    """A connection that is really closed, and its transaction over, once `close` returns.

    SQLite closes a connection only when its last statement is finalized: an interrupted statement
    would keep the transaction and its lock until it is garbage collected, and meanwhile the
    interrupted connection would refuse to roll back.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._cursors = _Cursors()

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        self._cursors.before_next()
        cursor: sqlite3.Cursor = super().cursor(*args, **kwargs)
        self._cursors.add(cursor)
        return cursor

    def interrupt(self) -> None:
        self._cursors.interrupted()
        super().interrupt()

    def close(self) -> None:
        self._cursors.close()
        super().close()


class AdoptedConnection:
    """A connection of the user's own making, perhaps of another module, that closes in that way."""

    __slots__ = ("_connection", "_cursors")

    _connection: Any
    _cursors: _Cursors

    def __init__(self, connection: Any) -> None:
        super().__setattr__("_connection", connection)
        super().__setattr__("_cursors", _Cursors())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._connection, name, value)

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        """Make a cursor; takes what the connection itself takes."""
        self._cursors.before_next()
        cursor: Any = self._connection.cursor(*args, **kwargs)
        self._cursors.add(cursor)
        return cursor

    def interrupt(self) -> None:
        """Interrupt the statement that is running."""
        self._cursors.interrupted()
        self._connection.interrupt()

    def close(self) -> None:
        """Close the cursors, and then the connection."""
        self._cursors.close()
        self._connection.close()
