"""Tasks are kicked after the COMMIT (with the `InMemoryBroker`), and open the transaction
themselves; a failed COMMIT is a failed task.
"""

from collections.abc import AsyncGenerator
from typing import Annotated

import pytest
from fastapi import FastAPI
from sqlalchemy.exc import IntegrityError
from taskiq import AsyncTaskiqTask, InMemoryBroker, TaskiqDepends

from asgi_db import Database, DBSession, DBSessionMiddleware
from asgi_db_fastapi import CurrentSessionTransaction
from tests.ecosystem.heroes import NO_SUCH_TEAM, Hero, heroes, serving


class Work:
    """An application and its tasks."""

    def __init__(self, database: Database) -> None:
        broker = InMemoryBroker()
        self.kicked: list[AsyncTaskiqTask[int]] = []

        def provide_database() -> Database:
            return database

        # A task whose dependency fails at its end gets no result from taskiq, so that the COMMIT
        # belongs into the task.
        @broker.task
        async def hire(
            name: str,
            team: int | None,
            own: Annotated[Database, TaskiqDepends(provide_database)],
        ) -> int:
            async with own.transaction() as session:
                hero = Hero(name=name, team_id=team)
                session.add(hero)
                await session.flush()
                if name == "nobody's friend":
                    raise LookupError(name)
            return hero.id

        self.broker = broker
        self.app = FastAPI()
        self.app.add_middleware(DBSessionMiddleware, database=database)

        @self.app.post("/heroes")
        async def create(
            name: str, session: CurrentSessionTransaction, team: int | None = None
        ) -> None:
            session.add(Hero(name=name))

            async def kick() -> None:
                self.kicked.append(await hire.kiq(f"{name}'s friend", team))  # type: ignore[call-overload]

            session.on_commit(kick)


@pytest.fixture
async def work(database: Database) -> AsyncGenerator[Work]:
    work = Work(database)
    await work.broker.startup()
    yield work
    await work.broker.shutdown()


async def test_a_task_that_a_request_has_kicked_commits_its_work(
    work: Work, database: Database
) -> None:
    async with serving(work.app, database) as client:
        assert (await client.post("/heroes?name=ada")).status_code == 200
        result = await work.kicked[0].wait_result(timeout=20)
        assert (result.is_err, result.return_value) == (False, 2)
        assert heroes(str(database.url)) == ["ada", "ada's friend"]
        assert (await client.post("/heroes?name=ada")).status_code == 500
        assert len(work.kicked) == 1


async def test_a_task_that_fails_leaves_nothing(work: Work, database: Database) -> None:
    async with serving(work.app, database) as client:
        assert (await client.post("/heroes?name=nobody")).status_code == 200
        result = await work.kicked[0].wait_result(timeout=20)
        assert result.is_err and isinstance(result.error, LookupError)
        assert heroes(str(database.url)) == ["nobody"]


async def test_a_failed_commit_is_a_failed_task(work: Work, database: Database) -> None:
    async with serving(work.app, database) as client:
        assert (await client.post(f"/heroes?name=ada&team={NO_SUCH_TEAM}")).status_code == 200
        result = await work.kicked[0].wait_result(timeout=20)
        assert result.is_err and isinstance(result.error, IntegrityError)
        assert heroes(str(database.url)) == ["ada"]


async def test_taskiq_has_no_result_where_a_dependency_fails_at_its_end(
    database: Database,
) -> None:
    """Which the page says; when this fails, a transaction may be a dependency."""
    broker = InMemoryBroker()

    async def transaction() -> AsyncGenerator[DBSession]:
        async with database.transaction() as session:
            yield session

    @broker.task
    async def hire(session: Annotated[DBSession, TaskiqDepends(transaction)]) -> None:
        session.add(Hero(name="ada", team_id=NO_SUCH_TEAM))

    async with database:
        task = await hire.kiq()
        with pytest.raises(IntegrityError):
            await broker.wait_all()
        assert not await task.is_ready()
        assert heroes(str(database.url)) == []
