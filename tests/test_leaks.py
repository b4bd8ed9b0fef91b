"""`leak_threshold=`: a connection that is out for too long is logged, once, with its stack."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from asgi_db import ConfigurationError, Database, DBSession, DBSessionMiddleware, plain
from asgi_db.types import Receive, Scope, Send
from tests.contract.client import call
from tests.loops import every_loop

QUERY = text("SELECT 1")
THRESHOLD = 0.1


def leaks(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "asgi_db" and "leak_threshold" in record.getMessage()
    ]


async def reported(caplog: pytest.LogCaptureFixture, number: int) -> list[str]:
    """Wait until so many connections have been reported."""
    async with asyncio.timeout(20):
        while len(leaks(caplog)) < number:  # noqa: ASYNC110 - the log gives no event for it
            await asyncio.sleep(0.01)
    return leaks(caplog)


async def take_a_connection(session: DBSession) -> None:
    await session.execute(QUERY)


@asynccontextmanager
async def holding(database: Database) -> AsyncGenerator[None]:
    async with database.session() as session:
        await take_a_connection(session)
        yield


@every_loop
async def test_a_leak_is_logged_once_with_the_route_and_the_stack(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Database(database_url, leak_threshold=THRESHOLD) as database:

        async def leak(scope: Scope, receive: Receive, send: Send) -> None:
            scope["endpoint"] = leak
            await take_a_connection(scope["state"]["db"])
            await reported(caplog, 1)
            await asyncio.sleep(THRESHOLD * 3)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        await call(DBSessionMiddleware(leak, database, mode=plain), "/orders")
        await asyncio.sleep(THRESHOLD * 2)
    (message,) = leaks(caplog)
    first, *stack = message.splitlines()
    assert first.startswith("POST /orders (test_a_leak_is_logged_once")
    assert "leak_threshold=0.1" in first
    assert stack[-1].strip() == "await session.execute(QUERY)"
    assert stack[-2].endswith("in take_a_connection")
    assert any(line.endswith("in leak") for line in stack)
    (record,) = [each for each in caplog.records if each.getMessage() == message]
    assert record.levelno == logging.WARNING


async def test_each_connection_is_logged_for_itself(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Database(sqlite_url, leak_threshold=THRESHOLD) as database:
        async with holding(database):
            await asyncio.sleep(THRESHOLD / 2)
            async with holding(database), database.engine.connect() as connection:
                await connection.execute(QUERY)
                messages = await reported(caplog, 3)
        async with holding(database):
            await reported(caplog, 4)
    assert len(leaks(caplog)) == 4
    assert messages[2].startswith("the engine, without a session has held a connection for 0.")


async def test_who_gives_its_connection_back_is_not_logged(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    long = 2.0
    async with Database(sqlite_url, leak_threshold=long) as database:
        async with database.session() as session:
            for _ in range(5):
                await take_a_connection(session)
                await asyncio.sleep(long / 4)
                await session.release()
        async with holding(database):
            pass
    assert leaks(caplog) == []


def test_the_watch_goes_on_in_another_event_loop(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database(sqlite_url, leak_threshold=THRESHOLD)

    async def leak(number: int) -> None:
        async with database, holding(database):
            await reported(caplog, number)

    asyncio.run(leak(1))
    asyncio.run(leak(2))
    assert len(leaks(caplog)) == 2


def test_the_watch_goes_on_where_a_loop_ended_with_its_timer_set(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = create_async_engine(sqlite_url, poolclass=NullPool)
    database = Database(engine=engine, leak_threshold=THRESHOLD)

    async def use() -> None:
        async with holding(database):
            pass

    async def leak() -> None:
        async with holding(database):
            await reported(caplog, 1)

    asyncio.run(use())
    asyncio.run(leak())
    assert len(leaks(caplog)) == 1


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts the timers of the watch."""

    timers = 0

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, **options: Any
    ) -> Any:
        self.timers += "LeakWatch" in getattr(callback, "__qualname__", "")
        return super().call_later(delay, callback, *args, **options)


@pytest.mark.parametrize(("threshold", "timers"), [(None, 0), (30, 1)], ids=["off", "on"])
def test_one_timer_is_set_for_all_connections_and_none_without_a_threshold(
    sqlite_url: str, threshold: float | None, timers: int
) -> None:
    async def use() -> None:
        async with Database(sqlite_url, leak_threshold=threshold) as database:
            for _ in range(20):
                async with holding(database), holding(database):
                    pass

    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        runner.run(use())
        loop = runner.get_loop()
        assert isinstance(loop, CountingLoop) and loop.timers == timers


@pytest.mark.parametrize("threshold", [0, -1.0, float("nan")])
def test_a_threshold_that_cannot_work_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigurationError, match="leak_threshold=.* must be seconds"):
        Database("sqlite://", leak_threshold=threshold)
