"""A program which forks itself while it uses a database; `test_shutdown.py` runs it."""

import asyncio
import multiprocessing
import os
import sys
from collections.abc import Coroutine
from threading import Thread
from typing import Any, TypeVar

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from asgi_db import Database
from tests.tables import Author, Base

T = TypeVar("T")

_NUMBER_OF_CONNECTION = {
    "postgresql": "pg_backend_pid()",
    "mysql": "connection_id()",
    "sqlite": "0",
}


class Process:
    """What this process and its children do with the database of the command line."""

    def __init__(self) -> None:
        self.database = Database(sys.argv[1])
        self.backend = self.database.url.get_backend_name()

    async def write(self, id: int) -> None:
        async with self.database.transaction() as session:
            session.add(Author(id=id, name=f"author {id}"))

    async def connection(self) -> tuple[int, AsyncEngine]:
        """The number which the server has given the connection, and the engine that it is from."""
        async with self.database.session() as session:
            sql = f"SELECT {_NUMBER_OF_CONNECTION[self.backend]}"
            return (await session.execute(text(sql))).scalar_one(), self.database.engine

    async def assert_stands_on_two_connections(self, id: int) -> None:
        """An author is found, also on a second connection."""
        async with self.database.session() as first, self.database.session() as second:
            for session in first, second:
                assert (await session.get_one(Author, id)).name == f"author {id}"

    async def use(self, *, dispose: bool) -> None:
        """Do as if there were no parent."""
        # In memory each process has a database of its own.
        await self.database.create_tables(Base.metadata)
        await self.write(os.getpid())
        await self.assert_stands_on_two_connections(os.getpid())
        if dispose:
            await self.database.dispose()

    def do_nothing(self) -> None:
        """Just end."""

    def dispose(self) -> None:
        asyncio.run(self.database.dispose())

    def use_and_end(self) -> None:
        asyncio.run(self.use(dispose=False))

    def use_and_dispose(self) -> None:
        asyncio.run(self.use(dispose=True))

    async def fork_inside_a_transaction(self) -> None:
        """To an SQLite file there is one writer at a time, so there the child does not write."""
        one_writer = self.backend == "sqlite" and self.database.url.database != ":memory:"
        child = self.dispose if one_writer else self.use_and_end
        async with self.database.transaction() as session:
            session.add(Author(id=2, name="author 2"))
            await session.flush()
            process = multiprocessing.get_context("fork").Process(target=child)
            process.start()
            await asyncio.to_thread(process.join)
            assert process.exitcode == 0


def main() -> None:
    """Fork between uses of the database, and inside one; each time it goes on with its own.

    The event loop runs in a thread, where no child can touch it: one that unwinds the stack of a
    loop would close it for its parent too.
    """
    process = Process()
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, daemon=True).start()

    def run(coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

    run(process.database.create_tables(Base.metadata))
    run(process.write(1))
    mine = run(process.connection())
    for child in (
        process.do_nothing,
        process.dispose,
        process.use_and_end,
        process.use_and_dispose,
    ):
        pid = os.fork()
        if pid == 0:
            child()
            sys.exit()  # with all that an interpreter does at its end
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, child
        assert run(process.connection()) == mine, child
    run(process.fork_inside_a_transaction())
    assert run(process.connection()) == mine
    run(process.assert_stands_on_two_connections(1))
    run(process.assert_stands_on_two_connections(2))
    run(process.database.dispose())
    print("done")
