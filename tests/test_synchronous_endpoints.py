"""What a synchronous endpoint, in its thread, has of the database; and what code has at import."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from litestar import Litestar, post
from litestar.di import Provide
from sqlalchemy.exc import MissingGreenlet
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from asgi_db import Database, DBSession, DBSessionMiddleware
from asgi_db.types import ASGIApp
from asgi_db_fastapi import CurrentSessionTransaction
from asgi_db_litestar import DatabasePlugin
from tests.contract.client import call
from tests.servers import assert_idle
from tests.tables import Author, Base
from tests.versions import NamedDependency

Work = Callable[[Author], object]
"""What the endpoint does, in a thread, with an author that was loaded before."""


async def ada(session: DBSession) -> Author:
    """An author, as a dependency loads one."""
    return await session.get_one(Author, 1)


def in_fastapi(database: Database, work: Work) -> ASGIApp:
    """An application whose dependency is asynchronous, and whose endpoint is not."""
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=database)

    async def author_of(session: CurrentSessionTransaction) -> Author:
        return await ada(session)

    @app.post("/", response_model=None)
    def endpoint(author: Annotated[Author, Depends(author_of)], tasks: BackgroundTasks) -> Response:
        work(author)
        tasks.add_task(work, author)
        return Response()

    return app


def in_starlette(database: Database, work: Work) -> ASGIApp:
    """The same; the endpoint calls a function in a thread."""

    async def endpoint(request: Request) -> Response:
        author = await ada(request.state.db)
        await run_in_threadpool(work, author)
        return Response(background=BackgroundTask(work, author))

    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    app.add_middleware(DBSessionMiddleware, database=database)
    return app


def in_litestar(database: Database, work: Work) -> ASGIApp:
    """The same as in FastAPI."""

    async def author_of(db_session: NamedDependency[DBSession]) -> Author:
        return await ada(db_session)

    @post("/", sync_to_thread=True)
    def endpoint(author: NamedDependency[Any]) -> None:
        work(author)

    return Litestar(
        [endpoint],
        plugins=[DatabasePlugin(database)],
        dependencies={"author": Provide(author_of)},
        openapi_config=None,
        logging_config=None,
    )


every_framework = pytest.mark.parametrize(
    "app_of", [in_fastapi, in_starlette, in_litestar], ids=["fastapi", "starlette", "litestar"]
)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A database with an author, and a pool of one connection."""
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}
    async with Database(database_url, engine_options=options) as database:
        await database.create_tables(Base.metadata)
        async with database.transaction() as session:
            session.add(Author(id=1, name="ada"))
        yield database


@every_framework
async def test_a_lazy_load_in_a_synchronous_endpoint_is_named_as_such(
    database: Database, app_of: Callable[[Database, Work], ASGIApp]
) -> None:
    errors: list[str] = []

    def load_lazily(author: Author) -> object:
        try:
            return author.books
        except MissingGreenlet as error:
            errors.append(str(error))
            raise

    exchange = await call(app_of(database, load_lazily))
    assert exchange.status == 500
    (message,) = errors
    assert "POST /" in message
    assert "synchronous endpoint" in message
    assert "selectinload" in message
    assert not database.holders()
    await assert_idle(database.url.render_as_string(hide_password=False))


@every_framework
async def test_a_synchronous_endpoint_and_its_background_tasks_have_the_engine(
    database: Database, app_of: Callable[[Database, Work], ASGIApp]
) -> None:
    found: list[tuple[object, bool]] = []

    def work(_: Author) -> None:
        is_in_thread = threading.current_thread() is not threading.main_thread()
        found.append((database.engine, is_in_thread))

    exchange = await call(app_of(database, work))
    assert exchange.status in (200, 201)
    assert set(found) == {(database.engine, True)}


def test_before_there_is_an_engine_the_error_says_how_to_come_by_one() -> None:
    with pytest.raises(RuntimeError, match="when the application starts") as caught:
        _ = Database("postgresql://app:secret@localhost/shop").engine
    assert "secret" not in str(caught.value)
    assert "Database(engine=...)" in str(caught.value)


def test_an_engine_of_the_users_own_is_there_when_the_program_is_imported() -> None:
    engine = create_async_engine("sqlite+aiosqlite://")
    assert Database(engine=engine).engine is engine


@pytest.fixture
def loops() -> Iterator[list[asyncio.AbstractEventLoop]]:
    """Two event loops."""
    loops = [asyncio.new_event_loop() for _ in range(2)]
    yield loops
    for loop in loops:
        loop.close()


def test_of_several_engines_none_is_taken_by_chance_outside_their_loops(
    loops: list[asyncio.AbstractEventLoop], sqlite_url: str
) -> None:
    database = Database(sqlite_url)

    async def engine() -> object:
        return database.engine

    first, second = (loop.run_until_complete(engine()) for loop in loops)
    with pytest.raises(RuntimeError, match="2 engines"):
        _ = database.engine
    loops[0].close()
    assert database.engine is second is not first
    loops[1].run_until_complete(database.dispose())
    with pytest.raises(RuntimeError, match="no engine yet"):
        _ = database.engine
