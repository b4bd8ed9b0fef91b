"""The `timeout=` of a mode."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Deadline:
    """The end of the time that the statements of a unit may take.

    As `asyncio.timeout`, but it watches only while an operation of the session runs.
    """

    def __init__(self, timeout: float, at: float | None = None) -> None:
        """Let the time begin.

        Args:
            timeout: seconds.
            at: its end in the event loop's time, if it has begun before.
        """
        self.timeout = timeout
        self._loop = asyncio.get_running_loop()
        self.at = self._loop.time() + timeout if at is None else at
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None
        self._cancellations = 0
        self._has_cut_off = False

    @property
    def left(self) -> float:
        """Seconds until then."""
        return self.at - self._loop.time()

    def watch_task(self, least: float = 0.0) -> None:
        """Cancel the running task when the time is over.

        Args:
            least: seconds that it gets in any case.
        """
        if self._timer is None and (task := asyncio.current_task()) is not None:
            self._task = task
            self._cancellations = task.cancelling()
            at = max(self.at, self._loop.time() + least)
            self._timer = self._loop.call_at(at, self._cut_off)

    def _cut_off(self) -> None:
        if self._task is not None:
            self._has_cut_off = True
            self._task.cancel()

    @property
    def is_over(self) -> bool:
        """Whether the time is over."""
        return self.left <= 0

    def when_over(self, callback: Callable[[], None]) -> None:
        """Call a function when the time is over."""
        self._loop.call_at(self.at, callback)

    def stop_watching(self) -> None:
        """Leave the task alone."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def has_cut_off(self, error: BaseException | None) -> bool:
        """Say whether this, and nothing else, has cancelled the operation; stop watching."""
        self.stop_watching()
        if not self._has_cut_off or self._task is None:
            return False
        self._has_cut_off = False
        remaining = self._task.uncancel()
        return isinstance(error, asyncio.CancelledError) and remaining <= self._cancellations
