"""The connection that everything in a sandbox shares, and what the drivers' connections become.

    every pool of the database ──▶ SandboxedConnection ─┐
    in whichever event loop    ──▶ SandboxedConnection ─┼──▶ SharedConnection, in a thread of its own
                               ──▶ SandboxedConnection ─┘    BEGIN … SAVEPOINT … RELEASE … ROLLBACK

The engine, its pools, its events and the units of work run as in production. Only under the pool
stands another connection, for which a transaction is a savepoint. One transaction can be open on
the shared connection; one that has only read gives way to another, as it would do no harm.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from anyio.from_thread import BlockingPortal
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util import await_

from asgi_db.cancellation import current_task
from asgi_db.engine import UNIT_INFO, writes
from asgi_db.errors import SandboxError

logger = logging.getLogger("asgi_db")

WAIT_TIMEOUT = 5.0
"""Seconds that a transaction waits for another, which has written, to end."""

CLOSE_TIMEOUT = 5.0
"""Seconds that the end of a sandbox waits for a statement that still runs."""

_SAVEPOINT = "asgi_db_sandbox"

_TRANSACTION = re.compile(
    r"\s*(?:(?P<begin>BEGIN|START\s+TRANSACTION)\b|(?P<commit>COMMIT|END)\b"
    r"|(?P<rollback>ROLLBACK)(?!.*\bTO\b)|(?P<set>SET\s+(?:SESSION\s+|LOCAL\s+)?TRANSACTION)\b)",
    re.IGNORECASE | re.DOTALL,
)
_READ = re.compile(
    r"[\s(]*(?:SELECT|WITH|VALUES|TABLE|SHOW|EXPLAIN|DESC|DESCRIBE|PRAGMA)\b", re.IGNORECASE
)


def _only_reads(statement: str) -> bool:
    """Whether nothing is lost when the savepoint in which this ran is released."""
    return (
        _READ.match(statement) is not None
        and not writes(statement)
        and "set_config" not in statement
    )


@dataclass
class Outcome:
    """What a statement has brought."""

    description: Any = None
    rowcount: int = -1
    lastrowid: Any = None
    rows: Sequence[Any] = ()


class SharedConnection:
    """The one real connection, with a transaction that is never committed.

    Its coroutines run in the event loop of the sandbox's thread.
    """

    begin: ClassVar[str] = "BEGIN"

    def __init__(self, engine: AsyncEngine, portal: BlockingPortal) -> None:
        """Prepare it; nothing is opened yet.

        Args:
            engine: for this connection alone.
            portal: into the event loop where the connection lives.
        """
        self.portal = portal
        self.is_closed = False
        self._engine = engine
        self._connection: AsyncConnection | None = None
        self._adapted: Any = None
        self._floor: SandboxedConnection | None = None
        self._turn = asyncio.Condition()

    # -- its life ------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect, and begin the transaction that will be rolled back."""
        self._connection = await self._engine.connect()
        self._adapted = (await self._connection.get_raw_connection()).dbapi_connection
        await self.call(self._stand_alone)
        await self.send(self.begin)
        await self.prepare()

    async def prepare(self) -> None:
        """Note what was there before the sandbox."""

    def _stand_alone(self) -> None:
        """Let the driver begin no transactions of its own."""

    async def close(self) -> None:
        """Roll everything back, and disconnect."""
        self.is_closed = True
        if self._connection is None:
            return
        try:
            if self._floor is not None:
                await self._interrupt(self._floor)
            async with asyncio.timeout(CLOSE_TIMEOUT), self._turn:
                await self.send("ROLLBACK")
        except Exception as error:  # the server rolls back what is cut off
            logger.warning("The sandbox's connection is cut off: %s", type(error).__name__)
            await self._connection.invalidate()
        await self._connection.close()

    # -- what is sent --------------------------------------------------------------------------

    async def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call something of the driver's connection that SQLAlchemy has adapted."""
        assert self._connection is not None
        return await self._connection.run_sync(lambda _: function(*args, **kwargs))

    async def send(
        self, sql: str, parameters: Any = None, *, many: bool = False, **attributes: Any
    ) -> Outcome:
        """Send a statement, whoever's turn it is."""

        def execute() -> Outcome:
            cursor = self._adapted.cursor()
            try:
                for name, value in attributes.items():
                    setattr(cursor, name, value)
                if many:
                    cursor.executemany(sql, parameters)
                else:
                    cursor.execute(sql, parameters)
                rows = cursor.fetchall() if cursor.description else ()
                lastrowid = getattr(cursor, "lastrowid", None)
                return Outcome(cursor.description, cursor.rowcount, lastrowid, rows)
            finally:
                cursor.close()

        outcome: Outcome = await self.call(execute)
        return outcome

    async def use(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the driver's connection as SQLAlchemy has adapted it, between turns."""
        async with self._turn:
            return await self.call(getattr(self._adapted, name), *args, **kwargs)

    async def use_driver(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Await a method of the driver's own connection, between turns."""
        async with self._turn:
            return await getattr(self.driver, name)(*args, **kwargs)

    @property
    def driver(self) -> Any:
        """The driver's own connection."""
        return self._adapted.driver_connection

    def adapted(self, name: str) -> Any:
        """Return an attribute of the driver's connection as SQLAlchemy has adapted it."""
        return getattr(self._adapted, name)

    # -- transactions, as savepoints -----------------------------------------------------------

    async def execute(self, who: SandboxedConnection, statement: Statement) -> Outcome:
        """Run a statement for one of the sandboxed connections, when it is its turn.

        Raises:
            SandboxError: another transaction has written, and does not end.
        """
        async with self._turn:
            self.check(statement.sql)
            await self._take_floor(who, statement)
            try:
                await self.before(who, statement)
                outcome = await self._run(who, statement)
            except BaseException:
                if who.stands_alone:
                    await self._undo(who)
                raise
            who.has_written = who.has_written or not _only_reads(statement.sql)
            if who.stands_alone:
                await self._keep(who)
            return outcome

    async def _run(self, who: SandboxedConnection, statement: Statement) -> Outcome:
        who.running = asyncio.ensure_future(
            self.send(
                statement.sql, statement.parameters, many=statement.many, **statement.attributes
            )
        )
        try:
            await asyncio.wait((who.running,))
            return who.running.result()
        except asyncio.CancelledError:
            raise SandboxError("The statement was cut off.") from None
        finally:
            who.running = None

    async def _take_floor(self, who: SandboxedConnection, statement: Statement) -> None:
        self._check_open()
        if self._floor is who:
            return
        try:
            async with asyncio.timeout(WAIT_TIMEOUT):
                while (holder := self._floor) is not None and holder.has_written:
                    if statement.task is not None and holder.task is statement.task:
                        raise _waits_for_ever(who, holder)
                    await self._turn.wait()
        except TimeoutError:
            raise _waits_for_ever(who, self._floor or who) from None
        self._check_open()
        if self._floor is not None:
            await self._release()  # it has only read, and begins anew with its next statement
        await self.send(f"SAVEPOINT {_SAVEPOINT}")
        self._floor = who
        who.task = statement.task
        await self.begun(who)

    def _check_open(self) -> None:
        if self.is_closed:
            raise SandboxError(
                "The sandbox has ended, and what belongs to it can do nothing more: end sessions"
                " and requests inside `database.sandbox()`."
            )

    async def commit(self, who: SandboxedConnection) -> None:
        """Keep, for as long as the sandbox lasts, what a connection's transaction has done."""
        async with self._turn:
            if self._floor is who:
                await self._keep(who)
            who.forget()

    async def rollback(self, who: SandboxedConnection) -> None:
        """Undo what a connection's transaction has done."""
        async with self._turn:
            if self._floor is who:
                await self._undo(who)
            who.forget()

    async def abandon(self, who: SandboxedConnection) -> None:
        """Undo what a connection has begun that is given up, maybe in the middle of a statement."""
        await self._interrupt(who)
        if not self.is_closed:
            await self.rollback(who)

    async def _keep(self, who: SandboxedConnection) -> None:
        try:
            if who.has_written:
                await self.check_deferred()
            await self._release()
        except Exception as error:
            await self._undo(who)
            if getattr(error, "sqlstate", None) != _FAILED_TRANSACTION:
                raise  # else the server answers COMMIT with ROLLBACK, and no error
        else:
            await self.committed(who)
            who.has_written = False

    async def _release(self) -> None:
        await self.send(f"RELEASE SAVEPOINT {_SAVEPOINT}")
        self._leave_floor()

    async def _undo(self, who: SandboxedConnection) -> None:
        try:
            await self.send(f"ROLLBACK TO SAVEPOINT {_SAVEPOINT}")
            await self.send(f"RELEASE SAVEPOINT {_SAVEPOINT}")
        finally:
            who.has_written = False
            self._leave_floor()

    def _leave_floor(self) -> None:
        self._floor = None
        self._turn.notify_all()

    async def _interrupt(self, who: SandboxedConnection) -> None:
        if who.running is not None:
            await self.interrupt(who.running)

    # -- what the databases have of their own --------------------------------------------------

    def check(self, sql: str) -> None:
        """Refuse what would break out of the sandbox."""

    async def interrupt(self, statement: asyncio.Future[Outcome]) -> None:
        """End a statement for which nobody waits any more, where the driver can."""

    async def begun(self, who: SandboxedConnection) -> None:
        """Let a transaction begin as it was asked to."""

    async def before(self, who: SandboxedConnection, statement: Statement) -> None:
        """Note what a statement is about to change beyond its rows."""

    async def check_deferred(self) -> None:
        """Check what a real COMMIT would check now."""

    async def committed(self, who: SandboxedConnection) -> None:
        """Undo what lasts until COMMIT, and no longer."""


_FAILED_TRANSACTION = "25P02"


class SharedPostgreSQL(SharedConnection):
    """On PostgreSQL, which checks deferred constraints at COMMIT, not at the end of a savepoint."""

    def _stand_alone(self) -> None:
        self._adapted.autocommit = True

    async def interrupt(self, statement: asyncio.Future[Outcome]) -> None:
        statement.cancel()  # asyncpg tells the server

    async def begun(self, who: SandboxedConnection) -> None:
        if who.readonly:
            await self.send("SET TRANSACTION READ ONLY")  # until the end of the savepoint

    async def before(self, who: SandboxedConnection, statement: Statement) -> None:
        for name in local_settings(statement):
            if name not in who.settings:
                outcome = await self.send("SELECT current_setting($1, true)", (name,))
                who.settings[name] = outcome.rows[0][0] or ""

    async def check_deferred(self) -> None:
        ((has_any, deferred),) = (await self.send(_DEFERRABLE)).rows
        if has_any:
            await self.send("SET CONSTRAINTS ALL IMMEDIATE")
        if deferred:
            await self.send(f"SET CONSTRAINTS {deferred} DEFERRED")

    async def committed(self, who: SandboxedConnection) -> None:
        for name, value in who.settings.items():
            await self.send("SELECT set_config($1, $2, true)", (name, value))


_DEFERRABLE = """
    SELECT count(*) > 0, string_agg(DISTINCT format('%I.%I', nspname, conname), ', ')
    FILTER (WHERE condeferred) FROM pg_constraint JOIN pg_namespace n ON n.oid = connamespace
    WHERE condeferrable
"""
_SET_LOCAL = re.compile(r"\s*SET\s+LOCAL\s+(TIME\s+ZONE|[\w.]+)", re.IGNORECASE)
_SET_CONFIG = re.compile(
    r"\bset_config\s*\(\s*(?:'([^']+)'|\$(\d+))[^,]*,[^,]*,\s*(?!false)", re.IGNORECASE
)


def local_settings(statement: Statement) -> list[str]:
    """The settings which a statement of PostgreSQL makes until the end of the transaction."""
    sql = statement.sql
    if found := _SET_LOCAL.match(sql):
        return ["timezone" if found[1].upper().startswith("TIME") else found[1]]
    if "set_config" not in sql or statement.many:
        return []
    parameters: Sequence[Any] = statement.parameters or ()
    return [name or str(parameters[int(n) - 1]) for name, n in _SET_CONFIG.findall(sql)]


class SharedMySQL(SharedConnection):
    """On MySQL and MariaDB, which have no deferred constraints, but commit before DDL."""

    def check(self, sql: str) -> None:
        if found := _COMMITS.match(sql):
            raise SandboxError(
                f"MySQL and MariaDB commit by themselves at {found[1].upper()}, so a sandbox could"
                " not undo it. Create the tables before the sandbox, once for all tests."
            )


_COMMITS = re.compile(
    r"\s*((?:CREATE|ALTER|DROP|RENAME|TRUNCATE|GRANT|REVOKE|LOCK|UNLOCK|ANALYZE|OPTIMIZE|REPAIR)\b"
    r"(?!\s+TEMPORARY))",
    re.IGNORECASE,
)


class SharedSQLite(SharedConnection):
    """On SQLite, which checks deferred foreign keys at COMMIT."""

    begin = "BEGIN IMMEDIATE"  # nobody else can write into the file meanwhile

    def __init__(self, engine: AsyncEngine, portal: BlockingPortal) -> None:
        super().__init__(engine, portal)
        self._checks_foreign_keys = False
        self._broken_before: set[Any] = set()

    def _stand_alone(self) -> None:
        self._adapted.isolation_level = None

    async def prepare(self) -> None:
        self._checks_foreign_keys = bool((await self.send("PRAGMA foreign_keys")).rows[0][0])
        self._broken_before = await self._broken()

    async def _broken(self) -> set[Any]:
        if not self._checks_foreign_keys:
            return set()
        return set((await self.send("PRAGMA foreign_key_check")).rows)

    async def interrupt(self, statement: asyncio.Future[Outcome]) -> None:
        await self.driver.interrupt()

    async def check_deferred(self) -> None:
        if await self._broken() - self._broken_before:
            raise self.adapted("dbapi").IntegrityError("FOREIGN KEY constraint failed")

    async def committed(self, who: SandboxedConnection) -> None:
        if self._checks_foreign_keys:
            await self.send("PRAGMA defer_foreign_keys = OFF")


def _waits_for_ever(who: SandboxedConnection, holder: SandboxedConnection) -> SandboxError:
    return SandboxError(
        f"{who.describe()}: in a sandbox there is one connection, and {holder.describe()} has"
        " written on it without having ended its transaction. In production these are two"
        " connections, of which the second would not see what the first has not committed. Commit"
        " or roll back first, for instance with `await session.commit()`."
    )


# -- what stands in the pools ------------------------------------------------------------------


@dataclass(frozen=True)
class Statement:
    """What a cursor is to execute.

    Attributes:
        task: the task that waits for it.
        attributes: what SQLAlchemy has set on the cursor.
    """

    sql: str
    parameters: Any
    many: bool
    task: asyncio.Task[Any] | None
    attributes: dict[str, Any] = field(default_factory=dict[str, Any])


class SandboxedConnection:
    """Stands for a driver's connection, as SQLAlchemy adapts it to its pools.

    Attributes:
        readonly: the transactions only read.
        has_begun: whether a transaction is open, as far as SQLAlchemy knows.
        has_written: whether it has done more than to read.
        settings: what the transaction has set until its end, and the values from before.
        task: the task that has begun it.
        running: the statement that runs.
    """

    def __init__(self, shared: SharedConnection, entry: ConnectionPoolEntry | None) -> None:
        self.readonly = False
        self.deferrable = False
        self.has_begun = False
        self.has_written = False
        self.settings: dict[str, str] = {}
        self.task: asyncio.Task[Any] | None = None
        self.running: asyncio.Future[Outcome] | None = None
        self.is_closed = False
        self._shared = shared
        self._entry = entry
        self._connection = SandboxedDriver(self, shared)  # where SQLAlchemy looks for it

    def __getattr__(self, name: str) -> Any:
        """Return what else the adapted connection has: `create_function`, for one."""
        if name.startswith("_"):
            raise AttributeError(name)
        attribute = self._shared.adapted(name)
        return partial(self._wait_for, self._shared.use, name) if callable(attribute) else attribute

    @property
    def driver_connection(self) -> SandboxedDriver:
        """What stands for the driver's own connection."""
        return self._connection

    @property
    def stands_alone(self) -> bool:
        """Whether a statement that comes now stands alone, in autocommit."""
        raise NotImplementedError

    def describe(self) -> str:
        """Name who has it, for messages."""
        unit = None if self._entry is None else self._entry.info.get(UNIT_INFO)
        return "the engine, without a session" if unit is None else str(unit.describe())

    def forget(self) -> None:
        """Note that the transaction is over."""
        self.has_begun = self.has_written = False
        self.settings.clear()
        self.task = None

    def cursor(self, server_side: Any = False) -> SandboxedCursor:
        """Return a cursor; its rows are fetched at once, also where it is for a server's cursor."""
        return SandboxedCursor(self)

    def execute(self, sql: str, parameters: Any = None) -> SandboxedCursor:
        """Execute a statement with a cursor of its own."""
        cursor = self.cursor()
        cursor.execute(sql, parameters)
        return cursor

    def run(self, statement: Statement) -> Outcome:
        """Execute a statement in the transaction, or alone."""
        if found := _TRANSACTION.match(statement.sql):
            self._control(found.lastgroup or "")
            return Outcome()
        self.has_begun = self.has_begun or not self.stands_alone
        outcome: Outcome = self._wait_for(self._shared.execute, self, statement)
        return outcome

    def _control(self, verb: str) -> None:
        if verb == "begin":
            self.has_begun = True  # the savepoint comes with the first statement
        elif verb == "commit":
            self.commit()
        elif verb == "rollback":
            self.rollback()
        # What SET TRANSACTION asks for cannot be had in the middle of one.

    def commit(self) -> None:
        """Commit, as far as the sandbox lets anything be committed."""
        if self.has_begun:
            self._wait_for(self._shared.commit, self)

    def rollback(self) -> None:
        """Roll back."""
        if self.has_begun and not self._shared.is_closed:
            self._wait_for(self._shared.rollback, self)

    def ping(self, reconnect: bool = False) -> None:
        """Give a sign of life, if the sandbox has not ended."""

    def close(self) -> None:
        """Give it up."""
        self.is_closed = True
        if self.has_begun and not self._shared.is_closed:
            self._shared.portal.start_task_soon(self._shared.abandon, self)

    terminate = close

    def wait_for(self, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> Any:
        """Wait, in SQLAlchemy's greenlet, for what is done in the sandbox's thread."""
        return self._wait_for(function, *args)

    def _wait_for(
        self, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any, **kwargs: Any
    ) -> Any:
        return await_(in_thread(self._shared.portal, partial(function, *args, **kwargs)))


async def in_thread(portal: BlockingPortal, function: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Await something in the sandbox's thread; it is not cut off there if this task is cancelled."""
    begun: Future[Any] = portal.start_task_soon(function)
    future = asyncio.wrap_future(begun)
    future.add_done_callback(lambda done: done.cancelled() or done.exception())  # taken note of
    await asyncio.wait((future,))
    return future.result()


class _OnAsyncpg(SandboxedConnection):
    isolation_level: str | None = None

    @property
    def autocommit(self) -> bool:
        """Whether each statement stands alone."""
        return self.isolation_level == "autocommit"

    @autocommit.setter
    def autocommit(self, value: bool) -> None:
        self.isolation_level = "autocommit" if value else None

    def set_isolation_level(self, level: str) -> None:
        """Take note of autocommit; no other level can be had in a sandbox."""
        self.rollback()
        self.isolation_level = level

    @property
    def stands_alone(self) -> bool:
        return self.autocommit and not self.has_begun


class _OnAsyncmy(SandboxedConnection):
    _autocommit = False

    def autocommit(self, value: Any) -> None:
        """Let each statement stand alone, or not."""
        if value and not self._autocommit:
            self.commit()  # as the server does
        self._autocommit = bool(value)

    def get_autocommit(self) -> bool:
        """Whether each statement stands alone."""
        return self._autocommit

    @property
    def stands_alone(self) -> bool:
        return self._autocommit and not self.has_begun


class _OnAiosqlite(SandboxedConnection):
    isolation_level: str | None = ""

    @property
    def stands_alone(self) -> bool:
        return self.isolation_level is None and not self.has_begun

    def run(self, statement: Statement) -> Outcome:
        if _PRAGMA.match(statement.sql):
            return Outcome()  # the shared connection has its settings, which hold for a transaction
        return super().run(statement)


_PRAGMA = re.compile(
    r"\s*PRAGMA\s+(?:journal_mode|synchronous|foreign_keys|busy_timeout)\s*=", re.IGNORECASE
)

_KINDS: dict[str, tuple[type[SharedConnection], type[SandboxedConnection]]] = {
    "asyncpg": (SharedPostgreSQL, _OnAsyncpg),
    "asyncmy": (SharedMySQL, _OnAsyncmy),
    "aiosqlite": (SharedSQLite, _OnAiosqlite),
}


def shared_connection(engine: AsyncEngine, portal: BlockingPortal) -> SharedConnection:
    """Make the shared connection for a database of this kind.

    Raises:
        SandboxError: there is none for this driver.
    """
    kind = _KINDS.get(engine.dialect.driver)
    if kind is None:
        raise SandboxError(
            f"There is no sandbox for the driver {engine.dialect.driver}: use one of"
            f" {', '.join(_KINDS)}."
        )
    return kind[0](engine, portal)


def sandboxed_connection(
    shared: SharedConnection, dialect: Dialect, entry: ConnectionPoolEntry | None
) -> SandboxedConnection:
    """Make what stands in the pool for a connection of this dialect's driver."""
    return _KINDS[dialect.driver][1](shared, entry)


class SandboxedDriver:
    """Stands for the driver's own connection."""

    is_sandboxed = True

    def __init__(self, connection: SandboxedConnection, shared: SharedConnection) -> None:
        self._of = connection
        self._shared = shared

    def __getattr__(self, name: str) -> Any:
        """Return what else the driver's connection has; what would end it, it has not."""
        if name.startswith("_") or name in ("interrupt", "terminate", "close", "stop"):
            raise AttributeError(name)
        attribute = getattr(self._shared.driver, name)
        if not inspect.iscoroutinefunction(attribute):
            return attribute

        async def call(*args: Any, **kwargs: Any) -> Any:
            use = partial(self._shared.use_driver, name, *args, **kwargs)
            return await in_thread(self._shared.portal, use)

        return call

    def is_closed(self) -> bool:
        """Whether it can be used no more."""
        return self._of.is_closed or self._shared.is_closed

    def get_transaction_status(self) -> bool:
        """Whether a transaction is open."""
        return self._of.has_begun


class SandboxedCursor:
    """A cursor whose rows have come as soon as its statement has been executed."""

    arraysize = 1

    def __init__(self, connection: SandboxedConnection) -> None:
        self._of = connection
        self._outcome = Outcome()
        self._rows: deque[Any] = deque()

    def execute(self, sql: str, parameters: Any = None) -> None:
        """Execute a statement."""
        self._execute(sql, parameters, many=False)

    def executemany(self, sql: str, parameters: Any) -> None:
        """Execute a statement for each of several parameters."""
        self._execute(sql, parameters, many=True)

    def _execute(self, sql: str, parameters: Any, *, many: bool) -> None:
        # SQLAlchemy's asyncpg dialect says in an attribute of the cursor when its caches are stale.
        attributes = {k: v for k, v in vars(self).items() if k not in _OF_CURSOR}
        statement = Statement(sql, parameters, many, current_task(), attributes)
        self._outcome = self._of.run(statement)
        self._rows = deque(self._outcome.rows)

    @property
    def description(self) -> Any:
        """The columns."""
        return self._outcome.description

    @property
    def rowcount(self) -> int:
        """How many rows were changed, or found."""
        return self._outcome.rowcount

    @property
    def lastrowid(self) -> Any:
        """The number that the database has given to a new row."""
        return self._outcome.lastrowid

    def fetchone(self) -> Any:
        """Return the next row."""
        return self._rows.popleft() if self._rows else None

    def fetchmany(self, size: int | None = None) -> list[Any]:
        """Return the next rows."""
        count = min(self.arraysize if size is None else size, len(self._rows))
        return [self._rows.popleft() for _ in range(count)]

    def fetchall(self) -> list[Any]:
        """Return all further rows."""
        rows = list(self._rows)
        self._rows.clear()
        return rows

    def __iter__(self) -> Iterator[Any]:
        while self._rows:
            yield self._rows.popleft()

    def nextset(self) -> None:
        """There is no further result."""

    def setinputsizes(self, *_: Any) -> None:
        """Do nothing: the drivers need it no more than this."""

    def close(self) -> None:
        """Forget the rows."""
        self._rows.clear()

    async def _async_soft_close(self) -> None:
        """Do nothing: there is no cursor open; SQLAlchemy's `AsyncSession` asks for it."""


_OF_CURSOR = frozenset({"_of", "_outcome", "_rows", "arraysize"})
