"""Event loops that end without `database.dispose()`: quiet, and nothing stays locked or open."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.servers import assert_disconnected, outside, run
from tests.serving import run_program

REQUESTS = """
import asyncio, gc, sys, threading, warnings

warnings.simplefilter("error")
failures = []
threading.excepthook = sys.unraisablehook = lambda failure: failures.append(failure.exc_value)

from fastapi import FastAPI
from sqlalchemy import select
from starlette.testclient import TestClient
from asgi_db import Database, DBSessionMiddleware
from asgi_db_fastapi import CurrentSession, CurrentSessionTransaction
from tests.tables import Author, Base

database = Database(sys.argv[1])
app = FastAPI()
app.add_middleware(DBSessionMiddleware, database=database)

@app.post("/{name}")
async def write(name: str, session: CurrentSessionTransaction) -> None:
    session.add(Author(name=name))

@app.get("/{name}")
async def read(name: str, session: CurrentSession) -> bool:
    return await session.scalar(select(Author).where(Author.name == name)) is not None

async def create() -> None:
    async with database:
        await database.create_tables(Base.metadata)

asyncio.run(create())
client = TestClient(app)  # without `with`: an event loop for each request
for number in range(50):
    assert client.post(f"/{number}").status_code == 200
    assert client.get(f"/{number}").json() is True
gc.collect()
asyncio.run(database.dispose())
gc.collect()
assert failures == [], failures
"""


def test_a_test_client_with_an_event_loop_for_each_request_is_quiet(
    sqlite_url: str, tmp_path: Path
) -> None:
    """On the other databases asyncio itself warns of the sockets of a closed loop."""
    ended = run_program(REQUESTS, sqlite_url, folder=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    run(assert_disconnected(sqlite_url))


WRITERS = """
import asyncio, itertools, logging, sys, threading
from asgi_db import Database
from tests.tables import Author, Base

logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
failures = []
threading.excepthook = lambda failure: failures.append(failure.exc_value)
database = Database(sys.argv[1])

ids = itertools.count(1)

async def write(_: object = None) -> None:
    number = next(ids)
    async with database.transaction() as session:
        session.add(Author(id=number, name=str(number)))
        await session.flush()
        await asyncio.sleep(float(sys.argv[2]))

async def create() -> None:
    async with database:
        await database.create_tables(Base.metadata)

async def be_cancelled() -> None:
    try:
        async with asyncio.timeout(0.3):
            await asyncio.gather(*map(write, range(6)))
    except TimeoutError:
        pass

async def write_again() -> None:
    async with asyncio.timeout(5):
        await write()

asyncio.run(create())
for _ in range(3):
    asyncio.run(be_cancelled())
sys.argv[2] = "0"
asyncio.run(write_again())
assert failures == [], failures
"""


@pytest.mark.parametrize("seconds", ["0.1", "1"])
def test_writers_that_are_cancelled_at_the_end_of_their_event_loop_leave_no_lock(
    database_url: str, tmp_path: Path, seconds: str
) -> None:
    ended = run_program(WRITERS, database_url, seconds, folder=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")

    async def write() -> None:
        async with outside(database_url) as connection:
            await connection.execute("INSERT INTO author (id, name) VALUES (1000, '1000')")

    run(write())
