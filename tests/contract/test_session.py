"""The session in the hands of a handler: given back early, closed, broken; cleaned up always."""

from collections.abc import Callable

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from asgi_db import DBSession, plain, read_only, transactional
from asgi_db.errors import UncommittedWorkError
from tests.contract.endpoints import Answer, Work
from tests.contract.site import Item, Site, at_start, write


async def test_release_gives_the_connection_back_and_keeps_loaded_objects_usable(
    site: Site,
) -> None:
    await site.from_outside("INSERT INTO item (name, note) VALUES ('a', 'loaded')")
    held: list[int] = []

    async def order(session: DBSession) -> Answer:
        item = await session.get_one(Item, "a")
        held.append(site.checked_out)
        await session.release()
        held.append(site.checked_out)
        await site.assert_nothing_held()
        note = item.note
        item.note = "changed after the release"
        await session.flush()
        held.append(site.checked_out)
        return Answer(200, str(note).encode())

    exchange = await site.answer(order, transactional)
    assert (exchange.status, exchange.body) == (200, b"loaded")
    assert held == [1, 0, 1]
    async with site.database.session(read_only) as session:
        assert await session.scalar(select(Item.note)) == "changed after the release"


async def test_release_refuses_to_throw_away_writes(site: Site) -> None:
    errors: list[str] = []

    async def order(session: DBSession) -> None:
        await write()(session)
        await session.flush()
        try:
            await session.release()
        except UncommittedWorkError as error:
            errors.append(str(error))
        await session.commit()
        await session.release()
        assert site.checked_out == 0

    exchange = await site.answer(order, transactional)
    assert (exchange.status, exchange.body) == (200, b"done")
    assert await site.items() == ["a"]
    [error] = errors
    assert "POST /" in error
    assert "await session.commit()" in error


async def close_by_hand(session: DBSession) -> None:
    """Close the session as if it were the handler's own."""
    await write()(session)
    await session.flush()
    await session.close()


async def close_by_block(session: DBSession) -> None:
    """Use the session as a session of the handler's own is used."""
    async with session:
        await write()(session)
        await session.flush()


@pytest.mark.parametrize("close", [close_by_hand, close_by_block], ids=lambda close: close.__name__)
async def test_work_is_never_acknowledged_and_lost_because_the_handler_closed_the_session(
    site: Site, close: Work
) -> None:
    exchange = await site.answer(close, transactional)
    assert exchange.complete
    assert await site.items() == (["a"] if exchange.status == 200 else [])


