"""Between two reads in a row a read_only session keeps its connection, and not while it waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, select, text
from sqlalchemy.exc import ResourceClosedError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only

from asgi_db import Database, DBSession, read_only
from tests.cancelling import no_complaints
from tests.drivers import is_psycopg
from tests.pools import ONE_CONNECTION, checked_out
from tests.servers import assert_disconnected, assert_idle
from tests.tables import Author, Base, authors

READS = [select(Author.id).where(Author.id == id) for id in range(5)]


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A database with one connection, and no complaint of the event loop or the pool."""
    async with no_complaints(), Database(database_url, engine_options=ONE_CONNECTION) as database:
        await database.create_tables(Base.metadata)
        yield database
        assert checked_out(database) == 0


def counted(engine: AsyncEngine, name: str) -> Callable[[], int]:
    """How often this event of the pool happens from now on."""
    happened: list[None] = []
    event.listen(engine.sync_engine, name, lambda *_: happened.append(None))
    return lambda: len(happened)


async def read(session: DBSession) -> None:
    for statement in READS:
        assert await session.scalar(statement) is None


def keeps(url: str) -> bool:
    """Whether a connection of this driver is returned without a word to the server."""
    return not is_psycopg(url)


async def test_one_read_is_no_reason_to_keep_it(database: Database) -> None:
    async with database.session(read_only) as session:
        await session.scalar(READS[0])
        assert checked_out(database) == 0


# -- in a row ----------------------------------------------------------------------------------


async def test_from_the_second_one_on_reads_in_a_row_have_one_connection(
    database: Database, database_url: str
) -> None:
    checkouts = counted(database.engine, "checkout")
    async with database.session(read_only) as session:
        await read(session)
        assert checked_out(database) == keeps(database_url)
        assert checkouts() == (2 if keeps(database_url) else 5)
    assert checked_out(database) == 0


def commit_the_transaction(session: Session) -> None:
    transaction = session.get_transaction()
    assert transaction is not None
    transaction.commit()


