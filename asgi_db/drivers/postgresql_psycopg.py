"""PostgreSQL, with psycopg 3."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
import re
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from importlib import import_module
from typing import Any

from sqlalchemy import URL, Connection, Engine, event
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.interfaces import DBAPIConnection, ExecutionContext
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from asgi_db.drivers import hosts
from asgi_db.drivers.outages import REMEDIES
from asgi_db.drivers.postgresql import NOT_SUPPORTED, PATIENCE, SupportedPostgreSQL
from asgi_db.drivers.postgresql_sandbox import PostgreSQLSandbox
from asgi_db.drivers.protocol import StandIn
from asgi_db.drivers.psycopg_options import translate_url
from asgi_db.drivers.sandbox import INTERRUPT_AGAIN, SandboxControl, SandboxRules, SandboxStandIn
from asgi_db.sqlalchemy_versions import await_
from asgi_db.tasks import in_background, running_loop


class PsycopgSandbox(PostgreSQLSandbox):
    """The rules of PostgreSQL for psycopg."""

    parameters = ("%s", "%s")
    parameter = r"%\((\w+)\)s"

    def value_of(self, parameter: str, parameters: Any) -> str:
        return str(parameters[parameter])

    def control(self, stand_in: SandboxStandIn) -> SandboxControl:
        return _SandboxControl(stand_in)

    def is_in_transaction(self) -> bool:
        return _is_in_transaction(self.connection.driver)

    def lives_in_loop(self, value: object) -> bool:
        # Cursors, copies and blocks of psycopg, and the generators in which it makes them.
        return isinstance(value, AbstractAsyncContextManager) or (
            _is_of_psycopg(value) and hasattr(value, "__aenter__")
        )

    async def interrupt(self, running: asyncio.Future[Any], *, only_reads: bool) -> None:
        while not running.done():
            # The first request may precede the statement, so it is repeated.
            await self.connection.driver.cancel_safe()
            await asyncio.wait((running,), timeout=INTERRUPT_AGAIN)


class _SandboxControl:
    """The attributes and methods through which SQLAlchemy's psycopg dialect begins transactions."""

    def __init__(self, stand_in: SandboxStandIn) -> None:
        self._stand_in = stand_in
        self.autocommit = False
        self.readonly = False

    @property
    def is_autocommit(self) -> bool:
        return self.autocommit

    def set_autocommit(self, value: bool) -> None:
        self.autocommit = value

    def set_isolation_level(self, _: object) -> None:
        # In a sandbox no level other than autocommit has an effect.
        self._stand_in.rollback()

    def set_read_only(self, value: bool | None) -> None:
        self.readonly = bool(value)

    def set_deferrable(self, value: bool | None) -> None:
        pass


# Numbers of libpq, and so of psycopg's `pq.TransactionStatus`.
_IDLE = 0
_ACTIVE = 1
_UNKNOWN = 4


def _is_of_psycopg(value: object) -> bool:
    """Whether a value, or an error, is of a class of psycopg's."""
    return type(value).__module__.partition(".")[0] == "psycopg"


def _is_active(connection: Any) -> bool:
    """Whether the server is busy with a statement."""
    return bool(connection.pgconn.transaction_status == _ACTIVE)


def _is_in_transaction(connection: Any) -> bool:
    return connection.pgconn.transaction_status not in (_IDLE, _UNKNOWN)


