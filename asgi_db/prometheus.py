"""What each route does to the database, as Prometheus metrics.

from prometheus_client import REGISTRY
REGISTRY.register(DatabaseCollector(database))
"""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter

from asgi_db.database import Database
from asgi_db.histograms import BUCKETS, Histogram
from asgi_db.sampling import Sampler
from asgi_db.statistics import (
    WITHOUT_SESSION,
    DatabaseStats,
    PoolStats,
    RouteStats,
    Tally,
    name_of,
    total,
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
            by_name = defaultdict[str, list[Database]](list)
            for database in databases:
                by_name[name_of(database.url)].append(database)
            for name, same in by_name.items():
                counting = _Counting(name, same)
                for database in same:
                    database.statistics.observers += (counting,)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; `prometheus_client` usually calls this from a thread of its own."""
        stats = [database.stats() for database in self._databases]
        if stats:
            yield from _of_pools(stats)
            yield from _of_routes(stats)


def _of_pools(all_stats: list[DatabaseStats]) -> Iterator[Metric]:
    open_now = GaugeMetricFamily(CONNECTIONS, _CONNECTIONS_TEXT, labels=["database", "state"])
    by_name = defaultdict[str, list[PoolStats]](list)
    for stats in all_stats:
        by_name[stats.name].append(stats.pool)
    pools = {name: total(pools) for name, pools in by_name.items()}
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


def _gauge(name: str, text: str, *labels: str) -> prometheus_client.Gauge:
    return prometheus_client.Gauge(name, text, labels, registry=None, multiprocess_mode="livesum")


_metrics = functools.cache(_Metrics)
"""One for each process: two of one name would overwrite each other's values in the file."""


class _Counting:
    """Counts the events of the databases of one name."""

    def __init__(self, name: str, databases: list[Database]) -> None:
        self._name = name
        self._databases = databases
        self._sampler = Sampler(self._set_gauges)

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

    def _set_gauges(self) -> None:
        metrics = _metrics()
        pool = total(database.pool_stats() for database in self._databases)
        metrics.connections.labels(self._name, "used").set(pool.checked_out)
        metrics.connections.labels(self._name, "idle").set(pool.idle)
        for field, gauge in metrics.gauges.items():
            if (value := getattr(pool, field)) is not None:
                gauge.labels(self._name).set(value)
