"""A session, an engine and a connection belong to one event loop: another one is refused."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio.from_thread
import fastapi
import litestar
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from asgi_db import (
    ConcurrentUseError,
    Database,
    DBSession,
    DBSessionMiddleware,
    Mode,
    plain,
    read_only,
    transactional,
)
from asgi_db.types import ASGIApp
from tests.contract.client import call
from tests.pools import ONE_CONNECTION, checked_out
from tests.servers import assert_idle
from tests.tables import Author, Base

ONE = text("SELECT 1")

Use = Callable[[DBSession], Awaitable[object]]

MODES: list[Mode] = [plain, transactional, read_only]
each_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A pool of one connection, which would be broken for all."""
    async with Database(database_url, engine_options=ONE_CONNECTION) as database:
        await database.create_tables(Base.metadata)
        yield database


def in_a_loop_of_its_own(use: Use, session: DBSession) -> object:
    """What people write in a synchronous endpoint, which runs in a thread."""

    async def run() -> object:
        return await use(session)

    return asyncio.run(run())


async def assert_healthy(database: Database) -> None:
    """Nothing is held, and the only connection serves the others."""
    assert checked_out(database) == 0
    await assert_idle(database.url.render_as_string(hide_password=False))
    for _ in range(3):
        async with database.transaction() as session:
            assert await session.scalar(ONE) == 1


# -- a session, in a synchronous endpoint of each framework ------------------------------------


def starlette_app(use: Use) -> ASGIApp:
    def endpoint(request: Request) -> Response:
        in_a_loop_of_its_own(use, request.state.db)
        return PlainTextResponse("")

    return Starlette(routes=[Route("/", endpoint, methods=["POST"])])


def fastapi_app(use: Use) -> ASGIApp:
    app = fastapi.FastAPI(openapi_url=None)

    @app.post("/")
    def endpoint(request: fastapi.Request) -> None:
        in_a_loop_of_its_own(use, request.state.db)

    return app


def litestar_app(use: Use) -> ASGIApp:
    @litestar.post("/", sync_to_thread=True)
    def endpoint(request: litestar.Request[Any, Any, Any]) -> None:
        in_a_loop_of_its_own(use, request.state.db)

    return litestar.Litestar([endpoint], openapi_config=None, logging_config=None)


APPS = {"starlette": starlette_app, "fastapi": fastapi_app, "litestar": litestar_app}


@each_mode
@pytest.mark.parametrize("framework", APPS)
async def test_a_session_that_is_used_in_another_event_loop_is_an_error_for_this_request_alone(
    database: Database, framework: str, mode: Mode
) -> None:
    errors: list[str] = []

    async def use(session: DBSession) -> None:
        try:
            await session.scalar(ONE)
        except ConcurrentUseError as error:
            errors.append(str(error))
            raise

    app = DBSessionMiddleware(APPS[framework](use), database, mode=mode)
    for _ in range(3):
        assert (await call(app)).status == 500
        await assert_healthy(database)
    assert len(errors) == 3
    assert "another event loop" in errors[0]
    assert "anyio.from_thread.run(" in errors[0]
    assert "database.session()" in errors[0]


USES: dict[str, Use] = {
    "scalar": lambda session: session.scalar(ONE),
    "execute": lambda session: session.execute(ONE),
    "stream": lambda session: session.stream(ONE),
    "get": lambda session: session.get(Author, 1),
    "flush": lambda session: session.flush(),
    "commit": lambda session: session.commit(),
    "rollback": lambda session: session.rollback(),
    "release": lambda session: session.release(),
    "connection": lambda session: session.connection(),
    "begin": lambda session: session.begin().start(),
    "begin_nested": lambda session: session.begin_nested().start(),
    "refresh": lambda session: session.refresh(Author(id=1)),
    "run_sync": lambda session: session.run_sync(lambda sync: sync.scalar(ONE)),
}


@pytest.mark.parametrize("warm", [False, True], ids=["at first", "after a statement"])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
async def test_no_operation_of_a_session_runs_in_another_event_loop(
    database: Database, use: Use, warm: bool
) -> None:
    async with database.transaction() as session:
        if warm:
            session.add(Author(id=2, name="stays"))
            await session.flush()
        with pytest.raises(ConcurrentUseError, match="another event loop"):
            await asyncio.to_thread(in_a_loop_of_its_own, use, session)
        assert await session.scalar(ONE) == 1
    await assert_healthy(database)
    async with database.session(read_only) as session:
        assert (await session.get(Author, 2) is not None) == warm


