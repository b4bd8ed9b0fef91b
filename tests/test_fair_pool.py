"""Nobody who waits for a connection is passed over."""

import asyncio
import logging
from collections import Counter

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import QueuePool
from sqlalchemy.util import greenlet_spawn
from sqlalchemy.util.queue import Empty, Full

from asgi_db import Database
from tests.internals import FairPool, FairQueue
from tests.relay import Relay

pytestmark = pytest.mark.anyio

ONE = {"pool_size": 1, "max_overflow": 0}


async def take(queue: FairQueue[int], seconds: float | None = None) -> int:
    return await greenlet_spawn(queue.get, True, seconds)


async def test_connections_are_handed_out_in_the_order_of_asking(database_url: str) -> None:
    """A newcomer comes last, also at the very moment at which a connection comes back."""
    served: list[str] = []
    async with Database(database_url, engine_options=ONE) as database:
        engine = database.engine

        async def client(name: str) -> None:
            async with engine.connect() as connection:
                await connection.execute(text("SELECT 1"))
                served.append(name)

        async def greedy() -> None:
            for round in range(3):
                await client(f"greedy {round}")

        async with asyncio.TaskGroup() as tasks, engine.connect():
            tasks.create_task(greedy())
            await asyncio.sleep(0)
            for number in range(3):
                tasks.create_task(client(f"patient {number}"))
            for _ in range(5):  # all of them wait now
                await asyncio.sleep(0)
        assert served == ["greedy 0", "patient 0", "patient 1", "patient 2", "greedy 1", "greedy 2"]


async def test_under_load_all_get_their_share(database_url: str) -> None:
    """Fifty at once, who come again and again: none of them waits in vain."""
    options = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 30}
    served = Counter[int]()
    async with Database(database_url, engine_options=options) as database:

        async def client(number: int) -> None:
            while served.total() < 500:
                async with database.engine.connect() as connection:
                    await connection.execute(text("SELECT 1"))
                    served[number] += 1

        async with asyncio.TaskGroup() as tasks:
            for number in range(50):
                tasks.create_task(client(number))
        pool = database.engine.pool
        assert isinstance(pool, QueuePool)
        assert (pool.checkedout(), pool.checkedin()) == (0, 2)
    assert len(served) == 50
    assert max(served.values()) - min(served.values()) <= 2


async def test_a_timeout_is_the_pools_own_error_and_leaves_nothing_behind(sqlite_url: str) -> None:
    async with Database(sqlite_url, engine_options={**ONE, "pool_timeout": 0.05}) as database:
        async with database.engine.connect():
            with pytest.raises(PoolTimeoutError):
                await database.engine.connect()
        async with database.engine.connect() as connection:
            assert await connection.scalar(text("SELECT 1")) == 1


async def test_what_comes_at_the_moment_of_a_cancellation_goes_to_the_next() -> None:
    queue = FairQueue[int](1)
    first = asyncio.create_task(take(queue))
    second = asyncio.create_task(take(queue))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    queue.put_nowait(1)  # it is the first one's now
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await second == 1
    assert (queue.qsize(), queue.empty()) == (0, True)


async def test_what_comes_back_from_who_was_cancelled_is_kept_though_there_is_no_room() -> None:
    queue = FairQueue[int](1)
    waiter = asyncio.create_task(take(queue))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    queue.put_nowait(1)  # it is the waiter's now
    queue.put_nowait(2)  # and this fills the queue
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert {queue.get_nowait(), queue.get_nowait()} == {1, 2}


