"""What is special to FastAPI besides `tests/contract/test_fastapi_dependencies.py`."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, Request, WebSocket
from sqlalchemy import func, select
from starlette.testclient import TestClient

from asgi_db import (
    DBSession,
    DBSessionMiddleware,
    MissingMiddlewareError,
    ModeConflictError,
    ReadOnlyError,
    transactional,
)
from asgi_db_fastapi import (
    CurrentSession,
    CurrentSessionReadOnly,
    CurrentSessionTransaction,
    get_db,
    get_db_read_only,
    get_db_transaction,
)
from tests.contract.apps import InFastAPI
from tests.contract.client import call
from tests.contract.site import Item, Site, write
from tests.servers import assert_idle
from tests.sockets import websocket

DEPENDENCIES = {
    "plain": get_db,
    "transactional": get_db_transaction,
    "read_only": get_db_read_only,
}
each_dependency = pytest.mark.parametrize("dependency", DEPENDENCIES.values(), ids=DEPENDENCIES)
weaker = pytest.mark.parametrize(
    "dependency", [get_db, get_db_read_only], ids=["plain", "read_only"]
)

COUNT = select(func.count()).select_from(Item)


@pytest.fixture
async def site(database_url: str) -> AsyncIterator[Site]:
    """FastAPI on each database, with one connection and no overflow."""
    async with Site.on(InFastAPI(), database_url) as site:
        yield site
        await site.assert_nothing_held()


def app_on(site: Site) -> FastAPI:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=site.database)
    return app


# -- WebSockets --------------------------------------------------------------------------------


def chat_app(site: Site) -> FastAPI:
    """Stores each message, and answers what another connection sees once the answer has left."""
    app = app_on(site)

    @app.websocket("/")
    async def chat(socket: WebSocket, session: CurrentSessionTransaction) -> None:
        await socket.accept()
        async for name in socket.iter_text():
            await write(name=name)(session)
            await session.flush()
            if name == "broken":
                raise ValueError(name)
            try:
                if name == "refused":
                    raise KeyError(name)
            except KeyError:
                await socket.send_text("refused")
            else:
                await socket.send_text(f"stored {name}")

    return app


async def test_a_message_is_committed_before_its_answer_leaves(site: Site) -> None:
    async with websocket(chat_app(site)) as socket:
        assert await socket.ask("a") == "stored a"
        assert await site.items() == ["a"]
        assert await socket.ask("b") == "stored b"
        assert await site.items() == ["a", "b"]
    assert socket.error is None


async def test_an_idle_socket_holds_no_connection(site: Site) -> None:
    """The pool has one connection, and two sockets and a request get along with it."""
    app = chat_app(site)

    @app.get("/count")
    async def count(session: CurrentSessionReadOnly) -> int | None:
        return await session.scalar(COUNT)

    async with websocket(app) as one, websocket(app) as other:
        await one.ask("one")
        await other.ask("other")
        await one.waits.wait()
        await other.waits.wait()
        assert site.checked_out == 0
        await assert_idle(site.url)
        assert (await call(app, "/count", method="GET")).body == b"2"


async def test_a_handler_that_answers_its_error_rolls_back_only_that_message(site: Site) -> None:
    async with websocket(chat_app(site)) as socket:
        assert await socket.ask("before") == "stored before"
        assert await socket.ask("refused") == "refused"
        assert await site.items() == ["before"]
        assert await socket.ask("after") == "stored after"
    assert await site.items() == ["after", "before"]


async def test_a_handler_that_fails_rolls_back_only_its_last_message(site: Site) -> None:
    async with websocket(chat_app(site)) as socket:
        assert await socket.ask("before") == "stored before"
        socket.send({"type": "websocket.receive", "text": "broken"})
        assert await socket.receive() is None
    assert isinstance(socket.error, ValueError)
    assert await site.items() == ["before"]


async def test_a_failed_commit_keeps_the_answer_from_leaving(site: Site) -> None:
    app = app_on(site)

    @app.websocket("/")
    async def chat(socket: WebSocket, session: CurrentSessionTransaction) -> None:
        await socket.accept()
        async for name in socket.iter_text():
            await write(name=name)(session)
            if name == "spoilt":
                await site.spoil_commit(session)
            try:
                await socket.send_text(f"stored {name}")
            except site.commit_error:
                await socket.send_text("not stored")

    async with websocket(app) as socket:
        assert await socket.ask("spoilt") == "not stored"
        assert await site.items() == []
        assert await socket.ask("a") == "stored a"
        assert await site.items() == ["a"]


async def test_in_a_plain_socket_the_handler_commits_each_message(site: Site) -> None:
    app = app_on(site)

    @app.websocket("/")
    async def chat(socket: WebSocket, session: CurrentSession) -> None:
        await socket.accept()
        async for name in socket.iter_text():
            await write(name=name)(session)
            await session.flush()
            if name == "kept":
                await session.commit()
            await socket.send_text(name)

    async with websocket(app) as socket:
        for name in "lost", "kept", "lost too":
            assert await socket.ask(name) == name
            assert site.checked_out == 0
    assert await site.items() == ["kept"]


async def test_a_socket_that_only_reads_sees_what_others_commit_and_refuses_writes(
    site: Site,
) -> None:
    app = app_on(site)

    @app.websocket("/")
    async def chat(socket: WebSocket, session: CurrentSessionReadOnly) -> None:
        await socket.accept()
        async for name in socket.iter_text():
            before = await session.scalar(COUNT)
            await site.from_outside(f"INSERT INTO item (name) VALUES ('{name}')")
            after = await session.scalar(COUNT)
            await asyncio.sleep(0)
            await socket.send_text(f"{before} {after} {site.checked_out}")
            await write(name="refused")(session)
            try:
                await session.flush()
            except ReadOnlyError as error:
                session.expunge_all()
                await socket.send_text(type(error).__name__)

    async with websocket(app) as socket:
        assert await socket.ask("a") == "0 1 0"
        answer = await socket.receive()
        assert answer is not None and answer["text"] == "ReadOnlyError"
        assert await socket.ask("b") == "1 2 0"
    assert await site.items() == ["a", "b"]


# -- the session -------------------------------------------------------------------------------


async def read_session(session: CurrentSessionReadOnly) -> DBSession:
    return session


async def test_all_dependencies_of_a_request_and_of_a_socket_have_the_one_session_of_its_state(
    sqlite_url: str,
) -> None:
    async with Site.on(InFastAPI(), sqlite_url) as site:
        app = app_on(site)
        sessions: list[DBSession] = []

        @app.get("/")
        async def route(
            request: Request,
            of_dependency: Annotated[DBSession, Depends(read_session)],
            session: CurrentSession,
            in_transaction: CurrentSessionTransaction,
        ) -> None:
            sessions[:] = [request.state.db, of_dependency, session, in_transaction]

        @app.websocket("/")
        async def socket_route(
            socket: WebSocket,
            of_dependency: Annotated[DBSession, Depends(read_session)],
            session: CurrentSession,
            in_transaction: CurrentSessionTransaction,
        ) -> None:
            sessions[:] = [socket.state.db, of_dependency, session, in_transaction]
            await socket.accept()

        assert (await call(app, method="GET")).status == 200
        of_request = {id(session) for session in sessions}
        async with websocket(app):
            of_socket = {id(session) for session in sessions}
        assert len(sessions) == 4
        assert (len(of_request), len(of_socket)) == (1, 1)


async def test_an_override_of_get_db_takes_the_place_of_the_session(site: Site) -> None:
    async def other() -> AsyncGenerator[DBSession]:
        async with site.database.session() as session:
            session.info["name"] = "other"
            yield session

    app = FastAPI()  # where all sessions are overridden, not even the middleware is needed

    @app.post("/")
    async def order(session: CurrentSession) -> str:
        await write()(session)
        await session.commit()
        return str(session.info["name"])

    @app.websocket("/")
    async def chat(socket: WebSocket, session: CurrentSession) -> None:
        await socket.accept()
        await socket.send_text(f"{await socket.receive_text()} {session.info['name']}")

    app.dependency_overrides[get_db] = other
    assert (await call(app)).body == b'"other"'
    assert await site.items() == ["a"]
    async with websocket(app) as socket:
        assert await socket.ask("from the") == "from the other"


@each_dependency
async def test_the_schema_knows_nothing_of_the_session(dependency: Any, sqlite_url: str) -> None:
    async def count(session: Annotated[DBSession, Depends(dependency)], at_least: int = 0) -> int:
        return at_least

    async def count_without(at_least: int = 0) -> int:
        return at_least

    async def order(
        name: str, session: Annotated[DBSession, Depends(dependency)], counted: int = Depends(count)
    ) -> str:
        return name

    async def order_without(name: str, counted: int = Depends(count_without)) -> str:
        return name

    async with Site.on(InFastAPI(), sqlite_url) as site:
        schemas: list[Any] = []
        for endpoint in order, order_without:
            app = app_on(site)
            app.post("/{name}", name="order", operation_id="order")(endpoint)
            schemas.append(app.openapi())
    assert schemas[0] == schemas[1]
    parameters = schemas[0]["paths"]["/{name}"]["post"]["parameters"]
    assert [parameter["name"] for parameter in parameters] == ["name", "at_least"]


@each_dependency
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_without_the_middleware_a_dependency_says_what_to_install(
    dependency: Any, kind: str
) -> None:
    async def order(session: Annotated[DBSession, Depends(dependency)]) -> str:
        raise AssertionError("it has a session")

    async def chat(socket: WebSocket, session: Annotated[DBSession, Depends(dependency)]) -> None:
        raise AssertionError("it has a session")

    app = FastAPI()
    app.get("/")(order)
    app.websocket("/")(chat)
    client = TestClient(app)
    with pytest.raises(MissingMiddlewareError) as caught:
        if kind == "http":
            client.get("/")
        else:
            with client.websocket_connect("/"):
                raise AssertionError("it is accepted")
    assert "app.add_middleware(DBSessionMiddleware, key='db')" in str(caught.value)


# -- a stronger mode after a statement ---------------------------------------------------------


def count_first(dependency: Any, *, release: bool = False) -> Any:
    """A sub-dependency which has read before the route's own dependency is asked for."""

    async def count(session: Annotated[DBSession, Depends(dependency)]) -> int | None:
        number: int | None = await session.scalar(COUNT)
        if release:
            await session.release()
        return number

    return Depends(count)


