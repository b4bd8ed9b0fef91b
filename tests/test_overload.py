"""Overload: whom the pool cannot serve in time gets a 503, and the others are served as ever."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from threading import Semaphore, Thread

import pytest
from sqlalchemy import event, insert, select, text
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_db import (
    Database,
    DatabaseBusyError,
    DBSession,
    DBSessionMiddleware,
    Mode,
    UnavailableError,
    plain,
    read_only,
    transactional,
)
from asgi_db.types import ASGIApp, Message, Receive, Scope, Send
from tests.contract.client import Exchange, call
from tests.pools import checked_out
from tests.servers import assert_idle, outside, run
from tests.serving import UVICORN, Client, serve
from tests.tables import Author, Base, authors

POOL = {"pool_size": 5, "max_overflow": 0, "pool_timeout": 0.5}
REQUESTS = 200

Endpoint = Callable[[DBSession, str], Awaitable[str]]


def serving(database: Database, mode: Mode, **endpoints: Endpoint) -> ASGIApp:
    """An application: `/name/argument` is the endpoint of that name, with its argument."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        _, name, argument = scope["path"].split("/")
        scope["endpoint"] = endpoint = endpoints[name]
        body = await endpoint(scope["state"]["db"], argument)
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": body.encode()})

    return DBSessionMiddleware(app, database, mode=mode)


