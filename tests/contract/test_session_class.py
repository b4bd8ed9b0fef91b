"""A session class of the user's own: the same contract, with the user's methods beside ours."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, Executable, Result, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from asgi_db import (
    Database,
    DBSession,
    ModeConflictError,
    ReadOnlyError,
    plain,
    read_only,
    transactional,
)
from tests.contract.endpoints import Answer, Framework
from tests.contract.site import BAD_STATEMENT, Item, Site, at_start, write
from tests.contract.test_in_a_sandbox import SandboxedSite


class Executing(Session):
    """As SQLModel's session: a method of its own calls `execute` of the class above it."""

    def exec(self, statement: Executable, **options: Any) -> Any:
        return super().execute(statement, **options)


class Routing(Executing):
    """Chooses the engine itself, as SQLAlchemy's documentation shows it."""

    def get_bind(self, *args: Any, **kwargs: Any) -> Engine | Connection:
        self.info["asked"] = self.info.get("asked", 0) + 1
        assert self.bind is not None
        return self.bind


class Shop(AsyncSession):
    """Has helper methods, an attribute from its constructor, and a `commit` that does more."""

    sync_session_class = Routing

    def __init__(self, *args: Any, tenant: str = "", **options: Any) -> None:
        super().__init__(*args, **options)
        self.tenant = tenant

    async def exec(self, statement: Executable) -> Result[Any]:
        session: Any = self.sync_session
        result: Result[Any] = await greenlet_spawn(session.exec, statement)
        return result

    async def names(self) -> list[str]:
        return [*(await self.exec(select(Item.name).order_by(Item.name))).scalars()]

    async def commit(self) -> None:
        self.add(Item(name="audit", note=self.tenant))
        await super().commit()


OPTIONS = {"class_": Shop, "tenant": "here"}


def shop(session: DBSession) -> Shop:
    assert isinstance(session, Shop)
    return session


@pytest.fixture
async def site(framework: Framework, database_url: str) -> AsyncIterator[Site]:
    async with Site.on(framework, database_url, OPTIONS) as site:
        yield site
        await site.assert_nothing_held()


async def test_handlers_get_a_session_of_the_class_with_ours_beside(site: Site) -> None:
    ran: list[str] = []

    async def order(session: DBSession) -> Answer:
        session.on_commit(lambda: ran.append("committed"))
        await write()(session)
        await session.flush()
        assert await shop(session).names() == ["a"]
        assert shop(session).tenant == "here"
        assert session.sync_session.info["asked"] > 0
        return Answer(201)

    assert (await site.answer(order, transactional)).status == 201
    assert ran == ["committed"]
    assert await site.items() == ["a", "audit"]


@pytest.mark.parametrize(
    "dependency", [plain, transactional, read_only], ids=lambda mode: mode.name
)
async def test_dependencies_give_it_too(site: Site, dependency: Any) -> None:
    async def look(session: DBSession) -> Answer:
        return Answer(200, ",".join(await shop(session).names()).encode())

    exchange = await site.answer(look, dependency=dependency)
    assert (exchange.status, exchange.body) == (200, b"")
    assert await site.items() == (["audit"] if dependency is transactional else [])


async def test_the_commit_of_the_class_is_part_of_what_the_status_line_waits_for(
    site: Site,
) -> None:
    seen: list[list[str]] = []

    async def look() -> None:
        seen.append(await site.items())

    app = site.app(write(), transactional)
    assert (await site.call(app, watch=at_start(look))).status == 200
    assert seen == [["a", "audit"]]


async def test_a_commit_by_hand_is_that_of_the_class_as_well(site: Site) -> None:
    async def order(session: DBSession) -> None:
        await write()(session)
        await session.commit()

    assert (await site.answer(order)).status == 200
    assert await site.items() == ["a", "audit"]


async def test_an_error_rolls_back(site: Site) -> None:
    async def order(session: DBSession) -> None:
        await write()(session)
        await session.flush()
        raise site.framework.http_error(Answer(409))

    assert (await site.answer(order, transactional)).status == 409
    assert await site.items() == []


