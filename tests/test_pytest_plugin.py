"""The pytest plugin, and the databases that it makes, as a project uses them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError

from asgi_db import ConfigurationError, Database, create_database_url
from asgi_db.testing import temporary_database, test_database_url
from tests.nested import WITHOUT_SLOW_PLUGINS
from tests.servers import DatabaseServer, outside, run
from tests.versions import IS_SQLALCHEMY_2_0

EXAMPLE = Path(__file__).parents[1] / "examples" / "tested_app"

WITH_ANYIO = ["-p", "no:asyncio", "-o", "anyio_mode=auto"]
WITH_PYTEST_ASYNCIO = [
    "-o",
    "anyio_mode=strict",
    "-o",
    "asyncio_mode=auto",
    "-o",
    "asyncio_default_fixture_loop_scope=function",
]


def run_pytest(folder: Path, *arguments: str) -> str:
    """Run the tests of a project in a process of their own; return what they print."""
    # This suite may be run by a worker, which the project's own tests are not.
    outside = {key: value for key, value in os.environ.items() if "PYTEST_XDIST" not in key}
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            *WITHOUT_SLOW_PLUGINS,
            *arguments,
        ],
        cwd=folder,
        env={**outside, "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_ADDOPTS": "-W error"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout + done.stderr


def databases(url: str) -> set[str]:
    """The databases on a server that are named after this one, itself included."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        folder = Path(str(parsed.database)).parent
        return {path.name for path in folder.iterdir()}

    async def listed() -> set[str]:
        sql = {
            "postgresql": "SELECT datname FROM pg_database",
            "mysql": "SELECT schema_name FROM information_schema.schemata",
        }[parsed.get_backend_name()]
        async with outside(url) as connection:
            rows = await connection.execute(sql)
        return {name for (name,) in rows if name.startswith(str(parsed.database))}

    return run(listed())


# -- the example -------------------------------------------------------------------------------


def test_the_example_is_tested_in_sandboxes(database_url: str) -> None:
    assert_the_example_passes(database_url, WITH_ANYIO)


def test_the_example_is_tested_with_pytest_asyncio_too(postgresql_url: str) -> None:
    assert_the_example_passes(postgresql_url, WITH_PYTEST_ASYNCIO)


def assert_the_example_passes(database_url: str, style: list[str]) -> None:
    before = databases(database_url)
    output = run_pytest(EXAMPLE, f"--asgi-db-url={database_url}", *style)
    assert "5 passed" in output, output
    assert databases(database_url) == before


# -- a database for each worker ----------------------------------------------------------------

PROJECT = """
import os
import anyio
from sqlalchemy import text
from asgi_db import Database

BEFORE = os.environ["DATABASE_URL"]  # where an application reads it, when it is imported

def test_the_database_is_this_workers(asgi_db_url):
    async def ask():
        async with Database() as database, database.session() as session:
            assert await session.scalar(text("SELECT 1")) == 1
    worker = os.environ["PYTEST_XDIST_WORKER"]
    assert BEFORE == os.environ["DATABASE_URL"] == asgi_db_url
    assert f"_test_{worker}" in asgi_db_url
    anyio.run(ask)

def test_another(): pass
"""


def test_each_worker_has_a_database_of_its_own(database_url: str, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "test_project.py").write_text(PROJECT)
    before = databases(database_url)
    output = run_pytest(folder, f"--asgi-db-url={database_url}", "-n1", "-p", "no:asyncio")
    assert "2 passed" in output, output
    assert databases(database_url) == before


def test_the_url_may_stand_in_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nasgi_db_url = sqlite:///shop.db\n")
    (tmp_path / "test_url.py").write_text(
        "import os\n"
        "def test_url(): assert os.environ['DATABASE_URL'] == 'sqlite+aiosqlite:///shop_test.db'\n"
    )
    output = run_pytest(tmp_path, "-p", "no:asyncio")
    assert "1 passed" in output, output


def test_without_a_url_the_plugin_does_nothing_and_loads_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text(
        "import os, sys\n"
        "def test_nothing(request):\n"
        "    assert not {'sqlalchemy', 'asgi_db.database'} & set(sys.modules)\n"
        "    assert 'asgi_db_url' not in request.fixturenames\n"
    )
    output = run_pytest(tmp_path, "-p", "no:asyncio")
    assert "1 passed" in output, output


def test_the_sandbox_asks_for_the_database_of_the_application(tmp_path: Path) -> None:
    (tmp_path / "test_sandbox.py").write_text("def test_sandbox(sandbox): pass\n")
    output = run_pytest(tmp_path, "-p", "no:asyncio")
    assert "has to know the Database of your application" in output


def test_a_url_that_cannot_be_used_is_an_error_without_the_password(tmp_path: Path) -> None:
    output = run_pytest(tmp_path, "--asgi-db-url=oracle://app:secret@localhost/shop")
    assert 'unknown database "oracle"' in output
    assert "secret" not in output


