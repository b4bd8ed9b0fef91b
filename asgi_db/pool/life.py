"""One engine with all that belongs to it, from when it is made until it is disposed."""

from __future__ import annotations

import threading
from collections.abc import Callable

import anyio
from sqlalchemy import Connection, Engine
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_db.engine.variants import isolation_options, refuse_autocommit, variant
from asgi_db.engine.watching import time_statements, watch
from asgi_db.errors import SandboxError
from asgi_db.logs import logger
from asgi_db.modes import Mode
from asgi_db.pool.abandoned import AbandonedStatements
from asgi_db.pool.connections import Connections
from asgi_db.statistics import Statistics

DISPOSE_TIMEOUT = 10.0
"""Seconds that `dispose` waits for connections that are in use, before it terminates them."""

MOST_VARIANTS = 200
"""Variants that are kept. A session whose `get_bind` makes an engine with options of its own for
each statement, such as a `schema_translate_map`, would otherwise fill the memory with them."""


class OtherEngines:
    """The user's own engines to which the sessions of a database are bound beside its own."""

    def __init__(self, statistics: Statistics, is_covered: Callable[[], bool]) -> None:
        """Prepare for them.

        Args:
            statistics: where their connections are counted.
            is_covered: whether a sandbox is active, which does not cover them.
        """
        self._statistics = statistics
        self._is_covered = is_covered
        self._lives: dict[Dialect, EngineLife] = {}

    def look_after(self, engine: Engine) -> None:
        """Look after an engine, or one of its variants, as after the database's own.

        Raises:
            SandboxError: a sandbox is active.
            ConfigurationError: the engine commits each statement by itself.
        """
        if self._is_covered():
            raise SandboxError(
                f"A session is bound to {engine.url!r} too, and a sandbox does not undo what is"
                " written there: in the tests bind it to the engine of the Database alone, or give"
                " the other engine a Database and a sandbox of its own."
            )
        if engine.dialect not in self._lives:
            refuse_autocommit("An engine in binds= or bind_arguments=", isolation_options(engine))
            self._lives[engine.dialect] = EngineLife(
                AsyncEngine(engine), self._statistics, self, given=True
            )

    def all(self) -> list[EngineLife]:
        """Return the engines that a session has used, each with its life."""
        return list(self._lives.values())


class EngineLife:
    """An engine in the event loop that uses it, with its connections and variants.

    Attributes:
        engine: the engine.
        statistics: where its connections are counted.
        connections: its open connections.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        statistics: Statistics,
        others: OtherEngines,
        *,
        given: bool = False,
        pooler: bool = False,
        verify: bool = False,
        leak_threshold: float | None = None,
    ) -> None:
        """Watch an engine.

        Args:
            statistics: where its connections are counted.
            others: the engines beside it.
            given: the engine belongs to the user, and is not disposed.
            pooler: a pooler stands between the engine and its server.
            verify: ping its connections before use; see `Connections`.
            leak_threshold: see `Connections`.
        """
        watch(engine.sync_engine)
        self.engine = engine
        self.statistics = statistics
        # It asks a new connection for its server, before the next one takes it for set up.
        self._abandoned = AbandonedStatements(engine, pooler=pooler)
        self.connections = Connections(
            engine, statistics, pooler=pooler, verify=verify, leak_threshold=leak_threshold
        )
        self._given = given
        self._others = others
        self._variants: dict[tuple[Engine, tuple[object, ...]], Engine] = {}
        self._lock = threading.Lock()  # held while a variant is made
        for listener in statistics.new_engine:
            listener(engine.sync_engine)

    def bind_for(self, bind: Engine | Connection, mode: Mode) -> Engine | Connection:
        """Return the variant of an engine on which transactions begin as the mode says.

        Args:
            bind: this engine, or another one that the user's session is bound to.
            mode: modes that begin alike share one variant.
        """
        if isinstance(bind, Connection):
            return bind
        if bind is not self.engine.sync_engine and bind.dialect is not self.engine.dialect:
            self._others.look_after(bind)
        key = bind, mode.characteristics
        found = self._variants.get(key)
        if found is None:
            with self._lock:
                if len(self._variants) >= MOST_VARIANTS:
                    self._variants.clear()
                found = self._variants[key] = variant(bind, mode)
                if self.statistics.is_tracing:
                    time_statements(found)
        return found

    def holders(self) -> list[str]:
        """Return the routes that have a connection checked out, and for how long."""
        return [str(holder) for holder in self.connections.holders()]

    def leave_to_parent(self) -> None:
        """After a fork: leave the sockets, which are shared, to the parent process."""
        self._lock = threading.Lock()  # a thread of the parent may hold the other one for ever
        if not self._given:
            self.connections.leave_to_parent()

    async def dispose(self) -> None:
        """Close every connection; those in use have `DISPOSE_TIMEOUT` seconds to come back."""
        if not self._given:
            with anyio.move_on_after(DISPOSE_TIMEOUT):
                await self.connections.all_returned()
            with anyio.move_on_after(DISPOSE_TIMEOUT):
                await self.engine.dispose()
            await self._abandoned.all_ended()
            self._terminate(f"not returned to the pool in {DISPOSE_TIMEOUT:.0f} s")
        await self._abandoned.all_ended()

    def terminate(self) -> None:
        """Terminate the connections that are still open, because their event loop is closed."""
        if not self._given:
            self._terminate(
                "not returned to the pool before their event loop was closed without `await"
                " database.dispose()`"
            )

    def _terminate(self, why: str) -> None:
        # A connection that nobody used harms nobody, also where each test has its own event loop.
        if holders := self.connections.terminate():
            logger.warning(
                "%d connections were terminated: they were %s. They were held by: %s",
                len(holders),
                why,
                "; ".join(map(str, holders)),
            )
