"""Requests of one route that have lost a conflict work one after the other."""

from __future__ import annotations

import asyncio
import statistics
from collections import Counter
from collections.abc import AsyncIterator, Callable

import pytest
from sqlalchemy import text

from asgi_db import Database, DBSession, DBSessionMiddleware, session_of, transactional
from asgi_db.types import ASGIApp, Message, Receive, Scope, Send
from tests.contract.client import Exchange, call
from tests.limits import set_limits

LOSE = {
    "postgresql": "DO $$BEGIN RAISE EXCEPTION 'lost' USING ERRCODE = '40001'; END$$",
    "mysql": "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'lost'",
}
"""A statement that fails as one does whose transaction has lost a conflict."""


@pytest.fixture
async def database(server_url: str) -> AsyncIterator[Database]:
    async with Database(server_url, pool="high") as database:
        yield database


@pytest.fixture
def long_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """No turn ends by itself while a test lasts."""
    set_limits(monkeypatch, longest_turn=60)


async def lose(session: DBSession) -> None:
    await session.execute(text(LOSE[session.get_bind().dialect.name]))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


class Losers:
    """An application whose requests lose in their first attempts.

    Attributes:
        steps: the requests and their attempts, as they have had their first statement.
        held: requests that stay in their second attempt, by their names, until the event is set.
        peak: how many requests worked in a further attempt at the same time.
    """

    def __init__(
        self, clients: int, *, losses: dict[str, int] | None = None, held: str = ""
    ) -> None:
        self.steps: list[tuple[str, int]] = []
        self.held = {name: asyncio.Event() for name in held}
        self.peak = 0
        self._all_there = asyncio.Barrier(clients)
        self._losses = losses or {}
        self._working = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        session, name = session_of(scope), scope["name"]
        await session.execute(text("SELECT 1"))
        self.steps.append((name, session.attempt))
        losses = self._losses.get(name, 1)
        if session.attempt == 1 and losses:
            await self._all_there.wait()
        if session.attempt <= losses:
            await lose(session)
        self._working += losses > 0
        self.peak = max(self.peak, self._working)
        await session.execute(text("SELECT 2"))
        if event := self.held.get(name):
            await event.wait()
        self._working -= losses > 0
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body"})

    def let_go(self) -> None:
        """Let every request go on."""
        for event in self.held.values():
            event.set()

    async def until(self, *steps: tuple[str, int]) -> None:
        """Wait until these steps have been made."""
        await until(lambda: set(steps) <= set(self.steps))


def served(app: ASGIApp, database: Database, *, timeout: float | None = None) -> ASGIApp:
    return DBSessionMiddleware(app, database, mode=transactional(retries=5, timeout=timeout))


async def ask(app: ASGIApp, name: str, endpoint: object = None) -> Exchange:
    """Send a request of this name to an endpoint, as a framework would enter it in the scope."""

    async def named(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "name": name, "endpoint": endpoint}, receive, send)

    return await call(named)


async def test_they_work_one_after_the_other(database: Database) -> None:
    losers = Losers(10)
    app = served(losers, database)
    exchanges = await asyncio.gather(*(ask(app, str(number)) for number in range(10)))
    assert Counter(exchange.status for exchange in exchanges) == {201: 10}
    assert losers.peak == 1
    assert Counter(attempt for _, attempt in losers.steps) == {1: 10, 2: 10}


async def test_one_that_loses_again_keeps_its_turn(database: Database) -> None:
    losers = Losers(2, losses={"a": 3, "b": 3})
    app = served(losers, database)
    await asyncio.gather(ask(app, "a"), ask(app, "b"))
    further = [step for step in losers.steps if step[1] > 1]
    first, second = further[0][0], further[-1][0]
    assert further == [(name, attempt) for name in (first, second) for attempt in (2, 3, 4)]
    assert {first, second} == {"a", "b"}


