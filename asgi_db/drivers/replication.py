"""How far servers have come: the positions of commits, which replicas reach later."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from sqlalchemy import Engine
from sqlalchemy.pool import PoolProxiedConnection


class Position(NamedTuple):
    """A place in the history of a system, which each server that follows it reaches later.

    It also names the branch of the history. After a failover, servers may have written or received
    what the new primary never had; they are farther on a branch that has been given up, and that
    must not count as having what the new primary has committed since.

    Attributes:
        system: where the numbers come from: the cluster on PostgreSQL; on MariaDB the domain and
            the server that has written, such as `0-1`.
        number: the place; a greater one comes later. On PostgreSQL its upper part is the timeline,
            as a newer one has everything of an older one that has survived.
    """

    system: str
    number: int

    @property
    def history(self) -> str:
        """The history that the servers of a database share: the system without the server."""
        return self.system.partition("-")[0]

    def is_in(self, reached: Mapping[str, int]) -> bool:
        """Return whether a server has it that has reached this, for each system."""
        return reached.get(self.system, -1) >= self.number

    def __str__(self) -> str:
        return f"{self.system}:{self.number}" if self.system else _UNKNOWN


_UNKNOWN = "unknown"

UNKNOWN = Position("", 0)
"""The position of a commit that could not be found out; no replica is known to have reached it."""

_POSITION = re.compile(r"([0-9a-f]{1,16}|[0-9]{1,10}-[0-9]{1,10}):([0-9]{1,30})")


def parse_position(text: str) -> Position | None:
    """Return the position that a client has sent back; None if it is none."""
    if text == _UNKNOWN:
        return UNKNOWN
    found = _POSITION.fullmatch(text)
    return None if found is None else Position(found[1], int(found[2]))


def latest(positions: Iterable[Position]) -> Position | None:
    """Return the latest of some positions; those of different systems cannot be compared."""
    found: Position | None = None
    for position in positions:
        if found is None or found.system == position.system:
            found = max(found or position, position)
        else:
            return UNKNOWN
    return found


class Replication(Protocol):
    """What asgi-db has to know of the replicas of a database.

    Attributes:
        question: the statement that asks a server how far it has come.
    """

    question: str

    def prepare(self, engine: Engine) -> None:
        """Prepare the engine of a primary, before it connects, for what `position` needs."""

    def position(
        self, pooled: PoolProxiedConnection, ask: Callable[[str], Sequence[Any]]
    ) -> Position:
        """Return the position of the COMMIT that this connection has just carried out.

        Args:
            pooled: the connection.
            ask: returns the rows of the answer to a question over it; see `Driver.ask`.

        Raises:
            Exception: it cannot be found out.
        """
        ...

    def reached(self, rows: Sequence[Any]) -> list[Position]:
        """Return what the answer to `question` says: a position for each system."""
        ...
