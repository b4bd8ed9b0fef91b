"""What a statement sets for its connection is gone when the next request has that connection."""

from typing import Any

import pytest
from sqlalchemy import event, text

from asgi_db import Database, DBSession, Mode, plain, read_only, transactional
from tests.contract.endpoints import Answer
from tests.contract.site import Item, Site

SETTINGS = {
    "postgresql": ("SET statement_timeout TO '9s'", "SHOW statement_timeout"),
    "mysql": ("SET SESSION max_statement_time = 9", "SELECT @@SESSION.max_statement_time"),
    "sqlite": ("PRAGMA cache_size = 5", "PRAGMA cache_size"),
}
CONNECTION = {
    "postgresql": "SELECT pg_backend_pid()",
    "mysql": "SELECT connection_id()",
    "sqlite": "PRAGMA cache_size",
}


def of(site: Site) -> str:
    """The name of the database."""
    return site.database.url.get_backend_name()


async def value(session: DBSession, statement: str) -> str:
    """What a statement returns."""
    return str(await session.scalar(text(statement)))


@pytest.mark.parametrize("mode", [plain, transactional], ids=lambda mode: mode.name)
@pytest.mark.parametrize("status", [200, 409])
async def test_a_setting_of_one_request_does_not_reach_the_next(
    site: Site, mode: Mode, status: int
) -> None:
    change, show = SETTINGS[of(site)]

    async def look(session: DBSession) -> Answer:
        return Answer(200, (await value(session, show)).encode())

    async def set_and_write(session: DBSession) -> Answer:
        await session.execute(text(change))
        seen.append(await value(session, show))
        session.add(Item(name="a"))
        if mode is plain and status == 200:
            await session.commit()
        return Answer(status)

    seen: list[str] = []
    before = (await site.answer(look, mode)).body
    assert (await site.answer(set_and_write, mode)).status == status
    after = await site.answer(look, mode)
    assert after.body == before
    assert all(one.encode() != before for one in seen)
    assert await site.items() == (["a"] if status == 200 else [])


async def test_nobody_pays_who_sets_nothing_or_only_for_the_transaction(server_site: Site) -> None:
    """The connection is the same one as before."""
    statements = ["SELECT 1", "SAVEPOINT a", "RELEASE SAVEPOINT a"]
    if of(server_site) == "postgresql":
        statements += [
            "SET LOCAL statement_timeout TO '9s'",
            "SELECT set_config('app.tenant', 'a', true)",
            "SELECT pg_advisory_xact_lock(1)",
        ]

    async def work(session: DBSession) -> Answer:
        for statement in statements:
            await session.execute(text(statement))
        session.add(Item(name=f"item {len(seen)}"))
        return Answer(200, (await value(session, CONNECTION[of(server_site)])).encode())

    seen: list[bytes] = []
    for _ in range(3):
        seen.append((await server_site.answer(work, transactional)).body)
    assert len(set(seen)) == 1


async def test_what_a_rollback_has_undone_needs_no_new_connection(server_site: Site) -> None:
    """On PostgreSQL a setting is part of the transaction."""
    change, _ = SETTINGS[of(server_site)]

    async def work(session: DBSession) -> Answer:
        await session.execute(text(change))
        return Answer(409, (await value(session, CONNECTION[of(server_site)])).encode())

    seen = {(await server_site.answer(work, transactional)).body for _ in range(3)}
    assert len(seen) == (1 if of(server_site) == "postgresql" else 3)


async def test_a_new_connection_has_what_the_application_sets_for_each(database_url: str) -> None:
    async with Database(database_url, engine_options={"pool_size": 1}) as database:
        change, show = SETTINGS[database.url.get_backend_name()]

        def connect(connection: Any, _: object) -> None:
            cursor = connection.cursor()
            cursor.execute(change)
            cursor.close()

        event.listen(database.engine.sync_engine, "connect", connect)
        async with database.session(read_only) as session:
            before = await value(session, show)
        async with database.transaction() as session:
            await session.execute(text(change.replace("9", "8").replace("5", "6")))
        async with database.session(read_only) as session:
            assert await value(session, show) == before
