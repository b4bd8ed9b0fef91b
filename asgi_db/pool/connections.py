"""The open connections of an engine, and those of them which are checked out."""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import anyio
from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DisconnectionError, InvalidatePoolError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, QueuePool

from asgi_db.drivers import driver_of
from asgi_db.drivers.connecting import connect_is_complete
from asgi_db.drivers.outages import connection_error
from asgi_db.engine.unit import UNIT_INFO, Unit
from asgi_db.engine.writes import writes_of
from asgi_db.logs import logger
from asgi_db.pool.fair import FairPool
from asgi_db.pool.leaks import LeakWatch, Stack, Suspect
from asgi_db.statistics import WITHOUT_SESSION, Holder, PoolStats, Statistics

VERIFY_AFTER_IDLE = 1.0
"""Seconds of idleness after which a pooled connection is pinged before it is used."""


_VERIFIED = "asgi_db_verified"
"""The key in a connection's `info` for when it was made, or pinged last."""

_RETURNED = "asgi_db_returned"
"""The key in a connection's `info` for when it was last returned; one that is new has none."""


class Held(NamedTuple):
    """A connection that is checked out.

    Attributes:
        proxy: what its user has. It is held weakly: a connection that was forgotten frees its place
            in the pool when its proxy is collected.
        since: when it was checked out, by `time.monotonic()`.
        stack: where it was checked out, if leaks are looked for.
    """

    proxy: weakref.ref[PoolProxiedConnection]
    since: float
    stack: Stack


