"""What each mode does to a request, and where its mode comes from."""

from typing import Any

import pytest
from sqlalchemy import select

from asgi_db import DBSession, Mode, plain, read_only, transactional
from tests import drivers
from tests.contract.client import call
from tests.contract.endpoints import Answer, Framework, Work
from tests.contract.site import Item, Site, write
from tests.servers import assert_disconnected, outside, server_connections


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the library warned of."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelname == "WARNING" and record.name == "asgi_db"
    ]


async def test_without_a_statement_no_connection_is_opened(site: Site) -> None:
    async def answer(session: DBSession) -> None:
        assert not session.in_transaction()

    await assert_disconnected(site.url)
    for mode in plain, transactional, read_only:
        exchange = await call(site.app(answer, mode))
        assert (exchange.status, exchange.body, exchange.complete) == (200, b"done", True)
    assert site.opened == 0
    assert await server_connections(site.url) == []


# -- plain -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flush", [False, True], ids=["pending", "flushed"])
async def test_in_plain_uncommitted_work_is_rolled_back_with_a_warning_that_names_the_route(
    site: Site, flush: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def order(session: DBSession) -> None:
        await write()(session)
        if flush:
            await session.flush()

    exchange = await site.call(site.app({"/orders": order}, plain), "/orders")
    assert (exchange.status, exchange.body) == (200, b"done")
    assert await site.items() == []
    [warning] = warnings_of(caplog)
    assert "POST /orders (" in warning
    assert ".order)" in warning
    assert "await session.commit()" in warning


async def change(session: DBSession) -> None:
    (await session.get_one(Item, "a")).note = "changed"


async def change_after_a_commit(session: DBSession) -> None:
    item = await session.get_one(Item, "a")
    await session.commit()
    item.note = "changed"


async def delete(session: DBSession) -> None:
    await session.delete(await session.get_one(Item, "a"))


async def add(session: DBSession) -> None:
    await session.get_one(Item, "a")
    session.add(Item(name="b"))


@pytest.mark.parametrize("work", [change, change_after_a_commit, delete, add])
@pytest.mark.parametrize("mode", [plain, read_only, read_only(snapshot=True)])
async def test_unsaved_changes_are_dropped_with_a_warning_that_names_the_route(
    site: Site, work: Work, mode: Mode, caplog: pytest.LogCaptureFixture
) -> None:
    await site.from_outside("INSERT INTO item VALUES ('a', 'old')")
    exchange = await site.call(site.app({"/orders": work}, mode), "/orders")
    assert (exchange.status, exchange.body) == (200, b"done")
    [warning] = warnings_of(caplog)
    assert f"POST /orders ({work.__name__}): uncommitted work was rolled back" in warning
    assert "put @transactional on the route" in warning
    assert ("await session.commit()" in warning) is (mode == plain)
    assert await site.items() == ["a"]
    async with outside(site.url) as connection:
        assert await connection.execute("SELECT note FROM item WHERE note <> 'old'") == []


@pytest.mark.parametrize("mode", [plain, read_only], ids=lambda mode: mode.name)
async def test_setting_the_value_that_is_there_already_warns_of_nothing(
    site: Site, mode: Mode, caplog: pytest.LogCaptureFixture
) -> None:
    await site.from_outside("INSERT INTO item VALUES ('a', 'old')")

    async def set_again(session: DBSession) -> None:
        (await session.get_one(Item, "a")).note = "old"

    assert (await site.answer(set_again, mode)).status == 200
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("copies", [True, False])
async def test_in_plain_an_uncommitted_copy_warns_of_it(
    framework: Framework,
    postgresql_url: str,
    copies: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It passes the session by, on the connection of the driver."""

    async def copy(session: DBSession) -> None:
        connection = await session.connection()
        driver: Any = (await connection.get_raw_connection()).driver_connection
        if copies:
            await session.execute(select(Item))
            await drivers.copy(driver, "item", [("a",)], "name")
        else:
            await driver.execute("SELECT 1")

    async with Site.on(framework, postgresql_url) as site:
        assert (await site.answer(copy, plain)).status == 200
        assert await site.items() == []
    assert len(warnings_of(caplog)) == copies


async def test_in_plain_the_handler_commits(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    async def order(session: DBSession) -> Answer:
        item = Item(name="a")
        session.add(item)
        await session.commit()
        await session.refresh(item)
        return Answer(201, item.name.encode())

    exchange = await site.answer(order, plain)
    assert (exchange.status, exchange.body) == (201, b"a")
    assert await site.items() == ["a"]
    assert warnings_of(caplog) == []


async def test_in_plain_what_follows_the_commit_is_rolled_back(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    async def order(session: DBSession) -> None:
        await write()(session)
        await session.commit()
        await write(name="lost")(session)
        await session.flush()

    exchange = await site.answer(order, plain)
    assert (exchange.status, exchange.body) == (200, b"done")
    assert await site.items() == ["a"]
    assert len(warnings_of(caplog)) == 1


async def test_in_plain_a_begin_block_commits(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    async def order(session: DBSession) -> None:
        async with session.begin():
            await write()(session)

    exchange = await site.answer(order, plain)
    assert (exchange.status, exchange.body) == (200, b"done")
    assert await site.items() == ["a"]
    assert warnings_of(caplog) == []


async def test_in_plain_a_begin_block_that_fails_rolls_back(site: Site) -> None:
    async def order(session: DBSession) -> None:
        async with session.begin():
            await write()(session)
            await session.flush()
            raise ValueError

    exchange = await site.answer(order, plain, handlers={ValueError: Answer(422)})
    assert (exchange.status, exchange.body, exchange.error) == (422, b"done", None)
    assert await site.items() == []


async def test_in_plain_a_read_warns_of_nothing(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    async def read(session: DBSession) -> None:
        assert (await session.scalars(select(Item))).all() == []
        assert site.checked_out == 1

    exchange = await site.answer(read, plain)
    assert (exchange.status, exchange.body) == (200, b"done")
    assert warnings_of(caplog) == []


async def test_in_plain_a_write_that_the_answer_refuses_warns_of_nothing(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(session: DBSession) -> Answer:
        await write()(session)
        await session.flush()
        return Answer(409)

    exchange = await site.answer(refuse, plain)
    assert (exchange.status, exchange.body) == (409, b"done")
    assert await site.items() == []
    assert warnings_of(caplog) == []


async def test_the_decorator_wins_over_the_dependency_and_that_over_the_default(
    site: Site,
) -> None:
    ways: list[dict[str, Any]] = [
        {"mode": transactional, "dependency": read_only, "default": plain},
        {"mode": transactional, "dependency": plain, "default": read_only},
        {"dependency": transactional, "default": read_only},
    ]
    for number, way in enumerate(ways):
        exchange = await call(site.app(write(name=str(number)), **way))
        assert (exchange.status, exchange.body) == (200, b"done")
    await site.assert_nothing_held()
    assert await site.items() == ["0", "1", "2"]
