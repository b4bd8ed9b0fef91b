"""Whoever only watches does no harm: no error of an observer reaches a request.

Each kind of foreign code that the library calls besides the application itself raises here, all
the time, in each way in which a unit of work can end. The answer, the rows and the pool are to be
as without it; the next request has to find the only connection of the pool.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest
from opentelemetry.instrumentation.sqlalchemy import (  # pyright: ignore[reportMissingTypeStubs]
    SQLAlchemyInstrumentor,
)
from opentelemetry.metrics import Histogram, MeterProvider, NoOpMeter, NoOpMeterProvider
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import NoOpTracerProvider
from prometheus_client import CollectorRegistry, generate_latest
from sqlalchemy import event, func, literal, select, text

from asgi_db import (
    Database,
    DatabaseDownError,
    DBSession,
    DBSessionMiddleware,
    Mode,
    plain,
    read_only,
    transactional,
)
from asgi_db.opentelemetry import instrument
from asgi_db.prometheus import DatabaseCollector
from asgi_db.types import Message, Receive, Scope, Send
from tests.bounded import BOUND, run_within_bound
from tests.contract.apps import BareASGI, InStarlette
from tests.contract.endpoints import Answer
from tests.contract.site import Item, Site
from tests.servers import assert_disconnected
from tests.sockets import websocket

ONE = select(literal(1))


class ObserverError(Exception):
    """What an observer raises here."""


def fail(*_: Any, **__: Any) -> Any:
    raise ObserverError("an observer's own fault")


# -- the ways in which a unit of work ends -----------------------------------------------------

Prepare = Callable[[DBSession], None]
"""What a faulty hook does to each session; other faults need nothing."""

Situation = Callable[[Site, Prepare], Coroutine[Any, Any, None]]

SITUATIONS: dict[str, Situation] = {}


def situation(function: Situation) -> Situation:
    SITUATIONS[function.__name__] = function
    return function


@situation
async def transactional_success(site: Site, prepare: Prepare) -> None:
    async def work(session: DBSession) -> None:
        prepare(session)
        session.add(Item(name="a"))

    assert (await site.answer(work, transactional)).status == 200
    assert await site.items() == ["a"]


@situation
async def failed_commit(site: Site, prepare: Prepare) -> None:
    async def work(session: DBSession) -> None:
        prepare(session)
        session.add(Item(name="a"))
        await site.spoil_commit(session)

    exchange = await site.answer(work, transactional)
    assert exchange.status == site.unhandled
    assert exchange.error is None or exchange.was_caused_by(site.commit_error)
    assert await site.items() == []


@situation
async def failed_commit_with_a_handler(site: Site, prepare: Prepare) -> None:
    async def work(session: DBSession) -> None:
        prepare(session)
        await site.spoil_commit(session)

    handlers = {site.commit_error: Answer(409)}
    exchange = await site.answer(work, transactional, handlers=handlers)
    assert (exchange.status, exchange.error) == (409, None)


@situation
async def failed_rollback(site: Site, prepare: Prepare) -> None:
    async def work(session: DBSession) -> Answer:
        prepare(session)
        session.add(Item(name="a"))
        await session.flush()
        await site.spoil_rollback(session)
        return Answer(400)

    assert (await site.answer(work, transactional)).status == 400
    assert await site.items() == []


@situation
async def rolled_back_for_the_status(site: Site, prepare: Prepare) -> None:
    async def work(session: DBSession) -> Answer:
        prepare(session)
        session.add(Item(name="a"))
        await session.flush()
        return Answer(404)

    assert (await site.answer(work, transactional)).status == 404
    assert await site.items() == []


@situation
async def rolled_back_for_an_exception(site: Site, prepare: Prepare) -> None:
    async def work(session: DBSession) -> None:
        prepare(session)
        session.add(Item(name="a"))
        await session.flush()
        raise LookupError

    exchange = await site.answer(work, transactional)
    assert (exchange.status, type(exchange.error)) == (500, LookupError)
    assert await site.items() == []


@situation
async def answered_with_503(site: Site, prepare: Prepare) -> None:
    async def work(session: DBSession) -> None:
        prepare(session)
        session.add(Item(name="a"))
        await session.flush()
        raise DatabaseDownError("the database has gone", OSError())

    exchange = await site.answer(work, transactional)
    assert (exchange.status, exchange.error) == (503, None)
    assert await site.items() == []


@situation
async def answer_not_delivered(site: Site, prepare: Prepare) -> None:
    async def work(session: DBSession) -> None:
        prepare(session)
        session.add(Item(name="a"))

    async def vanish(_: Message) -> None:
        raise ConnectionResetError

    exchange = await site.call(site.app(work, transactional), watch=vanish)
    assert exchange.was_caused_by(ConnectionResetError)
    assert await site.items() == ["a"]


@situation
async def run_again_after_a_conflict(site: Site, prepare: Prepare) -> None:
    conflict = {
        "postgresql": "DO $$ BEGIN RAISE EXCEPTION 'conflict' USING ERRCODE = '40001'; END $$",
        "mysql": "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213",
    }
    statement = conflict.get(site.database.url.get_backend_name(), "")
    if not statement:
        pytest.skip("SQLite has no statement for a conflict")

    async def work(session: DBSession) -> None:
        prepare(session)
        session.add(Item(name=f"attempt {session.attempt}"))
        await session.flush()
        if session.attempt == 1:
            await session.execute(text(statement))

    assert (await site.answer(work, transactional(retries=1))).status == 200
    assert await site.items() == ["attempt 2"]


@situation
async def plain_with_a_commit_by_hand(site: Site, prepare: Prepare) -> None:
    async def work(session: DBSession) -> None:
        for name in ("a", "b"):
            prepare(session)
            session.add(Item(name=name))
            await session.commit()

    assert (await site.answer(work, plain)).status == 200
    assert await site.items() == ["a", "b"]


@situation
async def plain_with_a_failed_commit_by_hand(site: Site, prepare: Prepare) -> None:
    async def work(session: DBSession) -> Answer:
        prepare(session)
        await site.spoil_commit(session)
        with pytest.raises(site.commit_error):
            await session.commit()
        session.add(Item(name="second"))
        await session.commit()
        return Answer(201)

    assert (await site.answer(work, plain)).status == 201
    assert await site.items() == ["second"]


@situation
async def plain_with_uncommitted_work(site: Site, prepare: Prepare) -> None:
    async def work(session: DBSession) -> None:
        prepare(session)
        session.add(Item(name="a"))
        await session.flush()

    assert (await site.answer(work, plain)).status == 200
    assert await site.items() == []


@situation
async def plain_with_a_rollback_by_hand(site: Site, prepare: Prepare) -> None:
    async def work(session: DBSession) -> None:
        prepare(session)
        session.add(Item(name="a"))
        await session.flush()
        await session.rollback()
        session.add(Item(name="b"))
        await session.commit()

    assert (await site.answer(work, plain)).status == 200
    assert await site.items() == ["b"]


@situation
async def several_reads(site: Site, prepare: Prepare) -> None:
    async def work(session: DBSession) -> Answer:
        prepare(session)
        return Answer(200 + sum([await session.scalar(ONE) or 0 for _ in range(3)]))

    for mode in read_only, read_only(snapshot=True), transactional(read_only=True), plain:
        assert (await site.answer(work, mode)).status == 203


@situation
async def released_between(site: Site, prepare: Prepare) -> None:
    async def work(session: DBSession) -> None:
        prepare(session)
        assert await session.scalar(ONE) == 1
        await session.release()
        assert site.checked_out == 0
        session.add(Item(name="a"))

    assert (await site.answer(work, transactional)).status == 200
    assert await site.items() == ["a"]


@situation
async def savepoints(site: Site, prepare: Prepare) -> None:
    async def work(session: DBSession) -> None:
        prepare(session)
        with suppress(LookupError):
            async with session.begin_nested():
                session.add(Item(name="undone"))
                raise LookupError
        async with session.begin_nested():
            session.add(Item(name="a"))

    assert (await site.answer(work, transactional)).status == 200
    assert await site.items() == ["a"]


@situation
async def hooks_of_the_application(site: Site, prepare: Prepare) -> None:
    lines: list[str] = []

    async def work(session: DBSession) -> Answer:
        prepare(session)
        session.add(Item(name="a"))
        session.on_commit(lambda: lines.append("committed"))
        session.on_commit(lambda: lines.append("answered"), when="after_response")
        session.on_rollback(lambda: lines.append("rolled back"))
        prepare(session)
        return Answer(status)

    for status in 200, 400:
        assert (await site.answer(work, transactional)).status == status
    assert lines == ["committed", "answered", "rolled back"]
    assert await site.items() == ["a"]


@situation
async def a_stream_and_a_background_task(site: Site, prepare: Prepare) -> None:
    async def work(session: DBSession) -> Answer:
        async def stream() -> AsyncIterator[bytes]:
            for name in "bc":
                session.add(Item(name=name))
                yield name.encode()

        async def background() -> None:
            session.add(Item(name="d"))

        prepare(session)
        session.add(Item(name="a"))
        return Answer(stream=stream, background=background)

    exchange = await site.answer(work, transactional)
    assert (exchange.status, exchange.body, exchange.complete) == (200, b"bc", True)
    assert await site.items() == ["a", "b", "c", "d"]


@situation
async def blocks(site: Site, prepare: Prepare) -> None:
    async with site.database.transaction() as session:
        prepare(session)
        session.add(Item(name="a"))
    with pytest.raises(LookupError):
        async with site.database.transaction() as session:
            prepare(session)
            session.add(Item(name="b"))
            await session.flush()
            raise LookupError
    with pytest.raises(site.commit_error):
        async with site.database.transaction() as session:
            prepare(session)
            await site.spoil_commit(session)
    async with site.database.session() as session:
        prepare(session)
        session.add(Item(name="c"))
        await session.commit()
    async with site.database.session(read_only) as session:
        prepare(session)
        assert await session.scalar(select(func.count()).select_from(Item)) == 2
    assert await site.items() == ["a", "c"]


@situation
async def messages_of_a_websocket(site: Site, prepare: Prepare) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session: DBSession = scope["state"]["db"]
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            prepare(session)
            session.add(Item(name=message["text"]))
            await session.flush()
            await send({"type": "websocket.send", "text": message["text"]})
        prepare(session)
        session.add(Item(name="the last"))
        await session.flush()

    async with websocket(DBSessionMiddleware(app, site.database, mode=transactional)) as socket:
        for name in "ab":
            assert await socket.ask(name) == name
            assert site.checked_out == 0
    assert socket.error is None
    assert await site.items() == ["a", "b", "the last"]


@situation
async def cancelled_in_a_statement(site: Site, prepare: Prepare) -> None:
    begun = asyncio.Event()

    async def work() -> None:
        async with site.database.transaction() as session:
            prepare(session)
            session.add(Item(name="a"))
            await session.flush()
            begun.set()
            while True:
                await session.scalar(ONE)

    task = asyncio.create_task(work())
    await begun.wait()
    task.cancel()
    await asyncio.wait((task,))
    assert task.cancelled()
    assert await site.items() == []


@situation
async def cancelled_in_a_commit_by_hand(site: Site, prepare: Prepare) -> None:
    async with site.database.session() as session:
        prepare(session)
        session.add(Item(name="a"))
        await session.flush()
        committing = asyncio.create_task(session.commit())
        await asyncio.sleep(0)
        committing.cancel()
        await asyncio.wait((committing,))
        assert committing.cancelled()
    assert await site.items() == ["a"]


# -- what goes wrong meanwhile -----------------------------------------------------------------

Fault = Callable[[Database], Generator[Prepare]]

FAULTS: dict[str, Fault] = {}


def fault(function: Fault) -> Fault:
    FAULTS[function.__name__] = function
    return function


def nothing(_: DBSession) -> None: ...


@fault
def none(database: Database) -> Generator[Prepare]:
    """What the others are to be like."""
    return observed(database)


class Observer:
    """Is told what happens, and fails at some of it."""

    def __init__(self, *faulty: str) -> None:
        self.told: list[str] = []
        self._faulty = faulty

    def connection_taken(self, waited: float) -> None:
        self._note("connection_taken")

    def connection_returned(self, held: float) -> None:
        self._note("connection_returned")

    def used_without_session(self, held: float) -> None:
        """Not part of what these tests look at."""

    def unit_ended(self, route: str, mode: str, tally: object) -> None:
        self._note("unit_ended")

    def retried(self, route: str) -> None:
        """Not part of what these tests look at."""

    def _note(self, what: str) -> None:
        self.told.append(what)
        if what in self._faulty:
            fail()


def observed(database: Database, *faulty: str) -> Generator[Prepare]:
    """With an observer that fails at something, and one behind it that is to be told as ever."""
    behind = Observer()
    database.statistics.observers += (Observer(*faulty), behind)
    yield nothing
    assert "unit_ended" in behind.told
    # A connection whose BEGIN was cancelled is returned, and was never there for the unit.
    taken, returned = (behind.told.count(f"connection_{what}") for what in ("taken", "returned"))
    assert taken <= returned


@fault
def observer_of_units(database: Database) -> Generator[Prepare]:
    return observed(database, "unit_ended")


@fault
def observer_of_connections_taken(database: Database) -> Generator[Prepare]:
    return observed(database, "connection_taken")


@fault
def observer_of_connections_returned(database: Database) -> Generator[Prepare]:
    return observed(database, "connection_returned")


@fault
def observer_of_everything(database: Database) -> Generator[Prepare]:
    return observed(database, "unit_ended", "connection_taken", "connection_returned")


class FaultyProcessor(SpanProcessor):
    """Fails when a span begins, or when it ends."""

    def __init__(self, at: str, kind: str) -> None:
        self._at = at
        self._kind = kind

    def on_start(self, span: Span, parent_context: object = None) -> None:
        if self._at == "start" and span.name.endswith(self._kind):
            fail()

    def on_end(self, span: ReadableSpan) -> None:
        if self._at == "end" and span.name.endswith(self._kind):
            fail()


def instrumented(
    database: Database,
    processor: SpanProcessor | None = None,
    meters: MeterProvider | None = None,
) -> Generator[Prepare]:
    spans = NoOpTracerProvider() if processor is None else TracerProvider()
    if isinstance(spans, TracerProvider) and processor is not None:
        spans.add_span_processor(processor)
    instrument(database, tracer_provider=spans, meter_provider=meters or NoOpMeterProvider())
    try:
        yield nothing
    finally:
        instrumentor: Any = SQLAlchemyInstrumentor()
        instrumentor.uninstrument()


@fault
def processor_of_units_that_begin(database: Database) -> Generator[Prepare]:
    return instrumented(database, FaultyProcessor("start", "unit of work"))


@fault
def processor_of_units_that_end(database: Database) -> Generator[Prepare]:
    return instrumented(database, FaultyProcessor("end", "unit of work"))


@fault
def processor_of_every_span_that_begins(database: Database) -> Generator[Prepare]:
    return instrumented(database, FaultyProcessor("start", ""))


@fault
def processor_of_every_span_that_ends(database: Database) -> Generator[Prepare]:
    return instrumented(database, FaultyProcessor("end", ""))


@fault
def exporter_of_spans(database: Database) -> Generator[Prepare]:
    class Exporter(SpanExporter):
        def export(self, spans: object) -> SpanExportResult:
            return fail()  # type: ignore[no-any-return]

    return instrumented(database, SimpleSpanProcessor(Exporter()))


@fault
def meter(database: Database) -> Generator[Prepare]:
    class Instrument(Histogram):
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def record(self, *_: Any, **__: Any) -> None:
            fail()

    class Meter(NoOpMeter):
        def create_histogram(self, name: str, *_: Any, **__: Any) -> Histogram:
            return Instrument(name)

    class Meters(NoOpMeterProvider):
        def get_meter(self, name: str, *_: Any, **__: Any) -> NoOpMeter:
            return Meter(name)

    return instrumented(database, meters=Meters())


class FaultyHandler(logging.Handler):
    """Fails at each line, without the safety net of `Handler.handleError`."""

    def emit(self, record: logging.LogRecord) -> None:
        fail()


@contextmanager
def every_line(name: str) -> Generator[logging.Logger]:
    """The logger, which takes every line meanwhile."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        yield logger
    finally:
        logger.setLevel(level)


