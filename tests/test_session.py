"""The session of the handlers: SQLAlchemy's own, with every operation inside the unit of work."""

from __future__ import annotations

import asyncio
import inspect as python
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, insert, inspect, select, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_object_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, object_session
from sqlalchemy.orm.exc import DetachedInstanceError
from sqlalchemy.pool import NullPool

from asgi_db import (
    ConcurrentUseError,
    ConfigurationError,
    Database,
    DBSession,
    Mode,
    ReadOnlyError,
    SessionExpiredError,
    plain,
    read_only,
    transactional,
    uuid4_str,
)
from tests.internals import OPERATIONS
from tests.pools import checked_out
from tests.servers import assert_disconnected, assert_idle
from tests.tables import Author, Base, Book, authors
from tests.units import NewUnit, new_unit
from tests.versions import IS_SQLALCHEMY_2_0

POOL = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 5}
BLOCK = "GET /books (list_books)"


@asynccontextmanager
async def opened_database(url: str, **options: Any) -> AsyncGenerator[Database, None]:
    async with Database(url, engine_options=POOL, **options) as database:
        await database.create_tables(Base.metadata)
        yield database


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A database with one author of two books."""
    async with opened_database(database_url) as database:
        async with database.transaction() as session:
            session.add(Author(name="ada"))  # number 1, as its books are 1 and 2
            await session.flush()
            for title in ("one", "two"):
                session.add(Book(title=title, author_id=1))
                await session.flush()
        yield database


@asynccontextmanager
async def unit_of(
    database: Database, mode: Mode = transactional, *, success: bool = True
) -> AsyncGenerator[NewUnit, None]:
    """A unit of work, which is ended and closed with the block."""
    unit = new_unit(database, mode, BLOCK)
    try:
        yield unit
    except BaseException:
        await unit.end(success=False)
        raise
    else:
        await unit.end(success=success)
    finally:
        unit.close()


async def assert_nothing_held(database: Database) -> None:
    assert checked_out(database) == 0
    await assert_idle(database.url.render_as_string(hide_password=False))


# -- it is SQLAlchemy's own session ------------------------------------------------------------


async def test_the_session_is_a_real_async_session(database: Database) -> None:
    async with unit_of(database) as unit:
        session = unit.session
        assert isinstance(session, AsyncSession)
        assert isinstance(session.sync_session, Session)
        ada = await session.get_one(Author, 1)
        assert async_object_session(ada) is session
        assert object_session(ada) is session.sync_session
        assert inspect(ada).persistent


async def test_a_wrong_name_is_an_attribute_error_before_the_first_use_and_after(
    database: Database,
) -> None:
    async with unit_of(database) as unit:
        for _ in range(2):
            with pytest.raises(AttributeError, match="DBSession.*no attribute 'execut'"):
                getattr(unit.session, "execut")  # noqa: B009 - a type checker sees it
            assert await unit.session.scalar(select(func.count(Author.id))) == 1


async def test_a_transaction_that_was_begun_by_hand_is_committed_by_hand(
    database: Database, database_url: str
) -> None:
    async with unit_of(database, plain) as unit:
        transaction = await unit.session.begin()
        unit.session.add(Author(name="by hand"))
        await transaction.commit()
        assert "by hand" in await authors(database_url)


async def test_a_statement_without_parameters_is_held_against_the_mode_too(
    database: Database,
) -> None:
    async with unit_of(database, read_only) as unit:
        connection = await unit.session.connection(execution_options={"no_parameters": True})
        await connection.exec_driver_sql("SELECT 1")
        with pytest.raises(ReadOnlyError):
            await connection.exec_driver_sql("DELETE FROM author")


async def test_the_options_of_the_sessions_are_handed_on(sqlite_url: str) -> None:
    options = {"info": {"tenant": 7}, "expire_on_commit": True, "autoflush": True}
    async with (
        opened_database(sqlite_url, session_options=options) as database,
        unit_of(database) as unit,
    ):
        assert unit.session.info == {"tenant": 7}
        author = Author(name="ada")
        unit.session.add(author)
        assert await unit.session.scalar(select(Author.name)) == "ada"
        await unit.session.commit()
        assert "name" in inspect(author).expired_attributes


def test_a_session_that_is_made_by_hand_says_where_sessions_come_from() -> None:
    engine = create_async_engine("sqlite+aiosqlite://")
    makers: list[Callable[[], object]] = [
        lambda: DBSession(engine),  # type: ignore[arg-type]
        lambda: DBSession(bind=engine),
        lambda: DBSession(),
        async_sessionmaker(engine, class_=DBSession),
    ]
    for make in makers:
        with pytest.raises(ConfigurationError, match=r"request\.state\.db.*database\.session\(\)"):
            make()


async def test_a_session_without_autobegin_waits_for_begin(sqlite_url: str) -> None:
    async with (
        opened_database(sqlite_url, session_options={"autobegin": False}) as database,
        unit_of(database, plain) as unit,
    ):
        with pytest.raises(InvalidRequestError, match="[Aa]utobegin"):
            await unit.session.execute(select(Author))
        async with unit.session.begin():
            unit.session.add(Author(name="ada"))
        assert await authors(sqlite_url) == ["ada"]


async def test_a_class_may_live_on_another_engine(sqlite_url: str, tmp_path: Path) -> None:
    other_url = f"sqlite+aiosqlite:///{tmp_path}/other.db"
    other = create_async_engine(other_url)
    try:
        async with other.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        binds = {Author: other}
        async with opened_database(sqlite_url, session_options={"binds": binds}) as database:
            for success in (True, False):
                async with unit_of(database, success=success) as unit:
                    unit.session.add(Author(name=f"ada {success}"))
                    await unit.session.execute(text("SELECT 1"), bind_arguments={"mapper": Book})
                    await unit.session.flush()
        assert await authors(sqlite_url) == []
        assert await authors(other_url) == ["ada True"]
    finally:
        await other.dispose()


# -- every operation is inside the unit of work ------------------------------------------------

HARMLESS = {
    # They look at, or change, what the session has in memory.
    "add",
    "add_all",
    "deleted",
    "dirty",
    "enable_relationship_loading",
    "expire",
    "expire_all",
    "expunge",
    "expunge_all",
    "get_nested_transaction",
    "get_transaction",
    "identity_key",
    "in_nested_transaction",
    "in_transaction",
    "info",
    "is_active",
    "is_modified",
    "new",
    "no_autoflush",
    "object_session",
    # They prepare what another method will do.
    "bind_mapper",
    "bind_table",
    "connection_callable",
    "dispatch",
    "execution_options",
    "get_bind",
    "query",
}
"""What a `Session` has beside the operations that may talk to the database."""

if IS_SQLALCHEMY_2_0:  # whose `close_all` closes every session that there is, and is deprecated
    HARMLESS.symmetric_difference_update({"execution_options", "close_all"})


def test_every_method_of_sqlalchemys_session_is_known() -> None:
    public = {name for name in dir(Session) if not name.startswith("_")}
    assert set(OPERATIONS) | HARMLESS == public
    assert not set(OPERATIONS) & HARMLESS


def test_the_operations_are_still_those_of_sqlalchemy() -> None:
    operations: Any = DBSession.sync_session_class
    for name in OPERATIONS:
        assert python.signature(getattr(operations, name)) == python.signature(
            getattr(Session, name)
        )


# -- objects and results -----------------------------------------------------------------------


async def test_objects_are_merged_refreshed_and_deleted(
    database: Database, database_url: str
) -> None:
    async with unit_of(database) as unit:
        session = unit.session
        merged = await session.merge(Author(id=1, name="ada l."))
        assert merged.name == "ada l."
        await session.flush()
        await session.execute(text("UPDATE author SET name = 'countess' WHERE id = 1"))
        await session.refresh(merged)
        assert merged.name == "countess"
        added = Author(name="grace")
        session.add(added)
        await session.flush()
        await session.delete(added)
        again = await session.merge(Author(id=1, name="ada again"))
        assert again is merged
    assert await authors(database_url) == ["ada again"]


async def test_lazy_loads_work_through_awaitable_attrs_and_run_sync(database: Database) -> None:
    async with unit_of(database) as unit:
        ada = await unit.session.get_one(Author, 1)
        assert [book.title for book in await ada.awaitable_attrs.books] == ["one", "two"]
        assert await unit.session.run_sync(
            lambda session: [book.author.name for book in session.query(Book).all()]
        ) == ["ada", "ada"]


@pytest.mark.parametrize("mode", [plain, transactional, read_only(snapshot=True)])
async def test_rows_are_streamed(database: Database, mode: Mode) -> None:
    async with database.transaction() as session:
        rows = [{"name": f"author {number:03}"} for number in range(500)]
        await session.execute(insert(Author), rows)
    async with unit_of(database, mode) as unit:
        result = await unit.session.stream(select(Author.name).order_by(Author.name))
        assert [name async for (name,) in result][:2] == ["ada", "author 000"]
        scalars = await unit.session.stream_scalars(select(Author).order_by(Author.name))
        names = [author.name async for author in scalars]
        assert (len(names), names[-1]) == (501, "author 499")
    await assert_nothing_held(database)


unread = pytest.mark.filterwarnings("ignore:Previous unbuffered result was left incomplete")
"""asyncmy reads on to the end of what nobody reads, and says so."""


@unread
@pytest.mark.parametrize("success", [True, False])
async def test_a_stream_that_nobody_reads_to_its_end_is_closed_with_the_unit(
    database: Database, database_url: str, success: bool
) -> None:
    async with database.transaction() as session:
        rows = [{"name": f"author {number:03}"} for number in range(500)]
        await session.execute(insert(Author), rows)
    async with unit_of(database, success=success) as unit:
        unit.session.add(Author(name="zoe"))
        await unit.session.flush()
        result = await unit.session.stream(select(Author.name), execution_options={"yield_per": 10})
        assert await anext(aiter(result))
    await assert_nothing_held(database)
    async with unit_of(database) as unit:  # on the same connection, or its replacement
        found = await unit.session.scalar(select(Author).where(Author.name == "zoe"))
        assert (found is not None) is success


async def test_blocks_of_begin_and_begin_nested_work(database: Database, database_url: str) -> None:
    async with unit_of(database, plain) as unit:
        async with unit.session.begin():
            unit.session.add(Author(name="committed"))
            with pytest.raises(ValueError):
                async with unit.session.begin_nested():
                    unit.session.add(Author(name="of the savepoint"))
                    await unit.session.flush()
                    raise ValueError
        assert not unit.session.in_transaction()
        with pytest.raises(ValueError):
            async with unit.session.begin():
                unit.session.add(Author(name="rolled back"))
                await unit.session.flush()
                raise ValueError
    assert await authors(database_url) == ["ada", "committed"]
    await assert_nothing_held(database)


async def test_a_begin_block_holds_its_connection_also_in_read_only(database: Database) -> None:
    async with unit_of(database, read_only) as unit:
        await unit.session.execute(select(Author))
        await asyncio.sleep(0)
        assert checked_out(database) == 0
        async with unit.session.begin():
            await unit.session.execute(select(Author))
            await asyncio.sleep(0)
            assert checked_out(database) == 1
            await unit.session.execute(select(Author))
        assert checked_out(database) == 0


async def test_the_session_may_be_closed_by_a_block_of_its_own(
    database: Database, database_url: str
) -> None:
    async with unit_of(database) as unit:
        async with unit.session as session:
            await session.execute(select(Author))
            assert checked_out(database) == 1
        assert checked_out(database) == 0
        unit.session.add(Author(name="grace"))
    assert await authors(database_url) == ["ada", "grace"]


# -- what is given back ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [plain, transactional, read_only(snapshot=True)])
async def test_release_leaves_loaded_objects_usable_where_rollback_would_expire_them(
    database: Database, mode: Mode
) -> None:
    async with unit_of(database, mode) as unit:
        ada = await unit.session.get_one(Author, 1)
        await unit.session.release()
        assert checked_out(database) == 0
        assert ada.name == "ada"
        assert ada in unit.session
        assert len(await ada.awaitable_attrs.books) == 2
        await unit.session.rollback()
        assert "name" in inspect(ada).expired_attributes


async def test_release_keeps_pending_and_changed_objects_for_the_next_transaction(
    database: Database, database_url: str
) -> None:
    async with unit_of(database) as unit:
        ada = await unit.session.get_one(Author, 1)
        ada.name = "countess"
        pending = Author(name="grace")
        unit.session.add(pending)
        await unit.session.release()
        assert checked_out(database) == 0
        assert inspect(pending).pending
        assert ada in unit.session.dirty
    assert await authors(database_url) == ["countess", "grace"]


async def test_release_inside_a_savepoint_ends_it_too(database: Database) -> None:
    async with unit_of(database) as unit:
        await unit.session.begin_nested()
        ada = await unit.session.get_one(Author, 1)
        await unit.session.release()
        assert not unit.session.in_transaction()
        assert not unit.session.in_nested_transaction()
        assert ada.name == "ada"
    await assert_nothing_held(database)


async def test_between_statements_of_read_only_results_and_objects_stay_usable(
    database: Database,
) -> None:
    async with unit_of(database, read_only) as unit:
        result = await unit.session.execute(select(Book.title).order_by(Book.id))
        await asyncio.sleep(0)
        assert checked_out(database) == 0
        books = (await unit.session.scalars(select(Book).order_by(Book.id))).all()
        assert result.scalars().all() == ["one", "two"]
        assert [book.title for book in books] == ["one", "two"]
        assert (await books[0].awaitable_attrs.author).name == "ada"
        await asyncio.sleep(0)
        assert checked_out(database) == 0


@pytest.mark.parametrize("is_given", [False, True], ids=["own", "given"])
@pytest.mark.parametrize("mode", [read_only, plain], ids=lambda mode: mode.name)
async def test_a_result_outlives_a_connection_that_is_closed_as_it_goes_back(
    database: Database, database_url: str, mode: Mode, is_given: bool
) -> None:
    """A connection in overflow is closed, too. SQLAlchemy closes the cursor of a result later."""
    options: dict[str, Any] = {"poolclass": NullPool}
    if is_given:
        unpooled = Database(engine=create_async_engine(database_url, **options))
    else:
        unpooled = Database(database_url, engine_options=options)
    async with unpooled, unpooled.session(mode) as session:
        names = await session.scalars(text("SELECT name FROM author"))
        results = [
            await session.execute(text("SELECT name FROM author")),
            await session.execute(select(Author.__table__.c.name)),
            await session.execute(select(Author.name)),
        ]
        assert [result.all() for result in results] == [[("ada",)]] * 3
        assert names.all() == ["ada"]
        if not mode.read_only:
            await session.execute(text("UPDATE author SET name = 'grace'"))
            await session.execute(insert(Author).values(name="eve"))
    for opened in (unpooled, database):
        await opened.engine.dispose()
    await assert_disconnected(database_url)


# -- after the request -------------------------------------------------------------------------

Call = Callable[[DBSession], Awaitable[Any]]

CALLS: dict[str, Call] = {
    "begin": lambda session: _entered(session.begin()),
    "begin_nested": lambda session: _entered(session.begin_nested()),
    "commit": lambda session: session.commit(),
    "connection": lambda session: session.connection(),
    "delete": lambda session: session.delete(_ada(session)),
    "execute": lambda session: session.execute(select(Book)),
    "flush": lambda session: session.flush(),
    "get": lambda session: session.get(Book, 2),
    "get_one": lambda session: session.get_one(Book, 2),
    "merge": lambda session: session.merge(Book(id=2, title="merged")),
    "refresh": lambda session: session.refresh(_ada(session)),
    "rollback": lambda session: session.rollback(),
    "run_sync": lambda session: session.run_sync(lambda session: session.query(Book).all()),
    "scalar": lambda session: session.scalar(select(Book)),
    "scalars": lambda session: session.scalars(select(Book)),
    "stream": lambda session: session.stream(select(Book)),
    "stream_scalars": lambda session: session.stream_scalars(select(Book)),
}
"""Each method that may talk to the database, in a session which has loaded the author."""

if not IS_SQLALCHEMY_2_0:
    CALLS["delete_all"] = lambda session: session.delete_all([_ada(session)])
    CALLS["merge_all"] = lambda session: session.merge_all([Book(id=2, title="merged")])

LETTING_GO: dict[str, Call] = {
    "aclose": lambda session: session.aclose(),
    "close": lambda session: session.close(),
    "invalidate": lambda session: session.invalidate(),
    "release": lambda session: session.release(),
    "reset": lambda session: session.reset(),
}


async def _entered(transaction: Any) -> None:
    await transaction


def _ada(session: DBSession) -> Author:
    """The author, or another one where the session has ended and has let its objects go."""
    loaded = (each for each in session if isinstance(each, Author) and each.name == "ada")
    return next(loaded, Author(name="ada"))


def test_every_coroutine_method_of_the_session_is_among_the_calls() -> None:
    coroutines = {
        name
        for name, _ in python.getmembers(DBSession, python.iscoroutinefunction)
        if not name.startswith("_")
    }
    transactions = {"begin", "begin_nested"}  # they return something to await
    others = {"close_all", "commit_in_unit", "rollback_in_unit"}  # the last two are the unit's own
    assert coroutines | transactions == set(CALLS) | set(LETTING_GO) | others


async def ended_session(database: Database) -> tuple[DBSession, Author]:
    async with unit_of(database) as unit:
        return unit.session, await unit.session.get_one(Author, 1)


@pytest.mark.parametrize("name", CALLS)
async def test_after_the_request_every_operation_is_refused(database: Database, name: str) -> None:
    session, _ = await ended_session(database)
    with pytest.raises(SessionExpiredError) as expired:
        await CALLS[name](session)
    assert BLOCK in str(expired.value)
    assert "`async with database.session() as session:`" in str(expired.value)
    await assert_nothing_held(database)


@pytest.mark.parametrize("name", LETTING_GO)
async def test_after_the_request_letting_go_of_the_session_is_harmless(
    database: Database, name: str
) -> None:
    session, _ = await ended_session(database)
    await LETTING_GO[name](session)
    await assert_nothing_held(database)


async def test_after_the_request_what_was_loaded_can_be_read_and_nothing_else(
    database: Database,
) -> None:
    _, ada = await ended_session(database)
    assert ada.name == "ada"
    with pytest.raises(DetachedInstanceError):
        await ada.awaitable_attrs.books


# -- two tasks at once -------------------------------------------------------------------------


@dataclass(frozen=True)
class Slow:
    """An operation that waits for the database, and what must have happened before it."""

    name: str
    call: Call
    prepare: Callable[[DBSession], None] = lambda session: None


SLOW = [
    Slow("execute", CALLS["execute"]),
    Slow("scalar", CALLS["scalar"]),
    Slow("scalars", CALLS["scalars"]),
    Slow("stream", CALLS["stream"]),
    Slow("get", CALLS["get"]),
    Slow("merge", CALLS["merge"]),
    Slow("refresh", CALLS["refresh"]),
    Slow("flush", CALLS["flush"], lambda session: session.add(Author(name=uuid4_str()))),
    Slow("commit", CALLS["commit"], lambda session: session.add(Author(name=uuid4_str()))),
    Slow("rollback", CALLS["rollback"]),
    Slow(  # which flushes first
        "begin_nested",
        CALLS["begin_nested"],
        lambda session: session.add(Author(name=uuid4_str())),
    ),
    Slow("run_sync", CALLS["run_sync"]),
    Slow("lazy load", lambda session: _ada(session).awaitable_attrs.books),
    Slow("release", LETTING_GO["release"]),
]


@unread
@pytest.mark.parametrize("slow", SLOW, ids=lambda slow: slow.name)
async def test_two_tasks_at_once_are_an_error_for_each_pair_of_operations(
    database: Database, slow: Slow
) -> None:
    for name, call in CALLS.items():
        await assert_one_at_a_time(database, slow, name, call)


@unread
@pytest.mark.parametrize("slow", SLOW, ids=lambda slow: slow.name)
async def test_a_session_which_another_task_uses_cannot_be_let_go(
    database: Database, slow: Slow
) -> None:
    """It would end the session in mid-statement, which leaks or hangs in the drivers."""
    for name, call in LETTING_GO.items():
        await assert_one_at_a_time(database, slow, name, call)


async def assert_one_at_a_time(database: Database, slow: Slow, name: str, call: Call) -> None:
    async with asyncio.timeout(30), unit_of(database, success=False) as unit:
        unit.session.info["kept"] = await unit.session.get_one(Author, 1)
        slow.prepare(unit.session)
        first, second = await asyncio.gather(
            slow.call(unit.session), call(unit.session), return_exceptions=True
        )
        assert isinstance(second, ConcurrentUseError), (name, first, second)
        assert not isinstance(first, BaseException), (name, first)
        assert str(second).startswith(f"{BLOCK}: session.")
        assert "one task at a time" in str(second)
    assert checked_out(database) == 0, name


@pytest.mark.parametrize("mode", [plain, transactional, read_only], ids=lambda mode: mode.name)
async def test_two_tasks_at_once_are_an_error_also_for_the_first_statement(
    database: Database, mode: Mode
) -> None:
    async with unit_of(database, mode, success=False) as unit:
        first, second = await asyncio.gather(
            unit.session.execute(select(Book)),
            unit.session.execute(select(Book)),
            return_exceptions=True,
        )
        assert not isinstance(first, BaseException)
        assert isinstance(second, ConcurrentUseError)
    await assert_nothing_held(database)


async def test_two_tasks_one_after_the_other_are_fine(
    database: Database, database_url: str
) -> None:
    async def write(name: str) -> None:
        async with one_at_a_time:
            unit.session.add(Author(name=name))
            await unit.session.flush()

    one_at_a_time = asyncio.Lock()
    async with unit_of(database) as unit:
        await asyncio.gather(*(write(f"author {number}") for number in range(5)))
    assert len(await authors(database_url)) == 6


# -- what cannot work is refused at construction -----------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nonsense": 1}, "nonsense"),
        ({"expire_on_comit": False}, "expire_on_comit"),
        ({"autocommit": True}, "autocommit"),
        ({"join_transaction_mode": "sometimes"}, "join_transaction_mode"),
        ({"binds": {Author: "sqlite://"}}, "session_options= cannot work"),
        ({"bind": None}, "bind, .* leave it out, and use engine= of Database"),
        ({"execution_options": {"isolation_level": "AUTOCOMMIT"}}, "AUTOCOMMIT"),
    ],
    ids=str,
)
def test_session_options_that_cannot_work_are_refused(
    options: dict[str, Any], message: str, database_url: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"^session_options= .*{message}|{message}"):
        Database(database_url, session_options=options)


async def test_two_phases_are_refused_where_the_database_has_one(database_url: str) -> None:
    options = {"twophase": True}
    if "sqlite" in database_url:
        with pytest.raises(ConfigurationError, match="twophase.*leave it out"):
            Database(database_url, session_options=options)
        engine = create_async_engine(database_url)
        with pytest.raises(ConfigurationError, match="twophase.*leave it out"):
            Database(engine=engine, session_options=options)
    else:
        Database(database_url, session_options=options)


def test_two_phases_are_refused_if_one_of_the_binds_has_only_one(
    postgresql_url: str, sqlite_url: str
) -> None:
    binds = {Author: create_async_engine(sqlite_url)}
    with pytest.raises(ConfigurationError, match="twophase"):
        Database(postgresql_url, session_options={"twophase": True, "binds": binds})
