"""Turns: requests of one route that have lost a conflict work one after the other.

Side by side they would make each other lose again. A request that has not lost does not wait here.
"""

from __future__ import annotations

import asyncio
from weakref import WeakKeyDictionary, WeakValueDictionary

LONGEST_TURN = 1.0
"""Seconds that an attempt may take before the next request has its turn beside it."""


class Gates:
    """The gates of an application's routes, in each event loop its own."""

    def __init__(self) -> None:
        self._gates = WeakKeyDictionary[
            asyncio.AbstractEventLoop, WeakValueDictionary[str, asyncio.Lock]
        ]()

    async def turn(self, route: str, ends_at: float | None) -> Turn:
        """Wait for a turn at the gate of a route.

        Args:
            route: the name of the route.
            ends_at: when the wait ends in any case, by the event loop's clock; None if never.
        """
        gates = self._gates.setdefault(asyncio.get_running_loop(), WeakValueDictionary())
        gate = gates.get(route)
        if gate is None:  # It lasts as long as a turn, or a request that waits for one.
            gate = gates[route] = asyncio.Lock()
        try:
            async with asyncio.timeout_at(ends_at):
                await gate.acquire()
        except TimeoutError:
            return Turn(None)
        return Turn(gate)


class Turn:
    """The turn of one request, which lasts over its further attempts."""

    def __init__(self, gate: asyncio.Lock | None) -> None:
        """Begin it.

        Args:
            gate: what the turn has acquired; None if the time of the request was over before.
        """
        self._gate = gate
        self._timer = self._limit()

    def _limit(self) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(LONGEST_TURN, self.end)

    @property
    def is_over(self) -> bool:
        """Whether the next request may have its turn."""
        return self._gate is None

    def extend(self) -> None:
        """Give another attempt the whole time of a turn."""
        self._timer.cancel()
        self._timer = self._limit()

    def end(self) -> None:
        """Let the next request have its turn."""
        self._timer.cancel()
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.release()
