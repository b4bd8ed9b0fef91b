"""What the database does for each request, as OpenTelemetry metrics and spans.

instrument(database)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

from asgi_db.database import Database
from asgi_db.drivers.describing import brief
from asgi_db.histograms import BUCKETS
from asgi_db.logs import ErrorsOnce
from asgi_db.statistics import (
    WITHOUT_SESSION,
    DatabaseStats,
    PoolStats,
    ReplicaStats,
    RouteStats,
    Tally,
    pools_of,
)

try:
    from opentelemetry.instrumentation.sqlalchemy import (  # pyright: ignore[reportMissingTypeStubs]
        SQLAlchemyInstrumentor,
    )
    from opentelemetry.metrics import (
        CallbackOptions,
        Histogram,
        Meter,
        MeterProvider,
        NoOpMeterProvider,
        Observation,
        get_meter,
    )
    from opentelemetry.trace import (
        INVALID_SPAN,
        Span,
        SpanContext,
        Status,
        StatusCode,
        Tracer,
        TracerProvider,
        get_tracer,
        get_tracer_provider,
        use_span,
    )
except ModuleNotFoundError as error:
    raise ImportError(
        "asgi_db.opentelemetry needs OpenTelemetry's API and its instrumentation of SQLAlchemy:"
        ' pip install "asgi-db[opentelemetry]"'
    ) from error

__all__ = ["instrument"]

POOL_NAME = "db.client.connection.pool.name"

_ROUTE = "asgi_db.route"
_REPLICA = "asgi_db.replica"


def instrument(
    *databases: Database,
    meter_provider: MeterProvider | None = None,
    tracer_provider: TracerProvider | None = None,
) -> None:
    """Report on these databases, once, before the application serves its first request.

    Metrics have the names of OpenTelemetry's conventions where there are any, and begin with
    `asgi_db.` where there are none. Each statement is a span of OpenTelemetry's own instrumentation
    of SQLAlchemy. This function switches it on, for the whole process, unless it is on already.
    Each unit of work is a span too, beside those of its statements, and tells its outcome.

    Args:
        databases: all databases of the application.
        meter_provider: OpenTelemetry's global one if None.
        tracer_provider: OpenTelemetry's global one if None.
    """
    meter = get_meter("asgi_db", meter_provider=meter_provider)
    tracer = get_tracer("asgi_db", tracer_provider=tracer_provider)
    for database in databases:
        database.statistics.observers += (_Recorder(database, meter, tracer),)
    for make_instruments in (_observe_pools, _observe_routes, _observe_replicas):
        make_instruments(meter, databases)
    instrumentor: Any = SQLAlchemyInstrumentor()
    if not instrumentor.is_instrumented_by_opentelemetry:
        instrumentor.instrument(
            engines=[engine.sync_engine for each in databases for engine in each.engines()],
            tracer_provider=_SafeTracerProvider(tracer_provider or get_tracer_provider()),
            meter_provider=NoOpMeterProvider(),  # its metric of the pool has an outdated name
            # It declares that it supports SQLAlchemy below 2.1 only, and would do nothing; the
            # tests of spans show that it works.
            skip_dep_check=True,
        )


class _Recorder:
    """Records each event of one database as it happens."""

    def __init__(self, database: Database, meter: Meter, tracer: Tracer) -> None:
        self._attributes = {POOL_NAME: database.stats().name}
        self._tracer = tracer
        self._wait_time = _histogram(
            meter,
            "db.client.connection.wait_time",
            "The time it took to obtain an open connection from the pool.",
        )
        self._use_time = _histogram(
            meter,
            "db.client.connection.use_time",
            "The time between borrowing a connection and returning it to the pool.",
        )
        self._times = {
            field: _histogram(meter, f"asgi_db.{field}", description)
            for field, description in _ROUTE_TIMES.items()
        }

    def connection_taken(self, waited: float) -> None:
        self._wait_time.record(waited, self._attributes)

    def connection_returned(self, held: float) -> None:
        self._use_time.record(held, self._attributes)

    def used_without_session(self, held: float) -> None:
        self._times["held"].record(held, {**self._attributes, _ROUTE: WITHOUT_SESSION})

    def retried(self, route: str) -> None:
        """Nothing: the number of retries is read when it is asked for."""

    def unit_ended(self, route: str, mode: str, tally: Tally) -> None:
        for field, histogram in self._times.items():
            if field != "held" or tally.connections:
                histogram.record(getattr(tally, field), {**self._attributes, _ROUTE: route})
        self._make_span(route, mode, tally)

    def _make_span(self, route: str, mode: str, tally: Tally) -> None:
        """Make the span of a unit after its end: it is never the current span of anything."""
        end = time.time_ns()
        lasted = 0.0 if tally.began is None else time.monotonic() - tally.began
        span = self._tracer.start_span(
            f"{mode} unit of work",
            start_time=end - int(lasted * 1e9),
            attributes={
                **self._attributes,
                _ROUTE: route,
                "asgi_db.mode": mode,
                "asgi_db.outcome": tally.outcome or "none",
                "asgi_db.statements": tally.statements,
                "asgi_db.connection.held": tally.held,
                "asgi_db.connection.waited": tally.waited,
            },
        )
        if tally.outcome == "failed":
            span.set_status(Status(StatusCode.ERROR, "COMMIT failed"))
        span.end(end)


def _histogram(meter: Meter, name: str, description: str) -> Histogram:
    return meter.create_histogram(
        name,
        unit="s",
        description=description,
        explicit_bucket_boundaries_advisory=BUCKETS,
    )


Read = Callable[[DatabaseStats], Iterable[tuple[float | None, dict[str, str]]]]
"""Reads the values of one instrument, with their attributes; None if there is no value."""

ReadPool = Callable[[PoolStats], Iterable[tuple[float | None, dict[str, str]]]]
"""The same for an instrument of the pools: of a database's own, and of its replicas'."""


def _callback(databases: Sequence[Database], read: Read) -> list[Any]:
    def observe(_: CallbackOptions) -> Iterable[Observation]:
        for database in databases:
            stats = database.stats()
            for value, attributes in read(stats):
                if value is not None:
                    yield Observation(value, {POOL_NAME: stats.name, **attributes})

    return [observe]


def _observe_pools(meter: Meter, databases: Sequence[Database]) -> None:
    def of_pools(read: ReadPool) -> list[Any]:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            pools = pools_of(database.stats() for database in databases)
            for name, pool in pools.items():
                for value, attributes in read(pool):
                    if value is not None:
                        yield Observation(value, {POOL_NAME: name, **attributes})

        return [observe]

    state = "db.client.connection.state"
    instruments: list[tuple[str, str, ReadPool, str]] = [
        (
            "count",
            "{connection}",
            lambda pool: [(pool.checked_out, {state: "used"}), (pool.idle, {state: "idle"})],
            "The number of connections that are currently in the state.",
        ),
        (
            "max",
            "{connection}",
            lambda pool: [(pool.limit, {})],
            "The maximum number of open connections allowed.",
        ),
        (
            "idle.max",
            "{connection}",
            lambda pool: [(pool.size, {})],
            "The maximum number of idle open connections allowed.",
        ),
        (
            "pending_requests",
            "{request}",
            lambda pool: [(pool.waiting, {})],
            "The number of current pending requests for an open connection.",
        ),
    ]
    for name, unit, read, description in instruments:
        meter.create_observable_up_down_counter(
            f"db.client.connection.{name}", of_pools(read), unit, description
        )
    meter.create_observable_counter(
        "db.client.connection.timeouts",
        _callback(databases, lambda s: [(sum(r.timeouts for r in s.routes.values()), {})]),
        "{timeout}",
        "The number of times that no connection became free in time.",
    )


_ROUTE_COUNTERS = {
    "statements": ("{statement}", "Statements sent."),
    "retries": ("{request}", "Requests that were run again."),
    "conflicts": ("{conflict}", "How often the database has given another transaction precedence."),
}
_ROUTE_TIMES = {
    "held": "For how long a unit of work held connections.",
    "waited": "For how long a unit of work waited for connections.",
    "busy": "How long a unit of work was within calls of its session.",
}


def _observe_routes(meter: Meter, databases: Sequence[Database]) -> None:
    meter.create_observable_counter(
        "asgi_db.units",
        _callback(databases, _read_outcomes),
        "{unit}",
        "Units of work that have ended, by outcome.",
    )
    for name, (unit, description) in _ROUTE_COUNTERS.items():
        meter.create_observable_counter(
            f"asgi_db.{name}", _callback(databases, _reader(name)), unit, description
        )


def _read_outcomes(stats: DatabaseStats) -> Iterable[tuple[float, dict[str, str]]]:
    for route, counters in stats.routes.items():
        for outcome, count in counters.outcomes().items():
            yield count, {_ROUTE: route, "asgi_db.outcome": outcome}


def _reader(field: str) -> Read:
    def value(counters: RouteStats) -> float:
        return getattr(counters, field)  # type: ignore[no-any-return]

    return lambda stats: [
        (value(counters), {_ROUTE: route}) for route, counters in stats.routes.items()
    ]


def _observe_replicas(meter: Meter, databases: Sequence[Database]) -> None:
    def of_each(read: Callable[[ReplicaStats], float | None]) -> list[Any]:
        return _callback(
            databases, lambda s: [(read(each), {_REPLICA: each.name}) for each in s.replicas]
        )

    meter.create_observable_counter(
        "asgi_db.replica.units",
        of_each(lambda replica: replica.units),
        "{unit}",
        "Units of work that have run on a replica.",
    )
    meter.create_observable_counter(
        "asgi_db.replica.behind",
        of_each(lambda replica: replica.behind),
        "{unit}",
        "How often a read went elsewhere because the replica had not come far enough.",
    )
    meter.create_observable_gauge(
        "asgi_db.replica.down",
        of_each(lambda replica: int(replica.is_down)),
        "1",
        "1 if a replica has failed, and has not answered since.",
    )
    meter.create_observable_gauge(
        "asgi_db.replica.lag",
        of_each(lambda replica: replica.lag),
        "s",
        "How late a replica was when it last answered.",
    )
    meter.create_observable_counter(
        "asgi_db.reads_on_primary",
        _callback(databases, lambda s: [(s.reads_on_primary, {})] if s.replicas else []),
        "{unit}",
        "Units of work that could have read from a replica, and ran on the primary.",
    )


# -- spans that never fail ---------------------------------------------------------------------
#
# OpenTelemetry's instrumentation of SQLAlchemy begins and ends its spans in the middle of a
# statement, which would fail with every error of a span processor.


class _SafeTracerProvider(TracerProvider):
    """Provides tracers whose spans raise nothing when they begin or end."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider

    def get_tracer(self, *args: Any, **kwargs: Any) -> Tracer:
        return _SafeTracer(self._provider.get_tracer(*args, **kwargs))


