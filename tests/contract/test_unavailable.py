"""What the database cannot serve is a 503 which says so, unless the application handles it."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import anyio.from_thread
import fastapi
import pytest
import sqlalchemy.exc
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response

from asgi_db import (
    Database,
    DatabaseBusyError,
    DatabaseDownError,
    DatabaseTimeoutError,
    DBSession,
    DBSessionMiddleware,
    Mode,
    OutcomeUnknownError,
    UnavailableError,
    plain,
    read_only,
    transactional,
)
from asgi_db_fastapi import CurrentSession
from tests.contract.apps import BareASGI, InFastAPI
from tests.contract.client import assert_refused
from tests.contract.endpoints import Answer, Framework, Handlers, Work
from tests.contract.site import Site, write
from tests.relay import Fate, Relay, once

POOL = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.05}
TEAPOT = Answer(418, b"tea instead")
SELECT_1 = text("SELECT 1")

placements = pytest.mark.parametrize("around", [False, True], ids=["inside", "around"])


# -- what there is to go wrong -----------------------------------------------------------------


@dataclass(frozen=True)
class Faulty:
    """A site behind a relay, of which one thing is about to go wrong.

    Attributes:
        near: the site itself.
        far: the same site, reached through the relay.
        sleep: an SQL statement which takes its time.
    """

    near: Site
    far: Site
    relay: Relay

    @property
    def sleep(self) -> str:
        return "SELECT pg_sleep(60)" if "postgresql" in self.near.url else "SELECT SLEEP(60)"


@pytest.fixture
async def faulty(framework: Framework, server_url: str) -> AsyncIterator[Faulty]:
    """The framework on each server, with one connection and no overflow."""
    async with (
        Site.on(framework, server_url) as near,
        Relay(server_url) as relay,
        Database(relay.url, engine_options=POOL) as database,
    ):
        yield Faulty(near, replace(near, database=database), relay)


@pytest.fixture
async def busy(framework: Framework, postgresql_url: str) -> AsyncIterator[Site]:
    """The framework with a pool of one connection, which is in use."""
    async with occupied(framework, postgresql_url) as site:
        yield site


@asynccontextmanager
async def occupied(framework: Framework, url: str) -> AsyncGenerator[Site, None]:
    """A site whose one connection somebody else has."""
    async with (
        Database(url, engine_options=POOL) as database,
        database.session() as holding,
    ):
        await holding.execute(SELECT_1)
        yield Busy(framework, url, database)


class Busy(Site):
    """A site whose one connection somebody else has."""

    async def assert_nothing_held(self) -> None:
        assert self.checked_out == 1


async def lose_everything(site: Faulty, _: DBSession) -> None:
    """The network: no connection survives, and none is made."""
    site.relay.refuse()
    site.relay.cut()


async def kill_the_statement(site: Faulty, session: DBSession) -> None:
    """A restart, as a statement sees it that runs at that moment."""
    site.relay.fate_of = once(site.sleep.encode(), Fate.LOST)
    await session.execute(text(site.sleep))


async def lose_the_commit(site: Faulty, session: DBSession) -> None:
    """The connection breaks when COMMIT is under way, and does not arrive."""
    site.relay.fate_of = once(b"COMMIT", Fate.LOST)
    await write()(session)


async def lose_the_answer_to_the_commit(site: Faulty, session: DBSession) -> None:
    """The connection breaks when COMMIT has been carried out, and nobody learns of it."""
    site.relay.fate_of = once(b"COMMIT", Fate.ANSWER_LOST)
    await write()(session)


async def wait_for_long(site: Faulty, session: DBSession) -> None:
    """A statement that takes longer than the unit of work may."""
    await write()(session)
    await session.flush()
    await session.execute(text(site.sleep))


@dataclass(frozen=True)
class Fault:
    """What goes wrong while an endpoint works, and what comes of it."""

    work: Callable[[Faulty, DBSession], Awaitable[None]]
    reason: str
    error: type[UnavailableError]
    others: tuple[type[Exception], ...]
    """What else the error is, so that handlers for it take it."""
    items: tuple[str, ...] = ()
    mode: Mode = transactional

    def endpoint(self, site: Faulty) -> Work:
        async def order(session: DBSession) -> Answer:
            await self.work(site, session)
            return Answer(201, b"ordered")

        return order


async def find_nobody(site: Faulty, session: DBSession) -> None:
    await lose_everything(site, session)
    await session.execute(SELECT_1)


LOST = (OperationalError, DBAPIError, SQLAlchemyError)
FAULTS = {
    "refused": Fault(find_nobody, "down", DatabaseDownError, LOST),
    "killed in mid-statement": Fault(kill_the_statement, "down", DatabaseDownError, LOST),
    "COMMIT lost": Fault(
        lose_the_commit, "outcome-unknown", OutcomeUnknownError, (DatabaseDownError, *LOST)
    ),
    "answer to COMMIT lost": Fault(
        lose_the_answer_to_the_commit,
        "outcome-unknown",
        OutcomeUnknownError,
        (DatabaseDownError, *LOST),
        items=("a",),
    ),
    "too slow": Fault(
        wait_for_long,
        "timeout",
        DatabaseTimeoutError,
        (TimeoutError, OSError),
        mode=transactional(timeout=0.1),
    ),
}

each_fault = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)


# -- unhandled: 503 ----------------------------------------------------------------------------


@each_fault
@placements
async def test_what_the_database_cannot_serve_is_a_503_which_says_why(
    faulty: Faulty, fault: Fault, around: bool, caplog: pytest.LogCaptureFixture
) -> None:
    work = fault.endpoint(faulty)
    exchange = await faulty.far.answer(work, fault.mode, around=around)
    assert_refused(exchange, fault.reason)
    assert tuple(await faulty.near.items()) == fault.items
    lines = [record.getMessage() for record in caplog.records if record.name == "asgi_db"]
    assert any("POST /" in line for line in lines), caplog.text
    assert "password" not in caplog.text


@placements
async def test_where_no_connection_is_free_it_is_a_503(
    framework: Framework, database_url: str, around: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def look(session: DBSession) -> None:
        await session.execute(SELECT_1)

    async with occupied(framework, database_url) as busy:
        for mode in (plain, transactional, read_only):
            assert_refused(await busy.answer(look, mode, around=around), "busy")
    assert "POST /" in caplog.text and "password" not in caplog.text


@each_fault
async def test_the_next_request_is_served_on_the_same_pool(faulty: Faulty, fault: Fault) -> None:
    endpoints = {"/bad": fault.endpoint(faulty), "/good": write(name="next")}
    app = faulty.far.app(endpoints, fault.mode)
    assert (await faulty.far.call(app, "/bad")).status == 503
    if fault.work is find_nobody:
        await faulty.relay.start()
    assert (await faulty.far.call(app, "/good")).status == 200
    assert await faulty.near.items() == [*fault.items, "next"]


@placements
async def test_a_connection_killed_before_the_commit_is_a_503_and_nothing_is_applied(
    server_site: Site, around: bool
) -> None:
    """Whether COMMIT was still sent into it depends on what the driver has seen by then."""

    async def order(session: DBSession) -> None:
        await write()(session)
        await session.flush()
        await server_site.cut(session)

    exchange = await server_site.answer(order, transactional, around=around)
    reason = json.loads(exchange.body)["reason"]
    assert reason in ("down", "outcome-unknown")
    assert_refused(exchange, reason)
    assert await server_site.items() == []


async def test_a_lost_commit_by_hand_is_a_503_too(faulty: Faulty) -> None:
    async def order(session: DBSession) -> None:
        faulty.relay.fate_of = once(b"COMMIT", Fate.ANSWER_LOST)
        await write()(session)
        await session.commit()

    assert_refused(await faulty.far.answer(order), "outcome-unknown")
    assert await faulty.near.items() == ["a"]


@pytest.mark.parametrize("mode", [plain, read_only], ids=lambda mode: mode.name)
async def test_the_timeout_of_each_mode_is_a_503(faulty: Faulty, mode: Any) -> None:
    async def report(session: DBSession) -> None:
        await session.execute(text(faulty.sleep))

    assert_refused(await faulty.far.answer(report, mode(timeout=0.1)), "timeout")


async def test_a_timeout_ends_a_statement_of_sqlite(framework: Framework, sqlite_url: str) -> None:
    async def report(session: DBSession) -> None:
        numbers = "SELECT 1 AS i UNION ALL SELECT i + 1 FROM n WHERE i < 60000000"  # half a minute
        await session.execute(text(f"WITH RECURSIVE n AS ({numbers}) SELECT max(i) FROM n"))

    async with Site.on(framework, sqlite_url) as site:
        app = site.app({"/slow": report, "/good": write()}, transactional(timeout=2))
        async with asyncio.timeout(60):
            assert_refused(await site.call(app, "/slow"), "timeout")
            assert (await site.call(app, "/good")).status == 200
        assert await site.items() == ["a"]


# -- how a database can be out of reach --------------------------------------------------------

UNREACHABLE: dict[str, dict[str, Any]] = {
    "no such host": {"host": "nowhere.invalid", "password": "c0rrect-h0rse"},
    "nobody at the port": {"port": 1, "password": "c0rrect-h0rse"},
}


@pytest.mark.parametrize("change", UNREACHABLE.values(), ids=UNREACHABLE)
async def test_a_database_that_cannot_be_reached_is_a_503(
    server_url: str, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def look(session: DBSession) -> None:
        await session.execute(SELECT_1)

    url = make_url(server_url).set(**change)
    async with Database(url, engine_options=POOL) as database:
        exchange = await Site(BareASGI(), server_url, database).answer(look)
    assert_refused(exchange, "down")
    assert b"c0rrect-h0rse" not in exchange.body
    assert "c0rrect-h0rse" not in caplog.text


# -- handled: as the application says ----------------------------------------------------------


@asynccontextmanager
async def far_or_busy(
    name: str, framework: Framework, url: str
) -> AsyncGenerator[tuple[Site, Work, Mode, tuple[type[Exception], ...]], None]:
    """A site, work that fails there, its mode, and what the error is, the nearest class first."""
    async with AsyncExitStack() as stack:
        near = await stack.enter_async_context(Site.on(framework, url))
        if name == "busy":
            busy = await stack.enter_async_context(occupied(framework, url))
            kinds = (DatabaseBusyError, sqlalchemy.exc.TimeoutError, SQLAlchemyError)
            yield busy, write_at_once, transactional, kinds
        else:
            relay = await stack.enter_async_context(Relay(url))
            through = Database(relay.url, engine_options=POOL)
            database = await stack.enter_async_context(through)
            site, fault = replace(near, database=database), FAULTS[name]
            work = fault.endpoint(Faulty(near, site, relay))
            yield site, work, fault.mode, (fault.error, *fault.others)


async def write_at_once(session: DBSession) -> None:
    await write()(session)
    await session.flush()


in_a_statement_or_at_commit = pytest.mark.parametrize("name", ["busy", "COMMIT lost"])


@pytest.mark.parametrize("name", ["busy", *FAULTS])
async def test_a_handler_for_any_class_of_the_error_answers_it(
    framework: Framework, postgresql_url: str, name: str
) -> None:
    async with far_or_busy(name, framework, postgresql_url) as (site, work, mode, kinds):
        for kind in (*kinds, UnavailableError):
            await site.from_outside("DELETE FROM item")
            exchange = await site.answer(work, mode, handlers={kind: TEAPOT})
            assert (exchange.status, exchange.body) == (418, TEAPOT.body), kind
            assert (exchange.error, exchange.complete) == (None, True)


@in_a_statement_or_at_commit
async def test_so_it_does_where_the_middleware_stands_around_the_application(
    framework: Framework, mysql_url: str, name: str
) -> None:
    async with far_or_busy(name, framework, mysql_url) as (site, work, mode, _):
        handlers = {UnavailableError: TEAPOT}
        exchange = await site.answer(work, mode, handlers=handlers, around=True)
        assert (exchange.status, exchange.body) == (418, TEAPOT.body)
        assert (exchange.error, exchange.complete) == (None, True)


@placements
@in_a_statement_or_at_commit
async def test_a_handler_may_answer_with_a_500_or_a_503_of_its_own(
    framework: Framework, mysql_url: str, name: str, around: bool
) -> None:
    """But nobody knows what a bare application handles; there a 500 for this error is ours."""
    async with far_or_busy(name, framework, mysql_url) as (site, work, mode, _):
        for answer in (Answer(500, b"our own page"), Answer(503, b"our own words")):
            handlers = {UnavailableError: answer}
            exchange = await site.answer(work, mode, handlers=handlers, around=around)
            if framework.name == "asgi" and answer.status == 500:
                answer = Answer(503, exchange.body)
            assert (exchange.status, exchange.body) == (answer.status, answer.body)
            assert (exchange.error, exchange.complete) == (None, True)


@placements
@in_a_statement_or_at_commit
async def test_a_handler_of_every_exception_is_not_meant(
    framework: Framework, postgresql_url: str, name: str, around: bool
) -> None:
    """It is for what nobody has thought of."""
    handlers = {Exception: Answer(500, b"our own page")}
    async with far_or_busy(name, framework, postgresql_url) as (site, work, mode, _):
        exchange = await site.answer(work, mode, handlers=handlers, around=around)
        assert_refused(exchange, "busy" if name == "busy" else "outcome-unknown")


@in_a_statement_or_at_commit
async def test_the_nearest_handler_answers(
    framework: Framework, postgresql_url: str, name: str
) -> None:
    handlers: Handlers = {Exception: Answer(500, b"too far"), SQLAlchemyError: Answer(500, b"too")}
    async with far_or_busy(name, framework, postgresql_url) as (site, work, mode, kinds):
        exchange = await site.answer(work, mode, handlers={**handlers, kinds[0]: TEAPOT})
        assert (exchange.status, exchange.body) == (418, TEAPOT.body)


@placements
@in_a_statement_or_at_commit
async def test_a_handler_for_errors_of_the_operating_system_is_not_asked(
    framework: Framework, postgresql_url: str, name: str, around: bool
) -> None:
    """What the driver raised is the cause; the error itself is SQLAlchemy's, on every database."""
    handlers: Handlers = {OSError: TEAPOT, ConnectionError: TEAPOT, TimeoutError: TEAPOT}
    async with far_or_busy(name, framework, postgresql_url) as (site, work, mode, _):
        exchange = await site.answer(work, mode, handlers=handlers, around=around)
        assert_refused(exchange, "busy" if name == "busy" else "outcome-unknown")


