"""What asgi-db asks of a database and of its driver."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy import URL, Connection, Engine
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.pool import PoolProxiedConnection

from asgi_db.drivers.replication import Replication
from asgi_db.drivers.sandbox import SandboxRules
from asgi_db.drivers.statements import Effect
from asgi_db.modes import Mode

BEGIN_OPTION = "asgi_db_begin"
"""The execution option of an engine which says how its transactions begin: a `Beginning`."""

GIVE_UP_AFTER = 60.0
"""Seconds for which asgi-db tries to end a statement at a server that does not answer."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """How a transaction begins, beyond what SQLAlchemy does.

    Attributes:
        statements: what is sent first.
        autocommit: whether the connection has to be in autocommit, or must not be; None leaves it
            as it is.
        writes: whether it takes the lock of the one writer; see `Driver.has_one_writer`.
    """

    statements: tuple[str, ...] = ()
    autocommit: bool | None = None
    writes: bool = False


class StandIn:
    """Stands for a driver's connection where there is none of its own, as in a sandbox."""

    def is_closed(self) -> bool:
        """Whether it cannot be used any more."""
        raise NotImplementedError

    def terminate(self) -> None:
        """Close it at once."""
        raise NotImplementedError

    def begin_now(self) -> None:
        """Begin a transaction, unless each statement stands alone."""
        raise NotImplementedError

    async def lend(self, function: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        """Await what a function does with the driver's own connection, in its event loop."""
        raise NotImplementedError


class Driver(Protocol):
    """What asgi-db has to know of a database and of the driver that talks to it.

    A connection is the driver's own, not as SQLAlchemy adapts it, unless the type says otherwise.

    Attributes:
        name: SQLAlchemy's name of the driver, which stands behind the plus sign in a URL.
        is_supported: whether asgi-db itself connects, and closes, with this driver; else
            SQLAlchemy does.
        has_deferrable: whether a transaction can wait for a snapshot that needs no locks.
        has_double_quoted_strings: whether `"…"` is a string in this SQL, and not a name.
        drops_row_locks: whether SQLAlchemy leaves out FOR UPDATE, which this SQL does not have.
        settings_are_transactional: whether a rollback undoes what a statement has set.
        lock_definitions: the statement that waits until nobody else changes the definitions of
            tables, and keeps others from doing so; none if the transaction itself does that.
        unlock_definitions: the statement that ends this; none if the transaction's end does so.
        ping: a statement whose answer shows that the server works; its value is true where
            transactions can write, as far as one statement can tell.
        tells_autocommit: whether a connection in autocommit is told so by `enter_autocommit`.
        has_one_writer: whether one transaction at a time writes, and the next one waits for it.
        sandbox: the rules of a sandbox for tests; None if there is none.
        replication: how far replicas have come; None if there are none of this database.
    """

    name: str
    is_supported: bool
    has_deferrable: bool
    has_double_quoted_strings: bool
    drops_row_locks: bool
    settings_are_transactional: bool
    lock_definitions: str | None
    unlock_definitions: str | None
    ping: str
    tells_autocommit: bool
    has_one_writer: bool
    sandbox: type[SandboxRules] | None
    replication: Replication | None

    @property
    def packages(self) -> tuple[str, ...]:
        """The packages that define its errors, besides SQLAlchemy."""
        ...

    # -- the engine

    def options(self, url: URL, *, pooler: bool) -> dict[str, Any]:
        """Return the arguments of `create_async_engine` with which the modes work.

        Args:
            pooler: there is one in between, which pools transactions.
        """
        ...

    def translate(self, url: URL) -> tuple[URL, dict[str, Any]]:
        """Translate the options in a URL into arguments of `connect`.

        Returns:
            The URL without the options that were translated, and the arguments.

        Raises:
            ConfigurationError: the driver has nothing for an option, or its value cannot work.
        """
        ...

    def is_in_memory(self, url: URL) -> bool:
        """Say whether each connection to this URL would have a database of its own in memory."""
        ...

    def prepare(self, engine: Engine, *, pooler: bool, durable: bool) -> None:
        """Prepare an engine that was made with `options`, before it connects.

        Args:
            pooler: there is one in between, which pools transactions.
            durable: whether what is committed has to outlast a crash of the machine.
        """

    def extend(self, dialect: Dialect) -> None:
        """Extend the methods of the dialect of any engine, also one of the user's own."""

    # -- a connection

    @property
    def connect_errors(self) -> tuple[type[Exception], ...]:
        """The errors of `connect` which mean that the database cannot be reached."""
        ...

    def connect(self, *args: Any, **kwargs: Any) -> Awaitable[Any]:
        """Connect; takes what the driver's own function takes."""
        ...

    def adopt(self, connection: Any) -> None:
        """Prepare a new connection that `connect` has not made, but a function of the user's."""

    def is_closed(self, connection: Any) -> bool:
        """Say whether the driver knows that this connection is closed; costs no round trip."""
        ...

    def is_in_transaction(self, connection: Any) -> bool:
        """Say whether a transaction is open, as far as that costs no round trip."""
        ...

    def terminate(self, connection: Any) -> None:
        """Close a connection at once, without a word to the server, in any event loop or none."""

    def takes_writes(self, dialect: Dialect, connection: DBAPIConnection) -> bool:
        """Ping a connection that nobody uses, and say whether its server takes writes.

        Raises:
            Exception: of any kind: the connection is closed.
        """
        ...

    def refuses_writes(self, pooled: PoolProxiedConnection) -> bool:
        """Say for certain whether a server refuses writes, where `ping` has not been true."""
        ...

    def leave_to_parent(self, connection: Any) -> None:
        """Let this process, which was forked, not touch a connection of its parent."""

    # -- a transaction

    def begin_options(self, mode: Mode, *, is_prepared: bool) -> dict[str, Any]:
        """Return the execution options of an engine whose transactions begin as the mode says.

        Args:
            is_prepared: whether the engine is one that `prepare` has prepared.
        """
        ...

    def begin(self, pooled: PoolProxiedConnection, beginning: Beginning) -> None:
        """Begin a transaction as an engine's `BEGIN_OPTION` says; SQLAlchemy does the rest.

        It is not called where that says neither a statement nor autocommit.
        """

    def begin_now(self, pooled: PoolProxiedConnection) -> None:
        """Have a transaction begin now that would otherwise begin with its first statement.

        The driver's own connection is then handed out, and what is sent over that is no statement
        of SQLAlchemy's.
        """

    def has_written(self, pooled: PoolProxiedConnection) -> bool:
        """Say whether the open transaction has written, as far as the database tells; it is asked.

        Only for a connection that was handed out, over which more may have been sent.
        """
        ...

    def enter_autocommit(self, connection: DBAPIConnection) -> None:
        """Let each statement stand alone, where `begin` has not seen to that."""

    def returns_silently(self, *, is_prepared: bool) -> bool:
        """Say whether nothing is sent when a connection in autocommit is returned to its pool.

        Args:
            is_prepared: whether its engine is one that `prepare` has prepared.
        """
        ...

    def leave_autocommit(self, connection: DBAPIConnection) -> None:
        """Undo `enter_autocommit`, when the connection is back in the pool; costs no round trip."""

    def ask(self, connection: DBAPIConnection, question: str) -> list[Any]:
        """Ask the server something that stands alone, and is no statement of the application.

        Returns:
            The rows of the answer.
        """
        ...

    # -- a statement

    def effect_of(self, sql: str) -> Effect:
        """Say what a statement does: whether it reads, locks or writes."""
        ...

    # -- an error

    def is_own_error(self, error: BaseException) -> bool:
        """Say whether this is an error of the driver that SQLAlchemy leaves as it is."""
        ...

    def is_conflict(self, error: BaseException) -> bool:
        """Say whether the database has ended a transaction in favor of another one."""
        ...

    def is_outage(self, error: BaseException) -> bool:
        """Say whether the server shuts down, starts, or takes no more connections."""
        ...

    def is_in_doubt(self, error: BaseException) -> bool:
        """Say whether the server, asked to commit, does not know if it has done so."""
        ...

    def is_recovery_conflict(self, error: BaseException) -> bool:
        """Say whether a standby has cancelled a read that was in the way of its replication."""
        ...

    def only_reads(self, error: BaseException) -> bool:
        """Say whether a write was refused because its server, or its transaction, only reads."""
        ...

    def reads_by_choice(self, connection: Connection) -> bool:
        """Say whether it was the user who has made this connection, or its role, only read.

        It may ask, because a write was refused just now.
        """
        ...

    def is_full(self, error: BaseException) -> bool:
        """Say whether the server takes no more connections, although it works."""
        ...

    def time_limit(self, error: BaseException) -> str | None:
        """Name the setting of the server by whose limit a statement was ended, if it was."""
        ...

    def idle_limit(self, connection: Any, *, in_transaction: bool) -> str | None:
        """Name the server's limit for an idle connection, and its value, if it has one."""
        ...

    def remedy(self, error: BaseException) -> str | None:
        """Return the remedy if a connection cannot be made with the settings as they are."""
        ...

    def code(self, error: BaseException) -> str | None:
        """Return the database's code for an error; unlike its text it repeats no value."""
        ...

    def advice(self, error: BaseException) -> str | None:
        """Return a sentence that helps with an error whose cause is seldom what it says."""
        ...

    # -- a statement that was abandoned

    def id_at_server(self, connection: Any) -> int | None:
        """Return the number by which the server knows this connection, if it has one."""
        ...

    def identify(self, dialect: Dialect, connection: DBAPIConnection) -> None:
        """Have a new connection's server say which one it is, for `server_of`; costs a round trip.

        Nothing is noted if that is not known, or if a number would be somebody else's, because
        something in between numbers the connections itself.
        """

    def interrupt(self, connection: Any) -> Coroutine[Any, Any, None] | None:
        """Return what ends the connection's statement, where the driver itself can do that."""
        ...

    async def end_statement(self, connection: AsyncConnection, id: int, age: float) -> None:
        """End an abandoned connection, and so its statement, unless it has ended already.

        Args:
            connection: one to the same server, in autocommit.
            id: its number at that server.
            age: how many seconds ago it was made.
        """