@weaker
@pytest.mark.parametrize("first", ["user", "session"])
async def test_the_order_of_two_dependencies_does_not_decide(
    site: Site, dependency: Any, first: str
) -> None:
    app = app_on(site)
    user = count_first(dependency)

    async def by_user_first(user: Any = user, *, session: CurrentSessionTransaction) -> str:
        await write()(session)
        return "ordered"

    async def by_session_first(session: CurrentSessionTransaction, user: Any = user) -> str:
        await write()(session)
        return "ordered"

    if first == "user":
        app.post("/orders")(by_user_first)
    else:
        app.post("/orders")(by_session_first)
    exchange = await site.call(app, "/orders")
    assert (exchange.status, exchange.body, exchange.error) == (200, b'"ordered"', None)
    assert await site.items() == ["a"]


async def test_a_stronger_mode_after_a_write_is_an_error_that_names_the_remedy(site: Site) -> None:
    app = app_on(site)

    async def log_in(session: CurrentSession) -> None:
        await write()(session)
        await session.flush()

    @app.post("/orders", dependencies=[Depends(log_in)])
    async def order(session: CurrentSessionTransaction) -> None:
        raise AssertionError("it has a session")

    exchange = await site.call(app, "/orders")
    assert exchange.status == 500
    assert isinstance(exchange.error, ModeConflictError)
    message = str(exchange.error)
    assert message.startswith("POST /orders (")
    assert "put @transactional on the route" in message
    assert await site.items() == []


@weaker
async def test_a_stronger_mode_on_the_route_holds_for_the_read_before_it_too(
    site: Site, dependency: Any
) -> None:
    """Then it is part of the transaction, and its connection is not given back."""
    app = app_on(site)

    @app.post("/orders", dependencies=[count_first(dependency)])
    @transactional
    async def order(session: CurrentSessionTransaction) -> str:
        assert site.checked_out == 1  # still in the transaction in which the dependency has read
        await write()(session)
        return "ordered"

    exchange = await site.call(app, "/orders")
    assert (exchange.status, exchange.body) == (200, b'"ordered"')
    assert await site.items() == ["a"]


@weaker
async def test_a_stronger_mode_is_granted_after_the_read_has_released_its_connection(
    site: Site, dependency: Any
) -> None:
    app = app_on(site)

    @app.post("/orders", dependencies=[count_first(dependency, release=True)])
    async def order(session: CurrentSessionTransaction) -> str:
        await write()(session)
        return "ordered"

    exchange = await site.call(app, "/orders")
    assert (exchange.status, exchange.body, exchange.error) == (200, b'"ordered"', None)
    assert await site.items() == ["a"]
