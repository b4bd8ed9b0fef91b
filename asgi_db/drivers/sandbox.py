"""What a sandbox has to know about a database; each driver's file defines its rules."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, ClassVar, Protocol

from sqlalchemy.ext.asyncio import AsyncConnection

INTERRUPT_AGAIN = 0.05
"""Seconds after which an interrupt is repeated, because the first may have come too early."""


class SandboxConnection(Protocol):
    """The one real connection of a sandbox, in whose event loop the rules run."""

    @property
    def adapted(self) -> Any:
        """SQLAlchemy's adapter of the driver's connection."""
        ...

    @property
    def driver(self) -> Any:
        """The driver's own connection."""
        ...

    @property
    def is_busy(self) -> bool:
        """Whether a statement is being executed."""
        ...

    async def fetch(self, sql: str, parameters: Any = None) -> Sequence[Any]:
        """Execute a statement at once, and return its rows."""
        ...

    def side_connection(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Open another connection to the same server, in autocommit."""
        ...


class SandboxStandIn(Protocol):
    """Replaces a connection in a sandbox; its transactions are savepoints."""

    def commit(self) -> None:
        """Commit the open transaction."""

    def rollback(self) -> None:
        """Roll back the open transaction."""


class SandboxControl(Protocol):
    """How SQLAlchemy controls the transactions of a stand-in for a connection.

    SQLAlchemy sets autocommit differently for each driver. This object has the attributes and
    methods with which it does so. Each stand-in has one; everything else comes from the real
    connection.
    """

    @property
    def is_autocommit(self) -> bool:
        """Whether each statement is a transaction of its own."""
        ...


class SandboxRules:
    """The peculiarities of a database in a sandbox; this base class has none.

    Attributes:
        begin: the statement that begins the transaction of the sandbox.
    """

    begin: ClassVar[str] = "BEGIN"

    def __init__(self, connection: SandboxConnection) -> None:
        """Prepare the rules for one sandbox.

        Args:
            connection: the connection of the sandbox, which is not open yet.
        """
        self.connection = connection

    def control(self, stand_in: SandboxStandIn) -> SandboxControl:
        """Return the transaction controls of a stand-in for a connection."""
        raise NotImplementedError

    def begin_nothing(self) -> None:
        """Keep the driver from beginning and ending transactions; called in a greenlet."""
        raise NotImplementedError

    def is_in_transaction(self) -> bool:
        """Return whether the transaction is still open at the server, without a round trip."""
        raise NotImplementedError

    async def interrupt(self, running: asyncio.Future[Any], *, only_reads: bool) -> None:
        """Interrupt an abandoned statement, if that does not harm any other.

        Args:
            running: done when the statement has ended.
            only_reads: whether it changes nothing.
        """
        raise NotImplementedError

    async def before_close(self) -> None:
        """Interrupt a statement that keeps the connection from being closed."""

    async def opened(self) -> None:
        """Record the initial state when the sandbox begins."""

    def check(self, sql: str) -> None:
        """Refuse a statement that would end the transaction.

        Raises:
            SandboxError: the statement would do so.
        """

    def is_ignored(self, sql: str) -> bool:
        """Return whether a statement sets up a connection in a way the real one already is."""
        return False

    def lives_in_loop(self, value: object) -> bool:
        """Return whether a value of the driver is awaited in its connection's event loop.

        Args:
            value: what a method of its connection has returned, or of such a value.
        """
        return False

    async def begun(self, control: Any) -> None:
        """Give a savepoint the characteristics that its transaction asks for.

        Args:
            control: the controls that `control` has returned for its stand-in.
        """

    def local_settings(self, sql: str, parameters: Any) -> Sequence[str]:
        """Return the names of the settings that a statement changes until its transaction ends."""
        return ()

    async def read_setting(self, name: str) -> str:
        """Return the present value of a setting."""
        raise NotImplementedError

    async def check_deferred(self) -> None:
        """Check the constraints that a COMMIT would check now.

        Raises:
            Exception: a constraint is violated; this is the error of the driver.
        """

    def is_rolled_back(self, error: Exception) -> bool:
        """Return whether a real COMMIT would silently roll back instead of raising this error."""
        return False

    async def committed(self, settings: Mapping[str, str]) -> None:
        """Undo the settings that end with a COMMIT.

        Args:
            settings: the earlier values of the settings that `local_settings` named.
        """
