"""Turns: requests of one route that have lost a conflict work one after the other.

Side by side they would make each other lose again. A request that has not lost begins at once, but
for one case: a request that has lost again in its turn goes alone, and those of its route that come
then wait for the end of its turn. Otherwise a few lucky clients would be served again and again,
because the next request of who has won begins as early as the next attempt of who has lost.
"""

from __future__ import annotations

import asyncio
from weakref import WeakKeyDictionary, WeakValueDictionary

LONGEST_TURN = 1.0
"""Seconds that an attempt may take before the next request has its turn beside it."""


class Gates:
    """The gates of an application's routes, in each event loop its own.

    Attributes:
        closed: those that are closed to newcomers.
    """

    def __init__(self) -> None:
        self.closed = set[Gate]()
        self._gates = WeakKeyDictionary[asyncio.AbstractEventLoop, WeakValueDictionary[str, Gate]]()

    async def turn(self, route: str, ends_at: float | None) -> Turn:
        """Wait for a turn at the gate of a route.

        Args:
            route: the name of the route.
            ends_at: when the wait ends in any case, by the event loop's clock; None if never.
        """
        gates = self._gates.setdefault(asyncio.get_running_loop(), WeakValueDictionary())
        gate = gates.get(route)
        if gate is None:  # It lasts as long as a turn, or a request that waits for one.
            gate = gates[route] = Gate(self.closed)
        try:
            async with asyncio.timeout_at(ends_at):
                await gate.acquire()
        except TimeoutError:
            return Turn(None)
        return Turn(gate)

    async def wait_until_open(self, route: str) -> None:
        """Let a request of this route go alone that has lost again in its turn, for so long."""
        gates = self._gates.get(asyncio.get_running_loop())
        gate = None if gates is None else gates.get(route)
        if gate is not None and gate.opened is not None:
            await asyncio.wait((gate.opened,), timeout=LONGEST_TURN)


class Gate(asyncio.Lock):
    """The gate of one route: whose turn it is has acquired it.

    Attributes:
        opened: done when it is open to newcomers again; None while it is.
    """

    opened: asyncio.Future[None] | None = None

    def __init__(self, closed: set[Gate]) -> None:
        """Make it.

        Args:
            closed: the gates that are closed, which it joins and leaves.
        """
        super().__init__()
        self._closed = closed

    def close(self) -> None:
        """Close it to newcomers, until the turn is over."""
        if self.opened is None:
            self.opened = asyncio.get_running_loop().create_future()
            self._closed.add(self)

    def open(self) -> None:
        """Open it to newcomers."""
        opened, self.opened = self.opened, None
        if opened is not None:
            opened.set_result(None)
            self._closed.discard(self)


class Turn:
    """The turn of one request, which lasts over its further attempts."""

    def __init__(self, gate: Gate | None) -> None:
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
        """Give another attempt the whole time of a turn, in which it goes alone."""
        self._timer.cancel()
        self._timer = self._limit()
        if self._gate is not None:
            self._gate.close()

    def end(self) -> None:
        """Let the next request have its turn."""
        self._timer.cancel()
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.open()
            gate.release()
