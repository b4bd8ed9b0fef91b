"""Random walks over one session: whatever it is led through, it ends in order.

A walk is a sequence of what applications do with a session, errors, savepoints, streams, hooks and
cancellations included, in every mode on every database. It is the same each time. More of them:

    ASGI_DB_WALKS=1000 pytest tests/test_random_walks.py
"""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import delete, insert, literal, select, text
from sqlalchemy.exc import (
    DBAPIError,
    IllegalStateChangeError,
    InvalidRequestError,
    MissingGreenlet,
)
from sqlalchemy.ext.asyncio import AsyncSessionTransaction

from asgi_db import (
    ConcurrentUseError,
    Database,
    DatabaseDownError,
    DBSession,
    Mode,
    plain,
    read_only,
    transactional,
)
from tests.cancelling import create_tables, tables_on
from tests.servers import DatabaseServer, sql
from tests.tables import Author
from tests.walking import (
    Host,
    Outcome,
    Place,
    Work,
    assert_nothing_held,
    names,
    outcome_of,
    standing_of,
)

MODES: dict[str, Mode] = {
    "plain": plain,
    "transactional": transactional,
    "read_only": read_only,
    "snapshot": read_only(snapshot=True),
}

WALKS = int(os.environ.get("ASGI_DB_WALKS", "0"))
"""How many walks in each mode on each database; 0 for the few that are the same each time."""

FEW = {"sqlite": 10, "postgresql": 8, "mysql": 6}

SLOW = {
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000000)"
    " SELECT count(*) FROM n",
    "postgresql": "SELECT pg_sleep(60)",
    "mysql": "SELECT SLEEP(60)",
}
"""Statements which nobody waits for."""

A_MOMENT = {
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000)"
    " SELECT count(*) FROM n",
    "postgresql": "SELECT pg_sleep(0.01)",
    "mysql": "SELECT SLEEP(0.01)",
}

ONE = select(literal(1))


class HookError(Exception):
    """What a hook raises."""


EXPECTED = (DBAPIError, InvalidRequestError, HookError, asyncio.CancelledError, TimeoutError)
"""What a step may come to: what the database or the library says in so many words."""

NEVER = (MissingGreenlet, IllegalStateChangeError, DatabaseDownError)
"""What is never the answer here, though it belongs to one of those."""

FIRST = "the first"

numbers = itertools.count()


ENDS = ("commit", "roll_back", "release", "let_go", "end")
"""The steps which may leave a stream that was not read to its end."""


def only_if(condition: Callable[[Walk], bool]) -> Callable[[Rule], Rule]:
    """Let a step be none where it makes no sense, and open a session where there is none.

    Where that is depends on the moment at which a cancellation comes; hypothesis wants its own
    preconditions to depend on nothing else than the steps.
    """

    def decorate(rule: Rule) -> Rule:
        @functools.wraps(rule)
        def step_or_none(self: Walk, **options: Any) -> None:
            if not self.host.is_open:
                self.author = None
                self._run(self.host.open())  # pyright: ignore[reportPrivateUsage]
            if self.streams and rule.__name__ not in ENDS:
                self.roll_back()
            if condition(self):
                rule(self, **options)

        return step_or_none

    return decorate


Rule = Callable[..., None]


def step(function: Rule) -> Rule:
    """A step of the walk, which makes sense wherever there is a session."""
    return only_if(lambda _: True)(function)


