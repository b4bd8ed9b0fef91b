"""WebSockets: one unit of work for each message, in every framework, also under real uvicorn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import litestar
import litestar.exceptions
import pytest
import uvicorn
from fastapi import FastAPI
from sqlalchemy import func, select, text
from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from asgi_db import (
    Database,
    DatabaseBusyError,
    DatabaseDownError,
    DatabaseTimeoutError,
    DBSession,
    DBSessionMiddleware,
    Mode,
    ReadOnlyError,
    plain,
    read_only,
    transactional,
)
from asgi_db.types import ASGIApp, Receive, Scope, Send
from asgi_db_litestar import DatabasePlugin
from tests.pools import checked_out
from tests.servers import (
    DatabaseServer,
    assert_disconnected,
    assert_idle,
    outside,
    run,
    server_connections,
    until_active,
)
from tests.serving import served_here
from tests.sockets import Socket, websocket
from tests.tables import Author, Base, Child, Deferred, authors, commits_held_back

COUNT = select(func.count(Author.id))


# -- one handler, in every framework -----------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A socket as its handler has it: to receive raises when the client has gone."""

    session: DBSession
    receive: Callable[[], Awaitable[str]]
    send: Callable[[str], Awaitable[None]]


class Talk(Protocol):
    """A handler."""

    __name__: str

    def __call__(self, line: Line) -> Coroutine[Any, Any, None]: ...


class Gone(Exception):
    """The bare application's own exception for a client that has gone."""


def _named(endpoint: Callable[..., Any], talk: Talk, mode: Mode) -> Any:
    endpoint.__qualname__ = talk.__name__
    return mode(endpoint)  # type: ignore[operator]


def in_asgi(database: Database, talk: Talk, mode: Mode) -> ASGIApp:
    """The handler in an application without framework."""

    async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_text() -> str:
            message = await receive()
            if message["type"] == "websocket.disconnect":
                raise Gone
            return str(message["text"])

        async def send_text(text: str) -> None:
            await send({"type": "websocket.send", "text": text})

        await receive()
        await send({"type": "websocket.accept"})
        with suppress(Gone):
            await talk(Line(scope["state"]["db"], receive_text, send_text))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            raise NotImplementedError
        scope["endpoint"] = _named(endpoint, talk, mode)
        await endpoint(scope, receive, send)

    return DBSessionMiddleware(app, database=database)


def _starlette_endpoint(talk: Talk, mode: Mode) -> Any:
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        with suppress(WebSocketDisconnect):
            await talk(Line(websocket.state.db, websocket.receive_text, websocket.send_text))

    return _named(endpoint, talk, mode)


def in_starlette(database: Database, talk: Talk, mode: Mode) -> ASGIApp:
    """The handler in Starlette."""
    app = Starlette(routes=[WebSocketRoute("/", _starlette_endpoint(talk, mode))])
    app.add_middleware(DBSessionMiddleware, database=database)
    return app


def in_fastapi(database: Database, talk: Talk, mode: Mode) -> ASGIApp:
    """The handler in FastAPI."""
    app = FastAPI()
    app.websocket("/")(_starlette_endpoint(talk, mode))
    app.add_middleware(DBSessionMiddleware, database=database)
    return app


def in_litestar(database: Database, talk: Talk, mode: Mode) -> ASGIApp:
    """The handler in Litestar."""

    async def endpoint(socket: litestar.WebSocket[Any, Any, Any]) -> None:
        await socket.accept()
        with suppress(litestar.exceptions.WebSocketDisconnect):
            await talk(Line(socket.state.db, socket.receive_text, socket.send_text))

    return litestar.Litestar(
        [litestar.websocket("/")(_named(endpoint, talk, mode))],
        plugins=[DatabasePlugin(database)],
        openapi_config=None,
        logging_config=None,
    )


Framework = Callable[[Database, Talk, Mode], ASGIApp]
FRAMEWORKS: dict[str, Framework] = {
    "asgi": in_asgi,
    "starlette": in_starlette,
    "fastapi": in_fastapi,
    "litestar": in_litestar,
}
every_framework = pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)


@pytest.fixture(scope="module")
def module_url(postgresql_server: DatabaseServer) -> Iterator[str]:
    """One database with tables for all tests of this module, to save time."""

    async def create_tables(url: str) -> None:
        async with Database(url) as database:
            await database.create_tables(Base.metadata)
            await database.create_tables(Deferred.metadata)

    with postgresql_server.fresh_database() as url:
        run(create_tables(url))
        yield url


