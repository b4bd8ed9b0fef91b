"""Litestar resolves independent providers side by side: they take turns with the session."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from litestar import Litestar, Response, post
from litestar.background_tasks import BackgroundTask, BackgroundTasks
from litestar.di import Provide
from sqlalchemy import text

from asgi_db import DBSession, Mode, plain, read_only, transactional
from asgi_db.errors import ConcurrentUseError
from asgi_db_litestar import DatabasePlugin
from tests.contract.apps import InLitestar
from tests.contract.site import Item, Site
from tests.versions import NamedDependency

pytestmark = pytest.mark.parametrize("framework", [InLitestar()], ids=["litestar"])

Session = NamedDependency[DBSession]
Number = NamedDependency[int]
MODES = [plain, transactional, read_only]
by_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)


async def number(session: DBSession, of: int) -> int:
    """Ask the database, more than once."""
    for _ in range(3):
        await session.scalar(text("SELECT 1"))
    return int(await session.scalar(text(f"SELECT {of}")) or 0)


async def one(db_session: Session) -> int:
    """A provider that asks the database."""
    return await number(db_session, 1)


async def two(db_session: Session) -> int:
    """Another one, which knows nothing of the first."""
    return await number(db_session, 2)


async def three(db_session: Session) -> AsyncGenerator[int]:
    """A third, which asks again when it is all over."""
    yield await number(db_session, 3)
    await number(db_session, 3)


async def four(db_session: Session) -> AsyncGenerator[int]:
    """A fourth, whose end runs beside that of the third."""
    yield await number(db_session, 4)
    await number(db_session, 4)


PROVIDERS: dict[str, Any] = {"one": one, "two": two, "three": three, "four": four}


def app_of(site: Site, handler: Any, mode: Any = plain, **providers: Any) -> Litestar:
    """An application with one handler and these providers."""
    return Litestar(
        [post("/")(mode(handler))],
        plugins=[DatabasePlugin(site.database)],
        dependencies={name: Provide(provider) for name, provider in providers.items()},
        openapi_config=None,
        logging_config=None,
    )


@by_mode
async def test_providers_that_query_side_by_side_take_turns(site: Site, mode: Mode) -> None:
    async def add(one: Number, two: Number, three: Number, four: Number) -> str:
        return f"{one}{two}{three}{four}"

    app = app_of(site, add, mode, **PROVIDERS)
    for _ in range(5):
        exchange = await site.call(app)
        assert (exchange.status, exchange.body) == (201, b"1234")


async def test_providers_that_write_and_use_savepoints_and_release_take_turns(site: Site) -> None:
    async def write(db_session: Session) -> int:
        async with db_session.begin_nested():
            db_session.add(Item(name="a"))
            await db_session.flush()
        return await number(db_session, 1)

    async def write_too(db_session: Session) -> int:
        async with db_session.begin_nested():
            db_session.add(Item(name="b"))
        return await number(db_session, 2)

    async def add(one: Number, two: Number, db_session: Session) -> str:
        db_session.add(Item(name="c"))
        return f"{one}{two}"

    exchange = await site.call(app_of(site, add, transactional, one=write, two=write_too))
    assert (exchange.status, exchange.body) == (201, b"12")
    assert await site.items() == ["a", "b", "c"]


async def test_providers_that_commit_by_hand_and_release_take_turns(site: Site) -> None:
    async def write(db_session: Session) -> int:
        await db_session.execute(text("INSERT INTO item (name) VALUES ('a')"))
        await db_session.commit()
        return 1

    async def read(db_session: Session) -> int:
        await db_session.execute(text("INSERT INTO item (name) VALUES ('b')"))
        await db_session.commit()
        await number(db_session, 2)
        await db_session.release()
        return await number(db_session, 2)

    async def add(one: Number, two: Number) -> str:
        return f"{one}{two}"

    exchange = await site.call(app_of(site, add, plain, one=write, two=read))
    assert (exchange.status, exchange.body) == (201, b"12")
    assert await site.items() == ["a", "b"]


async def test_background_tasks_which_litestar_runs_side_by_side_take_turns(site: Site) -> None:
    async def insert(session: DBSession, name: str) -> None:
        await number(session, 1)
        await session.execute(text(f"INSERT INTO item (name) VALUES ('{name}')"))

    async def add(db_session: Session) -> Response[str]:
        tasks = [BackgroundTask(insert, db_session, name) for name in "abc"]
        return Response("", background=BackgroundTasks(tasks, run_in_task_group=True))

    assert (await site.call(app_of(site, add, transactional))).status == 201
    assert await site.items() == ["a", "b", "c"]


async def test_a_provider_that_fails_ends_the_others_which_wait_for_their_turn(site: Site) -> None:
    async def fail(db_session: Session) -> int:
        await number(db_session, 1)
        raise ZeroDivisionError

    async def add(one: Number, two: Number, three: Number) -> str:
        return f"{one}{two}{three}"

    app = app_of(site, add, transactional, one=fail, two=two, three=one)
    assert (await site.call(app)).status == 500

    async def answer(one: Number) -> str:
        return f"{one}"

    assert (await site.call(app_of(site, answer, plain, one=one))).body == b"1"


async def test_two_tasks_of_the_users_own_stay_an_error_in_a_provider(site: Site) -> None:
    errors: list[str] = []

    async def both(db_session: Session) -> int:
        try:
            await asyncio.gather(number(db_session, 1), number(db_session, 2))
        except ConcurrentUseError as error:
            errors.append(str(error))
            raise
        return 1

    async def add(one: Number) -> str:
        return f"{one}"

    assert (await site.call(app_of(site, add, plain, one=both))).status == 500
    (message,) = errors
    assert "one task at a time" in message
