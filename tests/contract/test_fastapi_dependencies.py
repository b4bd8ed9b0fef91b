"""FastAPI's own: dependencies with `yield`, response models, `BackgroundTasks`."""

from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from fastapi.exceptions import ResponseValidationError
from pydantic import BaseModel
from sqlalchemy.exc import DBAPIError

from asgi_db import DBSessionMiddleware
from asgi_db_fastapi import CurrentSessionReadOnly, CurrentSessionTransaction
from tests.contract.apps import InFastAPI, starlette_handlers
from tests.contract.endpoints import Answer
from tests.contract.site import BAD_STATEMENT, Item, Site, write

pytestmark = pytest.mark.parametrize("framework", [InFastAPI()], ids=["fastapi"])

FailsAt = Literal["statement", "commit"]


def make_app(site: Site, **options: Any) -> FastAPI:
    app = FastAPI(openapi_url=None, **options)
    app.add_middleware(DBSessionMiddleware, database=site.database)
    return app


async def fail(site: Site, session: CurrentSessionTransaction, at: FailsAt) -> None:
    """Write, and fail in a statement or at COMMIT."""
    await write()(session)
    if at == "commit":
        await site.spoil_commit(session)
    else:
        await session.execute(BAD_STATEMENT)


async def translate(session: CurrentSessionTransaction) -> AsyncGenerator[None]:
    """Turn an error of the database into an answer."""
    try:
        yield
    except DBAPIError as error:
        raise HTTPException(409, "translated") from error


async def swallow(session: CurrentSessionTransaction) -> AsyncGenerator[None]:
    """Make the mistake of which FastAPI's documentation warns."""
    try:
        yield
    except DBAPIError:
        pass


@pytest.mark.parametrize("handled", [False, True], ids=["no handler", "handler"])
@pytest.mark.parametrize("at", ["statement", "commit"])
async def test_a_dependency_may_turn_the_error_into_the_answer(
    site: Site, at: FailsAt, handled: bool
) -> None:
    app = make_app(site, exception_handlers=handlers(handled))

    @app.post("/", dependencies=[Depends(translate)])
    async def order(session: CurrentSessionTransaction) -> str:
        await fail(site, session, at)
        return "ordered"

    exchange = await site.call(app)
    assert (exchange.status, exchange.body) == (409, b'{"detail":"translated"}')
    assert (exchange.complete, exchange.error) == (True, None)
    assert await site.items() == []


@pytest.mark.parametrize("handled", [False, True], ids=["no handler", "handler"])
async def test_a_function_scoped_dependency_sees_the_error_of_a_statement(
    site: Site, handled: bool
) -> None:
    app = make_app(site, exception_handlers=handlers(handled))

    @app.post("/", dependencies=[Depends(translate, scope="function")])
    async def order(session: CurrentSessionTransaction) -> str:
        await fail(site, session, "statement")
        return "ordered"

    exchange = await site.call(app)
    assert (exchange.status, exchange.body) == (409, b'{"detail":"translated"}')
    assert await site.items() == []


@pytest.mark.parametrize("handled", [False, True], ids=["no handler", "handler"])
async def test_a_function_scoped_dependency_has_ended_before_the_commit(
    site: Site, handled: bool
) -> None:
    """FastAPI ends it before the response begins: then the application's handlers answer."""
    app = make_app(site, exception_handlers=handlers(handled))

    @app.post("/", dependencies=[Depends(translate, scope="function")])
    async def order(session: CurrentSessionTransaction) -> str:
        await fail(site, session, "commit")
        return "ordered"

    exchange = await site.call(app)
    assert (exchange.status, exchange.complete) == (418 if handled else site.unhandled, True)
    assert b"ordered" not in exchange.body
    assert await site.items() == []


