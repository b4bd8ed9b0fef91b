"""The primary and the replicas of a database in one event loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from asgi_db.drivers.replication import Position
from asgi_db.logs import Seldom
from asgi_db.pool.life import EngineLife
from asgi_db.replicas.history import MOST_LAG, History
from asgi_db.replicas.replica import LOOK_AGAIN_AFTER, Replica


class Servers:
    """The servers of a database, and where a read can go.

    Attributes:
        primary: the engine of the primary, with its pool.
        replicas: the replicas.
        history: the commits of this process.
        on_primary: the units of work that could have read from a replica, and ran on the primary.
    """

    def __init__(
        self,
        primary: EngineLife,
        replicas: Sequence[Replica],
        history: History,
        is_covered: Callable[[], bool],
    ) -> None:
        """Prepare them.

        Args:
            is_covered: whether a sandbox is active, in which everything runs on the primary.
        """
        self.primary = primary
        self.replicas = replicas
        self.history = history
        self.on_primary = 0
        self._is_covered = is_covered
        self._turns = itertools.count()
        self._warnings = Seldom()

    async def replica_for(self, needed: Position | None) -> Replica | None:
        """Return the replica for a unit of work that only reads; None if it is for the primary.

        The replicas take turns. What is known already counts first, so that most reads ask
        nothing; a replica whose pool is exhausted is left out while the primary has room.

        Args:
            needed: the position that the client of the unit was told.
        """
        if not self.replicas or self._is_covered():
            return None
        due = self.history.due()
        positions = tuple(filter(None, (needed, due)))
        first = next(self._turns) % len(self.replicas)
        replicas = [*self.replicas[first:], *self.replicas[:first]]
        found = [replica for replica in replicas if replica.has(positions)]
        for replica in replicas:
            if replica not in found and found:  # so that it will have its share of the reads again
                replica.ask(LOOK_AGAIN_AFTER)
        for replica in found:
            if replica.has_room:
                return replica
        if found and not self.primary.connections.have_room:
            return found[0]  # whose pool is waited for, or refuses the unit
        if not found:
            for replica in sorted(replicas, key=lambda one: -sum(one.reached.values())):
                if await replica.may_have(positions):
                    return replica
            for replica in replicas:
                replica.behind += not replica.is_down
            if not any(replica.has((due,) if due else ()) for replica in replicas):
                self._warnings.warning(
                    "The primary serves all reads, because no replica can be used: %s.",
                    ", ".join(map(_state_of, self.replicas)),
                )
        return None


def _state_of(replica: Replica) -> str:
    state = "is down" if replica.is_down else f"is more than {MOST_LAG:.0f} s late"
    return f"{replica.name} {state}"
