"""The class of a database's sessions: what can be joined with ours, and what is refused."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, insert, inspect, select
from sqlalchemy.ext.asyncio import (
    AsyncAttrs,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session

from asgi_db import (
    ConcurrentUseError,
    ConfigurationError,
    Database,
    DBSession,
    ReadOnlyError,
    SandboxError,
    read_only,
    transactional,
)
from tests.internals import MOST_VARIANTS
from tests.pools import checked_out
from tests.servers import assert_idle
from tests.sockets import websocket
from tests.tables import Author, Base, Book, authors
from tests.test_websockets import Line, every_framework


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncGenerator[Database]:
    async with Database(url, session_options=options) as database:
        await database.create_tables(Base.metadata)
        yield database
        assert checked_out(database) == 0
        await assert_idle(url)


# -- what is taken -----------------------------------------------------------------------------


class Own(AsyncSession):
    """Derives from SQLAlchemy's."""


class Helping(Session):
    """What is to be found, wherever our own class stands."""


class OwnWithSync(AsyncSession):
    sync_session_class = Helping


class BothWithSync(DBSession, OwnWithSync):
    """Derives from ours as well, and names its synchronous class further down."""


class Both(DBSession, Own):
    """Derives from ours as well, for the type checkers."""

    async def release(self) -> None:
        await super().release()


@pytest.mark.parametrize("class_", [Own, Both])
async def test_sessions_are_of_the_class_and_of_ours(
    class_: type[AsyncSession], sqlite_url: str
) -> None:
    async with opened(sqlite_url, class_=class_) as database, database.transaction() as session:
        assert isinstance(session, class_)
        assert isinstance(session, DBSession)
        assert type(session).__name__ == class_.__name__
        session.add(Author(name="a"))
        await session.commit()
        await session.release()


@pytest.mark.parametrize("class_", [OwnWithSync, BothWithSync])
def test_the_synchronous_class_is_that_of_the_class(class_: type[AsyncSession]) -> None:
    session_class = Database("sqlite://", session_options={"class_": class_}).session_class
    assert issubclass(session_class.sync_session_class, Helping)


@pytest.mark.parametrize(
    "options",
    [
        {"class_": AsyncSession},
        {"class_": DBSession},
        {"class_": None},
        {"sync_session_class": Session},
    ],
    ids=str,
)
def test_the_classes_that_are_used_anyway_change_nothing(options: dict[str, Any]) -> None:
    assert Database("sqlite://", session_options=options).session_class is DBSession


async def test_the_options_of_the_class_reach_its_constructor(sqlite_url: str) -> None:
    class Tenant(AsyncSession):
        def __init__(self, bind: AsyncEngine | None = None, *, tenant: str, **options: Any) -> None:
            super().__init__(bind, **options)
            self.tenant = tenant

    async with opened(sqlite_url, class_=Tenant, tenant="t") as database:
        async with database.session() as session:
            assert getattr(session, "tenant") == "t"  # noqa: B009
            assert not hasattr(session, "missing")


current = contextvars.ContextVar[str]("current")


async def test_a_constructor_may_need_what_is_there_only_in_a_request(sqlite_url: str) -> None:
    class Tenant(AsyncSession):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.tenant = current.get()

    async with opened(sqlite_url, class_=Tenant) as database, database.session() as session:
        current.set("t")
        assert getattr(session, "tenant") == "t"  # noqa: B009


@every_framework
async def test_websockets_have_it(framework: Any, sqlite_url: str) -> None:
    class Named(AsyncSession):
        async def names(self) -> str:
            return ",".join(await self.scalars(select(Author.name)))

    async def talk(line: Line) -> None:
        while True:
            name = await line.receive()
            assert isinstance(line.session, Named)
            line.session.add(Author(name=name))
            await line.session.flush()
            await line.send(await line.session.names())

    async with opened(sqlite_url, class_=Named) as database:
        async with websocket(framework(database, talk, transactional)) as socket:
            assert await socket.ask("a") == "a"
            assert await authors(sqlite_url) == ["a"]
            assert await socket.ask("b") == "a,b"


# -- overridden operations ---------------------------------------------------------------------