def assert_busy(exchange: Exchange) -> None:
    headers: dict[bytes, bytes] = dict(exchange.messages[0]["headers"])
    assert (exchange.status, exchange.complete, exchange.error) == (503, True, None)
    assert headers[b"content-type"] == b"application/problem+json"
    assert int(headers[b"retry-after"]) > 0
    assert json.loads(exchange.body)["reason"] == "busy"


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A database with a pool of 5, without overflow."""
    async with Database(database_url, engine_options=POOL) as database:
        await database.create_tables(Base.metadata)
        yield database


class Gate:
    """An endpoint which holds its connection until it is let go.

    Attributes:
        holding: how many requests stand at the gate.
    """

    def __init__(self, work: Endpoint) -> None:
        self._work = work
        self._opened = asyncio.Event()
        self._arrival = asyncio.Condition()
        self.holding = 0

    async def hold(self, session: DBSession, argument: str) -> str:
        body = await self._work(session, argument)
        async with self._arrival:
            self.holding += 1
            self._arrival.notify_all()
        await self._opened.wait()
        return body

    async def filled_by(self, number: int) -> None:
        """Wait until so many requests hold a connection."""
        async with self._arrival:
            await self._arrival.wait_for(lambda: self.holding >= number)

    def open(self) -> None:
        self._opened.set()


async def write(session: DBSession, name: str) -> str:
    await session.execute(insert(Author).values(name=name))
    return name


async def read(session: DBSession, name: str) -> str:
    return str(await session.scalar(select(text("'of the server'"))))


async def say_hello(_: DBSession, name: str) -> str:
    return f"hello {name}"


WAYS = {
    "writes on PostgreSQL": ("postgresql", transactional, write),
    "writes on MariaDB": ("mysql", transactional, write),
    "reads on PostgreSQL": ("postgresql", plain, read),
    "reads on SQLite": ("sqlite", plain, read),  # which has one writer at a time
}


@pytest.mark.parametrize(("server", "mode", "work"), WAYS.values(), ids=WAYS)
async def test_of_200_requests_on_a_pool_of_5_the_served_are_right_and_the_rest_are_told_to_wait(
    request: pytest.FixtureRequest, server: str, mode: Mode, work: Endpoint
) -> None:
    url: str = request.getfixturevalue(f"{server}_url")
    async with Database(url, engine_options=POOL) as database:
        await database.create_tables(Base.metadata)
        gate = Gate(work)
        app = serving(database, mode, hold=gate.hold, once=work)
        requests = [asyncio.create_task(call(app, f"/hold/{n}")) for n in range(REQUESTS)]
        await gate.filled_by(5)
        async with asyncio.timeout(30):  # of which `pool_timeout` is half a second
            while sum(each.done() for each in requests) < REQUESTS - 5:
                await asyncio.wait(
                    [each for each in requests if not each.done()],
                    return_when=asyncio.FIRST_COMPLETED,
                )
        assert (gate.holding, checked_out(database)) == (5, 5)
        gate.open()
        exchanges = await asyncio.gather(*requests)
        served = [n for n, exchange in enumerate(exchanges) if exchange.status == 201]
        assert len(served) == 5
        for number in served:
            expected = "of the server" if work is read else str(number)
            assert exchanges[number].body == expected.encode()
        for number in set(range(REQUESTS)).difference(served):
            assert_busy(exchanges[number])
        assert checked_out(database) == 0
        await assert_idle(url)
        assert await authors(url) == sorted(str(n) for n in served if work is write)
        assert (await call(app, "/once/next")).status == 201


@pytest.mark.parametrize("mode", [plain, transactional, read_only], ids=lambda mode: mode.name)
async def test_200_requests_on_a_pool_of_5_are_all_served_where_they_may_wait(
    database_url: str, mode: Mode
) -> None:
    async with Database(database_url, engine_options={**POOL, "pool_timeout": 30}) as database:
        app = serving(database, mode, read=read)
        exchanges = await asyncio.gather(*(call(app, "/read/it") for _ in range(REQUESTS)))
        assert [exchange.status for exchange in exchanges] == [201] * REQUESTS
        assert checked_out(database) == 0


async def test_routes_without_statements_go_on_beside_an_exhausted_pool(
    database_url: str,
) -> None:
    """They are served while everybody else waits, and nobody asks the pool for them."""
    async with Database(database_url, engine_options={**POOL, "pool_timeout": 30}) as database:
        gate = Gate(read)
        app = serving(database, plain, hold=gate.hold, hello=say_hello)
        taken: list[object] = []
        event.listen(database.engine.sync_engine, "checkout", lambda *_: taken.append(1))
        waiting = [asyncio.create_task(call(app, f"/hold/{n}")) for n in range(20)]
        await gate.filled_by(5)
        for number in range(REQUESTS):
            assert (await call(app, f"/hello/{number}")).body == f"hello {number}".encode()
            assert not any(each.done() for each in waiting)
        assert len(taken) == 5
        gate.open()
        await asyncio.gather(*waiting)
        assert checked_out(database) == 0


async def test_whoever_waits_is_served_as_soon_as_a_connection_comes_back(
    database_url: str,
) -> None:
    async with Database(database_url, engine_options={**POOL, "pool_timeout": 30}) as database:
        gate = Gate(read)
        app = serving(database, plain, hold=gate.hold, read=read)
        holding = [asyncio.create_task(call(app, f"/hold/{n}")) for n in range(5)]
        await gate.filled_by(5)
        waiting = asyncio.create_task(call(app, "/read/it"))
        await asyncio.sleep(0)
        gate.open()
        assert (await waiting).status == 201
        await asyncio.gather(*holding)


async def test_whoever_gave_up_waiting_does_not_take_the_connection_that_comes_back(
    database: Database,
) -> None:
    gate = Gate(read)
    app = serving(database, plain, hold=gate.hold, read=read)
    holding = [asyncio.create_task(call(app, f"/hold/{n}")) for n in range(5)]
    await gate.filled_by(5)
    for exchange in await asyncio.gather(*(call(app, "/read/it") for _ in range(10))):
        assert_busy(exchange)
    gate.open()
    await asyncio.gather(*holding)
    everybody = Gate(read)
    app = serving(database, plain, hold=everybody.hold)
    full = [asyncio.create_task(call(app, f"/hold/{n}")) for n in range(5)]
    await everybody.filled_by(5)  # all five connections at the same time
    everybody.open()
    assert [(await each).status for each in full] == [201] * 5
    assert checked_out(database) == 0


# -- what the error says -----------------------------------------------------------------------


async def test_the_error_names_the_routes_which_hold_the_pool_but_tells_the_client_nothing(
    postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caught: list[DatabaseBusyError] = []

    async def look(session: DBSession, _: str) -> str:
        try:
            return await read(session, "")
        except DatabaseBusyError as error:
            caught.append(error)
            raise

    options = {**POOL, "pool_size": 2, "pool_timeout": 0.1}
    async with Database(postgresql_url, engine_options=options) as database:
        gate = Gate(read)
        app = serving(database, plain, report=gate.hold, look=look)
        reporting = asyncio.create_task(call(app, "/report/secret-argument"))
        await gate.filled_by(1)
        async with database.session() as session:
            await session.execute(text("SELECT 1"))
            exchange = await call(app, "/look/at")
        gate.open()
        await reporting
    assert_busy(exchange)
    message = str(caught[0])
    assert message.startswith("POST /look/at (")
    assert "POST /report/secret-argument (Gate.hold) for 0." in message
    assert "`async with database.session()` for 0." in message
    assert "pool_size" in message and "release()" in message
    for word in (b"report", b"look", b"session", b"pool"):
        assert word not in exchange.body
    assert [line for line in caplog.messages if "POST /report/" in line]
    password = "password"
    assert password in postgresql_url
    assert password not in message and password not in caplog.text


async def test_the_error_of_an_engine_of_ones_own_names_them_too(postgresql_url: str) -> None:
    engine = create_async_engine(postgresql_url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    async with Database(engine=engine) as database:
        async with database.session() as holding:
            await holding.execute(text("SELECT 1"))
            with pytest.raises(DatabaseBusyError, match=r"database\.session\(\)` for 0\."):
                async with database.transaction() as session:
                    await session.execute(text("SELECT 1"))
    await engine.dispose()


async def test_a_connection_taken_from_the_engine_itself_is_named_as_such(
    database: Database,
) -> None:
    connections = [await database.engine.connect() for _ in range(5)]
    with pytest.raises(DatabaseBusyError, match="the engine"):
        async with database.session() as session:
            await session.execute(text("SELECT 1"))
    for connection in connections:
        await connection.close()


async def test_a_session_that_met_an_exhausted_pool_goes_on_when_there_is_room(
    database: Database,
) -> None:
    """Nothing was sent, so there is nothing that could have been lost."""
    async with database.session() as session:
        connections = [await database.engine.connect() for _ in range(5)]
        with pytest.raises(UnavailableError):
            await session.scalars(select(Author))
        await connections.pop().close()
        await session.rollback()
        assert (await session.scalars(select(Author))).all() == []
        for connection in connections:
            await connection.close()


async def test_the_timeout_of_the_mode_ends_the_wait_for_a_connection_too(
    database_url: str,
) -> None:
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 60}
    async with Database(database_url, engine_options=options) as database:
        async with database.session() as holding:
            await holding.execute(text("SELECT 1"))
            app = serving(database, plain(timeout=0.1), read=read)
            async with asyncio.timeout(30):
                exchange = await call(app, "/read/it")
            assert (exchange.status, exchange.error) == (503, None)
        app = serving(database, plain, read=read)
        assert (await call(app, "/read/it")).status == 201


async def test_a_task_of_the_handler_that_goes_on_beside_the_503_keeps_no_connection(
    database: Database,
) -> None:
    leaves = asyncio.Event()
    tasks: list[asyncio.Task[str]] = []

    async def go_on(session: DBSession) -> str:
        await leaves.wait()
        return await read(session, "")

    async def be_refused(session: DBSession, _: str) -> str:
        tasks.append(asyncio.create_task(go_on(session)))
        await read(session, "")
        raise DatabaseBusyError("in a test", [])

    async def leave_slowly(message: Message) -> None:
        leaves.set()
        await asyncio.wait(tasks)

    app = serving(database, transactional, refused=be_refused)
    async with asyncio.timeout(30):
        exchange = await call(app, "/refused/it", watch=leave_slowly)
    assert_busy(exchange)
    assert await tasks[0] == "of the server"
    assert checked_out(database) == 0


# -- over real HTTP ----------------------------------------------------------------------------


def test_under_uvicorn_200_requests_on_a_pool_of_5_get_a_201_or_a_503(
    postgresql_url: str, tmp_path: Path
) -> None:
    """Another connection holds a lock until all but five have been refused."""

    async def create_tables() -> None:
        async with Database(postgresql_url) as database:
            await database.create_tables(Base.metadata)

    run(create_tables())
    answers: dict[int, int] = {}
    waits: set[str] = set()
    answered = Semaphore(0)

    def create(number: int, port: int) -> None:
        with Client(port) as client:
            answers[number] = client.request("POST", f"/postgresql/authors/{number}").status
            if answers[number] == 503:
                waits.add(client.headers["retry-after"])
                assert client.headers["content-type"] == "application/problem+json"
        answered.release()

    async def overload(port: int) -> list[Thread]:
        async with outside(postgresql_url) as connection:
            await connection.execute("BEGIN")
            await connection.execute("LOCK TABLE author IN SHARE MODE")
            clients = [Thread(target=create, args=(n, port)) for n in range(REQUESTS)]
            for client in clients:
                client.start()
            for _ in range(REQUESTS - 5):
                assert answered.acquire(timeout=60)
            assert set(answers.values()) == {503}
            await connection.execute("COMMIT")
        return clients

    environment = {"POSTGRESQL_URL": postgresql_url, "POOL_TIMEOUT": "1"}
    with serve(UVICORN, tmp_path, **environment) as server:
        for thread in run(overload(server.port)):
            thread.join()
        created = [number for number, status in answers.items() if status == 201]
        assert len(created) == 5
        assert sorted(answers.values()) == [201] * 5 + [503] * (REQUESTS - 5)
        assert waits and all(int(wait) > 0 for wait in waits)
        assert run(authors(postgresql_url)) == sorted(f"author {n}" for n in created)
        with Client(server.port) as client:
            assert client.request("POST", f"/postgresql/authors/{REQUESTS}").status == 201
            assert json.loads(client.request("GET", "/state").body)["checked_out"] == 0
        assert "Traceback" not in server.log
        assert "password" not in server.log
