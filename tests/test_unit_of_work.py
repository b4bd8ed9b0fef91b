"""The unit of work: its states, how it ends, and what it notices on the way."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import greenlet  # type: ignore[import-untyped]
import pytest
from sqlalchemy import Connection, event, insert, select, text, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    NoResultFound,
    OperationalError,
    PendingRollbackError,
)
from sqlalchemy.pool import QueuePool

from asgi_db import (
    ConcurrentUseError,
    Database,
    DBSession,
    DBSessionMiddleware,
    FailedTransactionError,
    Mode,
    SessionExpiredError,
    UncommittedWorkError,
    plain,
    read_only,
    transactional,
)
from asgi_db.types import Receive, Scope, Send
from tests.contract.client import call
from tests.internals import TRANSITIONS, State, UnitOfWork
from tests.limits import set_limits
from tests.pools import checked_out
from tests.relay import Fate, Relay, once
from tests.servers import assert_idle, outside, running_statement, server_connections
from tests.tables import Author, Base, Child, Deferred, authors
from tests.units import NewUnit, new_unit

POOL = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 5}
ROUTE = "POST /orders (create_order)"


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with opened_database(database_url) as database:
        yield database


@pytest.fixture(params=["postgresql", "sqlite"])
def url_with_deferred_constraints(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
async def on_sqlite(sqlite_url: str) -> AsyncIterator[Database]:
    async with opened_database(sqlite_url) as database:
        yield database


@asynccontextmanager
async def opened_database(url: str, **options: Any) -> AsyncGenerator[Database, None]:
    """A database with its tables; a unit that a failed test has left open is ended."""
    async with Database(url, engine_options={**POOL, **options}) as database:
        await database.create_tables(Base.metadata)
        try:
            yield database
        finally:
            while made:
                if (unit := made.pop()).in_use:
                    await unit.end(success=False)


made: list[NewUnit] = []


def unit_of(database: Database, mode: Mode = transactional) -> NewUnit:
    unit = new_unit(database, mode, ROUTE)
    made.append(unit)
    return unit


def opened(database: Database) -> int:
    pool = database.engine.pool
    assert isinstance(pool, QueuePool)
    return pool.checkedout() + pool.checkedin()


async def assert_nothing_held(database: Database, url: str) -> None:
    assert checked_out(database) == 0
    await assert_idle(url)


def add(name: str) -> Any:
    return insert(Author).values(name=name)


# -- the states --------------------------------------------------------------------------------


def put(unit: UnitOfWork, state: State) -> None:
    unit.state = state


def move(unit: UnitOfWork, state: State) -> None:
    unit.move(state)


def state_of(unit: UnitOfWork) -> str:
    return repr(unit).split()[1]


def test_the_table_names_every_state() -> None:
    assert set(TRANSITIONS) == set(State)


@pytest.mark.parametrize(("before", "after"), [*itertools.product(State, State)])
async def test_a_unit_moves_as_the_table_says_and_no_other_way(
    on_sqlite: Database, before: State, after: State
) -> None:
    unit = unit_of(on_sqlite)
    put(unit, before)
    if after in TRANSITIONS[before]:
        move(unit, after)
        assert state_of(unit) == after.name
    else:
        with pytest.raises(RuntimeError, match=f"from {before.name} to {after.name}"):
            move(unit, after)
        assert state_of(unit) == before.name
    put(unit, State.IDLE)


async def test_a_unit_in_use_refuses_to_close_and_goes_on(on_sqlite: Database) -> None:
    unit = unit_of(on_sqlite)
    await unit.session.execute(add("ada"))
    with pytest.raises(RuntimeError, match="from ACTIVE to CLOSED"):
        unit.close()
    await unit.session.execute(add("grace"))
    await unit.end(success=True)
    assert await authors(str(on_sqlite.url)) == ["ada", "grace"]
    unit.close()


async def test_the_repr_shows_state_mode_and_route(database: Database) -> None:
    unit = unit_of(database)
    seen = [repr(unit)]

    def note(_: Connection) -> None:
        seen.append(repr(unit))

    event.listen(database.engine.sync_engine, "commit", note)
    await unit.session.execute(add("ada"))
    seen.append(repr(unit))
    await unit.end(success=True)
    seen.append(repr(unit))
    unit.close()
    seen.append(repr(unit))
    assert seen == [
        f"<UnitOfWork {state} transactional {stage} {ROUTE}>"
        for state, stage in (
            ("IDLE", "NONE"),
            ("ACTIVE", "OPEN"),
            ("ENDING", "COMMITTING"),
            ("IDLE", "COMMITTED"),
            ("CLOSED", "COMMITTED"),
        )
    ]


# -- nothing is paid for what is not used ------------------------------------------------------


@asynccontextmanager
async def nothing_is_started() -> AsyncGenerator[None, None]:
    """Fails if the block makes a task or switches to a greenlet."""
    started: list[Any] = []
    loop = asyncio.get_running_loop()

    def make_task(loop: Any, coroutine: Any, **options: Any) -> Any:
        started.append(coroutine)
        return asyncio.Task(coroutine, loop=loop, **options)

    before = loop.get_task_factory()
    loop.set_task_factory(make_task)
    greenlet.settrace(lambda event, _: started.append(event))
    try:
        yield
    finally:
        greenlet.settrace(None)
        loop.set_task_factory(before)
    assert started == []


@pytest.mark.parametrize("mode", [plain, transactional, read_only], ids=lambda mode: mode.name)
@pytest.mark.parametrize("success", [True, False])
async def test_the_end_of_an_unused_unit_costs_no_task_greenlet_or_connection(
    postgresql_url: str, mode: Mode, success: bool
) -> None:
    async with Database(postgresql_url) as database:
        unit = unit_of(database, mode)
        async with nothing_is_started():
            await unit.end(success=success)
            unit.close()
        assert opened(database) == 0
        assert await server_connections(postgresql_url) == []


async def test_a_request_without_a_statement_costs_no_task_greenlet_or_connection(
    postgresql_url: str,
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert not scope["state"]["db"].in_transaction()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def run(app: Any) -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await app({"type": "http", "method": "GET", "path": "/"}, send, send)
        return sent

    async with Database(postgresql_url) as database:
        with_sessions = DBSessionMiddleware(app, database, mode=transactional)
        async with nothing_is_started():
            sent = await run(with_sessions)
        assert [message["type"] for message in sent] == [
            "http.response.start",
            "http.response.body",
        ]
        assert opened(database) == 0
        assert await server_connections(postgresql_url) == []


async def test_an_application_that_takes_no_notice_of_a_failed_commit_sends_nothing(
    sqlite_url: str,
) -> None:
    """The error comes out of each `send`, and at the end out of the application."""
    async with Database(sqlite_url) as database:
        await database.create_tables(Deferred.metadata)
        seen: list[type[Exception]] = []
        sent: list[Any] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            scope["state"]["db"].add(Child(parent_id=1))
            for kind in ("start", "body"):
                try:
                    await send({"type": f"http.response.{kind}", "status": 200, "headers": []})
                except IntegrityError as error:
                    seen.append(type(error))

        async def send(message: Any = None) -> None:
            sent.append(message)

        middleware = DBSessionMiddleware(app, database, mode=transactional)
        with pytest.raises(IntegrityError):
            await middleware({"type": "http", "method": "GET", "path": "/"}, send, send)
        assert (seen, sent) == ([IntegrityError] * 2, [])


async def test_a_connection_of_another_kind_is_none_of_the_middlewares_business(
    on_sqlite: Database,
) -> None:
    scopes: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(dict(scope))

    async def channel(message: Any = None) -> None: ...

    await DBSessionMiddleware(app, on_sqlite)({"type": "webtransport"}, channel, channel)
    assert scopes == [{"type": "webtransport"}]


async def test_in_use_says_whether_there_is_anything_to_end(on_sqlite: Database) -> None:
    unit = unit_of(on_sqlite)
    assert not unit.in_use
    unit.session.add(Author(name="ada"))
    assert unit.in_use
    await unit.end(success=True)
    assert not unit.in_use
    await unit.session.execute(select(Author))
    assert unit.in_use
    await unit.end(success=True)
    assert not unit.in_use
    unit.close()


# -- how it ends -------------------------------------------------------------------------------


async def test_a_unit_of_added_objects_alone_is_committed(
    database: Database, database_url: str
) -> None:
    unit = unit_of(database)
    unit.session.add(Author(name="ada"))
    await unit.end(success=True)
    assert await authors(database_url) == ["ada"]
    await assert_nothing_held(database, database_url)
    unit.close()


@pytest.mark.parametrize(
    ("mode", "success"), [(transactional, False), (plain, False), (plain, True)]
)
async def test_whatever_is_not_committed_is_rolled_back(
    database: Database, database_url: str, mode: Mode, success: bool
) -> None:
    unit = unit_of(database, mode)
    await unit.session.execute(add("ada"))
    await unit.end(success=success)
    assert await authors(database_url) == []
    await assert_nothing_held(database, database_url)
    unit.close()


async def test_objects_of_a_unit_that_was_rolled_back_are_not_written_by_the_next_one(
    database: Database, database_url: str
) -> None:
    unit = unit_of(database)
    unit.session.add_all([Author(name="ada"), Author(name="grace")])
    await unit.end(success=True)
    ada, grace = (await unit.session.scalars(select(Author).order_by(Author.name))).all()
    unit.session.add(Author(name="new"))
    ada.name = "changed"
    await unit.session.delete(grace)
    await unit.end(success=False)
    await unit.session.execute(text("SELECT 1"))
    await unit.end(success=True)
    assert await authors(database_url) == ["ada", "grace"]
    unit.close()


async def test_objects_left_by_a_plain_unit_are_not_written_by_the_next_one(
    database: Database, database_url: str
) -> None:
    unit = unit_of(database, plain)
    unit.session.add(Author(name="left"))
    await unit.end(success=True)
    unit.session.add(Author(name="committed"))
    await unit.session.commit()
    assert await authors(database_url) == ["committed"]
    await unit.end(success=True)
    unit.close()


async def test_a_commit_by_hand_in_the_middle_stands_and_the_rest_begins_anew(
    database: Database, database_url: str
) -> None:
    unit = unit_of(database)
    await unit.session.execute(add("first"))
    await unit.session.commit()
    assert (state_of(unit), checked_out(database)) == ("IDLE", 0)
    await unit.session.execute(add("second"))
    assert state_of(unit) == "ACTIVE"
    await unit.end(success=False)
    assert await authors(database_url) == ["first"]
    unit.close()


async def test_a_rollback_by_hand_in_the_middle_stands_and_the_rest_is_committed(
    database: Database, database_url: str
) -> None:
    unit = unit_of(database)
    await unit.session.execute(add("first"))
    await unit.session.rollback()
    assert (state_of(unit), checked_out(database)) == ("IDLE", 0)
    await unit.session.execute(add("second"))
    await unit.end(success=True)
    assert await authors(database_url) == ["second"]
    unit.close()


@pytest.mark.parametrize("let_go", ["close", "reset", "invalidate"])
async def test_work_that_the_handler_lets_go_with_the_session_is_not_acknowledged(
    database: Database, database_url: str, let_go: str
) -> None:
    unit = unit_of(database)
    await unit.session.execute(add("lost"))
    await getattr(unit.session, let_go)()
    assert (state_of(unit), checked_out(database)) == ("IDLE", 0)
    await unit.session.execute(add("after it"))
    with pytest.raises(UncommittedWorkError, match=r"POST /orders .*closed the session"):
        await unit.end(success=True)
    assert await authors(database_url) == []
    await unit.session.execute(add("the next unit"))
    await unit.end(success=True)
    assert await authors(database_url) == ["the next unit"]
    await assert_nothing_held(database, database_url)
    unit.close()


async def test_release_gives_the_connection_back_and_the_unit_goes_on(
    database: Database, database_url: str
) -> None:
    unit = unit_of(database)
    await unit.session.execute(select(Author))
    assert checked_out(database) == 1
    await unit.session.release()
    assert (state_of(unit), checked_out(database)) == ("IDLE", 0)
    await assert_idle(database_url)
    await unit.session.execute(add("ada"))
    await unit.end(success=True)
    assert await authors(database_url) == ["ada"]
    unit.close()


async def test_release_refuses_to_throw_writes_away(database: Database, database_url: str) -> None:
    unit = unit_of(database)
    await unit.session.execute(add("ada"))
    with pytest.raises(UncommittedWorkError, match=r"POST /orders .*session\.commit\(\)"):
        await unit.session.release()
    await unit.end(success=True)
    assert await authors(database_url) == ["ada"]
    unit.close()


# -- statements that fail ----------------------------------------------------------------------

Work = Callable[[DBSession], Coroutine[Any, Any, None]]


async def fail_by_execute(session: DBSession) -> None:
    await session.execute(add("taken"))


async def fail_by_flush(session: DBSession) -> None:
    session.add(Author(name="taken"))
    await session.flush()


async def fail_on_the_connection(session: DBSession) -> None:
    connection = await session.connection()
    await connection.execute(add("taken"))


async def fail_at_the_end_of_the_savepoint(session: DBSession) -> None:
    session.add(Author(name="taken"))


async def fail_in_a_savepoint_of_the_connection(session: DBSession) -> None:
    connection = await session.connection()
    async with connection.begin_nested():
        await connection.execute(add("taken"))


FAILURES: list[Work] = [fail_by_execute, fail_by_flush, fail_on_the_connection]


@pytest.fixture
async def taken(database: Database) -> None:
    """There is one author already, whose name is unique."""
    async with database.transaction() as session:
        session.add(Author(name="taken"))


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("fail", FAILURES, ids=lambda work: work.__name__)
async def test_a_unit_with_a_failed_statement_is_never_committed(
    database: Database, database_url: str, fail: Work
) -> None:
    unit = unit_of(database)
    await unit.session.execute(add("before"))
    with pytest.raises(IntegrityError) as failure:
        await fail(unit.session)
    with suppress(DBAPIError, PendingRollbackError):  # what is made of it differs
        await unit.session.execute(text("SELECT 1"))
    with pytest.raises(PendingRollbackError) as refused:
        await unit.end(success=True)
    if fail is not fail_by_flush:  # after which SQLAlchemy refuses by itself, and says why
        assert isinstance(refused.value, FailedTransactionError)
        assert refused.value.__cause__ is failure.value
    assert await authors(database_url) == ["taken"]
    await assert_nothing_held(database, database_url)
    await unit.session.execute(add("later"))
    await unit.end(success=True)
    assert await authors(database_url) == ["later", "taken"]
    unit.close()


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("fail", FAILURES, ids=lambda work: work.__name__)
async def test_a_commit_by_hand_after_a_failed_statement_is_refused_until_a_rollback(
    database: Database, database_url: str, fail: Work
) -> None:
    unit = unit_of(database, plain)
    with pytest.raises(IntegrityError):
        await fail(unit.session)
    with pytest.raises(PendingRollbackError):
        await unit.session.commit()
    await unit.session.rollback()
    await unit.session.execute(add("after"))
    await unit.session.commit()
    await unit.end(success=True)
    assert await authors(database_url) == ["after", "taken"]
    unit.close()


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize(
    "fail",
    [
        *FAILURES,
        fail_at_the_end_of_the_savepoint,
        fail_in_a_savepoint_of_the_connection,
    ],
    ids=lambda work: work.__name__,
)
@pytest.mark.parametrize("depth", [1, 2])
async def test_a_failed_statement_inside_a_savepoint_is_no_failure_of_the_unit(
    database: Database, database_url: str, fail: Work, depth: int
) -> None:
    async def in_savepoint(depth: int) -> None:
        async with unit.session.begin_nested():
            await (in_savepoint(depth - 1) if depth > 1 else fail(unit.session))

    unit = unit_of(database)
    unit.session.add(Author(name="before"))
    await unit.session.flush()
    with pytest.raises(IntegrityError):
        await in_savepoint(depth)
    await unit.session.execute(add("after"))
    await unit.end(success=True)
    assert await authors(database_url) == ["after", "before", "taken"]
    await assert_nothing_held(database, database_url)
    unit.close()


@pytest.mark.usefixtures("taken")
async def test_a_savepoint_of_the_connection_alone_is_enough(
    database: Database, database_url: str
) -> None:
    unit = unit_of(database)
    await unit.session.execute(add("before"))
    with pytest.raises(IntegrityError):
        await fail_in_a_savepoint_of_the_connection(unit.session)
    await unit.end(success=True)
    assert await authors(database_url) == ["before", "taken"]
    unit.close()


@pytest.mark.usefixtures("taken")
async def test_a_failed_statement_after_a_good_savepoint_counts(
    database: Database, database_url: str
) -> None:
    unit = unit_of(database)
    async with unit.session.begin_nested():
        await unit.session.execute(add("before"))
    with pytest.raises(IntegrityError):
        await unit.session.execute(add("taken"))
    with pytest.raises(FailedTransactionError):
        await unit.end(success=True)
    assert await authors(database_url) == ["taken"]
    unit.close()


async def test_a_row_that_is_missing_is_no_failed_statement(
    database: Database, database_url: str
) -> None:
    unit = unit_of(database)
    await unit.session.execute(add("ada"))
    with pytest.raises(NoResultFound):
        await unit.session.get_one(Author, 77)
    with pytest.raises(NoResultFound):
        (await unit.session.scalars(select(Author).where(Author.id == 77))).one()
    await unit.end(success=True)
    assert await authors(database_url) == ["ada"]
    unit.close()


async def test_in_autocommit_a_failed_statement_spoils_nothing(database: Database) -> None:
    unit = unit_of(database, read_only)
    with pytest.raises(DBAPIError):
        await unit.session.execute(text("SELECT * FROM nothing"))
    assert await unit.session.scalar(text("SELECT 1")) == 1
    await unit.end(success=True)
    unit.close()


async def test_a_deadlock_inside_a_savepoint_never_loses_what_came_before_it(
    mysql_url: str,
) -> None:
    """MariaDB rolls the whole transaction back, and the savepoint is gone with it."""
    async with opened_database(mysql_url) as database, outside(mysql_url) as other:
        async with database.transaction() as session:
            session.add_all([Author(id=1, name="one"), Author(id=2, name="two")])
        await other.execute("BEGIN")
        for number in range(100, 120):  # of two transactions the one with less work gives way
            await other.execute(f"INSERT INTO author VALUES ({number}, 'heavy {number}')")
        await other.execute("UPDATE author SET name = 'one, changed' WHERE id = 1")
        unit = unit_of(database)
        await unit.session.execute(add("before"))
        await unit.session.execute(update(Author).where(Author.id == 2).values(name="mine"))
        waits = asyncio.create_task(other.execute("UPDATE author SET name = 'x' WHERE id = 2"))
        with suppress(OperationalError):  # MariaDB then refuses to roll back to the savepoint
            async with unit.session.begin_nested():
                await unit.session.execute(update(Author).where(Author.id == 1).values(name="y"))
        await waits
        await other.execute("ROLLBACK")
        with suppress(DBAPIError):
            await unit.session.execute(add("after"))
        with pytest.raises(FailedTransactionError):
            await unit.end(success=True)
        assert await authors(mysql_url) == ["one", "two"]
        unit.close()


@pytest.mark.parametrize("by_hand", [True, False])
async def test_a_failed_commit_does_not_spoil_what_comes_after_a_rollback(
    url_with_deferred_constraints: str, by_hand: bool
) -> None:
    url = url_with_deferred_constraints
    async with opened_database(url) as database:
        await database.create_tables(Deferred.metadata)
        unit = unit_of(database, plain if by_hand else transactional)
        unit.session.add(Child(id=1, parent_id=77))
        with pytest.raises(IntegrityError):
            if by_hand:
                await unit.session.commit()
            else:
                await unit.end(success=True)
        await unit.session.rollback()
        for name in ("ada", "grace"):
            unit.session.add(Author(name=name))
            await unit.session.commit()
        await unit.end(success=True)
        assert await authors(url) == ["ada", "grace"]
        await assert_nothing_held(database, url)
        unit.close()


async def test_a_commit_by_hand_that_fails_is_rolled_back(
    url_with_deferred_constraints: str,
) -> None:
    """The session can be used at once."""
    url = url_with_deferred_constraints
    async with opened_database(url) as database:
        await database.create_tables(Deferred.metadata)
        unit = unit_of(database, plain)
        unit.session.add(Child(id=1, parent_id=77))
        with pytest.raises(IntegrityError):
            await unit.session.commit()
        assert (state_of(unit), checked_out(database)) == ("IDLE", 0)
        await unit.session.execute(add("ada"))
        await unit.session.commit()
        await unit.end(success=True)
        assert await authors(url) == ["ada"]
        unit.close()


async def test_the_end_of_a_block_that_was_committed_by_hand_begins_no_unit(
    database: Database, database_url: str
) -> None:
    """Nor does it let the time of one begin."""
    unit = unit_of(database, plain(timeout=60))
    async with unit.session.begin():
        unit.session.add(Author(name="ada"))
        await unit.session.commit()
        assert state_of(unit) == "IDLE"
    assert (state_of(unit), unit.in_use) == ("IDLE", False)
    assert await authors(database_url) == ["ada"]
    await assert_nothing_held(database, database_url)
    unit.close()


# -- other tasks -------------------------------------------------------------------------------


SLEEP = {"postgresql": "SELECT pg_sleep(60)", "mysql": "SELECT SLEEP(60)"}


@pytest.fixture(params=["postgresql", "mysql"])
def server_url(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.mark.parametrize("success", [True, False])
async def test_a_task_that_still_uses_the_session_at_the_end_is_interrupted(
    server_url: str, success: bool
) -> None:
    sleep = SLEEP[make_url(server_url).get_backend_name()]
    async with opened_database(server_url) as database:
        unit = unit_of(database)
        await unit.session.execute(add("ada"))
        straggler = asyncio.create_task(unit.session.execute(text(sleep)))
        await running_statement(server_url, "sleep")
        if success:
            with pytest.raises(ConcurrentUseError, match="session.execute"):
                await unit.end(success=True)
        else:
            await unit.end(success=False)
        assert straggler.cancelled()
        assert (state_of(unit), checked_out(database)) == ("IDLE", 0)
        assert await authors(server_url) == []
        for _ in range(4):  # whichever connection the pool hands out
            await unit.session.execute(text("SELECT 1"))
            await unit.session.rollback()
        await unit.end(success=True)
        unit.close()


async def test_a_commit_that_another_task_has_under_way_is_not_cut_off(
    postgresql_url: str,
) -> None:
    async with opened_database(postgresql_url) as database, outside(postgresql_url) as connection:
        await connection.execute(
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN PERFORM pg_sleep(0.3); RETURN NULL; END'"
        )
        await connection.execute(
            "CREATE CONSTRAINT TRIGGER slow_commit AFTER INSERT ON author"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait()"
        )
        unit = unit_of(database, plain)
        await unit.session.execute(add("ada"))
        committing = asyncio.create_task(unit.session.commit())
        await running_statement(postgresql_url, "commit")
        await unit.end(success=False)
        await committing
        assert await authors(postgresql_url) == ["ada"]


@pytest.mark.parametrize("end", ["commit", "rollback"])
async def test_the_end_of_a_savepoint_leaves_the_session_to_no_other_task(
    server_url: str, end: str
) -> None:
    words = {"commit": b"RELEASE SAVEPOINT", "rollback": b"ROLLBACK TO SAVEPOINT"}[end]
    async with Relay(server_url) as relay, opened_database(relay.url) as database:
        unit = unit_of(database)
        await unit.session.execute(add("before"))
        savepoint = await unit.session.begin_nested()
        await unit.session.execute(add("inside"))
        relay.fate_of = once(words, Fate.HELD)
        asyncio.get_running_loop().call_later(10, relay.thaw)
        ending = asyncio.create_task(getattr(savepoint, end)())
        await relay.holds_something.wait()
        with pytest.raises(ConcurrentUseError, match=r"session\.execute\(\) was called while"):
            await unit.session.execute(add("beside"))
        relay.thaw()
        await ending
        await unit.end(success=True)
        names = ["before", "inside"] if end == "commit" else ["before"]
        assert await authors(server_url) == names
        unit.close()


async def test_a_task_cannot_slip_in_behind_the_end_of_the_unit(database: Database) -> None:
    """It wakes up when the connection goes back, before the task that ends the unit does."""
    unit = unit_of(database)
    await unit.session.execute(add("ada"))
    returned = asyncio.Event()
    event.listen(database.engine.sync_engine, "checkin", lambda *_: returned.set())

    async def slip_in() -> None:
        await returned.wait()
        await unit.session.execute(text("SELECT 1"))

    late = asyncio.create_task(slip_in())
    await asyncio.sleep(0)
    await unit.end(success=True)
    unit.close()
    with pytest.raises((ConcurrentUseError, SessionExpiredError)):
        await late
    assert checked_out(database) == 0


# -- a server that does not answer -------------------------------------------------------------


async def test_a_rollback_that_hangs_is_given_up_and_the_pool_recovers(
    server_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_limits(monkeypatch, cleanup=0.3)
    async with (
        Relay(server_url) as relay,
        opened_database(relay.url, pool_size=1) as database,
    ):
        unit = unit_of(database)
        await unit.session.execute(add("ada"))
        relay.freeze()
        async with asyncio.timeout(30):
            await unit.end(success=False)
        assert (state_of(unit), checked_out(database)) == ("IDLE", 0)
        assert f"{ROUTE}: ROLLBACK failed" in caplog.text
        relay.thaw()
        await unit.session.execute(add("grace"))
        await unit.end(success=True)
        assert await authors(server_url) == ["grace"]
        await assert_idle(server_url)
        unit.close()


async def test_a_connection_that_is_cut_is_replaced(
    server_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened_database(server_url, pool_size=1) as database:
        unit = unit_of(database)
        await unit.session.execute(add("ada"))
        await cut(unit.session, server_url)
        with pytest.raises(DBAPIError):
            await unit.end(success=True)
        assert (state_of(unit), checked_out(database)) == ("IDLE", 0)
        assert f"{ROUTE}: COMMIT failed" in caplog.text
        await unit.session.execute(add("grace"))
        await unit.end(success=True)
        assert await authors(server_url) == ["grace"]
        unit.close()


async def cut(session: DBSession, url: str) -> None:
    """Kill the connection of the open transaction, and wait until it is gone."""
    on_postgresql = "postgresql" in url
    own = text("SELECT pg_backend_pid()" if on_postgresql else "SELECT connection_id()")
    number = await session.scalar(own)
    async with outside(url) as connection:
        kill = f"SELECT pg_terminate_backend({number}, 5000)" if on_postgresql else f"KILL {number}"
        await connection.execute(kill)


# -- what is logged ----------------------------------------------------------------------------


def log_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "asgi_db"]


@pytest.mark.usefixtures("taken")
async def test_a_failed_commit_is_logged_with_its_route_and_without_parameters(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    unit = unit_of(database)
    unit.session.add(Author(name="taken"))
    with pytest.raises(IntegrityError):
        await unit.end(success=True, answer="the response 201")
    unit.close()
    [line] = log_of(caplog)
    assert line.startswith(f"{ROUTE}: COMMIT failed, and the response 201 was not sent: Integrity")
    assert caplog.records[-1].levelno == logging.ERROR
    assert "'taken'" not in line
    assert "(taken)" not in line
    assert "\n" not in line


async def test_a_commit_by_hand_that_fails_after_a_cancellation_is_logged(
    postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever was cancelled is told of that, and of nothing else."""
    async with opened_database(postgresql_url) as database, outside(postgresql_url) as gate:
        await gate.execute(
            "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS"
            " $$BEGIN PERFORM pg_advisory_xact_lock(1); RAISE EXCEPTION 'no'; END$$"
        )
        await gate.execute(
            "CREATE CONSTRAINT TRIGGER fails AFTER INSERT ON author"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fail()"
        )
        await gate.execute("SELECT pg_advisory_lock(1)")
        unit = unit_of(database, plain)
        await unit.session.execute(add("ada"))
        committing = asyncio.create_task(unit.session.commit())
        await running_statement(postgresql_url, "commit")
        committing.cancel()
        await gate.execute("SELECT pg_advisory_unlock(1)")
        await asyncio.wait((committing,))
        assert committing.cancelled()
        [line] = log_of(caplog)
        assert line.startswith(f"{ROUTE}: COMMIT failed: DBAPIError")
        assert await authors(postgresql_url) == []
        await unit.end(success=True)
        unit.close()


