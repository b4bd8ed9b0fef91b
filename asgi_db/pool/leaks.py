"""Logs each connection that is held for too long, once, with the stack that took it."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from traceback import StackSummary
from types import CodeType, FrameType

import greenlet  # type: ignore[import-untyped]
import sqlalchemy

from asgi_db.logs import logger

Stack = list[tuple[CodeType, int]]
"""Where a connection was taken, the innermost call first. It keeps no frame, and thus no local
variable, alive."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """A connection that is checked out.

    Attributes:
        since: when it was taken, by `time.monotonic()`.
        describe: names its present holder.
        stack: where it was taken.
    """

    since: float
    describe: Callable[[], str]
    stack: Stack


class LeakWatch:
    """Reports connections that have been checked out for longer than a threshold.

    There is one timer for all of them, which is set only while a connection is checked out.
    """

    def __init__(self, threshold: float, suspects: Callable[[], Iterable[Suspect]]) -> None:
        """Prepare the watch; it begins with the first connection.

        Args:
            threshold: seconds.
            suspects: returns the connections that are checked out, the oldest first.
        """
        self._threshold = threshold
        self._suspects = suspects
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._looked_until = 0.0
        """Connections taken before this time have been reported."""

    def connection_taken(self) -> Stack:
        """Set the timer if necessary, and return the stack of the caller."""
        loop = asyncio.get_running_loop()
        # The event loop is another one if the application was started again.
        if self._timer is None or self._loop is not loop:
            self._loop = loop
            self._timer = loop.call_later(self._threshold, self._look)
        return stack_of_caller()

    def stop(self) -> None:
        """Cancel the timer."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _look(self) -> None:
        self._timer = None
        due = time.monotonic() - self._threshold
        for suspect in self._suspects():
            if suspect.since > due:
                assert self._loop is not None
                self._timer = self._loop.call_later(suspect.since - due, self._look)
                break
            if suspect.since > self._looked_until:
                self._report(suspect)
        self._looked_until = due

    def _report(self, suspect: Suspect) -> None:
        logger.warning(
            "%s has held a connection for %.1f s, which is longer than leak_threshold=%g. It was"
            " taken here:\n%s",
            suspect.describe(),
            time.monotonic() - suspect.since,
            self._threshold,
            _format(suspect.stack).rstrip(),
        )


def stack_of_caller() -> Stack:
    """Return the calls that led here, including those outside SQLAlchemy's greenlets."""
    stack: Stack = []
    current: greenlet.greenlet | None = greenlet.getcurrent()
    frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while current is not None:
        while frame is not None:
            stack.append((frame.f_code, frame.f_lineno))
            frame = frame.f_back
        current = current.parent
        frame = None if current is None else current.gr_frame
    return stack


_BELOW = (
    "<sqlalchemy",  # SQLAlchemy's generated code has such file names.
    *(os.path.dirname(os.path.abspath(file)) for file in (__file__, sqlalchemy.__file__)),
)
"""Where the inner end of a stack lies, which does not tell what code took the connection."""


def _format(stack: Stack) -> str:
    calls = [(code.co_filename, line, code.co_name, None) for code, line in stack]
    first = next((i for i, call in enumerate(calls) if not call[0].startswith(_BELOW)), 0)
    return "".join(StackSummary.from_list(reversed(calls[first:])).format())
