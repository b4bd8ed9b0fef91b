"""What commits and what rolls back: exceptions, statuses and redirects."""

from collections.abc import AsyncIterator

import pytest

from asgi_db import DBSession, DBSessionMiddleware, transactional
from asgi_db.types import Receive, Scope, Send
from tests.contract.apps import BareASGI
from tests.contract.endpoints import Answer
from tests.contract.site import Site, write

REDIRECT = Answer(303, b"", location="/elsewhere")


async def raise_value_error(session: DBSession) -> None:
    """Write, and fail."""
    await write()(session)
    await session.flush()
    raise ValueError("refused")


@pytest.mark.parametrize("status", [201, 399])
async def test_a_status_below_400_commits(site: Site, status: int) -> None:
    exchange = await site.answer(write(Answer(status)), transactional)
    assert (exchange.status, exchange.body, exchange.complete) == (status, b"done", True)
    assert await site.items() == ["a"]


@pytest.mark.parametrize("status", [400, 503])
async def test_a_returned_status_of_400_or_above_rolls_back(site: Site, status: int) -> None:
    exchange = await site.answer(write(Answer(status)), transactional)
    assert (exchange.status, exchange.body, exchange.complete) == (status, b"done", True)
    assert await site.items() == []


async def test_a_raised_http_error_rolls_back(site: Site) -> None:
    async def refuse(session: DBSession) -> None:
        await write()(session)
        await session.flush()
        raise site.framework.http_error(Answer(409))

    exchange = await site.answer(refuse, transactional)
    assert (exchange.status, exchange.complete, exchange.error) == (409, True, None)
    assert await site.items() == []


@pytest.mark.parametrize("around", [False, True], ids=["inside", "around"])
async def test_an_unhandled_error_is_a_500_and_rolls_back(site: Site, around: bool) -> None:
    exchange = await site.answer(raise_value_error, transactional, around=around)
    assert (exchange.status, exchange.complete) == (500, True)
    assert isinstance(exchange.error, ValueError) == site.framework.reraises
    assert await site.items() == []


@pytest.mark.parametrize(
    ("status", "around"),
    [(200, False), (422, False), (200, True)],
    ids=["200", "422", "200, middleware around"],
)
async def test_an_error_that_a_handler_turns_into_a_response_rolls_back(
    site: Site, status: int, around: bool
) -> None:
    handlers = {ValueError: Answer(status, b"handled")}
    exchange = await site.answer(raise_value_error, transactional, handlers=handlers, around=around)
    assert (exchange.status, exchange.body, exchange.error) == (status, b"handled", None)
    assert await site.items() == []


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
async def test_an_error_that_a_handler_turns_into_a_stream_rolls_back(
    site: Site, spec_version: str
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"handled"

    app = site.app(raise_value_error, transactional, handlers={ValueError: Answer(stream=chunks)})
    exchange = await site.call(app, spec_version=spec_version)
    assert (exchange.status, exchange.body, exchange.complete) == (200, b"handled", True)
    assert await site.items() == []


async def test_an_error_that_the_endpoint_itself_handles_commits(site: Site) -> None:
    async def recover(session: DBSession) -> Answer:
        try:
            await raise_value_error(session)
        except ValueError:
            return Answer(200, b"recovered")
        raise AssertionError

    exchange = await site.answer(recover, transactional)
    assert (exchange.status, exchange.body) == (200, b"recovered")
    assert await site.items() == ["a"]


async def test_a_returned_redirect_commits(site: Site) -> None:
    exchange = await site.answer(write(REDIRECT), transactional)
    assert (exchange.status, exchange.complete, exchange.location) == (303, True, "/elsewhere")
    assert await site.items() == ["a"]


async def test_a_raised_redirect_commits(site: Site) -> None:
    async def redirect(session: DBSession) -> None:
        await write()(session)
        raise site.framework.http_error(REDIRECT)

    exchange = await site.answer(redirect, transactional)
    assert (exchange.status, exchange.complete, exchange.location) == (303, True, "/elsewhere")
    assert await site.items() == ["a"]


@pytest.mark.parametrize(("status", "items"), [(422, ["a"]), (200, [])])
async def test_commit_on_replaces_the_rule_of_the_status(
    site: Site, status: int, items: list[str]
) -> None:
    mode = transactional(commit_on=lambda status: status == 422)
    exchange = await site.answer(write(Answer(status)), mode)
    assert (exchange.status, exchange.body) == (status, b"done")
    assert await site.items() == items


async def test_commit_on_does_not_replace_the_rule_of_the_exception(site: Site) -> None:
    mode = transactional(commit_on=lambda status: True)
    handlers = {ValueError: Answer(422)}
    exchange = await site.answer(raise_value_error, mode, handlers=handlers)
    assert (exchange.status, exchange.body) == (422, b"done")
    assert await site.items() == []


async def test_a_commit_on_that_fails_is_a_500_and_rolls_back(site: Site) -> None:
    def fail(status: int) -> bool:
        raise ValueError(status)

    handlers = {ValueError: Answer(500, b"no rule")}
    exchange = await site.answer(write(), transactional(commit_on=fail), handlers=handlers)
    assert (exchange.status, exchange.body, exchange.complete) == (500, b"no rule", True)
    assert await site.items() == []


# -- what only a bare application can do ---------------------------------------------------------


@pytest.mark.parametrize("framework", [BareASGI()], ids=["asgi"])
@pytest.mark.parametrize("kind", ["http.response.early_hint", "http.response.debug"])
async def test_only_the_status_line_ends_the_unit_of_the_request(site: Site, kind: str) -> None:
    held: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await write()(scope["state"]["db"])
        await scope["state"]["db"].flush()
        await send({"type": kind})
        held.append(site.checked_out)
        await send({"type": "http.response.start", "status": 409, "headers": []})
        await send({"type": "http.response.body", "body": b"refused"})

    middleware = DBSessionMiddleware(app, database=site.database, mode=transactional)
    exchange = await site.call(middleware)
    assert (exchange.status, exchange.body, exchange.complete) == (409, b"refused", True)
    assert held == [1]
    assert await site.items() == []


@pytest.mark.parametrize("framework", [BareASGI()], ids=["asgi"])
async def test_an_application_that_answers_nothing_rolls_back(site: Site) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await write()(scope["state"]["db"])
        await scope["state"]["db"].flush()

    middleware = DBSessionMiddleware(app, database=site.database, mode=transactional)
    exchange = await site.call(middleware)
    assert (exchange.status, exchange.answered_by_server) == (500, True)
    assert await site.items() == []
