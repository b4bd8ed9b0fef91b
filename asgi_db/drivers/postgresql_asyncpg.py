"""PostgreSQL, with asyncpg."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from importlib import import_module
from typing import Any, cast

from sqlalchemy import URL
from sqlalchemy.engine.interfaces import DBAPIConnection, ExecutionContext
from sqlalchemy.pool import PoolProxiedConnection

from asgi_db.drivers import hosts
from asgi_db.drivers.asyncpg_options import translate_url
from asgi_db.drivers.postgresql import PATIENCE, SupportedPostgreSQL
from asgi_db.drivers.postgresql_sandbox import PostgreSQLSandbox
from asgi_db.drivers.protocol import StandIn
from asgi_db.drivers.sandbox import SandboxControl, SandboxRules, SandboxStandIn
from asgi_db.sqlalchemy_versions import await_, has_begun
from asgi_db.tasks import in_background, running_loop


class AsyncpgSandbox(PostgreSQLSandbox):
    """The rules of PostgreSQL for asyncpg."""

    parameters = ("$1", "$2")
    parameter = r"\$(\d+)"

    def value_of(self, parameter: str, parameters: Any) -> str:
        return str(parameters[int(parameter) - 1])

    def control(self, stand_in: SandboxStandIn) -> SandboxControl:
        return _SandboxControl(stand_in)

    def is_in_transaction(self) -> bool:
        return bool(self.connection.driver.is_in_transaction())

    async def interrupt(self, running: asyncio.Future[Any], *, only_reads: bool) -> None:
        running.cancel()  # asyncpg then sends a cancel request.


class _SandboxControl:
    """The attributes through which SQLAlchemy's asyncpg dialect begins transactions."""

    def __init__(self, stand_in: SandboxStandIn) -> None:
        self._stand_in = stand_in
        self.isolation_level: str | None = None
        self.readonly = False
        self.deferrable = False

    @property
    def is_autocommit(self) -> bool:
        return self.isolation_level == "autocommit"

    @property
    def autocommit(self) -> bool:
        return self.is_autocommit

    @autocommit.setter
    def autocommit(self, value: bool) -> None:
        self.isolation_level = "autocommit" if value else None

    def set_isolation_level(self, level: str) -> None:
        self._stand_in.rollback()
        # In a sandbox no level other than autocommit has an effect.
        self.isolation_level = level


