"""Hooks outside requests, on sockets, and what goes wrong with them."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import pytest

from asgi_db import Database, DBSessionMiddleware, SessionExpiredError, transactional
from asgi_db.types import Receive, Scope, Send
from tests.sockets import websocket
from tests.tables import Author, Base, authors


@pytest.fixture
async def database(sqlite_url: str) -> Any:
    async with Database(sqlite_url) as database:
        await database.create_tables(Base.metadata)
        yield database


async def test_a_block_runs_its_hooks_when_it_has_committed(
    database: Database, sqlite_url: str
) -> None:
    lines: list[Any] = []

    async def look() -> None:
        lines.append(await authors(sqlite_url))

    async with database.transaction() as session:
        session.on_commit(lambda: lines.append("late"), when="after_response")
        session.on_commit(look)
        session.add(Author(name="a"))
    assert lines == [["a"], "late"]


async def test_a_block_that_raises_runs_its_hooks_for_rollback(database: Database) -> None:
    lines: list[str] = []
    with pytest.raises(LookupError):
        async with database.transaction() as session:
            session.on_commit(lambda: lines.append("never"))
            session.on_rollback(lambda: lines.append("undone"))
            session.add(Author(name="a"))
            raise LookupError
    assert lines == ["undone"]


async def test_a_block_that_raises_runs_what_waits_for_its_end_after_a_commit_by_hand(
    database: Database, sqlite_url: str
) -> None:
    lines: list[str] = []
    with pytest.raises(LookupError):
        async with database.session() as session:
            session.on_commit(lambda: lines.append("late"), when="after_response")
            session.add(Author(name="a"))
            await session.commit()
            assert lines == []
            raise LookupError
    assert lines == ["late"]
    assert await authors(sqlite_url) == ["a"]


async def test_the_error_of_a_hook_comes_out_of_the_block_and_the_commit_stands(
    database: Database, sqlite_url: str
) -> None:
    lines: list[str] = []

    def fail() -> None:
        raise LookupError("no mail today")

    with pytest.raises(LookupError, match="no mail today"):
        async with database.transaction() as session:
            session.on_commit(fail)
            session.on_commit(lambda: lines.append("the other"))
            session.add(Author(name="a"))
    assert lines == ["the other"]
    assert await authors(sqlite_url) == ["a"]


async def test_the_error_of_a_hook_for_rollback_masks_no_other(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ValueError("in the hook")

    with pytest.raises(LookupError):
        async with database.transaction() as session:
            session.on_rollback(fail)
            session.add(Author(name="a"))
            raise LookupError
    assert "in the hook" in caplog.text


async def test_a_hook_that_does_not_end_is_cut_off_some_time_after_the_cancellation(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("asgi_db.hooks.HOOKS_TIMEOUT", 0.1)
    begun = asyncio.Event()

    async def hang() -> None:
        begun.set()
        await asyncio.Event().wait()

    async def work() -> None:
        async with database.transaction() as session:
            session.on_commit(hang)
            session.add(Author(name="a"))

    task = asyncio.create_task(work())
    await begun.wait()
    task.cancel()
    await asyncio.wait((task,))
    assert task.cancelled()
    assert "a hook was cut off after COMMIT" in caplog.text


async def test_hooks_of_a_commit_by_hand_run_also_if_it_is_cancelled(database: Database) -> None:
    lines: list[str] = []
    async with database.session() as session:
        session.on_commit(lambda: lines.append("committed"))
        session.add(Author(name="a"))
        await session.flush()
        committing = asyncio.create_task(session.commit())
        await asyncio.sleep(0)
        committing.cancel()
        await asyncio.wait((committing,))
        assert committing.cancelled()
        assert lines == ["committed"]


async def test_each_message_of_a_socket_runs_its_own_hooks(database: Database) -> None:
    lines: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = scope["state"]["db"]
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            text = message["text"]
            session.add(Author(name=text))
            session.on_commit(functools.partial(lines.append, f"{text} is there"))
            was_told = functools.partial(lines.append, f"{text} was told")
            session.on_commit(was_told, when="after_response")
            await session.flush()
            lines.append(f"answer {text}")
            await send({"type": "websocket.send", "text": text})

    async with websocket(DBSessionMiddleware(app, database, mode=transactional)) as socket:
        for text in ("a", "b"):
            assert await socket.ask(text) == text
    assert lines == [
        line for text in "ab" for line in (f"answer {text}", f"{text} is there", f"{text} was told")
    ]


async def test_what_is_no_function_is_refused_with_the_remedy(database: Database) -> None:
    async def mail() -> None: ...

    async with database.session() as session:
        called: Any = mail()
        with pytest.raises(TypeError, match="leave out the brackets"):
            session.on_commit(called)
        called.close()
        when: Any = "later"
        with pytest.raises(ValueError, match="before_response, after_response"):
            session.on_commit(mail, when=when)


async def test_a_session_whose_block_is_over_takes_no_hooks(database: Database) -> None:
    async with database.session() as session:
        pass
    for add in (session.on_commit, session.on_rollback):
        with pytest.raises(SessionExpiredError, match="on_"):
            add(lambda: None)
