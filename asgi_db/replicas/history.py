"""The commits of this process, by which it sees how late a replica is."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from asgi_db.drivers.replication import Position

MOST_LAG = 10.0
"""Seconds after which a replica must have what this process has committed, to be read from."""

_APART = 1.0
"""Seconds between two commits that are kept."""


class Commit(NamedTuple):
    """A commit of this process, and when it was."""

    at: float
    position: Position


class History:
    """The last commits of this process.

    No clock of a server is asked: that of the last replicated commit grows old while the primary
    is idle, and a replica that was cut off from its primary believes that it has everything.
    """

    def __init__(self) -> None:
        self.commits: deque[Commit] = deque()

    def add(self, position: Position) -> None:
        """Note a commit of this moment."""
        now = time.monotonic()
        if self.commits and self.commits[-1].position.system != position.system:
            self._forget_before(position)
        if not self.commits or now - self.commits[-1].at >= _APART:
            self.commits.append(Commit(now, position))
            self._forget_old()

    def _forget_before(self, position: Position) -> None:
        """Forget what the last primary of MariaDB has committed, as another one does so now.

        What the new one never got no replica will ever name.
        """
        self.commits = deque(
            commit
            for commit in self.commits
            if commit.position.system == position.system
            or commit.position.history != position.history
        )

    def due(self) -> Position | None:
        """Return the position that each replica must have reached by now, if there is one."""
        latest = self._forget_old()
        return self.commits[0].position if self.commits and self.commits[0].at <= latest else None

    def _forget_old(self) -> float:
        """Keep one commit that is due; return until when a commit is."""
        commits, latest = self.commits, time.monotonic() - MOST_LAG
        while len(commits) > 1 and commits[1].at <= latest:
            commits.popleft()
        return latest


class Lag:
    """How late one replica was when it last answered.

    Only reads ask a replica, so that nothing is known of the time since then.

    Attributes:
        seconds: the age of the oldest commit of this process that it did not have then; 0 if it had
            them all; None if it has not answered, or there was no commit.
    """

    seconds: float | None = None
    _missing: Commit | None = None

    def __init__(self, history: History) -> None:
        self._history = history

    def answered(self, reached: Mapping[str, int]) -> None:
        """Note what the replica has reached, for each system."""
        commits = self._history.commits.copy()
        missing = next((commit for commit in commits if not commit.position.is_in(reached)), None)
        earlier = self._missing
        if missing is not None and missing is commits[0] and earlier is not None:
            # The history has forgotten what a replica that is very late was missing first.
            first = earlier.position
            if first.system == missing.position.system and not first.is_in(reached):
                missing = earlier
        self._missing = missing
        if commits:
            self.seconds = 0.0 if missing is None else time.monotonic() - missing.at
