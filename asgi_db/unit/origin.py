"""The request or block of code that a session is for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_db.errors import ConfigurationError, ModeConflictError
from asgi_db.modes import Mode
from asgi_db.statistics import Statistics, Tally


class UnitLife(Protocol):
    """The engine of a session, with its pool, as the unit of work uses it."""

    engine: AsyncEngine
    statistics: Statistics

    def bind_for(self, bind: Engine | Connection, mode: Mode) -> Engine | Connection:
        """Return the variant of an engine on which transactions begin as the mode says."""
        ...

    def holders(self) -> list[str]:
        """Return the routes that have a connection checked out, and for how long."""
        ...


class Origin(Protocol):
    """The request or block of code that a session is for.

    Attributes:
        attempt: the number of this attempt at the request, from 1.
        asked: the mode that the handler's dependencies ask for, if any.
        before_unit: awaited before a unit has its first connection; None if there is nothing to
            wait for.
        ends_at: when the mode's `timeout=` ends, by the event loop's clock, if the time began in
            an earlier attempt.
        loop: the event loop in which the session is used.
        is_over: whether the request or block has ended, so that its session refuses to work.
        is_asked_anew: whether a mode was asked for, or has become the default, after the last call
            of `mode`.
        task: the task that owns each unit not begun by another task; None if any task may end it.
        waiting: the tasks that wait for their turn with the session, if any.
    """

    attempt: int = 1
    asked: Mode | None = None
    before_unit: Callable[[], Awaitable[None]] | None = None
    ends_at: float | None = None
    is_over: bool = False
    loop: asyncio.AbstractEventLoop
    is_asked_anew: bool = False
    task: asyncio.Task[object] | None = None
    waiting: tuple[asyncio.Future[None], ...] = ()

    @property
    def session_options(self) -> Mapping[str, Any]:
        """The arguments for the constructor of SQLAlchemy's session."""
        ...

    def life(self) -> UnitLife:
        """Return the engine of the session's event loop, with its pool."""
        ...

    def describe(self) -> str:
        """Name the request or block, for messages."""
        ...

    def route(self) -> str:
        """Name it for the counters, with the same name each time."""
        return self.describe()

    # -- the mode ------------------------------------------------------------------------------

    def route_mode(self) -> Mode | None:
        """Return the mode that the route itself sets, which takes precedence over all others."""
        return None

    def default_mode(self) -> Mode:
        """Return the mode that applies if nothing else sets one."""
        ...

    def mode(self) -> Mode:
        """Return the mode for a unit that begins now.

        In order of precedence: the route, the dependency of the handler, the default.
        """
        self.is_asked_anew = False
        return self.route_mode() or self.asked or self.default_mode()

    def has_moved(self) -> bool:
        """Return whether `mode` may return something else than it did the last time."""
        return self.is_asked_anew

    def ask(self, mode: Mode) -> None:
        """Note the mode that a dependency asks for; the strongest one takes precedence.

        Raises:
            ModeConflictError: an earlier dependency has asked for the same mode with other options.
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
        if self.route_mode() is None and asked is not None and not mode.covers(asked):
            raise ModeConflictError.at_odds(repr(mode), repr(asked), self.describe())
        self.asked = mode
        self.is_asked_anew = True

    # -- one task at a time --------------------------------------------------------------------

    def takes_turns(self, task: asyncio.Task[object]) -> bool:
        """Return whether a task waits for others that do so too, instead of getting an error."""
        return False

    def next_turn(self) -> asyncio.Future[None]:
        """Return what a task waits for until the operation of another task has ended."""
        turn: asyncio.Future[None] = self.loop.create_future()
        self.waiting = (*self.waiting, turn)
        return turn

    def end_turn(self) -> None:
        """Let the tasks that wait see for themselves which of them is next."""
        waiting, self.waiting = self.waiting, ()
        for turn in waiting:
            if not turn.done():
                turn.set_result(None)

    # -- what a unit reports -------------------------------------------------------------------

    def deadline_began(self, at: float) -> None:
        """Note when the time of a unit ends, by the event loop's clock."""
        self.ends_at = None

    def begins_anew(self) -> None:
        """Note that the unit was given back, and that the next one has a mode of its own."""
        return None

    def unit_ended(self, tally: Tally) -> None:
        """Note what a unit of work has done."""
        return None
