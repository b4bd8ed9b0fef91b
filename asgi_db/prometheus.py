"""What each route does to the database, as Prometheus metrics.

from prometheus_client import REGISTRY
REGISTRY.register(DatabaseCollector(database))
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from asgi_db.database import Database
from asgi_db.statistics import DatabaseStats, PoolStats, total

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
    "held": "Time for which connections were checked out.",
    "waited": "Time spent waiting for connections, from the pool or new.",
    "busy": "Time within calls of the session.",
}
_GAUGES = {
    "size": "Connections that the pool keeps.",
    "limit": "The most connections that the pool may open.",
    "waiting": "Tasks that wait for a connection.",
}


class DatabaseCollector(Collector):
    """Reads `database.stats()` at each scrape, and does nothing in between.

    If several processes serve one application (`PROMETHEUS_MULTIPROC_DIR`), prometheus_client
    cannot use collectors like this one: have each process scraped separately.
    """

    def __init__(self, *databases: Database) -> None:
        """Prepare the collector, for a registry of `prometheus_client`.

        Args:
            databases: all databases of the application; a registry takes one collector. Databases
                with the same name, such as two with one URL, are added up.
        """
        self._databases = databases

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; `prometheus_client` calls this, usually in a thread of its own."""
        stats = [database.stats() for database in self._databases]
        yield from _of_pools(stats)
        yield from _of_routes(stats)


def _of_pools(all_stats: list[DatabaseStats]) -> Iterator[Metric]:
    open_now = GaugeMetricFamily(
        "asgi_db_pool_connections",
        "Open connections, by state: used or idle.",
        labels=["database", "state"],
    )
    by_name = defaultdict[str, list[PoolStats]](list)
    for stats in all_stats:
        by_name[stats.name].append(stats.pool)
    pools = {name: total(pools) for name, pools in by_name.items()}
    for name, pool in pools.items():
        open_now.add_metric([name, "used"], pool.checked_out)
        open_now.add_metric([name, "idle"], pool.idle)
    yield open_now
    for field, text in _GAUGES.items():
        gauge = GaugeMetricFamily(f"asgi_db_pool_{field}", text, labels=["database"])
        for name, pool in pools.items():
            if (value := getattr(pool, field)) is not None:
                gauge.add_metric([name], value)
        yield gauge


def _of_routes(all_stats: list[DatabaseStats]) -> Iterator[Metric]:
    units = CounterMetricFamily(
        "asgi_db_units",
        "Units of work that have ended, by outcome; none: there was no transaction to end.",
        labels=["database", "route", "outcome"],
    )
    sums = defaultdict[tuple[str, ...], float](float)
    for stats in all_stats:
        for route, counters in stats.routes.items():
            for outcome, count in counters.outcomes().items():
                sums[stats.name, route, outcome] += count
    yield _with_samples(units, sums)
    for field, text in _COUNTERS.items():
        yield _counter(f"asgi_db_{field}", text, field, all_stats)
    for field, text in _SECONDS.items():
        yield _counter(f"asgi_db_{field}_seconds", text, field, all_stats)


def _counter(name: str, text: str, field: str, all_stats: list[DatabaseStats]) -> Metric:
    counter = CounterMetricFamily(name, text, labels=["database", "route"])
    sums = defaultdict[tuple[str, ...], float](float)
    for stats in all_stats:
        for route, counters in stats.routes.items():
            sums[stats.name, route] += getattr(counters, field)
    return _with_samples(counter, sums)


def _with_samples(
    counter: CounterMetricFamily, sums: Mapping[tuple[str, ...], float]
) -> CounterMetricFamily:
    for labels, value in sums.items():
        counter.add_metric(labels, value)
    return counter
