"""SQLite, with aiosqlite."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from importlib import import_module
from threading import Thread
from typing import Any, ClassVar, cast
from weakref import finalize, ref

import anyio
from sqlalchemy import URL, Engine, event
from sqlalchemy.engine import Dialect
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from asgi_db.drivers.base import AnyDriver, AutocommitRequests
from asgi_db.drivers.protocol import BEGIN_OPTION, GIVE_UP_AFTER, Beginning, StandIn
from asgi_db.drivers.sandbox import SandboxConnection, SandboxControl, SandboxRules, SandboxStandIn
from asgi_db.drivers.sqlite_connection import AdoptedConnection, ClosingConnection
from asgi_db.drivers.sqlite_cursor import raise_if_closed, use_one_trip
from asgi_db.drivers.statements import WRITING_WITH, Grammar
from asgi_db.drivers.url_options import Translate, number, refuse, switch, translate
from asgi_db.errors import ConfigurationError
from asgi_db.modes import Mode
from asgi_db.sqlalchemy_versions import await_
from asgi_db.tasks import in_background

SQLITE_BUSY_TIMEOUT = 30.0
"""Seconds that SQLite waits for a lock of another connection, unless the user sets others."""


_PRAGMA_OF_SCHEMA = r"PRAGMA\s+(?:[\w\s]*\.\s*)?"
_GRAMMAR = Grammar(
    reads="SELECT|WITH|VALUES|EXPLAIN|PRAGMA|COMMIT|END|ROLLBACK|SAVEPOINT|RELEASE|DETACH",
    holds="BEGIN",
    sets=rf"ATTACH|{_PRAGMA_OF_SCHEMA}\w+\s*=.*"
    # These take an argument, and only read.
    rf"|{_PRAGMA_OF_SCHEMA}(?!(?:table|index|foreign_key)_|integrity_check|quick_check)\w+\s*\(.*",
    writes=rf"{_PRAGMA_OF_SCHEMA}(?:(?:incremental_vacuum|optimize|wal_checkpoint)\b.*"
    r"|(?:application_id|auto_vacuum|default_cache_size|encoding|journal_mode|page_size"
    r"|schema_version|user_version)\s*[=(].*)",
    not_code=r"""'[^']*'|"[^"]*"|`[^`]*`|\[[^\]]*\]|/\*.*?(?:\*/|\Z)|--[^\n]*""",
    writing=WRITING_WITH,
)
"""The commands of SQLite.

Sources: https://www.sqlite.org/lang.html and https://www.sqlite.org/pragma.html
"""


class SQLite(AnyDriver):
    """SQLite with any driver."""

    drops_row_locks = True
    grammar = _GRAMMAR
    has_one_writer = True

    def begin_options(self, mode: Mode, *, is_prepared: bool) -> dict[str, Any]:
        """Begin explicitly.

        SQLite has one isolation level, SERIALIZABLE, which satisfies the others too. A transaction
        that will write takes the lock when it begins: if it did so later, it could not wait for
        the lock, and would fail with "database is locked".
        """
        if mode.autocommit:
            return {BEGIN_OPTION: Beginning()}
        immediate = mode.commits and not mode.read_only
        if immediate:
            return {BEGIN_OPTION: Beginning(("BEGIN IMMEDIATE",), writes=True)}
        return {BEGIN_OPTION: Beginning(("BEGIN",))}

    def is_in_transaction(self, connection: Any) -> bool:
        if isinstance(connection, StandIn):  # a sandbox itself sees to that
            return False
        try:
            return bool(connection.in_transaction)
        except ValueError:  # it is closed
            return False

    def is_conflict(self, error: BaseException) -> bool:
        return _code(error) == sqlite3.SQLITE_BUSY

    def is_outage(self, error: BaseException) -> bool:
        return _code(error) in _OUTAGES

    def remedy(self, error: BaseException) -> str | None:
        if _code(error) == sqlite3.SQLITE_NOTADB:
            return "Name a file that SQLite has made, or one that does not exist yet."
        return super().remedy(error)

    def code(self, error: BaseException) -> str | None:
        return getattr(error, "sqlite_errorname", None)


def _code(error: BaseException) -> int | None:
    code: object = getattr(error, "sqlite_errorcode", None)
    # The higher bits give a more specific reason.
    return code & 0xFF if isinstance(code, int) else None


_OUTAGES = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR)
"""The file cannot be opened, or read and written; SQLite opens it with the first statement."""


