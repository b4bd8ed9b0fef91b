"""What asgi-db has to know about a database and its driver.

`Driver` is the interface. `AnyDriver` implements it as far as that is possible without knowing the
driver; all others derive from it.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

from sqlalchemy import URL, Engine
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.pool import PoolProxiedConnection

from asgi_db.drivers.sandbox import SandboxRules
from asgi_db.errors import DatabaseDownError
from asgi_db.modes import Mode

BEGIN_OPTION = "asgi_db_begin"
"""The execution option of an engine that says how its transactions begin: a `Beginning`."""

GIVE_UP_AFTER = 60.0
"""Seconds for which asgi-db tries to end a statement at a server that does not answer."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """How a transaction begins, beyond what SQLAlchemy does.

    Attributes:
        statements: the statements to send first.
        autocommit: whether the connection has to be in autocommit; None leaves it as it is.
    """

    statements: tuple[str, ...] = ()
    autocommit: bool | None = None


class Abandoned(NamedTuple):
    """A connection that was discarded while its server may be executing its statement.

    Attributes:
        connected: when the connection was made, by `time.monotonic()`.
        since: when it was discarded.
    """

    connected: float
    since: float


class StandIn:
    """Replaces a driver's connection, as in a sandbox."""

    def is_closed(self) -> bool:
        """Whether it can no longer be used."""
        raise NotImplementedError

    def terminate(self) -> None:
        """Close it at once."""
        raise NotImplementedError


class Driver(Protocol):
    """What asgi-db has to know about a database and its driver.

    Unless the type says otherwise, a connection is the driver's own, not SQLAlchemy's adapter.

    Attributes:
        name: SQLAlchemy's name of the driver, which follows the plus sign in a URL.
        is_supported: whether asgi-db itself opens and closes the connections of this driver;
            otherwise SQLAlchemy does.
        has_deferrable: whether a transaction can wait for a snapshot that needs no locks.
        has_hash_comments: whether `#` begins a comment in this SQL.
        sandbox: the rules of a sandbox for tests; None if there is none.
    """

    name: str
    is_supported: bool
    has_deferrable: bool
    has_hash_comments: bool
    sandbox: type[SandboxRules] | None

    # -- the engine

    def options(self, url: URL, *, pooler: bool) -> dict[str, Any]:
        """Return the arguments of `create_async_engine` that the modes need.

        Args:
            pooler: there is one in between, which pools transactions.
        """
        ...

    def is_in_memory(self, url: URL) -> bool:
        """Return whether each connection to this URL would have its own database in memory."""
        ...

    def prepare(self, engine: Engine, *, pooler: bool, durable: bool) -> None:
        """Prepare an engine that was made with `options`, before it connects.

        Args:
            pooler: there is one in between, which pools transactions.
            durable: whether commits have to survive a crash of the machine.
        """

    # -- a connection

    @property
    def connect_errors(self) -> tuple[type[Exception], ...]:
        """The errors of `connect` that mean that the database cannot be reached."""
        ...

    def connect(self, *args: Any, **kwargs: Any) -> Awaitable[Any]:
        """Connect; takes the arguments of the driver's own function."""
        ...

    def is_closed(self, connection: Any) -> bool:
        """Return whether the driver knows that a connection is closed; costs no round trip."""
        ...

    def terminate(self, connection: Any) -> None:
        """Close a connection at once, without notice to the server, in any event loop or none."""

    def leave_to_parent(self, connection: Any) -> None:
        """Keep this forked process from touching a connection of its parent."""

    # -- a transaction

    def begin_options(self, mode: Mode, *, is_prepared: bool) -> dict[str, Any]:
        """Return the execution options of an engine whose transactions begin as the mode requires.

        Args:
            is_prepared: whether `prepare` has prepared the engine.
        """
        ...

    def begin(self, pooled: PoolProxiedConnection, beginning: Beginning) -> None:
        """Begin a transaction as an engine's `BEGIN_OPTION` says; SQLAlchemy does the rest."""

    def enter_autocommit(self, connection: DBAPIConnection) -> None:
        """Put a connection into autocommit, unless `begin` does."""

    def leave_autocommit(self, connection: DBAPIConnection) -> None:
        """Undo `enter_autocommit` when the connection is returned; costs no round trip."""

    # -- an error

    def is_own_error(self, error: BaseException) -> bool:
        """Return whether this is an error of the driver that SQLAlchemy does not wrap."""
        ...

    def is_conflict(self, error: BaseException) -> bool:
        """Return whether the database has rolled back a transaction in favor of another one."""
        ...

    def is_outage(self, error: BaseException) -> bool:
        """Return whether the server is starting, shutting down, or refusing more connections."""
        ...

    def code(self, error: BaseException) -> str | None:
        """Return the database's code for an error, which unlike its text contains no user data."""
        ...

    def advice(self, error: BaseException) -> str | None:
        """Return a sentence of advice for an error whose message seldom names the cause."""
        ...

    # -- an abandoned statement

    def id_at_server(self, connection: Any) -> int | None:
        """Return the number by which the server knows this connection, if it has one."""
        ...

    def interrupt(self, connection: Any) -> Coroutine[Any, Any, None] | None:
        """Return a coroutine that ends the connection's statement, if the driver can do that."""
        ...

    async def end_statements(
        self, connection: AsyncConnection, abandoned: dict[int, Abandoned]
    ) -> None:
        """End the statements of abandoned connections, and remove those that have been ended.

        Args:
            connection: a connection to the same server, in autocommit.
            abandoned: the abandoned connections, by their numbers at the server.
        """


