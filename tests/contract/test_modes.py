"""What each mode does to a request, and where its mode comes from."""

from typing import Any

import pytest
from sqlalchemy import select

from asgi_db import DBSession, plain, read_only, transactional
from tests.contract.client import call
from tests.contract.endpoints import Answer
from tests.contract.site import Item, Site, write
from tests.servers import assert_disconnected, server_connections


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
