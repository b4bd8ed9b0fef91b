"""One replica in one event loop: how far it has come, and whether it can be read from."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_db.drivers import driver_of
from asgi_db.drivers.describing import brief
from asgi_db.drivers.outages import connection_error
from asgi_db.drivers.replication import Position, Replication
from asgi_db.engine.variants import variant
from asgi_db.logs import logger
from asgi_db.modes import read_only
from asgi_db.pool.abandoned import connection_of
from asgi_db.pool.life import EngineLife
from asgi_db.replicas.history import History, Lag
from asgi_db.tasks import in_background

ASK_AGAIN_AFTER = 0.05
"""Seconds between two questions to a replica: how far it has come."""

LOOK_AGAIN_AFTER = 1.0
"""Seconds between two questions to a replica that no read waits for."""

ANSWER_TIMEOUT = 1.0
"""Seconds that a replica has for the answer."""

DOWN_FOR = 1.0
"""Seconds after a failure until a replica is asked whether it is there again."""

HEARD_FOR = 10.0
"""Seconds of silence after which a replica is asked before it is read from."""


class Replica:
    """A replica, and how far it has come.

    Attributes:
        name: the server, without user and password.
        life: its engine in this event loop, with its pool.
        reached: the position that it is known to have reached, for each system.
        units: the units of work that have run on it.
        behind: how often it had not come far enough.
        lag: how late it is.
    """

    def __init__(
        self, name: str, life: EngineLife, replication: Replication, history: History
    ) -> None:
        self.name = name
        self.life = life
        self.reached: dict[str, int] = {}
        self.units = self.behind = 0
        self.lag = Lag(history)
        self._replication = replication
        self._question: asyncio.Future[Any] | None = None
        self._asked = self._heard = -HEARD_FOR
        self._silent_since: float | None = None
        self._down_since: float | None = None
        life.connections.check_new = self._check_new

    @property
    def is_down(self) -> bool:
        """Whether it has failed, and has not answered since."""
        return self._down_since is not None

    @property
    def has_room(self) -> bool:
        """Whether its pool has a connection free, or may open one."""
        return self.life.connections.have_room

    def has(self, positions: tuple[Position, ...]) -> bool:
        """Return whether it is known to be there, and to have reached all of these positions."""
        now, silent_since = time.monotonic(), self._silent_since
        return (
            self._down_since is None
            and now - self._heard < HEARD_FOR
            and (silent_since is None or now - silent_since < ANSWER_TIMEOUT)
            and all(position.is_in(self.reached) for position in positions)
        )

    async def may_have(self, positions: tuple[Position, ...]) -> bool:
        """Ask it how far it has come, unless that was asked just now; see `has`.

        One question serves all that wait for it. No request waits for a replica that was down.
        """
        self.ask(ASK_AGAIN_AFTER)
        if self._question is not None and self._down_since is None:
            await asyncio.wait((self._question,))
        return self.has(positions)

    def ask(self, after: float) -> None:
        """Begin to ask it how far it has come; nothing waits for the answer here.

        Args:
            after: the seconds since the last question.
        """
        now = time.monotonic()
        if self._question is not None or not self.has_room or now - self._asked < after:
            return
        if self._down_since is None or now - self._down_since >= DOWN_FOR:
            self._asked = now
            self._question = in_background(self._ask())

    def begins(self) -> None:
        """Note that a unit of work is about to use it: it should be heard of soon."""
        self.units += 1
        if self._silent_since is None:
            self._silent_since = time.monotonic()

    def answered(self) -> None:
        """Note that it has executed a statement."""
        self._heard, self._silent_since = time.monotonic(), None

    def doubt(self) -> None:
        """Have it asked before it is used again: a statement has ended without its answer."""
        self._heard = -HEARD_FOR

    def failed(self, error: BaseException) -> None:
        """Note that it cannot be used, until it has answered a question."""
        if self._down_since is None:
            logger.warning(
                "The replica %s cannot be used: %s. What it would have read is read from another"
                " one, or from the primary.",
                self.name,
                brief(error).rstrip("."),
            )
        self._down_since = time.monotonic()
        self.reached.clear()  # after a crash it takes reads before it has all again that it had

    async def _ask(self) -> None:
        engine = variant(self.life.engine.sync_engine, read_only)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                async with connection_of(AsyncEngine(engine)) as connection:
                    self.reached = await connection.run_sync(self._ask_on)
            self.lag.answered(self.reached)
        except Exception as error:
            self.failed(error)
        else:
            self.answered()
            if self._down_since is not None:
                self._down_since = None
                logger.info("The replica %s is there again.", self.name)
        finally:
            self._question = None

    def _ask_on(self, connection: Connection) -> dict[str, int]:
        adapted = connection.connection.dbapi_connection
        try:
            return {} if adapted is None else self._reached_over(adapted)
        except BaseException:
            connection.invalidate()  # It may be in the middle of the answer.
            raise

    def _check_new(self, connection: DBAPIConnection) -> None:
        """Refuse a new connection to a replica that has lost what it had.

        It may have crashed without being missed. A unit of work that has chosen it, by what it had
        before, then moves to another server.
        """
        before = self.reached
        now = self._reached_over(connection)
        if not all(Position(*each).is_in(now) for each in before.items()):
            raise connection_error(ConnectionError("it has come back without all that it had"))

    def _reached_over(self, connection: DBAPIConnection) -> dict[str, int]:
        """Ask the question over a connection."""
        driver = driver_of(self.life.engine.dialect)
        return dict(self._replication.reached(driver.ask(connection, self._replication.question)))
