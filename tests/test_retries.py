"""What is kept of a request for another attempt, and when there is none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import insert, text

from asgi_db import (
    ConfigurationError,
    Database,
    DatabaseConflictError,
    DBSessionMiddleware,
    session_of,
    transactional,
)
from asgi_db.types import Message, Receive, Scope, Send
from tests.contract.client import call
from tests.internals import BODY_LIMIT
from tests.limits import set_limits
from tests.servers import outside
from tests.tables import Author, Base, authors

SERIALIZABLE = transactional(isolation="SERIALIZABLE", retries=2)


@pytest.fixture
async def database(postgresql_url: str) -> AsyncIterator[Database]:
    async with Database(postgresql_url) as database:
        await database.create_tables(Base.metadata)
        async with database.transaction() as session:
            session.add(Author(name="shared"))
        yield database


class Client:
    """Sends a body in pieces, and takes the answers."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = list(pieces)
        self.statuses: list[int] = []

    async def receive(self) -> Message:
        if not self._pieces:
            return {"type": "http.disconnect"}
        piece = self._pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(self._pieces)}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.statuses.append(message["status"])


class Loser:
    """An application that reads the body, and loses in all attempts but the third."""

    def __init__(self, url: str, *, hint: bool = False, started: bool = False) -> None:
        self.bodies: list[bytes] = []
        self._url = url
        self._hint = hint
        self._started = started

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert "mark" not in scope and "mark" not in scope["state"]
        scope["mark"] = scope["state"]["mark"] = "of an attempt"
        assert scope["state"]["own"] == "the application's"
        if self._hint:
            await send({"type": "http.response.early_hint", "links": []})
        body, more = b"", True
        while more:
            message = await receive()
            body += message["body"]
            more = message["more_body"]
        self.bodies.append(body)
        if self._started:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        session = session_of(scope)
        session.add(Author(name=f"attempt {session.attempt}"))
        await session.flush()
        if session.attempt < 3:
            async with outside(self._url) as other:
                await other.execute("UPDATE author SET name = name || '!' WHERE id = 1")
            await session.execute(text("UPDATE author SET name = 'ours' WHERE id = 1"))
        if not self._started:
            await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body"})


async def serve(database: Database, app: Any, client: Client, key: str = "db") -> None:
    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": "/orders",
        "headers": [],
        "state": {"own": "the application's"},
    }
    middleware = DBSessionMiddleware(app, database, mode=SERIALIZABLE, key=key)
    await middleware(scope, client.receive, client.send)


async def test_each_attempt_has_the_scope_and_the_body_as_they_came(
    database: Database, postgresql_url: str
) -> None:
    app, client = Loser(postgresql_url), Client(b"a", b"", b"bc")
    await serve(database, app, client)
    assert app.bodies == [b"abc"] * 3
    assert client.statuses == [201]
    assert await authors(postgresql_url) == ["attempt 3", "shared!!"]


async def refused(
    database: Database, app: Any, client: Client, caplog: pytest.LogCaptureFixture
) -> str:
    """Serve a request that loses once, and return why there was no other attempt."""
    try:
        await serve(database, app, client)
    except DatabaseConflictError as error:
        (note,) = [note for note in error.__notes__ if "POST /orders" in note]
        assert note in caplog.messages
    else:
        assert client.statuses == [503]
    (line,) = [line for line in caplog.messages if "will not be run again" in line]
    assert line.startswith("POST /orders: will not be run again after a conflict: ")
    return line.partition("conflict: ")[2]


