"""The contract holds in a sandbox too, and nothing is left afterwards."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

import pytest
from sqlalchemy import select

from asgi_db import Database, DBSession, read_only, transactional
from tests.contract.endpoints import Answer, Framework
from tests.contract.site import Item, Site
from tests.contract.test_commit import CONFLICT, fail_at_commit
from tests.contract.test_outcome import *  # noqa: F403  the same tests, on the `site` below


class SandboxedSite(Site):
    """A site whose database is in a sandbox, so that only it sees what is there."""

    @classmethod
    def around(cls, database: Database) -> AbstractAsyncContextManager[object]:
        return database.sandbox()

    async def assert_nothing_held(self) -> None:
        assert self.checked_out == 0

    async def items(self) -> list[str]:
        async with self.database.session(read_only) as session:
            return list(await session.scalars(select(Item.name).order_by(Item.name)))


@pytest.fixture
async def site(framework: Framework, database_url: str) -> AsyncIterator[Site]:
    async with SandboxedSite.on(framework, database_url) as site:
        yield site
        assert await Site.items(site) == []


@pytest.mark.parametrize("database_url", ["postgresql", "sqlite"], indirect=True)
async def test_a_commit_that_fails_is_answered_by_the_registered_handler(site: Site) -> None:
    ran: list[object] = []
    work = fail_at_commit(site, lambda: ran.append("background"))
    exchange = await site.answer(work, transactional, handlers={site.commit_error: CONFLICT})
    assert (exchange.status, exchange.body, ran) == (409, CONFLICT.body, [])
    assert await site.items() == []
    assert (await site.answer(write_again, transactional)).status == 201
    assert await site.items() == ["again"]


async def write_again(session: DBSession) -> Answer:
    session.add(Item(name="again"))
    return Answer(201)