def with_handler(name: str) -> Generator[Prepare]:
    handler = FaultyHandler()
    with every_line(name) as logger:
        logger.addHandler(handler)
        try:
            yield nothing
        finally:
            logger.removeHandler(handler)


@fault
def log_handler(_: Database) -> Generator[Prepare]:
    return with_handler("asgi_db")


@fault
def log_handler_of_the_root(_: Database) -> Generator[Prepare]:
    """Which gets the lines of all loggers that stand on WARNING."""
    handler = FaultyHandler(logging.WARNING)
    handler.addFilter(lambda record: record.name.startswith(("asgi_db", "sqlalchemy")))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield nothing
    finally:
        root.removeHandler(handler)


@fault
def log_filter(_: Database) -> Generator[Prepare]:
    with every_line("asgi_db") as logger:
        logger.addFilter(fail)
        try:
            yield nothing
        finally:
            logger.removeFilter(fail)


def add_robust_hooks(session: DBSession) -> None:
    async def fail_after_a_while() -> None:
        await asyncio.sleep(0)
        fail()

    for hook in fail, fail_after_a_while:
        session.on_commit(hook, robust=True)
        session.on_commit(hook, when="after_response", robust=True)
        session.on_rollback(hook)


def add_a_hook_that_is_cancelled(session: DBSession) -> None:
    async def wait_for_what_is_cancelled() -> None:
        waiting = asyncio.ensure_future(asyncio.Event().wait())
        asyncio.get_running_loop().call_soon(waiting.cancel)
        await waiting

    session.on_commit(wait_for_what_is_cancelled, robust=True)
    session.on_commit(wait_for_what_is_cancelled, when="after_response", robust=True)
    session.on_rollback(wait_for_what_is_cancelled)


