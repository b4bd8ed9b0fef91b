"""What a sandbox has to know of a database: each driver's file has its rules, or none."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, ClassVar, Protocol

from sqlalchemy.ext.asyncio import AsyncConnection

INTERRUPT_AGAIN = 0.05
"""Seconds after which a statement is interrupted again: the first time may have been too early."""


class SandboxConnection(Protocol):
    """The one real connection of a sandbox, in whose event loop the rules run."""

    @property
    def adapted(self) -> Any:
        """The driver's connection as SQLAlchemy has adapted it."""
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
    """What stands for a connection in a sandbox; its transactions are savepoints."""

    def commit(self) -> None:
        """Commit what is open."""

    def rollback(self) -> None:
        """Roll back what is open."""


class SandboxControl(Protocol):
    """How an application controls transactions on a connection that SQLAlchemy has adapted.

    SQLAlchemy asks each driver for autocommit in another way. An object of this kind has the
    attributes and methods with which it does so; each stand-in for a connection has one, and takes
    everything else from the real connection.
    """

    @property
    def is_autocommit(self) -> bool:
        """Whether each statement is a transaction of its own."""
        ...


class SandboxRules:
    """What is special about a database in a sandbox; this class has nothing special.

    Attributes:
        begin: begins the transaction that is rolled back at the end of the sandbox.
    """

    begin: ClassVar[str] = "BEGIN"

    def __init__(self, connection: SandboxConnection) -> None:
        """Prepare the rules for one sandbox.

        Args:
            connection: it is not open yet.
        """
        self.connection = connection

    def control(self, stand_in: SandboxStandIn) -> SandboxControl:
        """Return what a stand-in for a connection has of its own."""
        raise NotImplementedError

    def begin_nothing(self) -> None:
        """Keep the driver from beginning and ending transactions; called in a greenlet."""
        raise NotImplementedError

    def is_in_transaction(self) -> bool:
        """Return whether the transaction is still open at the server, without a round trip."""
        raise NotImplementedError

    async def interrupt(self, running: asyncio.Future[Any], *, only_reads: bool) -> None:
        """Interrupt a statement whose result nobody awaits any more, if that harms no other.

        Args:
            running: done when the statement has ended.
            only_reads: whether it changes nothing.
        """
        raise NotImplementedError

    async def before_close(self) -> None:
        """Interrupt what keeps a connection from being closed that was invalidated."""

    async def opened(self) -> None:
        """Note what was there when the sandbox began."""

    def check(self, sql: str) -> None:
        """Refuse a statement which would end the transaction.

        Raises:
            SandboxError: it would.
        """

    def is_ignored(self, sql: str) -> bool:
        """Return whether a statement sets up a connection, and the real one was set up so."""
        return False

    async def begun(self, control: Any) -> None:
        """Give a savepoint the characteristics that its transaction asks for.

        Args:
            control: what `control` has returned for its stand-in.
        """

    def local_settings(self, sql: str, parameters: Any) -> Sequence[str]:
        """Return the names of what a statement sets until the end of its transaction."""
        return ()

    async def read_setting(self, name: str) -> str:
        """Return the value that a setting has now."""
        raise NotImplementedError

    async def check_deferred(self) -> None:
        """Check the constraints which a COMMIT would check now.

        Raises:
            Exception: what the driver raises for one that is violated.
        """

    def is_rolled_back(self, error: Exception) -> bool:
        """Return whether a COMMIT would have been a ROLLBACK, instead of raising this error."""
        return False

    async def committed(self, settings: Mapping[str, str]) -> None:
        """Undo what lasts until COMMIT and no longer.

        Args:
            settings: what `local_settings` has named, and the values from before.
        """
