"""When a session ends its objects are free, and what they had loaded can be read."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import inspect, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from asgi_db import DBSession, Mode, plain, read_only, transactional
from asgi_db.types import Message
from tests.contract.client import call
from tests.contract.endpoints import Answer
from tests.contract.site import BAD_STATEMENT, Item, Site

MODES: dict[str, Mode] = {
    "plain": plain,
    "transactional": transactional,
    "read_only": read_only,
    "snapshot": read_only(snapshot=True),
}


async def prepare(site: Site) -> None:
    """Three items, of which `THERE` finds two."""
    await site.from_outside(
        "INSERT INTO item VALUES ('there', 'old'), ('there too', 'old'), ('unread', 'old')"
    )


THERE = select(Item).where(Item.note == "old", Item.name != "unread").order_by(Item.name)


async def nothing(session: DBSession, item: Item) -> None:
    """Only read."""


async def change(session: DBSession, item: Item) -> None:
    """Change it, without a flush."""
    item.note = "new"


async def change_and_flush(session: DBSession, item: Item) -> None:
    """Change it at the server too, more than once."""
    item.note = "new"
    await session.flush()
    item.note = "newer"
    await session.flush()


async def delete(session: DBSession, item: Item) -> None:
    """Delete it."""
    await session.delete(item)
    await session.flush()


async def fail_to_flush(session: DBSession, item: Item) -> None:
    """Let a flush fail that also changes it."""
    item.note = "new"
    await session.flush()
    session.add(Item(name="unread"))
    item.note = "newer"
    with pytest.raises(IntegrityError):
        await session.flush()


async def fail_to_execute(session: DBSession, item: Item) -> None:
    """Let a statement fail."""
    with pytest.raises(DBAPIError):
        await session.execute(BAD_STATEMENT)


async def roll_back(session: DBSession, item: Item) -> None:
    """Roll back by hand."""
    item.note = "new"
    await session.rollback()


async def roll_back_a_block(session: DBSession, item: Item) -> None:
    """Roll back with a block."""
    await session.commit()
    with pytest.raises(ZeroDivisionError):
        async with session.begin():
            item.note = "new"
            raise ZeroDivisionError


REFUSED: dict[str, Callable[[DBSession, Item], Awaitable[None]]] = {
    "it was read": nothing,
    "it was changed": change,
    "it was flushed": change_and_flush,
    "it was deleted": delete,
    "a flush failed": fail_to_flush,
    "a statement failed": fail_to_execute,
    "it was rolled back by hand": roll_back,
    "a block was rolled back": roll_back_a_block,
}


async def assert_free(site: Site, item: Item) -> None:
    """It belongs to no session, and another one takes it."""
    assert inspect(item).session is None
    assert not inspect(item).modified
    async with site.database.session() as session:
        session.add(item)
        assert await session.get(Item, item.name) is item
        assert (await session.scalars(select(Item).where(Item.name == item.name))).one() is item


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
async def test_after_a_request_its_objects_are_free(site: Site, mode: Mode) -> None:
    await prepare(site)
    items: list[Item] = []

    async def read(session: DBSession) -> None:
        items.extend(await session.scalars(THERE))

    assert (await site.answer(read, mode)).status == 200
    for item in items:
        assert item.note == "old"
        await assert_free(site, item)


async def test_after_a_commit_what_was_written_is_free_too(site: Site) -> None:
    await prepare(site)
    items: list[Item] = []

    async def write(session: DBSession) -> None:
        item = await session.get_one(Item, "there")
        new = Item(name="new", note="new")
        session.add(new)
        item.note = "new"
        items.extend((item, new))

    assert (await site.answer(write, transactional)).status == 200
    for item in items:
        assert item.note == "new"
        await assert_free(site, item)


@pytest.mark.parametrize("work", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("fails", ["refuses", "raises"])
async def test_after_a_request_that_was_refused_its_objects_are_free_with_what_they_had_loaded(
    site: Site, work: Callable[[DBSession, Item], Awaitable[None]], fails: str
) -> None:
    await prepare(site)
    seen: list[Item] = []

    async def refuse(session: DBSession) -> Answer:
        item, other = await session.scalars(THERE)
        seen.extend((item, other))
        await work(session, item)
        if fails == "raises":
            raise site.framework.http_error(Answer(409))
        return Answer(409)

    assert (await site.answer(refuse, transactional)).status == 409
    item, other = seen
    assert (item.name, item.note, other.name, other.note) == ("there", "old", "there too", "old")
    for one in seen:
        await assert_free(site, one)


async def test_what_was_loaded_can_be_read_while_the_answer_leaves(site: Site) -> None:
    """As in a `BaseHTTPMiddleware`, which goes on as soon as it has the status."""
    await prepare(site)
    seen: list[Item] = []
    notes: list[Any] = []

    async def refuse(session: DBSession) -> Answer:
        item = await session.get_one(Item, "there")
        seen.append(item)
        await change_and_flush(session, item)
        return Answer(409)

    async def watch(message: Message) -> None:
        notes.extend((item.name, item.note) for item in seen)

    await call(site.app(refuse, transactional), watch=watch)
    assert set(notes) == {("there", "old")}
    await site.assert_nothing_held()


async def test_after_a_failed_commit_what_was_loaded_can_be_read(site: Site) -> None:
    await prepare(site)
    seen: list[Item] = []

    async def write(session: DBSession) -> None:
        item = await session.get_one(Item, "there")
        item.note = "new"
        seen.append(item)
        await site.spoil_commit(session)

    exchange = await site.answer(write, transactional)
    assert exchange.status in (site.unhandled, None)
    (item,) = seen
    assert (item.name, item.note) == ("there", "old")
    await assert_free(site, item)


async def test_what_a_savepoint_has_rolled_back_is_as_it_was_before_it(site: Site) -> None:
    await prepare(site)
    seen: list[Item] = []

    async def write(session: DBSession) -> None:
        item, other = await session.scalars(THERE)
        seen.extend((item, other))
        item.note = "before"
        async with session.begin_nested():
            other.note = "in the first"
        with pytest.raises(ZeroDivisionError):
            async with session.begin_nested():
                item.note = other.note = "undone"
                await session.flush()
                raise ZeroDivisionError

    assert (await site.answer(write, transactional)).status == 200
    item, other = seen
    assert (item.note, other.note) == ("before", "in the first")
    async with site.database.session() as session:
        notes = await session.scalars(text("SELECT note FROM item ORDER BY name"))
        assert list(notes) == [item.note, other.note, "old"]


async def test_objects_of_a_block_are_free_after_it(site: Site) -> None:
    await prepare(site)
    async with site.database.session() as session:
        item = await session.get_one(Item, "there")
        session.add(new := Item(name="new"))
    async with site.database.transaction() as session:
        session.add(item)
        session.add(new)
        item.note = "new"
    async with site.database.transaction() as session:
        session.add(item)
        assert (await session.merge(new)).name == "new"
    assert await site.items() == ["new", "there", "there too", "unread"]