@fault
def robust_hook_that_is_cancelled(_: Database) -> Generator[Prepare]:
    """Itself, or what it waits for; the request is not."""
    yield add_a_hook_that_is_cancelled


@fault
def robust_hooks(_: Database) -> Generator[Prepare]:
    yield add_robust_hooks


@fault
def robust_hooks_that_cannot_be_logged(_: Database) -> Generator[Prepare]:
    faulty = with_handler("asgi_db")
    next(faulty)
    yield add_robust_hooks
    next(faulty, None)


# -- each at each ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    fault: str
    situation: str
    database: str

    def __str__(self) -> str:
        return f"{self.fault}-{self.situation}-{self.database}"


EVERYWHERE = {
    "observer_of_everything",
    "processor_of_units_that_begin",
    "log_handler",
    "robust_hooks",
}
"""The faults that are tried on each database, one of each kind; all others on SQLite."""

CASES = [
    Case(fault, situation, database)
    for fault, situation in itertools.product(FAULTS, SITUATIONS)
    for database in ("sqlite", "postgresql", "mysql")
    if database == "sqlite" or fault in EVERYWHERE
    if database != "sqlite" or situation != "run_again_after_a_conflict"
]


async def still_serves(site: Site, name: str) -> None:
    """The next request finds the only connection of the pool, and it is in order."""

    async def work(session: DBSession) -> None:
        session.add(Item(name=name))

    assert (await site.answer(work, transactional)).status == 200
    assert name in await site.items()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_error_of_an_observer_reaches_a_request(
    request: pytest.FixtureRequest, case: Case
) -> None:
    is_file = case.database == "sqlite"  # which costs nothing
    url: str = request.getfixturevalue(f"{'' if is_file else 'module_'}{case.database}_url")

    async def scenario() -> None:
        async with Site.on(BareASGI(), url) as site:
            with contextmanager(FAULTS[case.fault])(site.database) as prepare:
                await SITUATIONS[case.situation](site, prepare)
                await site.assert_nothing_held()
                await still_serves(site, "meanwhile")
            await still_serves(site, "afterwards")

    run_within_bound(scenario, BOUND)


