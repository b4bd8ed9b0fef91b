"""What holds for any database and driver, without knowing it; the others derive from it."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any
from weakref import WeakSet

from sqlalchemy import URL, Connection, Engine
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.pool import PoolProxiedConnection

from asgi_db.drivers.outages import REMEDIES
from asgi_db.drivers.protocol import Beginning, Driver, StandIn
from asgi_db.drivers.replication import Replication
from asgi_db.drivers.sandbox import SandboxRules
from asgi_db.drivers.statements import COMMON, Effect
from asgi_db.modes import Mode


class AnyDriver(Driver):
    """What holds for a database and a driver of which nothing is known."""

    name = ""
    is_supported = False
    has_deferrable = False
    has_double_quoted_strings = False
    drops_row_locks = False
    settings_are_transactional = False
    lock_definitions: str | None = None
    unlock_definitions: str | None = None
    ping = "SELECT 1"
    grammar = COMMON
    tells_autocommit = False
    has_one_writer = False
    sandbox: type[SandboxRules] | None = None
    replication: Replication | None = None

    @property
    def packages(self) -> tuple[str, ...]:
        return (self.name,)

    def options(self, url: URL, *, pooler: bool) -> dict[str, Any]:
        return {}

    def translate(self, url: URL) -> tuple[URL, dict[str, Any]]:
        return url, {}

    def is_in_memory(self, url: URL) -> bool:
        return False

    def prepare(self, engine: Engine, *, pooler: bool, durable: bool) -> None:
        pass

    def extend(self, dialect: Dialect) -> None:
        pass

    @property
    def connect_errors(self) -> tuple[type[Exception], ...]:
        return (OSError,)

    def connect(self, *args: Any, **kwargs: Any) -> Awaitable[Any]:
        raise NotImplementedError

    def adopt(self, connection: Any) -> None:
        pass

    def is_closed(self, connection: Any) -> bool:
        return isinstance(connection, StandIn) and connection.is_closed()

    def is_in_transaction(self, connection: Any) -> bool:
        return False

    def terminate(self, connection: Any) -> None:
        if isinstance(connection, StandIn):
            return connection.terminate()
        try:
            self._terminate(connection)
        except RuntimeError:  # its event loop is closed
            shut_socket(connection)

    def _terminate(self, connection: Any) -> None:
        raise NotImplementedError

    def takes_writes(self, dialect: Dialect, connection: DBAPIConnection) -> bool:
        dialect.do_ping(connection)
        return True

    def refuses_writes(self, pooled: PoolProxiedConnection) -> bool:
        return True

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

    def begin_now(self, pooled: PoolProxiedConnection) -> None:
        if isinstance(connection := pooled.driver_connection, StandIn):
            connection.begin_now()

    def has_written(self, pooled: PoolProxiedConnection) -> bool:
        return False

    def enter_autocommit(self, connection: DBAPIConnection) -> None:
        pass

    def returns_silently(self, *, is_prepared: bool) -> bool:
        return False

    def leave_autocommit(self, connection: DBAPIConnection) -> None:
        pass

    def ask(self, connection: DBAPIConnection, question: str) -> list[Any]:
        self.enter_autocommit(connection)
        cursor = connection.cursor()
        try:
            cursor.execute(question)
            return list(cursor.fetchall())
        finally:
            cursor.close()
            self.leave_autocommit(connection)

    def effect_of(self, sql: str) -> Effect:
        return self.grammar.effect_of(sql)

    def is_own_error(self, error: BaseException) -> bool:
        return False

    def is_conflict(self, error: BaseException) -> bool:
        return False

    def is_outage(self, error: BaseException) -> bool:
        return False

    def is_in_doubt(self, error: BaseException) -> bool:
        return False

    def is_recovery_conflict(self, error: BaseException) -> bool:
        return False

    def only_reads(self, error: BaseException) -> bool:
        return False

    def reads_by_choice(self, connection: Connection) -> bool:
        return False

    def is_full(self, error: BaseException) -> bool:
        return False

    def time_limit(self, error: BaseException) -> str | None:
        return None

    def idle_limit(self, connection: Any, *, in_transaction: bool) -> str | None:
        return None

    def remedy(self, error: BaseException) -> str | None:
        return REMEDIES["certificate"] if isinstance(error, ssl.SSLCertVerificationError) else None

    def code(self, error: BaseException) -> str | None:
        return None

    def advice(self, error: BaseException) -> str | None:
        return None

    def id_at_server(self, connection: Any) -> int | None:
        return None

    def interrupt(self, connection: Any) -> Coroutine[Any, Any, None] | None:
        return None

    def identify(self, dialect: Dialect, connection: DBAPIConnection) -> None:
        pass

    async def end_statement(self, connection: AsyncConnection, id: int, age: float) -> None:
        pass


def shut_socket(connection: Any) -> None:
    """Shut a connection's socket without its event loop, so that at least the server notices.

    There is no public way to the transport; the test of applications that start again without
    having been shut down, in `test_lifespan.py`, breaks when this changes.
    """
    with contextlib.suppress(OSError, TypeError, AttributeError):  # closed, or left to uvloop
        connection._transport.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


class AutocommitRequests:
    """The connections for which a user of the engine itself has asked for AUTOCOMMIT.

    SQLAlchemy does not pass that on to `do_begin`, and a connection of ours does not show it:
    whether it is in autocommit is decided at each begin.

    Attributes:
        connections: the driver's own ones.
    """

    def __init__(self) -> None:
        self.connections = WeakSet[Any]()

    def watch(self, dialect: Dialect, after: Callable[[Any], None] | None = None) -> None:
        """Notice what is asked of a dialect.

        Args:
            after: called with the adapted connection after another level than AUTOCOMMIT was set.
        """
        set_isolation_level = dialect.set_isolation_level

        def noticing(connection: DBAPIConnection, level: Any) -> None:
            set_isolation_level(connection, level)
            driver_connection = dialect.get_driver_connection(connection)
            if level == "AUTOCOMMIT":
                self.connections.add(driver_connection)
                return
            self.connections.discard(driver_connection)
            if after is not None:
                after(connection)

        dialect.set_isolation_level = noticing  # type: ignore[method-assign, assignment]