@placements
async def test_an_endpoint_may_catch_the_error_and_answer_without_the_database(
    busy: Site, around: bool
) -> None:
    for answer in (Answer(200, b"from the cache"), Answer(500, b"our own page")):

        async def look(session: DBSession) -> Answer:
            try:
                await session.execute(SELECT_1)
            except DatabaseBusyError:
                pass
            return answer  # noqa: B023, it is called in the same turn

        for mode in (plain, read_only):
            exchange = await busy.answer(look, mode, around=around)
            assert (exchange.status, exchange.body) == (answer.status, answer.body)


@pytest.mark.parametrize("name", ["busy", "killed in mid-statement", "too slow"])
async def test_a_write_whose_error_was_swallowed_is_not_acknowledged(
    framework: Framework, postgresql_url: str, name: str
) -> None:
    async with far_or_busy(name, framework, postgresql_url) as (site, work, mode, _):

        async def order(session: DBSession) -> Answer:
            try:
                await work(session)
            except UnavailableError:
                pass
            return Answer(201, b"ordered")

        exchange = await site.answer(order, mode)
    assert exchange.status >= 500
    assert b"ordered" not in exchange.body


@placements
@pytest.mark.parametrize("status", [418, 500])
async def test_an_endpoint_may_raise_an_error_of_its_own_instead(
    busy: Site, around: bool, status: int
) -> None:
    async def order(session: DBSession) -> None:
        try:
            await write_at_once(session)
        except UnavailableError as error:
            raise busy.framework.http_error(Answer(status)) from error

    exchange = await busy.answer(order, transactional, around=around)
    assert (exchange.status, exchange.error) == (status, None)


