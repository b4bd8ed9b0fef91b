"""Streams and background tasks: they hold nothing, and what they do is a unit of its own."""

from collections.abc import AsyncIterator

import pytest

from asgi_db import DBSession, transactional
from asgi_db.types import Message
from tests.contract.endpoints import Answer
from tests.contract.site import Item, Site, at_start, write

spec_versions = pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
"""Before 2.4 Starlette streams from a task of its own; Litestar always does."""


@spec_versions
async def test_a_stream_that_dies_midway_has_committed_what_its_200_acknowledged(
    site: Site, spec_version: str
) -> None:
    async def export(session: DBSession) -> Answer:
        await write()(session)

        async def chunks() -> AsyncIterator[bytes]:
            yield b"one"
            await write(name="b")(session)
            await session.flush()
            raise ValueError("the stream dies")

        return Answer(stream=chunks)

    exchange = await site.call(site.app(export, transactional), spec_version=spec_version)
    assert (exchange.status, exchange.body, exchange.complete) == (200, b"one", False)
    assert exchange.was_caused_by(ValueError)
    assert await site.items() == ["a"]


@spec_versions
async def test_no_connection_is_held_between_the_chunks_of_a_stream(
    site: Site, spec_version: str
) -> None:
    held: list[int] = []

    async def export(session: DBSession) -> Answer:
        await write()(session)
        await session.flush()
        held.append(site.checked_out)

        async def chunks() -> AsyncIterator[bytes]:
            for chunk in b"one", b"two", b"three":
                held.append(site.checked_out)
                yield chunk

        return Answer(stream=chunks)

    async def watch(message: Message) -> None:
        assert site.checked_out == 0
        if message.get("body") == b"two":
            await site.assert_nothing_held()

    app = site.app(export, transactional)
    exchange = await site.call(app, watch=watch, spec_version=spec_version)
    assert (exchange.status, exchange.body, exchange.complete) == (200, b"onetwothree", True)
    assert held == [1, 0, 0, 0]
    assert await site.items() == ["a"]


async def test_a_session_used_in_a_stream_commits_before_the_next_chunk_leaves(site: Site) -> None:
    seen: list[object] = []

    async def export(session: DBSession) -> Answer:
        async def chunks() -> AsyncIterator[bytes]:
            for name in "a", "b":
                session.add(Item(name=name))
                await session.flush()
                seen.append(site.checked_out)
                yield name.encode()
            session.add(Item(name="after the last"))

        await write(name="0")(session)
        return Answer(stream=chunks)

    async def watch(message: Message) -> None:
        seen.append((message.get("body"), site.checked_out, await site.items()))

    exchange = await site.call(site.app(export, transactional), watch=watch)
    assert (exchange.status, exchange.body, exchange.complete) == (200, b"ab", True)
    assert seen == [
        (None, 0, ["0"]),
        1,
        (b"a", 0, ["0", "a"]),
        1,
        (b"b", 0, ["0", "a", "b"]),
        (b"", 0, ["0", "a", "after the last", "b"]),
    ]


async def test_a_stream_whose_own_commit_fails_is_cut_off(site: Site) -> None:
    async def export(session: DBSession) -> Answer:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"one"
            await write(name="b")(session)
            await site.spoil_commit(session)
            yield b"two"

        await write()(session)
        return Answer(stream=chunks)

    exchange = await site.answer(export, transactional)
    assert (exchange.status, exchange.body, exchange.complete) == (200, b"one", False)
    assert exchange.was_caused_by(site.commit_error)
    assert await site.items() == ["a"]


async def test_in_plain_a_stream_commits_by_hand_and_loses_the_rest_with_a_warning(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    async def export(session: DBSession) -> Answer:
        async def chunks() -> AsyncIterator[bytes]:
            await write(name="committed")(session)
            await session.commit()
            yield b"one"
            await write(name="lost")(session)
            await session.flush()
            yield b"two"

        return Answer(stream=chunks)

    exchange = await site.answer(export)
    assert (exchange.status, exchange.body, exchange.complete) == (200, b"onetwo", True)
    assert await site.items() == ["committed"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


async def test_a_background_task_holds_nothing_and_sees_what_was_committed(site: Site) -> None:
    seen: list[object] = []

    async def order(session: DBSession) -> Answer:
        async def look() -> None:
            seen.append((site.checked_out, await site.items()))
            await site.assert_nothing_held()

        await write()(session)
        return Answer(background=look)

    exchange = await site.answer(order, transactional)
    assert (exchange.status, exchange.body, exchange.complete) == (200, b"done", True)
    assert seen == [(0, ["a"])]


async def test_a_session_used_in_a_background_task_commits_at_its_end(site: Site) -> None:
    seen: list[object] = []

    async def order(session: DBSession) -> Answer:
        async def continue_later() -> None:
            await write(name="b")(session)
            await session.flush()
            seen.append((site.checked_out, await site.items()))

        await write()(session)
        return Answer(background=continue_later)

    exchange = await site.answer(order, transactional)
    assert (exchange.status, exchange.body, exchange.complete) == (200, b"done", True)
    assert seen == [(1, ["a"])]
    assert await site.items() == ["a", "b"]


async def test_a_background_task_that_fails_rolls_back_its_own_work_only(site: Site) -> None:
    async def order(session: DBSession) -> Answer:
        async def fail_later() -> None:
            await write(name="b")(session)
            await session.flush()
            raise ValueError("the background task fails")

        await write()(session)
        return Answer(background=fail_later)

    exchange = await site.answer(order, transactional)
    assert (exchange.status, exchange.body, exchange.complete) == (200, b"done", True)
    assert exchange.was_caused_by(ValueError)
    assert await site.items() == ["a"]


async def test_a_commit_that_fails_after_a_background_task_is_not_silent(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    async def order(session: DBSession) -> Answer:
        async def continue_later() -> None:
            await write(name="b")(session)
            await site.spoil_commit(session)

        await write()(session)
        return Answer(background=continue_later)

    exchange = await site.answer(order, transactional)
    assert (exchange.status, exchange.body, exchange.complete) == (200, b"done", True)
    assert exchange.was_caused_by(site.commit_error)
    assert "COMMIT failed" in caplog.text
    assert await site.items() == ["a"]


async def test_a_body_without_content_commits_as_well(site: Site) -> None:
    seen: list[object] = []

    async def look() -> None:
        seen.append(await site.items())

    app = site.app(write(Answer(204, b"")), transactional)
    exchange = await site.call(app, watch=at_start(look))
    assert (exchange.status, exchange.body, exchange.complete) == (204, b"", True)
    assert seen == [["a"]]
