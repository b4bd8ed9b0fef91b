"""The one connection that everything in a sandbox shares.

    BEGIN
        SAVEPOINT   a transaction of the application, or of the test
        RELEASE     its COMMIT
        SAVEPOINT   …
        ROLLBACK TO its ROLLBACK
    ROLLBACK        the end of the sandbox

One of these transactions can be open at a time. One that has only read gives way to another: its
savepoint is released, which does no harm, and it begins anew with its next statement.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from anyio.from_thread import BlockingPortal
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from asgi_db.drivers import driver_of
from asgi_db.drivers.sqlite import INTERRUPT_AGAIN
from asgi_db.engine import writes
from asgi_db.errors import SandboxError
from asgi_db.pool.abandoned import connection_aside

if TYPE_CHECKING:
    from asgi_db.testing.stand_in import SandboxedConnection

logger = logging.getLogger("asgi_db")

WAIT_TIMEOUT = 5.0
"""Seconds that a transaction waits for another, which has written, to end."""

CLOSE_TIMEOUT = 5.0
"""Seconds that the end of a sandbox waits for a statement that still runs."""

_SAVEPOINT = "asgi_db_sandbox"

# Not a comment whose text MySQL executes: /*! … */.
_READ = re.compile(
    r"(?:[\s(]|/\*(?!M?!).*?\*/|--[^\n]*\n|\#[^\n]*\n)*"
    r"(?:SELECT|WITH|VALUES|TABLE|SHOW|EXPLAIN|DESC|DESCRIBE|PRAGMA)\b",
    re.IGNORECASE | re.DOTALL,
)
_SET_SAVEPOINT = re.compile(r"\s*SAVEPOINT\s+(\S+)", re.IGNORECASE)
_END_SAVEPOINT = re.compile(r"\s*(?:RELEASE|ROLLBACK\s+TO)\s+(?:SAVEPOINT\s+)?(\S+)", re.IGNORECASE)


def _only_reads(statement: str) -> bool:
    """Whether nothing is lost when the savepoint in which this ran is released."""
    return (
        _READ.match(statement) is not None
        and not writes(statement)
        and "set_config" not in statement
    )


def _note(who: SandboxedConnection, statement: str) -> None:
    """Note what would be lost of a transaction whose savepoint is released."""
    if found := _SET_SAVEPOINT.match(statement):
        who.savepoint = who.savepoint or found[1]
    elif found := _END_SAVEPOINT.match(statement):
        who.savepoint = None if found[1] == who.savepoint else who.savepoint
    elif not _only_reads(statement):
        who.has_written = True


@dataclass
class Outcome:
    """What a statement has brought."""

    description: Any = None
    rowcount: int = -1
    lastrowid: Any = None
    rows: Sequence[Any] = ()


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
        self.kind = driver_of(engine.dialect)
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
                self._cut_off(self._floor)
            async with asyncio.timeout(CLOSE_TIMEOUT), self._turn:
                await self.send("ROLLBACK")
        except Exception as error:  # the server rolls back what is cut off
            logger.warning("The sandbox's connection is cut off: %s", type(error).__name__)
            await self.end_whatever_runs()
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
    def has_gone(self) -> bool:
        """Whether nothing can be done with it any more."""
        return self.is_closed or self.kind.is_closed(self.driver)

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
            who.task = statement.task
            try:
                await self.before(who, statement)
                outcome = await self._run(who, statement)
            except BaseException:
                who.has_failed = True
                if who.stands_alone and self.is_in_transaction():
                    await self._undo(who)
                raise
            self._check_usable(who)
            _note(who, statement.sql)
            if who.stands_alone:
                await self._keep(who)
            return outcome

    async def _run(self, who: SandboxedConnection, statement: Statement) -> Outcome:
        running = asyncio.ensure_future(
            self.send(
                statement.sql, statement.parameters, many=statement.many, **statement.attributes
            )
        )
        who.cut_off = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait((running, who.cut_off), return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                # Here, within its turn, so that it cannot meet the next statement.
                await self.interrupt(running, statement.sql)
                await asyncio.wait((running,))
            return running.result()
        except asyncio.CancelledError:
            raise SandboxError("The statement was cut off.") from None
        finally:
            who.cut_off = None

    async def _take_floor(self, who: SandboxedConnection, statement: Statement) -> None:
        self._check_usable(who)
        if self._floor is who:
            return
        try:
            async with asyncio.timeout(WAIT_TIMEOUT):
                while (holder := self._floor) is not None and not holder.gives_way:
                    if statement.task is not None and holder.task is statement.task:
                        raise _waits_for_ever(who, holder)
                    await self._turn.wait()
        except TimeoutError:
            raise _waits_for_ever(who, self._floor or who) from None
        self._check_usable(who)
        if self._floor is not None:  # it has only read, and begins anew with its next statement
            await (self._undo(self._floor) if self._floor.has_failed else self._release())
        await self.send(f"SAVEPOINT {_SAVEPOINT}")
        self._floor = who
        await self.begun(who)

    def _check_usable(self, who: SandboxedConnection) -> None:
        self.check_open()
        if who.is_closed:
            raise SandboxError("The connection was given up before the statement was done.")
        if not self.is_in_transaction():
            self.is_closed = True  # what is sent now would be committed
            raise SandboxError(
                "The sandbox has ended early: the database itself has ended its transaction, for"
                " instance after a deadlock, or at a statement that commits."
            )

    def check_open(self) -> None:
        """Refuse to do anything after the end.

        Raises:
            SandboxError: the sandbox has ended.
        """
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
            if self._floor is who and self.is_in_transaction():
                await self._undo(who)
            who.forget()

    async def abandon(self, who: SandboxedConnection) -> None:
        """Undo what a connection has begun that is given up, maybe in the middle of a statement."""
        self._cut_off(who)
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
            who.savepoint = None

    async def _release(self) -> None:
        await self.send(f"RELEASE SAVEPOINT {_SAVEPOINT}")
        self._leave_floor()

    async def _undo(self, who: SandboxedConnection) -> None:
        try:
            await self.send(f"ROLLBACK TO SAVEPOINT {_SAVEPOINT}")
            await self.send(f"RELEASE SAVEPOINT {_SAVEPOINT}")
        except Exception:
            self.is_closed = True  # the transaction in which it stood is gone
            raise
        finally:
            who.has_written = who.has_failed = False
            who.savepoint = None
            self._leave_floor()

    def _leave_floor(self) -> None:
        self._floor = None
        self._turn.notify_all()

    def _cut_off(self, who: SandboxedConnection) -> None:
        if who.cut_off is not None and not who.cut_off.done():
            who.cut_off.set_result(None)

    # -- what the databases have of their own --------------------------------------------------

    def is_in_transaction(self) -> bool:
        """Whether the transaction that will be rolled back is open; costs no round trip."""
        raise NotImplementedError

    def check(self, sql: str) -> None:
        """Refuse what would break out of the sandbox."""

    async def interrupt(self, running: asyncio.Future[Outcome], sql: str) -> None:
        """End a statement for which nobody waits any more, where that harms no other."""
        raise NotImplementedError

    async def end_whatever_runs(self) -> None:
        """End the statement which keeps the connection, that is given up, from being closed."""

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

    def is_in_transaction(self) -> bool:
        return self.kind.is_closed(self.driver) or bool(self.driver.is_in_transaction())

    async def interrupt(self, running: asyncio.Future[Outcome], sql: str) -> None:
        running.cancel()  # asyncpg tells the server

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

    def _stand_alone(self) -> None:
        self._adapted.autocommit(False)  # should they have done so, no statement commits by itself

    def is_in_transaction(self) -> bool:
        return self.kind.is_closed(self.driver) or bool(self.driver.get_transaction_status())

    async def interrupt(self, running: asyncio.Future[Outcome], sql: str) -> None:
        try:
            async with connection_aside(self._engine) as connection:
                id = self.kind.id_at_server(self.driver)
                while not running.done():  # the first may come before the statement
                    await connection.exec_driver_sql(f"KILL QUERY {id}")
                    await asyncio.wait((running,), timeout=INTERRUPT_AGAIN)
        except (SQLAlchemyError, OSError) as error:
            logger.warning("A statement that was cut off runs on: %s", type(error).__name__)

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

    def is_in_transaction(self) -> bool:
        return bool(self.driver.in_transaction)

    async def interrupt(self, running: asyncio.Future[Outcome], sql: str) -> None:
        while _only_reads(sql) and not running.done():  # a write takes the transaction with it
            await self.driver.interrupt()  # is forgotten if it comes before the statement
            await asyncio.wait((running,), timeout=INTERRUPT_AGAIN)

    async def end_whatever_runs(self) -> None:
        while self._turn.locked():  # its thread, in which it is closed, does nothing else meanwhile
            await self.driver.interrupt()
            await asyncio.sleep(INTERRUPT_AGAIN)

    async def check_deferred(self) -> None:
        if await self._broken() - self._broken_before:
            raise self.adapted("dbapi").IntegrityError("FOREIGN KEY constraint failed")

    async def committed(self, who: SandboxedConnection) -> None:
        if self._checks_foreign_keys:
            await self.send("PRAGMA defer_foreign_keys = OFF")


def _waits_for_ever(who: SandboxedConnection, holder: SandboxedConnection) -> SandboxError:
    return SandboxError(
        f"{who.describe()}: in a sandbox there is one connection, and {holder.describe()} has"
        " written on it, or has a savepoint open, without having ended its transaction. In"
        " production these are two connections, of which the second would not see what the first"
        " has not committed. Commit or roll back first, for instance with `await session.commit()`."
    )


_KINDS: dict[str, type[SharedConnection]] = {
    "asyncpg": SharedPostgreSQL,
    "asyncmy": SharedMySQL,
    "aiosqlite": SharedSQLite,
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
    return kind(engine, portal)
