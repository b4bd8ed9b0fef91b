"""The sandbox: a block in which everything is rolled back at the end."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from anyio.from_thread import BlockingPortal, start_blocking_portal
from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from asgi_db.drivers import driver_of, drivers_with_sandbox
from asgi_db.drivers.outages import connection_error
from asgi_db.drivers.sandbox import SandboxRules
from asgi_db.errors import SandboxError
from asgi_db.pool.engines import Engines
from asgi_db.pool.life import EngineLife
from asgi_db.tasks import run_to_completion
from asgi_db.testing.set_up import Creator, replace_creator, restore_creator
from asgi_db.testing.shared import SharedConnection, in_thread
from asgi_db.testing.stand_in import StandInConnection


class Sandbox:
    """A block in which everything that is written through a `Database` is rolled back at the end.

        with database.sandbox():  # or: async with
            ...

    Everything runs on one connection, whose transaction is rolled back at the end: what the
    application and the test commit meanwhile is visible to both of them, and to no other
    connection. It works in every event loop and thread of the process.
    """

    def __init__(self, engines: Engines) -> None:
        """Prepare it; use `database.sandbox()`.

        Args:
            engines: the engines whose writes are rolled back.
        """
        self._engines = engines
        self._portals = ExitStack()
        self._life: EngineLife | None = None
        self._shared: SharedConnection | None = None
        self._covered: dict[EngineLife, Creator] = {}

    # -- begin and end -------------------------------------------------------------------------

    def __enter__(self) -> Self:
        portal = self._begin()
        try:
            portal.call(self._open, portal)
            self._cover_all()
        except BaseException:
            self._end(portal)
            raise
        return self

    def __exit__(
        self,
        _: type[BaseException] | None,
        __: BaseException | None,
        ___: TracebackType | None,
    ) -> None:
        shared = self._uncover_all()
        self._end(shared.portal)

    async def __aenter__(self) -> Self:
        portal = self._begin()
        try:
            await run_to_completion(in_thread(portal, self._open, portal))
            self._cover_all()
        except BaseException:
            self._end(portal)
            raise
        return self

    async def __aexit__(
        self,
        _: type[BaseException] | None,
        __: BaseException | None,
        ___: TracebackType | None,
    ) -> None:
        shared = self._uncover_all()
        try:
            await run_to_completion(in_thread(shared.portal, self._close))
        finally:
            self._portals.close()

    def _begin(self) -> BlockingPortal:
        if self._engines.active_cover is not None:
            raise SandboxError(
                f"{self._engines.settings.url!r} is in a sandbox already: end it before you begin"
                " another, or use `async with session.begin_nested()` inside it."
            )
        held = [holder for life in self._engines.all() for holder in life.holders()]
        if held:
            raise SandboxError(
                f"A sandbox begins when nothing is open, but connections are held by:"
                f" {'; '.join(held)}. Begin the sandbox first."
            )
        portal = self._portals.enter_context(start_blocking_portal(name="asgi-db sandbox"))
        self._engines.active_cover = self
        return portal

    async def _open(self, portal: BlockingPortal) -> None:
        self._life = self._engines.make_side_engine()
        self._shared = SharedConnection(self._life.engine, portal, _rules(self._life))
        await self._shared.open()

    async def _close(self) -> None:
        try:
            if self._shared is not None:
                await self._shared.close()
        finally:
            if self._life is not None:
                await self._life.dispose()

    def _end(self, portal: BlockingPortal) -> None:
        self._engines.active_cover = None
        try:
            portal.call(self._close)
        finally:
            self._portals.close()

    # -- the engines ---------------------------------------------------------------------------

    def _cover_all(self) -> None:
        for life in self._engines.all():
            self.cover(life)

    def _uncover_all(self) -> SharedConnection:
        assert self._shared is not None
        self._engines.active_cover = None
        for life, creator in self._covered.items():
            engine = life.engine.sync_engine
            restore_creator(engine.pool, creator)
            event.remove(engine, "connect", self._connected)
            event.remove(engine, "checkout", self._check_out)
            life.connections.forget(StandInConnection)
        self._covered.clear()
        return self._shared

    def cover(self, life: EngineLife) -> None:
        """Connect an engine of the database to the sandbox instead of the server."""
        if life in self._covered:
            return
        engine = life.engine.sync_engine
        self._covered[life] = replace_creator(engine.pool, self._or_stand_in)
        event.listen(engine, "connect", self._connected)
        event.listen(engine, "checkout", self._check_out)

    def _or_stand_in(self, creator: Creator) -> Creator:
        def connect(entry: ConnectionPoolEntry) -> Any:
            return self._stand_in(entry) if self._is_active else creator(entry)

        return connect

    def _stand_in(self, entry: ConnectionPoolEntry) -> Any:
        assert self._shared is not None
        if not self._shared.is_usable:
            raise connection_error(ConnectionError("the sandbox's connection is closed"))
        return StandInConnection(self._shared, entry)

    def _connected(self, connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
        if isinstance(connection, StandInConnection):
            connection.is_set_up()

    def _check_out(
        self, connection: DBAPIConnection, _: ConnectionPoolEntry, __: PoolProxiedConnection
    ) -> None:
        if isinstance(connection, StandInConnection):
            # Other listeners may have sent statements.
            connection.commit()
        elif self._is_active:
            raise DisconnectionError("This connection is from before the sandbox.")

    @property
    def _is_active(self) -> bool:
        # When an engine is disposed, its new pool keeps the creator of the old one.
        return self._engines.active_cover is self


def _rules(life: EngineLife) -> type[SandboxRules]:
    dialect = life.engine.dialect
    rules = driver_of(dialect).sandbox
    if rules is None:
        raise SandboxError(
            f"There is no sandbox for the driver {dialect.driver}: use one of"
            f" {', '.join(drivers_with_sandbox())}."
        )
    return rules