async def test_overridden_operations_run_inside_the_unit(database_url: str) -> None:
    class Sync(Session):
        def flush(self, objects: Any = None) -> None:
            for author in self.new:
                author.name = author.name.upper()
            super().flush(objects)

        def execute(self, *args: Any, **options: Any) -> Any:
            return Session.execute(self, *args, **options)  # past the class above it

    class Async(AsyncSession):
        async def rollback(self) -> None:
            self.info["rolled back"] = True
            await super().rollback()

    async with opened(database_url, class_=Async, sync_session_class=Sync) as database:
        async with database.transaction() as session:
            session.add(Author(name="a"))
        async with database.session(read_only) as session:
            with pytest.raises(ReadOnlyError):
                await session.execute(insert(Author).values(name="b"))
            assert (await session.scalars(select(Author.name))).all() == ["A"]
        with pytest.raises(ZeroDivisionError):
            async with database.transaction() as session:
                session.add(Author(name="c"))
                await session.flush()
                raise ZeroDivisionError
        assert session.info["rolled back"]
        async with database.transaction() as session:
            await asyncio.gather(
                session.scalars(select(Author)),
                expect_concurrent_use(session),
            )
    assert await authors(database_url) == ["A"]


async def expect_concurrent_use(session: AsyncSession) -> None:
    with pytest.raises(ConcurrentUseError):
        await session.scalars(select(Author))


async def test_a_commit_that_commits_nothing_is_a_failed_commit(database_url: str) -> None:
    class Flushing(AsyncSession):
        async def commit(self) -> None:
            await self.flush()

    async with opened(database_url, class_=Flushing) as database:
        with pytest.raises(ConfigurationError, match=r"commit\(\) .*Flushing .*super\(\).commit"):
            async with database.transaction() as session:
                session.add(Author(name="a"))
        async with database.session() as session:
            session.add(Author(name="b"))
            with pytest.raises(ConfigurationError, match="super"):
                await session.commit()
    assert await authors(database_url) == []