@placements
async def test_an_error_of_another_kind_that_came_from_it_is_a_500(
    busy: Site, around: bool
) -> None:
    """What the application raises is what is answered, not what it was raised from."""

    async def order(session: DBSession) -> None:
        try:
            await write_at_once(session)
        except UnavailableError as error:
            raise LookupError("of the application") from error

    exchange = await busy.answer(order, transactional, around=around)
    assert exchange.status == 500


@placements
async def test_a_middleware_of_starlettes_own_kind_in_between_changes_nothing(
    framework: Framework, postgresql_url: str, around: bool
) -> None:
    """`BaseHTTPMiddleware` runs the application in a task of its own."""

    async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)

    for name in ("busy", *FAULTS):
        async with far_or_busy(name, framework, postgresql_url) as (site, work, mode, _):
            app = site.app(work, mode, around=around)
            inner = getattr(app, "app", app) if around else app
            if not isinstance(inner, Starlette):
                return
            inner.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
            if not around:  # ours has to be the outer one
                inner.user_middleware.reverse()
            assert (await site.call(app)).status == 503, name


@placements
async def test_the_page_for_developers_does_not_come_in_between(
    framework: Framework, postgresql_url: str, around: bool
) -> None:
    async with occupied(framework, postgresql_url) as busy:
        app = busy.app(write_at_once, around=around)
        inner: Any = getattr(app, "app", app) if around else app
        inner.debug = True
        assert_refused(await busy.call(app), "busy")