class AiosqliteSandbox(SandboxRules):
    """SQLite checks deferred foreign keys at COMMIT, and some settings need no transaction."""

    # No other connection can write into the file meanwhile.
    begin: ClassVar[str] = "BEGIN IMMEDIATE"

    def __init__(self, connection: SandboxConnection) -> None:
        super().__init__(connection)
        self._checks_foreign_keys = False
        self._broken_before: set[Any] = set()

    def control(self, stand_in: SandboxStandIn) -> SandboxControl:
        return _SandboxControl()

    def begin_nothing(self) -> None:
        self.connection.adapted.isolation_level = None

    def is_in_transaction(self) -> bool:
        return bool(self.connection.driver.in_transaction)

    async def opened(self) -> None:
        ((self._checks_foreign_keys,),) = await self.connection.fetch("PRAGMA foreign_keys")
        self._broken_before = await self._broken()

    async def _broken(self) -> set[Any]:
        if not self._checks_foreign_keys:
            return set()
        return set(await self.connection.fetch("PRAGMA foreign_key_check"))

    async def interrupt(self, running: asyncio.Future[Any], *, only_reads: bool) -> None:
        # Interrupting a write would roll back the whole transaction.
        while only_reads and not running.done():
            # SQLite ignores an interrupt that precedes the statement, so it is repeated.
            await self.connection.driver.interrupt()
            await asyncio.wait((running,), timeout=INTERRUPT_AGAIN)

    async def before_close(self) -> None:
        while self.connection.is_busy:
            # The thread that closes the connection is executing the statement.
            await self.connection.driver.interrupt()
            await asyncio.sleep(INTERRUPT_AGAIN)

    def is_ignored(self, sql: str) -> bool:
        return _PRAGMA.match(sql) is not None

    async def check_deferred(self) -> None:
        if await self._broken() - self._broken_before:
            raise self.connection.adapted.dbapi.IntegrityError("FOREIGN KEY constraint failed")

    async def committed(self, settings: Mapping[str, str]) -> None:
        if self._checks_foreign_keys:
            await self.connection.fetch("PRAGMA defer_foreign_keys = OFF")


class _SandboxControl:
    """The attribute through which SQLAlchemy's aiosqlite dialect controls autocommit."""

    def __init__(self) -> None:
        self.isolation_level: str | None = ""

    @property
    def is_autocommit(self) -> bool:
        return self.isolation_level is None


_PRAGMA = re.compile(
    r"\s*PRAGMA\s+(?:journal_mode|synchronous|foreign_keys|busy_timeout)\s*=", re.IGNORECASE
)


class Aiosqlite(SQLite):
    """SQLite with aiosqlite."""

    name = "aiosqlite"
    is_supported = True
    sandbox: type[SandboxRules] | None = AiosqliteSandbox

    def __init__(self) -> None:
        self._autocommit_requests = AutocommitRequests()

    @property
    def packages(self) -> tuple[str, ...]:
        return self.name, "sqlite3"

    def options(self, url: URL, *, pooler: bool) -> dict[str, Any]:
        return {
            "execution_options": {BEGIN_OPTION: Beginning(("BEGIN",))},
            "connect_args": {"timeout": SQLITE_BUSY_TIMEOUT},
        }

    def translate(self, url: URL) -> tuple[URL, dict[str, Any]]:
        own = frozenset(url.query if url.query.get("uri") == "true" else ("uri",))
        return translate(url, _URL_OPTIONS, own, "sqlite3, and those of SQLite need uri=true")

    def is_in_memory(self, url: URL) -> bool:
        return url.database == ":memory:"

    def prepare(self, engine: Engine, *, pooler: bool, durable: bool) -> None:
        """Set up connections: explicit BEGIN, foreign keys and WAL.

        The driver's own transaction control begins none before a SELECT, so that updates get lost.
        Source: https://docs.sqlalchemy.org/en/21/dialects/sqlite.html#pysqlite-serializable
        """

        def connect(connection: Any, _: ConnectionPoolEntry) -> None:
            _begin_nothing_by_itself(connection)
            cursor = connection.cursor()
            cursor.execute("PRAGMA foreign_keys = ON")
            try:
                cursor.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                # A read-only file keeps its journal mode.
                if error.sqlite_errorcode != sqlite3.SQLITE_READONLY:
                    raise
            if not durable:
                cursor.execute("PRAGMA synchronous = OFF")
            cursor.close()

        event.listen(engine, "connect", connect)
        self._autocommit_requests.watch(engine.dialect, after=_begin_nothing_by_itself)

    @property
    def connect_errors(self) -> tuple[type[Exception], ...]:
        return OSError, sqlite3.Error

    def connect(self, *args: Any, **kwargs: Any) -> Awaitable[Any]:
        kwargs.setdefault("factory", ClosingConnection)
        if not kwargs.get("uri") and not os.path.isdir(os.path.dirname(args[0]) or "."):
            raise ConfigurationError(
                "The folder of the SQLite file does not exist: create it, or correct its name."
            )
        connection = import_module("aiosqlite").connect(*args, **kwargs)
        # Without a daemon a program that does not dispose its database could not end. SQLAlchemy
        # does the same when it connects itself; there is no public API.
        connection._thread = Thread(
            target=_work, args=(ref(connection), connection._tx), daemon=True
        )
        _end_softly(connection)
        connecting: Awaitable[Any] = connection
        return connecting

    def adopt(self, connection: Any) -> None:
        """Have a connection end as ours do, if it was made without our `factory`.

        There is no public API; the tests in `test_creators.py` break when this changes.
        """
        made = getattr(connection, "_connection", None)
        if made is not None and not isinstance(
            made, (ClosingConnection, AdoptedConnection, StandIn)
        ):
            connection._connection = AdoptedConnection(made)
            if hasattr(connection, "stop"):
                _end_softly(connection)

    def _terminate(self, connection: Any) -> None:
        connection.stop()

    def extend(self, dialect: Dialect) -> None:
        """Go through the driver's thread no more often than it takes.

        A rollback goes there only if a transaction is open, and a statement once.
        """
        rollback = dialect.do_rollback

        def do_rollback(pooled: PoolProxiedConnection) -> None:
            # Not that of the pool, of which a detached connection is none.
            connection = cast(Any, pooled.dbapi_connection).driver_connection
            try:  # Without a call in between: each connection that comes back asks.
                is_open = isinstance(connection, StandIn) or connection.in_transaction
            except ValueError:  # It is closed.
                return
            if is_open:
                rollback(pooled)

        dialect.do_rollback = do_rollback  # type: ignore[method-assign, assignment]
        use_one_trip(dialect)

    def returns_silently(self, *, is_prepared: bool) -> bool:
        return is_prepared  # else SQLAlchemy resets autocommit

    def begin(self, pooled: PoolProxiedConnection, beginning: Beginning) -> None:
        connection = cast(Any, pooled.dbapi_connection).driver_connection
        if connection not in self._autocommit_requests.connections:
            if isinstance(connection, StandIn):
                super().begin(pooled, beginning)
                return
            # The adapter's cursor would go through the driver's thread three times.
            for statement in beginning.statements:
                try:
                    await_(connection.execute(statement))
                except ValueError as error:
                    raise_if_closed(error)
                    raise

    def interrupt(self, connection: Any) -> Coroutine[Any, Any, None] | None:
        """Interrupt the statements of a connection until it is closed.

        An idle connection would not close properly after an interrupt.
        """
        return _interrupt(connection)


