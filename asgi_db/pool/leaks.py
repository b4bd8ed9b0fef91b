"""Connections that are in use for too long: each is logged once, with the stack that took it."""

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
"""Where a connection was taken, the innermost call first. It refers to no frame, and therefore to
no local variable."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """A connection that is checked out.

    Attributes:
        since: when it was taken, by `time.monotonic()`.
        describe: names the request or block that has it now.
        stack: where it was taken.
    """

    since: float
    describe: Callable[[], str]
    stack: Stack


class LeakWatch:
    """Looks at the oldest connection that is checked out when it reaches the threshold.

    One timer serves all of them. It is set only while a connection is checked out.

    Attributes:
        threshold: the age that is reported, in seconds.
    """

    def __init__(self, threshold: float, suspects: Callable[[], Iterable[Suspect]]) -> None:
        """Prepare the watch; it begins with the first connection.

        Args:
            threshold: seconds.
            suspects: returns the connections that are checked out, the oldest first.
        """
        self.threshold = threshold
        self._suspects = suspects
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._looked_until = 0.0
        """Connections that were taken at this time or earlier have been reported."""

    def connection_taken(self) -> Stack:
        """Set the timer unless it is set, and return the stack of the caller."""
        loop = asyncio.get_running_loop()
        if self._timer is None or self._loop is not loop:  # the application was started again
            self._loop = loop
            self._timer = loop.call_later(self.threshold, self._look)
        return stack_of_caller()

    def stop(self) -> None:
        """Cancel the timer."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _look(self) -> None:
        self._timer = None
        due = time.monotonic() - self.threshold
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
            self.threshold,
            _format(suspect.stack).rstrip(),
        )


def stack_of_caller() -> Stack:
    """Return the calls that led here, through SQLAlchemy's greenlets."""
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
    "<sqlalchemy",  # the code that SQLAlchemy generates
    "<string>",  # the same in SQLAlchemy 2.0
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))),  # asgi_db
    os.path.dirname(os.path.abspath(sqlalchemy.__file__)),
)
"""Where the code at the inner end of a stack lies, which does not tell what took the connection."""


def _format(stack: Stack) -> str:
    calls = [(code.co_filename, line, code.co_name, None) for code, line in stack]
    first = next((i for i, call in enumerate(calls) if not call[0].startswith(_BELOW)), 0)
    return "".join(StackSummary.from_list(reversed(calls[first:])).format())
