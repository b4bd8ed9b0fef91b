"""Jobs run in the application's event loop, each in a transaction of its own; a failed COMMIT is
a failed job.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from apscheduler.events import EVENT_JOB_ERROR, EVENT_JOB_EXECUTED, JobExecutionEvent
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from fastapi import FastAPI
from sqlalchemy.exc import IntegrityError

from asgi_db import Database, DBSessionMiddleware
from asgi_db_fastapi import CurrentSessionTransaction
from tests.ecosystem.heroes import NO_SUCH_TEAM, Hero, heroes, serving


class Jobs:
    """An application with a scheduler, and what the scheduler says of its jobs."""

    def __init__(self, database: Database) -> None:
        self.ended = asyncio.Queue[JobExecutionEvent]()
        scheduler = AsyncIOScheduler()
        scheduler.add_listener(self.ended.put_nowait, EVENT_JOB_EXECUTED | EVENT_JOB_ERROR)

        @asynccontextmanager
        async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
            scheduler.start()
            yield
            scheduler.shutdown()

        async def hire(name: str, team: int | None) -> None:
            async with database.transaction() as session:
                session.add(Hero(name=name, team_id=team))

        self.app = FastAPI(lifespan=lifespan)
        self.app.add_middleware(DBSessionMiddleware, database=database)

        @self.app.post("/heroes")
        async def create(
            name: str, session: CurrentSessionTransaction, team: int | None = None
        ) -> None:
            session.add(Hero(name=name))
            session.on_commit(lambda: scheduler.add_job(hire, args=[f"{name}'s friend", team]))


async def test_a_job_that_a_request_has_left_commits_its_work(database: Database) -> None:
    jobs = Jobs(database)
    async with serving(jobs.app, database) as client:
        assert (await client.post("/heroes?name=ada")).status_code == 200
        event = await asyncio.wait_for(jobs.ended.get(), 20)
        assert event.code == EVENT_JOB_EXECUTED
        assert heroes(str(database.url)) == ["ada", "ada's friend"]
        assert (await client.post("/heroes?name=ada")).status_code == 500
        assert jobs.ended.empty()


async def test_a_failed_commit_is_a_failed_job(database: Database) -> None:
    jobs = Jobs(database)
    async with serving(jobs.app, database) as client:
        assert (await client.post(f"/heroes?name=ada&team={NO_SUCH_TEAM}")).status_code == 200
        event = await asyncio.wait_for(jobs.ended.get(), 20)
        assert event.code == EVENT_JOB_ERROR and isinstance(event.exception, IntegrityError)
        assert heroes(str(database.url)) == ["ada"]
