"""A transaction in a sandbox: its statements, its state, and whether it has work to lose."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from asgi_db.drivers.sandbox import SandboxControl
from asgi_db.drivers.statements import COMMON, Effect

# MySQL executes the text of a comment of this form, which is therefore not skipped: /*! … */.
_READ = re.compile(
    r"(?:[\s(]|/\*(?!M?!).*?\*/|--[^\n]*\n|\#[^\n]*\n)*"
    r"(?:SELECT|WITH|VALUES|TABLE|SHOW|EXPLAIN|DESC|DESCRIBE|PRAGMA)\b",
    re.IGNORECASE | re.DOTALL,
)
_SET_SAVEPOINT = re.compile(r"\s*SAVEPOINT\s+(\S+)", re.IGNORECASE)
_END_SAVEPOINT = re.compile(r"\s*(?:RELEASE|ROLLBACK\s+TO)\s+(?:SAVEPOINT\s+)?(\S+)", re.IGNORECASE)


@dataclass(frozen=True)
class Statement:
    """A statement that a cursor executes.

    Attributes:
        many: whether there are several sets of parameters.
        task: the task that awaits the result.
        attributes: the attributes that SQLAlchemy has set on the cursor.
    """

    sql: str
    parameters: Any
    many: bool
    task: asyncio.Task[Any] | None = field(compare=False)
    attributes: dict[str, Any] = field(default_factory=dict[str, Any], compare=False)

    @property
    def only_reads(self) -> bool:
        """Whether its savepoint can be released without losing any work."""
        return (
            _READ.match(self.sql) is not None
            and COMMON.effect_of(self.sql) < Effect.CALLS
            and "set_config" not in self.sql
        )


@dataclass(eq=False)
class SandboxedTransaction:
    """The transactions of one stand-in for a connection, one after the other.

    Attributes:
        describe: names the request or block that uses the connection.
        control: the transaction controls of the stand-in, such as autocommit.
        has_begun: whether a transaction is open, as far as SQLAlchemy knows.
        has_written: whether it has done more than read.
        has_failed: whether one of its statements has failed.
        savepoint: the outermost of its own open savepoints.
        settings: the earlier values of the settings that it has changed until its end.
        task: the task that sent its latest statement.
        interrupted: done when its running statement is abandoned; None while none is running.
        is_closed: whether the stand-in was closed.
    """

    describe: Callable[[], str]
    control: SandboxControl
    has_begun: bool = False
    has_written: bool = False
    has_failed: bool = False
    savepoint: str | None = None
    settings: dict[str, str] = field(default_factory=dict[str, str])
    task: asyncio.Task[Any] | None = None
    interrupted: asyncio.Future[None] | None = None
    is_closed: bool = False

    @property
    def stands_alone(self) -> bool:
        """Whether the next statement is a transaction of its own, in autocommit."""
        return self.control.is_autocommit and not self.has_begun

    @property
    def gives_way(self) -> bool:
        """Whether its savepoint may be released and set again, because it has only read."""
        return not self.has_written and self.savepoint is None

    def executed(self, statement: Statement) -> None:
        """Note whether the statement has done work that releasing the savepoint would lose."""
        if found := _SET_SAVEPOINT.match(statement.sql):
            self.savepoint = self.savepoint or found[1]
        elif found := _END_SAVEPOINT.match(statement.sql):
            self.savepoint = None if found[1] == self.savepoint else self.savepoint
        elif not statement.only_reads:
            self.has_written = True

    def undone(self) -> None:
        """Note that there is no work to lose."""
        self.has_written = self.has_failed = False
        self.savepoint = None

    def ended(self) -> None:
        """Note that the transaction is over."""
        self.undone()
        self.has_begun = False
        self.settings.clear()
        self.task = None

    def interrupt(self) -> None:
        """Signal that its running statement is abandoned."""
        if self.interrupted is not None and not self.interrupted.done():
            self.interrupted.set_result(None)
