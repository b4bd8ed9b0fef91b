"""The differences between SQLAlchemy 2.0 and 2.1 are those of `asgi_db/sqlalchemy_versions.py`.

Each test breaks when its difference moves to another version. The lowest versions of all packages
are those with which `make lowest` runs.
"""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_connection
from sqlalchemy.orm import Session
from sqlalchemy.util import concurrency

from asgi_db import Database
from tests.internals import NEW_OPERATIONS, OPERATIONS, driver_of, has_begun
from tests.versions import IS_SQLALCHEMY_2_0

FOLDER = Path(__file__).parent
PROJECT = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text("utf-8"))["project"]
REQUIREMENTS = {
    requirement.name: requirement.specifier
    for each in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for requirement in map(Requirement, each)
}


def test_the_module_is_needed_as_long_as_2_0_is_supported() -> None:
    assert "2.0.99" in REQUIREMENTS["sqlalchemy"] and "2.1.0" in REQUIREMENTS["sqlalchemy"]


def test_the_lowest_versions_that_are_tested_are_the_lowest_that_are_allowed() -> None:
    lines = (FOLDER / "constraints" / "lowest.txt").read_text("utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    for name in tested.keys() & REQUIREMENTS.keys():
        [lowest] = REQUIREMENTS[name]
        assert (lowest.operator, Version(lowest.version)) == (">=", Version(tested[name]))
    assert tested.keys() - REQUIREMENTS.keys() == {"greenlet", "httpx"}


def test_the_function_that_awaits_in_a_greenlet_has_another_name() -> None:
    assert hasattr(concurrency, "await_") is not IS_SQLALCHEMY_2_0


def test_sessions_have_more_methods_in_2_1() -> None:
    assert set(NEW_OPERATIONS) == (set() if IS_SQLALCHEMY_2_0 else {"delete_all", "merge_all"})
    assert set(NEW_OPERATIONS) <= set(OPERATIONS)
    assert all(hasattr(Session, name) for name in OPERATIONS)


def test_only_2_0_marks_a_transaction_of_asyncpg_as_begun() -> None:
    assert ("_started" in AsyncAdapt_asyncpg_connection.__slots__) is IS_SQLALCHEMY_2_0
    assert "_transaction" in AsyncAdapt_asyncpg_connection.__slots__


async def test_a_transaction_that_could_not_begin_is_begun_the_next_time(
    postgresql_url: str,
) -> None:
    async with Database(postgresql_url) as database, database.engine.connect() as connection:
        raw = await connection.get_raw_connection()
        driver: Any = raw.driver_connection
        adapted = raw.dbapi_connection
        await driver.execute("BEGIN")
        with pytest.raises(Exception, match="manually started transaction"):
            await connection.exec_driver_sql("SELECT 1")
        assert not has_begun(adapted)
        await driver.execute("ROLLBACK")
        await connection.run_sync(lambda _: driver_of(connection.dialect).begin_now(raw))
        assert has_begun(adapted) and driver.is_in_transaction()
