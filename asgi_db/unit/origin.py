"""What a session is for: a request, or a block of code."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

from asgi_db.modes import Mode
from asgi_db.pool.life import EngineLife
from asgi_db.statistics import Tally


class Origin(Protocol):
    """What a session is for: a request, or a block of code.

    Attributes:
        attempt: which attempt at the request it is, from 1.
        ends_at: when the mode's `timeout=` is over, in the event loop's time, if an earlier attempt
            has let it begin.
        is_over: whether the request or block has ended: its session refuses to work.
        task: the task to which the units belong that no other has begun; None if any may end them.
    """

    attempt: int = 1
    ends_at: float | None = None
    is_over: bool = False
    task: asyncio.Task[object] | None = None

    @property
    def session_options(self) -> Mapping[str, Any]:
        """The arguments with which SQLAlchemy's session is made."""
        ...

    def life(self) -> EngineLife:
        """Return the engine of the session's event loop, with its pool."""
        ...

    def route_mode(self) -> Mode | None:
        """Return the mode that the route itself sets, which wins over everything."""
        return None

    def default_mode(self) -> Mode:
        """Return the mode that holds if nothing stronger says otherwise."""
        ...

    def describe(self) -> str:
        """Name it, for messages."""
        ...

    def route(self) -> str:
        """Name it among the counters: it has one name, however often it comes."""
        return self.describe()

    def deadline_began(self, at: float) -> None:
        """Note when the time of a unit is over, in the event loop's time."""
        self.ends_at = None

    def unit_ended(self, tally: Tally) -> None:
        """Note what a unit of work has done."""
        return None
