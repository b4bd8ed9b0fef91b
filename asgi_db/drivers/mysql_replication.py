"""The positions of MariaDB: its global transaction identifiers (GTID)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from asgi_db.drivers.protocol import StandIn
from asgi_db.drivers.replication import UNKNOWN, Position, Replication

_COMMITTED = "asgi_db_committed"
"""The key in a pooled connection's `info` for what the server has said to its last COMMIT."""

_GTID = re.compile(r"(\d+)-(\d+)-(\d+)")
_LAST_GTID = re.compile(rb"\x09last_gtid.(\d+-\d+-\d+)", re.DOTALL)


class MariaDBReplication(Replication):
    """Replication by GTID. The server tells that of a transaction in its answer to COMMIT.

    Sources: https://mariadb.com/kb/en/gtid/,
    https://mariadb.com/kb/en/ok_packet/#session-state-info
    """

    # The last that the server has replicated, or written itself since it was promoted; and the last
    # of each server that its binary log has.
    question = "SELECT @@global.gtid_current_pos, @@global.gtid_binlog_state"

    def prepare(self, engine: Engine) -> None:
        event.listen(engine, "do_connect", _ask_to_track)
        event.listen(engine, "connect", _track)
        dialect = engine.dialect
        commit = dialect.do_commit

        def do_commit(pooled: PoolProxiedConnection) -> None:
            if isinstance(pooled.driver_connection, StandIn):
                commit(pooled)
            else:
                pooled.info[_COMMITTED] = _commit(pooled)

        dialect.do_commit = do_commit  # type: ignore[method-assign, assignment]

    def position(
        self, pooled: PoolProxiedConnection, ask: Callable[[str], Sequence[Any]]
    ) -> Position:
        found = _LAST_GTID.search(pooled.info.pop(_COMMITTED, b""))
        positions = _positions(found[1].decode()) if found else []
        return positions[0] if positions else UNKNOWN

    def reached(self, rows: Sequence[Any]) -> list[Position]:
        """Return what it has of each server that has written, in each domain.

        A number alone says nothing of that: an old primary may have numbers of its own that are
        greater than those of the new one. Of a server before the last one, the binary log tells;
        what it has is certainly applied if its number is smaller than the last one in the domain.
        """
        if not rows:
            return []
        last, logged = (_positions(str(gtids)) for gtids in rows[0])
        numbers = {position.history: position.number for position in last}
        return [each for each in logged if each.number < numbers.get(each.history, 0)] + last


def _positions(gtids: str) -> list[Position]:
    return [
        Position(f"{domain}-{server}", int(number))
        for domain, server, number in _GTID.findall(gtids)
    ]


def _ask_to_track(
    _: Dialect, __: ConnectionPoolEntry | None, ___: list[Any], parameters: dict[str, Any]
) -> None:
    """Have the server send what it tracks; SQLAlchemy then uses the changed parameters."""
    flag = import_module("asyncmy.constants.CLIENT").SESSION_TRACK
    parameters["client_flag"] = parameters.get("client_flag", 0) | flag


def _track(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    try:
        cursor.execute("SET SESSION session_track_system_variables = 'last_gtid'")
    finally:
        cursor.close()


def _commit(pooled: PoolProxiedConnection) -> bytes:
    """Commit, and return what the server tracks.

    asyncmy drops it in its own `commit`, and has no public way to it; the tests of replicas on
    MariaDB break when this changes.
    """
    cursor: Any = pooled.cursor()
    try:
        cursor.execute("COMMIT")
        message: bytes = cursor._cursor._result.message
    finally:
        cursor.close()
    return message or b""