class Walk(RuleBasedStateMachine):
    """What is led through a walk, and what is known of it."""

    url: str
    mode: Mode

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.is_broken = False
        self.savepoints: list[AsyncSessionTransaction] = []
        self.layers: list[set[str]] = [set()]  # written, and acknowledged as that
        self.added: set[str] = set()  # and not flushed
        self.committed = {FIRST}
        self.gone = set[str]()  # must not be there
        self.hooks: dict[str, tuple[list[str], str]] = {}
        self.author: Author | None = None
        self.streams = False
        self.has_failed = False

    # -- the frame -----------------------------------------------------------------------------

    @initialize(place=st.sampled_from(["block", "socket"]), own_tasks=st.booleans())
    def begin(self, place: Place, own_tasks: bool) -> None:
        self.own_tasks = own_tasks
        self.runner.run(self._open(place))

    async def _open(self, place: Place) -> None:
        options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}
        self.database = Database(self.url, engine_options=options)
        await self.database.start()
        self.host = Host(self.database, self.mode, place)
        await self.host.open()

    def teardown(self) -> None:
        if self.is_broken or not hasattr(self, "host"):
            return
        self.runner.run(self._close())
        self.runner.close()

    async def _close(self) -> None:
        if self.host.is_open:
            await self._end(success=False)
        await assert_nothing_held(self.database, self.url)
        await self.database.dispose()

    @property
    def session(self) -> DBSession:
        return self.host.session

    def take(self, work: Work) -> Outcome:
        """Take a step, in the session's own task or in one of its own."""
        outcome: Outcome = self._run(self._take(work))
        self._check(outcome)
        return outcome

    async def _take(self, work: Work) -> Outcome:
        if not self.own_tasks:
            return await self.host.do(work)
        return await asyncio.wait_for(outcome_of(work, self.session), 20)

    def _run(self, work: Awaitable[Any]) -> Any:
        async def awaited() -> Any:
            return await work

        self.is_broken = True
        found = self.runner.run(awaited())
        self.is_broken = False
        return found

    def _check(self, outcome: Outcome) -> None:
        error = outcome.error
        if error is not None and (not isinstance(error, EXPECTED) or isinstance(error, NEVER)):
            raise error

    # -- what is known -------------------------------------------------------------------------

    @property
    def pending(self) -> set[str]:
        return set[str]().union(*self.layers)

    def _note_end(self, *, committed: bool) -> None:
        """The transaction is over."""
        if committed:
            self.committed |= self.pending | self.added
        else:
            self.gone |= self.pending | self.added
        self._forget()

    def _forget(self) -> None:
        self.layers = [set()]
        self.added = set[str]()
        self.savepoints = []
        self.streams = False
        self.has_failed = False

    def _note_flush(self) -> None:
        self.layers[-1] |= self.added
        self.added = set[str]()

    async def _agree(self) -> None:
        """What other connections see, and which hooks were called, are what was acknowledged."""
        seen = await names(self.url)
        assert self.committed <= seen, f"lost: {self.committed - seen}"
        assert not self.gone & seen, f"not undone: {self.gone & seen}"
        for name, (calls, kind) in self.hooks.items():
            assert len(calls) <= 1, f"{name}: hooks were called {calls}"
            assert not calls or (calls == ["commit"]) == (name in seen), f"{name}: {calls}"
            if kind == "settled":
                assert calls or name not in seen, f"{name}: no hook was called"

    # -- after each step -----------------------------------------------------------------------

    @invariant()
    def state_and_pool_agree(self) -> None:
        if not hasattr(self, "host") or self.is_broken:
            return
        self._run(self._assert_agreement())

    async def _assert_agreement(self) -> None:
        state, stage = standing_of(self.session) if self.host.is_open else ("IDLE", "NONE")
        assert state in ("IDLE", "ACTIVE"), state
        assert (state, stage) != ("IDLE", "OPEN"), "idle, and its transaction is open"
        assert stage not in ("COMMITTING", "SENT"), "a COMMIT that nothing waits for"
        if state == "ACTIVE" and self.mode is not read_only:
            assert self.session.in_transaction(), "active, and nothing is open"
        if state == "IDLE":  # and what was just interrupted is on its way back
            async with asyncio.timeout(5):
                while self._out():  # noqa: ASYNC110 - the pool gives no event for it
                    await asyncio.sleep(0.001)

    def _out(self) -> int:
        return self.database.stats().pool.checked_out

    # -- reading -------------------------------------------------------------------------------

    @rule()
    @step
    def read(self) -> None:
        self._note_failure(self.take(lambda session: session.scalar(ONE)))

    @rule()
    @step
    def get(self) -> None:
        outcome = self.take(lambda session: session.get(Author, 1))
        if outcome.is_ok:
            self.author = outcome.value
        self._note_failure(outcome)

    @rule()
    @only_if(lambda self: self.author is not None)
    def refresh(self) -> None:
        self._note_failure(self.take(lambda session: session.refresh(self.author)))

    @rule()
    @step
    def take_the_connection(self) -> None:
        self._note_failure(self.take(lambda session: session.connection()))

    @rule(leaves=st.booleans())
    @step
    def stream(self, leaves: bool) -> None:
        async def work(session: DBSession) -> None:
            result = await session.stream(select(Author.name))
            await anext(aiter(result))
            if not leaves:
                await result.close()

        outcome = self.take(work)
        self.streams = leaves and outcome.is_ok
        self._note_failure(outcome)

    @rule()
    @step
    def fail(self) -> None:
        outcome = self.take(lambda session: session.execute(text("SELECT * FROM no_such_table")))
        assert not outcome.is_ok
        self._note_failure(outcome)

    # -- writing -------------------------------------------------------------------------------

    def _name(self) -> str:
        return f"{os.getpid()}-{next(numbers)}"

    def _note_write(self, name: str, outcome: Outcome) -> None:
        if outcome.is_ok:
            self.layers[-1].add(name)
        self._note_failure(outcome)

    def _note_failure(self, outcome: Outcome) -> None:
        """After an error nothing is certain but what was acknowledged."""
        if not outcome.is_ok:
            self.has_failed = True

    @rule()
    @step
    def write(self) -> None:
        name = self._name()
        self._note_write(name, self.take(lambda s: s.execute(insert(Author).values(name=name))))

    @rule()
    @step
    def add_and_flush(self) -> None:
        name = self._name()

        async def work(session: DBSession) -> None:
            session.add(Author(name=name))
            await session.flush()

        outcome = self.take(work)
        if outcome.is_ok:
            self._note_flush()
        self._note_write(name, outcome)

    @rule()
    @step
    def add(self) -> None:
        name = self._name()

        async def work(session: DBSession) -> None:
            session.add(Author(name=name))

        self.take(work)
        self.added.add(name)

    @rule()
    @step
    def violate_a_constraint(self) -> None:
        outcome = self.take(lambda s: s.execute(insert(Author).values(name=FIRST)))
        assert not outcome.is_ok
        self._note_failure(outcome)

    @rule()
    @step
    def write_nothing(self) -> None:
        work: Work = lambda s: s.execute(delete(Author).where(Author.name == "nobody"))  # noqa: E731
        self._note_failure(self.take(work))

    @rule(raises=st.booleans(), robust=st.booleans())
    @step
    def write_with_hooks(self, raises: bool, robust: bool) -> None:
        """One of the two is called, as it comes out; none if the savepoint is undone."""
        name = self._name()
        calls = list[str]()

        def hook(outcome: str) -> Callable[[], None]:
            def called() -> None:
                calls.append(outcome)
                if raises:
                    raise HookError

            return called

        async def work(session: DBSession) -> None:
            session.on_commit(hook("commit"), robust=robust)
            session.on_rollback(hook("rollback"))
            await session.execute(insert(Author).values(name=name))

        outcome = self.take(work)
        if outcome.is_ok:
            self.hooks[name] = calls, "pending"
        self._note_write(name, outcome)

    # -- savepoints ----------------------------------------------------------------------------

    @rule()
    @step
    def begin_a_savepoint(self) -> None:
        outcome = self.take(lambda session: _begun(session.begin_nested()))
        if outcome.is_ok:
            self._note_flush()  # it flushes first
            self.savepoints.append(outcome.value)
            self.layers.append(set())
        self._note_failure(outcome)

    @rule()
    @only_if(lambda self: bool(self.savepoints))
    def release_a_savepoint(self) -> None:
        savepoint = self.savepoints.pop()
        outcome = self.take(lambda _: savepoint.commit())
        layer = self.layers.pop()
        if outcome.is_ok:
            layer |= self.added  # it flushes first
            self.added = set[str]()
            self.layers[-1] |= layer
        self._note_failure(outcome)

    @rule()
    @only_if(lambda self: bool(self.savepoints))
    def roll_a_savepoint_back(self) -> None:
        savepoint = self.savepoints.pop()
        outcome = self.take(lambda _: savepoint.rollback())
        layer = self.layers.pop()
        if outcome.is_ok:
            self.gone |= layer | self.added
            self.added = set[str]()
        self._note_failure(outcome)

    # -- ends ----------------------------------------------------------------------------------

    @rule()
    @step
    def commit(self) -> None:
        self._note_commit(self.take(lambda session: session.commit()))

    def _note_commit(self, outcome: Outcome) -> None:
        done = outcome.is_ok or isinstance(outcome.error, HookError)
        if done and self.mode is not read_only:
            self._note_end(committed=True)
            self._run(self._agree())
        else:
            self._note_end(committed=False)
            self._run(self._agree())

    @rule()
    @step
    def roll_back(self) -> None:
        self.take(lambda session: session.rollback())
        self._note_end(committed=False)
        self._run(self._agree())

    @rule()
    @step
    def release(self) -> None:
        if self.take(lambda session: session.release()).is_ok:
            assert not self.pending or self.mode is read_only
            kept = self.added
            self._forget()
            self.added = kept
            self._run(assert_nothing_held(self.database, self.url))

    @rule(how=st.sampled_from(["close", "reset", "invalidate"]))
    @step
    def let_go(self, how: str) -> None:
        self.take(lambda session: getattr(session, how)())
        self._note_end(committed=False)
        self._run(assert_nothing_held(self.database, self.url))

    @rule(success=st.booleans())
    @step
    def end(self, success: bool) -> None:
        self._run(self._end(success=success))

    async def _end(self, *, success: bool) -> None:
        commits = success and self.mode.commits
        try:
            await self.host.end(success=success)
        except Exception as error:
            self._check(Outcome(error))
            assert success, repr(error)
            commits = commits and isinstance(error, HookError)
        self._note_end(committed=commits)
        for name, (calls, _) in self.hooks.items():
            self.hooks[name] = calls, "settled"
        await assert_nothing_held(self.database, self.url)
        await self._agree()

    # -- interruptions -------------------------------------------------------------------------

    @rule(turns=st.integers(0, 12), writes=st.booleans(), twice=st.booleans())
    @step
    def be_cancelled(self, turns: int, writes: bool, twice: bool) -> None:
        name = self._name()

        async def operation(session: DBSession) -> None:
            if writes:
                await session.execute(insert(Author).values(name=name))
            else:
                await session.scalar(ONE)

        async def work(session: DBSession) -> Outcome:
            task = asyncio.create_task(outcome_of(operation, session))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            if twice:
                await asyncio.sleep(0)
                task.cancel()
            await asyncio.wait((task,))
            return Outcome(asyncio.CancelledError()) if task.cancelled() else task.result()

        outcome: Outcome = self.take(work).value
        self._check(outcome)
        if writes and outcome.is_ok:
            self.layers[-1].add(name)
        self._note_failure(outcome)

    @rule(what=st.sampled_from(["read", "commit", "rollback", "release"]))
    @step
    def be_in_a_cancelled_scope(self, what: str) -> None:
        """Which cancels again at each await."""

        async def work(session: DBSession) -> Outcome:
            outcome = Outcome()
            with anyio.CancelScope() as scope:
                scope.cancel()
                operation: Any = ONE_OPERATION[what]
                outcome = await outcome_of(operation, session)
                if outcome.was_cancelled:
                    assert outcome.error is not None
                    raise outcome.error
            return outcome

        self.take(work)
        if what == "read":
            self.has_failed = True
        else:
            self._run(self._learn())

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.02]))
    @step
    def run_out_of_time(self, seconds: float) -> None:
        slow = text(SLOW[self.database.url.get_backend_name()])

        async def work(session: DBSession) -> None:
            async with asyncio.timeout(seconds):
                await session.execute(slow)

        outcome = self.take(work)
        assert not outcome.is_ok
        self._note_failure(outcome)

    @rule(turns=st.integers(0, 12))
    @step
    def be_cancelled_in_a_commit(self, turns: int) -> None:
        """It goes on to its end, which the session then knows."""

        async def work(session: DBSession) -> None:
            task = asyncio.create_task(session.commit())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait((task,))

        self.take(work)
        self._run(self._learn())

    async def _learn(self) -> None:
        """Whether it was committed or not, it was so as a whole, and is not half done."""
        await self._take(lambda session: session.rollback())
        mine = self.pending | self.added
        seen = await names(self.url) & mine
        assert not seen or self.pending <= seen, f"half committed: {seen} of {self.pending}"
        self.committed |= seen
        self.gone |= mine - seen
        self._forget()
        await self._agree()

    @rule()
    @step
    def be_used_by_two_tasks(self) -> None:
        """The second has an error, which is nobody else's."""
        moment = text(A_MOMENT[self.database.url.get_backend_name()])

        async def work(session: DBSession) -> tuple[Outcome, Outcome]:
            first = asyncio.create_task(outcome_of(lambda s: s.scalar(moment), session))
            await asyncio.sleep(0)
            second = await outcome_of(lambda s: s.scalar(ONE), session)
            return await first, second

        outcome = self.take(work)
        first, second = outcome.value
        self._check(first)
        if not isinstance(second.error, ConcurrentUseError):
            self._check(second)
        if not self.has_failed:
            assert first.is_ok, repr(first.error)
        if first.is_ok and not self.has_failed:
            assert isinstance(second.error, ConcurrentUseError), repr(second)
        self._note_failure(first)


