"""Alembic migrates the application's own `Database`, as `docs/how-to/alembic.md` shows it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import Row, assert_disconnected, outside, run

PAGE = (Path(__file__).parents[1] / "docs/how-to/alembic.md").read_text()
FILE = re.compile(r"^```python\n# (\S+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ALEMBIC = Path(sys.executable).with_name("alembic")

NOTE_COLUMN = """
    note: Mapped[str] = mapped_column(String(50), server_default="none")
"""
LINES_TABLE = """

class Line(Base):
    __tablename__ = "order_lines"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id", ondelete="CASCADE"))
"""


def sql(url: str, statement: str) -> list[Row]:
    """What another connection gets for this statement."""

    async def execute() -> list[Row]:
        async with outside(url) as connection:
            return await connection.execute(statement)

    return run(execute())


class Project:
    """A folder with the files of the page, in which Alembic runs."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.environment = os.environ | {"DATABASE_URL": url}

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run Alembic."""
        return subprocess.run(
            [ALEMBIC, *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def alembic(self, *arguments: str) -> str:
        """Run Alembic, which is to succeed, and return what it printed."""
        done = self.run(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def add_to_tables(self, code: str) -> None:
        """Add to the end of the last class."""
        with (self.folder / "tables.py").open("a") as file:
            file.write(code)


@pytest.fixture
def project(new_folder: Path, database_url: str) -> Project:
    """The project of the page, on a database of its own."""
    return Project(new_folder, database_url)


@pytest.fixture
def new_folder(folder_of_the_page: Path, tmp_path: Path) -> Path:
    """A copy of it, for one test."""
    return shutil.copytree(folder_of_the_page, tmp_path / "project")


@pytest.fixture(scope="module")
def folder_of_the_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page makes before the first migration, which needs no database yet."""
    folder = tmp_path_factory.mktemp("alembic") / "project"
    folder.mkdir()
    Project(folder, "sqlite://").alembic("init", "--template", "async", "migrations")
    files = dict(FILE.findall(PAGE))
    assert set(files) == {"database.py", "tables.py", "migrations/env.py"}
    for name, source in files.items():
        (folder / name).write_text(source)
    settings = folder / "alembic.ini"
    without_url = re.sub(r"^sqlalchemy.url = .*\n", "", settings.read_text(), flags=re.MULTILINE)
    assert without_url != settings.read_text()
    settings.write_text(without_url)
    return folder


def test_migrations_are_written_applied_and_taken_back(project: Project, database_url: str) -> None:
    project.alembic("revision", "--autogenerate", "-m", "orders")
    project.alembic("upgrade", "head")
    sql(database_url, "INSERT INTO orders (id, item) VALUES (1, 'tea')")

    project.add_to_tables(NOTE_COLUMN)
    assert project.run("check").returncode != 0
    project.alembic("revision", "--autogenerate", "-m", "note")
    project.alembic("upgrade", "head")
    project.alembic("check")
    assert sql(database_url, "SELECT id, item, note FROM orders") == [(1, "tea", "none")]

    project.alembic("downgrade", "-1")
    assert [len(row) for row in sql(database_url, "SELECT * FROM orders")] == [2]
    project.alembic("downgrade", "base")
    project.alembic("upgrade", "head")
    assert sql(database_url, "SELECT * FROM orders") == []
    run(assert_disconnected(database_url))


def test_a_database_of_create_tables_is_taken_over(project: Project) -> None:
    project.alembic("revision", "--autogenerate", "-m", "orders")
    subprocess.run(
        [ALEMBIC.with_name("asgi-db"), "create-tables", "tables:Base"],
        cwd=project.folder,
        env=project.environment,
        check=True,
    )
    project.alembic("stamp", "head")
    project.alembic("upgrade", "head")
    project.alembic("check")


def test_the_sql_of_a_migration_is_printed_without_a_connection(
    project: Project, database_url: str
) -> None:
    project.alembic("revision", "--autogenerate", "-m", "orders")
    assert "CREATE TABLE orders" in project.alembic("upgrade", "head", "--sql")
    run(assert_disconnected(database_url))


@pytest.mark.parametrize("backend", ["postgresql", "sqlite"])
def test_a_migration_that_fails_leaves_nothing_behind(
    request: pytest.FixtureRequest, new_folder: Path, backend: str
) -> None:
    url: str = request.getfixturevalue(f"{backend}_url")
    project = Project(new_folder, url)
    project.alembic("revision", "--autogenerate", "-m", "orders")
    (migration,) = (project.folder / "migrations/versions").glob("*.py")
    source = migration.read_text().replace(
        "def downgrade()", "    op.execute('nonsense')\n\n\ndef downgrade()"
    )
    migration.write_text(source)
    assert project.run("upgrade", "head").returncode != 0
    migration.write_text(source.replace("    op.execute('nonsense')\n", ""))
    project.alembic("upgrade", "head")
    assert sql(url, "SELECT * FROM orders") == []


def test_on_sqlite_the_rows_that_refer_to_a_changed_table_stay(
    new_folder: Path, sqlite_url: str
) -> None:
    """SQLite makes the table anew: to drop the old one would delete what refers to it."""
    project = Project(new_folder, sqlite_url)
    project.add_to_tables("\nfrom sqlalchemy import ForeignKey\n" + LINES_TABLE)
    project.alembic("revision", "--autogenerate", "-m", "orders")
    project.alembic("upgrade", "head")
    sql(sqlite_url, "INSERT INTO orders (id, item) VALUES (1, 'tea')")
    sql(sqlite_url, "INSERT INTO order_lines (id, order_id) VALUES (7, 1)")

    tables = project.folder / "tables.py"
    tables.write_text(
        tables.read_text().replace(
            "mapped_column(String(100))", "mapped_column(String(100), unique=True)"
        )
    )
    project.alembic("revision", "--autogenerate", "-m", "unique")
    project.alembic("upgrade", "head")
    assert sql(sqlite_url, "SELECT id, order_id FROM order_lines") == [(7, 1)]
    project.alembic("downgrade", "-1")
    assert sql(sqlite_url, "SELECT id, order_id FROM order_lines") == [(7, 1)]