async def test_another_event_loop_is_refused_while_the_sessions_own_is_in_a_statement(
    database: Database,
) -> None:
    async with database.transaction() as session:
        running = asyncio.create_task(session.scalar(ONE))
        with pytest.raises(ConcurrentUseError, match="another event loop"):
            await asyncio.to_thread(in_a_loop_of_its_own, USES["scalar"], session)
        assert await running == 1
    await assert_healthy(database)


async def test_another_event_loop_may_try_first_while_the_sessions_own_does(
    database_url: str,
) -> None:
    """Both find a session that is not complete yet: it gets one synchronous half, and no more."""
    both_try = threading.Barrier(2)
    made = list[Session]()

    class SlowSession(Session):
        def __init__(self, **options: Any) -> None:
            made.append(self)
            if len(made) > 1:  # The first is made to see whether the class will do.
                with contextlib.suppress(threading.BrokenBarrierError):
                    both_try.wait(0.5)  # The other one comes as far, if nothing stops it.
            super().__init__(**options)

    options = {"sync_session_class": SlowSession}
    async with Database(
        database_url, engine_options=ONE_CONNECTION, session_options=options
    ) as database:
        async with database.transaction() as session:
            foreign = asyncio.create_task(
                asyncio.to_thread(in_a_loop_of_its_own, USES["scalar"], session)
            )
            await asyncio.sleep(0)  # The thread runs.
            assert await session.scalar(ONE) == 1
            with pytest.raises(ConcurrentUseError, match="another event loop"):
                await foreign
        assert len(made) == 2
        await assert_healthy(database)


@each_mode
async def test_a_thread_uses_the_session_in_its_own_event_loop(
    database: Database, mode: Mode
) -> None:
    """As the error says."""

    def endpoint(request: Request) -> Response:
        found = anyio.from_thread.run(request.state.db.scalar, ONE)
        return PlainTextResponse(str(found))

    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    exchange = await call(DBSessionMiddleware(app, database, mode=mode))
    assert (exchange.status, exchange.body) == (200, b"1")
    await assert_healthy(database)


# -- an engine, and a connection ---------------------------------------------------------------


async def take_connection(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await connection.execute(ONE)


@pytest.mark.parametrize("is_free", [True, False], ids=["free", "all taken"])
async def test_an_engine_lends_no_connection_to_another_event_loop(
    database: Database, is_free: bool
) -> None:
    engine = database.engine
    if is_free:
        with pytest.raises(ConcurrentUseError, match=r"another event loop.*`database\.engine`"):
            await asyncio.to_thread(asyncio.run, take_connection(engine))
    else:
        async with engine.connect():
            with pytest.raises(ConcurrentUseError, match="another event loop"):
                await asyncio.to_thread(asyncio.run, take_connection(engine))
    await assert_healthy(database)


async def test_the_variants_of_an_engine_lend_none_either(database: Database) -> None:
    engine = database.engine.execution_options(isolation_level="AUTOCOMMIT")
    with pytest.raises(ConcurrentUseError, match="another event loop"):
        await asyncio.to_thread(asyncio.run, take_connection(engine))
    await assert_healthy(database)


@pytest.mark.parametrize("of_session", [True, False], ids=["of a session", "of the engine"])
async def test_a_connection_executes_nothing_in_another_event_loop(
    database: Database, of_session: bool
) -> None:
    async def execute() -> None:
        await connection.execute(ONE)

    if of_session:
        async with database.transaction() as session:
            connection = await session.connection()
            with pytest.raises(ConcurrentUseError, match="another event loop"):
                await asyncio.to_thread(asyncio.run, execute())
            assert await session.scalar(ONE) == 1
    else:
        async with database.engine.connect() as connection:
            with pytest.raises(ConcurrentUseError, match="another event loop"):
                await asyncio.to_thread(asyncio.run, execute())
            assert await connection.scalar(ONE) == 1
    await assert_healthy(database)


async def test_each_event_loop_has_an_engine_of_its_own(database: Database) -> None:
    """As the error says."""

    async def work() -> None:
        await take_connection(database.engine)
        async with database.transaction() as session:
            assert await session.scalar(ONE) == 1
        await database.dispose()

    await asyncio.to_thread(asyncio.run, work())
    await assert_healthy(database)


async def test_an_engine_serves_again_after_its_event_loop_was_closed(database_url: str) -> None:
    """It was disposed there, so that no connection of that loop is left in it."""
    database = Database(database_url, engine_options=ONE_CONNECTION)

    async def work() -> AsyncEngine:
        async with database:
            await take_connection(database.engine)
            return database.engine

    engine = await asyncio.to_thread(asyncio.run, work())
    await take_connection(engine)
    await engine.dispose()
