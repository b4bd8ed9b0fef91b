"""What is looked at once a second, for as long as a database is being used."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

INTERVAL = 1.0
"""Seconds between two samples."""

REST_AFTER = 300.0
"""Seconds after the last use of the database at which the samples end, until it is used again."""

_STALE_AFTER = 5 * INTERVAL
"""Seconds after which a timer that has not fired belongs to an event loop that no longer runs."""


class Sampler:
    """Takes a sample once a second, in an event loop that uses the database.

    It is a timer of the loop, which keeps neither the loop nor the process alive.
    """

    def __init__(self, take: Callable[[], None]) -> None:
        """Prepare it; the first use of the database starts it.

        Args:
            take: takes a sample.
        """
        self._take = take
        self._due: float | None = None
        self._used_at = 0.0

    def used(self) -> None:
        """Note that the database is being used, and start the timer unless it runs."""
        self._used_at = now = time.monotonic()
        if self._due is None or now > self._due + _STALE_AFTER:
            self._start(now)

    def _start(self, now: float) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # A thread has given a connection back, or the garbage collector has.
            return
        self._due = now + INTERVAL
        loop.call_later(INTERVAL, self._tick, self._due)

    def _tick(self, due: float) -> None:
        if due != self._due:  # Another loop has taken over.
            return
        self._due = None
        now = time.monotonic()
        if now - self._used_at < REST_AFTER:
            self._start(now)
        self._take()