async def test_a_request_that_has_not_lost_does_not_wait(database: Database) -> None:
    losers = Losers(1, losses={"new": 0}, held="a")
    app = served(losers, database)
    async with asyncio.TaskGroup() as group:
        slow = group.create_task(ask(app, "a"))
        await losers.until(("a", 2))
        assert (await ask(app, "new")).status == 201
        assert not slow.done()
        losers.held["a"].set()
    assert slow.result().status == 201


@pytest.mark.usefixtures("long_turns")
async def test_the_requests_of_another_route_have_a_gate_of_their_own(database: Database) -> None:
    losers = Losers(2, held="ab")
    app = served(losers, database)
    async with asyncio.TaskGroup() as group:
        group.create_task(ask(app, "a", endpoint=lose))
        group.create_task(ask(app, "b", endpoint=ask))
        await losers.until(("a", 2), ("b", 2))
        losers.let_go()


async def test_one_that_takes_too_long_lets_the_next_work_beside_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limits(monkeypatch, longest_turn=0.05)
    losers = Losers(2, held="ab")
    app = served(losers, database)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(app, name)) for name in losers.held]
        await losers.until(("a", 2), ("b", 2))
        losers.let_go()
    assert [task.result().status for task in tasks] == [201, 201]


async def first_in_turn(losers: Losers) -> str:
    """Wait until a request has its turn, and say which."""
    await until(lambda: any(attempt == 2 for _, attempt in losers.steps))
    return next(name for name, attempt in losers.steps if attempt == 2)


@pytest.mark.usefixtures("long_turns")
async def test_the_wait_ends_with_the_timeout_of_the_request(database: Database) -> None:
    losers = Losers(2, held="ab")
    app = served(losers, database, timeout=2)
    async with asyncio.TaskGroup() as group:
        tasks = {name: group.create_task(ask(app, name)) for name in losers.held}
        holder = await first_in_turn(losers)
        (waiting,) = losers.held.keys() - {holder}
        exchange = await tasks[waiting]
        assert not tasks[holder].done()
        losers.held[holder].set()
    assert (exchange.status, exchange.error) == (503, None)


@pytest.mark.usefixtures("long_turns")
async def test_one_that_is_cancelled_while_it_waits_leaves_the_turn_to_the_next(
    database: Database,
) -> None:
    losers = Losers(3, held="abc")
    app = served(losers, database)
    tasks = {name: asyncio.create_task(ask(app, name)) for name in losers.held}
    holder = await first_in_turn(losers)
    cancelled, last = sorted(losers.held.keys() - {holder})
    await asyncio.sleep(0.05)  # Both wait, or are about to.
    tasks[cancelled].cancel()
    await asyncio.wait((tasks[cancelled],))
    for name in (holder, last):
        losers.held[name].set()
    assert [(await tasks[name]).status for name in (holder, last)] == [201, 201]


@pytest.mark.usefixtures("long_turns")
async def test_one_that_is_cancelled_in_its_turn_leaves_it_to_the_next(database: Database) -> None:
    losers = Losers(2, held="ab")
    app = served(losers, database)
    tasks = {name: asyncio.create_task(ask(app, name)) for name in losers.held}
    holder = await first_in_turn(losers)
    (last,) = losers.held.keys() - {holder}
    tasks[holder].cancel()
    losers.held[last].set()
    assert (await tasks[last]).status == 201


@pytest.mark.usefixtures("long_turns")
@pytest.mark.parametrize("by_hand", [False, True])
async def test_the_turn_ends_with_the_commit_and_not_with_the_body(
    database: Database, by_hand: bool
) -> None:
    losers = Losers(2)
    body_may_end = asyncio.Event()

    async def slow_body(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_slowly(message: Message) -> None:
            if message["type"] == "http.response.body":
                await body_may_end.wait()
            elif by_hand:
                await session_of(scope).commit()
            await send(message)

        await losers(scope, receive, send_slowly)

    app = served(slow_body, database)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(app, name)) for name in "ab"]
        await losers.until(("a", 2), ("b", 2))
        assert not any(task.done() for task in tasks)
        body_may_end.set()
    assert [task.result().status for task in tasks] == [201, 201]


