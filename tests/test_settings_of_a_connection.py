"""Settings that a request makes on its connection: what the known limits say of them is so."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from asgi_db import Database, DBSession
from tests.pools import ONE_CONNECTION


@pytest.fixture(params=["postgresql", "mysql"])
def server_url(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


POSTGRESQL = text("SELECT coalesce(current_setting('app.tenant', true), '')")
MYSQL = text("SELECT @@max_statement_time")


async def test_a_local_setting_of_postgresql_ends_with_its_transaction(postgresql_url: str) -> None:
    async with Database(postgresql_url, engine_options=ONE_CONNECTION) as database:
        async with database.transaction() as session:
            await session.execute(text("SET LOCAL app.tenant = 'ada'"))
            assert await session.scalar(POSTGRESQL) == "ada"
        async with database.transaction() as session:
            await session.execute(text("SELECT set_config('app.tenant', :t, true)"), {"t": "ada"})
            assert await session.scalar(POSTGRESQL) == "ada"
        async with database.session() as session:
            assert await session.scalar(POSTGRESQL) == ""


async def test_a_setting_of_postgresql_that_was_rolled_back_is_undone(postgresql_url: str) -> None:
    async with Database(postgresql_url, engine_options=ONE_CONNECTION) as database:
        async with database.session() as session:
            await session.execute(text("SET app.tenant = 'ada'"))
            assert await session.scalar(POSTGRESQL) == "ada"
        async with database.session() as session:
            assert await session.scalar(POSTGRESQL) == ""


async def test_a_setting_of_mariadb_for_one_statement_ends_with_it(mysql_url: str) -> None:
    async def limit(session: DBSession) -> float:
        return float(str(await session.scalar(MYSQL)))

    async with Database(mysql_url, engine_options=ONE_CONNECTION) as database:
        async with database.transaction() as session:
            before = await limit(session)
            statement = f"SET STATEMENT max_statement_time = 7 FOR {MYSQL.text}"
            assert float(str(await session.scalar(text(statement)))) == 7
            assert await limit(session) == before


async def test_another_setting_is_kept_with_the_connection(server_url: str) -> None:
    """The known limit itself: when this fails, the README says too little."""
    is_postgresql = server_url.startswith("postgresql")
    async with Database(server_url, engine_options=ONE_CONNECTION) as database:
        async with database.transaction() as session:
            setting = "app.tenant = 'ada'" if is_postgresql else "max_statement_time = 7"
            await session.execute(text(f"SET {setting}"))
        async with database.session() as session:
            kept = await session.scalar(POSTGRESQL if is_postgresql else MYSQL)
            assert str(kept).startswith("ada" if is_postgresql else "7")
