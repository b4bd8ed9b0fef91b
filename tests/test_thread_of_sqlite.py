"""How often a request on SQLite goes through the thread of its connection: each way costs."""

from collections.abc import Iterator
from typing import Any

import aiosqlite
import pytest
from sqlalchemy import text

from asgi_db import Database, plain, read_only, transactional
from asgi_db.modes import Mode


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the threads of all connections have been asked to do."""
    asked = list[str]()
    # Everything that is done in the thread passes through this method, which is not public.
    execute: Any = getattr(aiosqlite.Connection, "_execute")  # noqa: B009

    async def note(self: aiosqlite.Connection, function: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(function.__name__)
        return await execute(self, function, *args, **kwargs)

    monkeypatch.setattr(aiosqlite.Connection, "_execute", note)
    yield asked


READ = ["cursor", "execute", "fetchall", "close"]


@pytest.mark.parametrize(
    ("mode", "statement", "expected"),
    [
        (read_only, "SELECT 1", READ),
        (read_only(snapshot=True), "SELECT 1", ["execute", *READ, "rollback"]),
        (plain, "SELECT 1", ["execute", *READ, "rollback"]),
        (transactional, "SELECT 1", ["execute", *READ, "commit"]),
        (transactional, "INSERT INTO t VALUES (1)", ["execute", *READ[:2], "close", "commit"]),
    ],
    ids=str,
)
async def test_nothing_is_asked_of_the_thread_in_vain(
    sqlite_url: str, calls: list[str], mode: Mode, statement: str, expected: list[str]
) -> None:
    async with Database(sqlite_url) as database:
        async with database.transaction() as session:
            await session.execute(text("CREATE TABLE t (x int)"))
        calls.clear()
        async with database.session(mode) as session:
            await session.execute(text(statement))
        assert calls == expected


async def test_a_transaction_that_is_open_is_rolled_back(sqlite_url: str) -> None:
    async with Database(sqlite_url) as database:
        async with database.transaction() as session:
            await session.execute(text("CREATE TABLE t (x int)"))
        async with database.engine.connect() as connection:
            await connection.exec_driver_sql("INSERT INTO t VALUES (1)")
            pooled = await connection.get_raw_connection()
            assert pooled.driver_connection is not None
            assert pooled.driver_connection.in_transaction
        async with database.session(read_only) as session:
            assert (await session.scalars(text("SELECT x FROM t"))).all() == []


async def test_a_detached_connection_begins_and_rolls_back(sqlite_url: str) -> None:
    async with Database(sqlite_url) as database:
        async with database.engine.connect() as connection:
            pooled = await connection.get_raw_connection()
            pooled.detach()
            await connection.exec_driver_sql("CREATE TABLE t (x int)")
            await connection.rollback()
            await connection.exec_driver_sql("CREATE TABLE t (x int)")
            await connection.commit()