class Connections:
    """The open connections of an engine, and which of them are checked out.

    Attributes:
        check_new: called with each new connection before it counts as set up; it raises an error
            if the connection is not to be used.
    """

    check_new: Callable[[DBAPIConnection], None] | None = None
    _has_named_idle_limit = False

    def __init__(
        self,
        engine: AsyncEngine,
        statistics: Statistics,
        *,
        pooler: bool,
        verify: bool,
        leak_threshold: float | None,
    ) -> None:
        """Watch an engine.

        Args:
            statistics: counts the connections that are taken without a session.
            pooler: a pooler stands between the engine and its server.
            verify: ping a connection before it is used, if it has been idle for a while.
                SQLAlchemy's `pool_pre_ping` pings each time, which triples the round trips of a
                short read.
            leak_threshold: seconds after which a connection that is still out is logged.
        """
        self._engine = engine
        self._dialect = engine.dialect
        self._driver = driver_of(engine.dialect)
        self._statistics = statistics
        self._behind_pooler = pooler
        self._verify = verify
        self._writes = writes_of(engine.dialect)
        self._open: dict[ConnectionPoolEntry, DBAPIConnection] = {}
        self._out: dict[ConnectionPoolEntry, Held] = {}
        self._leaks = None if leak_threshold is None else LeakWatch(leak_threshold, self._suspects)
        self._returned: anyio.Event | None = None  # while `all_returned` waits
        target = engine.sync_engine
        event.listen(target, "connect", self._connect)
        event.listen(target, "close", self._close)
        event.listen(target, "checkout", self._checkout)
        event.listen(target, "checkin", self._checkin)
        event.listen(target, "detach", self._detach)

    def _connect(self, connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        if self.check_new is not None:
            self.check_new(connection)
        connect_is_complete()
        self._driver.adopt(self._dialect.get_driver_connection(connection))
        entry.info[_VERIFIED] = time.monotonic()
        self._open = self._still_open()
        self._open[entry] = connection

    def _still_open(self) -> dict[ConnectionPoolEntry, DBAPIConnection]:
        """Leave out what SQLAlchemy closed without an event because setting it up had failed."""
        return {
            entry: connection
            for entry, connection in self._open.copy().items()
            if entry.dbapi_connection is connection
        }

    def _close(self, _: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        self._open.pop(entry, None)

    def _checkout(
        self, connection: DBAPIConnection, entry: ConnectionPoolEntry, proxy: PoolProxiedConnection
    ) -> None:
        now = time.monotonic()
        returned: float | None = entry.info.get(_RETURNED)
        driver_connection = self._dialect.get_driver_connection(connection)
        if self._driver.is_closed(driver_connection):
            closed = "the server has closed this connection"
            if returned is not None:
                self._name_idle_limit(driver_connection)
                raise DisconnectionError(closed)  # the pool tries another one, a few times
            raise connection_error(ConnectionError(closed))
        if self._writes.are_refused and returned is not None:
            # However busy it is: another server may take over.
            returned = entry.info.get(_VERIFIED, returned)
        if returned is not None and now - returned > VERIFY_AFTER_IDLE:
            if self._verify or self._writes.are_refused:
                self._ping(connection, entry)
        stack = [] if self._leaks is None else self._leaks.connection_taken()
        self._out[entry] = Held(weakref.ref(proxy), now, stack)

    def _name_idle_limit(self, connection: object) -> None:
        limit = self._driver.idle_limit(connection, in_transaction=False)
        if limit is not None and not self._has_named_idle_limit:
            self._has_named_idle_limit = True
            logger.warning(
                "The server has closed a connection that was idle in the pool: its %s. Such a"
                " connection is replaced; with a higher limit it would be kept.",
                limit,
            )

    def _ping(self, connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        try:
            if self._writes.are_asked_for:
                takes_writes = self._driver.takes_writes(self._dialect, connection)
            else:
                takes_writes = self._dialect.do_ping(connection)
        except Exception as error:  # of any kind: the pool replaces this and all older ones
            raise InvalidatePoolError(str(error)) from error
        if not takes_writes:
            raise InvalidatePoolError("this server only reads")
        self._writes.are_refused = False
        entry.info[_VERIFIED] = time.monotonic()

    def _checkin(self, _: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
        unit: Unit | None = entry.info.pop(UNIT_INFO, None)
        entry.info[_RETURNED] = now = time.monotonic()
        held = self._out.pop(entry, None)
        if self._returned is not None:
            self._returned.set()
        if held is not None:
            seconds = now - held.since
            if unit is None:
                self._statistics.used_without_session(seconds)
            else:
                unit.tally.add_hold(seconds)
            if self._statistics.observers:
                self._statistics.connection_returned(seconds)

    def _detach(self, connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        """Forget a connection that leaves the pool: its user keeps it, or has lost it."""
        self._open.pop(entry, None)
        self._checkin(connection, entry)

    def holders(self) -> list[Holder]:
        """Return the holders of the connections that are checked out, the oldest first."""
        now = time.monotonic()
        leaks = self._leaks
        return [
            Holder(
                _holder_of(entry),
                age := now - held.since,
                is_late=leaks is not None and age > leaks.threshold,
                statement=_statement_of(entry),
            )
            for entry, held in self._out.copy().items()
        ]

    def _suspects(self) -> Iterator[Suspect]:
        for entry, held in self._out.copy().items():  # an entry may be collected meanwhile
            yield Suspect(held.since, functools.partial(_holder_of, entry), held.stack)

    @property
    def checked_out(self) -> int:
        """How many are checked out."""
        return len(self._out)

    def stats(self) -> PoolStats:
        """Count the connections, also from another thread."""
        pool = self._engine.sync_engine.pool
        size = (pool.size() or None) if isinstance(pool, QueuePool) else None
        limit, checked_out = self._limit, self.checked_out
        idle = len(self._still_open()) - checked_out
        return PoolStats(
            size=size,
            limit=limit,
            checked_out=checked_out,
            idle=max(idle, 0),
            waiting=pool.waiting() if isinstance(pool, FairPool) else None,
        )

    @property
    def _limit(self) -> int | None:
        pool = self._engine.sync_engine.pool
        if not isinstance(pool, QueuePool):
            return None
        # There is no public way to read it; the test of pools in `test_statistics.py` breaks when
        # this changes.
        overflow = pool._max_overflow  # pyright: ignore[reportPrivateUsage]
        return pool.size() + overflow if pool.size() and overflow >= 0 else None

    @property
    def have_room(self) -> bool:
        """Whether one is free, or may be opened."""
        limit = self._limit
        return limit is None or self.checked_out < limit

    async def all_returned(self) -> None:
        """Wait until every connection is back in the pool."""
        while self._out:
            self._returned = anyio.Event()
            await self._returned.wait()

    def terminate(self) -> list[Holder]:
        """Close every open connection without a word to the server; return those that were out."""
        if self._leaks is not None:
            self._leaks.stop()
        holders = self.holders()
        connections = self._still_open()
        for entry, connection in connections.items():
            held = self._out.get(entry)
            proxy = None if held is None else held.proxy()
            if self._behind_pooler:
                self._driver.terminate(self._dialect.get_driver_connection(connection))
            elif proxy is not None:  # so that its user gets an error, also at COMMIT
                proxy.invalidate()
            else:
                self._dialect.do_terminate(connection)
        self._open.clear()
        self._out.clear()
        return holders

    def forget(self, kind: type[object]) -> None:
        """Count the connections of a kind as closed: there is nothing of them to be closed."""
        self._open = {
            entry: c for entry, c in self._still_open().items() if not isinstance(c, kind)
        }

    def leave_to_parent(self) -> None:
        """After a fork: leave the connections to the parent process, which still uses them."""
        for connection in self._open.values():
            self._driver.leave_to_parent(self._dialect.get_driver_connection(connection))


def _holder_of(entry: ConnectionPoolEntry) -> str:
    unit: Unit | None = entry.info.get(UNIT_INFO)
    return WITHOUT_SESSION if unit is None else unit.describe()


def _statement_of(entry: ConnectionPoolEntry) -> str:
    unit: Unit | None = entry.info.get(UNIT_INFO)
    trace = None if unit is None else unit.tally.trace
    return "" if trace is None else trace.shown(trace.last)
