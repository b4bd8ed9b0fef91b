"""The `timeout=` of a mode."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Deadline:
    """The time by which the statements of a unit must have ended.

    Works like `asyncio.timeout`, but only while an operation of the session is running.

    Attributes:
        timeout: the time for the whole unit, in seconds.
        allowed: the seconds that were left for the watched operation when it began.
    """

    def __init__(self, timeout: float, at: float | None = None) -> None:
        """Start the clock.

        Args:
            timeout: seconds.
            at: the end by the event loop's clock, if the time began earlier.
        """
        self.timeout = self.allowed = timeout
        self._loop = asyncio.get_running_loop()
        self.at = self._loop.time() + timeout if at is None else at
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None
        self._cancellations = 0
        self._has_timed_out = False

    @property
    def is_over(self) -> bool:
        """Whether the time is over."""
        return self.at <= self._loop.time()

    def watch_task(self, least: float = 0.0) -> None:
        """Cancel the running task when the time is over.

        Args:
            least: the seconds that the task has in any case.
        """
        if self._timer is None and (task := asyncio.current_task()) is not None:
            self._task = task
            self._cancellations = task.cancelling()
            now = self._loop.time()
            at = max(self.at, now + least)
            self.allowed = at - now
            self._timer = self._loop.call_at(at, self._cancel_task)

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._has_timed_out = True
            self._task.cancel()

    def when_over(self, callback: Callable[[], None]) -> None:
        """Call a function when the time is over."""
        self._loop.call_at(self.at, callback)

    def has_cancelled(self, error: BaseException | None) -> bool:
        """Stop watching, and return whether only this deadline cancelled the operation.

        Args:
            error: how the operation ended.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._has_timed_out or self._task is None:
            return False
        self._has_timed_out = False
        remaining = self._task.uncancel()
        return isinstance(error, asyncio.CancelledError) and remaining <= self._cancellations