def _end_softly(connection: Any) -> None:
    """Let a connection be stopped more than once, and its cursors be closed after it.

    There is no public API; the tests of cursors that outlive their connection break when this
    changes.
    """
    stop = connection.stop

    def stop_once() -> Any:
        # `close` ends with `stop`, and would wait for a thread that an earlier `stop` ended.
        stopped = stop() if connection._running else None
        if stopped is not None:
            in_background(stopped)
        connection._execute = closed
        return stopped

    async def closed(function: Callable[..., Any], *_: Any, **__: Any) -> None:
        if function.__name__ != "close":
            raise ValueError("Connection closed")  # as the driver does, for SQLAlchemy to know

    connection.stop = stop_once


def _work(connection: ref[Any], queue: Any) -> None:
    """Do the work of a connection in its thread, also after its event loop was closed.

    The driver's own thread ends with an error when the answer comes too late for a closed loop, and
    leaves the connection open, with its transaction and its lock. There is no public API; the tests
    in `test_loops_without_dispose.py` break when this changes.
    """
    work = import_module("aiosqlite.core")._connection_worker_thread
    while True:
        try:
            work(queue)
            return
        except RuntimeError:
            # What comes next in the queue may be the end of the transaction, or of the connection.
            alive = connection()
            if (alive is None or not alive._running) and queue.empty():
                return
            del alive


_URL_OPTIONS: Mapping[str, Translate] = {
    "timeout": number("timeout"),
    "cached_statements": number("cached_statements", int),
    "detect_types": number("detect_types", int),
    "check_same_thread": switch("check_same_thread"),
    "isolation_level": refuse("asgi-db sets itself: leave it out."),
}
"""The options of a URL that Python's sqlite3 knows.

Source: https://docs.python.org/3/library/sqlite3.html#sqlite3.connect
"""


def _begin_nothing_by_itself(connection: Any) -> None:
    """Keep the driver from sending BEGIN by itself."""
    connection.isolation_level = None


INTERRUPT_AGAIN = 0.05
"""Seconds between two interrupts: enough time to end a statement and to close."""


async def _interrupt(connection: Any) -> None:
    # SQLite ignores an interrupt that precedes the statement, which may still be on its way to the
    # connection's thread. That thread also closes the connection after the statement, and then the
    # interrupt raises one of these errors.
    with contextlib.suppress(ValueError, sqlite3.Error):
        with anyio.move_on_after(GIVE_UP_AFTER):
            while True:
                await connection.interrupt()
                await anyio.sleep(INTERRUPT_AGAIN)


class TemporaryFolder:
    """A folder for a database in memory; it is removed at the latest when the program ends."""

    def __init__(self) -> None:
        self.path = tempfile.mkdtemp(prefix="asgi-db-")
        self.remove = finalize(self, _remove_folder, self.path, os.getpid())


def _remove_folder(path: str, owner: int) -> None:
    if os.getpid() == owner:  # A forked process must not remove it.
        shutil.rmtree(path, ignore_errors=True)


aiosqlite = Aiosqlite()
