"""What the server itself ends: long statements, idle connections, and plans that DDL changed."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_db import Database, DatabaseTimeoutError, DBSession, Mode, plain, read_only, transactional
from tests.contract.client import assert_refused
from tests.contract.endpoints import Answer, Framework, Work
from tests.contract.site import Item, Site
from tests.drivers import prepares_at_once, server_settings, until_closed

modes = pytest.mark.parametrize(
    "mode",
    [plain, transactional, read_only, read_only(snapshot=True)],
    ids=["plain", "transactional", "read_only", "snapshot"],
)
ITEMS = text("SELECT * FROM item ORDER BY name")


# -- a limit of time for a statement -----------------------------------------------------------


async def sleep_too_long(session: DBSession) -> None:
    """Sleep for longer than the limit that was set for the connection."""
    is_postgresql = session.get_bind().dialect.name == "postgresql"
    await session.execute(text("SELECT pg_sleep(60)" if is_postgresql else "SELECT SLEEP(60)"))


@asynccontextmanager
async def limited(framework: Framework, url: str) -> AsyncGenerator[Site]:
    """A site whose server lets a statement run for 0.1 s."""
    options: dict[str, Any] = (
        server_settings(url, statement_timeout="100ms")
        if "postgresql" in url
        else {"init_command": "SET max_statement_time = 0.1"}
    )
    async with (
        Site.on(framework, url),
        Database(url, engine_options={"connect_args": options}) as database,
    ):
        yield Site(framework, url, database)


@modes
async def test_a_statement_that_the_server_ends_for_its_time_is_a_timeout(
    framework: Framework, server_url: str, mode: Mode
) -> None:
    async with limited(framework, server_url) as site:
        assert_refused(await site.answer(sleep_too_long, mode), "timeout")


@pytest.mark.parametrize("handled", [DatabaseTimeoutError, TimeoutError, OperationalError])
async def test_a_handler_of_the_application_wins(
    framework: Framework, server_url: str, handled: type[Exception]
) -> None:
    handlers: Any = {handled: Answer(418)}
    async with limited(framework, server_url) as site:
        exchange = await site.answer(sleep_too_long, transactional, handlers=handlers)
    assert exchange.status == 418


async def test_its_error_is_that_of_a_statement_so_that_a_savepoint_confines_it(
    framework: Framework, server_url: str
) -> None:
    async def try_out(session: DBSession) -> Answer:
        session.add(Item(name="a"))
        with pytest.raises(DBAPIError) as caught:
            async with session.begin_nested():
                await sleep_too_long(session)
        assert isinstance(caught.value, DatabaseTimeoutError)
        return Answer(201)

    async with limited(framework, server_url) as site:
        assert (await site.answer(try_out, transactional)).status == 201
        assert await site.items() == ["a"]


# -- a plan that DDL has changed ---------------------------------------------------------------


@asynccontextmanager
async def preparing(framework: Framework, url: str) -> AsyncGenerator[Site]:
    """A site that prepares its statements before they are repeated."""
    options = {"pool_size": 1, "max_overflow": 0, "connect_args": prepares_at_once(url)}
    async with Site.on(framework, url), Database(url, engine_options=options) as database:
        yield Site(framework, url, database)


@pytest.fixture
async def site(framework: Framework, database_url: str) -> AsyncIterator[Site]:
    async with preparing(framework, database_url) as site:
        yield site


async def read(session: DBSession) -> Answer:
    rows = (await session.execute(ITEMS)).all()
    return Answer(200, str([tuple(row) for row in rows]).encode())


async def read_twice(session: DBSession) -> Answer:
    await session.execute(text("SELECT 1"))
    return await read(session)


async def stream(session: DBSession) -> Answer:
    rows = [tuple(row) async for row in await session.stream(ITEMS)]
    return Answer(200, str(rows).encode())


async def change(site: Site) -> None:
    """Alter the table, as a migration would beside the running application."""
    await site.from_outside("ALTER TABLE item ADD more VARCHAR(10) DEFAULT 'more'")


async def served_before_and_after(site: Site, work: Work, mode: Mode) -> list[tuple[int, bytes]]:
    app = site.app(work, mode)
    await site.from_outside("INSERT INTO item VALUES ('a', NULL)")
    answers = [await site.call(app)]
    await change(site)
    answers.append(await site.call(app))
    return [(answer.status, answer.body) for answer in answers]


BEFORE_AND_AFTER = [(200, b"[('a', None)]"), (200, b"[('a', None, 'more')]")]


@modes
async def test_no_request_fails_because_of_an_alter_table(site: Site, mode: Mode) -> None:
    assert await served_before_and_after(site, read, mode) == BEFORE_AND_AFTER


@pytest.mark.parametrize("mode", [plain, transactional, read_only(snapshot=True)], ids=repr)
async def test_nor_does_one_with_a_server_side_cursor(site: Site, mode: Mode) -> None:
    assert await served_before_and_after(site, stream, mode) == BEFORE_AND_AFTER


async def test_in_autocommit_each_statement_is_sent_again(site: Site) -> None:
    assert await served_before_and_after(site, read_twice, read_only) == BEFORE_AND_AFTER


async def test_after_other_statements_in_its_transaction_the_request_is_run_again(
    site: Site,
) -> None:
    mode = transactional(retries=1)
    assert await served_before_and_after(site, read_twice, mode) == BEFORE_AND_AFTER


async def test_without_retries_it_is_a_conflict(site: Site) -> None:
    first, second = await served_before_and_after(site, read_twice, transactional)
    assert first == BEFORE_AND_AFTER[0]
    if "postgresql" in site.url:
        assert second[0] == 503 and b'"conflict"' in second[1]
    else:
        assert second == BEFORE_AND_AFTER[1]
    assert (await site.answer(read_twice, transactional)).body == BEFORE_AND_AFTER[1][1]


async def test_the_mode_of_a_transaction_that_is_begun_anew_is_the_same(
    framework: Framework, postgresql_url: str
) -> None:
    async def read_and_tell(session: DBSession) -> Answer:
        await session.execute(ITEMS)
        level = await session.scalar(text("SHOW transaction_isolation"))
        only = await session.scalar(text("SHOW transaction_read_only"))
        return Answer(200, f"{level} {only}".encode())

    async with preparing(framework, postgresql_url) as site:
        mode = transactional(isolation="SERIALIZABLE", read_only=True)
        answers = await served_before_and_after(site, read_and_tell, mode)
    assert answers == [(200, b"serializable on")] * 2


async def test_an_engine_of_the_users_own_is_served_too(
    framework: Framework, postgresql_url: str
) -> None:
    async with Site.on(framework, postgresql_url) as site:
        prepares = prepares_at_once(postgresql_url)
        engine = create_async_engine(postgresql_url, pool_size=1, connect_args=prepares)
        own = Site(framework, postgresql_url, Database(engine=engine))
        try:
            assert await served_before_and_after(own, read, transactional) == BEFORE_AND_AFTER
        finally:
            await engine.dispose()
        assert site.checked_out == 0


# -- a limit of time for idle connections ------------------------------------------------------


def limited_idle(url: str, name: str) -> AbstractAsyncContextManager[Database]:
    settings = server_settings(url, **{name: "100ms"})
    options: Any = {"pool_size": 1, "max_overflow": 0, "connect_args": settings}
    return Database(url, engine_options=options)


async def driver_connection(session: DBSession) -> Any:
    connection = await session.connection()
    return (await connection.get_raw_connection()).driver_connection


async def test_a_transaction_that_was_idle_for_too_long_is_down_and_the_log_names_the_limit(
    framework: Framework, postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def idle(session: DBSession) -> None:
        await session.execute(text("SELECT 1"))
        await until_closed(await driver_connection(session))
        await session.execute(text("SELECT 1"))

    async with (
        Site.on(framework, postgresql_url),
        limited_idle(postgresql_url, "idle_in_transaction_session_timeout") as database,
    ):
        exchange = await Site(framework, postgresql_url, database).answer(idle, transactional)
    assert_refused(exchange, "down")
    assert "idle_in_transaction_session_timeout is 100ms" in caplog.text


async def test_a_connection_that_was_idle_in_the_pool_is_replaced_and_the_log_names_the_limit(
    framework: Framework, postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    connections = list[Any]()

    async def work(session: DBSession) -> None:
        connections.append(await driver_connection(session))

    async with (
        Site.on(framework, postgresql_url),
        limited_idle(postgresql_url, "idle_session_timeout") as database,
    ):
        site = Site(framework, postgresql_url, database)
        for _ in range(3):
            assert (await site.answer(work)).status == 200
            await until_closed(connections[-1])
    (line,) = [record for record in caplog.records if record.name == "asgi_db"]
    assert "idle_session_timeout is 100ms" in line.getMessage()