async def test_a_body_that_is_too_large_to_be_kept_is_not_sent_again(
    database: Database, postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    app, client = Loser(postgresql_url), Client(b"a" * BODY_LIMIT, b"b")
    reason = await refused(database, app, client, caplog)
    assert reason.startswith(f"its body was not kept: it has more than {BODY_LIMIT} bytes")
    assert [len(body) for body in app.bodies] == [BODY_LIMIT + 1]


async def test_a_body_of_just_that_size_is_sent_again(
    database: Database, postgresql_url: str
) -> None:
    app, client = Loser(postgresql_url), Client(b"a" * (BODY_LIMIT - 1), b"b")
    await serve(database, app, client)
    assert [len(body) for body in app.bodies] == [BODY_LIMIT] * 3


async def test_a_response_that_has_begun_is_not_begun_again(
    database: Database, postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    app, client = Loser(postgresql_url, started=True), Client(b"a")
    assert await refused(database, app, client, caplog) == "its response has begun."
    assert client.statuses == [200]


async def test_an_early_hint_is_not_sent_twice(database: Database, postgresql_url: str) -> None:
    app, client = Loser(postgresql_url, hint=True), Client(b"a")
    await serve(database, app, client)
    assert app.bodies == [b"a"]
    assert client.statuses == [503]


async def test_what_another_database_was_used_for_is_not_done_twice(
    database: Database, postgresql_url: str, sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    loser = Loser(postgresql_url)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session_of(scope, key="other").add(Author(name="here too"))
        await loser(scope, receive, send)

    async with Database(sqlite_url) as other:
        await other.create_tables(Base.metadata)
        inner = DBSessionMiddleware(app, other, mode=transactional, key="other")
        reason = await refused(database, inner, Client(b""), caplog)
    assert reason == "it has used another database too."
    assert loser.bodies == [b""]


async def test_the_timeout_counts_for_all_attempts_together_also_if_their_commits_lose(
    database: Database, postgresql_url: str
) -> None:
    async with outside(postgresql_url) as connection:
        await connection.execute(
            "CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS"
            " $$BEGIN RAISE EXCEPTION 'lost' USING ERRCODE = '40001'; END$$"
        )
        await connection.execute(
            "CREATE CONSTRAINT TRIGGER loses AFTER INSERT ON author"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION lose()"
        )
    attempts: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = session_of(scope)
        attempts.append(session.attempt)
        session.add(Author(name="ada"))
        await session.flush()
        await asyncio.sleep(0.5)
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body"})

    mode = transactional(timeout=1, retries=9)
    exchange = await call(DBSessionMiddleware(app, database, mode=mode))
    assert exchange.status >= 500
    assert len(attempts) <= 3  # of half a second each
    assert await authors(postgresql_url) == ["shared"]


async def test_a_lock_that_is_not_to_be_had_at_begin_is_a_conflict_on_sqlite(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limits(monkeypatch, sqlite_busy=0.2)
    attempts: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = session_of(scope)
        attempts.append(session.attempt)
        if session.attempt == 2:
            await other.execute("ROLLBACK")
        await session.execute(insert(Author).values(name="ada"))
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body"})

    async with Database(sqlite_url) as database, outside(sqlite_url) as other:
        await database.create_tables(Base.metadata)
        await other.execute("BEGIN IMMEDIATE")
        middleware = DBSessionMiddleware(app, database, mode=transactional(retries=1))
        exchange = await call(middleware)
        assert (exchange.status, exchange.error) == (201, None)
        assert attempts == [1, 2]
        assert await authors(sqlite_url) == ["ada"]


async def test_a_dependency_comes_too_late_for_retries(database: Database) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session_of(scope, SERIALIZABLE)

    with pytest.raises(ConfigurationError, match="put the mode on the route"):
        await serve(database, app, Client(b""))


async def test_a_block_cannot_be_run_again(database: Database) -> None:
    with pytest.raises(ConfigurationError, match="a loop of your own"):
        async with database.transaction(SERIALIZABLE):
            raise AssertionError("it is not to be entered")


@pytest.mark.parametrize("retries", [-1, 1.5, "3"])
def test_a_number_that_is_none_is_refused(retries: Any) -> None:
    with pytest.raises(ValueError, match="retries=.* must be a whole number"):
        transactional(retries=retries)