@pytest.mark.parametrize("flushed", [True, False])
async def test_uncommitted_work_is_warned_of_with_the_route(
    database: Database, caplog: pytest.LogCaptureFixture, flushed: bool
) -> None:
    unit = unit_of(database, plain)
    unit.session.add(Author(name="ada"))
    if flushed:
        await unit.session.flush()
    await unit.end(success=True)
    unit.close()
    [line] = log_of(caplog)
    assert line.startswith(f"{ROUTE}: uncommitted work was rolled back at the end of the plain")
    assert "await session.commit()" in line
    assert "@transactional" in line
    assert caplog.records[-1].levelno == logging.WARNING


async def test_what_was_committed_read_or_failed_is_not_warned_of(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    unit = unit_of(database, plain)
    await unit.session.execute(add("ada"))
    await unit.session.commit()
    await unit.session.execute(select(Author))
    await unit.end(success=True)
    await unit.session.execute(add("grace"))
    await unit.end(success=False)
    await unit.session.execute(add("grace"))
    await unit.session.rollback()
    await unit.end(success=True)
    unit.close()
    assert log_of(caplog) == []


async def test_the_middleware_names_the_route_of_uncommitted_work(
    on_sqlite: Database, caplog: pytest.LogCaptureFixture
) -> None:
    async def create_order(scope: Scope, receive: Receive, send: Send) -> None:
        scope["endpoint"] = create_order
        await scope["state"]["db"].execute(add("ada"))
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body"})

    await call(DBSessionMiddleware(create_order, on_sqlite), "/orders")
    [line] = log_of(caplog)
    assert line.startswith("POST /orders (")
    assert "create_order): uncommitted work" in line