# -- an application with settings of its own ---------------------------------------------------

SHOP = """
import os
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from asgi_db import Database

class Base(DeclarativeBase): pass

class Thing(Base):
    __tablename__ = "thing"
    id: Mapped[int] = mapped_column(primary_key=True)

database = Database(os.environ.get("SHOP_DATABASE_URL", {url!r}))
number = 1
"""

TEST_SHOP = """
import asyncio, os
import pytest
from sqlalchemy import select
from shop import Base, Thing, database

@pytest.fixture(scope="session")
def asgi_db_database(asgi_db_database):
    async def create_tables():
        async with asgi_db_database:
            await asgi_db_database.create_tables(Base.metadata)
    asyncio.run(create_tables())
    return asgi_db_database

@pytest.mark.parametrize("number", [1, 2])
def test_shop(sandbox, capture_statements, number, asgi_db_url):
    async def use():
        async with database:
            async with database.transaction() as session:
                session.add(Thing())
            with capture_statements() as statements:
                async with database.session() as session:
                    assert len((await session.scalars(select(Thing))).all()) == 1
        assert len(statements) == 1 and not statements.repeated
    asyncio.run(use())
    assert "_test" in database.url.database
    assert database.url.render_as_string(hide_password=False) == asgi_db_url
"""


def shop(folder: Path, url: str, *settings: str) -> None:
    """Write a project whose application has a variable of its own for the URL."""
    (folder / "shop.py").write_text(SHOP.format(url=url))
    (folder / "test_shop.py").write_text(TEST_SHOP)
    lines = ["[pytest]", "pythonpath = .", *settings]
    (folder / "pytest.ini").write_text("\n".join(lines))


NAMED = "asgi_db_env = SHOP_DATABASE_URL"
PLACE = "asgi_db_database = shop:database"


def test_the_variable_of_the_application_may_be_named(
    tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop(tmp_path, "sqlite:///wrong.db", NAMED, PLACE)
    monkeypatch.setenv("SHOP_DATABASE_URL", database_url)
    before = databases(database_url)
    output = run_pytest(tmp_path, "-p", "no:asyncio")
    assert "2 passed" in output, output
    assert databases(database_url) == before
    monkeypatch.delenv("SHOP_DATABASE_URL")
    output = run_pytest(tmp_path, "-p", "no:asyncio", f"--asgi-db-url={database_url}")
    assert "2 passed" in output, output
    assert databases(database_url) == before


def test_a_database_made_at_import_with_a_url_of_its_own_is_redirected(
    tmp_path: Path, database_url: str
) -> None:
    shop(tmp_path, "sqlite:///real.db", f"asgi_db_url = {database_url}", PLACE)
    before = databases(database_url)
    output = run_pytest(tmp_path, "-p", "no:asyncio")
    assert "2 passed" in output, output
    assert databases(database_url) == before
    assert not (tmp_path / "real.db").exists()


READING = """
import asyncio
from shop import database

def test_nothing_is_read_from_a_replica(asgi_db_database):
    async def read():
        async with database, database.session(read_only) as session:
            assert await session.scalar(text("SELECT 1")) == 1
    assert database.stats().replicas == ()
    asyncio.run(read())
"""


@pytest.mark.parametrize(
    ("database", "named"),
    [
        ("Database()", None),
        ("Database(os.environ['SHOP_DATABASE_URL'])", NAMED),
        ("Database(os.environ['SHOP_DATABASE_URL'], replicas=replica_urls)", NAMED),
        ("Database.from_env()", None),
        ("Database({url!r}, replicas=[{url!r}])", None),
    ],
)
def test_no_test_reads_from_a_replica_of_another_database(
    tmp_path: Path,
    postgresql_url: str,
    monkeypatch: pytest.MonkeyPatch,
    database: str,
    named: str | None,
) -> None:
    nowhere = "postgresql+asyncpg://nowhere.example.org/shop"
    monkeypatch.setenv("DATABASE_REPLICA_URLS", f"{nowhere} {nowhere}2")
    imports = "import os\nfrom sqlalchemy import text\nfrom asgi_db import Database, read_only\n"
    (tmp_path / "shop.py").write_text(
        f"{imports}replica_urls = [{nowhere!r}]\ndatabase = {database.format(url=nowhere)}\n"
    )
    (tmp_path / "test_shop.py").write_text(imports + READING)
    settings = ["[pytest]", "pythonpath = .", f"asgi_db_url = {postgresql_url}", PLACE]
    (tmp_path / "pytest.ini").write_text("\n".join([*settings, *([named] if named else [])]))
    output = run_pytest(tmp_path, "-p", "no:asyncio")
    assert "1 passed" in output, output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([NAMED], "asgi_db_env names SHOP_DATABASE_URL, which is not set"),
        (["asgi_db_database = shop:nothing"], "'shop:nothing' cannot be imported"),
        (["asgi_db_database = nothing:database"], "'nothing:database' cannot be imported"),
        (["asgi_db_database = shop"], "'shop' is a module: it takes a Database"),
        (["asgi_db_database = shop:number"], "'shop:number' is a int: it takes a Database"),
    ],
)
def test_a_setting_that_cannot_work_is_told(
    tmp_path: Path, settings: list[str], message: str
) -> None:
    shop(tmp_path, "sqlite:///real.db", *settings)
    (tmp_path / "test_shop.py").write_text("def test_shop(sandbox): pass\n")
    assert message in run_pytest(tmp_path, "-p", "no:asyncio")


