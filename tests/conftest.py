"""Fixtures of the whole suite: the event loop, the servers, and empty databases on them."""

import gc
import importlib.util
import os
import re
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests import clusters, servers

# A busy machine takes its time; what takes too long altogether is ended by the timeout.
settings.register_profile("asgi-db", deadline=None)
settings.load_profile("asgi-db")


def pytest_configure(config: pytest.Config) -> None:
    """`make test` tests the installed wheel: refuse a source tree that shadows it."""
    spec = importlib.util.find_spec("asgi_db")
    origin = Path(spec.origin) if spec and spec.origin else None
    if os.environ.get("ASGI_DB_TEST_INSTALLED") and (
        origin is None or "site-packages" not in origin.parts
    ):
        raise pytest.UsageError(f"the tests are to run on the installed wheel, not on {origin}")
    if not hasattr(config, "workerinput"):  # a worker tells its own to this process
        config.pluginmanager.register(Progress(config))


SILENCE = 30
"""Seconds without a result after which `Progress` says what is running."""


class Progress:
    """Names a test when it fails, and what a long silence waits for.

    Pytest names the failed tests at the end of the run, which takes a while.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._running: list[str] = []
        self._heard_of = time.monotonic()
        self._ended = threading.Event()

    def pytest_sessionstart(self) -> None:
        threading.Thread(target=self._break_silence, daemon=True).start()

    def pytest_sessionfinish(self) -> None:
        self._ended.set()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self._say(f"{node.gateway.id} has loaded {len(ids)} tests, and starts its servers")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._running.append(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._heard_of = time.monotonic()
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            error = str(getattr(crash, "message", report.longrepr)).partition("\n")[0]
            self._say(f"FAILED {report.nodeid} ({report.when}) - {error:.200}", red=True)
        if report.when == "teardown" and report.nodeid in self._running:
            self._running.remove(report.nodeid)

    def _break_silence(self) -> None:
        while not self._ended.wait(SILENCE):
            if time.monotonic() - self._heard_of >= SILENCE:
                self._say(f"running: {', '.join(self._running) or 'nothing yet, tests are loaded'}")

    def _say(self, words: str, **markup: bool) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:
            terminal.write_line("")  # the line of dots ends here
            terminal.write_line(words, **markup)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of `make chaos`."""
    parser.addoption(
        "--whole-sweeps",
        action="store_true",
        help="cancel in every way on every database, not only on PostgreSQL",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what a sweep over the ways of cancelling would only repeat on another database.

    A test that is marked `sweep` runs in every way on PostgreSQL with asyncpg, and on the others
    when a task is cancelled; with `--whole-sweeps` everywhere.
    """
    whole = config.getoption("--whole-sweeps")
    out = [item for item in items if _is_same_with_psycopg(item) or (_repeats(item) and not whole)]
    config.hook.pytest_deselected(items=out)
    left_out = set(out)
    items[:] = [item for item in items if item not in left_out]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what depends on the driver of PostgreSQL with psycopg too."""
    path = metafunc.definition.path
    if path.parent.name == "contract" or path.stem in WITH_PSYCOPG:
        metafunc.parametrize(
            "postgresql_driver", ["asyncpg", "psycopg"], indirect=True, scope="session"
        )


WITH_PSYCOPG = frozenset(
    f"test_{name}"
    for name in (
        "abandoned_elsewhere abandoned_queries cancellation cancellation_storm engine"
        " event_loops failed_clean_up garbage kept_connections leaks loops_without_dispose"
        " outage own_writes pgbouncer positions random_walks recovery_conflicts"
        " replicas_cancelled retries sandbox server_faults servers_that_only_read shutdown"
        " streams_and_release unit_of_work wrong_settings"
    ).split()
)
"""The files beside the contract whose tests depend on the driver."""


def _is_same_with_psycopg(item: pytest.Item) -> bool:
    """Whether a test has nothing to do with the driver of PostgreSQL.

    No driver knows of a framework, so that the contract on one of them is enough.
    """
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return False
    chosen = dict(item.callspec.params)
    if chosen.pop("postgresql_driver", "asyncpg") == "asyncpg":
        return False
    if item.get_closest_marker("asyncpg") is not None:
        return True
    framework = getattr(chosen.get("framework"), "name", "asgi")
    if framework != "asgi" or re.search("fastapi|litestar|starlette", item.path.stem):
        return True
    used = set(item.fixturenames) - {"postgresql_driver"}
    return "postgresql" not in re.findall(r"[a-z]+", f"{[*chosen.values()]} {used}")


def _repeats(item: pytest.Item) -> bool:
    if item.get_closest_marker("sweep") is None or not isinstance(item, pytest.Function):
        return False
    chosen = set(map(str, item.callspec.params.values()))
    return bool(chosen & {"mysql", "psycopg", "sqlite"}) and "task" not in chosen


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


@pytest.fixture(scope="session", autouse=True)
def postgresql_driver(request: pytest.FixtureRequest) -> Iterator[str]:
    """The driver with which PostgreSQL is used; see `pytest_generate_tests`."""
    driver: str = getattr(request, "param", "asyncpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(servers.DRIVERS, "postgresql", f"postgresql+{driver}")
        yield driver


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


@pytest.fixture(scope="session")
def postgresql_cluster() -> Iterator[clusters.Cluster]:
    """A PostgreSQL primary with a prompt and a late standby; a test may hold these back."""
    with clusters.postgresql() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def mysql_cluster() -> Iterator[clusters.Cluster]:
    """A MariaDB primary with a late replica."""
    with clusters.mariadb() as cluster:
        yield cluster


@pytest.fixture
def postgresql_urls(postgresql_cluster: clusters.Cluster) -> Iterator[clusters.Urls]:
    """An empty database on each server of the PostgreSQL cluster."""
    with postgresql_cluster.fresh_database() as urls:
        yield urls


@pytest.fixture
def mysql_urls(mysql_cluster: clusters.Cluster) -> Iterator[clusters.Urls]:
    """An empty database on each server of the MariaDB cluster."""
    with mysql_cluster.fresh_database() as urls:
        yield urls


@pytest.fixture(params=["postgresql", "mysql"])
def cluster(request: pytest.FixtureRequest) -> clusters.Cluster:
    """A primary with its replicas, of each kind in turn."""
    found: clusters.Cluster = request.getfixturevalue(f"{request.param}_cluster")
    return found


@pytest.fixture
def urls(cluster: clusters.Cluster) -> Iterator[clusters.Urls]:
    """An empty database on each server of the cluster."""
    with cluster.fresh_database() as urls:
        yield urls


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


@pytest.fixture(scope="module")
def module_postgresql_url(
    postgresql_server: servers.DatabaseServer, postgresql_driver: str
) -> Iterator[str]:
    """One database for this module, to save time: each test makes its tables anew."""
    with postgresql_server.fresh_database() as url:
        yield url


@pytest.fixture(scope="module")
def module_mysql_url(mysql_server: servers.DatabaseServer) -> Iterator[str]:
    """The same on MariaDB."""
    with mysql_server.fresh_database() as url:
        yield url


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of an SQLite file that does not exist yet."""
    return f"sqlite+aiosqlite:///{tmp_path}/test.db"


@pytest.fixture(params=["postgresql", "mysql"])
def server_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database, on each server in turn."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(params=["postgresql", "mysql", "sqlite"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database, on each of the three in turn."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url
