"""What each route does to the database, as Prometheus metrics.

from prometheus_client import REGISTRY
REGISTRY.register(DatabaseCollector(database))
"""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Literal

from asgi_db.database import Database
from asgi_db.histograms import BUCKETS, Histogram
from asgi_db.sampling import Sampler
from asgi_db.statistics import (
    WITHOUT_SESSION,
    DatabaseStats,
    ReplicaStats,
    RouteStats,
    Tally,
    name_of,
    pools_of,
)

try:
    import prometheus_client
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
    from prometheus_client.registry import Collector
except ModuleNotFoundError as error:
    raise ImportError(
        'asgi_db.prometheus needs prometheus_client: pip install "asgi-db[prometheus]"'
    ) from error

__all__ = ["DatabaseCollector"]

UNITS = "asgi_db_units"
CONNECTIONS = "asgi_db_pool_connections"
_UNITS_TEXT = "Units of work that have ended, by outcome; none: there was no transaction to end."
_CONNECTIONS_TEXT = "Open connections by their state: used or idle."

COUNTERS = {
    "statements": "Statements sent, without those that begin and end transactions.",
    "retries": "Requests that were run again.",
    "conflicts": "How often the database has given another transaction precedence.",
    "connections": "How often a connection was taken from the pool.",
    "timeouts": "How often no connection became free in time.",
}
HISTOGRAMS = {
    "held": ("hold_times", "For how long a unit of work held connections."),
    "waited": ("wait_times", "For how long a unit of work waited for connections."),
    "busy": ("busy_times", "How long a unit of work was within calls of its session."),
}
GAUGES = {
    "size": "The number of connections that the pool keeps.",
    "limit": "The greatest number of connections.",
    "waiting": "Tasks that wait for a connection.",
}
READS_ON_PRIMARY = "asgi_db_reads_on_primary"
READS_ON_PRIMARY_TEXT = "Units of work that could have read from a replica, and ran on the primary."
REPLICA_COUNTERS = {
    "units": "Units of work that have run on a replica.",
    "behind": "How often a read went elsewhere because the replica had not come far enough.",
}
REPLICA_GAUGES = {
    "down": "1 if a replica has failed, and has not answered since.",
    "lag_seconds": "How late a replica was when it last answered.",
}


