"""The span of a unit of work stands below that of its request, and both say that a COMMIT has
failed.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
from fastapi import FastAPI
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from asgi_db import Database, DBSessionMiddleware
from asgi_db.opentelemetry import instrument
from asgi_db_fastapi import CurrentSessionTransaction
from tests.ecosystem.heroes import NO_SUCH_TEAM, Hero, heroes, serving


class Telemetry:
    """The SDK, with an exporter in memory, for an application and its database."""

    def __init__(self, app: FastAPI, database: Database) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        FastAPIInstrumentor.instrument_app(app, tracer_provider=provider)
        instrument(database, tracer_provider=provider)

    def of_the_request(self) -> ReadableSpan:
        [span] = [span for span in self.spans() if span.kind is SpanKind.SERVER]
        return span

    def units(self) -> list[ReadableSpan]:
        return [span for span in self.spans() if span.name.endswith("unit of work")]

    def statements(self) -> list[ReadableSpan]:
        return [span for span in self.spans() if "db.statement" in (span.attributes or {})]

    def spans(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()


@pytest.fixture(autouse=True)
def uninstrumented() -> Generator[None, None, None]:
    """The instrumentation of SQLAlchemy is one for the whole process."""
    yield
    instrumentor: Any = SQLAlchemyInstrumentor()
    instrumentor.uninstrument()


def application(database: Database) -> FastAPI:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=database)

    @app.post("/heroes", status_code=201)
    async def create(name: str, session: CurrentSessionTransaction, team: int | None = None) -> int:
        hero = Hero(name=name, team_id=team)
        session.add(hero)
        await session.flush()
        return hero.id

    return app


async def test_a_request_is_one_trace(database: Database) -> None:
    app = application(database)
    telemetry = Telemetry(app, database)
    async with serving(app, database) as client:
        assert (await client.post("/heroes?name=ada")).status_code == 201
    assert heroes(str(database.url)) == ["ada"]
    request, [unit] = telemetry.of_the_request(), telemetry.units()
    assert request.name == "POST /heroes"
    assert unit.parent is not None and unit.parent.span_id == request.context.span_id
    assert {span.context.trace_id for span in telemetry.spans()} == {request.context.trace_id}
    assert any("INSERT" in str(span.attributes) for span in telemetry.statements())
    assert request.status.status_code is not StatusCode.ERROR


async def test_a_failed_commit_is_an_error_of_the_unit_and_of_the_request(
    database: Database,
) -> None:
    app = application(database)
    telemetry = Telemetry(app, database)
    async with serving(app, database) as client:
        answer = await client.post(f"/heroes?name=ada&team={NO_SUCH_TEAM}")
        assert answer.status_code == 500
    assert heroes(str(database.url)) == []
    request, [unit] = telemetry.of_the_request(), telemetry.units()
    assert unit.status.status_code is StatusCode.ERROR
    assert request.status.status_code is StatusCode.ERROR
    assert (request.attributes or {})["http.status_code"] == 500
