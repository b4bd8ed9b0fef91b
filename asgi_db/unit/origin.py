"""What a session is for: a request, or a block of code."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_db.modes import Mode
from asgi_db.statistics import Tally
from asgi_db.unit.session import DBSession
from asgi_db.unit.unit_of_work import UnitOfWork

if TYPE_CHECKING:
    from asgi_db.database import Database


class Origin:
    """What a session is for: a request, or a block of code.

    It has the session's unit of work, which is made when somebody first asks for it.

    Attributes:
        database: where the session comes from.
        attempt: which attempt at the request it is, from 1.
        ends_at: when the mode's `timeout=` is over, in the event loop's time, if an earlier attempt
            has let it begin.
        was_used: whether anybody has asked for the unit of work.
        task: the task to which the units belong that no other has begun; None if any may end them.
    """

    database: Database
    attempt = 1
    ends_at: float | None = None
    was_used = False
    task: asyncio.Task[object] | None = None
    _unit: UnitOfWork | None = None
    _is_over = False

    def engine(self) -> AsyncEngine:
        """Return the engine of the session's event loop."""
        return self.database.engine

    def route_mode(self) -> Mode | None:
        """Return the mode that the route itself sets, which wins over everything."""
        return None

    def default_mode(self) -> Mode:
        """Return the mode that holds if nothing stronger says otherwise."""
        raise NotImplementedError

    def describe(self) -> str:
        """Name it, for messages."""
        raise NotImplementedError

    def route(self) -> str:
        """Name it among the counters: it has one name, however often it comes."""
        return self.describe()

    def unit_ended(self, tally: Tally) -> None:
        """Take note of what a unit of work has done."""

    def unit_of_work(self, session: DBSession) -> UnitOfWork:
        """Return the unit of work of the session, which is the same for as long as this lasts."""
        unit = self._unit
        if unit is None:
            unit = UnitOfWork(session, self)
            self.was_used = True
            if self._is_over:
                unit.close()
            else:
                self._unit = unit
        return unit

    def serves(self, database: Database) -> bool:
        """Whether it is still there, and for this database."""
        return self.database is database and not self._is_over

    def close(self) -> None:
        """Let the session go for good: whoever still uses it gets an error.

        What refers to each other comes apart here, so that nothing waits for the garbage
        collector, and the memory serves the next request while it is warm.
        """
        self._is_over = True
        if (unit := self._unit) is not None:
            self._unit = None
            unit.close()