@pytest.mark.parametrize("handled", [False, True], ids=["no handler", "handler"])
async def test_a_dependency_that_swallows_the_commit_error_gets_nothing_acknowledged(
    site: Site, handled: bool
) -> None:
    app = make_app(site, exception_handlers=handlers(handled))

    @app.post("/", dependencies=[Depends(swallow)])
    async def order(session: CurrentSessionTransaction) -> str:
        await fail(site, session, "commit")
        return "ordered"

    exchange = await site.call(app)
    assert (exchange.status in (418, site.unhandled), exchange.complete) == (True, True)
    assert b"ordered" not in exchange.body
    assert await site.items() == []


async def test_a_write_in_the_exit_of_a_function_scoped_dependency_commits(site: Site) -> None:
    async def audit(session: CurrentSessionTransaction) -> AsyncGenerator[None]:
        yield
        session.add(Item(name="audit"))

    app = make_app(site)

    @app.post("/", dependencies=[Depends(audit, scope="function")])
    async def order(session: CurrentSessionTransaction) -> str:
        await write()(session)
        return "ordered"

    exchange = await site.call(app)
    assert (exchange.status, exchange.body) == (200, b'"ordered"')
    assert await site.items() == ["a", "audit"]


async def test_a_write_in_the_exit_of_a_request_scoped_dependency_is_a_unit_of_its_own(
    site: Site,
) -> None:
    async def audit(session: CurrentSessionTransaction) -> AsyncGenerator[None]:
        yield
        assert await site.items() == ["a"]
        session.add(Item(name="audit"))

    app = make_app(site)

    @app.post("/", dependencies=[Depends(audit)])
    async def order(session: CurrentSessionTransaction) -> str:
        await write()(session)
        return "ordered"

    exchange = await site.call(app)
    assert (exchange.status, exchange.body, exchange.error) == (200, b'"ordered"', None)
    assert await site.items() == ["a", "audit"]


async def test_two_dependencies_share_the_session_and_the_stronger_mode_wins(site: Site) -> None:
    async def reader(session: CurrentSessionReadOnly) -> int:
        return id(session)

    app = make_app(site)

    @app.post("/")
    async def order(
        reader: Annotated[int, Depends(reader)], session: CurrentSessionTransaction
    ) -> bool:
        await write()(session)
        return reader == id(session)

    exchange = await site.call(app)
    assert (exchange.status, exchange.body) == (200, b"true")
    assert await site.items() == ["a"]


async def test_an_answer_that_does_not_fit_its_model_rolls_back(site: Site) -> None:
    class Order(BaseModel):
        number: int

    app = make_app(site)

    @app.post("/", response_model=Order)
    async def order(session: CurrentSessionTransaction) -> dict[str, str]:
        await write()(session)
        await session.flush()
        return {"number": "none"}

    exchange = await site.call(app)
    assert (exchange.status, exchange.complete) == (500, True)
    assert exchange.was_caused_by(ResponseValidationError)
    assert await site.items() == []


@pytest.mark.parametrize("handled", [False, True], ids=["no handler", "handler"])
async def test_background_tasks_run_after_the_commit_and_not_without_it(
    site: Site, handled: bool
) -> None:
    seen: list[object] = []

    async def look() -> None:
        seen.append((site.checked_out, await site.items()))

    app = make_app(site, exception_handlers=handlers(handled))

    @app.post("/{outcome}")
    async def order(
        outcome: str, session: CurrentSessionTransaction, background: BackgroundTasks
    ) -> str:
        background.add_task(look)
        await write(name=outcome)(session)
        if outcome == "fail":
            await site.spoil_commit(session)
        return "ordered"

    exchange = await site.call(app, "/fail")
    assert (exchange.status, exchange.complete) == (418 if handled else site.unhandled, True)
    assert seen == []
    exchange = await site.call(app, "/succeed")
    assert (exchange.status, exchange.body) == (200, b'"ordered"')
    assert seen == [(0, ["succeed"])]


def handlers(handled: bool) -> dict[Any, Any]:
    """The handler of the application, which answers what no dependency has answered."""
    return starlette_handlers({DBAPIError: Answer(418, b"handler")} if handled else {})
