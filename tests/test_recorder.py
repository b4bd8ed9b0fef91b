"""What the dashboard keeps: statements without values, and the units that are worth a look."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import event, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from asgi_db import (
    Database,
    DatabaseBusyError,
    DBSession,
    DBSessionMiddleware,
    Mode,
    plain,
    read_only,
    transactional,
)
from asgi_db.types import Receive, Scope, Send
from tests.contract.client import call
from tests.internals import (
    HISTORY,
    KINDS,
    MOST_SHOWN,
    MOST_UNITS,
    Recorder,
    Statistics,
    Tally,
    UnitOfInterest,
    without_literals,
)
from tests.limits import set_limits
from tests.tables import Author, Base, commits_held_back

SECRET = "Agnes-Grey-1847"


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A database with a table."""
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.1}
    async with Database(database_url, engine_options=options) as database:
        await database.create_tables(Base.metadata)
        yield database


@pytest.fixture
def recorder(database: Database, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    set_limits(monkeypatch, slow=600)  # However busy the machine is.
    return Recorder.of(database)


async def serve(database: Database, mode: Mode, work: Any, status: int = 200) -> Exception | None:
    """Serve a request that does this, and answers with this status; return what came out."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = type("Route", (), {"path": "/authors/{id}"})
        await work(scope["state"]["db"])
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return (await call(DBSessionMiddleware(app, database, mode=mode))).error


async def read(session: DBSession) -> None:
    await session.scalars(select(Author.name))


async def write(session: DBSession) -> None:
    await session.execute(insert(Author).values(name=SECRET))


def only(recorder: Recorder) -> UnitOfInterest:
    (unit,) = recorder.units
    return unit


# -- statements --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "shown"),
    [
        ("SELECT 'a', 1, 1.5e-3, .5, 0x1F", "SELECT ?, …"),
        ("SELECT 'it''s', E'a\\'b', x'ab', N'n', U&'d'", "SELECT ?, …"),
        ("SELECT $$it's$$, $t$a $$ b$t$", "SELECT ?, ?"),
        ("SELECT t1.c2 FROM t1 WHERE a = $1 AND b = :b_1", None),
        ("SELECT %(a_1)s, ? FROM t", None),
        ('SELECT "order"."Id 7" FROM "order"', None),
        ("SELECT `order 7` FROM t", None),
        ("SELECT 1 -- for Agnes\n/* Agnes's */ FROM t", "SELECT ? FROM t"),
        ("SELECT 'not closed, Agnes", "SELECT ?"),
        ("SELECT /* not closed", "SELECT"),
        ("SELECT\n    a,\n    b", "SELECT a, b"),
        ("WHERE id IN ($1::INTEGER, $2::INTEGER, $3::INTEGER)", "WHERE id IN ($1::INTEGER, …)"),
        ("WHERE id IN (1, 2, 3, 4)", "WHERE id IN (?, …)"),
        ("VALUES (?, ?), (?, ?), (?, ?)", "VALUES (?, ?), …"),
        ("SELECT a FROM t LIMIT 10", "SELECT a FROM t LIMIT ?"),
        ("SELECT data #>> '{a}'", "SELECT data #>> ?"),
    ],
)
def test_a_statement_is_shown_without_its_literals(statement: str, shown: str | None) -> None:
    assert without_literals(statement) == (shown or statement)


@pytest.mark.parametrize(
    ("statement", "shown"),
    [
        ("SELECT \"Agnes\", 'it\\'s Agnes' # Agnes", "SELECT ?, ?"),
        ("SELECT `a b`, _utf8mb4'x' FROM `order`", "SELECT `a b`, ? FROM `order`"),
        ('SELECT "not closed', "SELECT ?"),
    ],
)
def test_on_mysql_double_quotes_are_those_of_a_string(statement: str, shown: str) -> None:
    assert without_literals(statement, has_double_quoted_strings=True) == shown


def test_a_long_statement_is_cut() -> None:
    assert len(without_literals("SELECT " + ", ".join(f"c{n}" for n in range(2000)))) <= 1001


async def test_no_value_is_kept(database: Database, recorder: Recorder) -> None:
    """Neither of a parameter, nor of a literal, nor of the database's message."""

    async def fail(session: DBSession) -> None:
        await session.execute(insert(Author).values(id=1, name=SECRET))
        await session.execute(text(f"SELECT '{SECRET}'"))
        await session.execute(insert(Author).values(id=1, name=SECRET))

    assert isinstance(await serve(database, transactional, fail), IntegrityError)
    unit = only(recorder)
    assert unit.kinds == ("failed",)
    assert SECRET not in repr(unit)
    assert [statement.times for statement in unit.statements] == [2, 1]
    failed = unit.statements[0]
    assert failed.error and failed.error == unit.error
    assert failed.text.startswith("INSERT INTO author")
    assert unit.statements[1].text == "SELECT ?"
    assert unit.statements[1].error is None


async def test_the_time_of_each_statement_is_known(
    database: Database, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of one that bypasses the session; what the handler does meanwhile is not part of it."""
    slept = 0.0

    async def be_slow(session: DBSession) -> None:
        nonlocal slept
        connection = await session.connection()
        await connection.execute(select(Author.id))
        began = time.perf_counter()
        await asyncio.sleep(0.1)
        slept = time.perf_counter() - began

    set_limits(monkeypatch, slow=0.05)

    await serve(database, plain, be_slow)
    unit = only(recorder)
    assert unit.kinds == ("slow",)
    (statement,) = unit.statements
    assert 0 < statement.longest == statement.seconds
    assert statement.seconds + slept <= unit.held <= unit.lasted
    assert 0 < unit.busy < unit.lasted - slept / 2


# -- which units are of interest ---------------------------------------------------------------


async def test_what_went_well_is_not_kept(database: Database, recorder: Recorder) -> None:
    async def refuse_and_go_on(session: DBSession) -> None:
        await session.execute(insert(Author).values(id=7, name="b"))
        with pytest.raises(IntegrityError):
            async with session.begin_nested():
                await session.execute(insert(Author).values(id=7, name="a"))

    await serve(database, read_only, read)
    await serve(database, transactional, write)
    await serve(database, transactional, refuse_and_go_on)
    await serve(database, transactional, read, status=404)
    assert list(recorder.units) == []
    assert set(recorder.found.values()) == {0}
    assert recorder.history()[-1].units + sum(s.units for s in recorder.history()[:-1]) == 4


async def test_a_request_that_raises_has_failed(database: Database, recorder: Recorder) -> None:
    async def fail(session: DBSession) -> None:
        await read(session)
        raise LookupError(SECRET)

    assert isinstance(await serve(database, transactional, fail), LookupError)
    unit = only(recorder)
    assert (unit.kinds, unit.error, unit.outcome) == (("failed",), "LookupError", "rolled_back")
    assert (unit.route, unit.mode) == ("POST /authors/{id}", "transactional")


async def test_a_failed_commit_has_failed(database: Database, recorder: Recorder) -> None:
    async def swallow(session: DBSession) -> None:
        with pytest.raises(DBAPIError):
            await session.execute(text("SELECT * FROM no_such_table"))

    await serve(database, transactional, swallow)
    unit = only(recorder)
    assert (unit.kinds, unit.outcome, unit.status) == (("failed",), "failed", 200)
    assert recorder.found["failed"] == 1


async def test_a_unit_without_a_connection_has_failed(
    database: Database, recorder: Recorder
) -> None:
    async with database.session() as holder:
        await read(holder)
        with pytest.raises(DatabaseBusyError):
            async with database.session() as session:
                await read(session)
        unit = only(recorder)
        assert unit.kinds == ("failed",) and unit.count == 0


async def test_what_is_rolled_back_behind_a_2xx_is_kept(
    database: Database, recorder: Recorder
) -> None:
    await serve(database, plain, write)
    unit = only(recorder)
    assert (unit.kinds, unit.status, unit.outcome) == (("rolled_back",), 200, "rolled_back")


async def test_the_same_statement_five_times_is_n_plus_1(
    database: Database, recorder: Recorder
) -> None:
    async def one_by_one(session: DBSession) -> None:
        for number in range(3):
            await session.execute(select(Author.name).where(Author.id == number))
        for number in range(5):
            await session.execute(text(f"SELECT name FROM author WHERE id = {number}"))

    await serve(database, read_only, one_by_one)
    unit = only(recorder)
    assert unit.kinds == ("repeated",)
    assert [(s.times, s.is_repeated) for s in unit.statements] == [(3, False), (5, True)]


@pytest.mark.parametrize("unknown", [True, False], ids=["unknown", "conflict"])
def test_each_kind_has_its_reason(sqlite_url: str, unknown: bool) -> None:
    database = Database(sqlite_url)
    recorder = Recorder.of(database)
    tally = database.statistics.new_tally()
    assert tally.trace is not None
    tally.outcome, tally.is_unknown, tally.conflicts = "failed", unknown, 1
    tally.trace.attempt = 2
    database.statistics.unit_ended("POST /", "transactional", tally)
    assert only(recorder).kinds == ("unknown" if unknown else "conflict", "retried")
    assert set(only(recorder).kinds) <= set(KINDS)


async def test_a_commit_that_is_not_answered_has_an_unknown_outcome(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limits(monkeypatch, commit=0.2)
    async with Database(postgresql_url) as database:
        await database.create_tables(Base.metadata)
        recorder = Recorder.of(database)
        async with commits_held_back(postgresql_url):
            await serve(database, transactional, write)
    assert only(recorder).kinds == ("unknown",)
    assert only(recorder).outcome == "failed"


# -- the bounds --------------------------------------------------------------------------------


async def test_what_is_kept_is_bounded(database: Database, recorder: Recorder) -> None:
    async def fail(session: DBSession) -> None:
        for number in range(MOST_SHOWN * 3):
            await session.execute(
                text(f"SELECT {'a' * 9}{number}.id FROM author {'a' * 9}{number}")
            )
        raise LookupError

    assert isinstance(await serve(database, read_only, fail), LookupError)
    unit = only(recorder)
    assert len(unit.statements) == MOST_SHOWN
    assert (unit.count, unit.others) == (MOST_SHOWN * 3, MOST_SHOWN * 2)
    tally = Tally()
    tally.outcome = "failed"
    for _ in range(MOST_UNITS + 10):
        database.statistics.unit_ended("POST /", "transactional", tally)
    assert len(recorder.units) == MOST_UNITS
    assert recorder.units[-1].number == MOST_UNITS + 11
    assert len(recorder.history()) == HISTORY


async def test_the_history_has_a_sample_for_each_second(
    database: Database, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with database.session() as session:
        await read(session)
        recorder.sample()
        last = recorder.history()[-1]
        assert (last.used, last.limit) == (1, 1)
    recorder.sample()
    history = recorder.history()
    assert len(history) == HISTORY
    assert [sample.at for sample in history] == sorted(sample.at for sample in history)
    assert history[-1].used == 0


async def test_a_database_is_recorded_once(database: Database, recorder: Recorder) -> None:
    assert Recorder.of(database) is recorder
    assert database.statistics.observers == (recorder,)


async def test_the_last_statement_of_a_holder_is_known(database: Database) -> None:
    async with database.session() as session:
        await read(session)
        assert [holder.statement for holder in database.stats().holders] == [""]
    Recorder.of(database)
    async with database.session() as session:
        await session.execute(text(f"SELECT '{SECRET}'"))
        (holder,) = database.stats().holders
        assert (holder.statement, holder.is_late) == ("SELECT ?", False)


@pytest.mark.timing
async def test_a_holder_past_the_threshold_is_marked(sqlite_url: str) -> None:
    async with Database(sqlite_url, leak_threshold=0.05) as database:
        async with database.session() as session:
            await session.connection()
            await asyncio.sleep(0.1)
            assert [holder.is_late for holder in database.stats().holders] == [True]


async def test_an_engine_that_is_made_later_is_recorded_too(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    recorder = Recorder.of(database)
    async with database:
        for _ in range(2):
            async with database.session() as session:
                for _ in range(5):
                    await session.execute(text("SELECT 1"))
    assert len(recorder.units) == 2
    assert all(unit.statements[0].seconds > 0 for unit in recorder.units)


async def test_other_listeners_of_a_statement_are_called_as_before(
    database: Database, recorder: Recorder
) -> None:
    seen: list[str] = []

    def note(_: object, statement: str, *__: object) -> None:
        seen.append(statement)

    event.listen(database.engine.sync_engine, "do_execute", note)
    async with database.session() as session:
        await session.execute(text("SELECT 1"))
    assert seen[-1] == "SELECT 1"


def test_without_a_dashboard_nothing_is_traced(sqlite_url: str) -> None:
    statistics = Statistics()
    assert statistics.new_tally is Tally and not statistics.is_tracing
    assert Database(sqlite_url).statistics.observers == ()