@pytest.mark.asyncpg
async def test_a_commit_of_the_transaction_itself_is_no_operation_of_the_session(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    async with database.session(read_only) as session:
        for _ in range(2):
            await read(session)
            transaction = session.get_transaction()
            assert transaction is not None
            await transaction.commit()
            await read(session)
            await session.run_sync(commit_the_transaction)
            assert checked_out(database) == 0
    assert caplog.messages == []


async def test_what_finds_nothing_or_sends_nothing_is_a_read_in_a_row(
    database: Database, database_url: str
) -> None:
    async with database.transaction() as session:
        session.add(Author(id=1, name="ada"))
    checkouts = counted(database.engine, "checkout")
    async with database.session(read_only) as session:
        ada = await session.get_one(Author, 1)
        assert await session.get(Author, 1) is ada
        for _ in range(3):
            assert await session.get(Author, 2) is None
            await session.refresh(ada)
        assert checkouts() == (2 if keeps(database_url) else 7)


@pytest.mark.parametrize(
    "wait",
    [
        lambda: asyncio.sleep(0),
        lambda: asyncio.to_thread(int),
        lambda: asyncio.wait_for(asyncio.sleep(0), 5),
    ],
)
async def test_who_waits_for_anything_else_holds_none(
    database: Database, wait: Callable[[], Any]
) -> None:
    async with database.session(read_only) as session:
        for _ in range(3):
            await read(session)
            await wait()
            assert checked_out(database) == 0
            async with database.transaction() as other:  # on the only connection
                await read(other)


async def test_who_uses_another_session_holds_none(database: Database) -> None:
    async with database.session(read_only) as session:
        await read(session)
        async with database.session(read_only) as other:
            await read(other)
            await read(session)


async def test_who_reads_from_another_engine_gives_it_back_first(
    database: Database, database_url: str
) -> None:
    """Two that held one of each, and waited for the other, would wait for ever."""
    other = create_async_engine(database_url, pool_size=1)
    held: list[int] = []
    event.listen(other.sync_engine, "checkout", lambda *_: held.append(checked_out(database)))
    elsewhere = {"bind": other.sync_engine}
    try:
        async with database.session(read_only) as session:
            for _ in range(3):
                await read(session)
                assert await session.scalar(READS[0], bind_arguments=elsewhere) is None
                assert await session.scalar(READS[1], bind_arguments=elsewhere) is None
        assert set(held) == {0}
        assert len(held) >= 3
    finally:
        await other.dispose()


async def test_tasks_that_take_turns_read_on(database: Database) -> None:
    async with database.session(read_only) as session:
        for _ in range(3):
            await asyncio.create_task(read(session))
            await read(session)


# -- what ends it ------------------------------------------------------------------------------


async def test_a_cancelled_handler_gives_it_back(database: Database) -> None:
    async def handler() -> None:
        async with database.session(read_only) as session:
            await read(session)
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await read(session)

    for _ in range(3):
        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(handler())
        assert checked_out(database) == 0


async def test_an_error_of_the_handler_gives_it_back(database: Database) -> None:
    with pytest.raises(LookupError):
        async with database.session(read_only) as session:
            await read(session)
            raise LookupError
    assert checked_out(database) == 0


async def test_a_statement_that_fails_gives_it_back_at_once(database: Database) -> None:
    async with database.session(read_only) as session:
        await read(session)
        with pytest.raises(Exception, match="nothing"):
            await session.execute(text("SELECT nothing FROM nowhere"))
        assert checked_out(database) == 0
        await read(session)


async def release(session: DBSession) -> None:
    await session.release()


async def roll_back(session: DBSession) -> None:
    await session.rollback()


async def commit(session: DBSession) -> None:
    await session.commit()


async def close(session: DBSession) -> None:
    await session.close()


@pytest.mark.parametrize("end", [release, roll_back, commit, close])
async def test_what_ends_the_transaction_gives_it_back_at_once(
    database: Database, end: Callable[[DBSession], Any]
) -> None:
    async with database.session(read_only) as session:
        await read(session)
        await end(session)
        assert checked_out(database) == 0
        await read(session)


async def test_a_block_begins_after_a_read(database: Database) -> None:
    async with database.session(read_only) as session:
        await read(session)
        async with session.begin():
            await read(session)
            await asyncio.sleep(0)
            assert checked_out(database) == 1
        await read(session)
        connection = await session.connection()
        await connection.execute(READS[0])
        await asyncio.sleep(0)
        assert checked_out(database) == 1


async def test_what_is_added_after_a_read_is_not_forgotten(
    database: Database, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    for waits in (False, True):
        async with database.session(read_only) as session:
            await read(session)
            session.add(Author(name="ada"))
            if waits:
                await asyncio.sleep(0)
        [message] = [record.getMessage() for record in caplog.records]
        assert "uncommitted work was rolled back" in message
        caplog.clear()
    assert await authors(database_url) == []


# -- where something would be sent -------------------------------------------------------------


def send(statement: str, connection: Any) -> None:
    """Send a statement past SQLAlchemy, as a listener may."""
    cursor = connection.cursor()
    cursor.execute(statement)
    cursor.close()


@pytest.mark.parametrize("name", ["reset", "checkin"])
@pytest.mark.parametrize("early", [True, False])
async def test_a_listener_of_the_users_own_may_send_something(
    database_url: str, name: str, early: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """So the connection goes back where something can be awaited: in the operation itself."""
    questions: list[None] = []

    def ask(connection: Any, *_: Any) -> None:
        send("SELECT 1", connection)
        questions.append(None)

    async with Database(database_url, engine_options=ONE_CONNECTION) as database:
        await database.create_tables(Base.metadata)
        if not early:
            async with database.session(read_only) as session:
                await read(session)
        event.listen(database.engine.sync_engine, name, ask)
        async with database.session(read_only) as session:
            before = len(questions)
            for number, statement in enumerate(READS, 1):
                await session.scalar(statement)
                assert checked_out(database) == 0
                assert len(questions) - before == number
    assert caplog.messages == []


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("of_session", [True, False])
async def test_so_may_one_to_the_end_of_the_transaction(
    database_url: str, early: bool, of_session: bool, caplog: pytest.LogCaptureFixture
) -> None:
    questions: list[None] = []

    def ask(connection: Connection) -> None:
        send("SELECT 1", connection.connection)
        questions.append(None)

    def ask_in_session(session: Session, _: object) -> None:
        engine = session.get_bind()
        assert isinstance(engine, Engine)
        with engine.connect() as connection:
            ask(connection)

    async with no_complaints(), Database(database_url, engine_options=ONE_CONNECTION) as database:
        await database.create_tables(Base.metadata)
        async with database.session(read_only) as session:
            if not early:
                await read(session)
            if of_session:
                event.listen(session.sync_session, "after_transaction_end", ask_in_session)
            else:
                event.listen(database.engine.sync_engine, "rollback", ask)
            before = len(questions)
            for number, statement in enumerate(READS, 1):
                await session.scalar(statement)
                assert checked_out(database) == 0
                assert len(questions) - before >= number
        await asyncio.sleep(0)
        assert checked_out(database) == 0
    assert caplog.messages == []


@pytest.mark.asyncpg
async def test_a_listener_that_raises_does_not_keep_the_connection(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    async with database.session(read_only) as session:
        await read(session)
        connection = session.unit_of_work.transaction.connections[0]

        def fail(_: Connection) -> None:
            event.remove(connection, "rollback", fail)
            raise LookupError

        event.listen(connection, "rollback", fail)
        await asyncio.sleep(0)
        assert checked_out(database) == 0
        [message] = [record.getMessage() for record in caplog.records]
        assert "a connection could not be given back" in message
        await read(session)


async def test_one_that_was_handed_out_is_never_kept(database: Database) -> None:
    """A statement may be running over it when the event loop turns."""
    async with database.session(read_only) as session:
        await read(session)
        for _ in range(2):
            connection = await session.connection()
            await connection.execute(READS[0])
            await session.scalar(READS[1])
            assert checked_out(database) == 0
            with pytest.raises(ResourceClosedError):
                await connection.execute(READS[0])
            await read(session)


async def test_an_engine_is_disposed_while_connections_are_kept(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """They go back to the pool that was before, which may have no place for them."""

    def wait(connection: Connection, cursor: object, statement: str, *_: object) -> None:
        if "pauses" in statement:
            await_only(barrier.wait())  # so that several are out at once
            await_only(barrier.wait())

    async def read_together() -> None:
        async with database.session(read_only) as session:
            await session.scalar(READS[0])
            await session.scalar(text("SELECT 1 AS pauses"))

    barrier = asyncio.Barrier(4)
    options = {"pool_size": 1, "max_overflow": 2, "pool_timeout": 5}
    async with no_complaints(), Database(database_url, engine_options=options) as database:
        await database.create_tables(Base.metadata)
        event.listen(database.engine.sync_engine, "after_cursor_execute", wait)
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(read_together())
            await barrier.wait()
            await database.engine.dispose()
            await barrier.wait()
        assert checked_out(database) == 0
    assert caplog.messages == []
    await assert_disconnected(database_url)


@pytest.mark.asyncpg
async def test_reads_that_never_suspend_ask_the_event_loop_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with database.transaction() as session:
        session.add(Author(id=9, name="ada"))
    async with database.session(read_only) as session:
        ada = await session.get_one(Author, 9)
        await read(session)
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        asked: list[object] = []
        call_soon = loop.call_soon

        def counting(callback: Any, *args: Any, **options: Any) -> Any:
            asked.append(callback)
            return call_soon(callback, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "call_soon", counting)
            for _ in range(100):
                assert await session.get_one(Author, 9) is ada
        assert len(asked) <= 1


async def test_what_a_listener_has_left_open_is_rolled_back(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    def begin(connection: Any, *_: object) -> None:
        send("BEGIN", connection)

    async with no_complaints(), Database(database_url, engine_options=ONE_CONNECTION) as database:
        await database.create_tables(Base.metadata)
        event.listen(database.engine.sync_engine, "checkout", begin)
        async with database.session(read_only) as session:
            await read(session)
            await read(session)
        await assert_idle(database_url)
    assert caplog.messages == []


async def test_a_connection_for_which_the_pool_has_no_place_is_closed_in_good_order(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def read_together() -> None:
        async with database.session(read_only) as session:
            await barrier.wait()  # so that several are out at once
            await read(session)

    barrier = asyncio.Barrier(3)
    options = {"pool_size": 1, "max_overflow": 2, "pool_timeout": 5}
    async with no_complaints(), Database(database_url, engine_options=options) as database:
        await database.create_tables(Base.metadata)
        closed = counted(database.engine, "close")
        tasks = [asyncio.create_task(read_together()) for _ in range(3)]
        await asyncio.gather(*tasks)
        assert checked_out(database) == 0
        assert closed() > 0
        await assert_idle(database_url)
    assert caplog.messages == []
    await assert_disconnected(database_url)


@pytest.mark.parametrize("options", [{"poolclass": NullPool}, {"pool_size": 1}])
async def test_an_engine_of_the_users_own(
    database_url: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    engine = create_async_engine(database_url, **options)
    try:
        async with no_complaints(), Database(engine=engine) as database:
            await database.create_tables(Base.metadata)
            async with database.session(read_only) as session:
                await read(session)
                await asyncio.sleep(0)
                await read(session)
            assert database.stats().pool.checked_out == 0
    finally:
        await engine.dispose()
    assert caplog.messages == []
