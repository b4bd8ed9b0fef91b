"""A worker has the application's `Database` and a transaction for each job, with Redis's own
server; jobs are enqueued after the COMMIT, and a failed COMMIT is a failed job.
"""

from __future__ import annotations

import subprocess
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from arq import ArqRedis, create_pool, func
from arq.connections import RedisSettings
from arq.worker import Worker
from fastapi import FastAPI
from sqlalchemy.exc import IntegrityError

from asgi_db import Database, DBSessionMiddleware
from asgi_db_fastapi import CurrentSessionTransaction
from tests.ecosystem.heroes import NO_SUCH_TEAM, Hero, heroes, serving
from tests.programs import REDIS, find
from tests.servers import free_port


@pytest.fixture
def redis() -> Generator[RedisSettings, None, None]:
    """A Redis of its own."""
    program = find("redis-server")
    assert program, REDIS.advice
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--daemonize", "no"]
    with subprocess.Popen([program, *options], stdout=subprocess.DEVNULL) as process:
        yield RedisSettings(port=port, conn_retries=100, conn_retry_delay=0.1)
        process.terminate()


async def hire(ctx: dict[str, Any], name: str, team: int | None) -> int:
    async with ctx["database"].transaction() as session:
        hero = Hero(name=name, team_id=team)
        session.add(hero)
        await session.flush()
    return hero.id


def worker(pool: ArqRedis, database: Database) -> Worker:
    async def startup(ctx: dict[str, Any]) -> None:
        ctx["database"] = await database.__aenter__()

    async def shutdown(ctx: dict[str, Any]) -> None:
        await database.__aexit__(None, None, None)

    return Worker(
        [func(hire, max_tries=1)],
        redis_pool=pool,
        on_startup=startup,
        on_shutdown=shutdown,
        burst=True,
        handle_signals=False,
        poll_delay=0.05,
    )


def application(database: Database, redis: RedisSettings) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        app.state.jobs = await create_pool(redis)
        yield
        await app.state.jobs.aclose()

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(DBSessionMiddleware, database=database)

    @app.post("/heroes")
    async def create(
        name: str, session: CurrentSessionTransaction, team: int | None = None
    ) -> None:
        session.add(Hero(name=name))

        async def enqueue() -> None:
            await app.state.jobs.enqueue_job("hire", f"{name}'s friend", team)

        session.on_commit(enqueue)

    return app


@pytest.mark.parametrize("team", [None, NO_SUCH_TEAM], ids=["done", "failed_commit"])
async def test_a_worker_does_the_jobs_of_requests_that_have_committed(
    database: Database, redis: RedisSettings, team: int | None
) -> None:
    async with serving(application(database, redis), database) as client:
        params = {"name": "ada"} | ({} if team is None else {"team": team})
        assert (await client.post("/heroes", params=params)).status_code == 200
        assert (await client.post("/heroes", params=params)).status_code == 500
    pool = await create_pool(redis)
    working = worker(pool, Database(database.url))
    try:
        assert [job.args for job in await pool.queued_jobs()] == [("ada's friend", team)]
        await working.async_run()
        [result] = await pool.all_job_results()
    finally:
        await working.close()
    if team is None:
        assert result.success
        assert heroes(str(database.url)) == ["ada", "ada's friend"]
    else:
        assert not result.success and isinstance(result.result, IntegrityError)
        assert heroes(str(database.url)) == ["ada"]
