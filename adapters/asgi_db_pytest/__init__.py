"""The pytest plugin: a database for each worker, and a sandbox for each test.

It does nothing before it is told where the database is:

    [tool.pytest.ini_options]
    asgi_db_url = "postgresql://app@localhost/shop"  # the tests get shop_test, or shop_test_gw0, …
    asgi_db_env = "SHOP_DATABASE_URL"  # the variable in which the application finds it
    asgi_db_database = "shop.main:database"  # the application's Database, for the fixtures

pytest loads this package in every project whose environment has it, so it imports nothing of
asgi-db before that is needed.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from asgi_db import Database
    from asgi_db.testing import CapturedStatements, Sandbox

__all__ = ["Capture", "asgi_db_database", "capture_statements", "sandbox"]

_URL = "asgi_db_url"
_ENVIRONMENT = "asgi_db_env"
_DATABASE = "asgi_db_database"
_DEFAULT_ENVIRONMENT = "DATABASE_URL"
_REPLICAS = "DATABASE_REPLICA_URLS"
_key = pytest.StashKey[str]()
_captured = pytest.StashKey[list[object]]()


class Capture(Protocol):
    """The type of the fixture `capture_statements`."""

    def __call__(self) -> AbstractContextManager[CapturedStatements]:
        """Capture the statements that are sent in the block."""
        ...


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the settings, in the configuration file and one of them as an option."""
    what = "URL of the database beside which the tests get one of their own"
    parser.getgroup("asgi-db").addoption("--asgi-db-url", metavar="URL", help=what)
    parser.addini(_URL, what)
    parser.addini(
        _ENVIRONMENT,
        "environment variable in which the application finds the URL of its database; DATABASE_URL"
        " by default. If it is set, asgi_db_url may be left out",
    )
    parser.addini(_DATABASE, "where the application's Database is: 'package.module:name'")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> Generator[None]:
    """Point the variable to the tests' database, before the application is first imported."""
    named = early_config.getini(_ENVIRONMENT)
    base = early_config.known_args_namespace.asgi_db_url or early_config.getini(_URL)
    if named and not base:
        base = os.environ.get(named)
        if not base:
            raise pytest.UsageError(
                f"{_ENVIRONMENT} names {named}, which is not set: set it, or {_URL}, or use"
                " --asgi-db-url."
            )
    if base:
        from asgi_db.testing import test_database_url

        url = test_database_url(base, worker=os.environ.get("PYTEST_XDIST_WORKER"))
        rendered = url.render_as_string(hide_password=False)
        os.environ[named or _DEFAULT_ENVIRONMENT] = early_config.stash[_key] = rendered
        os.environ.pop(_REPLICAS, None)  # They do not have the tests' database.
        early_config.pluginmanager.register(WithDatabase())
    return (yield)


class WithDatabase:
    """The fixtures that exist once the URL of the database is set."""

    @pytest.fixture(scope="session", autouse=True)
    @staticmethod
    def asgi_db_url(pytestconfig: pytest.Config) -> Iterator[str]:
        """The URL of this worker's database, which is created for the session and then dropped."""
        from asgi_db.testing import temporary_database

        url = pytestconfig.stash[_key]
        with temporary_database(url):
            yield url


@pytest.fixture(scope="session")
def asgi_db_database(request: pytest.FixtureRequest) -> Database[Any]:
    """The `Database` of the application under test, on the database of the tests.

    It is the one that `asgi_db_database` in the configuration names, or that a project returns
    from a fixture of this name in its conftest.py.
    """
    place = request.config.getini(_DATABASE)
    if not place:
        raise pytest.UsageError(
            "This fixture has to know the Database of your application. Name it in the"
            f' configuration of pytest, {_DATABASE} = "package.module:name", or put into'
            ' conftest.py:\n\n    @pytest.fixture(scope="session")\n    def asgi_db_database():\n'
            "        return database  # from your application"
        )
    database = _found(place)
    if _key in request.config.stash:
        from asgi_db.settings import parse_database_url

        url = parse_database_url(request.config.stash[_key])
        # It was made with a URL, or replicas, of its own when it was imported.
        if database.url != url or database.stats().replicas:
            database.redirect(url)
    return database


def _found(place: str) -> Database[Any]:
    import pkgutil

    from asgi_db import Database

    try:
        found = pkgutil.resolve_name(place)
    except (ValueError, ImportError, AttributeError) as error:
        problem = f"{_DATABASE} = {place!r} cannot be imported ({error})"
        raise pytest.UsageError(f"{problem}: it takes 'package.module:name'.") from error
    if not isinstance(found, Database):
        raise pytest.UsageError(
            f"{_DATABASE} = {place!r} is a {type(found).__name__}: it takes a Database."
        )
    return found  # pyright: ignore[reportUnknownVariableType]


@pytest.fixture
def sandbox(asgi_db_database: Database) -> Iterator[Sandbox]:
    """A sandbox around the test: everything written in it is rolled back."""
    with asgi_db_database.sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def capture_statements(asgi_db_database: Database, request: pytest.FixtureRequest) -> Capture:
    """Captures the statements that are sent in a block; if the test fails they are shown.

        with capture_statements() as statements:
            client.get("/orders")

    `len(statements)` is their number, and `statements.repeated` has those of an N+1. BEGIN,
    COMMIT, ROLLBACK and savepoints are no statements.
    """
    shown = request.node.stash.setdefault(_captured, [])

    @contextmanager
    def capture() -> Generator[CapturedStatements]:
        with asgi_db_database.capture_statements() as statements:
            shown.append(statements)
            yield statements

    return capture


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what a test that has failed has captured."""
    report = yield
    if report.failed and call.when == "call":
        for statements in item.stash.get(_captured, list[object]()):
            report.sections.append(("Captured statements", str(statements)))
    return report