N_PLUS_ONE = """
import asyncio
import pytest
from sqlalchemy import text
from asgi_db import Database

database = Database("sqlite://")

@pytest.fixture(scope="session")
def asgi_db_database(): return database

def test_n_plus_one(capture_statements):
    async def use():
        async with database, database.session() as session:
            for number in range(3):
                await session.execute(text("SELECT 'secret' WHERE 1 = :number"), {"number": 7531})
    with capture_statements() as statements:
        asyncio.run(use())
    assert not statements.repeated
"""


def test_a_test_that_fails_shows_what_it_has_captured_without_values(tmp_path: Path) -> None:
    (tmp_path / "test_shop.py").write_text(N_PLUS_ONE)
    output = run_pytest(tmp_path, "-p", "no:asyncio", "--tb=line")
    assert "1 failed" in output
    assert "Captured statements" in output
    assert "3 × SELECT ? WHERE ? = ?" in output
    assert "7531" not in output and "secret" not in output


# -- databases for tests -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "worker", "database"),
    [
        ("postgresql://localhost/shop", None, "shop_test"),
        ("postgresql://localhost/shop", "gw3", "shop_test_gw3"),
        ("mysql://localhost/shop_test", "gw3", "shop_test_gw3"),
        ("sqlite:////srv/shop.db", "gw3", "/srv/shop_test_gw3.db"),
        ("sqlite://", "gw3", ":memory:"),
    ],
)
def test_a_database_for_tests_is_named_after_the_real_one_and_the_worker(
    url: str, worker: str | None, database: str
) -> None:
    assert test_database_url(url, worker=worker).database == database


def test_without_a_worker_it_is_the_name_that_create_database_url_gives() -> None:
    there = create_database_url("postgresql", database="shop", unittest=True)
    assert test_database_url("postgresql://localhost/shop") == there


def test_a_name_that_would_be_too_long_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="too long"):
        test_database_url(f"postgresql://localhost/{'a' * 56}", worker="gw3")


def test_a_temporary_database_is_empty_and_gone_afterwards(database_url: str) -> None:
    url = test_database_url(database_url)

    async def use(sql: str) -> None:
        async with outside(url.render_as_string(hide_password=False)) as connection:
            await connection.execute(sql)

    before = databases(database_url)
    for _ in range(2):
        with temporary_database(url):
            run(use("CREATE TABLE thing (id INT)"))
            with temporary_database(url):  # what is left from a run that was killed
                run(use("CREATE TABLE thing (id INT)"))
    assert databases(database_url) == before


def test_a_database_whose_name_is_not_for_tests_is_never_dropped(
    postgresql_server: DatabaseServer,
) -> None:
    with postgresql_server.fresh_database() as url:
        shop = make_url(url).set(database="shop")
        with pytest.raises(ConfigurationError, match="let it end with _test"):
            with temporary_database(shop):
                pass


def test_a_folder_whose_name_is_for_tests_says_nothing_about_the_files_in_it(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "load_test_data"
    folder.mkdir()
    shop = folder / "shop.db"
    shop.write_bytes(b"real data")
    for url in (f"sqlite:///{shop}", f"sqlite:///file:{shop}?uri=true"):
        with pytest.raises(ConfigurationError, match="'shop' would be dropped"):
            with temporary_database(url):
                pass
    assert shop.read_bytes() == b"real data"


def test_a_temporary_database_may_be_an_sqlite_uri(tmp_path: Path) -> None:
    space = "%20" if IS_SQLALCHEMY_2_0 else "%2520"  # 2.0 takes the name as it is
    url = test_database_url(f"sqlite:///file:{tmp_path}/the{space}shop.db?uri=true")

    async def create_table() -> None:
        async with Database(url) as database, database.transaction() as session:
            await session.execute(text("CREATE TABLE thing (id INT)"))

    for _ in range(2):
        with temporary_database(url):
            run(create_table())
            assert (tmp_path / "the shop_test.db").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_refuses_says_so() -> None:
    with pytest.raises((DBAPIError, OSError)):
        with temporary_database("postgresql://nobody@127.0.0.1:1/shop_test"):
            pass
