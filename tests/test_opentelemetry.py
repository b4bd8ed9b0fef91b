"""Metrics and spans through OpenTelemetry's own API, as its SDK exports them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from opentelemetry.instrumentation.sqlalchemy import (  # pyright: ignore[reportMissingTypeStubs]
    SQLAlchemyInstrumentor,
)
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode, get_current_span
from sqlalchemy import event, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_db import Database, DBSession, DBSessionMiddleware, Mode, plain, read_only, transactional
from asgi_db.opentelemetry import POOL_NAME, instrument
from asgi_db.types import Receive, Scope, Send
from tests.contract.client import call
from tests.internals import BUCKETS, WITHOUT_SESSION
from tests.servers import outside
from tests.tables import Author, Base

MODES = {
    "plain": plain,
    "transactional": transactional,
    "serializable": transactional(isolation="SERIALIZABLE"),
    "read_only": read_only,
    "snapshot": read_only(snapshot=True),
}
QUERY = select(Author.name)


class Telemetry:
    """The SDK, with exporters in memory."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        self.tracer_provider = TracerProvider()
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.meter_provider = MeterProvider([self._reader])

    def instrument(self, *databases: Database) -> None:
        instrument(
            *databases, meter_provider=self.meter_provider, tracer_provider=self.tracer_provider
        )

    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def statements(self) -> list[ReadableSpan]:
        return [span for span in self.spans() if "db.statement" in (span.attributes or {})]

    def units(self) -> list[ReadableSpan]:
        return [span for span in self.spans() if span.name.endswith("unit of work")]

    def clear(self) -> None:
        self._exporter.clear()

    def points(self, name: str) -> list[Any]:
        """The data points of one metric."""
        data = self._reader.get_metrics_data()
        return [
            point
            for resource in (data.resource_metrics if data is not None else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]

    def values(self, name: str) -> dict[tuple[str, ...], float]:
        """Its values by the attributes, without the name of the pool."""
        return {
            tuple(str(v) for k, v in point.attributes.items() if k != POOL_NAME): point.value
            for point in self.points(name)
        }

    async def request(self, database: Database, mode: Mode, work: Any) -> ReadableSpan:
        """Serve a request inside the span of a server, and return that."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            scope["route"] = type("Route", (), {"path": "/orders/{id}"})
            await work(scope["state"]["db"])
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        async def server(scope: Scope, receive: Receive, send: Send) -> None:
            tracer = self.tracer_provider.get_tracer("server")
            with tracer.start_as_current_span("server"):
                await DBSessionMiddleware(app, database, mode=mode)(scope, receive, send)

        await call(server)
        (span,) = [span for span in self.spans() if span.name == "server"]
        return span


def uninstrument() -> None:
    """Switch off what an application has switched on in SQLAlchemy."""
    instrumentor: Any = SQLAlchemyInstrumentor()
    if instrumentor.is_instrumented_by_opentelemetry:
        instrumentor.uninstrument()


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    """OpenTelemetry, switched off again at the end."""
    yield Telemetry()
    uninstrument()


@pytest.fixture
async def database(database_url: str, telemetry: Telemetry) -> AsyncIterator[Database]:
    """A database with a table, on which OpenTelemetry reports from before it started."""
    database = Database(database_url, engine_options={"pool_size": 1, "max_overflow": 0})
    telemetry.instrument(database)
    async with database:
        await database.create_tables(Base.metadata)
        telemetry.clear()
        yield database


async def read(session: DBSession) -> None:
    await session.execute(QUERY)
    await session.execute(QUERY)


async def write(session: DBSession) -> None:
    await session.execute(insert(Author).values(name="a"))


# -- spans -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
async def test_statements_and_their_unit_are_children_of_the_request(
    telemetry: Telemetry, database: Database, mode: Mode
) -> None:
    server = await telemetry.request(database, mode, read)
    selects = [span for span in telemetry.statements() if span.name.startswith("SELECT")]
    assert len(selects) == 2
    (unit,) = telemetry.units()
    for span in [*selects, unit]:
        assert span.context is not None and server.context is not None
        assert span.context.trace_id == server.context.trace_id
        assert span.parent is not None and span.parent.span_id == server.context.span_id
    assert unit.start_time is not None and unit.end_time is not None
    for span in selects:
        assert span.start_time is not None and span.end_time is not None
        assert unit.start_time <= span.start_time < span.end_time <= unit.end_time


@pytest.mark.parametrize(
    ("mode", "outcome"),
    [(plain, "rolled_back"), (transactional, "committed"), (read_only, "none")],
    ids=["plain", "transactional", "read_only"],
)
async def test_the_span_of_a_unit_says_what_became_of_it(
    telemetry: Telemetry, database: Database, mode: Mode, outcome: str
) -> None:
    await telemetry.request(database, mode, read)
    (unit,) = telemetry.units()
    attributes = dict(unit.attributes or {})
    assert unit.name == f"{mode.name} unit of work"
    assert attributes["asgi_db.route"] == "POST /orders/{id}"
    assert (attributes["asgi_db.mode"], attributes["asgi_db.outcome"]) == (mode.name, outcome)
    assert attributes["asgi_db.statements"] == 2
    assert unit.status.status_code is StatusCode.UNSET


async def test_a_failed_commit_is_an_error_of_its_unit(
    telemetry: Telemetry, database: Database
) -> None:
    async def swallow(session: DBSession) -> None:
        with pytest.raises(Exception, match="no_such_table"):
            await session.execute(text("SELECT * FROM no_such_table"))

    await telemetry.request(database, transactional, swallow)
    (unit,) = telemetry.units()
    assert unit.status.status_code is StatusCode.ERROR
    (statement,) = [s for s in telemetry.statements() if s.name.startswith("SELECT")]
    assert statement.status.status_code is StatusCode.ERROR


async def test_a_request_without_a_statement_has_no_span_but_its_own(
    telemetry: Telemetry, database: Database
) -> None:
    async def do_nothing(session: DBSession) -> None: ...

    server = await telemetry.request(database, transactional, do_nothing)
    assert telemetry.spans() == [server]


async def test_an_engine_that_was_there_before_has_spans_too(
    telemetry: Telemetry, sqlite_url: str
) -> None:
    engine = create_async_engine(sqlite_url)
    given, started = Database(engine=engine), Database(sqlite_url)
    try:
        async with given, started:
            telemetry.instrument(given, started)
            for database in given, started:
                async with database.session() as session:
                    await session.execute(text("SELECT 1"))
    finally:
        await engine.dispose()
    assert len([s for s in telemetry.statements() if s.name.startswith("SELECT")]) == 2
    assert len(telemetry.units()) == 2


async def test_no_password_is_in_a_span(telemetry: Telemetry, postgresql_url: str) -> None:
    database = Database(postgresql_url.replace("@", ":s3cret@", 1))
    telemetry.instrument(database)
    async with database, database.session() as session:
        await session.execute(text("SELECT 1"))
    assert telemetry.units() and telemetry.statements()
    assert "s3cret" not in "".join(span.to_json() for span in telemetry.spans())


async def test_no_value_of_a_row_is_in_the_span_of_a_statement_that_failed(
    telemetry: Telemetry, database: Database
) -> None:
    async with database.session() as session:
        await session.execute(insert(Author).values(id=1, name="s3cret"))
        with pytest.raises(IntegrityError):
            await session.execute(insert(Author).values(id=1, name="s3cret"))
        with pytest.raises(DBAPIError):
            await session.execute(
                text("SELECT CAST(:value AS DATE), no_such_column"), {"value": "s3cret"}
            )
    failed = [span for span in telemetry.statements() if not span.status.is_ok]
    assert failed and all("Error (" in str(span.status.description) for span in failed)
    assert "s3cret" not in "".join(span.to_json() for span in telemetry.spans())


class Faulty(SpanProcessor):
    """A span processor that fails."""

    def __init__(self, at: str) -> None:
        self._at = at

    def on_start(self, span: Span, parent_context: object = None) -> None:
        if self._at == "start":
            raise LookupError("a processor's own fault")

    def on_end(self, span: ReadableSpan) -> None:
        if self._at == "end":
            raise LookupError("a processor's own fault")


@pytest.mark.parametrize("at", ["start", "end"])
async def test_a_span_processor_that_fails_harms_no_statement(
    telemetry: Telemetry, database_url: str, at: str, caplog: pytest.LogCaptureFixture
) -> None:
    telemetry.tracer_provider.add_span_processor(Faulty(at))
    database = Database(database_url)
    telemetry.instrument(database)
    async with database:
        await database.create_tables(Base.metadata)
        for name in "Ada", "Grace":
            async with database.transaction() as session:
                await session.execute(insert(Author).values(name=name))
        async with database.session(read_only) as session:
            assert set(await session.scalars(QUERY)) == {"Ada", "Grace"}
    lines = [record for record in caplog.records if record.name == "asgi_db"]
    assert len(lines) == 2  # a statement's span, and a unit's
    assert all(line.levelname == "ERROR" and line.exc_info for line in lines)


async def test_the_span_of_a_connect_can_be_added_to(telemetry: Telemetry, sqlite_url: str) -> None:
    def add(*_: object) -> None:
        span = get_current_span()
        span.set_attribute("one", 1)
        span.set_attributes({"two": 2})
        span.add_event("event")
        span.add_link(span.get_span_context())
        span.record_exception(LookupError("an error"))
        span.set_status(StatusCode.ERROR)
        span.update_name("renamed")

    async with Database(sqlite_url) as database:
        telemetry.instrument(database)
        event.listen(database.engine.sync_engine, "checkout", add)
        async with database.session() as session:
            await session.execute(text("SELECT 1"))
    (span,) = [span for span in telemetry.spans() if span.name == "renamed"]
    attributes = span.attributes or {}
    assert (attributes["one"], attributes["two"]) == (1, 2)
    assert [event.name for event in span.events] == ["event", "exception"]
    assert len(span.links) == 1
    assert span.status.status_code is StatusCode.ERROR


# -- metrics -----------------------------------------------------------------------------------


async def test_the_pool_is_measured_by_the_names_of_the_conventions(
    telemetry: Telemetry, database: Database, database_url: str
) -> None:
    async with database.session() as session:
        await session.execute(QUERY)
        count = "db.client.connection.count"
        assert telemetry.values(count) == {("used",): 1, ("idle",): 0}
    assert telemetry.values(count) == {("used",): 0, ("idle",): 1}
    assert telemetry.values("db.client.connection.max") == {(): 1}
    assert telemetry.values("db.client.connection.idle.max") == {(): 1}
    assert telemetry.values("db.client.connection.pending_requests") == {(): 0}
    assert telemetry.values("db.client.connection.timeouts") == {(): 0}
    for name in "wait_time", "use_time":
        points: list[HistogramDataPoint] = telemetry.points(f"db.client.connection.{name}")
        # `create_tables`, which uses the engine itself, does not say how long it waited
        assert sum(point.count for point in points) == (2 if name == "use_time" else 1)
        assert 0 < sum(point.sum for point in points) < 60
        assert points[0].explicit_bounds[0] == 0.001
    async with outside(database_url):
        pass


async def test_each_route_is_measured(telemetry: Telemetry, database: Database) -> None:
    await telemetry.request(database, transactional, write)
    telemetry.clear()
    await telemetry.request(database, read_only, read)
    route = "POST /orders/{id}"
    units = {key: value for key, value in telemetry.values("asgi_db.units").items() if value}
    assert units == {(route, "committed"): 1, (route, "none"): 1}
    assert telemetry.values("asgi_db.statements")[(route,)] == 3
    assert telemetry.values("asgi_db.retries")[(route,)] == 0
    assert telemetry.values("asgi_db.conflicts")[(route,)] == 0
    for name in "held", "waited", "busy":
        points: list[HistogramDataPoint] = telemetry.points(f"asgi_db.{name}")
        by_route = {str((p.attributes or {})["asgi_db.route"]): p for p in points}
        assert by_route[route].count == 2
        assert 0 < by_route[route].sum < 60
        assert tuple(by_route[route].explicit_bounds) == BUCKETS
        # `create_tables` uses the engine itself, and does not say how long it waited.
        assert (WITHOUT_SESSION in by_route) == (name == "held")


async def test_nothing_is_told_to_nobody(sqlite_url: str) -> None:
    async with Database(sqlite_url) as database:
        assert database.statistics.observers == ()
