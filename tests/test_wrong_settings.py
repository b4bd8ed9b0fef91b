"""A setting that cannot work is no outage: nobody is told to try again, and nothing waits."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, event, make_url, text

from asgi_db import ConfigurationError, Database, DBSession, DBSessionMiddleware, transactional
from asgi_db.types import Message, Receive, Scope, Send
from tests.contract.apps import FRAMEWORKS
from tests.contract.client import call
from tests.contract.endpoints import Answer, Framework, Route, Setup
from tests.servers import sql

WRONG: dict[str, dict[str, Any]] = {
    "database": {"database": "missing"},
    "user": {"username": "nobody", "password": "s3cret"},
    "password": {"password": "s3cret"},
}


def wrong_url(url: str, what: str, tmp_path: Path) -> URL:
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql" and what == "password":
        return parsed.set(username="nobody_else")  # the server of the tests asks for no password
    if parsed.get_backend_name() != "sqlite":
        return parsed.set(**WRONG[what])
    (tmp_path / "file").write_text("not a database" * 100)
    name = "no/such/folder/test.db" if what == "database" else "file"
    return parsed.set(database=str(tmp_path / name))


everything = pytest.mark.parametrize("what", WRONG)
REMEDY = "CREATE DATABASE|pg_hba.conf|create it|file that SQLite has made"


@everything
async def test_the_startup_fails_at_once_under_wait_for(
    database_url: str, what: str, tmp_path: Path
) -> None:
    database = Database(wrong_url(database_url, what, tmp_path), wait_for=60)
    began = time.monotonic()
    with pytest.raises(ConfigurationError, match=REMEDY) as caught:
        await database.start()
    await database.dispose()
    assert time.monotonic() - began < 20
    assert "s3cret" not in str(caught.value)


@everything
@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda framework: framework.name)
async def test_a_request_gets_the_error_and_is_not_told_to_try_again(
    framework: Framework, database_url: str, what: str, tmp_path: Path
) -> None:
    async def read(session: DBSession) -> Answer:
        await session.execute(text("SELECT 1"))
        return Answer()

    async with Database(wrong_url(database_url, what, tmp_path)) as database:
        app = framework.app(Setup(database, [Route("/", read, transactional)], {}))
        exchange = await call(app)
    assert exchange.status == 500
    assert b"s3cret" not in exchange.body
    if framework.reraises:
        assert exchange.was_caused_by(ConfigurationError)


@everything
async def test_the_server_is_told_why_the_startup_failed(
    database_url: str, what: str, tmp_path: Path
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("the application was started")

    database = Database(wrong_url(database_url, what, tmp_path), wait_for=60)
    sent = list[Message]()

    async def receive() -> Message:
        return {"type": "lifespan.startup"}

    async def send(message: Message) -> None:
        sent.append(message)

    async with asyncio.timeout(20):
        with pytest.raises(ConfigurationError):
            await DBSessionMiddleware(app, database)({"type": "lifespan"}, receive, send)
    (message,) = sent
    assert message["type"] == "lifespan.startup.failed"
    assert re.search(REMEDY, message["message"])


async def test_a_database_that_is_created_later_is_found(postgresql_url: str) -> None:
    name = "made_later"
    async with Database(make_url(postgresql_url).set(database=name)) as database:
        with pytest.raises(ConfigurationError, match="CREATE DATABASE"):
            await database.ping()
        sql(postgresql_url, f"CREATE DATABASE {name}")
        try:
            await database.ping()
            await database.dispose()
        finally:
            sql(postgresql_url, f"DROP DATABASE {name}")


async def test_a_bug_in_a_connect_listener_fails_the_startup_at_once(database_url: str) -> None:
    def send_nonsense(connection: Any, _: object) -> None:
        connection.cursor().execute("SET no_such_thing TO 'nonsense'")

    database = Database(database_url, wait_for=60)
    event.listen(database.engine.sync_engine, "connect", send_nonsense)
    async with asyncio.timeout(20):
        with pytest.raises(Exception, match="no_such_thing|syntax"):
            await database.start()
    await database.dispose()


async def test_a_locked_file_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "locked.db"
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        database = Database(f"sqlite:///{file}?timeout=0.05", wait_for=60)
        starting = asyncio.ensure_future(database.start())
        await asyncio.wait((starting,), timeout=0.5)
        assert not starting.done()
        other.execute("COMMIT")
        async with asyncio.timeout(20):
            await starting
        await database.dispose()


async def test_a_server_setting_that_does_not_exist_is_one(postgresql_url: str) -> None:
    options = {"connect_args": {"server_settings": {"no_such_setting": "1"}}}
    async with Database(postgresql_url, engine_options=options) as database:
        with pytest.raises(ConfigurationError, match="connect_args"):
            await asyncio.wait_for(database.ping(), 20)
