"""A request that has lost against another transaction is run again, as if nothing had been."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from asgi_db import Database, DBSession, Mode, plain, transactional
from tests.contract.apps import FRAMEWORKS
from tests.contract.client import call
from tests.contract.endpoints import Answer, Framework, Work
from tests.contract.site import Item, Site, write
from tests.limits import set_limits
from tests.servers import outside

SERIALIZABLE = transactional(isolation="SERIALIZABLE", retries=3)


class Rival:
    """Somebody else, in whose favour the database ends the transactions of the site."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.attempts: list[int] = []

    async def win(self, session: DBSession) -> None:
        """Read, let the other one write what was read, and write it too: that cannot succeed."""
        await session.execute(text("SELECT note FROM item WHERE name = 'shared'"))
        if self.site.url.startswith("postgresql"):
            await self.site.from_outside("UPDATE item SET note = 'theirs' WHERE name = 'shared'")
            await session.execute(text("UPDATE item SET note = 'ours' WHERE name = 'shared'"))
        else:
            await self._deadlock(session)

    async def _deadlock(self, session: DBSession) -> None:
        async with outside(self.site.url) as other:
            await other.execute("BEGIN")
            await other.execute("UPDATE item SET note = 'theirs' WHERE name = 'other'")
            for number in range(50):  # the one that has written less is ended
                await other.execute(f"INSERT INTO item VALUES ('ballast {number}', NULL)")
            theirs = asyncio.ensure_future(
                other.execute("UPDATE item SET note = 'theirs' WHERE name = 'shared'")
            )
            try:
                await session.execute(text("UPDATE item SET note = 'ours' WHERE name = 'other'"))
            finally:
                await asyncio.wait((theirs,))
                await other.execute("ROLLBACK")

    def work(self, lose: int, then: Work, how: str = "raised") -> Work:
        """Work which loses so many times, and then goes well."""

        async def order(session: DBSession) -> Answer | None:
            self.attempts.append(session.attempt)
            if session.attempt <= lose:
                session.add(Item(name=f"lost {session.attempt}"))
                await session.flush()
                if how == "raised":
                    await self.win(session)
                with pytest.raises(DBAPIError) as conflict:
                    await self.win(session)
                if how == "answered":
                    return Answer(409)
                if how == "another error":
                    raise LookupError from conflict.value
                return Answer(201)
            return await then(session)

        return order


@pytest.fixture
async def rival(server_site: Site) -> Rival:
    """Only servers let two transactions begin to write what excludes each other."""
    await server_site.from_outside("INSERT INTO item VALUES ('shared', NULL), ('other', NULL)")
    return Rival(server_site)


async def left(site: Site) -> list[str]:
    return [name for name in await site.items() if name not in ("shared", "other")]


@pytest.mark.parametrize("how", ["raised", "answered", "another error", "swallowed"])
@pytest.mark.parametrize("around", [False, True], ids=["inside", "around"])
async def test_a_lost_attempt_leaves_nothing_and_the_next_one_is_answered(
    rival: Rival, how: str, around: bool
) -> None:
    work = rival.work(2, write(Answer(201)), how)
    exchange = await rival.site.answer(work, SERIALIZABLE, around=around)
    assert (exchange.status, exchange.body, exchange.complete) == (201, b"done", True)
    assert rival.attempts == [1, 2, 3]
    assert await left(rival.site) == ["a"]


async def test_each_further_attempt_is_counted_as_a_retry_of_the_route(rival: Rival) -> None:
    await rival.site.answer(rival.work(2, write(Answer(201))), SERIALIZABLE)
    (found,) = rival.site.database.stats().routes.values()
    assert (found.retries, found.committed) == (2, 1)
    assert found.units == 3


async def test_handlers_for_the_error_are_not_asked_as_long_as_there_is_another_attempt(
    rival: Rival,
) -> None:
    handlers: Any = {Exception: Answer(418), LookupError: Answer(418)}
    work = rival.work(2, write(Answer(201)), "another error")
    assert (await rival.site.answer(work, SERIALIZABLE, handlers=handlers)).status == 201
    rival.attempts.clear()
    work = rival.work(9, write(Answer(201)), "another error")
    assert (await rival.site.answer(work, SERIALIZABLE, handlers=handlers)).status == 418
    assert rival.attempts == [1, 2, 3, 4]


async def test_when_the_last_attempt_has_lost_its_error_says_so(
    rival: Rival, caplog: pytest.LogCaptureFixture
) -> None:
    exchange = await rival.site.answer(rival.work(9, write()), SERIALIZABLE)
    assert exchange.status == 503
    assert rival.attempts == [1, 2, 3, 4]
    assert "will not be run again after a conflict: 4 attempts have failed" in caplog.text
    assert await left(rival.site) == []


