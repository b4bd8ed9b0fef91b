"""Cancellation: whatever ends a request early leaves nothing behind."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.testing import cancellation

from asgi_db import (
    Database,
    DBSession,
    DBSessionMiddleware,
    Mode,
    plain,
    read_only,
    transactional,
    uuid4_str,
)
from asgi_db.types import ASGIApp, Message, Receive, Scope, Send
from tests.cancelling import (
    POOL,
    SLEEP,
    WAYS,
    Counted,
    Points,
    Site,
    answer,
    each_way,
    emptied,
    no_complaints,
    on_the_server,
    outcome,
    tables_on,
    turns,
    watched_tasks,
)
from tests.chaos.cancellation import cancellable
from tests.contract.client import Exchange, call
from tests.internals import run_to_completion
from tests.limits import set_limits
from tests.loops import every_loop
from tests.relay import Fate, Relay, once
from tests.servers import (
    DatabaseServer,
    Outside,
    assert_disconnected,
    assert_idle,
    outside,
    run,
)
from tests.sockets import websocket
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


@pytest.fixture
async def unhandled() -> AsyncIterator[None]:
    async with no_complaints():
        yield


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


@pytest.fixture(scope="module")
def postgresql_tables(postgresql_server: DatabaseServer) -> Iterator[str]:
    with tables_on(postgresql_server) as url:
        yield url


@pytest.fixture(scope="module")
def mysql_tables(mysql_server: DatabaseServer) -> Iterator[str]:
    with tables_on(mysql_server) as url:
        yield url


@pytest.fixture
def postgresql_url(postgresql_tables: str) -> str:
    return emptied(postgresql_tables)


@pytest.fixture
def mysql_url(mysql_tables: str) -> str:
    return emptied(mysql_tables)


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
    async with Relay(url) as relay:
        async with Database(relay.url, engine_options=POOL) as database:
            await database.create_tables(Base.metadata)
            await database.dispose()
            await assert_disconnected(url)  # the relay would hold these farewells, too
            relay.freeze()
            site = Site(url, database)
            await site.cancelled_call(site.app(endpoint, way), way, relay.holds_something.wait())
            relay.thaw()
            await site.assert_clean()
        await assert_disconnected(url)


@pytest.mark.usefixtures("unhandled")
@pytest.mark.parametrize("answers", [True, False], ids=["answers", "never answers"])
@pytest.mark.parametrize("server", ["postgresql", "mysql"])
async def test_no_connect_that_was_cancelled_outlives_the_database(
    request: pytest.FixtureRequest, server: str, answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for, and cut off if the server does not answer in time."""

    async def read() -> None:
        async with database.session() as session:
            await session.execute(select(1))

    if not answers:
        set_limits(monkeypatch, connect_grace=0.1)
    url: str = request.getfixturevalue(f"{server}_url")
    async with Relay(url) as relay:
        database = Database(relay.url)
        relay.freeze()
        reader = asyncio.create_task(read())
        await relay.holds_something.wait()
        reader.cancel()
        await asyncio.wait((reader,))
        if answers:
            asyncio.get_running_loop().call_later(0.1, relay.thaw)
        async with asyncio.timeout(20):
            await database.dispose()
        assert [
            task for task in asyncio.all_tasks() if "_connect_uninterrupted" in repr(task)
        ] == []
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


