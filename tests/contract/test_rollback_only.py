"""`session.set_rollback_only()`: the answer leaves as it is, and its work is rolled back."""

from __future__ import annotations

from contextlib import suppress

import pytest
from sqlalchemy import insert, select
from sqlalchemy.exc import DBAPIError

from asgi_db import (
    DBSession,
    FailedTransactionError,
    Mode,
    SessionExpiredError,
    plain,
    read_only,
    transactional,
)
from tests.contract.endpoints import Answer
from tests.contract.site import BAD_STATEMENT, Item, Site, write
from tests.contract.test_modes import warnings_of

MODES: list[Mode] = [transactional, plain, read_only]


@pytest.mark.parametrize("when", ["before", "between", "after"])
@pytest.mark.parametrize("flush", [False, True], ids=["pending", "flushed"])
async def test_the_answer_leaves_and_the_work_is_rolled_back_without_a_warning(
    site: Site, when: str, flush: bool, caplog: pytest.LogCaptureFixture
) -> None:
    lines: list[str] = []

    async def order(session: DBSession) -> Answer:
        session.on_commit(lambda: lines.append("committed"))
        session.on_rollback(lambda: lines.append("rolled back"))
        if when == "before":
            session.set_rollback_only()
        await write()(session)
        if when == "between":
            session.set_rollback_only()
        if flush:
            await session.flush()
        if when == "after":
            session.set_rollback_only()
        return Answer(200, b"errors")

    for mode in transactional, plain:
        exchange = await site.answer(order, mode)
        assert (exchange.status, exchange.body, exchange.error) == (200, b"errors", None)
        assert await site.items() == []
    assert lines == ["rolled back", "rolled back"]
    assert caplog.records == []


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
async def test_it_costs_nothing_where_nothing_was_done(site: Site, mode: Mode) -> None:
    async def order(session: DBSession) -> None:
        session.set_rollback_only()

    assert (await site.answer(order, mode)).status == 200
    assert site.opened == 0


async def test_a_statement_that_failed_is_no_error_then(site: Site) -> None:
    """GraphQL tells it in the body of its answer."""

    async def order(session: DBSession) -> Answer:
        await write()(session)
        await session.flush()
        with suppress(DBAPIError):
            await session.execute(BAD_STATEMENT)
        session.set_rollback_only()
        return Answer(200, b"errors")

    exchange = await site.answer(order, transactional)
    assert (exchange.status, exchange.body, exchange.error) == (200, b"errors", None)
    assert await site.items() == []


async def test_it_counts_as_rolled_back(site: Site) -> None:
    async def order(session: DBSession) -> None:
        await session.execute(insert(Item).values(name="a"))
        session.set_rollback_only()

    await site.answer(order, transactional)
    (found,) = site.database.stats().routes.values()
    assert (found.units, found.rolled_back, found.committed) == (1, 1, 0)


async def test_a_commit_by_hand_is_an_error_then(site: Site) -> None:
    for how in "commit", "run_sync":

        async def order(session: DBSession, how: str = how) -> None:
            await write()(session)
            session.set_rollback_only()
            if how == "commit":
                await session.commit()
            await session.run_sync(lambda session: session.commit())

        for mode in transactional, plain:
            exchange = await site.answer(
                order, mode, handlers={FailedTransactionError: Answer(409)}
            )
            assert (exchange.status, exchange.error) == (409, None)
            assert await site.items() == []


async def test_a_block_rolls_back_and_what_follows_is_not_concerned(site: Site) -> None:
    async def order(session: DBSession) -> None:
        async with session.begin():
            await write(name="lost")(session)
            await session.flush()
            async with session.begin_nested():
                await write(name="in a savepoint")(session)
            session.set_rollback_only()
        async with session.begin():
            await write(name="kept")(session)

    for mode in plain, transactional:
        assert (await site.answer(order, mode)).status == 200
        assert await site.items() == ["kept"]
        await site.from_outside("DELETE FROM item")


@pytest.mark.parametrize("how", ["rollback", "of the block"])
async def test_what_follows_a_rollback_by_hand_is_not_concerned(site: Site, how: str) -> None:
    async def order(session: DBSession) -> None:
        if how == "rollback":
            await write(name="lost")(session)
            session.set_rollback_only()
            await session.rollback()
        else:
            async with session.begin() as transaction:
                await write(name="lost")(session)
                session.set_rollback_only()
                await transaction.rollback()
        await write(name="kept")(session)

    assert (await site.answer(order, transactional)).status == 200
    assert await site.items() == ["kept"]


async def test_it_outlives_a_release_and_a_change_of_the_mode(site: Site) -> None:
    async def order(session: DBSession) -> None:
        await session.scalars(select(Item))
        session.set_rollback_only()
        await session.release()
        await session.scalars(select(Item))
        session.unit_of_work.ask(transactional)
        await write()(session)
        await session.flush()

    assert (await site.answer(order)).status == 200
    assert await site.items() == []


async def test_a_background_task_is_not_concerned(site: Site) -> None:
    sessions: list[DBSession] = []

    async def later() -> None:
        await sessions[0].execute(insert(Item).values(name="later"))

    for first in False, True:

        async def order(session: DBSession, first: bool = first) -> Answer:
            sessions[:] = [session]
            if first:
                await write(name="lost")(session)
            session.set_rollback_only()
            return Answer(200, background=later)

        assert (await site.answer(order, transactional)).status == 200
        assert await site.items() == ["later"]
        await site.from_outside("DELETE FROM item")
    with pytest.raises(SessionExpiredError, match="set_rollback_only"):
        sessions[0].set_rollback_only()


async def test_it_holds_in_a_block_of_the_database_too(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    async with site.database.transaction() as session:
        session.add(Item(name="a"))
        session.set_rollback_only()
    async with site.database.session() as session:
        session.add(Item(name="b"))
        session.set_rollback_only()
    assert await site.items() == []
    assert warnings_of(caplog) == []