async def test_without_retries_a_conflict_is_no_second_attempt(rival: Rival) -> None:
    exchange = await rival.site.answer(
        rival.work(1, write()), transactional(isolation="SERIALIZABLE")
    )
    assert exchange.status == 503
    assert rival.attempts == [1]


async def test_hooks_of_a_lost_attempt_never_run(rival: Rival) -> None:
    lines: list[str] = []

    async def order(session: DBSession) -> Answer:
        number = session.attempt
        session.on_commit(lambda: lines.append(f"committed {number}"))
        session.on_rollback(lambda: lines.append(f"undone {number}"))
        session.add(Item(name="a"))
        await session.flush()
        if number == 1:
            await rival.win(session)
        return Answer()

    assert (await rival.site.answer(order, SERIALIZABLE)).status == 200
    assert lines == ["undone 1", "committed 2"]


async def test_what_was_committed_by_hand_is_not_done_twice(
    rival: Rival, caplog: pytest.LogCaptureFixture
) -> None:
    async def order(session: DBSession) -> Answer:
        rival.attempts.append(session.attempt)
        session.add(Item(name="a"))
        await session.commit()
        await rival.win(session)
        return Answer()

    assert (await rival.site.answer(order, SERIALIZABLE)).status == 500
    assert rival.attempts == [1]
    assert "it has committed by hand before" in caplog.text
    assert await left(rival.site) == ["a"]


async def test_the_time_of_a_request_counts_for_all_its_attempts_together(
    rival: Rival, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ends: list[float | None] = []

    async def order(session: DBSession) -> Answer:
        await session.execute(text("SELECT 1"))
        ends.append(None if (deadline := session.unit_of_work.deadline) is None else deadline.at)
        if session.attempt == 3:
            set_limits(monkeypatch, first_delay=100, longest_delay=100)
        await rival.win(session)
        return Answer()

    mode = transactional(isolation="SERIALIZABLE", retries=50, timeout=60)
    assert (await rival.site.answer(order, mode)).status == 503
    assert ends[0] is not None and ends == [ends[0]] * 3
    assert "its timeout= is nearly over" in caplog.text


async def test_the_mode_of_the_middleware_may_have_retries(rival: Rival) -> None:
    exchange = await rival.site.answer(rival.work(1, write(Answer(201))), default=SERIALIZABLE)
    assert exchange.status == 201
    assert rival.attempts == [1, 2]


# -- many at once ------------------------------------------------------------------------------

CLIENTS, TIMES = 50, 4


@pytest.mark.parametrize("framework", FRAMEWORKS[2:3], ids=lambda framework: framework.name)
@pytest.mark.parametrize("server", ["postgresql", "mysql"])
async def test_increments_of_one_counter_side_by_side_all_succeed(
    request: pytest.FixtureRequest, framework: Framework, server: str
) -> None:
    async def count(session: DBSession) -> Answer:
        (note,) = (await session.execute(text("SELECT note FROM item WHERE name = 'n'"))).one()
        new = {"note": str(int(note) + 1)}
        await session.execute(text("UPDATE item SET note = :note WHERE name = 'n'"), new)
        return Answer(201)

    url: str = request.getfixturevalue(f"{server}_url")
    async with Site.on(framework, url) as site:
        await site.from_outside("INSERT INTO item VALUES ('n', '0')")
        options = {"pool_size": 10, "max_overflow": 0, "pool_timeout": 30}
        async with Database(url, engine_options=options) as database:
            many = Site(framework, url, database)
            app = many.app(count, transactional(isolation="SERIALIZABLE", retries=20))

            async def client() -> list[int]:
                return [(await call(app)).status for _ in range(TIMES)]

            statuses = await asyncio.gather(*(client() for _ in range(CLIENTS)))
        assert {status for each in statuses for status in each} == {201}
        async with outside(url) as connection:
            ((note,),) = await connection.execute("SELECT note FROM item WHERE name = 'n'")
        assert int(note) == CLIENTS * TIMES


# -- after a read before the route is known ----------------------------------------------------


@pytest.mark.parametrize("default", [plain, plain(timeout=30)], ids=["plain", "with a timeout"])
async def test_retries_of_the_route_count_whatever_was_read_before_it_was_known(
    rival: Rival, default: Mode
) -> None:
    ends: list[float | None] = []

    async def login(session: DBSession) -> None:
        await session.scalars(select(Item))

    async def note_end(session: DBSession) -> None:
        await session.execute(text("SELECT 1"))
        deadline = session.unit_of_work.deadline
        ends.append(None if deadline is None else deadline.at)
        if session.attempt < 3:
            await rival.win(session)

    mode = transactional(isolation="SERIALIZABLE", retries=3, timeout=60)
    began = asyncio.get_running_loop().time()
    options: dict[str, Any] = {"default": default, "around": True, "before": login}
    assert (await rival.site.answer(note_end, mode, **options)).status == 200
    assert len(ends) == 3 and len(set(ends)) == 1
    assert ends[0] is not None and ends[0] > began + 55
