"""A failed COMMIT is one event, with its route, on FastAPI and Litestar; a conflict that the
application answers is none.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import sentry_sdk
import uvicorn
from fastapi import FastAPI, Request, Response
from litestar import Litestar, post
from litestar.di import NamedDependency
from litestar.params import FromQuery
from sentry_sdk.envelope import Envelope
from sentry_sdk.transport import Transport
from sqlalchemy.exc import IntegrityError

from asgi_db import Database, DBSession, DBSessionMiddleware
from asgi_db_fastapi import CurrentSessionTransaction
from asgi_db_litestar import DatabasePlugin
from tests.ecosystem.heroes import NO_SUCH_TEAM, Hero, heroes


class Collected(Transport):
    """The events which would have been sent."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Any] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        event = envelope.get_event()
        if event is not None:
            self.events.append(event)


@pytest.fixture
def sent() -> Generator[Collected, None, None]:
    """What Sentry is told, with everything that it does by default."""
    transport = Collected()
    sentry_sdk.init(dsn="http://key@127.0.0.1/1", transport=transport)
    yield transport
    sentry_sdk.get_client().close()
    sentry_sdk.get_global_scope().set_client(None)


def application(database: Database) -> FastAPI:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=database)

    @app.post("/heroes", status_code=201)
    async def create(name: str, session: CurrentSessionTransaction, team: int | None = None) -> int:
        hero = Hero(name=name, team_id=team)
        session.add(hero)
        await session.flush()
        return hero.id

    @app.post("/fails")
    async def fail(session: CurrentSessionTransaction) -> None:
        session.add(Hero(name="ada"))
        await session.flush()
        raise LookupError("of the handler")

    return app


def application_that_answers(database: Database) -> FastAPI:
    app = application(database)

    @app.exception_handler(IntegrityError)
    async def conflict(_request: Request, _error: Exception) -> Response:
        return Response(status_code=409)

    return app


def in_litestar(database: Database) -> Litestar:
    @post("/heroes")
    async def create(
        name: FromQuery[str],
        db_session_transaction: NamedDependency[DBSession],
        team: FromQuery[int | None] = None,
    ) -> None:
        db_session_transaction.add(Hero(name=name, team_id=team))

    return Litestar([create], plugins=[DatabasePlugin(database)], openapi_config=None)


@asynccontextmanager
async def over_http(app: Any) -> AsyncGenerator[httpx.AsyncClient]:
    """The application behind uvicorn, which logs the errors that it sees."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    running = asyncio.create_task(server.serve([listening]))
    url = "http://{}:{}".format(*listening.getsockname())
    try:
        async with httpx.AsyncClient(base_url=url) as client:
            yield client
    finally:
        server.should_exit = True
        await running


def kinds(event: Any) -> list[str]:
    return [error["type"] for error in event["exception"]["values"]]


@pytest.mark.parametrize("make", [application, in_litestar], ids=["fastapi", "litestar"])
async def test_a_failed_commit_is_one_event(
    make: Callable[[Database], Any], database: Database, sent: Collected
) -> None:
    async with over_http(make(database)) as client:
        answer = await client.post(f"/heroes?name=ada&team={NO_SUCH_TEAM}")
        assert answer.status_code == 500
        [event] = sent.events
        assert kinds(event)[-1] == "IntegrityError"
        assert "heroes" in event["transaction"] or "create" in event["transaction"]
        crumbs = [crumb["message"] for crumb in event["breadcrumbs"]["values"]]
        assert any("POST /heroes" in crumb and "COMMIT failed" in crumb for crumb in crumbs)
        assert "ada" not in str([error["value"] for error in event["exception"]["values"]])
        assert (await client.post("/heroes?name=ada")).status_code == 201
    assert heroes(str(database.url)) == ["ada"]
    assert len(sent.events) == 1


async def test_an_error_of_the_handler_is_one_event(database: Database, sent: Collected) -> None:
    async with over_http(application(database)) as client:
        assert (await client.post("/fails")).status_code == 500
    [event] = sent.events
    assert kinds(event) == ["LookupError"]
    assert heroes(str(database.url)) == []


async def test_a_conflict_that_the_application_answers_is_no_event(
    database: Database, sent: Collected
) -> None:
    async with over_http(application_that_answers(database)) as client:
        answer = await client.post(f"/heroes?name=ada&team={NO_SUCH_TEAM}")
        assert answer.status_code == 409
    assert sent.events == []


async def test_a_block_that_fails_to_commit_is_one_event_of_its_caller(
    database: Database, sent: Collected
) -> None:
    async with database:
        try:
            async with database.transaction() as session:
                session.add(Hero(name="ada", team_id=NO_SUCH_TEAM))
        except IntegrityError:
            sentry_sdk.capture_exception()
    assert [kinds(event)[-1] for event in sent.events] == ["IntegrityError"]