# -- listeners of the pool ---------------------------------------------------------------------

LISTENERS = ("checkin", "checkout", "connect", "reset")
"""Events of SQLAlchemy's pool on which the library itself relies."""


@pytest.mark.parametrize("database", ["sqlite", "postgresql", "mysql"])
@pytest.mark.parametrize("name", LISTENERS)
def test_a_listener_of_the_pool_that_fails_once_leaves_the_pool_whole(
    request: pytest.FixtureRequest, name: str, database: str
) -> None:
    """What it raises while a connection is taken is the request's; the rest is nobody's."""
    url: str = request.getfixturevalue(f"{database}_url")

    async def scenario() -> None:
        async with Site.on(BareASGI(), url) as site:
            await still_serves(site, "before")
            if name == "connect":
                await site.database.engine.dispose()
            event.listen(site.database.engine.sync_engine, name, fail, once=True)
            exchange = await site.answer(_write_and_flush, transactional)
            if name in ("checkout", "connect"):
                assert exchange.was_caused_by(ObserverError)
                assert await site.items() == ["before"]
            else:
                assert exchange.status == 200
                assert await site.items() == ["a", "before"]
            await still_serves(site, "afterwards")
        await assert_disconnected(url, within=2)

    try:
        run_within_bound(scenario)
    finally:
        gc.collect()