async def test_a_session_of_the_endpoints_own_is_refused_alike(busy: Site) -> None:
    async def order(_: DBSession) -> None:
        async with busy.database.transaction() as session:
            await write_at_once(session)

    assert_refused(await busy.answer(order), "busy")


# -- not from the session: as before -----------------------------------------------------------


async def call_another_service(_: DBSession) -> None:
    raise ConnectionRefusedError("the other service")


async def wait_for_another_service(_: DBSession) -> None:
    async with asyncio.timeout(0):
        await asyncio.Event().wait()


async def run_into_another_pool(_: DBSession) -> None:
    raise sqlalchemy.exc.TimeoutError("another pool")


async def ask_another_database(_: DBSession) -> None:
    engine = create_async_engine("postgresql+asyncpg://nobody@127.0.0.1:1/nothing")
    try:
        async with engine.connect():
            pass
    finally:
        await engine.dispose()


@placements
@pytest.mark.parametrize(
    "fail",
    [call_another_service, wait_for_another_service, run_into_another_pool, ask_another_database],
)
async def test_an_error_which_is_not_of_the_session_is_a_500_as_before(
    framework: Framework, postgresql_url: str, fail: Work, around: bool
) -> None:
    async def order(session: DBSession) -> None:
        await session.execute(SELECT_1)
        await fail(session)

    async with Site.on(framework, postgresql_url) as site:
        exchange = await site.answer(order, transactional, around=around)
    assert exchange.status == 500
    assert (exchange.error is not None) == framework.reraises


