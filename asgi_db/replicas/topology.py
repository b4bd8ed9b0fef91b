"""The primary and the replicas of a database, in each event loop that uses them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_db.drivers import driver_of, driver_of_url
from asgi_db.drivers.replication import Replication
from asgi_db.engine.variants import isolation_options, refuse_autocommit
from asgi_db.errors import ConfigurationError
from asgi_db.pool.engines import Engines, EngineSettings
from asgi_db.pool.life import EngineLife
from asgi_db.replicas.choice import Choice
from asgi_db.replicas.commits import follow_commits
from asgi_db.replicas.history import History
from asgi_db.replicas.own_writes import Clients
from asgi_db.replicas.replica import Replica
from asgi_db.replicas.servers import Servers
from asgi_db.settings import Secret, read_url
from asgi_db.statistics import DatabaseStats, ReplicaStats, Statistics, name_of


class Topology:
    """The servers of one database: a primary, and its replicas.

    Attributes:
        primary: the engines of the primary.
        clients: what was committed for each client, or script.
    """

    def __init__(
        self, primary: Engines, replicas: Sequence[Engines], replication: Replication | None
    ) -> None:
        """Prepare them; nothing is opened.

        Args:
            primary: the engines of the primary.
            replicas: those of each replica.
            replication: what is known of the replicas of this database.
        """
        self.primary = primary
        self.clients = Clients()
        self._replicas = tuple(replicas)
        self._replication = replication
        self._history = History()
        self._servers: dict[asyncio.AbstractEventLoop, Servers] = {}

    def on(self, loop: asyncio.AbstractEventLoop) -> Choice:
        """Return the servers of an event loop for a new session; made at first use."""
        primary = self.primary.on(loop)
        servers = self._servers.get(loop)
        if servers is None or servers.primary is not primary:
            for closed in [each for each in self._servers.copy() if each.is_closed()]:
                self._servers.pop(closed, None)
            servers = self._servers[loop] = self._servers_on(loop, primary)
        return Choice(servers, self.clients.here())

    def _servers_on(self, loop: asyncio.AbstractEventLoop, primary: EngineLife) -> Servers:
        replicas: list[Replica] = []
        if self._replication is not None:
            follow_commits(primary.engine.sync_engine, self._replication)
            for engines in self._replicas:
                name = name_of(engines.settings.url)
                life = engines.on(loop)
                replicas.append(Replica(name, life, self._replication, self._history))
        return Servers(primary, replicas, self._history, self._is_covered)

    def _is_covered(self) -> bool:
        return self.primary.active_cover is not None

    def leave_replicas(self) -> None:
        """Use no replica any more: the primary is to be somewhere else."""
        self._replicas = ()
        self._servers.clear()

    def all(self) -> list[EngineLife]:
        """Return the engines that have been made, those of the replicas too."""
        return [life for engines in (self.primary, *self._replicas) for life in engines.all()]

    async def dispose(self) -> None:
        """Close every connection of this event loop; see `Engines.dispose`."""
        try:
            for engines in self._replicas:
                await engines.dispose()
        finally:
            await self.primary.dispose()

    def database_stats(self) -> DatabaseStats:
        """Return what each route has done, and what has a connection now, on all servers."""
        lives = [*self.all(), *self.primary.others.all()]
        holders = [holder for life in lives for holder in life.connections.holders()]
        servers = list(self._servers.copy().values())
        return DatabaseStats(
            name=name_of(self.primary.settings.url),
            pool=self.primary.pool_stats(),
            holders=tuple(sorted(holders, key=lambda holder: -holder.age)),
            routes=self.primary.statistics.routes,
            replicas=tuple(
                self._stats_of(engines, [one.replicas[number] for one in servers])
                for number, engines in enumerate(self._replicas)
            ),
            reads_on_primary=sum(one.on_primary for one in servers),
        )

    def _stats_of(self, engines: Engines, replicas: list[Replica]) -> ReplicaStats:
        lags = [lag for one in replicas if (lag := one.lag.seconds) is not None]
        return ReplicaStats(
            name=name_of(engines.settings.url),
            pool=engines.pool_stats(),
            units=sum(one.units for one in replicas),
            behind=sum(one.behind for one in replicas),
            is_down=any(one.is_down for one in replicas),
            lag=min(lags, default=None),
        )


def topology(
    settings: EngineSettings,
    statistics: Statistics,
    replicas: Sequence[str | URL | Secret | AsyncEngine],
    *,
    given: AsyncEngine | None,
) -> Topology:
    """Put the servers of a database together.

    Args:
        settings: from what the engines of the primary are made.
        statistics: where all of them are counted.
        replicas: where the replicas are, or the user's own engines for them.
        given: the user's own engine for the primary.

    Raises:
        ConfigurationError: an option of the engine, or a replica, cannot be used.
    """
    if given is None:
        settings.check()
    if not replicas:
        return Topology(Engines(settings, statistics, given=given), (), None)
    if isinstance(replicas, (str, URL, AsyncEngine)) or hasattr(replicas, "get_secret_value"):
        raise ConfigurationError("replicas= takes a list, also of one: replicas=[...].")
    driver = driver_of_url(settings.url) if given is None else driver_of(given.dialect)
    if (replication := driver.replication) is None:
        raise ConfigurationError(
            "replicas= needs PostgreSQL with asyncpg or psycopg, or MariaDB with asyncmy: leave it"
            f" out for {settings.url.drivername}."
        )
    if given is not None:
        replication.prepare(given.sync_engine)
    engines = [_engines_of(replica, settings, statistics, given) for replica in replicas]
    return Topology(Engines(settings, statistics, given=given), engines, replication)


def _engines_of(
    replica: str | URL | Secret | AsyncEngine,
    settings: EngineSettings,
    statistics: Statistics,
    given: AsyncEngine | None,
) -> Engines:
    if isinstance(replica, AsyncEngine) != (given is not None):
        raise ConfigurationError(
            "replicas= takes URLs where the Database has a URL, and engines where it has an"
            " engine=."
        )
    if isinstance(replica, AsyncEngine):
        url = replica.url
        refuse_autocommit("replicas=", isolation_options(replica.sync_engine))
    else:
        url = read_url(replica, "A URL in replicas=")
    if url.drivername != settings.url.drivername:
        raise ConfigurationError(
            f"replicas= has a URL of {url.drivername}, but the primary has"
            f" {settings.url.drivername}: use the same driver for both."
        )
    settings = replace(settings, url=url, has_replicas=False)
    if not isinstance(replica, AsyncEngine):
        settings.check()
        return Engines(settings, statistics)
    return Engines(settings, statistics, given=replica)
