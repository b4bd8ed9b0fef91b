"""The operation of a session that is running: one task at a time."""

from __future__ import annotations

import asyncio
from typing import NamedTuple


class Operation(NamedTuple):
    """A call of the session which is running, with all the calls that it makes itself.

    Attributes:
        name: the method of the session.
        task: the task that runs it; for the end of a unit, the task that ends it.
        began: when it began, by `time.monotonic()`.
    """

    name: str
    task: asyncio.Task[object] | None
    began: float


DISCARDING = frozenset({"close", "invalidate", "reset"})
"""Operations which discard a transaction; they are harmless when the request is over."""

MAY_BE_LATE = frozenset({"commit", "rollback", *DISCARDING})
"""Operations which end the unit, and may do so when its time is over."""

KEEPS_CONNECTION = frozenset({"connection", "begin", "begin_nested"})
"""Operations whose very result is the open connection or transaction."""
