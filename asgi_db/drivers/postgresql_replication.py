"""The positions of PostgreSQL: how far a server has come in the write-ahead log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.pool import PoolProxiedConnection

from asgi_db.drivers.replication import UNKNOWN, Position, Replication

# A position is sent as a number, because drivers differ in what they make of `pg_lsn`. That of the
# cluster is the same on all its servers, and on no server of another cluster.
_POSITION = """
    SELECT (SELECT to_hex(system_identifier) FROM pg_control_system()),
    number - CASE WHEN number % current_setting('wal_block_size')::int = 24 THEN 24 ELSE 0 END
    FROM (SELECT {} - '0/0'::pg_lsn AS number) AS position
"""
"""Where a page has been filled exactly, the primary names the place after the header of the next
one, which has 24 bytes; a replica names the end of the page, and comes no farther for now.

Source: https://www.postgresql.org/docs/current/wal-internals.html
"""
_AFTER_COMMIT = _POSITION.format("pg_current_wal_insert_lsn()")
"""Only after COMMIT: the position before it is smaller than that of the commit itself.

Source: https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-ADMIN-BACKUP
"""


class PostgreSQLReplication(Replication):
    """Streaming replication."""

    # A replica that was promoted has a position of its own, and goes on serving.
    question = _POSITION.format(
        "CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()"
        " ELSE pg_current_wal_insert_lsn() END"
    )

    def prepare(self, engine: Engine) -> None:
        pass

    def position(self, pooled: PoolProxiedConnection) -> Position:
        cursor = pooled.cursor()
        try:
            cursor.execute(_AFTER_COMMIT)
            positions = self.reached(cursor.fetchall())
        finally:
            cursor.close()
        return positions[0] if positions else UNKNOWN

    def reached(self, rows: Sequence[Any]) -> list[Position]:
        return [Position(system, int(number)) for system, number in rows if number is not None]