@pytest.fixture
async def url(module_url: str) -> AsyncIterator[str]:
    """The same, with empty tables; nobody is connected to it at the end."""
    async with outside(module_url) as connection:
        await connection.execute("TRUNCATE author, book, parent, child")
    yield module_url
    await assert_disconnected(module_url)


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    """The database with two connections."""
    options = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 0.3}
    async with Database(url, engine_options=options) as database:
        yield database
        assert checked_out(database) == 0
        await assert_idle(url)


async def store(line: Line, name: str) -> None:
    line.session.add(Author(name=name))
    await line.session.flush()


UNDELIVERED = "WEBSOCKET / (talk): committed, answer not delivered"


# -- a handler that does not come to its end ---------------------------------------------------


@every_framework
@pytest.mark.parametrize("moment", ["before it works", "in a statement", "between statements"])
async def test_a_cancelled_handler_rolls_back_only_its_last_message(
    database: Database, url: str, framework: Framework, moment: str
) -> None:
    reached = asyncio.Event()

    async def talk(line: Line) -> None:
        while True:
            name = await line.receive()
            if name == "last" and moment == "before it works":
                reached.set()
                await asyncio.Event().wait()
            await store(line, name)
            if name == "last":
                reached.set()
                if moment == "in a statement":
                    await line.session.execute(text("SELECT pg_sleep(60)"))
                await asyncio.Event().wait()
            await line.send(name)

    async with websocket(framework(database, talk, transactional)) as socket:
        assert await socket.ask("first") == "first"
        socket.tell("last")
        await reached.wait()
        if moment == "in a statement":
            await until_active(url, "SELECT pg_sleep")
        await socket.cancel()
        assert isinstance(socket.error, asyncio.CancelledError)
    assert await authors(url) == ["first"]


@every_framework
async def test_a_message_that_is_to_be_rolled_back_is_answered_and_leaves_the_next_alone(
    database: Database, url: str, framework: Framework, caplog: pytest.LogCaptureFixture
) -> None:
    async def talk(line: Line) -> None:
        for _ in range(3):
            name = await line.receive()
            await store(line, name)
            if name == "bad":
                line.session.set_rollback_only()
            await line.send(name)

    async with websocket(framework(database, talk, transactional)) as socket:
        for name in "first", "bad", "last":
            assert await socket.ask(name) == name
    assert await authors(url) == ["first", "last"]
    assert caplog.records == []


