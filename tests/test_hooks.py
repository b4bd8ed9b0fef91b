"""Hooks outside requests, on sockets, and what goes wrong with them."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from asgi_db import Database, DBSession, DBSessionMiddleware, SessionExpiredError, transactional
from asgi_db.types import Receive, Scope, Send
from tests.limits import set_limits
from tests.pools import checked_out
from tests.sockets import websocket
from tests.tables import Author, Base, Child, Deferred, authors


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
    set_limits(monkeypatch, hooks=0.1)
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
    assert "a hook was cancelled after COMMIT" in caplog.text


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
        with pytest.raises(TypeError, match="leave out the parentheses"):
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


# -- which transaction they wait for -----------------------------------------------------------


@pytest.mark.parametrize("flushes", ["in the savepoint", "at its end"])
async def test_hooks_outlive_a_flush_that_fails_in_a_savepoint(
    database: Database, sqlite_url: str, flushes: str
) -> None:
    lines: list[str] = []
    async with database.transaction() as session:
        session.add(Author(name="a"))
        await session.flush()
        session.on_commit(lambda: lines.append("committed"))
        session.on_rollback(lambda: lines.append("undone"))
        with pytest.raises(IntegrityError):
            async with session.begin_nested():
                session.on_commit(lambda: lines.append("of the savepoint"))
                session.add(Author(name="a"))
                if flushes == "in the savepoint":
                    await session.flush()
    assert await authors(sqlite_url) == ["a"]
    assert lines == ["committed"]


async def test_hooks_for_commit_are_forgotten_by_a_rollback_after_release(
    database: Database,
) -> None:
    lines: list[str] = []
    async with database.transaction() as session:
        await session.execute(text("SELECT 1"))
        session.add(Author(name="order"))
        session.on_commit(lambda: lines.append("mail"))
        session.on_rollback(lambda: lines.append("undone"))
        await session.release()
        await session.rollback()
        assert lines == ["undone"]
    assert lines == ["undone"]


@pytest.mark.parametrize("let_go", ["close", "reset", "invalidate"])
async def test_hooks_are_forgotten_with_what_the_handler_lets_go(
    database: Database, sqlite_url: str, let_go: str
) -> None:
    lines: list[str] = []
    async with database.session() as session:
        session.add(Author(name="a"))
        await session.flush()
        session.on_commit(lambda: lines.append("mail for a"))
        await getattr(session, let_go)()
        session.add(Author(name="b"))
        session.on_commit(lambda: lines.append("mail for b"))
        await session.commit()
    assert await authors(sqlite_url) == ["b"]
    assert lines == ["mail for b"]


@pytest.mark.parametrize("how", ["by the block", "by hand"])
async def test_hooks_for_rollback_run_at_the_end_of_a_transaction_of_ones_own(
    database: Database, how: str
) -> None:
    lines: list[str] = []

    async def fail_in_a_block(session: DBSession) -> None:
        async with session.begin():
            await add_with_hook(session)
            raise LookupError

    async def add_with_hook(session: DBSession) -> None:
        session.on_rollback(lambda: lines.append("undone"))
        session.add(Author(name="a"))
        await session.flush()

    async with database.session() as session:
        if how == "by the block":
            with pytest.raises(LookupError):
                await fail_in_a_block(session)
        else:
            transaction = await session.begin()
            await add_with_hook(session)
            await transaction.rollback()
        assert lines == ["undone"]


async def test_a_hook_that_commits_does_not_answer_for_the_next_one(
    database: Database, sqlite_url: str
) -> None:
    lines: list[str] = []

    def fail() -> None:
        raise LookupError("no mail today")

    with pytest.raises(LookupError, match="no mail today"):
        async with database.session() as session:

            async def empty_outbox() -> None:
                session.add(Author(name="sent"))
                await session.commit()
                lines.append("done")

            session.on_commit(empty_outbox, robust=True)
            session.on_commit(fail)
            session.add(Author(name="a"))
            await session.commit()
    assert lines == ["done"]
    assert await authors(sqlite_url) == ["a", "sent"]


# -- hooks which use the session ---------------------------------------------------------------


async def test_a_hook_for_rollback_finds_the_session_rolled_back(database: Database) -> None:
    names: list[list[str]] = []
    with pytest.raises(LookupError):
        async with database.transaction() as session:

            async def look() -> None:
                names.append([*(await session.scalars(select(Author.name))).all()])

            session.add(Author(name="a"))
            await session.flush()
            session.on_rollback(look)
            raise LookupError
    assert names == [[]]
    assert checked_out(database) == 0


async def test_a_hook_for_rollback_commits_nothing_of_what_was_to_be_undone(
    database: Database, sqlite_url: str
) -> None:
    """`release()` has kept it, and it is in no transaction."""
    with pytest.raises(LookupError):
        async with database.transaction() as session:
            await session.execute(text("SELECT 1"))
            session.add(Author(name="order"))
            session.on_rollback(lambda: session.add(Author(name="audit")))
            await session.release()
            raise LookupError
    assert await authors(sqlite_url) == ["audit"]


async def test_a_hook_for_rollback_may_take_longer_than_a_rollback(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_limits(monkeypatch, cleanup=1)
    lines: list[str] = []

    async def take_long() -> None:
        await asyncio.sleep(1.5)
        lines.append("done")

    with pytest.raises(LookupError):
        async with database.transaction() as session:
            session.add(Author(name="a"))
            await session.flush()
            session.on_rollback(take_long)
            raise LookupError
    assert lines == ["done"]
    assert "ROLLBACK failed" not in caplog.text


async def test_a_hook_that_uses_the_session_and_fails_leaves_no_connection_behind(
    database: Database,
) -> None:
    with pytest.raises(LookupError, match="of the hook"):
        async with database.transaction() as session:

            async def read_and_fail() -> None:
                await session.scalars(select(Author))
                raise LookupError("of the hook")

            session.add(Author(name="a"))
            session.on_commit(read_and_fail)
    assert checked_out(database) == 0


async def test_a_hook_that_uses_the_session_after_a_failed_commit_leaves_no_connection_behind(
    database: Database,
) -> None:
    await database.create_tables(Deferred.metadata)
    names: list[list[str]] = []
    with pytest.raises(IntegrityError):
        async with database.transaction() as session:

            async def look() -> None:
                names.append([*(await session.scalars(select(Author.name))).all()])

            session.add(Child(id=1, parent_id=77))
            session.on_rollback(look)
    assert names == [[]]
    assert checked_out(database) == 0


Use = Callable[[DBSession], None]


async def in_a_block(database: Database, use: Use) -> None:
    async with database.transaction() as session:
        use(session)


async def in_a_background_task(database: Database, use: Use) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})
        use(scope["state"]["db"])

    async def channel(message: Any = None) -> None: ...

    middleware = DBSessionMiddleware(app, database, mode=transactional)
    await middleware({"type": "http", "method": "POST", "path": "/"}, channel, channel)


@pytest.mark.parametrize("when", ["before_response", "after_response"])
@pytest.mark.parametrize("place", [in_a_block, in_a_background_task])
async def test_a_cancellation_during_a_hook_that_uses_the_session_leaves_no_connection_behind(
    database: Database,
    sqlite_url: str,
    place: Callable[[Database, Use], Awaitable[None]],
    when: Any,
) -> None:
    begun = asyncio.Event()
    may_end = asyncio.Event()

    def use(session: DBSession) -> None:
        async def read_and_wait() -> None:
            await session.scalars(select(Author))
            begun.set()
            await may_end.wait()

        session.add(Author(name="a"))
        session.on_commit(read_and_wait, when=when)

    async def work() -> None:
        await place(database, use)

    task = asyncio.create_task(work())
    async with asyncio.timeout(30):
        await begun.wait()
        task.cancel()
        may_end.set()
        await asyncio.wait((task,))
    assert task.cancelled()
    assert checked_out(database) == 0
    assert await authors(sqlite_url) == ["a"]