class Asyncpg(SupportedPostgreSQL):
    """PostgreSQL with asyncpg."""

    name = "asyncpg"
    sandbox: type[SandboxRules] | None = AsyncpgSandbox

    def options(self, url: URL, *, pooler: bool) -> dict[str, Any]:
        arguments: dict[str, Any] = {"timeout": hosts.CONNECT_TIMEOUT}
        if pooler:
            arguments.update(
                statement_cache_size=0,
                prepared_statement_cache_size=0,
                connection_class=patient_connection_class(),
            )
        return {"connect_args": arguments}

    def translate(self, url: URL) -> tuple[URL, dict[str, Any]]:
        return translate_url(url)

    @property
    def connect_errors(self) -> tuple[type[Exception], ...]:
        # SQLAlchemy does not wrap the errors of asyncpg while it connects. The last one means that
        # the host does not have the `target_session_attrs`.
        driver = import_module("asyncpg")
        return OSError, driver.PostgresError, driver.InterfaceError, driver.InternalClientError

    def connect(self, *args: Any, **kwargs: Any) -> Awaitable[Any]:
        connect: Callable[..., Awaitable[Any]] = import_module("asyncpg").connect
        names = kwargs.get("host")
        if not isinstance(names, (list, tuple)) or len(cast("list[str]", names)) < 2:
            return connect(*args, **kwargs)
        # asyncpg itself has one time limit for all hosts together.
        in_order = hosts.paired(cast("list[str]", names), kwargs.get("port"))
        return hosts.connect_to_first(in_order, self, connect, *args, **kwargs)

    def is_closed(self, connection: Any) -> bool:
        return bool(connection.is_closed())

    def is_in_transaction(self, connection: Any) -> bool:
        return bool(connection.is_in_transaction())

    def _terminate(self, connection: Any) -> None:
        connection.terminate()

    def leave_to_parent(self, connection: Any) -> None:
        # A garbage collected asyncpg connection would remove itself from the event loop, which the
        # parent still uses. There is no public API to prevent this; the test of forked processes
        # in `test_shutdown.py` breaks when this changes.
        connection._aborted = True

    def begin_now(self, pooled: PoolProxiedConnection) -> None:
        super().begin_now(pooled)
        # SQLAlchemy's adapter sends BEGIN before its first statement, and has no public method that
        # does so; `test_driver_connection.py` breaks when this changes.
        connection: Any = pooled.dbapi_connection
        if not isinstance(pooled.driver_connection, StandIn) and not has_begun(connection):
            await_(connection._start_transaction())

    def enter_autocommit(self, connection: DBAPIConnection) -> None:
        connection.autocommit = True

    def returns_silently(self, *, is_prepared: bool) -> bool:
        return True  # Without a transaction the adapter has nothing to roll back.

    def leave_autocommit(self, connection: DBAPIConnection) -> None:
        connection.autocommit = False

    def has_invalid_plan(self, error: BaseException) -> bool:
        # asyncpg and SQLAlchemy call their classes so; the tests of plans in
        # `test_server_limits.py` break when this changes.
        return type(error).__name__ == "InvalidCachedStatementError"

    def forget_plans(self, context: ExecutionContext, error: Exception) -> None:
        context.handle_dbapi_exception(error)  # SQLAlchemy's dialect then forgets all plans.
        context.root_connection.connection.rollback()
        context.pre_exec()

    def id_at_server(self, connection: Any) -> int | None:
        # These errors mean that the connection is closed already.
        with contextlib.suppress(AttributeError, TypeError):
            return int(connection.get_server_pid())
        return None

    def interrupt(self, connection: Any) -> Coroutine[Any, Any, None] | None:
        # asyncpg's own cancel request ends when the connection is closed. This is what it sends, to
        # the address of the connection and with its secret; there is no public way to it. The test
        # of a second host in `test_abandoned_elsewhere.py` breaks when this changes.
        protocol = getattr(connection, "_protocol", None)
        if protocol is None or getattr(connection, "is_patient", False):
            return None
        return _in_time(
            import_module("asyncpg.connect_utils")._cancel(
                loop=asyncio.get_running_loop(),
                addr=connection._addr,
                params=connection._params,
                backend_pid=protocol.backend_pid,
                backend_secret=protocol.backend_secret,
            )
        )


async def _in_time(request: Coroutine[Any, Any, None]) -> None:
    # Whatever the error is: the statement is also ended over another connection.
    with contextlib.suppress(Exception):
        async with asyncio.timeout(PATIENCE):
            await request


def patient_connection_class() -> type[Any]:
    """Make the class of asyncpg's connections behind a pooler.

    There the server's own connection numbers are unknown, so it is left to asyncpg to send the
    cancel request for an abandoned statement, and `terminate` gives it the time to do so.
    """
    from asyncpg import Connection

    class PatientConnection(Connection):
        """Closes in the background, so that the cancel request can be sent."""

        __slots__ = ("_closing",)
        is_patient = True

        def terminate(self) -> None:
            if running_loop() is None:
                super().terminate()
            else:
                self._close_once()

        async def close(self, *, timeout: float | None = None) -> None:  # noqa: ASYNC109
            await asyncio.wait((self._close_once(),))

        def _close_once(self) -> asyncio.Future[None]:
            # A second `close` would interrupt the cancel request of the first one, which makes
            # PgBouncer 1.18 crash (its issue 801).
            if not hasattr(self, "_closing"):
                self._closing = in_background(self._close_in_time())
            return self._closing

        async def _close_in_time(self) -> None:
            try:
                await super().close(timeout=PATIENCE)
            except Exception:
                # Whatever the error is, the connection has to be closed.
                super().terminate()

    return PatientConnection


asyncpg = Asyncpg()