@pytest.mark.parametrize("way", ["twice", "scope"])
async def test_cancelled_while_the_server_commits_it_waits_for_the_result(
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
        await connection.execute("DROP FUNCTION wait CASCADE")
    assert await authors(site.url) == ["ada"]
    await site.assert_clean()


# -- a request that is cancelled during its COMMIT ----------------------------------------------


@pytest.fixture(params=["postgresql", "mysql"])
async def relay(request: pytest.FixtureRequest) -> AsyncIterator[Relay]:
    """The network before a server."""
    async with Relay(request.getfixturevalue(f"{request.param}_url")) as relay:
        yield relay


@pytest.fixture
async def remote(relay: Relay, request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    """A site whose network is about to freeze around a COMMIT."""
    async with Database(relay.url, engine_options=POOL) as database:
        await database.create_tables(Base.metadata)
        yield Site(relay.url, database)


each_moment = pytest.mark.parametrize(
    ("way", "fate"), [*[(way, Fate.HELD) for way in WAYS], ("task", Fate.ANSWER_HELD)]
)
each_committing_style = pytest.mark.parametrize("style", ["transactional", "by hand", "begin"])
ANNOUNCED = "committed, answer not delivered"


@dataclass
class Commit:
    """A request which is cancelled while the network holds up its COMMIT."""

    site: Site
    relay: Relay
    app: ASGIApp

    async def cancelled(self, way: str, fate: Fate) -> asyncio.Task[Exchange]:
        """The request, when it has been cancelled; nothing has come of that yet."""
        self.relay.fate_of = once(b"COMMIT", fate)
        request = asyncio.create_task(self.site.serve(self.app))
        await self.relay.holds_something.wait()
        for _ in range(2 if way == "twice" else 1):
            self.site.cancel()
            await turns(10)
            assert not request.done()
        return request


@each_committing_style
@each_moment
@pytest.mark.sweep
async def test_cancelled_during_commit_it_answers_or_says_that_it_did_not(
    remote: Site, relay: Relay, style: str, way: str, fate: Fate, caplog: pytest.LogCaptureFixture
) -> None:
    mode, endpoint = STYLES[style]
    app = remote.app(lambda session, send: endpoint(session, send, "ada"), way, mode)
    request = await Commit(remote, relay, app).cancelled(way, fate)
    relay.thaw()
    await remote.assert_cancelled(request, way)
    assert await authors(remote.url) == ["ada 1", "ada 2"]
    if style == "transactional":
        assert remote.delivered == ["http.response.start", "http.response.body"]
        assert ANNOUNCED not in caplog.text
    else:  # it is cancelled where it waits for its own COMMIT
        assert remote.delivered == []
        assert f"POST /: {ANNOUNCED}" in caplog.text
    await remote.assert_clean()


@pytest.mark.parametrize("way", ["middleware-timeout", "middleware-disconnect"])
@each_committing_style
async def test_cancelled_during_commit_by_a_middleware_it_says_that_it_did_not_answer(
    remote: Site, relay: Relay, style: str, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A `BaseHTTPMiddleware` takes no answer any more from what it has cancelled."""
    mode, endpoint = STYLES[style]
    app = remote.app(lambda session, send: endpoint(session, send, "ada"), way, mode)
    request = await Commit(remote, relay, app).cancelled(way, Fate.HELD)
    relay.thaw()
    await asyncio.wait((request,), timeout=20)
    expected = {"middleware-timeout": "TimeoutError", "middleware-disconnect": "ClientDisconnect"}
    assert outcome(request) == expected[way]
    assert remote.sent == []
    assert await authors(remote.url) == ["ada 1", "ada 2"]
    assert f"POST /: {ANNOUNCED}" in caplog.text
    await remote.assert_clean()


@each_way
async def test_cancelled_during_commit_a_stream_still_begins(
    remote: Site, relay: Relay, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    mode, endpoint = STYLES["stream"]
    app = remote.app(lambda session, send: endpoint(session, send, "ada"), way, mode)
    request = await Commit(remote, relay, app).cancelled(way, Fate.HELD)
    relay.thaw()
    await remote.assert_cancelled(request, way)
    assert remote.delivered[0] == "http.response.start"
    assert (await authors(remote.url))[:2] == ["ada 1", "ada 2"]
    assert ANNOUNCED not in caplog.text
    await remote.assert_clean()


@pytest.mark.parametrize("way", ["task", "scope"])
@pytest.mark.parametrize("client", ["has gone", "takes nothing"])
async def test_cancelled_during_commit_it_says_that_its_client_did_not_take_the_answer(
    remote: Site, relay: Relay, way: str, client: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def take_nothing(message: Message) -> None:
        if client == "has gone":
            raise OSError("the client has gone")
        await asyncio.Event().wait()

    async def endpoint(session: DBSession, send: Send) -> None:
        await session.execute(insert(Author).values(name="ada"))
        await answer(send)

    app = remote.app(endpoint, way)

    async def behind(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, take_nothing)

    request = await Commit(remote, relay, behind).cancelled(way, Fate.HELD)
    relay.thaw()
    await asyncio.wait((request,), timeout=20)
    assert outcome(request) != "still running"
    assert await authors(remote.url) == ["ada"]
    assert f"POST /: {ANNOUNCED}" in caplog.text
    await remote.assert_clean()


@each_moment
@pytest.mark.sweep
@pytest.mark.parametrize("by_hand", [False, True])
async def test_cancelled_during_the_commit_of_a_message_it_answers_or_says_that_it_did_not(
    remote: Site,
    relay: Relay,
    way: str,
    fate: Fate,
    by_hand: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session: DBSession = scope["state"]["db"]
        await receive()
        await send({"type": "websocket.accept"})
        await session.execute(insert(Author).values(name="ada"))
        if by_hand:
            await session.commit()
        await send({"type": "websocket.send", "text": "done"})
        await receive()

    wrapped = DBSessionMiddleware(app, remote.database, mode=plain if by_hand else transactional)
    relay.fate_of = once(b"COMMIT", fate)
    async with websocket(cancellable(way, wrapped, remote)) as socket:
        await relay.holds_something.wait()
        for _ in range(2 if way == "twice" else 1):
            remote.cancel()
            await turns(10)
        assert not socket.has_answer
        relay.thaw()
        answered = await socket.receive()
        if answered is not None:
            assert await socket.receive() is None
    expected = {"scope": type(None), "timeout": TimeoutError}
    assert type(socket.error) is expected.get(way, asyncio.CancelledError)
    assert await authors(remote.url) == ["ada"]
    if by_hand:  # it is cancelled where it waits for its own COMMIT, or at the next await
        announced = f"WEBSOCKET /: {ANNOUNCED}" in caplog.text
        assert announced == (answered is None)
    else:
        assert answered == {"type": "websocket.send", "text": "done"}
        assert ANNOUNCED not in caplog.text
    await remote.assert_clean()


# -- a request that is cancelled after its COMMIT ------------------------------------------------


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


# -- a request that is cancelled at each of the points where it waits ---------------------------


@pytest.fixture(name="watched_tasks")
async def _watched_tasks() -> AsyncIterator[None]:
    with watched_tasks():
        yield


async def ends_with_the_answer(session: DBSession, send: Send, name: str) -> None:
    await session.execute(insert(Author).values(name=f"{name} 1"))
    await session.execute(insert(Author).values(name=f"{name} 2"))
    await answer(send)


async def commits_by_hand(session: DBSession, send: Send, name: str) -> None:
    session.add(Author(name=f"{name} 1"))
    await session.flush()
    session.add(Author(name=f"{name} 2"))
    await session.commit()
    await answer(send)


async def opens_a_block(session: DBSession, send: Send, name: str) -> None:
    async with session.begin():
        await session.execute(insert(Author).values(name=f"{name} 1"))
        await session.execute(insert(Author).values(name=f"{name} 2"))
    await answer(send)


async def changes_its_mode(session: DBSession, send: Send, name: str) -> None:
    await session.scalars(select(Author.name).where(Author.id == 1))
    session.unit_of_work.ask(transactional)
    await ends_with_the_answer(session, send, name)


async def reads(session: DBSession, send: Send, name: str) -> None:
    for _ in range(2):
        assert (await session.scalars(select(Author.name).where(Author.id == 1))).all() == ["ada"]
    await answer(send)


async def streams(session: DBSession, send: Send, name: str) -> None:
    await session.execute(insert(Author).values(name=f"{name} 1"))
    await session.execute(insert(Author).values(name=f"{name} 2"))
    await send({"type": "http.response.start", "status": 201, "headers": []})
    for number in (3, 4):
        await session.execute(insert(Author).values(name=f"{name} {number}"))
        await send({"type": "http.response.body", "body": b"more", "more_body": True})
    await send({"type": "http.response.body"})


STYLES: dict[str, tuple[Mode, Callable[[DBSession, Send, str], Awaitable[None]]]] = {
    "transactional": (transactional, ends_with_the_answer),
    "by hand": (plain, commits_by_hand),
    "begin": (plain, opens_a_block),
    "another mode": (plain, changes_its_mode),
    "read_only": (read_only, reads),
    "stream": (transactional, streams),
}


@dataclass
class Sweep:
    """One style of request, cancelled in one way at each point in turn."""

    site: Site
    style: str
    way: str
    log: pytest.LogCaptureFixture
    witness: Outside
    found: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    numbers: Iterator[int] = field(default_factory=itertools.count)

    async def calm(self) -> None:
        """Serve a request which nobody cancels, on a connection that is there or a new one."""
        name = f"calm {next(self.numbers)}"
        exchange = await call(self._app(name, None))
        assert (exchange.status, exchange.complete, exchange.error) == (201, True, None)
        rows = {"read_only": 0, "stream": 4}.get(self.style, 2)
        self.found[name] = [f"{name} {number}" for number in range(1, rows + 1)]

    async def cut(self, name: str, *cancel_at: int) -> int:
        """Serve a request which is cancelled at these points; how many it has passed."""
        points = Points(self.site, *cancel_at)
        self.log.clear()
        request = asyncio.create_task(self.site.serve(self._app(name, points)))
        await asyncio.wait((request,), timeout=20)
        if points.passed < cancel_at[0]:
            assert outcome(request) == "ended"
        else:
            await self.site.assert_cancelled(request, self.way)
        passed = points.passed
        await self.site.assert_returned()
        await self._assert_whole(name)
        if self.site.database.url.get_backend_name() == "postgresql":  # MariaDB's are too slow
            await assert_idle(self.site.url)
        return passed

    def _app(self, name: str, points: Points | None) -> ASGIApp:
        mode, endpoint = STYLES[self.style]

        async def named(session: DBSession, send: Send) -> None:
            await endpoint(session, send, name)

        app = self.site.app(named, self.way, mode)
        return app if points is None else points.watch(app)

    async def _assert_whole(self, name: str) -> None:
        """What was acknowledged is there; else it is announced, or nothing is there."""
        there = [row for row in await self._rows() if row.startswith(f"{name} ")]
        # The first unit writes two rows, and each of a stream's further units writes one. What
        # answers them is the status line, and each piece of the body.
        committed = [] if there == [] else ["1, 2", *there[2:]]
        assert there[:2] in ([], [f"{name} 1", f"{name} 2"])
        assert len(committed) >= len(self.site.sent[:1]) or self.style == "read_only"
        announced = "committed, answer not delivered" in self.log.text
        assert announced == (len(committed) > len(self.site.delivered))
        self.found[name] = there

    async def assert_still_whole(self) -> None:
        """Nothing has come later: no connection went back with a transaction left open."""
        there = await self._rows()
        for name, rows in self.found.items():
            assert [row for row in there if row.startswith(f"{name} ")] == rows

    async def _rows(self) -> list[str]:
        rows = await self.witness.execute("SELECT name FROM author ORDER BY 1")
        return [name for (name,) in rows]


@pytest.fixture
async def sweep(
    site: Site, style: str, way: str, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Sweep]:
    async with site.database.transaction() as session:
        session.add(Author(name="ada"))
    async with outside(site.url) as witness:
        sweep = Sweep(site, style, way, caplog, witness)
        yield sweep
        await assert_idle(site.url)
        await sweep.assert_still_whole()
    await site.assert_clean()
    await site.database.dispose()
    await assert_disconnected(site.url)


each_style = pytest.mark.parametrize("style", STYLES)
watched = pytest.mark.usefixtures("watched_tasks", "unhandled")


@watched
@each_style
@pytest.mark.sweep
@pytest.mark.parametrize("way", ["task", "scope", "timeout"])
async def test_cancelled_at_each_point_where_it_waits(sweep: Sweep) -> None:
    for point in itertools.count(1):
        await sweep.calm()
        if await sweep.cut(f"{point}", point) < point:
            break


@watched
@pytest.mark.parametrize("style", ["transactional", "by hand", "begin", "read_only"])
@pytest.mark.parametrize("way", ["task"])
async def test_cancelled_again_at_each_point_of_its_clean_up(sweep: Sweep) -> None:
    passed = point = 1
    while passed >= point:
        again = point + 1
        passed = again
        while passed >= again:
            await sweep.calm()
            passed = await sweep.cut(f"{point} and {again}", point, again)
            again += 1
        point += 1


@watched
@pytest.mark.parametrize("style", ["transactional"])
@pytest.mark.sweep
@pytest.mark.parametrize("way", ["task", "scope", "timeout", "twice"])
async def test_cancelled_at_each_point_when_it_has_to_connect_first(sweep: Sweep) -> None:
    for point in itertools.count(1):
        await sweep.site.database.dispose()
        again = [point + 1] if sweep.way == "twice" else []
        if await sweep.cut(f"{point}", point, *again) < point:
            break


@watched
@pytest.mark.parametrize("style", ["transactional"])
@pytest.mark.sweep
@pytest.mark.parametrize("way", ["task", "scope", "timeout", "twice"])
async def test_cancelled_at_each_point_when_its_connection_has_gone(sweep: Sweep) -> None:
    """SQLAlchemy's pool forgets a connection whose replacement is cut off."""
    for point in itertools.count(1):
        await sweep.calm()
        await sweep.site.lose_connection()
        again = [point + 1] if sweep.way == "twice" else []
        if await sweep.cut(f"{point}", point, *again) < point:
            break


@pytest.mark.parametrize(("warm", "cancels"), [(True, 1), (True, 2), (False, 1)])
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