async def test_a_rollback_that_rolls_nothing_back_costs_the_connection(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Ignoring(AsyncSession):
        async def rollback(self) -> None:
            pass

    async with opened(database_url, class_=Ignoring) as database:
        with pytest.raises(ZeroDivisionError):
            async with database.transaction() as session:
                session.add(Author(name="a"))
                await session.flush()
                raise ZeroDivisionError
        await assert_idle(database_url)
    assert "rollback() of the session class Ignoring" in caplog.text
    assert await authors(database_url) == []


async def test_a_rollback_by_hand_may_go_on_with_a_statement(database_url: str) -> None:
    class Noting(AsyncSession):
        async def rollback(self) -> None:
            await super().rollback()
            await self.execute(insert(Author).values(name="rolled back"))

    async with opened(database_url, class_=Noting) as database:
        async with database.transaction() as session:
            session.add(Author(name="a"))
            await session.flush()
            await session.rollback()
    assert await authors(database_url) == ["rolled back"]


async def test_a_commit_may_not_go_on_with_a_statement(database_url: str) -> None:
    class Noting(AsyncSession):
        async def commit(self) -> None:
            await super().commit()
            await self.execute(insert(Author).values(name="committed"))

    async with opened(database_url, class_=Noting) as database:
        with pytest.raises(ConfigurationError, match="has left a transaction open"):
            async with database.transaction() as session:
                session.add(Author(name="a"))
        async with database.session() as session:
            session.add(Author(name="b"))
            with pytest.raises(ConfigurationError, match="has left a transaction open"):
                await session.commit()
    assert await authors(database_url) == ["a", "b"]


async def test_a_statement_that_goes_past_the_session_is_refused(sqlite_url: str) -> None:
    class Past(Session):
        def names(self) -> list[str]:
            return [*Session.scalars(self, select(Author.name))]

    def names(session: Any) -> list[str]:
        found: list[str] = session.names()
        return found

    async with opened(sqlite_url, sync_session_class=Past) as database:
        async with database.session(read_only) as session:
            with pytest.raises(ConfigurationError, match=r"Past .*self.execute"):
                await session.run_sync(names)
            assert (await session.scalars(select(Author.name))).all() == []


# -- an engine of its own choice ---------------------------------------------------------------


async def test_a_session_that_routes_to_two_engines_is_guarded_on_both(
    postgresql_url: str, mysql_url: str
) -> None:
    other = create_async_engine(mysql_url)

    class Routing(Session):
        def get_bind(self, mapper: Any = None, **options: Any) -> Engine | Connection:
            if inspect(mapper) is inspect(Author):
                return other.sync_engine
            return super().get_bind(mapper, **options)

    async with opened(postgresql_url, sync_session_class=Routing) as database:
        async with Database(mysql_url) as second:
            await second.create_tables(Base.metadata)
        async with database.transaction() as session:
            session.add(Author(name="a"))
            await session.flush()
            assert (await session.scalars(select(Book.title))).all() == []
        with pytest.raises(ZeroDivisionError):
            async with database.transaction() as session:
                session.add(Author(name="b"))
                await session.flush()
                raise ZeroDivisionError
        async with database.session(read_only) as session:
            assert (await session.scalars(select(Author.name))).all() == ["a"]
            with pytest.raises(ReadOnlyError):
                await session.execute(insert(Author).values(name="c"))
            assert session.get_bind(Author) is not session.get_bind(Book)
        with database.sandbox():
            async with database.session() as session:
                assert (await session.scalars(select(Book.title))).all() == []
                with pytest.raises(SandboxError, match="bind it to the engine of the Database"):
                    await session.scalars(select(Author.name))
    assert await authors(mysql_url) == ["a"]
    await assert_idle(mysql_url)
    await other.dispose()


async def test_an_engine_made_anew_for_each_statement_fills_no_memory(sqlite_url: str) -> None:
    class Tenants(Session):
        def get_bind(self, *args: Any, **options: Any) -> Engine | Connection:
            engine = super().get_bind(*args, **options)
            return engine.execution_options(schema_translate_map={"tenant": None})

    async with opened(sqlite_url, sync_session_class=Tenants) as database:
        for number in range(MOST_VARIANTS + 5):
            async with database.transaction() as session:
                await session.execute(insert(Author).values(name=str(number)))
        assert len(database.life._variants) <= MOST_VARIANTS  # pyright: ignore[reportPrivateUsage]


# -- what is refused ---------------------------------------------------------------------------


class NoOptions(AsyncSession):
    def __init__(self, bind: Any = None) -> None:
        super().__init__(bind)


class NoOptionsSync(Session):
    def __init__(self, bind: Any = None, binds: Any = None, autoflush: Any = None) -> None:
        super().__init__(bind)


class Silent(AsyncSession):
    def __init__(self, **options: Any) -> None:
        pass


class OwnSync(AsyncSession):
    def __init__(self, bind: Any = None, **options: Any) -> None:
        options.pop("unit_of_work")
        super().__init__(bind, **options, sync_session_class=Session)


class Released(AsyncSession):
    async def release(self) -> None: ...


class WithUnit(DBSession):
    unit = None


class Begun(AsyncSession):
    def begin_nested(self) -> Any:
        return super().begin_nested()


class Forwarding(AsyncSession):
    def __getattr__(self, name: str) -> str:
        return name


class CommitAbove(DBSession):
    async def commit(self) -> None: ...


class Entering(Session):
    def enter(self) -> None: ...


class Final(AsyncSession):
    def __init_subclass__(cls) -> None:
        raise TypeError("Final is final")


class FinalSync(Session):
    def __init_subclass__(cls) -> None:
        raise TypeError("FinalSync is final")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_": Session}, "class_, and Session is no class that derives from .* AsyncSession"),
        ({"class_": lambda: None}, "class_, and a function is no class"),
        ({"class_": async_sessionmaker()}, "class_, and a async_sessionmaker is no class"),
        ({"class_": async_scoped_session}, "class_, and async_scoped_session is no class"),
        ({"class_": AsyncAttrs}, "class_, and AsyncAttrs is no class"),
        ({"sync_session_class": AsyncSession}, "sync_session_class, and AsyncSession is no class"),
        ({"sync_session_class": lambda: None}, "sync_session_class, and a function is no class"),
        ({"class_": NoOptions}, "__init__ of NoOptions.*\\*\\*options"),
        ({"sync_session_class": NoOptionsSync}, "sync_session_class, does not take all"),
        ({"class_": Silent}, "the __init__ of Silent .*super"),
        ({"class_": OwnSync}, "the __init__ of OwnSync .*sync_session_class is an option"),
        ({"class_": Own, "tenant": "t"}, "tenant"),
        ({"class_": Released}, "Released defines release, .*give it another name"),
        ({"class_": WithUnit}, "WithUnit defines unit, .*give it another name"),
        ({"class_": Begun}, "Begun defines begin_nested, .*leave it out"),
        ({"class_": Forwarding}, "Forwarding defines __getattr__, .*leave it out"),
        ({"class_": CommitAbove}, "CommitAbove defines commit, .*derives from AsyncSession"),
        ({"sync_session_class": Entering}, "Entering defines enter, .*give it another name"),
        ({"class_": Final}, "Final .*Final is final"),
        ({"sync_session_class": FinalSync}, "FinalSync .*FinalSync is final"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_class_that_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^session_options= .*{message}"):
        Database("sqlite://", session_options=options)


def test_a_session_class_is_not_made_by_hand() -> None:
    session_class: Any = Database("sqlite://", session_options={"class_": Own}).session_class
    with pytest.raises(ConfigurationError, match="not made by hand"):
        session_class()