class AnyDriver:
    """The defaults for a database and a driver about which nothing is known."""

    name = ""
    is_supported = False
    has_deferrable = False
    has_hash_comments = False
    sandbox: type[SandboxRules] | None = None

    def options(self, url: URL, *, pooler: bool) -> dict[str, Any]:
        return {}

    def is_in_memory(self, url: URL) -> bool:
        return False

    def prepare(self, engine: Engine, *, pooler: bool, durable: bool) -> None:
        pass

    @property
    def connect_errors(self) -> tuple[type[Exception], ...]:
        return (OSError,)

    def connect(self, *args: Any, **kwargs: Any) -> Awaitable[Any]:
        raise NotImplementedError

    def is_closed(self, connection: Any) -> bool:
        return isinstance(connection, StandIn) and connection.is_closed()

    def terminate(self, connection: Any) -> None:
        if isinstance(connection, StandIn):
            return connection.terminate()
        try:
            self._terminate(connection)
        except RuntimeError:  # The event loop of the connection is closed.
            shut_socket(connection)

    def _terminate(self, connection: Any) -> None:
        raise NotImplementedError

    def leave_to_parent(self, connection: Any) -> None:
        pass

    def begin_options(self, mode: Mode, *, is_prepared: bool) -> dict[str, Any]:
        if mode.autocommit:
            return {"isolation_level": "AUTOCOMMIT"}
        isolation = "REPEATABLE READ" if mode.snapshot else mode.isolation
        return {} if isolation is None else {"isolation_level": isolation}

    def begin(self, pooled: PoolProxiedConnection, beginning: Beginning) -> None:
        for statement in beginning.statements:
            cursor = pooled.cursor()
            try:
                cursor.execute(statement)
            finally:
                cursor.close()

    def enter_autocommit(self, connection: DBAPIConnection) -> None:
        pass

    def leave_autocommit(self, connection: DBAPIConnection) -> None:
        pass

    def is_own_error(self, error: BaseException) -> bool:
        return False

    def is_conflict(self, error: BaseException) -> bool:
        return False

    def is_outage(self, error: BaseException) -> bool:
        return False

    def code(self, error: BaseException) -> str | None:
        return None

    def advice(self, error: BaseException) -> str | None:
        return None

    def id_at_server(self, connection: Any) -> int | None:
        return None

    def interrupt(self, connection: Any) -> Coroutine[Any, Any, None] | None:
        return None

    async def end_statements(
        self, connection: AsyncConnection, abandoned: dict[int, Abandoned]
    ) -> None:
        abandoned.clear()


def shut_socket(connection: Any) -> None:
    """Shut down a connection's socket without its event loop, so that at least the server notices.

    The transport has no public API; the test of applications that start again without
    having been shut down, in `test_lifespan.py`, breaks when this changes.
    """
    # These errors mean that the socket is closed, or belongs to uvloop.
    with contextlib.suppress(OSError, TypeError, AttributeError):
        connection._transport.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


class AutocommitRequests:
    """The connections for which a direct user of the engine has asked for AUTOCOMMIT.

    SQLAlchemy does not pass this on to `do_begin`, and the connection does not show it, because
    asgi-db decides about autocommit at each begin.
    """

    def __init__(self) -> None:
        self._connections = WeakSet[Any]()

    def watch(self, dialect: Dialect, after: Callable[[Any], None] | None = None) -> None:
        """Record the isolation levels that are set through a dialect.

        Args:
            after: called with the adapted connection after a level other than AUTOCOMMIT was set.
        """
        set_isolation_level = dialect.set_isolation_level

        def set_and_record(connection: DBAPIConnection, level: Any) -> None:
            set_isolation_level(connection, level)
            driver_connection = dialect.get_driver_connection(connection)
            if level == "AUTOCOMMIT":
                self._connections.add(driver_connection)
                return
            self._connections.discard(driver_connection)
            if after is not None:
                after(connection)

        dialect.set_isolation_level = set_and_record  # type: ignore[method-assign, assignment]

    def __contains__(self, connection: Any) -> bool:
        return bool(self._connections) and connection in self._connections


def cause_of(error: BaseException) -> str:
    """Name an error of the driver, for a message."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def connection_error(error: BaseException, where: str = "") -> DatabaseDownError:
    """Make the error for a connection that is closed or could not be opened.

    Args:
        error: the error of the driver or the network.
        where: names the request or block, at the beginning of the message.
    """
    return DatabaseDownError(f"{where}the database cannot be reached ({cause_of(error)})", error)