@placements
async def test_an_ordinary_error_of_a_statement_is_a_500_as_before(
    server_site: Site, around: bool
) -> None:
    """An `OperationalError`, on MariaDB, but of a connection which is in order."""

    async def order(session: DBSession) -> None:
        syntax = "SELECT 1 FROM" if "postgresql" in server_site.url else "SELECT missing"
        await session.execute(text(syntax))

    assert (await server_site.answer(order, transactional, around=around)).status == 500


@placements
async def test_a_timeout_of_the_endpoints_own_is_a_500_as_before(
    faulty: Faulty, around: bool
) -> None:
    async def report(session: DBSession) -> None:
        async with asyncio.timeout(0.1):
            await session.execute(text(faulty.sleep))

    exchange = await faulty.near.answer(report, transactional(timeout=60), around=around)
    assert exchange.status == 500


# -- a response that has begun -----------------------------------------------------------------


@placements
async def test_a_response_which_has_begun_stays_as_it_is(faulty: Faulty, around: bool) -> None:
    """Nothing is added to it; the server cuts it off, as with any error in a stream."""

    async def export(session: DBSession) -> Answer:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"first"
            await find_nobody(faulty, session)
            yield b"never"

        return Answer(stream=chunks)

    exchange = await faulty.far.answer(export, around=around)
    assert (exchange.status, exchange.body, exchange.complete) == (200, b"first", False)
    assert exchange.was_caused_by(DatabaseDownError)


@placements
async def test_a_background_task_that_fails_does_not_change_the_answer(
    faulty: Faulty, around: bool
) -> None:
    async def order(session: DBSession) -> Answer:
        async def later() -> None:
            await find_nobody(faulty, session)

        return Answer(201, b"ordered", background=later)

    exchange = await faulty.far.answer(order, around=around)
    assert (exchange.status, exchange.body, exchange.complete) == (201, b"ordered", True)


# -- beside it ---------------------------------------------------------------------------------


@placements
async def test_a_route_without_statements_does_not_touch_the_pool(busy: Site, around: bool) -> None:
    async def nothing(_: DBSession) -> None: ...

    for mode in (plain, transactional, read_only):
        assert (await busy.answer(nothing, mode, around=around)).status == 200


async def test_a_session_that_a_synchronous_endpoint_of_fastapi_uses_is_refused_alike(
    postgresql_url: str,
) -> None:
    app = fastapi.FastAPI()

    @app.post("/")
    def look(session: CurrentSession) -> int:  # in a thread
        return anyio.from_thread.run(session.scalar, SELECT_1) or 0

    async with occupied(InFastAPI(), postgresql_url) as busy:
        app.add_middleware(DBSessionMiddleware, database=busy.database)
        assert_refused(await busy.call(app), "busy")
