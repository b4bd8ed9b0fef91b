"""What a session is for: a request, or a block of code."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

from asgi_db.errors import ConfigurationError, ModeConflictError
from asgi_db.modes import Mode
from asgi_db.pool.life import EngineLife
from asgi_db.statistics import Tally


class Origin(Protocol):
    """What a session is for: a request, or a block of code.

    Attributes:
        attempt: which attempt at the request it is, from 1.
        asked: the mode that the dependencies of the handler stand for, if they stand for one.
        ends_at: when the mode's `timeout=` is over, in the event loop's time, if an earlier attempt
            has let it begin.
        is_over: whether the request or block has ended: its session refuses to work.
        task: the task to which the units belong that no other has begun; None if any may end them.
    """

    attempt: int = 1
    asked: Mode | None = None
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

    def describe(self) -> str:
        """Name it, for messages."""
        ...

    def route(self) -> str:
        """Name it among the counters: it has one name, however often it comes."""
        return self.describe()

    # -- the mode ------------------------------------------------------------------------------

    def route_mode(self) -> Mode | None:
        """Return the mode that the route itself sets, which wins over everything."""
        return None

    def default_mode(self) -> Mode:
        """Return the mode that holds if nothing stronger says otherwise."""
        ...

    def mode(self) -> Mode:
        """Return the mode for a unit that begins now.

        Strongest first: the route, the dependency that the handler takes, the default.
        """
        return self.route_mode() or self.asked or self.default_mode()

    def ask(self, mode: Mode, begun: Mode | None) -> None:
        """Note the mode that a dependency stands for; the strongest one wins.

        Args:
            mode: the mode.
            begun: the mode in which a statement has already run.

        Raises:
            ModeConflictError: a statement has already run in a weaker mode, or an earlier
                dependency has asked for the same mode with other options.
            ConfigurationError: the mode has `retries=`.
        """
        if mode.retries:
            raise ConfigurationError(
                f"{self.describe()}: a dependency comes too late for retries={mode.retries}, when"
                " the body may have been read: put the mode on the route, or into the middleware."
            )
        asked = self.asked
        if asked is not None and asked.covers(mode):
            return
        if self.route_mode() is None:  # else the route's mode wins
            if asked is not None and not mode.covers(asked):
                raise ModeConflictError.at_odds(repr(mode), repr(asked), self.describe())
            if begun is not None and not begun.covers(mode):
                raise ModeConflictError.too_late(mode.name, begun.name, self.describe())
        self.asked = mode

    # -- what a unit tells it ------------------------------------------------------------------

    def deadline_began(self, at: float) -> None:
        """Note when the time of a unit is over, in the event loop's time."""
        self.ends_at = None

    def unit_ended(self, tally: Tally) -> None:
        """Note what a unit of work has done."""
        return None
