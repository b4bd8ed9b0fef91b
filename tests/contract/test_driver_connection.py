"""What is done on the driver's own connection is in the transaction, from the beginning."""

from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import text

from asgi_db import DBSession, FailedTransactionError, Mode, plain, transactional
from tests.contract.endpoints import Answer, Framework
from tests.contract.site import Site
from tests.drivers import UNIQUE_VIOLATIONS, copy

WRITING = [plain, transactional, transactional(isolation="SERIALIZABLE")]
IDS = ["plain", "transactional", "serializable"]


async def write_on(session: DBSession) -> None:
    """Write an item on the driver's own connection, in the driver's own way."""
    driver: Any = (await (await session.connection()).get_raw_connection()).driver_connection
    insert = "INSERT INTO item (name) VALUES ('a')"
    match session.get_bind().dialect.name:
        case "postgresql":
            await copy(driver, "item", [("a",)], "name")
        case "sqlite":
            await driver.execute(insert)
        case _:
            async with driver.cursor() as cursor:
                await cursor.execute(insert)


@pytest.mark.parametrize("mode", WRITING, ids=IDS)
async def test_what_the_driver_writes_first_is_rolled_back_with_the_request(
    site: Site, mode: Mode
) -> None:
    async def write_and_fail(session: DBSession) -> None:
        await write_on(session)
        raise site.framework.http_error(Answer(409))

    exchange = await site.answer(write_and_fail, mode)
    assert exchange.status == 409
    assert await site.items() == []


@pytest.mark.parametrize("mode", WRITING, ids=IDS)
async def test_what_the_driver_writes_first_is_committed_with_the_request(
    site: Site, mode: Mode
) -> None:
    async def write(session: DBSession) -> None:
        await write_on(session)
        assert await site.items() == []
        if mode is plain:
            await session.commit()

    exchange = await site.answer(write, mode)
    assert (exchange.status, exchange.error) == (200, None)
    assert await site.items() == ["a"]


async def test_where_the_transaction_only_reads_the_driver_cannot_write(server_site: Site) -> None:
    refused: list[str] = []

    async def write(session: DBSession) -> None:
        try:
            await write_on(session)
        except Exception as error:
            refused.append(str(error).upper())
            raise

    exchange = await server_site.answer(write, transactional(read_only=True))
    assert exchange.status in (500, None)
    (message,) = refused
    assert "READ-ONLY TRANSACTION" in message or "READ ONLY TRANSACTION" in message
    assert await server_site.items() == []


async def test_the_connection_may_be_asked_for_again_and_after_a_statement(site: Site) -> None:
    async def write(session: DBSession) -> None:
        await session.execute(text("INSERT INTO item (name) VALUES ('b')"))
        await session.connection()
        await write_on(session)
        await session.connection()

    exchange = await site.answer(write, transactional)
    assert (exchange.status, exchange.error) == (200, None)
    assert await site.items() == ["a", "b"]


async def test_a_copy_that_fails_and_is_swallowed_is_not_acknowledged(
    postgresql_url: str, framework: Framework, caplog: pytest.LogCaptureFixture
) -> None:
    """PostgreSQL answers the COMMIT with a ROLLBACK, which the driver takes for a success."""

    async def write_and_swallow(session: DBSession) -> None:
        await session.execute(text("INSERT INTO item (name) VALUES ('b')"))
        session.on_commit(lambda: heard.append("committed"))
        driver: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        with suppress(*UNIQUE_VIOLATIONS):
            await copy(driver, "item", [("b",)], "name")

    heard = list[str]()
    async with Site.on(framework, postgresql_url) as site:
        exchange = await site.answer(write_and_swallow, transactional)
        assert exchange.status == 500
        assert (
            "COMMIT failed, and the response 200 was not sent: FailedTransactionError"
            in caplog.text
        )
        async with site.database.session() as session:
            await write_and_swallow(session)
            with pytest.raises(FailedTransactionError):
                await session.commit()
        assert await site.items() == []
    assert heard == []
