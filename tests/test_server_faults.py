"""Servers that are stopped, restarted and frozen: the faults on which other tests rely."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from tests import servers
from tests.servers import DatabaseServer, HowToStop, outside, server_connections

START = {"postgresql": servers.postgresql, "mysql": servers.mariadb}


def own_server(backend: str) -> AbstractContextManager[DatabaseServer]:
    return START[backend](own=True)


@pytest.fixture(scope="module", params=START)
def server(request: pytest.FixtureRequest) -> Iterator[DatabaseServer]:
    with own_server(request.param) as server:
        yield server


@pytest.mark.parametrize("how", ["fast", "immediate"])
async def test_what_was_committed_is_there_after_a_restart(
    server: DatabaseServer, how: HowToStop
) -> None:
    with server.fresh_database() as url:
        async with outside(url) as connection:
            await connection.execute("CREATE TABLE item (id INTEGER PRIMARY KEY)")
            await connection.execute("INSERT INTO item VALUES (1)")
            await asyncio.to_thread(server.restart, how)
        async with outside(url) as connection:
            assert await connection.execute("SELECT * FROM item") == [(1,)]


def test_a_stopped_server_refuses_connections_until_it_is_started(server: DatabaseServer) -> None:
    url = make_url(server.url)
    address = str(url.host), int(url.port or 0)
    server.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    server.start()
    socket.create_connection(address).close()


async def test_a_frozen_server_answers_nobody_until_it_thaws(server: DatabaseServer) -> None:
    with server.fresh_database() as url:
        async with outside(url) as connection:
            with server.frozen():
                statement = asyncio.create_task(connection.execute("SELECT 1"))
                newcomer = asyncio.create_task(server_connections(url))
                await asyncio.wait((statement, newcomer), timeout=0.3)
                assert not statement.done()
                assert not newcomer.done()
            assert await statement == [(1,)]
            assert len(await newcomer) == 1


def test_a_server_given_by_a_url_cannot_be_stopped() -> None:
    given = DatabaseServer("postgresql+asyncpg://someone@localhost/postgres")
    with pytest.raises(RuntimeError, match="own=True"):
        given.restart()
    with pytest.raises(RuntimeError, match="own=True"), given.frozen():
        pass


@pytest.mark.parametrize("start", [start.__name__ for start in START.values()])
@pytest.mark.parametrize("fault", ["server.restart()", "server.frozen().__enter__()"])
def test_a_killed_session_leaves_no_restarted_or_frozen_server_behind(
    start: str, fault: str
) -> None:
    program = f"""
import time
from tests import servers
with servers.{start}(own=True) as server:
    {fault}
    print(server.url, flush=True)
    time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    session = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
    )
    with session:
        assert session.stdout is not None
        url = make_url(session.stdout.readline().strip())
        session.kill()
    deadline = time.monotonic() + 10
    with pytest.raises(ConnectionRefusedError):
        while time.monotonic() < deadline:
            socket.create_connection((str(url.host), int(url.port or 0)), timeout=1).close()
            time.sleep(0.05)