class DatabaseCollector(Collector):
    """The metrics of `database.stats()`, read each time they are scraped.

    Where several processes serve one application and `PROMETHEUS_MULTIPROC_DIR` is set,
    prometheus_client has no use for what a collector yields. The same metrics are then metric
    objects of prometheus_client itself, counted as the units of work end; the collector yields
    nothing, and `prometheus_client.multiprocess.MultiProcessCollector` finds them.
    """

    def __init__(self, *databases: Database) -> None:
        """Prepare the collector, for a registry of `prometheus_client`.

        Args:
            databases: all databases of the application; a registry takes one collector. Databases
                of the same name, such as two on one URL, are added up.
        """
        self._databases = databases
        # The variable is read when prometheus_client is imported, so it does not change later.
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            self._databases = ()
            sampler = Sampler(_Samples(databases).take)
            for database in databases:
                database.statistics.observers += (_Counting(name_of(database.url), sampler),)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; `prometheus_client` usually calls this from a thread of its own."""
        stats = [database.stats() for database in self._databases]
        if stats:
            yield from _of_pools(stats)
            yield from _of_routes(stats)
        if any(each.replicas for each in stats):
            yield from _of_replicas(stats)


def _of_pools(all_stats: list[DatabaseStats]) -> Iterator[Metric]:
    open_now = GaugeMetricFamily(CONNECTIONS, _CONNECTIONS_TEXT, labels=["database", "state"])
    pools = pools_of(all_stats)
    for name, pool in pools.items():
        open_now.add_metric([name, "used"], pool.checked_out)
        open_now.add_metric([name, "idle"], pool.idle)
    yield open_now
    for field, text in GAUGES.items():
        gauge = GaugeMetricFamily(f"asgi_db_pool_{field}", text, labels=["database"])
        for name, pool in pools.items():
            if (value := getattr(pool, field)) is not None:
                gauge.add_metric([name], value)
        yield gauge


def _of_replicas(all_stats: list[DatabaseStats]) -> Iterator[Metric]:
    on_primary = CounterMetricFamily(READS_ON_PRIMARY, READS_ON_PRIMARY_TEXT, labels=["database"])
    yield _with_samples(on_primary, _reads_on_primary(all_stats))
    labels = ["database", "replica"]
    for field, text in REPLICA_COUNTERS.items():
        counter = CounterMetricFamily(f"asgi_db_replica_{field}", text, labels=labels)
        yield _with_samples(counter, _counts_of_replicas(all_stats, field))
    for field, text in REPLICA_GAUGES.items():
        gauge = GaugeMetricFamily(f"asgi_db_replica_{field}", text, labels=labels)
        for values, value in _states_of_replicas(all_stats, field).items():
            gauge.add_metric(values, value)
        yield gauge


def _replicas(all_stats: list[DatabaseStats]) -> Iterable[tuple[tuple[str, ...], ReplicaStats]]:
    for stats in all_stats:
        for replica in stats.replicas:
            yield (stats.name, replica.name), replica


def _reads_on_primary(all_stats: list[DatabaseStats]) -> Mapping[tuple[str, ...], float]:
    sums = defaultdict[tuple[str, ...], float](float)
    for stats in all_stats:
        if stats.replicas:
            sums[stats.name,] += stats.reads_on_primary
    return sums


def _counts_of_replicas(
    all_stats: list[DatabaseStats], field: str
) -> Mapping[tuple[str, ...], float]:
    sums = defaultdict[tuple[str, ...], float](float)
    for labels, replica in _replicas(all_stats):
        sums[labels] += getattr(replica, field)
    return sums


def _states_of_replicas(
    all_stats: list[DatabaseStats], field: str
) -> Mapping[tuple[str, ...], float]:
    """Return the worst value of each replica that has one: databases of one name share it."""
    worst: dict[tuple[str, ...], float] = {}
    for labels, replica in _replicas(all_stats):
        value = replica.lag if field == "lag_seconds" else float(replica.is_down)
        if value is not None:
            worst[labels] = max(value, worst.get(labels, value))
    return worst


def _of_routes(all_stats: list[DatabaseStats]) -> Iterator[Metric]:
    units = CounterMetricFamily(UNITS, _UNITS_TEXT, labels=["database", "route", "outcome"])
    sums = defaultdict[tuple[str, ...], float](float)
    for name, route, counters in _routes(all_stats):
        for outcome, count in counters.outcomes().items():
            sums[name, route, outcome] += count
    yield _with_samples(units, sums)
    for field, text in COUNTERS.items():
        counter = CounterMetricFamily(f"asgi_db_{field}", text, labels=["database", "route"])
        yield _with_samples(counter, _sums(all_stats, field))
    for field, (times, text) in HISTOGRAMS.items():
        family = HistogramMetricFamily(
            f"asgi_db_{field}_seconds", text, labels=["database", "route"]
        )
        histograms = defaultdict[tuple[str, str], Histogram](Histogram)
        for name, route, counters in _routes(all_stats):
            histograms[name, route] += attrgetter(times)(counters)
        seconds = _sums(all_stats, field)
        for labels, histogram in histograms.items():
            counts = histogram.cumulative()
            buckets = list(zip([*map(str, BUCKETS), "+Inf"], counts, strict=True))
            family.add_metric(labels, buckets, seconds[labels])
        yield family


def _routes(all_stats: list[DatabaseStats]) -> Iterable[tuple[str, str, RouteStats]]:
    for stats in all_stats:
        for route, counters in stats.routes.items():
            yield stats.name, route, counters


def _sums(all_stats: list[DatabaseStats], field: str) -> Mapping[tuple[str, ...], float]:
    sums = defaultdict[tuple[str, ...], float](float)
    for name, route, counters in _routes(all_stats):
        sums[name, route] += getattr(counters, field)
    return sums


def _with_samples(
    counter: CounterMetricFamily, sums: Mapping[tuple[str, ...], float]
) -> CounterMetricFamily:
    for labels, value in sums.items():
        counter.add_metric(labels, value)
    return counter


# -- several processes -------------------------------------------------------------------------


class _Metrics:
    """The metric objects of this process, which write to a file that the others can read.

    They are in no registry: there they would be metrics of this process alone.
    """

    def __init__(self) -> None:
        labels = ["database", "route"]
        self.units = prometheus_client.Counter(
            UNITS, _UNITS_TEXT, [*labels, "outcome"], registry=None
        )
        self.counters = {
            field: prometheus_client.Counter(f"asgi_db_{field}", text, labels, registry=None)
            for field, text in COUNTERS.items()
        }
        self.histograms = {
            field: prometheus_client.Histogram(
                f"asgi_db_{field}_seconds", text, labels, registry=None, buckets=BUCKETS
            )
            for field, (_, text) in HISTOGRAMS.items()
        }
        self.connections = _gauge(CONNECTIONS, _CONNECTIONS_TEXT, "database", "state")
        self.gauges = {
            field: _gauge(f"asgi_db_pool_{field}", text, "database")
            for field, text in GAUGES.items()
        }
        self.reads_on_primary = prometheus_client.Counter(
            READS_ON_PRIMARY, READS_ON_PRIMARY_TEXT, ["database"], registry=None
        )
        labels = ["database", "replica"]
        self.of_replicas = {
            field: prometheus_client.Counter(
                f"asgi_db_replica_{field}", text, labels, registry=None
            )
            for field, text in REPLICA_COUNTERS.items()
        }
        self.replicas = {
            # One process that cannot use a replica, or finds it late, is enough to know.
            field: _gauge(f"asgi_db_replica_{field}", text, *labels, together="livemax")
            for field, text in REPLICA_GAUGES.items()
        }


def _gauge(
    name: str, text: str, *labels: str, together: Literal["livesum", "livemax"] = "livesum"
) -> prometheus_client.Gauge:
    return prometheus_client.Gauge(name, text, labels, registry=None, multiprocess_mode=together)


_metrics = functools.cache(_Metrics)
"""One for each process: two of one name would overwrite each other's values in the file."""