async def test_a_failed_statement_in_a_method_of_the_class_is_a_failed_commit(site: Site) -> None:
    async def order(session: DBSession) -> None:
        await write()(session)
        await session.flush()
        try:
            await shop(session).exec(BAD_STATEMENT)
        except Exception:
            return

    assert (await site.answer(order, transactional)).status == 500
    assert await site.items() == []


@pytest.mark.parametrize("method", ["exec", "execute"])
async def test_its_own_engine_is_guarded_by_the_mode(site: Site, method: str) -> None:
    errors: list[type[Exception]] = []

    async def look(session: DBSession) -> None:
        insert = text("INSERT INTO item (name) VALUES ('a')")
        try:
            await getattr(session, method)(insert)
        except ReadOnlyError as error:
            errors.append(type(error))
        assert await shop(session).names() == []
        await asyncio.sleep(0)
        assert site.checked_out == 0  # in autocommit who waits holds nothing

    assert (await site.answer(look, read_only)).status == 200
    assert errors == [ReadOnlyError]


async def test_a_stronger_mode_than_that_of_the_writes_before_is_a_conflict(site: Site) -> None:
    errors: list[type[Exception]] = []

    async def order(session: DBSession) -> None:
        await write()(session)
        await session.flush()
        try:
            session.unit_of_work.ask(transactional)
        except ModeConflictError as error:
            errors.append(type(error))

    assert (await site.answer(order)).status == 200
    assert errors == [ModeConflictError]
    assert await site.items() == []


async def test_blocks_have_it(site: Site) -> None:
    async with site.database.transaction() as session:
        session.add(Item(name="a"))
    async with site.database.session(read_only) as session:
        assert await shop(session).names() == ["a", "audit"]
    async with site.database.session() as session:
        session.add(Item(name="lost"))
    assert await site.items() == ["a", "audit"]


async def test_it_is_the_same_in_a_sandbox(framework: Framework, database_url: str) -> None:
    async with SandboxedSite.on(framework, database_url, OPTIONS) as site:
        assert (await site.answer(write(), transactional)).status == 200
        assert await site.items() == ["a", "audit"]
        async with site.database.session(read_only) as session:
            assert await shop(session).names() == ["a", "audit"]
            with pytest.raises(ReadOnlyError):
                await shop(session).exec(text("DELETE FROM item"))
        assert await Site.items(site) == []


async def test_what_was_set_on_it_before_its_first_statement_stays(site: Site) -> None:
    async def before(session: DBSession) -> None:
        shop(session).tenant = "from the middleware"

    async def order(session: DBSession) -> Answer:
        await shop(session).names()
        return Answer(200, shop(session).tenant.encode())

    exchange = await site.answer(order, before=before)
    assert (exchange.status, exchange.body) == (200, b"from the middleware")


async def test_an_unused_session_is_not_made(framework: Framework, sqlite_url: str) -> None:
    made: list[object] = []

    class Counting(AsyncSession):
        def __init__(self, *args: Any, **options: Any) -> None:
            made.append(self)
            super().__init__(*args, **options)

    async def idle(session: DBSession) -> None:
        assert isinstance(session, Counting)

    async with Site.on(framework, sqlite_url, {"class_": Counting}) as site:
        made.clear()
        assert (await site.answer(idle, transactional)).status == 200
        assert made == []


def test_a_database_for_a_class_of_sessions_is_made_without_an_event_loop(sqlite_url: str) -> None:
    options: Mapping[str, Any] = {"class_": Shop, "sync_session_class": Executing}
    session_class: Any = Database(sqlite_url, session_options=options).session_class
    assert issubclass(session_class, Shop) and issubclass(session_class, DBSession)
    assert issubclass(session_class.sync_session_class, Executing)
    assert not issubclass(session_class.sync_session_class, Routing)
