"""The rules of the three databases (they move to the drivers' own files)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from asgi_db.drivers.base import id_at_server
from asgi_db.drivers.sandbox import (
    INTERRUPT_AGAIN,
    SandboxConnection,
    SandboxControl,
    SandboxRules,
    SandboxStandIn,
)
from asgi_db.errors import SandboxError

# -- postgresql


class PostgreSQLSandbox(SandboxRules):
    """PostgreSQL checks deferred constraints at COMMIT, not at the end of a savepoint."""

    def control(self, stand_in: SandboxStandIn) -> SandboxControl:
        return _SandboxControl(stand_in)

    def begin_nothing(self) -> None:
        self.connection.adapted.autocommit = True

    def is_in_transaction(self) -> bool:
        return bool(self.connection.driver.is_in_transaction())

    async def interrupt(self, running: asyncio.Future[Any], *, only_reads: bool) -> None:
        running.cancel()  # asyncpg tells the server

    async def begun(self, control: Any) -> None:
        if control.readonly:
            await self.connection.fetch("SET TRANSACTION READ ONLY")  # until the savepoint ends

    def local_settings(self, sql: str, parameters: Any) -> Sequence[str]:
        if found := _SET_LOCAL.match(sql):
            return ["timezone" if found[1].upper().startswith("TIME") else found[1]]
        if "set_config" not in sql:
            return ()
        return [name or str(parameters[int(n) - 1]) for name, n in _SET_CONFIG.findall(sql)]

    async def read_setting(self, name: str) -> str:
        rows = await self.connection.fetch("SELECT current_setting($1, true)", (name,))
        return rows[0][0] or ""

    async def check_deferred(self) -> None:
        ((has_any, deferred),) = await self.connection.fetch(_DEFERRABLE)
        if has_any:
            await self.connection.fetch("SET CONSTRAINTS ALL IMMEDIATE")
        if deferred:
            await self.connection.fetch(f"SET CONSTRAINTS {deferred} DEFERRED")

    def is_rolled_back(self, error: Exception) -> bool:
        return getattr(error, "sqlstate", None) == _FAILED_TRANSACTION

    async def committed(self, settings: Mapping[str, str]) -> None:
        for name, value in settings.items():
            await self.connection.fetch("SELECT set_config($1, $2, true)", (name, value))


class _SandboxControl:
    """The attributes of a connection by which SQLAlchemy's asyncpg dialect begins transactions."""

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
        self.isolation_level = level  # no other than autocommit has an effect in a sandbox


_FAILED_TRANSACTION = "25P02"
_DEFERRABLE = """
    SELECT count(*) > 0, string_agg(DISTINCT format('%I.%I', nspname, conname), ', ')
    FILTER (WHERE condeferred) FROM pg_constraint JOIN pg_namespace n ON n.oid = connamespace
    WHERE condeferrable
"""
_SET_LOCAL = re.compile(r"\s*SET\s+LOCAL\s+(TIME\s+ZONE|[\w.]+)", re.IGNORECASE)
_SET_CONFIG = re.compile(
    r"\bset_config\s*\(\s*(?:'([^']+)'|\$(\d+))[^,]*,[^,]*,\s*(?!false)", re.IGNORECASE
)


# -- mysql


class MySQLSandbox(SandboxRules):
    """MySQL and MariaDB have no deferred constraints, but commit before DDL."""

    def control(self, stand_in: SandboxStandIn) -> SandboxControl:
        return _SandboxControlMySQL(stand_in)

    def begin_nothing(self) -> None:
        # Should the server end the transaction, no statement is committed by itself.
        self.connection.adapted.autocommit(False)

    def is_in_transaction(self) -> bool:
        return bool(self.connection.driver.get_transaction_status())

    async def interrupt(self, running: asyncio.Future[Any], *, only_reads: bool) -> None:
        async with self.connection.side_connection() as side:
            while not running.done():  # the first KILL may come before the statement
                await side.exec_driver_sql(f"KILL QUERY {id_at_server(self.connection.driver)}")
                await asyncio.wait((running,), timeout=INTERRUPT_AGAIN)

    def check(self, sql: str) -> None:
        if found := _COMMITS.match(sql):
            raise SandboxError(
                f"MySQL and MariaDB commit by themselves at {found[1].upper()}, so a sandbox could"
                " not undo it. Create the tables before the sandbox, once for all tests."
            )


class _SandboxControlMySQL:
    """The methods of a connection by which SQLAlchemy's asyncmy dialect asks for autocommit."""

    def __init__(self, stand_in: SandboxStandIn) -> None:
        self._stand_in = stand_in
        self.is_autocommit = False

    def autocommit(self, value: object) -> None:
        if value and not self.is_autocommit:
            self._stand_in.commit()  # as the server does
        self.is_autocommit = bool(value)

    def get_autocommit(self) -> bool:
        return self.is_autocommit


_COMMITS = re.compile(
    r"\s*((?:CREATE|ALTER|DROP|RENAME|TRUNCATE|GRANT|REVOKE|LOCK|UNLOCK|ANALYZE|OPTIMIZE|REPAIR)\b"
    r"(?!\s+TEMPORARY))",
    re.IGNORECASE,
)


# -- sqlite


class SQLiteSandbox(SandboxRules):
    """SQLite checks deferred foreign keys at COMMIT, and sets up a connection outside of one."""

    begin: ClassVar[str] = "BEGIN IMMEDIATE"  # nobody else can write into the file meanwhile

    def __init__(self, connection: SandboxConnection) -> None:
        super().__init__(connection)
        self._checks_foreign_keys = False
        self._broken_before: set[Any] = set()

    def control(self, stand_in: SandboxStandIn) -> SandboxControl:
        return _SandboxControlSQLite()

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
        while only_reads and not running.done():  # a write takes the transaction with it
            await self.connection.driver.interrupt()  # is forgotten if it precedes the statement
            await asyncio.wait((running,), timeout=INTERRUPT_AGAIN)

    async def before_close(self) -> None:
        while self.connection.is_busy:  # the thread in which it is closed does nothing else
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


class _SandboxControlSQLite:
    """The attribute of a connection by which SQLAlchemy's aiosqlite dialect asks for autocommit."""

    def __init__(self) -> None:
        self.isolation_level: str | None = ""

    @property
    def is_autocommit(self) -> bool:
        return self.isolation_level is None


_PRAGMA = re.compile(
    r"\s*PRAGMA\s+(?:journal_mode|synchronous|foreign_keys|busy_timeout)\s*=", re.IGNORECASE
)

RULES: dict[str, type[SandboxRules]] = {
    "asyncpg": PostgreSQLSandbox,
    "asyncmy": MySQLSandbox,
    "aiosqlite": SQLiteSandbox,
}