async def test_in_plain_work_that_is_lost_because_the_handler_closed_the_session_is_not_silent(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    exchange = await site.answer(close_by_block, plain)
    assert await site.items() == []
    assert exchange.status == 500 or "uncommitted work was rolled back" in caplog.text


@pytest.mark.parametrize("handled", [False, True], ids=["unhandled", "handled"])
async def test_a_clean_up_that_fails_never_masks_the_error_of_the_handler(
    site: Site, handled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def order(session: DBSession) -> None:
        await write()(session)
        await session.flush()
        await site.spoil_rollback(session)
        raise ValueError("the handler's own")

    handlers = {ValueError: Answer(422, b"handled")} if handled else None
    exchange = await site.answer(order, transactional, handlers=handlers)
    if handled:
        assert (exchange.status, exchange.body, exchange.error) == (422, b"handled", None)
    else:
        assert exchange.status == 500
        assert site.framework.reraises == (
            isinstance(exchange.error, ValueError) and str(exchange.error) == "the handler's own"
        )
    assert "ROLLBACK failed" in caplog.text
    assert await site.items() == []
    assert (await site.answer(write(), transactional)).status == 200
    assert await site.items() == ["a"]


async def test_a_clean_up_that_fails_does_not_take_back_a_good_answer(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    async def read(session: DBSession) -> None:
        await session.execute(text("SELECT 1"))
        await site.spoil_rollback(session)

    exchange = await site.answer(read, plain)
    assert (exchange.status, exchange.body, exchange.error) == (200, b"done", None)
    assert (await site.answer(write(), transactional)).status == 200
    assert await site.items() == ["a"]


async def test_a_connection_that_breaks_in_a_statement_is_an_error_and_then_replaced(
    server_site: Site,
) -> None:
    site = server_site

    async def order(session: DBSession) -> None:
        await write()(session)
        await session.flush()
        await site.cut(session)
        await session.execute(text("SELECT 1"))

    handlers = {DBAPIError: Answer(503, b"try again")}
    app = site.app({"/cut": order, "/good": write()}, transactional, handlers=handlers)
    exchange = await site.call(app, "/cut")
    assert (exchange.status, exchange.body, exchange.error) == (503, b"try again", None)
    assert await site.items() == []
    assert (await site.call(app, "/good")).status == 200
    assert await site.items() == ["a"]


async def test_a_request_of_its_own_database_session_leaves_the_other_alone(site: Site) -> None:
    """`database.transaction()` inside a request that holds no connection is independent of it."""
    seen: list[object] = []

    async def audit(session: DBSession) -> Answer:
        async with site.database.transaction() as own:
            own.add(Item(name="audit"))
        await write(name="refused")(session)
        return Answer(409)

    async def look() -> None:
        seen.append(await site.items())

    exchange = await site.call(site.app(audit, transactional), watch=at_start(look))
    assert (exchange.status, exchange.body) == (409, b"done")
    assert seen == [["audit"]]


# -- what is no statement ----------------------------------------------------------------------

QUESTIONS: list[Callable[[DBSession], object]] = [
    lambda session: session.get_bind(),
    lambda session: session.get_bind(Item),
    lambda session: session.get_bind().dialect.name,
    lambda session: session.sync_session.get_bind(),
    lambda session: session.bind,
    lambda session: session.identity_map,
    lambda session: (session.new, session.dirty, session.deleted),
    lambda session: session.in_transaction(),
    lambda session: session.info,
    lambda session: str(select(Item).compile(session.get_bind())),
]


async def test_a_question_fixes_no_mode_starts_no_clock_and_counts_no_unit(site: Site) -> None:
    async def ask(session: DBSession) -> Answer:
        unit = session.unit_of_work
        for question in QUESTIONS:
            question(session)
            await session.run_sync(lambda session: session.get_bind())
            assert (unit.fixed_mode, unit.deadline, unit.tally.began) == (None, None, None)
        unit.ask(transactional)
        await write()(session)
        return Answer(201)

    async def only_ask(session: DBSession) -> None:
        for question in QUESTIONS:
            question(session)

    for default in plain(timeout=30), read_only(timeout=30):
        assert (await site.answer(only_ask, default=default)).status == 200
        assert site.database.stats().routes == {}
    assert site.opened == 0
    assert (await site.answer(ask, default=plain(timeout=30))).status == 201
    assert await site.items() == ["a"]


async def test_what_is_found_in_the_identity_map_is_no_statement(site: Site) -> None:
    await site.from_outside("INSERT INTO item VALUES ('a', NULL)")

    async def find(session: DBSession) -> Answer:
        unit = session.unit_of_work
        item = await session.get_one(Item, "a")
        await session.release()
        assert await session.get_one(Item, "a") is item
        assert (item.name, unit.fixed_mode, site.checked_out) == ("a", None, 0)
        return Answer(200)

    for mode in plain, transactional, read_only:
        assert (await site.answer(find, mode)).status == 200
    (found,) = site.database.stats().routes.values()
    assert (found.units, found.statements) == (3, 3)


async def test_in_a_unit_the_bind_is_the_engine_of_its_mode(site: Site) -> None:
    async def compare(session: DBSession) -> None:
        await session.execute(text("SELECT 1"))
        connection = await session.connection()
        assert session.get_bind() is connection.sync_connection.engine  # type: ignore[union-attr]

    for mode in plain, transactional(isolation="SERIALIZABLE"), read_only(snapshot=True):
        assert (await site.answer(compare, mode)).status == 200
