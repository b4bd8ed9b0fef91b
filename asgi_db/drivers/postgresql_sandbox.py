"""The rules of a sandbox on PostgreSQL, with any driver."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from asgi_db.drivers.postgresql import sqlstate
from asgi_db.drivers.sandbox import SandboxRules


class PostgreSQLSandbox(SandboxRules):
    """PostgreSQL checks deferred constraints at COMMIT, not at the end of a savepoint.

    Attributes:
        parameters: how the driver writes two parameters of a statement.
        parameter: the same as a pattern, whose group tells which parameter it is.
    """

    parameters: ClassVar[tuple[str, str]]
    parameter: ClassVar[str]

    def value_of(self, parameter: str, parameters: Any) -> str:
        """Return the value of a parameter that the pattern has found."""
        raise NotImplementedError

    def begin_nothing(self) -> None:
        self.connection.adapted.autocommit = True

    async def begun(self, control: Any) -> None:
        if control.readonly:
            # This applies until the savepoint ends.
            await self.connection.fetch("SET TRANSACTION READ ONLY")

    def local_settings(self, sql: str, parameters: Any) -> Sequence[str]:
        if found := _SET_LOCAL.match(sql):
            return ["timezone" if found[1].upper().startswith("TIME") else found[1]]
        if "set_config" not in sql:
            return ()
        calls = re.findall(_SET_CONFIG.format(self.parameter), sql, re.IGNORECASE)
        return [name or self.value_of(parameter, parameters) for name, parameter in calls]

    async def read_setting(self, name: str) -> str:
        question = f"SELECT current_setting({self.parameters[0]}, true)"
        rows = await self.connection.fetch(question, (name,))
        return rows[0][0] or ""

    async def check_deferred(self) -> None:
        ((has_any, deferred),) = await self.connection.fetch(_DEFERRABLE)
        if has_any:
            await self.connection.fetch("SET CONSTRAINTS ALL IMMEDIATE")
        if deferred:
            await self.connection.fetch(f"SET CONSTRAINTS {deferred} DEFERRED")

    def is_rolled_back(self, error: Exception) -> bool:
        return sqlstate(error) == _FAILED_TRANSACTION

    async def committed(self, settings: Mapping[str, str]) -> None:
        statement = "SELECT set_config({}, {}, true)".format(*self.parameters)
        for name, value in settings.items():
            await self.connection.fetch(statement, (name, value))


_FAILED_TRANSACTION = "25P02"
_DEFERRABLE = """
    SELECT count(*) > 0, string_agg(DISTINCT format('%I.%I', nspname, conname), ', ')
    FILTER (WHERE condeferred) FROM pg_constraint JOIN pg_namespace n ON n.oid = connamespace
    WHERE condeferrable
"""
_SET_LOCAL = re.compile(r"\s*SET\s+LOCAL\s+(TIME\s+ZONE|[\w.]+)", re.IGNORECASE)
_SET_CONFIG = r"\bset_config\s*\(\s*(?:'([^']+)'|{})[^,]*,[^,]*,\s*(?!false)"
