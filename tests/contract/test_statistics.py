"""What the counters of a route say, and what the client is told of them."""

import asyncio
import re

import pytest
from sqlalchemy import select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError

from asgi_db import DBSession, DBSessionMiddleware, plain, read_only, transactional
from tests.contract.client import Exchange
from tests.contract.endpoints import Answer
from tests.contract.site import BAD_STATEMENT, Item, Site, write
from tests.internals import RouteStats
from tests.versions import STARLETTE_NAMES_ROUTES


async def read_twice(session: DBSession) -> None:
    await session.scalar(select(Item.note))
    await session.scalar(select(Item.note))


async def write_and_read(session: DBSession) -> None:
    await write()(session)
    await session.flush()
    await session.scalar(select(Item.note))


def counters(site: Site) -> RouteStats:
    """Those of the one route, and of the engine itself none: the tests do not use it."""
    (found,) = site.database.stats().routes.values()
    return found


def ends(found: RouteStats) -> dict[str, int]:
    return {outcome: count for outcome, count in found.outcomes().items() if count}


async def test_a_committed_request_is_one_unit(site: Site) -> None:
    await site.answer(write_and_read, transactional)
    found = counters(site)
    assert (found.units, ends(found)) == (1, {"committed": 1})
    assert (found.statements, found.connections, found.timeouts) == (2, 1, 0)
    assert 0 < found.held_max == found.held
    assert 0 < found.waited_max == found.waited < found.busy


async def test_what_is_only_written_by_the_commit_is_counted(site: Site) -> None:
    await site.answer(write(), transactional)
    assert (ends(counters(site)), counters(site).statements) == ({"committed": 1}, 1)


async def test_a_refused_request_is_rolled_back(site: Site) -> None:
    async def refuse(session: DBSession) -> Answer:
        await write_and_read(session)
        return Answer(409)

    await site.answer(refuse, transactional)
    assert ends(counters(site)) == {"rolled_back": 1}


async def test_a_failed_commit_counts_as_failed(site: Site) -> None:
    async def spoil(session: DBSession) -> None:
        await write()(session)
        await site.spoil_commit(session)

    assert (await site.answer(spoil, transactional)).status == site.unhandled
    assert ends(counters(site)) == {"failed": 1}


async def test_a_commit_after_a_swallowed_error_counts_as_failed(site: Site) -> None:
    async def swallow(session: DBSession) -> None:
        with pytest.raises(Exception, match="no_such_table"):
            await session.execute(BAD_STATEMENT)

    assert (await site.answer(swallow, transactional)).status == 500
    assert ends(counters(site)) == {"failed": 1}


async def test_each_commit_by_hand_ends_a_unit(site: Site) -> None:
    async def commit_twice(session: DBSession) -> None:
        for name in "ab":
            await write(name=name)(session)
            await session.commit()
        await session.commit()  # of nothing
        await session.scalar(select(Item.note))

    await site.answer(commit_twice, plain)
    found = counters(site)
    assert (found.units, ends(found)) == (3, {"committed": 2, "rolled_back": 1})
    assert (found.statements, found.connections) == (3, 3)


async def test_a_commit_by_hand_that_fails_counts_as_failed(site: Site) -> None:
    async def commit_in_vain(session: DBSession) -> None:
        await write()(session)
        await site.spoil_commit(session)
        with pytest.raises(Exception):  # noqa: B017
            await session.commit()
        await session.rollback()
        await session.scalar(text("SELECT 1"))

    await site.answer(commit_in_vain, plain)
    assert ends(counters(site)) == {"failed": 1, "rolled_back": 1}


async def test_a_block_whose_commit_fails_counts_as_failed(site: Site) -> None:
    async def leave_in_vain(session: DBSession) -> None:
        with pytest.raises(Exception):  # noqa: B017
            async with session.begin():
                await write()(session)
                await site.spoil_commit(session)

    await site.answer(leave_in_vain, plain)
    assert ends(counters(site)) == {"failed": 1}


