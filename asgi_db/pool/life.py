"""The lifecycle of an engine: its connections, its variants, and its end."""

from __future__ import annotations

import threading

import anyio
from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_db.engine import variant, watch
from asgi_db.logs import logger
from asgi_db.modes import Mode
from asgi_db.pool.abandoned import AbandonedStatements
from asgi_db.pool.connections import Connections
from asgi_db.statistics import Statistics

DISPOSE_TIMEOUT = 10.0
"""Seconds that `dispose` waits for checked-out connections before it terminates them."""


class EngineLife:
    """An engine with its connections, from its making until it is disposed."""

    def __init__(
        self,
        engine: AsyncEngine,
        statistics: Statistics,
        *,
        given: bool = False,
        pooler: bool = False,
        verify: bool = False,
        leak_threshold: float | None = None,
    ) -> None:
        """Look after an engine.

        Args:
            statistics: counts its connections.
            given: whether it belongs to the user, so that it is not disposed.
            pooler: whether there is a pooler between it and its server.
            verify: ping its connections before use; see `Connections`.
            leak_threshold: see `Connections`.
        """
        watch(engine.sync_engine)
        self.engine = engine
        self.statistics = statistics
        self.connections = Connections(
            engine, statistics, pooler=pooler, verify=verify, leak_threshold=leak_threshold
        )
        self._abandoned = AbandonedStatements(engine, pooler=pooler)
        self._given = given
        self._variants: dict[tuple[Engine, tuple[object, ...]], Engine] = {}
        self._lock = threading.Lock()  # It is held while a variant is made.

    def bind_for(self, bind: Engine | Connection, mode: Mode) -> Engine | Connection:
        """Return the variant of an engine whose transactions begin as the mode requires.

        Args:
            bind: this engine, or another one that the user's session is bound to.
            mode: the mode; modes that begin alike share one variant.
        """
        if isinstance(bind, Connection):
            return bind
        key = bind, mode.characteristics
        found = self._variants.get(key)
        if found is None:
            with self._lock:
                found = self._variants[key] = variant(bind, mode)
        return found

    def holders(self) -> list[str]:
        """Say which routes hold the checked-out connections, and for how long."""
        return [str(holder) for holder in self.connections.holders()]

    def leave_to_parent(self) -> None:
        """Keep this forked process from touching the sockets that it shares with its parent."""
        # The old lock may be held by a thread that exists only in the parent.
        self._lock = threading.Lock()
        if not self._given:
            self.connections.leave_to_parent()

    async def dispose(self) -> None:
        """Close every connection; those checked out have `DISPOSE_TIMEOUT` to be returned."""
        if not self._given:
            with anyio.move_on_after(DISPOSE_TIMEOUT):
                await self.connections.all_returned()
            with anyio.move_on_after(DISPOSE_TIMEOUT):
                await self.engine.dispose()
            await self._abandoned.all_ended()
            self.terminate()
        await self._abandoned.all_ended()

    def terminate(self) -> None:
        """Terminate every connection that is still open."""
        if self._given:
            return
        terminated = self.connections.terminate()
        if terminated:
            logger.warning(
                "%d connections were terminated: they were not returned to the pool in %.0f s, or"
                " their event loop was closed without `await database.dispose()`.",
                terminated,
                DISPOSE_TIMEOUT,
            )
