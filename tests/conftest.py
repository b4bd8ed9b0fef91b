"""Fixtures of the whole suite: the event loop, the servers, and empty databases on them."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import servers


def pytest_configure(config: pytest.Config) -> None:
    """`make test` tests the installed wheel: refuse a source tree that shadows it."""
    spec = importlib.util.find_spec("asgi_db")
    origin = Path(spec.origin) if spec and spec.origin else None
    if os.environ.get("ASGI_DB_TEST_INSTALLED") and (
        origin is None or "site-packages" not in origin.parts
    ):
        raise pytest.UsageError(f"the tests are to run on the installed wheel, not on {origin}")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """SQLAlchemy runs on asyncio alone; `@every_loop` adds the other loops."""
    return "asyncio"


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[servers.DatabaseServer]:
    """A PostgreSQL server for this session."""
    with servers.postgresql() as server:
        yield server


@pytest.fixture(scope="session")
def mysql_server() -> Iterator[servers.DatabaseServer]:
    """A MariaDB server for this session."""
    with servers.mariadb() as server:
        yield server


@pytest.fixture
def postgresql_url(postgresql_server: servers.DatabaseServer) -> Iterator[str]:
    """The URL of an empty PostgreSQL database."""
    with postgresql_server.empty_database() as url:
        yield url


@pytest.fixture
def mysql_url(mysql_server: servers.DatabaseServer) -> Iterator[str]:
    """The URL of an empty MariaDB database."""
    with mysql_server.empty_database() as url:
        yield url


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of an SQLite file that does not exist yet."""
    return f"sqlite+aiosqlite:///{tmp_path}/test.db"


@pytest.fixture(params=["postgresql", "mysql", "sqlite"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database, on each of the three in turn."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url
