"""Fixtures of the whole suite: the event loop, the servers, and empty databases on them."""

import gc
import importlib.util
import os
from collections.abc import Generator, Iterator
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


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of `make chaos`."""
    parser.addoption(
        "--whole-sweeps",
        action="store_true",
        help="cancel in every way on every database, not only on PostgreSQL",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what a sweep over the ways of cancelling would only repeat on another database.

    A test that is marked `sweep` runs in every way on PostgreSQL, and on the others when a task is
    cancelled; with `--whole-sweeps` everywhere.
    """
    if not config.getoption("--whole-sweeps"):
        config.hook.pytest_deselected(items=[item for item in items if _repeats(item)])
        items[:] = [item for item in items if not _repeats(item)]


def _repeats(item: pytest.Item) -> bool:
    if item.get_closest_marker("sweep") is None or not isinstance(item, pytest.Function):
        return False
    chosen = set(map(str, item.callspec.params.values()))
    return bool(chosen & {"mysql", "sqlite"}) and "task" not in chosen


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Load the tests without the garbage collector, and leave them out of what it looks at later.

    Its every look at all the tests takes longer than most of them.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


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
