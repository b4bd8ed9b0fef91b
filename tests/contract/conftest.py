"""Fixtures of the contract: one framework, one database, and the witnesses of both."""

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.contract.apps import FRAMEWORKS
from tests.contract.endpoints import Framework
from tests.contract.site import Site
from tests.servers import DatabaseServer


@pytest.fixture(params=FRAMEWORKS, ids=lambda framework: framework.name)
def framework(request: pytest.FixtureRequest) -> Framework:
    """Each framework in turn."""
    chosen: Framework = request.param
    return chosen


@pytest.fixture(scope="module")
def postgresql_url(postgresql_server: DatabaseServer, postgresql_driver: str) -> Iterator[str]:
    """One database for a module, to save time: each test makes its tables anew."""
    with postgresql_server.fresh_database() as url:
        yield url


@pytest.fixture(scope="module")
def mysql_url(mysql_server: DatabaseServer) -> Iterator[str]:
    """The same on MariaDB."""
    with mysql_server.fresh_database() as url:
        yield url


@pytest.fixture(scope="module")
def sqlite_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same on SQLite."""
    return f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('contract')}/test.db"


@pytest.fixture
async def site(framework: Framework, database_url: str) -> AsyncIterator[Site]:
    """The framework on the database, with one connection and no overflow."""
    async with Site.on(framework, database_url) as site:
        yield site


@pytest.fixture
async def server_site(framework: Framework, server_url: str) -> AsyncIterator[Site]:
    """The same where there is a server, from which a connection can be lost."""
    async with Site.on(framework, server_url) as site:
        yield site
