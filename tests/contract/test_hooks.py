"""What is to be done after the commit is done after it, and only then."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import select, text

from asgi_db import DBSession, plain, read_only, transactional
from asgi_db.types import Message
from tests.contract.endpoints import Answer, Work
from tests.contract.site import BAD_STATEMENT, Item, Site, write


class Diary:
    """What has happened, in order."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)

    def hook(self, name: str) -> Any:
        """A hook which looks whether the item can be seen by others."""

        async def look() -> None:
            there = "a" in await self.site.items()
            self.note(f"{name}, {'there' if there else 'not there'}")

        return look

    async def watch(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.note(f"status {message['status']}")
        elif message["type"] == "http.response.body" and not message.get("more_body"):
            self.note("body")


@pytest.fixture
def diary(site: Site) -> Diary:
    return Diary(site)


async def answer(diary: Diary, work: Work, mode: Any = transactional, **options: Any) -> Any:
    return await diary.site.call(diary.site.app(work, mode, **options), watch=diary.watch)


async def test_hooks_run_in_order_after_the_commit_and_before_the_status_line(
    diary: Diary,
) -> None:
    async def order(session: DBSession) -> Answer:
        session.on_commit(diary.hook("first"))
        session.on_rollback(diary.hook("never"))
        session.on_commit(diary.hook("last"), when="after_response")
        await write()(session)
        session.on_commit(lambda: diary.note("second"))
        return Answer(201)

    assert (await answer(diary, order)).status == 201
    assert diary.lines == ["first, there", "second", "status 201", "body", "last, there"]


@pytest.mark.parametrize("failing", ["status", "exception", "statement", "commit"])
async def test_after_a_rollback_only_the_hooks_for_that_run(diary: Diary, failing: str) -> None:
    async def order(session: DBSession) -> Answer:
        session.on_commit(lambda: diary.note("never"))
        session.on_commit(lambda: diary.note("never"), when="after_response")
        session.on_rollback(diary.hook("undone"))
        await write()(session)
        await session.flush()
        if failing == "exception":
            raise LookupError
        if failing == "statement":
            await session.execute(BAD_STATEMENT)
        if failing == "commit":
            await diary.site.spoil_commit(session)
        return Answer(409 if failing == "status" else 201)

    assert (await answer(diary, order)).status >= 400
    assert diary.lines[0] == "undone, not there"
    assert "never" not in diary.lines


@pytest.mark.parametrize("robust", [True, False])
async def test_an_error_in_a_hook_undoes_nothing_and_stops_no_other(
    diary: Diary, robust: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        raise LookupError("no mail today")

    async def order(session: DBSession) -> Answer:
        await write()(session)
        session.on_commit(fail, robust=robust)
        session.on_commit(lambda: diary.note("the other"))
        return Answer(201)

    handlers = {LookupError: Answer(502, b"no mail")}
    exchange = await answer(diary, order, handlers=handlers)
    assert diary.lines[0] == "the other"
    assert await diary.site.items() == ["a"]
    (record,) = [record for record in caplog.records if "hook failed" in record.getMessage()]
    assert record.levelname == "ERROR" and record.exc_info is not None
    assert "/" in record.getMessage() and "COMMIT" in record.getMessage()
    assert exchange.status == (201 if robust else 502)


async def test_an_error_after_the_response_is_only_logged(
    diary: Diary, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        raise LookupError("no mail today")

    async def order(session: DBSession) -> Answer:
        await write()(session)
        session.on_commit(fail, when="after_response")
        session.on_commit(lambda: diary.note("the other"), when="after_response")
        return Answer(201)

    exchange = await answer(diary, order)
    assert (exchange.status, exchange.error, exchange.complete) == (201, None, True)
    assert diary.lines == ["status 201", "body", "the other"]
    assert "no mail today" in caplog.text


async def test_hooks_are_forgotten_with_their_savepoint(diary: Diary) -> None:
    async def order(session: DBSession) -> Answer:
        session.on_commit(lambda: diary.note("outside"))
        with pytest.raises(LookupError):
            async with session.begin_nested():
                session.on_commit(lambda: diary.note("never"))
                session.on_rollback(lambda: diary.note("never"))
                async with session.begin_nested():
                    session.on_commit(lambda: diary.note("never"))
                raise LookupError
        async with session.begin_nested():
            session.on_commit(lambda: diary.note("inside"))
            with pytest.raises(LookupError):
                async with session.begin_nested():
                    session.on_commit(lambda: diary.note("never"))
                    raise LookupError
        await write()(session)
        return Answer()

    await answer(diary, order)
    assert diary.lines == ["outside", "inside", "status 200", "body"]


async def test_a_hook_added_first_in_a_savepoint_goes_with_it(diary: Diary) -> None:
    async def order(session: DBSession) -> Answer:
        with pytest.raises(LookupError):
            async with session.begin_nested():
                session.on_commit(lambda: diary.note("never"))
                raise LookupError
        await write()(session)
        return Answer()

    await answer(diary, order)
    assert diary.lines == ["status 200", "body"]


async def test_a_commit_by_hand_runs_the_hooks_of_what_it_commits(diary: Diary) -> None:
    async def order(session: DBSession) -> Answer:
        session.on_commit(diary.hook("by commit()"))
        await write()(session)
        await session.commit()
        diary.note("committed")
        async with session.begin():
            session.on_commit(lambda: diary.note("by begin()"))
            session.add(Item(name="b"))
        session.on_commit(lambda: diary.note("never"))
        session.on_rollback(lambda: diary.note("by rollback()"))
        session.add(Item(name="c"))
        await session.flush()
        await session.rollback()
        diary.note("rolled back")
        return Answer()

    await answer(diary, order, plain)
    assert diary.lines == [
        "by commit(), there",
        "committed",
        "by begin()",
        "by rollback()",
        "rolled back",
        "status 200",
        "body",
    ]


async def test_what_a_plain_unit_did_not_commit_was_rolled_back(diary: Diary) -> None:
    async def order(session: DBSession) -> Answer:
        session.on_commit(lambda: diary.note("never"))
        session.on_rollback(lambda: diary.note("undone"))
        await write()(session)
        return Answer()

    await answer(diary, order, plain)
    assert diary.lines == ["undone", "status 200", "body"]


@pytest.mark.parametrize("mode", [transactional, read_only], ids=lambda mode: mode.name)
@pytest.mark.parametrize("status", [200, 404])
async def test_where_nothing_is_to_be_committed_the_success_of_the_request_counts(
    diary: Diary, mode: Any, status: int
) -> None:
    async def look(session: DBSession) -> Answer:
        session.on_commit(lambda: diary.note("done"))
        if mode is read_only:
            await session.scalars(select(Item.name))
        return Answer(status)

    await answer(diary, look, mode)
    assert diary.lines == (["done"] if status == 200 else []) + [f"status {status}", "body"]


async def test_a_hook_may_use_the_session_for_work_of_its_own(diary: Diary) -> None:
    async def order(session: DBSession) -> Answer:
        async def write_more() -> None:
            session.add(Item(name="b"))
            session.on_commit(lambda: diary.note("b"))

        await write()(session)
        session.on_commit(write_more)
        return Answer()

    await answer(diary, order)
    assert diary.lines == ["b", "status 200", "body"]
    assert await diary.site.items() == ["a", "b"]


async def test_a_swallowed_failure_of_a_statement_leads_to_the_hooks_for_rollback(
    diary: Diary,
) -> None:
    async def order(session: DBSession) -> Answer:
        session.on_commit(lambda: diary.note("never"))
        session.on_rollback(lambda: diary.note("undone"))
        with pytest.raises(Exception, match="no_such_table"):
            await session.execute(BAD_STATEMENT)
        return Answer()

    assert (await answer(diary, order)).status != 200
    assert diary.lines[0] == "undone"


async def test_hooks_run_also_if_the_request_is_cancelled_during_its_commit(
    diary: Diary,
) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        begun.set()
        await go_on.wait()
        diary.note("mailed")

    async def order(session: DBSession) -> Answer:
        await session.execute(text("SELECT 1"))
        await write()(session)
        session.on_commit(slow)
        session.on_commit(diary.hook("second"))
        return Answer()

    request = asyncio.create_task(answer(diary, order))
    await begun.wait()
    request.cancel()
    await asyncio.sleep(0)
    request.cancel()
    go_on.set()
    await asyncio.wait((request,))
    assert diary.lines[:2] == ["mailed", "second, there"]
    await diary.site.assert_nothing_held()