async def _write_and_flush(session: DBSession) -> None:
    session.add(Item(name="a"))
    await session.flush()


# -- what is asked from outside ----------------------------------------------------------------


@pytest.mark.parametrize("framework", [BareASGI(), InStarlette()], ids=lambda each: each.name)
def test_a_rule_for_the_commit_that_fails_leaves_nothing_open(
    sqlite_url: str, framework: Any
) -> None:
    async def scenario() -> None:
        async with Site.on(framework, sqlite_url) as site:
            mode: Mode = transactional(commit_on=fail)
            exchange = await site.answer(_write_and_flush, mode)
            assert exchange.status == 500 and exchange.was_caused_by(ObserverError)
            assert await site.items() == []
            await still_serves(site, "afterwards")

    run_within_bound(scenario)


def test_a_scrape_that_is_broken_off_leaves_nothing_open(sqlite_url: str) -> None:
    async def scenario() -> None:
        async with Site.on(BareASGI(), sqlite_url) as site:
            collector = DatabaseCollector(site.database)

            class BrokenOff:
                def collect(self) -> Any:
                    for metric in collector.collect():
                        yield metric
                        fail()

            registry = CollectorRegistry()
            registry.register(BrokenOff())  # pyright: ignore[reportArgumentType]

            async def work(session: DBSession) -> None:
                await _write_and_flush(session)
                with pytest.raises(ObserverError):
                    await asyncio.to_thread(generate_latest, registry)

            assert (await site.answer(work, transactional)).status == 200
            await still_serves(site, "afterwards")

    run_within_bound(scenario)
