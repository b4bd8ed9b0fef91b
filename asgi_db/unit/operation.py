"""The running operation of a session, which serves one task at a time."""

from __future__ import annotations

import asyncio
from typing import NamedTuple


class Operation(NamedTuple):
    """A running call of the session, including all the calls that it makes itself.

    Attributes:
        name: the method of the session.
        task: the task that runs it; at the end of a unit, the task that ends the unit.
        began: when it began, by `time.monotonic()`.
    """

    name: str
    task: asyncio.Task[object] | None
    began: float


DISCARDING = frozenset({"close", "invalidate", "reset"})
"""Operations that discard a transaction; they are harmless after the request has ended."""

ENDS_UNIT = frozenset({"rollback", *DISCARDING})
"""Operations that end the unit without a COMMIT, whatever mode it has."""

MAY_BE_LATE = frozenset({"commit", *ENDS_UNIT})
"""Operations that end the unit, and may do so even when its time is over."""

KEEPS_CONNECTION = frozenset({"connection", "begin", "begin_nested"})
"""Operations that return the open connection or transaction itself."""

READS = frozenset({"execute", "scalar", "scalars", "get", "get_one", "refresh"})
"""Operations in autocommit after which the connection is kept for the next one of them, from the
second one on and until the event loop turns: a handler that waits for anything else holds none."""

WAITING = "wait for the body"
"""The end of a unit that gives its connection back before a wait for the network. An operation of
another task is not refused meanwhile, but comes after it."""
