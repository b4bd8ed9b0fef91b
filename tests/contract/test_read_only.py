"""`read_only`: each statement stands alone, and nothing is written."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import delete, insert, select, text, update

from asgi_db import DBSession, Mode, plain, read_only
from asgi_db.errors import ReadOnlyError
from tests.contract.client import call
from tests.contract.endpoints import Answer
from tests.contract.site import Item, Site

READ_ONLY: dict[str, dict[str, Any]] = {
    "decorator": {"mode": read_only},
    "dependency": {"dependency": read_only},
    "default": {"default": read_only},
}


@pytest.mark.parametrize("way", READ_ONLY.values(), ids=READ_ONLY)
async def test_in_read_only_who_waits_between_statements_holds_no_connection(
    site: Site, way: dict[str, Any]
) -> None:
    await site.from_outside("INSERT INTO item (name, note) VALUES ('a', 'old')")
    held: list[int] = []

    async def read(session: DBSession) -> Answer:
        item = await session.get_one(Item, "a")
        held.append(site.checked_out)
        rows = (await session.scalars(select(Item))).all()
        await asyncio.sleep(0)
        held.append(site.checked_out)
        await site.from_outside("UPDATE item SET note = 'new'")
        note = await session.scalar(text("SELECT note FROM item"))
        await asyncio.sleep(0)
        held.append(site.checked_out)
        await session.refresh(item)
        await asyncio.sleep(0)
        held.append(site.checked_out)
        await site.assert_nothing_held()
        assert rows == [item]
        return Answer(200, f"{note} {item.note}".encode())

    exchange = await site.answer(read, **way)
    assert (exchange.status, exchange.body) == (200, b"new new")
    assert held == [0, 0, 0, 0]


async def add_and_flush(session: DBSession) -> None:
    session.add(Item(name="a"))
    await session.flush()


async def delete_and_flush(session: DBSession) -> None:
    await session.delete(await session.get_one(Item, "there"))
    await session.flush()


async def on_the_connection(session: DBSession) -> None:
    await (await session.connection()).execute(insert(Item).values(name="a"))


async def commit_what_is_new(session: DBSession) -> None:
    session.add(Item(name="a"))
    await session.commit()


WRITES: dict[str, Callable[[DBSession], Awaitable[Any]]] = {
    "flush": add_and_flush,
    "flush of a delete": delete_and_flush,
    "commit": commit_what_is_new,
    "insert": lambda session: session.execute(insert(Item).values(name="a")),
    "bulk insert": lambda session: session.execute(insert(Item), [{"name": "a"}, {"name": "b"}]),
    "update": lambda session: session.execute(update(Item).values(name="b")),
    "delete": lambda session: session.execute(delete(Item)),
    "text": lambda session: session.execute(text("INSERT INTO item (name) VALUES ('a')")),
    "on the connection": on_the_connection,
}


@pytest.mark.parametrize("mode", [read_only, read_only(snapshot=True)], ids=["", "snapshot"])
async def test_in_read_only_no_write_reaches_the_server(site: Site, mode: Mode) -> None:
    """The mode is autocommit: a write which had reached the server would be seen from outside."""
    await site.from_outside("INSERT INTO item (name) VALUES ('there')")
    await assert_refused(site, mode, WRITES)
    assert await site.items() == ["there"]


def of_one(statement: str) -> Callable[[DBSession], Awaitable[Any]]:
    """Execute a statement that is written by hand."""
    return lambda session: session.execute(text(statement))


LOCKS: dict[str, Callable[[DBSession], Awaitable[Any]]] = {
    "row lock": lambda session: session.scalars(select(Item).with_for_update(skip_locked=True)),
    "shared row lock": lambda session: session.scalars(select(Item).with_for_update(read=True)),
    "row lock of an object": lambda session: session.get(Item, "there", with_for_update=True),
    "row lock in a subquery": lambda session: session.scalars(
        select(Item).where(Item.name.in_(select(Item.name).with_for_update()))
    ),
}
"""What locks rows; SQLAlchemy leaves that out for SQLite, which has no row locks."""

HIDDEN: dict[str, dict[str, str]] = {
    "postgresql": {
        "a comment": "COMMENT ON TABLE item IS 'a'",
        "statistics": "ANALYZE item",
        "an index": "REINDEX TABLE item",
        "a cleaning": "VACUUM item",
        "a table out of a query": "SELECT * INTO item_2 FROM item",
        "a message": "NOTIFY item",
        "a message by a function": "SELECT pg_notify('item', '')",
    },
    "mysql": {
        "statistics": "ANALYZE TABLE item",
        "an optimization": "OPTIMIZE TABLE item",
        "a comment that is executed": "/*! DELETE FROM item */",
        "a second statement": "SELECT 1; DELETE FROM item",
        "a statement with settings": "SET STATEMENT max_statement_time = 9 FOR DELETE FROM item",
        "a setting of the server": "SET GLOBAL max_statement_time = 0",
    },
    "sqlite": {
        "statistics": "ANALYZE",
        "an index": "REINDEX item",
        "a cleaning": "VACUUM",
        "a setting of the file": "PRAGMA user_version = 1",
    },
}
"""What writes, and does not look like it."""

LASTING: dict[str, dict[str, str]] = {
    "postgresql": {
        "a lock of the session": "SELECT pg_advisory_lock(1)",
        "a lock of the transaction": "SELECT pg_advisory_xact_lock(1)",
        "a setting": "SET search_path TO shop",
        "a setting of the transaction": "SELECT set_config('app.tenant', 'a', true)",
        "a cursor": "DECLARE c CURSOR FOR SELECT 1",
        "a subscription": "LISTEN item",
    },
    "mysql": {
        "a lock of the session": "SELECT GET_LOCK('item', 1)",
        "a lock of a table": "LOCK TABLES item READ",
        "a setting": "SET SESSION max_statement_time = 9",
        "a handler": "HANDLER item OPEN",
    },
    "sqlite": {
        "a setting": "PRAGMA foreign_keys = OFF",
        "another file": "ATTACH DATABASE ':memory:' AS other",
    },
}
"""What needs a transaction or a connection that is kept."""


@pytest.mark.parametrize("mode", [read_only, read_only(snapshot=True)], ids=["", "snapshot"])
async def test_in_read_only_no_row_is_locked_and_nothing_written_in_disguise(
    site: Site, mode: Mode
) -> None:
    """Two workers which claim a job in this way would both get it."""
    await site.from_outside("INSERT INTO item (name) VALUES ('there')")
    hidden = HIDDEN[site.database.url.get_backend_name()]
    attempts = {**LOCKS, **{name: of_one(statement) for name, statement in hidden.items()}}
    await assert_refused(site, mode, attempts)
    assert await site.items() == ["there"]


async def test_in_read_only_nothing_is_taken_that_needs_a_transaction(site: Site) -> None:
    lasting = LASTING[site.database.url.get_backend_name()]
    attempts = {name: of_one(statement) for name, statement in lasting.items()}
    await assert_refused(site, read_only, attempts)


async def assert_refused(
    site: Site, mode: Mode, attempts: dict[str, Callable[[DBSession], Awaitable[Any]]]
) -> None:
    """Each attempt is refused before anything reaches the server."""
    for name, attempt in attempts.items():

        async def endpoint(
            session: DBSession, attempt: Callable[[DBSession], Awaitable[Any]] = attempt
        ) -> None:
            await attempt(session)

        handlers = {ReadOnlyError: Answer(422, b"refused")}
        exchange = await call(site.app(endpoint, mode, handlers=handlers))
        assert (exchange.status, exchange.body, exchange.error) == (422, b"refused", None), name
        assert site.checked_out == 0, name
    await site.assert_nothing_held()


async def stream_rows(session: DBSession) -> Answer:
    """Read with a server-side cursor."""
    names: list[str] = []
    async for name in await session.stream_scalars(select(Item.name).order_by(Item.name)):
        names.append(name)
    return Answer(200, ",".join(names).encode())


async def test_in_read_only_a_server_side_cursor_is_refused(site: Site) -> None:
    handlers = {ReadOnlyError: Answer(422, b"refused")}
    exchange = await site.answer(stream_rows, read_only, handlers=handlers)
    assert (exchange.status, exchange.body, exchange.error) == (422, b"refused", None)


@pytest.mark.parametrize("mode", [read_only(snapshot=True), plain], ids=["snapshot", "plain"])
async def test_in_a_transaction_a_server_side_cursor_works(site: Site, mode: Mode) -> None:
    await site.from_outside("INSERT INTO item (name) VALUES ('a'), ('b'), ('c')")
    exchange = await site.answer(stream_rows, mode)
    assert (exchange.status, exchange.body) == (200, b"a,b,c")


async def test_a_snapshot_does_not_see_what_others_commit_meanwhile(site: Site) -> None:
    async def read_twice(session: DBSession) -> Answer:
        count = text("SELECT count(*) FROM item")
        before = await session.scalar(count)
        await site.from_outside("INSERT INTO item (name) VALUES ('meanwhile')")
        return Answer(200, f"{before} {await session.scalar(count)}".encode())

    exchange = await site.answer(read_twice, read_only(snapshot=True))
    assert (exchange.status, exchange.body) == (200, b"0 0")
    assert await site.items() == ["meanwhile"]
