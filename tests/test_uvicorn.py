"""Over real HTTP, where the point is in the network or in the process: FastAPI under uvicorn."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Thread

import pytest
from sqlalchemy import make_url

from asgi_db import Database
from tests.servers import assert_disconnected, outside, run, server_connections
from tests.serving import Answer, Client, Uvicorn, slow_reader, uvicorn
from tests.tables import Base, Deferred

APP = "tests.uvicorn_app:app"
CREATED = Answer(201, b"null")
ENDED = (0, -signal.SIGTERM)  # uvicorn raises the signal again when it is done


@pytest.fixture
def url(postgresql_url: str) -> str:
    """A PostgreSQL database with tables."""

    async def create_tables() -> None:
        async with Database(postgresql_url) as database:
            await database.create_tables(Base.metadata)
            await database.create_tables(Deferred.metadata)

    run(create_tables())
    return postgresql_url


@pytest.fixture
def server(url: str, tmp_path: Path) -> Iterator[Uvicorn]:
    """The application, with a pool of 5 connections without overflow."""
    with uvicorn(APP, tmp_path, DATABASE_URL=url) as server:
        assert server.port, server.log
        yield server


def state(client: Client) -> dict[str, int]:
    """How the application says that things stand."""
    found: dict[str, int] = json.loads(client.request("GET", "/state").body)
    return found


@pytest.mark.timing
def test_a_request_is_served_at_once_beside_20_slow_readers_on_a_pool_of_5(
    server: Uvicorn, url: str
) -> None:
    with ExitStack() as stack:
        client = stack.enter_context(Client(server.port))
        readers = [stack.enter_context(slow_reader(server.port, "/download")) for _ in range(20)]
        deadline = time.monotonic() + 20
        while state(client)["begun"] < 20:
            assert time.monotonic() < deadline, (state(client), server.log)
            time.sleep(0.02)
        before = time.monotonic()
        assert client.request("POST", "/authors/1") == CREATED
        assert client.request("GET", "/authors/1") == Answer(200, b'"author 1"')
        assert time.monotonic() - before < 2
        assert state(client) == {"begun": 20, "ended": 0, "checked_out": 0}
        connections = run(server_connections(url))
        assert 1 <= len(connections) <= 5
        assert {connection.state for connection in connections} == {"idle"}
        readers[0].settimeout(20)
        received = 0
        while received < 5_000_000:
            received += len(readers[0].recv(65_536))
    with Client(server.port) as client:  # the other readers have gone in the middle
        while state(client)["ended"] < 20:
            assert time.monotonic() < deadline, (state(client), server.log)
            time.sleep(0.02)
        assert state(client)["checked_out"] == 0
        assert client.request("GET", "/authors/1").status == 200


def test_a_failed_commit_leaves_the_keep_alive_connection_in_order(
    server: Uvicorn, url: str
) -> None:
    """Exactly one answer to each request: one byte more or less would break the next one."""
    with Client(server.port) as client:
        for round in range(3):
            conflict = client.request("POST", "/children")
            assert conflict == Answer(409, b'{"conflict":true}')
            for number in range(20 * round, 20 * round + 20):
                assert client.request("POST", f"/authors/{number}") == CREATED
                found = client.request("GET", f"/authors/{number}")
                assert found == Answer(200, f'"author {number}"'.encode())
        assert state(client)["checked_out"] == 0
        assert client.request("GET", "/authors/0", "Connection: close").status == 200
        assert client.rest() == b""
    assert "Traceback" not in server.log
    assert server.log.count("COMMIT failed") == 3
    assert run(rows(url, "child")) == 0
    assert run(rows(url, "author")) == 60


async def rows(url: str, table: str) -> int:
    """How many rows there are."""
    async with outside(url) as witness:
        ((number,),) = await witness.execute(f"SELECT count(*) FROM {table}")
        return int(number)


def test_who_got_the_status_line_of_a_write_finds_the_row_at_once(server: Uvicorn) -> None:
    """300 writes, each read again on another connection before its body has come."""
    found: list[int] = []

    def write_and_read(first: int) -> None:
        with Client(server.port) as writing, Client(server.port) as reading:
            for number in range(first, first + 100):
                writing.send("POST", f"/authors/{number}")
                assert writing.status() == 201
                found.append(reading.request("GET", f"/authors/{number}").status)
                writing.body()

    clients = [Thread(target=write_and_read, args=(first,)) for first in (1000, 2000, 3000)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert found == [200] * 300


@pytest.mark.parametrize("lifespan", ["on", "off"])
def test_a_server_that_is_told_to_end_leaves_no_connection(
    lifespan: str, url: str, tmp_path: Path
) -> None:
    """Also where it sends no lifespan, so that the engine is made at first use."""
    with uvicorn(APP, tmp_path, f"--lifespan={lifespan}", DATABASE_URL=url) as server:
        with Client(server.port) as client:
            assert client.request("POST", "/authors/1") == CREATED
            assert client.request("GET", "/authors/1").status == 200
            assert client.request("POST", "/children").status == 409
            assert len(run(server_connections(url))) == 1
            assert server.stop() in ENDED
            run(assert_disconnected(url, within=2))
        assert "Traceback" not in server.log
    if lifespan == "on":
        assert "Application shutdown complete." in server.log


def test_a_server_whose_database_does_not_come_up_ends_with_one_clear_line(
    url: str, tmp_path: Path
) -> None:
    missing = make_url(url).set(database="missing", password="c0rrect-h0rse")
    with uvicorn(
        APP,
        tmp_path,
        DATABASE_URL=missing.render_as_string(hide_password=False),
        WAIT_FOR="0.3",
    ) as server:
        assert server.process.wait(10) == 3  # as uvicorn ends when an application does not start
    assert not server.port
    lines = [line for line in server.log.splitlines() if "could not be started" in line]
    assert len(lines) == 1 and 'database "missing" does not exist' in lines[0]
    assert "c0rrect-h0rse" not in server.log