def reading_first(app: ASGIApp, then: str = "read") -> ASGIApp:
    """An application whose middleware uses the session before the route is known."""

    async def use_session(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            session: DBSession = scope["state"]["db"]
            await session.scalar(COUNT)
            if then == "write":
                session.add(Author(name="audit"))
                await session.flush()
        await app(scope, receive, send)

    return use_session


@pytest.mark.parametrize("then", ["read", "write"])
async def test_what_a_middleware_does_before_the_route_does_not_take_its_mode_away(
    database: Database, url: str, then: str
) -> None:
    @transactional
    async def talk(socket: WebSocket) -> None:
        await socket.accept()
        socket.state.db.add(Author(name=await socket.receive_text()))
        await socket.send_text("stored")

    inner = Starlette(routes=[WebSocketRoute("/", talk)])
    app = DBSessionMiddleware(reading_first(inner, then), database=database)
    if then == "write":
        with pytest.raises(AssertionError, match="the transactional mode was asked for after work"):
            async with websocket(app):
                raise AssertionError("it is accepted")
        assert await authors(url) == []
        return
    async with websocket(app) as socket:
        assert await socket.ask("ada") == "stored"
    assert await authors(url) == ["ada"]


@every_framework
async def test_a_message_whose_client_vanishes_is_committed_and_the_lost_answer_is_logged(
    database: Database, url: str, framework: Framework, caplog: pytest.LogCaptureFixture
) -> None:
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def talk(line: Line) -> None:
        while True:
            name = await line.receive()
            await store(line, name)
            if name == "last":
                reached.set()
                await go_on.wait()
            await line.send(name)

    async with websocket(framework(database, talk, transactional)) as socket:
        assert await socket.ask("first") == "first"
        socket.tell("last")
        await reached.wait()
        socket.vanish()
        assert await authors(url) == ["first"]
        go_on.set()
        assert await socket.receive() is None
    assert await authors(url) == ["first", "last"]
    assert [record.getMessage() for record in caplog.records] == [UNDELIVERED]


@every_framework
async def test_a_client_that_vanishes_between_its_messages_loses_nothing(
    database: Database, url: str, framework: Framework, caplog: pytest.LogCaptureFixture
) -> None:
    async def talk(line: Line) -> None:
        while True:
            name = await line.receive()
            await store(line, name)
            if name != "last":
                await line.send(name)

    async with websocket(framework(database, talk, transactional)) as socket:
        assert await socket.ask("first") == "first"
        socket.tell("last")  # the application says nothing to it
        socket.vanish()
        assert await socket.receive() is None
    assert await authors(url) == ["first", "last"]
    assert caplog.records == []


@every_framework
@pytest.mark.parametrize("vanishes", [False, True])
async def test_an_answer_whose_commit_is_under_way_leaves_before_the_handler_is_cancelled(
    database: Database,
    url: str,
    framework: Framework,
    vanishes: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def talk(line: Line) -> None:
        while True:
            await store(line, await line.receive())
            await line.send("stored")

    async with (
        commits_held_back(url) as let_go,
        websocket(framework(database, talk, transactional)) as socket,
    ):
        socket.tell("ada")
        await until_active(url, "COMMIT")
        cancelling = asyncio.create_task(socket.cancel())
        await asyncio.sleep(0)
        if vanishes:
            socket.vanish()
        await let_go()
        await cancelling
        assert isinstance(socket.error, asyncio.CancelledError)
        if not vanishes:
            assert await socket.hear() == "stored"
    assert await authors(url) == ["ada"]
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ([UNDELIVERED] if vanishes else [])


@every_framework
async def test_a_commit_by_hand_whose_answer_the_handler_never_sends_is_logged(
    database: Database, url: str, framework: Framework, caplog: pytest.LogCaptureFixture
) -> None:
    reached = asyncio.Event()

    async def talk(line: Line) -> None:
        await store(line, await line.receive())
        await line.session.commit()
        reached.set()
        await asyncio.Event().wait()

    async with websocket(framework(database, talk, plain)) as socket:
        socket.tell("ada")
        await reached.wait()
        await socket.cancel()
    assert await authors(url) == ["ada"]
    assert [record.getMessage() for record in caplog.records] == [UNDELIVERED]


# -- what may go wrong in a message, and the next one ------------------------------------------


@every_framework
async def test_a_failed_commit_is_raised_where_the_answer_is_sent_and_the_next_message_works(
    database: Database, url: str, framework: Framework
) -> None:
    async def talk(line: Line) -> None:
        while True:
            name = await line.receive()
            await store(line, name)
            if name == "spoilt":
                line.session.add(Child(id=1, parent_id=404))
            try:
                await line.send(f"stored {name}")
            except IntegrityError:
                assert not line.session.in_transaction()
                await line.send("not stored")

    async with websocket(framework(database, talk, transactional)) as socket:
        assert await socket.ask("a") == "stored a"
        assert await socket.ask("spoilt") == "not stored"
        assert await authors(url) == ["a"]
        assert await socket.ask("b") == "stored b"
    assert await authors(url) == ["a", "b"]


@every_framework
async def test_an_exhausted_pool_is_an_error_in_the_handler_and_the_next_message_works(
    database: Database, url: str, framework: Framework
) -> None:
    async def talk(line: Line) -> None:
        while True:
            name = await line.receive()
            try:
                await store(line, name)
            except DatabaseBusyError:
                await line.send("busy")
            else:
                await line.send("stored")

    async with websocket(framework(database, talk, transactional)) as socket:
        async with database.session() as one, database.session() as other:
            await one.execute(text("SELECT 1"))
            await other.execute(text("SELECT 1"))
            assert await socket.ask("a") == "busy"
        assert await socket.ask("b") == "stored"
    assert await authors(url) == ["b"]


@every_framework
async def test_a_pool_that_sockets_have_exhausted_is_an_error_that_names_their_route(
    database: Database, framework: Framework
) -> None:
    holding, let_go = asyncio.Semaphore(0), asyncio.Event()

    async def talk(line: Line) -> None:
        await line.receive()
        await line.session.execute(text("SELECT 1"))
        holding.release()
        await let_go.wait()

    app = framework(database, talk, transactional)
    async with websocket(app) as one, websocket(app) as other:
        for socket in one, other:
            socket.tell("")
            await holding.acquire()
        with pytest.raises(DatabaseBusyError) as caught:
            async with database.session() as session:
                await session.execute(text("SELECT 1"))
        let_go.set()
    assert str(caught.value).count("WEBSOCKET / (talk) for ") == 2


@every_framework
async def test_a_connection_that_is_lost_in_a_message_is_replaced_for_the_next_one(
    database: Database, url: str, framework: Framework
) -> None:
    async def talk(line: Line) -> None:
        while True:
            name = await line.receive()
            await store(line, name)
            try:
                if name == "cut":
                    pid = await line.session.scalar(text("SELECT pg_backend_pid()"))
                    async with outside(url) as killer:
                        await killer.execute(f"SELECT pg_terminate_backend({pid}, 5000)")
                    await line.session.execute(text("SELECT 1"))
                await line.send("stored")
            except DatabaseDownError:
                await line.session.rollback()
                await line.send("down")

    async with websocket(framework(database, talk, transactional)) as socket:
        assert await socket.ask("a") == "stored"
        assert await socket.ask("cut") == "down"
        assert await socket.ask("b") == "stored"
    assert await authors(url) == ["a", "b"]


@every_framework
async def test_the_timeout_of_a_mode_counts_for_each_message_anew(
    database: Database, url: str, framework: Framework
) -> None:
    async def talk(line: Line) -> None:
        while True:
            name = await line.receive()
            try:
                await store(line, name)
                if name == "slow":
                    await line.session.execute(text("SELECT pg_sleep(60)"))
                await line.send("stored")
            except DatabaseTimeoutError:
                await line.session.rollback()
                await line.send("too slow")

    async with websocket(framework(database, talk, transactional(timeout=1))) as socket:
        assert await socket.ask("a") == "stored"
        await asyncio.sleep(1.05)  # an idle socket is within its time, however long
        assert await socket.ask("slow") == "too slow"
        assert await socket.ask("b") == "stored"
    assert await authors(url) == ["a", "b"]


# -- the other modes ---------------------------------------------------------------------------


@every_framework
async def test_in_a_plain_socket_what_is_not_committed_by_hand_is_lost_with_a_warning(
    database: Database, url: str, framework: Framework, caplog: pytest.LogCaptureFixture
) -> None:
    async def talk(line: Line) -> None:
        while True:
            name = await line.receive()
            await store(line, name)
            if name == "kept":
                await line.session.commit()
            await line.send(f"{checked_out(database)}")

    async with websocket(framework(database, talk, plain)) as socket:
        for name, held in {"lost": "1", "kept": "0"}.items():
            assert await socket.ask(name) == held
            await socket.waits.wait()
            assert checked_out(database) == 0
    assert await authors(url) == ["kept"]
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith("WEBSOCKET / (talk): uncommitted work was rolled back")


@every_framework
async def test_in_a_read_only_socket_each_read_stands_alone_and_writes_are_refused(
    database: Database, url: str, framework: Framework
) -> None:
    async def talk(line: Line) -> None:
        while True:
            name = await line.receive()
            before = await line.session.scalar(COUNT)
            await asyncio.sleep(0)
            assert checked_out(database) == 0
            async with outside(url) as other:
                await other.execute(f"INSERT INTO author (name) VALUES ('{name}')")
            after = await line.session.scalar(COUNT)
            with pytest.raises(ReadOnlyError):
                await store(line, "refused")
            line.session.expunge_all()
            await line.send(f"{before} {after}")

    async with websocket(framework(database, talk, read_only)) as socket:
        assert await socket.ask("a") == "0 1"
        assert await socket.ask("b") == "1 2"


# -- several tasks -----------------------------------------------------------------------------


@every_framework
@pytest.mark.parametrize("moment", ["in a statement", "between statements"])
async def test_a_broadcast_to_a_socket_leaves_alone_what_its_handler_has_begun(
    database: Database, url: str, framework: Framework, moment: str
) -> None:
    """Another handler sends to it, as in a chat: that is no event of this handler's message."""
    lines: list[Line] = []
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def talk(line: Line) -> None:
        lines.append(line)
        while True:
            name = await line.receive()
            if name == "broadcast":
                for each in lines:
                    await each.send("news")
                continue
            await store(line, name)
            begun.set()
            if moment == "in a statement":
                await line.session.execute(text("SELECT pg_sleep(0.2)"))
            await go_on.wait()
            if name == "fails":
                raise ValueError(name)
            await line.send(f"stored {name}")

    app = framework(database, talk, transactional)
    for name in "fails", "works":
        lines.clear()
        begun.clear()
        go_on.clear()
        async with websocket(app) as working, websocket(app) as other:
            working.tell(name)
            await begun.wait()
            if moment == "in a statement":
                await until_active(url, "SELECT pg_sleep")
            assert await other.ask("broadcast") == "news"
            assert await working.hear() == "news"
            assert await authors(url) == []
            go_on.set()
            if name == "works":
                assert await working.hear() == "stored works"
    assert await authors(url) == ["works"]


@every_framework
async def test_a_task_that_only_receives_leaves_alone_the_one_that_works(
    database: Database, url: str, framework: Framework
) -> None:
    async def talk(line: Line) -> None:
        inbox: asyncio.Queue[str] = asyncio.Queue()

        async def work() -> None:
            while True:
                name = await inbox.get()
                await store(line, name)
                await line.session.execute(text("SELECT pg_sleep(0.2)"))
                await line.send(f"stored {name}")

        working = asyncio.create_task(work())
        try:
            while True:
                inbox.put_nowait(await line.receive())
        finally:
            working.cancel()

    async with websocket(framework(database, talk, transactional)) as socket:
        for name in "abc":  # the second one comes while the first is worked at
            socket.tell(name)
            await until_active(url, "SELECT pg_sleep")
        for end, name in enumerate("abc", 1):
            assert await socket.hear() == f"stored {name}"
            assert (await authors(url))[:end] == list("abc")[:end]


@every_framework
async def test_an_answer_which_another_task_sends_does_not_overtake_the_commit(
    database: Database, url: str, framework: Framework
) -> None:
    async def talk(line: Line) -> None:
        outbox: asyncio.Queue[str] = asyncio.Queue()

        async def write() -> None:
            while True:
                await line.send(await outbox.get())

        writing = asyncio.create_task(write())
        try:
            while True:
                await store(line, name := await line.receive())
                outbox.put_nowait(f"stored {name}")
        finally:
            writing.cancel()

    async with (
        commits_held_back(url) as let_go,
        websocket(framework(database, talk, transactional)) as socket,
    ):
        socket.tell("ada")
        await until_active(url, "COMMIT")
        for _ in range(10):
            await asyncio.sleep(0)
        assert not socket.has_answer
        await let_go()
        assert await socket.hear() == "stored ada"
        assert await authors(url) == ["ada"]


# -- idle sockets ------------------------------------------------------------------------------


@every_framework
async def test_an_idle_socket_costs_no_task_of_ours(
    database: Database, framework: Framework
) -> None:
    """Beside the one in which the server runs the application."""

    async def talk(line: Line) -> None:
        while True:
            name = await line.receive()
            await store(line, name)
            await line.send(name)

    app = framework(database, talk, transactional)
    before = asyncio.all_tasks()
    sockets: list[Socket] = []

    async def open_next() -> None:
        if len(sockets) == 20:
            ours = asyncio.all_tasks() - before
            assert len(ours) == 20, ours
            assert checked_out(database) == 0
            return
        async with websocket(app) as socket:
            assert await socket.ask(f"{len(sockets)}") == f"{len(sockets)}"
            await socket.waits.wait()
            sockets.append(socket)
            await open_next()

    await open_next()


# -- real uvicorn ------------------------------------------------------------------------------


@asynccontextmanager
async def served(app: ASGIApp) -> AsyncGenerator[tuple[uvicorn.Server, str]]:
    """uvicorn in this process and event loop, and the address of its sockets."""
    async with served_here(app) as (server, port):
        yield server, f"ws://127.0.0.1:{port}/"


def client(address: str) -> connect:
    """A client which sends nothing by itself."""
    return connect(address, ping_interval=None, compression=None, open_timeout=60, proxy=None)


async def ask(socket: ClientConnection, text: str) -> str:
    await socket.send(text)
    return str(await socket.recv())


async def answer_each(line: Line) -> None:
    """Store each message, then answer."""
    while True:
        name = await line.receive()
        await store(line, name)
        await line.send(name)


@every_framework
async def test_who_has_the_answer_to_a_message_finds_its_row_at_once(
    database: Database, url: str, framework: Framework
) -> None:
    async with (
        served(framework(database, answer_each, transactional)) as (_, address),
        client(address) as one,
        client(address) as other,
        outside(url) as witness,
    ):
        for number in range(10):
            for socket in one, other:
                name = f"{number} {id(socket)}"
                assert await ask(socket, name) == name
                rows = await witness.execute(f"SELECT 1 FROM author WHERE name = '{name}'")
                assert len(rows) == 1


@every_framework
async def test_a_client_that_is_cut_off_does_not_take_back_what_was_committed(
    database: Database, url: str, framework: Framework, caplog: pytest.LogCaptureFixture
) -> None:
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def talk(line: Line) -> None:
        while True:
            name = await line.receive()
            await store(line, name)
            if name == "last":
                reached.set()
                await go_on.wait()
            await line.send(name)

    async with served(framework(database, talk, transactional)) as (server, address):
        async with client(address) as socket:
            assert await ask(socket, "first") == "first"
            await socket.send("last")
            await reached.wait()
            socket.transport.abort()
            async with asyncio.timeout(10):
                while True:
                    if not server.server_state.connections:
                        break
                    await asyncio.sleep(0.01)
        go_on.set()
        await assert_idle(url)
    assert await authors(url) == ["first", "last"]
    assert UNDELIVERED in [record.getMessage() for record in caplog.records]


@every_framework
async def test_a_handler_that_fails_closes_its_socket_alone(
    database: Database, url: str, framework: Framework
) -> None:
    async def talk(line: Line) -> None:
        while True:
            name = await line.receive()
            await store(line, name)
            if name == "fails":
                raise ValueError(name)
            if name == "is spoilt":
                line.session.add(Child(id=1, parent_id=404))
            await line.send(name)

    async with (
        served(framework(database, talk, transactional)) as (_, address),
        client(address) as one,
        client(address) as two,
        client(address) as three,
    ):
        for socket, name in (one, "fails"), (two, "is spoilt"):
            assert await ask(socket, f"before it {name}") == f"before it {name}"
            with pytest.raises(ConnectionClosed):
                await ask(socket, name)
        assert await ask(three, "after") == "after"
    assert await authors(url) == ["after", "before it fails", "before it is spoilt"]


async def test_at_the_end_a_busy_socket_is_cut_off_and_rolled_back_and_nothing_stays_open(
    database: Database, url: str
) -> None:
    reached = asyncio.Event()

    async def talk(line: Line) -> None:
        while True:
            name = await line.receive()
            await store(line, name)
            if name == "busy":
                reached.set()
                await line.session.execute(text("SELECT pg_sleep(60)"))
            await line.send(name)

    async with served(in_fastapi(database, talk, transactional)) as (server, address):
        async with client(address) as idle, client(address) as busy:
            for socket in idle, busy:
                name = f"first {id(socket)}"
                assert await ask(socket, name) == name
            await busy.send("busy")
            await reached.wait()
            server.should_exit = True
            with pytest.raises(ConnectionClosed):
                await idle.recv()
            with pytest.raises(ConnectionClosed):
                await busy.recv()
    await assert_disconnected(url)
    assert len(await authors(url)) == 2


async def test_two_hundred_idle_sockets_hold_no_connection(url: str) -> None:
    """Each has written something before. The pool has five connections, without overflow."""
    options = {"pool_size": 5, "max_overflow": 0, "pool_timeout": 60}
    async with Database(url, engine_options=options) as database:
        async with served(in_fastapi(database, answer_each, transactional)) as (_, address):
            sockets: list[ClientConnection] = []

            async def open_some() -> None:
                while len(sockets) < 200:
                    sockets.append(socket := await client(address))
                    assert await ask(socket, name := f"{id(socket)}") == name

            async with asyncio.TaskGroup() as group:
                for _ in range(10):
                    group.create_task(open_some())
            assert len(sockets) >= 200
            assert checked_out(database) == 0
            connections = await server_connections(url)
            assert len(connections) <= 5
            assert {connection.state for connection in connections} == {"idle"}
            assert await ask(sockets[0], "one more") == "one more"
            assert len(await authors(url)) == len(sockets) + 1
            async with asyncio.TaskGroup() as group:
                for socket in sockets:
                    group.create_task(socket.close())
