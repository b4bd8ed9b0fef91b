"""`create_tables` in several processes at once: one creates, and the others wait."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any, Literal

import pytest
from sqlalchemy import Column, Enum, ForeignKey, Integer, MetaData, Table, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from asgi_db import Database
from tests.internals import driver_of
from tests.servers import outside

ONE_CONNECTION = {"pool_size": 1, "max_overflow": 0}


class Shop(DeclarativeBase):
    """Tables and a type, which takes some statements to make."""


class Order(Shop):
    __tablename__ = "order"

    id: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[Literal["open", "paid"]] = mapped_column(Enum("open", "paid", name="state"))


for _number in range(5):
    _id = Column("id", Integer, ForeignKey(Order.id), primary_key=True)
    Table(f"item_{_number}", Shop.metadata, _id)


@pytest.mark.parametrize("isolation", [None, "REPEATABLE READ", "SERIALIZABLE"])
async def test_workers_that_create_the_tables_at_once_wait_for_the_first_one(
    database_url: str, isolation: str | None
) -> None:
    """Each has an engine of its own, as in a process of its own."""
    options: dict[str, Any] = {"pool_size": 1}
    if isolation is not None and (isolation == "SERIALIZABLE" or "sqlite" not in database_url):
        options["isolation_level"] = isolation
    async with AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(Database(database_url, engine_options=options))
            for _ in range(6)
        ]
        for worker in workers:
            await worker.ping()
        for _ in range(3):
            await asyncio.gather(*(worker.create_tables(Shop.metadata) for worker in workers))
            async with outside(database_url) as connection:
                assert list(await connection.execute("SELECT id FROM item_4")) == []
            await asyncio.gather(*(worker.drop_tables(Shop.metadata) for worker in workers))
        assert not any(worker.holders() for worker in workers)


async def test_one_that_fails_to_create_the_tables_lets_the_next_one_do_it(
    database_url: str,
) -> None:
    """Also one that was cancelled while it waited."""
    broken = MetaData()
    Table("broken", broken, Column("id", Integer, server_default=text("no such thing (")))
    async with (
        Database(database_url, engine_options=ONE_CONNECTION) as one,
        Database(database_url, engine_options=ONE_CONNECTION) as other,
    ):
        with pytest.raises(DBAPIError):
            await one.create_tables(broken)
        await asyncio.wait_for(other.create_tables(Shop.metadata), 10)
        driver = driver_of(one.engine.dialect)
        async with one.engine.begin() as connection:
            lock = driver.lock_definitions or "DELETE FROM item_1"
            await connection.exec_driver_sql(lock)
            # On SQLite this task, which holds the lock, would be told at once.
            waiting = asyncio.create_task(other.create_tables(Shop.metadata))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(waiting, 0.3)
            if driver.unlock_definitions is not None:
                await connection.exec_driver_sql(driver.unlock_definitions)
        await asyncio.wait_for(other.create_tables(Shop.metadata), 10)