@pytest.mark.usefixtures("long_turns")
async def test_a_request_that_has_lost_holds_no_connection_while_it_waits(
    database: Database,
) -> None:
    losers = Losers(3, held="abc")
    app = served(losers, database)
    async with asyncio.TaskGroup() as group:
        for name in losers.held:
            group.create_task(ask(app, name))
        await first_in_turn(losers)
        await until(lambda: database.checked_out() == 1)
        losers.let_go()
    assert database.checked_out() == 0


# -- one that has lost again in its turn -------------------------------------------------------


def losing_twice(database: Database, **options: float) -> tuple[Losers, ASGIApp]:
    """An application in which "a" loses twice, and stays in its third attempt; others win."""
    losers = Losers(1, losses={"a": 2, "new": 0, "other": 0}, held="a")
    return losers, served(losers, database, **options)


@pytest.mark.usefixtures("long_turns")
async def test_it_goes_alone(database: Database) -> None:
    """Who comes then waits without a connection, and other routes are not concerned."""
    losers, app = losing_twice(database)
    async with asyncio.TaskGroup() as group:
        alone = group.create_task(ask(app, "a"))
        await losers.until(("a", 3))
        new = group.create_task(ask(app, "new"))
        for _ in range(3):
            assert (await ask(app, "other", endpoint=lose)).status == 201
        assert ("new", 1) not in losers.steps
        assert database.checked_out() == 1
        losers.let_go()
    assert [task.result().status for task in (alone, new)] == [201, 201]
    assert (await ask(app, "new")).status == 201


async def test_it_goes_alone_for_no_longer_than_a_turn(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limits(monkeypatch, longest_turn=0.05)
    losers, app = losing_twice(database)
    async with asyncio.TaskGroup() as group:
        alone = group.create_task(ask(app, "a"))
        await losers.until(("a", 3))
        assert (await ask(app, "new")).status == 201
        assert not alone.done()
        losers.let_go()
    assert alone.result().status == 201


@pytest.mark.usefixtures("long_turns")
async def test_if_it_is_cancelled_nobody_waits_any_more(database: Database) -> None:
    losers, app = losing_twice(database)
    alone = asyncio.create_task(ask(app, "a"))
    await losers.until(("a", 3))
    tasks = [asyncio.create_task(ask(app, "new")) for _ in range(3)]
    await asyncio.sleep(0.05)  # They wait, or are about to.
    tasks[0].cancel()
    await asyncio.wait((tasks[0],))
    assert ("new", 1) not in losers.steps
    alone.cancel()
    assert [(await task).status for task in tasks[1:]] == [201, 201]
    assert database.checked_out() == 0


CLIENTS, EACH = 50, 6


async def test_no_request_waits_much_longer_than_the_others(database: Database) -> None:
    """A wait is counted by the requests that were answered meanwhile."""
    answered, waits, attempts = 0, list[int](), Counter[int]()

    async def increment(scope: Scope, receive: Receive, send: Send) -> None:
        session = session_of(scope)
        attempts[session.attempt] += 1
        n = await session.scalar(text("SELECT n FROM counter WHERE id = 1"))
        await session.execute(text("UPDATE counter SET n = :n WHERE id = 1"), {"n": n + 1})
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body"})

    async def be_client() -> None:
        nonlocal answered
        for _ in range(EACH):
            before = answered
            assert (await call(app)).status == 201
            waits.append(answered - before)
            answered += 1

    mode = transactional(isolation="SERIALIZABLE", retries=5)
    app = DBSessionMiddleware(increment, database, mode=mode)
    async with database.transaction() as session:
        await session.execute(text("CREATE TABLE counter (id integer PRIMARY KEY, n integer)"))
        await session.execute(text("INSERT INTO counter VALUES (1, 0)"))
    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(be_client())
    async with database.session() as session:
        assert await session.scalar(text("SELECT n FROM counter")) == CLIENTS * EACH
    assert attempts.total() <= 2.5 * CLIENTS * EACH
    assert max(waits) <= 10 * statistics.median(waits)
