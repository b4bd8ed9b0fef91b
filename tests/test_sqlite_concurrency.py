"""SQLite under concurrency: one writer at a time, and nobody who waits for it fails or is lost."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import QueuePool

from asgi_db import Database, DBSessionMiddleware, Mode, plain, read_only, transactional
from asgi_db.types import ASGIApp, Receive, Scope, Send
from tests.contract.client import Exchange, call
from tests.servers import outside


class Base(DeclarativeBase):
    """The tables."""


class Count(Base):
    """What the writers read, and write again."""

    __tablename__ = "count"

    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[int]


class Entry(Base):
    """What the writers add."""

    __tablename__ = "entry"

    id: Mapped[int] = mapped_column(primary_key=True)


MODES: dict[str, Mode] = {
    "increment": transactional,
    "insert": transactional,
    "read": read_only,
    "read in plain": plain,
    "read a snapshot": read_only(snapshot=True),
}
READS = [name for name in MODES if name.startswith("read")]


def application(database: Database) -> ASGIApp:
    """Increments a counter, adds entries, and reads both."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = scope["state"]["db"]
        counter = await session.get(Count, "visits")
        match scope["path"][1:]:
            case "increment":
                counter.value += 1
            case "insert":
                session.add(Entry())
            case _:
                await session.scalar(select(func.count(Entry.id)))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(counter.value).encode()})

    return DBSessionMiddleware(app, database=database, mode=lambda scope: MODES[scope["path"][1:]])


@pytest.fixture
async def database(sqlite_url: str) -> AsyncIterator[Database]:
    """A file with tables and a counter."""
    async with Database(sqlite_url) as database:
        await database.create_tables(Base.metadata)
        async with database.transaction() as session:
            session.add(Count(name="visits", value=0))
        yield database
        pool = database.engine.pool
        assert isinstance(pool, QueuePool)
        assert pool.checkedout() == 0


async def requests(app: ASGIApp, *paths: str) -> list[Exchange]:
    """Requests at the same time."""
    return await asyncio.gather(*(call(app, f"/{path}") for path in paths))


def outcomes(exchanges: list[Exchange]) -> Counter[str]:
    """How often each status was answered, with the error if there was one."""
    return Counter(f"{exchange.status} {exchange.error or ''}" for exchange in exchanges)


async def stored(url: str) -> tuple[int, int]:
    """The value of the counter, and the number of entries, on another connection."""
    async with outside(url) as witness:
        ((value, entries),) = await witness.execute(
            "SELECT value, (SELECT count(*) FROM entry) FROM count"
        )
        return int(value), int(entries)


async def test_200_writers_at_once_all_succeed_and_nothing_is_lost(
    database: Database, sqlite_url: str
) -> None:
    app = application(database)
    exchanges = await requests(app, *["increment", "insert"] * 100, *READS * 10)
    assert outcomes(exchanges) == {"200 ": 230}
    assert await stored(sqlite_url) == (100, 100)


async def test_200_increments_at_once_each_see_the_one_before(
    database: Database, sqlite_url: str
) -> None:
    exchanges = await requests(application(database), *["increment"] * 200)
    assert sorted(int(exchange.body) for exchange in exchanges) == list(range(1, 201))
    assert await stored(sqlite_url) == (200, 0)


async def be_a_client(url: str) -> None:
    """Serve 100 writing requests, and print how they were answered."""
    async with Database(url) as database:
        exchanges = await requests(application(database), *["increment", "insert"] * 50)
    print(json.dumps(outcomes(exchanges)))


_CLIENT = """
import asyncio, sys
sys.path.append(sys.argv[1])
from tests.test_sqlite_concurrency import be_a_client
asyncio.run(be_a_client(sys.argv[2]))
"""


async def test_two_processes_share_a_file(database: Database, sqlite_url: str) -> None:
    def start_and_wait() -> str:
        command = [sys.executable, "-P", "-c", _CLIENT, str(Path(__file__).parents[1]), sqlite_url]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    other = asyncio.create_task(asyncio.to_thread(start_and_wait))
    app = application(database)
    mine: list[Exchange] = []
    while not other.done() or not mine:
        mine += await requests(app, *["increment", "insert"] * 5)
    assert json.loads(other.result()) == {"200 ": 100}
    assert outcomes(mine) == {"200 ": len(mine)}
    assert await stored(sqlite_url) == (50 + len(mine) // 2, 50 + len(mine) // 2)


# -- while somebody writes ---------------------------------------------------------------------


@asynccontextmanager
async def somebody_writes(url: str) -> AsyncGenerator[sqlite3.Connection]:
    """Another connection has the lock, and something half done."""
    connection = sqlite3.connect(url.partition("///")[2], isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE count SET value = 1000")
        yield connection
        connection.execute("ROLLBACK")
    finally:
        connection.close()


@pytest.mark.parametrize("read", READS)
async def test_readers_do_not_wait_for_writers(
    database: Database, sqlite_url: str, read: str
) -> None:
    app = application(database)
    async with somebody_writes(sqlite_url):
        writing = [asyncio.create_task(requests(app, "increment")) for _ in range(5)]
        exchanges = await requests(app, *[read] * 20)
        assert [exchange.body for exchange in exchanges] == [b"0"] * 20
        assert not any(task.done() for task in writing)
    for task in writing:
        assert outcomes(await task) == {"200 ": 1}
    assert await stored(sqlite_url) == (5, 0)


async def test_a_reader_keeps_its_snapshot_while_others_commit(
    database: Database, sqlite_url: str
) -> None:
    value = select(Count.value)
    async with database.session(read_only(snapshot=True)) as session:
        assert await session.scalar(value) == 0
        assert outcomes(await requests(application(database), *["increment"] * 20)) == {"200 ": 20}
        assert await session.scalar(value) == 0
    assert await stored(sqlite_url) == (20, 0)


async def test_a_writer_that_is_cancelled_while_it_waits_writes_nothing(
    database: Database, sqlite_url: str
) -> None:
    app = application(database)
    async with somebody_writes(sqlite_url):
        waiting = [asyncio.create_task(requests(app, "increment")) for _ in range(3)]
        await requests(app, *READS)
        for task in waiting:
            task.cancel()
    done, _ = await asyncio.wait(waiting, timeout=60)
    assert len(done) == 3
    assert all(task.cancelled() for task in waiting)
    assert await stored(sqlite_url) == (0, 0)
    assert outcomes(await requests(app, *["increment"] * 20)) == {"200 ": 20}
    assert await stored(sqlite_url) == (20, 0)


async def test_a_writer_that_is_cancelled_in_its_transaction_lets_go_of_the_lock(
    database: Database, sqlite_url: str
) -> None:
    begun = asyncio.Event()

    async def write_and_stay() -> None:
        async with database.transaction() as session:
            await session.execute(text("UPDATE count SET value = 1000"))
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(write_and_stay())
    await begun.wait()
    waiting = asyncio.create_task(requests(application(database), *["increment"] * 20))
    task.cancel()
    assert outcomes(await waiting) == {"200 ": 20}
    assert task.cancelled()
    assert await stored(sqlite_url) == (20, 0)