class _Counting:
    """Counts the events of one database."""

    def __init__(self, name: str, sampler: Sampler) -> None:
        self._name = name
        self._sampler = sampler

    def connection_taken(self, waited: float) -> None:
        self._sampler.used()

    def connection_returned(self, held: float) -> None:
        self._sampler.used()

    def used_without_session(self, held: float) -> None:
        metrics = _metrics()
        metrics.counters["connections"].labels(self._name, WITHOUT_SESSION).inc()
        metrics.histograms["held"].labels(self._name, WITHOUT_SESSION).observe(held)

    def unit_ended(self, route: str, mode: str, tally: Tally) -> None:
        self._sampler.used()
        metrics = _metrics()
        metrics.units.labels(self._name, route, tally.outcome or "none").inc()
        for field, counter in metrics.counters.items():
            counter.labels(self._name, route).inc(getattr(tally, field))
        for field, histogram in metrics.histograms.items():
            if field != "held" or tally.connections:
                histogram.labels(self._name, route).observe(getattr(tally, field))

    def retried(self, route: str) -> None:
        _metrics().counters["retries"].labels(self._name, route).inc()


class _Samples:
    """Writes once a second what is no event: the pools, and how the replicas stand."""

    def __init__(self, databases: Sequence[Database]) -> None:
        self._databases = databases
        self._counted: dict[tuple[str, ...], float] = {}

    def take(self) -> None:
        metrics = _metrics()
        all_stats = [_servers_of(database) for database in self._databases]
        for name, pool in pools_of(all_stats).items():
            metrics.connections.labels(name, "used").set(pool.checked_out)
            metrics.connections.labels(name, "idle").set(pool.idle)
            for field, gauge in metrics.gauges.items():
                if (value := getattr(pool, field)) is not None:
                    gauge.labels(name).set(value)
        self._count(metrics.reads_on_primary, READS_ON_PRIMARY, _reads_on_primary(all_stats))
        for field, counter in metrics.of_replicas.items():
            self._count(counter, field, _counts_of_replicas(all_stats, field))
        for field, gauge in metrics.replicas.items():
            for labels, state in _states_of_replicas(all_stats, field).items():
                gauge.labels(*labels).set(state)

    def _count(
        self, counter: prometheus_client.Counter, name: str, sums: Mapping[tuple[str, ...], float]
    ) -> None:
        """Add what has been counted since the last time."""
        for labels, value in sums.items():
            before = self._counted.get((name, *labels), 0)
            # A database that has been disposed begins anew.
            counter.labels(*labels).inc(value - before if value >= before else value)
            self._counted[(name, *labels)] = value


def _servers_of(database: Database) -> DatabaseStats:
    if database.has_replicas:
        return database.stats()
    return DatabaseStats(name_of(database.url), database.pool_stats(), (), {})