class Psycopg(SupportedPostgreSQL):
    """PostgreSQL with psycopg 3."""

    name = "psycopg"
    sandbox: type[SandboxRules] | None = PsycopgSandbox

    def options(self, url: URL, *, pooler: bool) -> dict[str, Any]:
        arguments: dict[str, Any] = {"prepare_threshold": None} if pooler else {}
        if "PGCONNECT_TIMEOUT" not in os.environ:
            arguments["connect_timeout"] = hosts.CONNECT_TIMEOUT
        return {"connect_args": arguments}

    def translate(self, url: URL) -> tuple[URL, dict[str, Any]]:
        return translate_url(url)

    def prepare(self, engine: Engine, *, pooler: bool, durable: bool) -> None:
        super().prepare(engine, pooler=pooler, durable=durable)
        if pooler:

            def connect(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
                engine.dialect.get_driver_connection(connection).is_behind_pooler = True

            event.listen(engine, "connect", connect)

    def extend(self, dialect: Dialect) -> None:
        super().extend(dialect)
        # `terminate` needs no event loop, so a forgotten connection can be closed.
        dialect.has_terminate = True
        # SQLAlchemy's own ping awaits something after it was cancelled, which fails then and takes
        # the place of the cancellation.
        dialect.do_ping = self._ping  # type: ignore[method-assign]
        # SQLAlchemy resets these to False, and psycopg then says READ WRITE at each BEGIN, which a
        # standby refuses. None leaves it to the server.
        for name in ("set_readonly", "set_deferrable"):
            setattr(dialect, name, functools.partial(_set_or_leave, getattr(dialect, name)))
        # SQLAlchemy asks for the type of hstore with psycopg's means, which take no stand-in. It
        # has no public method for that; the tests of sandboxes break when this changes.
        fetch_type: Any = getattr(dialect, "_type_info_fetch", None)
        setattr(dialect, "_type_info_fetch", functools.partial(_fetch_type, fetch_type))  # noqa: B010

    def _ping(self, dbapi_connection: Any) -> bool:
        if isinstance(dbapi_connection.driver_connection, StandIn):
            dbapi_connection.ping()
            return True
        self.enter_autocommit(dbapi_connection)
        cursor = dbapi_connection.cursor()
        try:
            cursor.execute(";")
        finally:
            cursor.close()
            self.leave_autocommit(dbapi_connection)
        return True

    @property
    def connect_errors(self) -> tuple[type[Exception], ...]:
        return OSError, import_module("psycopg").Error

    def connect(self, *args: Any, **kwargs: Any) -> Awaitable[Any]:
        names = str(kwargs.get("host") or "").split(",")
        if len(names) < 2 or "hostaddr" in kwargs:
            return _connect(*args, **kwargs)
        # With psycopg every new connection would wait for a host that does not answer.
        ports = str(kwargs.get("port") or "").split(",")
        in_order = hosts.paired(names, ports if len(ports) > 1 else ports[0])
        if kwargs.get("load_balance_hosts") == "random":
            random.shuffle(in_order)
        return hosts.connect_to_first(in_order, self, _connect, *args, **kwargs)

    def is_closed(self, connection: Any) -> bool:
        if isinstance(connection, StandIn):
            return connection.is_closed()
        if connection.closed or getattr(connection, "is_terminated", False):
            return True
        if not _is_active(connection) and not getattr(connection, "is_waiting", False):
            # psycopg looks at the socket only while it waits for an answer. The first look takes
            # the last words of a server, the second one finds that it has closed the connection.
            with contextlib.suppress(import_module("psycopg").Error):
                connection.pgconn.consume_input()
                connection.pgconn.consume_input()
        return bool(connection.closed)

    def is_in_transaction(self, connection: Any) -> bool:
        return _is_in_transaction(connection)

    def _terminate(self, connection: Any) -> None:
        is_behind_pooler = getattr(connection, "is_behind_pooler", False)
        if is_behind_pooler and running_loop() is not None and _is_active(connection):
            in_background(_cancel_and_terminate(connection))
        else:
            _terminate(connection)

    def begin_now(self, pooled: PoolProxiedConnection) -> None:
        super().begin_now(pooled)
        connection: Any = pooled.driver_connection
        if isinstance(connection, StandIn) or connection.autocommit:
            return
        if not _is_in_transaction(connection):
            # psycopg sends BEGIN before its first statement, and that may be an empty one. Without
            # a transaction its own `connection.transaction()` would begin one, and commit it.
            cursor = pooled.cursor()
            try:
                cursor.execute("")
            finally:
                cursor.close()

    def enter_autocommit(self, connection: DBAPIConnection) -> None:
        _set_autocommit(connection, True)

    def leave_autocommit(self, connection: DBAPIConnection) -> None:
        _set_autocommit(connection, False)

    def has_invalid_plan(self, error: BaseException) -> bool:
        if self.code(error) != NOT_SUPPORTED:
            return False
        diagnostic = getattr(error, "diag", None)
        return getattr(diagnostic, "source_function", None) == "RevalidateCachedQuery"

    def forget_plans(self, context: ExecutionContext, error: Exception) -> None:
        pooled = context.root_connection.connection
        # psycopg forgets all plans after a ROLLBACK.
        if _is_in_transaction(pooled.driver_connection):
            pooled.rollback()
            return
        cursor = pooled.cursor()
        try:
            cursor.execute("BEGIN")
            cursor.execute("ROLLBACK")
        finally:
            cursor.close()

    def remedy(self, error: BaseException) -> str | None:
        if not _is_of_psycopg(error):
            return super().remedy(error)
        message = str(error)
        if "ProactorEventLoop" in message:
            return "On Windows psycopg needs a SelectorEventLoop: run the application in one."
        for pattern, kind in _REMEDIES.items():
            if re.search(pattern, message):
                return REMEDIES[kind]
        return super().remedy(error)

    def code(self, error: BaseException) -> str | None:
        code = super().code(error)
        if code is not None or not _is_of_psycopg(error):
            return code
        message = str(error)
        states = (state for text, state in _STATES.items() if re.search(text, message))
        return next(states, None) if "FATAL:" in message else None

    def id_at_server(self, connection: Any) -> int | None:
        # These errors mean that the connection is closed already.
        with contextlib.suppress(AttributeError, import_module("psycopg").Error):
            return int(connection.info.backend_pid) or None
        return None

    def interrupt(self, connection: Any) -> Coroutine[Any, Any, None] | None:
        # libpq sends it to the address of the connection, with its secret, since version 17. It has
        # to be made before the connection is closed.
        from asgi_db.drivers.psycopg_connection import send

        is_behind_pooler = getattr(connection, "is_behind_pooler", False)
        if is_behind_pooler or not import_module("psycopg").capabilities.has_cancel_safe():
            return None
        with contextlib.suppress(import_module("psycopg").Error):
            request = connection.pgconn.cancel_conn()
            request.start()
            return send(request)
        return None


_STATES = {
    r'database "[^"]*" does not exist|no such database': "3D000",
    r"no pg_hba\.conf entry|not permitted to log in": "28000",
    r'role "[^"]*" does not exist|authentication failed': "28P01",
    r"permission denied for database": "42501",
    r"unrecognized configuration parameter": "42704",
    r"invalid value for parameter": "22023",
    r"too many (?:clients|connections)|connection slots are reserved": "53300",
    r"database system is": "57P03",
}
"""What a server says when it refuses a connection, with its code, which libpq does not pass on.

A server whose `lc_messages` is not English is not understood: its refusal counts as an outage.
"""

_REMEDIES = {
    r"certificate verify failed|server certificate for .* does not match": "certificate",
    r"no password supplied": "login",
    r"invalid connection option|bad value for|invalid \S+ value:": "option",
    r"root certificate file .* does not exist|could not (?:read|load) .* certificate": "option",
}
"""What libpq and psycopg say of settings with which nothing can be connected to."""


async def _connect(*args: Any, **kwargs: Any) -> Any:
    from asgi_db.drivers.psycopg_connection import PromptConnection

    try:
        return await PromptConnection.connect(*args, **kwargs)
    except BaseException as error:
        # The frames of the traceback hold the socket of a connection that was not made, which
        # would stay open until they are collected as garbage.
        traceback.clear_frames(error.__traceback__)
        raise


def _set_or_leave(set_it: Any, connection: DBAPIConnection, value: bool) -> None:
    set_it(connection, value or None)


def _fetch_type(fetch: Callable[..., Any], connection: Connection, name: str) -> Any:
    driver_connection = connection.connection.driver_connection
    if not isinstance(driver_connection, StandIn):
        return fetch(connection, name)
    fetch_with: Any = import_module("psycopg.types").TypeInfo.fetch
    return await_(driver_connection.lend(lambda own: fetch_with(own, name)))


def _set_autocommit(connection: Any, value: bool) -> None:
    """Let each statement stand alone, or not.

    psycopg's own method is a coroutine, although it sends nothing; a connection may come back to
    the pool where none can be awaited. The test of round trips in `test_engine.py` breaks when this
    attribute changes.
    """
    driver_connection = connection.driver_connection
    if isinstance(driver_connection, StandIn):
        connection.autocommit = value
    else:
        driver_connection._autocommit = value


def _terminate(connection: Any) -> None:
    from asgi_db.drivers.psycopg_connection import PromptConnection

    if isinstance(connection, PromptConnection):
        connection.terminate()
    else:  # A function of the user's has made it.
        connection.pgconn.finish()


async def _cancel_and_terminate(connection: Any) -> None:
    """Have the statement ended; behind a pooler the server's own connection is unknown.

    A pooler may have it wait for a connection to the server, and forgets a request until then.
    """
    try:
        with contextlib.suppress(import_module("psycopg").Error, TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while connection.pgconn.is_busy():
                    await connection.cancel_safe()
                    await asyncio.sleep(INTERRUPT_AGAIN)
                    connection.pgconn.consume_input()
    finally:
        _terminate(connection)


psycopg = Psycopg()