async def test_a_commit_by_hand_whose_flush_fails_counts_as_failed(site: Site) -> None:
    await site.from_outside("INSERT INTO item (name) VALUES ('a')")

    async def commit_what_is_there(session: DBSession) -> None:
        await write(name="a")(session)
        with pytest.raises(IntegrityError):
            await session.commit()

    await site.answer(commit_what_is_there, plain)
    assert ends(counters(site)) == {"failed": 1}


@pytest.mark.parametrize("by_hand", [False, True], ids=["by itself", "by hand"])
async def test_the_commit_is_part_of_the_time(site: Site, by_hand: bool) -> None:
    async def work(session: DBSession) -> None:
        await write()(session)
        if by_hand:
            await session.commit()

    await site.answer(work, plain if by_hand else transactional)
    found = counters(site)
    assert found.waited < found.busy and found.held < found.busy


async def test_a_read_only_request_takes_a_connection_for_its_reads_in_a_row(site: Site) -> None:
    async def read(session: DBSession) -> None:
        await read_twice(session)
        await asyncio.sleep(0)
        await read_twice(session)

    await site.answer(read, read_only)
    found = counters(site)
    assert (found.units, ends(found)) == (1, {"none": 1})
    is_kept = make_url(site.url).get_driver_name() != "psycopg"
    assert (found.statements, found.connections) == (4, 3 if is_kept else 4)
    assert found.held_max < found.held


async def test_a_request_without_a_statement_is_not_counted(site: Site) -> None:
    async def do_nothing(session: DBSession) -> None: ...

    await site.answer(do_nothing, transactional)
    assert site.database.stats().routes == {}


async def test_the_counters_have_the_name_of_the_route_in_the_log(site: Site) -> None:
    names: list[str] = []

    async def look(session: DBSession) -> None:
        await session.scalar(select(Item.note))
        names.extend(holder.route for holder in site.database.stats().holders)

    await site.answer(look, plain)
    (route,) = site.database.stats().routes
    assert route.startswith("POST ") and route.endswith("look)")
    # Bare ASGI has no template.
    if site.framework.name != "asgi" and (
        site.framework.name != "starlette" or STARLETTE_NAMES_ROUTES
    ):
        assert names == [route]


# -- Server-Timing -----------------------------------------------------------------------------


def timing(exchange: Exchange) -> str | None:
    headers: dict[bytes, bytes] = dict(exchange.messages[0]["headers"])
    value = headers.get(b"server-timing")
    return None if value is None else re.sub(r"dur=\d+\.\d;", "dur=…;", value.decode())


async def timed(site: Site, *args: object) -> str | None:
    app = DBSessionMiddleware(site.app(*args), site.database, server_timing=True)  # type: ignore[arg-type]
    return timing(await site.call(app))


async def test_the_client_is_told_what_its_request_took(site: Site) -> None:
    assert await timed(site, write_and_read, transactional) == 'db;dur=…;desc="2 statements"'
    assert await timed(site, read_twice, read_only) == 'db;dur=…;desc="2 statements"'


async def test_the_commit_is_part_of_it(site: Site) -> None:
    assert await timed(site, write(name="b"), transactional) == 'db;dur=…;desc="1 statement"'


async def test_what_was_committed_by_hand_is_part_of_it(site: Site) -> None:
    async def commit_by_hand(session: DBSession) -> None:
        await write_and_read(session)
        await session.commit()

    assert await timed(site, commit_by_hand, plain) == 'db;dur=…;desc="2 statements"'


async def test_a_request_without_a_statement_tells_nothing(site: Site) -> None:
    async def do_nothing(session: DBSession) -> None: ...

    assert await timed(site, do_nothing, transactional) is None


async def test_nobody_is_told_without_being_asked(site: Site) -> None:
    assert timing(await site.answer(write_and_read, transactional)) is None
