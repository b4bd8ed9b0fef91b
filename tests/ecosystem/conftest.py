"""A database with heroes, which nobody is connected to at the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from asgi_db import Database
from tests.ecosystem.heroes import Base
from tests.ecosystem.page import GROUPS, Section, file_of, release
from tests.servers import assert_disconnected, run

_OTHERS = {each: Section(each).libraries for each in GROUPS if each != release()}
collect_ignore = [str(file_of(name)) for libraries in _OTHERS.values() for name in libraries]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that writes the page."""
    parser.addoption(
        "--write-page",
        action="store_true",
        help="write the versions that are installed, and the date, into docs/works-with.md",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Let the libraries call each other as they do: what is deprecated there is theirs to mend."""
    for category in "DeprecationWarning", "sqlalchemy.exc.SADeprecationWarning":
        config.addinivalue_line("filterwarnings", f"ignore::{category}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the page, once everything has passed."""
    config = session.config
    is_whole = exitstatus == pytest.ExitCode.OK and not hasattr(config, "workerinput")
    if is_whole and config.getoption("--write-page"):
        Section(release()).write()


@pytest.fixture(params=["postgresql", "sqlite"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database. MariaDB has no constraint that refuses a COMMIT."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """The application's database, as a module has it that is imported."""
    run(_create_tables(database_url))
    yield Database(database_url)
    run(assert_disconnected(database_url))


async def _create_tables(url: str) -> None:
    async with Database(url) as database:
        await database.create_tables(Base.metadata)