async def test_a_listener_that_fails_at_the_check_in_keeps_no_connection(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With SQLAlchemy's own pool it does, and the pool is smaller for good."""

    def fail(*_: object) -> None:
        raise LookupError("a listener's own fault")

    async with Database(sqlite_url, engine_options={**ONE, "pool_timeout": 1}) as database:
        event.listen(database.engine.sync_engine, "checkin", fail)
        for _ in range(2):
            async with database.engine.connect() as connection:
                assert await connection.scalar(text("SELECT 1")) == 1
        assert (database.stats().pool.checked_out, database.stats().pool.idle) == (0, 1)
    assert [line.exc_text is not None for line in caplog.records] == [True, True]


async def test_a_listener_that_cancels_at_the_check_in_keeps_no_connection(sqlite_url: str) -> None:
    def cancel(*_: object) -> None:
        raise asyncio.CancelledError

    async with Database(sqlite_url, engine_options={**ONE, "pool_timeout": 1}) as database:
        event.listen(database.engine.sync_engine, "checkin", cancel, once=True)
        with pytest.raises(asyncio.CancelledError):
            async with database.engine.connect() as connection:
                await connection.execute(text("SELECT 1"))
        async with database.engine.connect() as connection:
            assert await connection.scalar(text("SELECT 1")) == 1


TWO = {"pool_size": 1, "max_overflow": 1, "pool_timeout": 60}


async def waiting(database: Database) -> None:
    """Wait until somebody waits for a connection."""
    pool = database.engine.pool
    assert isinstance(pool, FairPool)
    while not pool.waiting():  # noqa: ASYNC110
        await asyncio.sleep(0)


async def connected(database: Database) -> None:
    async with database.engine.connect() as connection:
        await connection.execute(text("SELECT 1"))


async def test_a_connection_whose_waiter_is_cancelled_costs_the_pool_no_place(
    postgresql_url: str,
) -> None:
    async with Database(postgresql_url, engine_options=TWO) as database:
        first, second = await database.engine.connect(), await database.engine.connect()
        waiter = asyncio.create_task(connected(database))
        await waiting(database)
        await first.close()
        await second.close()
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        pool = database.engine.pool
        assert isinstance(pool, QueuePool)
        assert pool.checkedout() == 0
        async with database.engine.connect():
            await connected(database)
        assert pool.checkedout() == 0


async def test_who_waits_gets_the_place_of_a_connection_that_is_closed(postgresql_url: str) -> None:
    """One beyond the size of the pool does not come back: there is room for another."""
    async with Database(postgresql_url, engine_options=TWO) as database:
        first, second = await database.engine.connect(), await database.engine.connect()
        await first.close()
        closing = asyncio.create_task(second.close())
        await asyncio.sleep(0)
        third = await database.engine.connect()
        waiter = asyncio.create_task(connected(database))
        await closing
        async with asyncio.timeout(20):
            await waiter  # while the third is still out
        await third.close()


async def test_who_waits_gets_the_place_of_a_connect_that_is_cancelled(
    postgresql_url: str,
) -> None:
    async with Relay(postgresql_url) as relay:
        options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 60}
        async with Database(relay.url, engine_options=options) as database:
            relay.freeze()
            first = asyncio.create_task(connected(database))
            await relay.holds_something.wait()
            waiter = asyncio.create_task(connected(database))
            await waiting(database)
            first.cancel()
            await asyncio.wait((first,))
            relay.thaw()
            async with asyncio.timeout(20):
                await waiter


async def test_a_newcomer_does_not_take_what_is_for_who_waits() -> None:
    queue = FairQueue[int](1)
    waiter = asyncio.create_task(take(queue))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    queue.put(1)
    with pytest.raises(Empty):
        queue.get(False)
    with pytest.raises(Empty):
        await take(queue, 0)
    assert await waiter == 1


async def test_who_has_given_up_is_not_served() -> None:
    queue = FairQueue[int](2)
    with pytest.raises(Empty):
        await take(queue, 0.01)
    waiter = asyncio.create_task(take(queue))
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    queue.put(1)
    assert queue.qsize() == 1
    assert await take(queue) == 1


@pytest.mark.parametrize(("lifo", "expected"), [(False, [1, 2]), (True, [2, 1])])
async def test_it_is_a_queue_or_a_stack_of_limited_size(lifo: bool, expected: list[int]) -> None:
    queue = FairQueue[int](2, use_lifo=lifo)
    queue.put(1, False)
    queue.put(2, False)
    assert queue.full()
    with pytest.raises(Full):
        queue.put(3, False)
    assert [queue.get(False), queue.get(False)] == expected
    with pytest.raises(Empty):
        queue.get(False)


async def test_the_engine_has_this_pool_unless_the_user_chooses_another(sqlite_url: str) -> None:
    async with Database(sqlite_url) as database:
        assert type(database.engine.pool) is FairPool
        assert type(database.engine.pool.recreate()) is FairPool


async def test_it_logs_where_sqlalchemys_pools_do(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """So that an application which logs at INFO is not told of each pool that is disposed."""
    caplog.set_level(logging.INFO)
    async with Database(sqlite_url) as database:
        await database.ping()
    assert caplog.records == []
    async with Database(sqlite_url, engine_options={"echo_pool": True}) as database:
        await database.ping()
    assert {record.name for record in caplog.records} == {"sqlalchemy.pool.FairPool"}