class _SafeTracer(Tracer):
    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._errors = ErrorsOnce()

    def start_span(self, *args: Any, **kwargs: Any) -> Span:
        try:
            return _SafeSpan(self._tracer.start_span(*args, **kwargs), self._errors)
        except Exception as error:
            self._errors.log("begin", "The beginning of a statement's span", error)
            return INVALID_SPAN

    @contextmanager
    def start_as_current_span(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *args: Any, end_on_exit: bool = True, **kwargs: Any
    ) -> Generator[Span]:
        with use_span(self.start_span(*args, **kwargs), end_on_exit=end_on_exit) as span:
            yield span


class _SafeSpan(Span):
    def __init__(self, span: Span, errors: ErrorsOnce) -> None:
        self._span = span
        self._errors = errors

    def end(self, end_time: int | None = None) -> None:
        try:
            self._span.end(end_time)
        except Exception as error:
            self._errors.log("end", "The end of a statement's span", error)

    def get_span_context(self) -> SpanContext:
        return self._span.get_span_context()

    def is_recording(self) -> bool:
        return self._span.is_recording()

    def set_attributes(self, *args: Any, **kwargs: Any) -> None:
        self._span.set_attributes(*args, **kwargs)

    def set_attribute(self, *args: Any, **kwargs: Any) -> None:
        self._span.set_attribute(*args, **kwargs)

    def add_event(self, *args: Any, **kwargs: Any) -> None:
        self._span.add_event(*args, **kwargs)

    def add_link(self, *args: Any, **kwargs: Any) -> None:
        self._span.add_link(*args, **kwargs)

    def update_name(self, name: str) -> None:
        self._span.update_name(name)

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """Set the status, without the text of an error, which may hold a value of a row."""
        error = sys.exc_info()[1]
        if error is not None:
            code = status.status_code if isinstance(status, Status) else status
            status, description = Status(code, brief(error)), None
        self._span.set_status(status, description)

    def record_exception(self, exception: BaseException, *args: Any, **kwargs: Any) -> None:
        """Record an error by its type alone; its text and its traceback may hold a value."""
        self._span.add_event("exception", {"exception.type": type(exception).__qualname__})
