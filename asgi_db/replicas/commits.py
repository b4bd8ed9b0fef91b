"""The position of a COMMIT, which is found out right after it, on its connection."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Protocol
from weakref import WeakSet

from sqlalchemy import Engine
from sqlalchemy.engine import Dialect
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util.concurrency import greenlet_spawn

from asgi_db.drivers import driver_of
from asgi_db.drivers.describing import brief
from asgi_db.drivers.protocol import Driver, StandIn
from asgi_db.drivers.replication import UNKNOWN, Position, Replication
from asgi_db.drivers.statements import Effect
from asgi_db.engine.unit import UNIT_INFO, Unit
from asgi_db.logs import Seldom
from asgi_db.replicas.choice import Choice
from asgi_db.sqlalchemy_versions import await_

POSITION_TIMEOUT = 1.0
"""Seconds that the question for the position of a COMMIT may take."""


class _LivingUnit(Unit, Protocol):
    life: object


_followed: WeakSet[Dialect] = WeakSet()
_warnings = Seldom()


def follow_commits(engine: Engine, replication: Replication) -> None:
    """Have each unit told the position of its COMMIT, if it may have written something."""
    dialect = engine.dialect
    if dialect not in _followed:
        _followed.add(dialect)
        commit = functools.partial(_commit, dialect.do_commit, driver_of(dialect), replication)
        dialect.do_commit = commit  # type: ignore[method-assign]


def _commit(
    commit: Callable[[PoolProxiedConnection], None],
    driver: Driver,
    replication: Replication,
    pooled: PoolProxiedConnection,
) -> None:
    commit(pooled)
    unit: _LivingUnit | None = pooled.info.get(UNIT_INFO)
    if unit is None or isinstance(pooled.driver_connection, StandIn):
        return
    # The user's own engine may serve a database without replicas too.
    if isinstance(unit.life, Choice) and unit.transaction.effect is not Effect.READS:
        unit.life.has_committed(_position(driver, replication, pooled))


def _position(driver: Driver, replication: Replication, pooled: PoolProxiedConnection) -> Position:
    """Find out the position of a COMMIT that has succeeded, which no failure here can undo."""

    def ask() -> Position:
        connection = pooled.dbapi_connection
        if connection is None:
            return UNKNOWN
        return replication.position(pooled, functools.partial(driver.ask, connection))

    async def ask_in_time() -> Position:
        async with asyncio.timeout(POSITION_TIMEOUT):
            return await greenlet_spawn(ask)

    try:
        return await_(ask_in_time())
    except (Exception, asyncio.CancelledError) as error:
        if driver.code(error) is None:  # It is no answer of the server, which may come later.
            pooled.invalidate()
        _warnings.warning(
            "The position of a COMMIT could not be found out (%s), so its client reads from the"
            " primary for a while.",
            brief(error),
        )
        return UNKNOWN
