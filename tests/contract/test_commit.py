"""Nothing is acknowledged before it is durable, and a failed COMMIT is an ordinary error."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from asgi_db import DBSession, transactional
from tests.contract.client import call
from tests.contract.endpoints import Answer, Handlers, Work
from tests.contract.site import Site, at_start, write

WAYS: dict[str, dict[str, Any]] = {
    "decorator": {"mode": transactional},
    "dependency": {"dependency": transactional},
    "default": {"default": transactional},
    "decorator, middleware around": {"mode": transactional, "around": True},
}
"""Where a route can get its mode from."""

CONFLICT = Answer(409, b'{"detail": "conflict"}')

placements = pytest.mark.parametrize("around", [False, True], ids=["inside", "around"])


def fail_at_commit(site: Site, background: Callable[[], Any] | None = None) -> Work:
    """Work that goes well, all but its COMMIT."""

    async def run_in_background() -> None:
        assert background is not None
        background()

    async def order(session: DBSession) -> Answer:
        await write()(session)
        await site.spoil_commit(session)
        return Answer(201, b"ordered", background=run_in_background if background else None)

    return order


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
async def test_a_write_is_visible_to_another_connection_when_the_status_line_leaves(
    site: Site, way: dict[str, Any]
) -> None:
    seen: list[object] = []

    async def look() -> None:
        seen.append((site.checked_out, await site.items()))
        await site.assert_nothing_held()

    exchange = await site.call(site.app(write(Answer(201)), **way), watch=at_start(look))
    assert (exchange.status, exchange.body, exchange.complete) == (201, b"done", True)
    assert seen == [(0, ["a"])]


@placements
async def test_a_failed_commit_without_a_handler_is_an_error_of_the_server(
    site: Site, around: bool, caplog: pytest.LogCaptureFixture
) -> None:
    ran: list[object] = []
    work = fail_at_commit(site, lambda: ran.append("background"))
    exchange = await site.answer(work, transactional, around=around)
    assert (exchange.status, exchange.complete) == (site.unhandled, True)
    assert b"ordered" not in exchange.body
    if site.unhandled == 500:  # else it is the middleware that answers
        assert isinstance(exchange.error, site.commit_error) == site.framework.reraises
        assert exchange.answered_by_server == (site.framework.name == "asgi")
    assert await site.items() == []
    assert ran == []
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert any("POST /" in error and "COMMIT failed" in error for error in errors)
    assert any("POST /" in error and "201" in error for error in errors)


@placements
async def test_a_failed_commit_is_answered_by_the_registered_handler(
    site: Site, around: bool
) -> None:
    ran: list[object] = []
    work = fail_at_commit(site, lambda: ran.append("background"))
    handlers = {site.commit_error: CONFLICT}
    exchange = await site.answer(work, transactional, handlers=handlers, around=around)
    assert (exchange.status, exchange.body, exchange.complete) == (409, CONFLICT.body, True)
    assert (exchange.error, exchange.answered_by_server) == (None, False)
    assert await site.items() == []
    assert ran == []


@placements
async def test_a_failed_commit_is_answered_by_the_handler_of_every_exception(
    site: Site, around: bool
) -> None:
    handlers = {Exception: Answer(500, b"our own page")}
    work = fail_at_commit(site)
    exchange = await site.answer(work, transactional, handlers=handlers, around=around)
    # What is unavailable is a 503, unless there is a handler for it, or a base of it.
    assert (exchange.status, exchange.complete) == (site.unhandled, True)
    assert (exchange.body == b"our own page") == (site.unhandled == 500)
    assert await site.items() == []


async def test_the_nearest_handler_answers_a_failed_commit(site: Site) -> None:
    handlers = {site.commit_error: CONFLICT, Exception: Answer(500, b"our own page")}
    exchange = await site.answer(fail_at_commit(site), transactional, handlers=handlers)
    assert (exchange.status, exchange.body) == (409, CONFLICT.body)


@pytest.mark.parametrize("handled", [False, True], ids=["unhandled", "handled"])
async def test_after_a_failed_commit_twenty_requests_go_well_on_the_same_pool(
    site: Site, handled: bool
) -> None:
    async def order(session: DBSession) -> None:
        name = f"{len(answered):02}"
        await write(name=name)(session)

    handlers: Handlers = {site.commit_error: CONFLICT} if handled else {}
    endpoints = {"/bad": fail_at_commit(site), "/good": order}
    app = site.app(endpoints, transactional, handlers=handlers)
    assert (await site.call(app, "/bad")).status == (409 if handled else site.unhandled)
    answered: list[int] = []
    for _ in range(20):
        answered.append((await call(app, "/good")).status)
        assert site.checked_out == 0
    await site.assert_nothing_held()
    assert answered == [200] * 20
    assert await site.items() == [f"{number:02}" for number in range(20)]


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
async def test_no_chunk_of_a_stream_leaves_when_the_commit_fails(
    site: Site, spec_version: str
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"chunk"

    async def export(session: DBSession) -> Answer:
        await fail_at_commit(site)(session)
        return Answer(stream=chunks)

    app = site.app(export, transactional, handlers={site.commit_error: CONFLICT})
    exchange = await site.call(app, spec_version=spec_version)
    assert (exchange.status, exchange.body, exchange.complete) == (409, CONFLICT.body, True)
    assert await site.items() == []
