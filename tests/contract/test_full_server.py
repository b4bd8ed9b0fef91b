"""A server that takes no more connections, while those in the pool work: requests wait for one."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import URL, make_url, text

from asgi_db import Database, DBSession, plain, transactional
from tests.contract.client import assert_refused, call
from tests.contract.endpoints import Answer, Framework
from tests.contract.site import Site
from tests.servers import outside

LIMIT = 2


@asynccontextmanager
async def limited_user(url: str) -> AsyncGenerator[URL]:
    """A user whom the server lets connect but twice."""
    name = "limited_user"
    host = make_url(url)
    async with outside(url) as connection:
        if host.get_backend_name() == "postgresql":
            await connection.execute(f"CREATE ROLE {name} LOGIN CONNECTION LIMIT {LIMIT}")
            drop = f"DROP ROLE {name}"
        else:
            await connection.execute(
                f"CREATE USER {name}@'%' IDENTIFIED BY 'password' WITH MAX_USER_CONNECTIONS {LIMIT}"
            )
            await connection.execute(f"GRANT ALL ON *.* TO {name}@'%'")
            drop = f"DROP USER {name}@'%'"
        try:
            yield host.set(username=name, password="password")
        finally:
            await connection.execute(drop)


@asynccontextmanager
async def limited(
    framework: Framework, url: str, *, pool_timeout: float = 20
) -> AsyncGenerator[Site]:
    """A site with a pool of ten connections, of which the server grants two."""
    options = {"pool_size": 5, "max_overflow": 5, "pool_timeout": pool_timeout}
    async with (
        Site.on(framework, url),
        limited_user(url) as own,
        Database(own, engine_options=options) as database,
    ):
        yield Site(framework, url, database)


async def work(session: DBSession) -> Answer:
    is_postgresql = session.get_bind().dialect.name == "postgresql"
    await session.execute(text("SELECT pg_sleep(0.02)" if is_postgresql else "SELECT SLEEP(0.02)"))
    return Answer(201)


async def test_requests_wait_for_the_connections_that_there_are(
    framework: Framework, server_url: str
) -> None:
    async with limited(framework, server_url) as site:
        app = site.app(work, transactional)
        for _ in range(2):
            exchanges = await asyncio.gather(*(call(app) for _ in range(30)))
            assert {exchange.status for exchange in exchanges} == {201}
        assert site.opened <= LIMIT
        await site.assert_nothing_held()


async def test_after_pool_timeout_it_is_busy_and_says_who_holds_them(
    framework: Framework, server_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with limited(framework, server_url, pool_timeout=0.2) as site:
        async with site.database.session() as one, site.database.session() as other:
            await work(one)
            await work(other)
            exchanges = await asyncio.gather(*(call(site.app(work, plain)) for _ in range(3)))
        for exchange in exchanges:
            assert_refused(exchange, "busy")
        assert "async with database.session()" in caplog.text
        assert (await call(site.app(work, plain))).status == 201
        await site.assert_nothing_held()


async def test_a_server_that_is_full_with_others_is_down_at_once(
    framework: Framework, server_url: str
) -> None:
    async with limited(framework, server_url) as site:
        async with Database(site.database.url) as elsewhere:
            async with elsewhere.session() as one, elsewhere.session() as other:
                await work(one)
                await work(other)
                async with asyncio.timeout(10):
                    exchanges = await asyncio.gather(*(call(site.app(work)) for _ in range(3)))
        for exchange in exchanges:
            assert_refused(exchange, "down")
        assert (await call(site.app(work))).status == 201
        await site.assert_nothing_held()


async def test_one_that_waits_and_is_cancelled_costs_the_pool_no_place(
    framework: Framework, server_url: str
) -> None:
    async with limited(framework, server_url) as site:
        app = site.app(work)
        async with site.database.session() as one, site.database.session() as other:
            await work(one)
            await work(other)
            waiting = [asyncio.ensure_future(call(app)) for _ in range(5)]
            async with asyncio.timeout(20):
                while site.database.stats().pool.waiting != 5:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            for each in waiting:
                each.cancel()
            await asyncio.wait(waiting)
            assert site.checked_out == LIMIT
        assert site.checked_out == 0
        exchanges = await asyncio.gather(*(call(app) for _ in range(10)))
        assert {exchange.status for exchange in exchanges} == {201}
        await site.assert_nothing_held()
