"""Connections that are out for too long: each is logged once, with the stack that took it."""

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
"""Where a connection was taken, the innermost call first. It refers to no frame, and so to no
local variable."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """A connection that is out.

    Attributes:
        since: when it was taken, by `time.monotonic()`.
        describe: says who has it now.
        stack: where it was taken.
    """

    since: float
    describe: Callable[[], str]
    stack: Stack


class LeakWatch:
    """Looks at the oldest connection that is out when it comes of age.

    One timer for all of them, which is set only while a connection is out.
    """

    def __init__(self, threshold: float, suspects: Callable[[], Iterable[Suspect]]) -> None:
        """Prepare the watch; it begins with the first connection.

        Args:
            threshold: seconds.
            suspects: returns the connections that are out, the oldest first.
        """
        self._threshold = threshold
        self._suspects = suspects
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._looked_until = 0.0
        """Who has had a connection since then, or for longer, has been reported."""

    def connection_taken(self) -> Stack:
        """Set the timer where it is not set, and return the stack."""
        loop = asyncio.get_running_loop()
        if self._timer is None or self._loop is not loop:  # an application that started anew
            self._loop = loop
            self._timer = loop.call_later(self._threshold, self._look)
        return stack_of_caller()

    def stop(self) -> None:
        """Let the timer go."""
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
    """Return the calls that led here, also from below SQLAlchemy's greenlets."""
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
    "<sqlalchemy",  # what it generates
    *(os.path.dirname(os.path.abspath(file)) for file in (__file__, sqlalchemy.__file__)),
)
"""The code at the inner end of a stack, which says nothing about who took the connection."""


def _format(stack: Stack) -> str:
    calls = [(code.co_filename, line, code.co_name, None) for code, line in stack]
    first = next((i for i, call in enumerate(calls) if not call[0].startswith(_BELOW)), 0)
    return "".join(StackSummary.from_list(reversed(calls[first:])).format())
