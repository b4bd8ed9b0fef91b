"""A transaction that lost a conflict with another one: a 503 that says so, and may be repeated."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, OperationalError

from asgi_db import (
    Database,
    DatabaseConflictError,
    DBSession,
    FailedTransactionError,
    Mode,
    UnavailableError,
    plain,
    transactional,
)
from tests.contract.client import Exchange, assert_refused, call
from tests.contract.endpoints import Answer, Framework, Work
from tests.contract.site import Item, Site, write
from tests.servers import outside

LOCK_ITEM = "UPDATE item SET note = 'theirs' WHERE name = 'shared'"
OUR_UPDATE = text("UPDATE item SET note = 'ours' WHERE name = 'shared'")
TEAPOT = Answer(418, b"tea instead")


@pytest.fixture
async def contended(framework: Framework, database_url: str) -> AsyncGenerator[Site]:
    """The framework on each database, which does not wait for locks, with an item that is there."""
    short = {"sqlite": "?timeout=0.05"}.get(database_url.partition("+")[0], "")
    async with Site.on(framework, database_url) as site:
        await site.from_outside("INSERT INTO item VALUES ('shared', NULL)")
        async with Database(f"{database_url}{short}") as database:
            yield Site(framework, database_url, database)


@asynccontextmanager
async def locked(site: Site) -> AsyncGenerator[None]:
    """Somebody else has the item, and does not let go."""
    async with outside(site.url) as other:
        await other.execute("BEGIN IMMEDIATE" if "sqlite" in site.url else "BEGIN")
        await other.execute(LOCK_ITEM)
        yield
        await other.execute("ROLLBACK")


async def lost(site: Site, work: Work, mode: Mode = transactional, **options: Any) -> Exchange:
    """Serve a request beside somebody else who has locked the item."""
    async with locked(site):
        exchange = await call(site.app(work, mode, **options))
    await site.assert_nothing_held()
    return exchange


async def do_not_wait(session: DBSession) -> None:
    """Wait for locks as briefly as each database lets one say."""
    name = session.get_bind().dialect.name
    if name == "mysql":
        await session.execute(text("SET innodb_lock_wait_timeout = 0"))
    elif name == "postgresql":
        await session.execute(text("SET LOCAL lock_timeout = '20ms'"))


async def lose(session: DBSession) -> None:
    """Write what somebody else has locked."""
    await do_not_wait(session)
    await session.execute(OUR_UPDATE)


async def lose_in_the_commit(session: DBSession) -> None:
    await do_not_wait(session)
    (await session.get_one(Item, "shared")).note = "ours"


async def lose_in_a_flush(session: DBSession) -> None:
    await lose_in_the_commit(session)
    await session.flush()


async def lose_on_the_connection(session: DBSession) -> None:
    await do_not_wait(session)
    await (await session.connection()).execute(OUR_UPDATE)


async def lose_and_swallow_it(session: DBSession) -> None:
    with suppress(DBAPIError):
        await lose(session)


WAYS: list[Work] = [
    lose,
    lose_in_the_commit,
    lose_in_a_flush,
    lose_on_the_connection,
    lose_and_swallow_it,
]
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
placements = pytest.mark.parametrize("around", [False, True], ids=["inside", "around"])


@ways
@pytest.mark.parametrize("mode", [transactional, transactional(retries=1)], ids=["once", "retries"])
async def test_a_conflict_that_is_not_or_no_more_retried_is_refused(
    contended: Site, way: Work, mode: Mode
) -> None:
    assert_refused(await lost(contended, way, mode), "conflict")


@placements
async def test_around_the_application_too(contended: Site, around: bool) -> None:
    assert_refused(await lost(contended, lose, around=around), "conflict")


async def test_in_plain_it_is_refused_too(contended: Site) -> None:
    assert_refused(await lost(contended, lose, plain), "conflict")


@pytest.mark.parametrize(
    "handled", [DatabaseConflictError, UnavailableError, OperationalError, DBAPIError]
)
async def test_a_handler_of_the_application_wins(contended: Site, handled: type[Exception]) -> None:
    handlers: Any = {handled: TEAPOT}
    exchange = await lost(contended, lose, handlers=handlers)
    assert (exchange.status, exchange.body, exchange.error) == (418, b"tea instead", None)


async def test_a_handler_of_a_swallowed_conflict_wins_also_with_a_500(contended: Site) -> None:
    if contended.framework.name == "asgi":
        return  # which says nothing of its handlers
    handlers: Any = {FailedTransactionError: Answer(500, b"mine")}
    exchange = await lost(contended, lose_and_swallow_it, handlers=handlers)
    assert (exchange.status, exchange.body) == (500, b"mine")


async def test_the_error_has_the_one_of_the_driver_and_names_the_route_and_the_remedy(
    contended: Site,
) -> None:
    async def look(session: DBSession) -> Answer:
        with pytest.raises(DatabaseConflictError) as caught:
            await lose(session)
        assert isinstance(caught.value, OperationalError)
        assert type(caught.value.orig).__module__.partition(".")[0] in (
            "sqlalchemy",
            "psycopg",
            "asyncmy",
            "sqlite3",
        )
        return Answer(400, str(caught.value).encode())

    exchange = await lost(contended, look)
    assert exchange.status == 400
    assert exchange.body.startswith(b"POST /") and b"retries=" in exchange.body


async def test_after_a_commit_by_hand_nobody_is_told_to_try_again(contended: Site) -> None:
    async def commit_and_lose(session: DBSession) -> None:
        await write()(session)
        await session.commit()
        async with locked(contended):
            await lose(session)

    exchange = await contended.answer(commit_and_lose, plain)
    assert exchange.status == 500
    assert await contended.items() == ["a", "shared"]


async def test_a_lock_that_is_free_again_is_had_in_the_next_attempt(contended: Site) -> None:
    attempts = list[int]()

    async def try_again(session: DBSession) -> Answer:
        attempts.append(session.attempt)
        if session.attempt == 1:
            async with locked(contended):
                await lose(session)
        await session.execute(OUR_UPDATE)
        return Answer(201)

    exchange = await contended.answer(try_again, transactional(retries=1))
    assert (exchange.status, attempts) == (201, [1, 2])


async def test_nowait_is_a_conflict(framework: Framework, postgresql_url: str) -> None:
    async def nowait(session: DBSession) -> None:
        await session.execute(text("SELECT * FROM item WHERE name = 'shared' FOR UPDATE NOWAIT"))

    async with Site.on(framework, postgresql_url) as site:
        await site.from_outside("INSERT INTO item VALUES ('shared', NULL)")
        assert_refused(await lost(site, nowait), "conflict")