ONE_OPERATION: dict[str, Work] = {
    "read": lambda session: session.scalar(ONE),
    "commit": lambda session: session.commit(),
    "rollback": lambda session: session.rollback(),
    "release": lambda session: session.release(),
}


async def _begun(savepoint: AsyncSessionTransaction) -> AsyncSessionTransaction:
    return await savepoint


@pytest.fixture(scope="module")
def postgresql_tables(postgresql_server: DatabaseServer) -> Iterator[str]:
    with tables_on(postgresql_server) as url:
        sql(url, f"INSERT INTO author (name) VALUES ('{FIRST}')")
        yield url


@pytest.fixture(scope="module")
def mysql_tables(mysql_server: DatabaseServer) -> Iterator[str]:
    with tables_on(mysql_server) as url:
        sql(url, f"INSERT INTO author (name) VALUES ('{FIRST}')")
        yield url


@pytest.fixture
def sqlite_tables(sqlite_url: str) -> str:
    create_tables(sqlite_url)
    sql(sqlite_url, f"INSERT INTO author (name) VALUES ('{FIRST}')")
    return sqlite_url


# What a walk adds to a session whose flush has failed, SQLAlchemy says, will not be kept.
@pytest.mark.filterwarnings("ignore:Session's state has been changed on a non-active transaction")
@pytest.mark.parametrize("database", ["sqlite", "postgresql", "mysql"])
@pytest.mark.parametrize("name", MODES)
def test_a_session_ends_in_order_whatever_it_is_led_through(
    request: pytest.FixtureRequest, name: str, database: str
) -> None:
    class WalkHere(Walk):
        url: str = request.getfixturevalue(f"{database}_tables")
        mode = MODES[name]

    run_state_machine_as_test(
        WalkHere,
        settings=settings(
            max_examples=WALKS or FEW[database],
            stateful_step_count=50 if WALKS else 20,
            derandomize=not WALKS,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
    gc.collect()  # what was left open complains now


# -- what the walks have found -----------------------------------------------------------------


async def _add(session: DBSession) -> None:
    session.add(Author(name="never"))


BEGINNINGS: dict[str, Work] = {
    "add": _add,
    "begin": lambda session: _begun(session.begin()),
    "begin_nested": lambda session: _begun(session.begin_nested()),
}
"""What lets a session be in a transaction before it takes a connection."""


@pytest.mark.parametrize("beginning", BEGINNINGS)
@pytest.mark.parametrize("name", ["plain", "transactional", "snapshot"])
async def test_a_unit_whose_session_is_in_a_transaction_is_not_idle(
    sqlite_tables: str, name: str, beginning: str
) -> None:
    async with Database(sqlite_tables) as database:
        async with database.session(MODES[name]) as session:
            await BEGINNINGS[beginning](session)
            (state, _), is_in_transaction = standing_of(session), session.in_transaction()
            await session.rollback()
    assert (state != "IDLE") == is_in_transaction


@pytest.mark.parametrize("rolls_back_again", [False, True])
async def test_a_rollback_that_is_cancelled_settles_the_hooks_all_the_same(
    sqlite_tables: str, rolls_back_again: bool
) -> None:
    calls = list[str]()
    async with Database(sqlite_tables) as database:
        async with database.session() as session:
            session.on_commit(lambda: calls.append("commit"))
            session.on_rollback(lambda: calls.append("rollback"))
            await session.execute(insert(Author).values(name="undone"))
            with anyio.CancelScope() as scope:
                scope.cancel()
                await session.rollback()
            if rolls_back_again:
                await session.rollback()
            await session.commit()
        await assert_nothing_held(database, sqlite_tables)
    assert await names(sqlite_tables) == {FIRST}
    assert calls == ["rollback"]
