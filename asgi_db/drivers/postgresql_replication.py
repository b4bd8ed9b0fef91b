"""The positions of PostgreSQL: how far a server has come in the write-ahead log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.pool import PoolProxiedConnection

from asgi_db.drivers.replication import UNKNOWN, Position, Replication

# A position is sent as a number, because drivers differ in what they make of `pg_lsn`. That of the
# cluster is the same on all its servers, and on no server of another cluster.
_POSITION = """
    SELECT (SELECT to_hex(system_identifier) FROM pg_control_system()),
    timeline * 18446744073709551616
    + lsn - CASE WHEN lsn % current_setting('wal_block_size')::int = 24 THEN 24 ELSE 0 END
    FROM (SELECT {timeline} AS timeline, {lsn} - '0/0'::pg_lsn AS lsn) AS position
"""
"""Each promotion begins a new timeline. It is the upper part of the number, times 2^64, because
places on two of them cannot be compared: an old primary may be farther on its own than the new one.

Where a page has been filled exactly, the primary names the place after the header of the next
one, which has 24 bytes; a replica names the end of the page, and comes no farther for now.

Source: https://www.postgresql.org/docs/current/wal-internals.html
"""
_WRITTEN = "pg_current_wal_insert_lsn()"
_TIMELINE = f"('x' || left(pg_walfile_name({_WRITTEN}), 8))::bit(32)::bigint"
"""That on which a primary writes: the first part of the names of its files.

Source: https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-ADMIN-BACKUP
"""
_TIMELINE_OF_STANDBY = """GREATEST((SELECT timeline_id FROM pg_control_checkpoint()),
    (SELECT min_recovery_end_timeline FROM pg_control_recovery()))"""
"""That of the last restartpoint, or of what a standby had replayed when it last wrote a page.

It may be too old, so that the primary serves until the next restartpoint, but never too new. What
`pg_stat_wal_receiver` says of the timeline is that of what has been received and not yet replayed.

Source: https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-INFO-CONTROLDATA
"""
_AFTER_COMMIT = _POSITION.format(timeline=_TIMELINE, lsn=_WRITTEN)
"""Only after COMMIT: the position before it is smaller than that of the commit itself.

Source: https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-ADMIN-BACKUP
"""


class PostgreSQLReplication(Replication):
    """Streaming replication."""

    # A replica that was promoted has a position of its own, and goes on serving.
    question = _POSITION.format(
        timeline=f"CASE WHEN pg_is_in_recovery() THEN {_TIMELINE_OF_STANDBY} ELSE {_TIMELINE} END",
        lsn=f"CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE {_WRITTEN} END",
    )

    def prepare(self, engine: Engine) -> None:
        pass

    def position(
        self, pooled: PoolProxiedConnection, ask: Callable[[str], Sequence[Any]]
    ) -> Position:
        positions = self.reached(ask(_AFTER_COMMIT))
        return positions[0] if positions else UNKNOWN

    def reached(self, rows: Sequence[Any]) -> list[Position]:
        return [Position(system, int(number)) for system, number in rows if number is not None]
