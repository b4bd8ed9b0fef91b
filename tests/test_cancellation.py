"""Cancellation: whatever ends a request early leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import Any

import anyio
import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import QueuePool
from sqlalchemy.testing import cancellation

from asgi_db import Database, DBSession, DBSessionMiddleware, transactional, uuid4_str
from asgi_db.cancellation import run_to_completion
from asgi_db.types import ASGIApp, Receive, Scope, Send
from tests.contract.client import call
from tests.freezing import Freezer
from tests.loops import every_loop
from tests.servers import assert_disconnected, assert_idle, outside, run, server_connections
from tests.tables import Author, Base, authors

# -- run_to_completion -------------------------------------------------------------------------


class Work:
    """A coroutine that waits until it is let go, and says how far it has come."""

    def __init__(self, error: Exception | None = None) -> None:
        self.begun = asyncio.Event()
        self.let_go = asyncio.Event()
        self.ended = asyncio.Event()
        self.error = error

    async def __call__(self) -> str:
        self.begun.set()
        await self.let_go.wait()
        self.ended.set()
        if self.error is not None:
            raise self.error
        return "done"


async def turns(number: int) -> None:
    """Let everybody else go on."""
    for _ in range(number):
        await asyncio.sleep(0)


@pytest.fixture
async def unhandled() -> AsyncIterator[list[dict[str, Any]]]:
    """What the event loop has to complain of: nothing, at the end."""
    complaints: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    yield complaints
    loop.set_exception_handler(None)
    assert complaints == []


@every_loop
async def test_what_is_not_cancelled_returns_its_result_or_raises_its_error() -> None:
    async def fail() -> None:
        raise KeyError("why")

    work = Work()
    work.let_go.set()
    assert await run_to_completion(work()) == "done"
    with pytest.raises(KeyError, match="why"):
        await run_to_completion(fail())


@every_loop
@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("error", [None, ValueError("of the work")])
@pytest.mark.usefixtures("unhandled")
async def test_a_cancelled_task_waits_for_the_end_and_is_then_cancelled(
    times: int, error: Exception | None
) -> None:
    work = Work(error)
    task = asyncio.create_task(run_to_completion(work()))
    await work.begun.wait()
    for _ in range(times):
        task.cancel()
        await turns(5)
        assert not task.done()
    work.let_go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.ended.is_set()
    assert task.cancelled()


@every_loop
@pytest.mark.usefixtures("unhandled")
async def test_a_cancellation_at_the_moment_of_the_end_is_not_lost() -> None:
    work = Work()
    task = asyncio.create_task(run_to_completion(work()))
    await work.begun.wait()
    work.let_go.set()
    await work.ended.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@every_loop
async def test_a_timeout_ends_it_with_its_own_error() -> None:
    work = Work()

    async def let_it_expire() -> None:
        await work.begun.wait()
        timeout.reschedule(0)
        await turns(5)
        work.let_go.set()

    later = asyncio.create_task(let_it_expire())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(60) as timeout:
            await run_to_completion(work())
    await later
    assert work.ended.is_set()


class Counted:
    """Counts how often an awaitable is resumed."""

    def __init__(self, awaitable: Coroutine[Any, Any, Any]) -> None:
        self._awaitable = awaitable
        self.resumed = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        throw: BaseException | None = None
        while True:
            self.resumed += 1
            try:
                step = self._awaitable.send(None) if throw is None else self._awaitable.throw(throw)
            except StopIteration as end:
                return end.value
            try:
                yield step
                throw = None
            except BaseException as error:
                throw = error


@every_loop
@pytest.mark.usefixtures("unhandled")
@pytest.mark.parametrize("beforehand", [True, False])
async def test_in_a_cancelled_scope_it_waits_without_spinning(beforehand: bool) -> None:
    """anyio cancels again at each await: without a shield this takes thousands of turns."""
    work = Work()

    async def cancel_and_let_go() -> None:
        await work.begun.wait()
        scope.cancel()
        await turns(1000)
        assert not work.ended.is_set()
        work.let_go.set()

    later = asyncio.create_task(cancel_and_let_go())
    counted = Counted(run_to_completion(work()))
    with anyio.CancelScope() as scope:
        if beforehand:
            scope.cancel()
        await counted
        await anyio.sleep(60)  # here, at the next opportunity, the cancellation arrives
    assert scope.cancelled_caught
    assert work.ended.is_set()
    assert counted.resumed <= 4
    await later


# -- a request that is cancelled ---------------------------------------------------------------

POOL = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}


@dataclass
class Site:
    """An application with a pool of one connection, and how to cancel its requests."""

    url: str
    database: Database
    cancel: Callable[[], object] = lambda: None
    """Cancels the request in the way of the test."""

    def app(self, endpoint: Callable[[DBSession, Send], Awaitable[None]], way: str) -> ASGIApp:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await endpoint(scope["state"]["db"], send)

        async def cancellable(scope: Scope, receive: Receive, send: Send) -> None:
            if way == "scope":
                with anyio.CancelScope() as cancel_scope:
                    self.cancel = cancel_scope.cancel
                    await inner(scope, receive, send)
            else:
                task = asyncio.current_task()
                assert task is not None
                self.cancel = task.cancel
                await inner(scope, receive, send)

        inner = DBSessionMiddleware(app, self.database, mode=transactional)
        return cancellable

    async def cancelled_call(self, app: ASGIApp, way: str, when: Awaitable[object]) -> None:
        """Serve a request, and cancel it when the moment has come."""
        request = asyncio.create_task(call(app))
        await when
        self.cancel()
        if way == "twice":
            await turns(3)
            self.cancel()
        async with asyncio.timeout(10):
            await asyncio.wait((request,))
        assert request.cancelled() or way == "scope", request

    async def assert_clean(self) -> None:
        pool = self.database.engine.pool
        assert isinstance(pool, QueuePool)
        assert pool.checkedout() == 0
        await assert_idle(self.url)
        async with self.database.transaction() as session:  # on the same connection, or a new one
            session.add(Author(name="next"))
        assert "next" in await authors(self.url)


@pytest.fixture
async def site(database_url: str) -> AsyncIterator[Site]:
    async with Database(database_url, engine_options=POOL) as database:
        await database.create_tables(Base.metadata)
        yield Site(database_url, database)


@pytest.fixture
async def postgresql_site(postgresql_url: str) -> AsyncIterator[Site]:
    async with Database(postgresql_url, engine_options=POOL) as database:
        await database.create_tables(Base.metadata)
        yield Site(postgresql_url, database)


each_way = pytest.mark.parametrize("way", ["task", "twice", "scope"])


async def answer(send: Send) -> None:
    await send({"type": "http.response.start", "status": 201, "headers": []})
    await send({"type": "http.response.body"})


@each_way
async def test_cancelled_before_its_first_statement(site: Site, way: str) -> None:
    async def endpoint(session: DBSession, send: Send) -> None:
        session.add(Author(name="ada"))
        reached.set()
        await asyncio.Event().wait()

    reached = asyncio.Event()
    await site.cancelled_call(site.app(endpoint, way), way, reached.wait())
    assert await authors(site.url) == []
    await site.assert_clean()


@each_way
@pytest.mark.parametrize("server", ["postgresql", "mysql"])
async def test_cancelled_while_it_connects(
    request: pytest.FixtureRequest, server: str, way: str
) -> None:
    async def endpoint(session: DBSession, send: Send) -> None:
        await session.execute(insert(Author).values(name="ada"))

    url: str = request.getfixturevalue(f"{server}_url")
    async with Freezer(url) as relay:
        async with Database(relay.url, engine_options=POOL) as database:
            await database.create_tables(Base.metadata)
            await database.dispose()
            relay.freeze()
            site = Site(url, database)
            await site.cancelled_call(site.app(endpoint, way), way, relay.holds_something.wait())
            relay.thaw()
            await site.assert_clean()
        await assert_disconnected(url)


@each_way
async def test_cancelled_between_two_statements(site: Site, way: str) -> None:
    async def endpoint(session: DBSession, send: Send) -> None:
        await session.execute(insert(Author).values(name="ada"))
        reached.set()
        await asyncio.Event().wait()

    reached = asyncio.Event()
    await site.cancelled_call(site.app(endpoint, way), way, reached.wait())
    assert await authors(site.url) == []
    await site.assert_clean()


SLEEP = {"postgresql": "SELECT pg_sleep(1.5)", "mysql": "SELECT SLEEP(1.5)"}
"""Short, because not every driver tells its server of a cancellation."""


async def on_the_server(url: str, query: str) -> None:
    """Wait until the server runs this statement."""
    while True:
        clients = await server_connections(url)
        if any(client.state == "active" and query in client.query for client in clients):
            return
        await asyncio.sleep(0.01)


@each_way
@pytest.mark.parametrize("server", ["postgresql", "mysql"])
async def test_cancelled_inside_a_running_statement(
    request: pytest.FixtureRequest, server: str, way: str
) -> None:
    async def endpoint(session: DBSession, send: Send) -> None:
        await session.execute(insert(Author).values(name="ada"))
        await session.execute(text(SLEEP[server]))

    url: str = request.getfixturevalue(f"{server}_url")
    async with Database(url, engine_options=POOL) as database:
        await database.create_tables(Base.metadata)
        site = Site(url, database)
        running = on_the_server(url, SLEEP[server])
        await site.cancelled_call(site.app(endpoint, way), way, running)
        assert await authors(url) == []
        await site.assert_clean()


@each_way
async def test_cancelled_during_commit_it_waits_for_the_result(
    postgresql_site: Site, way: str
) -> None:
    async def endpoint(session: DBSession, send: Send) -> None:
        await session.execute(insert(Author).values(name="ada"))
        await answer(send)

    site = postgresql_site
    async with outside(site.url) as connection:
        await connection.execute(
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END'"
        )
        await connection.execute(
            "CREATE CONSTRAINT TRIGGER slow_commit AFTER INSERT ON author"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait()"
        )
    committing = on_the_server(site.url, "COMMIT")
    await site.cancelled_call(site.app(endpoint, way), way, committing)
    assert await authors(site.url) == ["ada"]
    await site.assert_clean()


@each_way
async def test_cancelled_after_its_commit_it_keeps_what_it_has_acknowledged(
    site: Site, way: str
) -> None:
    async def endpoint(session: DBSession, send: Send) -> None:
        await session.execute(insert(Author).values(name="ada"))
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await session.execute(insert(Author).values(name="of the stream"))
        reached.set()
        await asyncio.Event().wait()

    reached = asyncio.Event()
    await site.cancelled_call(site.app(endpoint, way), way, reached.wait())
    assert await authors(site.url) == ["ada"]
    await site.assert_clean()


async def test_a_statement_that_a_timeout_cut_off_is_never_acknowledged(
    postgresql_site: Site,
) -> None:
    async def endpoint(session: DBSession, send: Send) -> None:
        await session.execute(insert(Author).values(name="ada"))
        try:
            async with asyncio.timeout(0.1):
                await session.execute(text("SELECT pg_sleep(60)"))
        except TimeoutError:
            pass
        await answer(send)

    site = postgresql_site
    exchange = await call(site.app(endpoint, "task"))
    assert (exchange.status, exchange.answered_by_server) == (500, True)
    assert await authors(site.url) == []
    await site.assert_clean()


@pytest.mark.parametrize("cancels", [1, 2])
@pytest.mark.parametrize("warm", [True, False])
def test_cancelled_at_each_point_of_its_input_and_output(
    postgresql_url: str, warm: bool, cancels: int
) -> None:
    """SQLAlchemy's own sweep: it looks for lost slots, leaks and broken connections."""

    def make_engine() -> AsyncEngine:
        return create_async_engine(postgresql_url, pool_size=1, max_overflow=0, pool_timeout=5)

    async def request(engine: AsyncEngine) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            session: DBSession = scope["state"]["db"]
            session.add(Author(name=uuid4_str()))
            await session.execute(select(Author.id))
            await answer(send)

        async def channel(message: object = None) -> None:
            await asyncio.sleep(0)

        wrapped = DBSessionMiddleware(app, Database(engine=engine), mode=transactional)
        await wrapped({"type": "http", "method": "GET", "path": "/"}, channel, channel)

    async def sweep_all() -> None:
        async with Database(postgresql_url) as database:
            await database.create_tables(Base.metadata)
        sweep: Any = getattr(cancellation, "sweep")  # noqa: B009, it has no types
        assert await sweep(make_engine, request, warm=warm, cancels=cancels) == []
        await assert_idle(postgresql_url)

    run(sweep_all())  # on a loop without other tasks: for each it would wait for seconds
