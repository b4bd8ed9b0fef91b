"""The pytest plugin: a database for each worker, and a sandbox for each test.

It does nothing before it is told where the database is:

    [tool.pytest.ini_options]
    asgi_db_url = "postgresql://app@localhost/shop"  # the tests get shop_test, or shop_test_gw0, …

pytest loads this package in every project whose environment has it, so it imports nothing of
asgi-db before that is needed.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from asgi_db import Database
    from asgi_db.testing import Sandbox

__all__ = ["asgi_db_database", "sandbox"]

_URL = "asgi_db_url"
_ENVIRONMENT = "DATABASE_URL"
_key = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the setting, as an option and in the configuration file."""
    what = "URL of the database beside which the tests get one of their own"
    parser.getgroup("asgi-db").addoption("--asgi-db-url", metavar="URL", help=what)
    parser.addini(_URL, what)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> Generator[None]:
    """Point DATABASE_URL to the tests' database, before the application is first imported."""
    base = early_config.known_args_namespace.asgi_db_url or early_config.getini(_URL)
    if base:
        from asgi_db.testing import test_database_url

        url = test_database_url(base, worker=os.environ.get("PYTEST_XDIST_WORKER"))
        os.environ[_ENVIRONMENT] = url.render_as_string(hide_password=False)
        early_config.stash[_key] = os.environ[_ENVIRONMENT]
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
def asgi_db_database() -> Database:
    """The `Database` of the application under test, which a project defines in its conftest.py."""
    raise pytest.UsageError(
        "The fixture `sandbox` has to know the Database of your application. Put into conftest.py:"
        '\n\n    @pytest.fixture(scope="session")\n    def asgi_db_database():\n'
        "        return database  # from your application"
    )


@pytest.fixture
def sandbox(asgi_db_database: Database) -> Iterator[Sandbox]:
    """A sandbox around the test: everything written in it is rolled back."""
    with asgi_db_database.sandbox() as sandbox:
        yield sandbox
