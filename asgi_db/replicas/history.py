"""The commits of this process, by which it sees how late a replica is."""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

from asgi_db.drivers.replication import Position

MOST_LAG = 10.0
"""Seconds after which a replica must have what this process has committed, to be read from."""

_APART = 1.0
"""Seconds between two commits that are kept."""


class _Commit(NamedTuple):
    at: float
    position: Position


class History:
    """The last commits of this process.

    No clock of a server is asked: that of the last replicated commit grows old while the primary
    is idle, and a replica that was cut off from its primary believes that it has everything.
    """

    def __init__(self) -> None:
        self._commits: deque[_Commit] = deque()

    def add(self, position: Position) -> None:
        """Note a commit of this moment."""
        now = time.monotonic()
        if not self._commits or now - self._commits[-1].at >= _APART:
            self._commits.append(_Commit(now, position))

    def due(self) -> Position | None:
        """Return the position that each replica must have reached by now, if there is one."""
        commits, latest = self._commits, time.monotonic() - MOST_LAG
        while len(commits) > 1 and commits[1].at <= latest:
            commits.popleft()
        return commits[0].position if commits and commits[0].at <= latest else None

    def lag(self, reached: dict[str, int]) -> float | None:
        """Return how many seconds ago the first commit was that is not reached; None if unknown.

        Args:
            reached: the position that was reached, for each system.
        """
        if not self._commits:
            return None
        for at, position in self._commits.copy():
            if reached.get(position.system, -1) < position.number:
                return time.monotonic() - at
        return 0.0
