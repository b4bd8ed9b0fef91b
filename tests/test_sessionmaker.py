"""`database.sessionmaker`: an `async_sessionmaker` for libraries, whose sessions are ours."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)

from asgi_db import (
    ConcurrentUseError,
    ConfigurationError,
    Database,
    DatabaseBusyError,
    DBSession,
)
from tests.pools import checked_out
from tests.servers import assert_disconnected, assert_idle, run
from tests.tables import Author, Base, authors


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.3}
    async with Database(database_url, engine_options=options) as database:
        await database.create_tables(Base.metadata)
        yield database
        assert checked_out(database) == 0
        await assert_idle(database_url)


# -- what libraries do with it -----------------------------------------------------------------


def test_libraries_take_it_for_what_it_is() -> None:
    """As sqladmin and starlette-admin look at it, at import and before any event loop."""
    database = Database("sqlite://")
    maker = database.sessionmaker
    assert maker is database.sessionmaker
    assert isinstance(maker, async_sessionmaker)
    assert AsyncSession in maker.class_.__mro__
    assert issubclass(maker.class_, DBSession)
    assert maker.kw == {"bind": None, "autoflush": False, "expire_on_commit": False}
    assert repr(maker).startswith("SessionMaker(class_='DBSession', ")
    maker.configure(autoflush=True, autocommit=False)
    assert isinstance(maker(), AsyncSession)
    assert database.session_options == {"autoflush": False, "expire_on_commit": False}
    assert database.engines() == []


async def test_a_block_commits_by_hand(database: Database, database_url: str) -> None:
    async with database.sessionmaker() as session:
        session.add(Author(name="a"))
        await session.commit()
        session.add(Author(name="b"))
        await session.flush()
        author = await session.scalar(select(Author).where(Author.name == "a"))
    assert await authors(database_url) == ["a"]
    assert author is not None and author.name == "a" and author not in session


async def test_lost_work_is_not_silent(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    async with database.sessionmaker() as session:
        session.add(Author(name="a"))
        await session.flush()
    assert "`database.sessionmaker()`: uncommitted work was rolled back" in caplog.text
    caplog.clear()
    with pytest.raises(ZeroDivisionError):
        async with database.sessionmaker() as session:
            session.add(Author(name="a"))
            await session.flush()
            raise ZeroDivisionError
    assert caplog.text == ""


async def test_begin_commits_or_rolls_back(database: Database, database_url: str) -> None:
    ran: list[str] = []
    async with database.sessionmaker.begin() as session:
        session.add(Author(name="a"))
        session.on_commit(lambda: ran.append("committed"))
        session.on_commit(lambda: ran.append("late"), when="after_response")
    with pytest.raises(ZeroDivisionError):
        async with database.sessionmaker.begin() as session:
            session.on_rollback(lambda: ran.append("rolled back"))
            session.add(Author(name="b"))
            await session.flush()
            raise ZeroDivisionError
    assert await authors(database_url) == ["a"]
    assert ran == ["committed", "late", "rolled back"]


async def test_a_block_inside_a_session_commits(database: Database, database_url: str) -> None:
    async with database.sessionmaker() as session, session.begin():
        session.add(Author(name="a"))
    assert await authors(database_url) == ["a"]


async def test_without_a_block_the_user_closes(database: Database, database_url: str) -> None:
    session = database.sessionmaker()
    await session.close()  # before it was used
    session.add(Author(name="a"))
    await session.commit()
    author = await session.scalar(select(Author))
    assert checked_out(database) == 1
    await session.close()
    assert checked_out(database) == 0 and author not in session
    session.add(Author(name="b"))
    await session.flush()
    await session.close()
    session.add(Author(name="c"))  # it may be used again
    await session.commit()
    await session.aclose()
    assert await authors(database_url) == ["a", "c"]


async def test_its_own_close_is_called(sqlite_url: str) -> None:
    closed: list[object] = []

    class Closing(AsyncSession):
        async def close(self) -> None:
            closed.append(self)
            await super().close()

    async with Database(sqlite_url, session_options={"class_": Closing}) as database:
        async with database.sessionmaker() as session:
            assert isinstance(session, Closing)
            await session.execute(text("SELECT 1"))
    assert closed == [session]


async def test_options_of_one_session(database: Database) -> None:
    maker = database.sessionmaker
    async with maker(expire_on_commit=True, info={"a": 1}) as session:
        session.add(author := Author(name="a"))
        await session.commit()
        assert session.info == {"a": 1}
        assert "name" not in vars(author)
    async with maker() as session:
        assert session.info == {}
        author = (await session.scalars(select(Author))).one()
        await session.commit()
        assert author.name == "a"


async def test_a_scoped_session(database: Database, database_url: str) -> None:
    scoped = async_scoped_session(database.sessionmaker, scopefunc=asyncio.current_task)
    scoped.add(Author(name="a"))
    await scoped.commit()
    await scoped.remove()
    assert await authors(database_url) == ["a"]


# -- its sessions are ours ---------------------------------------------------------------------


async def test_they_are_counted(database: Database) -> None:
    async with database.sessionmaker() as session:
        await session.execute(text("SELECT 1"))
        assert [holder.route for holder in database.stats().holders] == [
            "`database.sessionmaker()`"
        ]
    async with database.sessionmaker.begin() as session:
        session.add(Author(name="a"))
    routes = database.stats().routes
    assert routes["`database.sessionmaker()`"].statements == 1
    assert routes["`database.sessionmaker.begin()`"].committed == 1


async def test_two_tasks_at_once_are_refused(database: Database) -> None:
    async with database.sessionmaker() as session:
        reading = asyncio.ensure_future(session.scalars(select(Author)))
        await asyncio.sleep(0)
        with pytest.raises(ConcurrentUseError):
            await session.scalars(select(Author))
        with pytest.raises(ConcurrentUseError):
            await session.close()
        assert (await reading).all() == []


async def test_a_full_pool_is_told(database: Database) -> None:
    async with database.sessionmaker() as session:
        await session.execute(text("SELECT 1"))
        with pytest.raises(DatabaseBusyError):
            async with database.sessionmaker() as second:
                await second.execute(text("SELECT 1"))


async def test_a_sandbox_undoes_what_they_write(database: Database, database_url: str) -> None:
    async with database.sandbox():
        async with database.sessionmaker.begin() as session:
            session.add(Author(name="a"))
        async with database.sessionmaker() as session:
            assert (await session.scalars(select(Author.name))).all() == ["a"]
    assert await authors(database_url) == []


def test_one_maker_serves_one_event_loop_after_the_other(database_url: str) -> None:
    database = Database(database_url)
    maker = database.sessionmaker
    early = maker()

    async def use(session: AsyncSession, name: str) -> None:
        async with database:
            await database.create_tables(Base.metadata)
            async with session:
                session.add(Author(name=name))
                await session.commit()

    run(use(early, "a"))
    run(use(maker(), "b"))

    async def names() -> list[str]:
        await assert_disconnected(database_url)
        return await authors(database_url)

    assert run(names()) == ["a", "b"]


async def test_nothing_leads_to_a_session_that_was_closed(sqlite_url: str) -> None:
    async with Database(sqlite_url) as database:
        await database.create_tables(Base.metadata)
        async with database.sessionmaker.begin() as session:
            session.add(Author(name="a"))
        witness = weakref.ref(session)
        del session
        gc.collect()
        assert witness() is None


# -- cancelled ---------------------------------------------------------------------------------


SLEEP = {"postgresql": "SELECT pg_sleep(30)", "mysql": "SELECT SLEEP(30)"}


async def in_a_block(maker: async_sessionmaker[DBSession], sleep: str) -> None:
    async with maker() as session:
        await session.execute(insert(Author).values(name="lost"))
        await session.execute(text(sleep))


async def in_begin(maker: async_sessionmaker[DBSession], sleep: str) -> None:
    async with maker.begin() as session:
        await session.execute(insert(Author).values(name="lost"))
        await session.execute(text(sleep))


async def by_hand(maker: async_sessionmaker[DBSession], sleep: str) -> None:
    session = maker()
    try:
        await session.execute(insert(Author).values(name="lost"))
        await session.execute(text(sleep))
    finally:
        await session.close()


@pytest.mark.parametrize("use", [in_a_block, in_begin, by_hand])
@pytest.mark.parametrize("database_url", ["postgresql", "mysql"], indirect=True)
async def test_a_cancelled_session_leaves_nothing(
    database: Database, database_url: str, use: Any
) -> None:
    sleep = SLEEP[database_url.partition("+")[0]]
    with anyio.move_on_after(0.3) as scope:  # which cancels again at each await
        await use(database.sessionmaker, sleep)
    assert scope.cancelled_caught
    assert checked_out(database) == 0
    await assert_idle(database_url)
    async with asyncio.timeout(10):
        task = asyncio.ensure_future(use(database.sessionmaker, sleep))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert checked_out(database) == 0
    await assert_idle(database_url)
    async with database.sessionmaker.begin() as session:  # the one connection works
        session.add(Author(name="a"))
    assert await authors(database_url) == ["a"]


# -- what is refused ---------------------------------------------------------------------------


def test_a_bind_of_ones_own_is_refused(sqlite_url: str) -> None:
    maker = Database(sqlite_url).sessionmaker
    engine: AsyncEngine = create_async_engine(sqlite_url)
    with pytest.raises(ConfigurationError, match="leave out bind="):
        maker(bind=engine)
    with pytest.raises(ConfigurationError, match="leave out bind="):
        maker.configure(bind=engine)
    with pytest.raises(ConfigurationError, match="nonsense"):
        maker.configure(nonsense=1)
    maker.configure(bind=None)
    assert "nonsense" not in maker.kw


def test_without_asyncio_it_says_so(sqlite_url: str) -> None:
    session = Database(sqlite_url).sessionmaker()
    with pytest.raises(ConfigurationError, match="asyncio"):
        session.add(Author(name="a"))
