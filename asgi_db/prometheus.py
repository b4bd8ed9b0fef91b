"""What each route does to the database, as Prometheus metrics.

from prometheus_client import REGISTRY
REGISTRY.register(DatabaseCollector(database))
"""

from __future__ import annotations

from collections.abc import Iterator

from asgi_db.database import Database
from asgi_db.statistics import DatabaseStats

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ModuleNotFoundError as error:
    raise ImportError(
        'asgi_db.prometheus needs prometheus_client: pip install "asgi-db[prometheus]"'
    ) from error

__all__ = ["DatabaseCollector"]

_COUNTERS = {
    "statements": "Statements sent, without those that begin and end transactions.",
    "retries": "Requests that were run again.",
    "connections": "How often a connection was taken from the pool.",
    "timeouts": "How often no connection became free in time.",
}
_SECONDS = {
    "held": "Time in which connections were out of the pool.",
    "waited": "Time until a connection was there, be it from the pool or new.",
    "busy": "Time within calls of the session.",
}
_GAUGES = {
    "size": "Connections that the pool keeps.",
    "limit": "Connections that there may be at most.",
    "waiting": "Who waits for a connection.",
}


class DatabaseCollector(Collector):
    """Reads `database.stats()` each time it is asked; nothing is done in between.

    Where several processes serve one application (`PROMETHEUS_MULTIPROC_DIR`), prometheus_client
    cannot use collectors like this: let each process be asked by itself.
    """

    def __init__(self, *databases: Database) -> None:
        """Prepare the collector, for a registry of `prometheus_client`.

        Args:
            databases: all databases of the application; one registry takes one collector.
        """
        self._databases = databases

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; `prometheus_client` calls this, from a thread of its own as a rule."""
        stats = [database.stats() for database in self._databases]
        yield from _of_pools(stats)
        yield from _of_routes(stats)


def _of_pools(all_stats: list[DatabaseStats]) -> Iterator[Metric]:
    open_now = GaugeMetricFamily(
        "asgi_db_pool_connections",
        "Open connections, by what they are: used or idle.",
        labels=["database", "state"],
    )
    for stats in all_stats:
        open_now.add_metric([stats.name, "used"], stats.pool.checked_out)
        open_now.add_metric([stats.name, "idle"], stats.pool.idle)
    yield open_now
    for field, text in _GAUGES.items():
        gauge = GaugeMetricFamily(f"asgi_db_pool_{field}", text, labels=["database"])
        for stats in all_stats:
            if (value := getattr(stats.pool, field)) is not None:
                gauge.add_metric([stats.name], value)
        yield gauge


def _of_routes(all_stats: list[DatabaseStats]) -> Iterator[Metric]:
    units = CounterMetricFamily(
        "asgi_db_units",
        "Units of work that have ended, by how; none: there was no transaction to end.",
        labels=["database", "route", "outcome"],
    )
    for stats in all_stats:
        for route, counters in stats.routes.items():
            for outcome, count in counters.outcomes().items():
                units.add_metric([stats.name, route, outcome], count)
    yield units
    for field, text in _COUNTERS.items():
        yield _counter(f"asgi_db_{field}", text, field, all_stats)
    for field, text in _SECONDS.items():
        yield _counter(f"asgi_db_{field}_seconds", text, field, all_stats)


def _counter(name: str, text: str, field: str, all_stats: list[DatabaseStats]) -> Metric:
    counter = CounterMetricFamily(name, text, labels=["database", "route"])
    for stats in all_stats:
        for route, counters in stats.routes.items():
            counter.add_metric([stats.name, route], getattr(counters, field))
    return counter
