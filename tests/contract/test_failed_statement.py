"""A statement that failed, and whose error was swallowed, is never acknowledged.

PostgreSQL answers the COMMIT of such a transaction with ROLLBACK and no error; the rule is the
same on every database.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress

import pytest
from sqlalchemy import event, insert, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from asgi_db import DBSession, plain, read_only, transactional
from asgi_db.errors import FailedTransactionError
from tests.contract.endpoints import Answer, Framework
from tests.contract.site import BAD_STATEMENT, Item, Site, write
from tests.servers import outside

Statement = Callable[[DBSession], Awaitable[object]]


async def through_the_session(session: DBSession) -> None:
    """Execute a bad statement as most do."""
    await session.execute(BAD_STATEMENT)


async def through_the_connection(session: DBSession) -> None:
    """Execute a bad statement behind the back of the session."""
    await (await session.connection()).execute(BAD_STATEMENT)


async def through_a_duplicate(session: DBSession) -> None:
    """Violate a constraint at once; MariaDB and SQLite would commit the rest."""
    await session.execute(insert(Item).values(name="a"))


async def through_a_flush(session: DBSession) -> None:
    """Violate a constraint in a flush, which SQLAlchemy answers with a ROLLBACK of its own."""
    session.expunge_all()
    session.add(Item(name="a"))
    await session.flush()


bad_statements = pytest.mark.parametrize(
    "bad",
    [through_the_session, through_the_connection, through_a_duplicate, through_a_flush],
    ids=lambda bad: bad.__name__,
)


HANDLED = {FailedTransactionError: Answer(409, b"handled")}


@bad_statements
async def test_a_swallowed_failure_is_never_acknowledged(site: Site, bad: Statement) -> None:
    async def swallow(session: DBSession) -> Answer:
        await write()(session)
        await session.flush()
        with suppress(DBAPIError):
            await bad(session)
        return Answer(200, b"all is well")

    exchange = await site.answer(swallow, transactional)
    assert (exchange.status, exchange.complete) == (500, True)
    assert b"all is well" not in exchange.body
    assert await site.items() == []


@bad_statements
async def test_a_swallowed_failure_reaches_the_registered_handler(
    site: Site, bad: Statement
) -> None:
    async def swallow(session: DBSession) -> None:
        await write()(session)
        await session.flush()
        with suppress(DBAPIError):
            await bad(session)

    exchange = await site.answer(swallow, transactional, handlers=HANDLED)
    assert (exchange.status, exchange.body, exchange.error) == (409, b"handled", None)
    assert await site.items() == []


@bad_statements
@pytest.mark.parametrize("how", ["commit", "in run_sync", "begin"])
async def test_a_swallowed_failure_cannot_be_committed_by_hand(
    site: Site, bad: Statement, how: str
) -> None:
    causes: list[BaseException | None] = []

    async def swallow(session: DBSession) -> None:
        async def fail() -> None:
            await write()(session)
            await session.flush()
            with suppress(DBAPIError):
                await bad(session)

        try:
            if how == "begin":
                async with session.begin():
                    await fail()
                return
            await fail()
            if how == "in run_sync":
                await session.run_sync(lambda session: session.commit())
            await session.commit()
        except FailedTransactionError as error:
            causes.append(error.__cause__)
            raise

    exchange = await site.answer(swallow, handlers=HANDLED)
    assert (exchange.status, exchange.body, exchange.error) == (409, b"handled", None)
    assert await site.items() == []
    assert [isinstance(cause, DBAPIError) for cause in causes] == [True]


@pytest.mark.parametrize("again", ["execute", "savepoint"])
async def test_a_statement_after_a_flush_that_failed_gets_the_same_error(
    site: Site, again: str
) -> None:
    async def go_on(session: DBSession) -> None:
        await write()(session)
        await session.flush()
        with suppress(DBAPIError):
            await through_a_flush(session)
        if again == "execute":
            await session.execute(text("SELECT 1"))
        else:
            async with session.begin_nested():
                raise AssertionError("it is not to be entered")

    for mode in transactional, plain:
        exchange = await site.answer(go_on, mode, handlers=HANDLED)
        assert (exchange.status, exchange.body, exchange.error) == (409, b"handled", None)
        assert await site.items() == []


async def test_a_flush_that_failed_without_a_statement_is_never_acknowledged(site: Site) -> None:
    class Refused(Exception):
        """Not an error of the database."""

    def refuse(*_: object) -> None:
        raise Refused

    async def swallow(session: DBSession) -> None:
        await write()(session)
        await session.flush()
        session.add(Item(name="b"))
        event.listen(Item, "before_insert", refuse)
        try:
            with suppress(Refused):
                await session.flush()
        finally:
            event.remove(Item, "before_insert", refuse)

    exchange = await site.answer(swallow, transactional, handlers=HANDLED)
    assert (exchange.status, exchange.body, exchange.error) == (409, b"handled", None)
    exchange = await site.answer(swallow, transactional)
    assert exchange.status == 500
    assert exchange.error is None or isinstance(exchange.error.__cause__, Refused)
    assert await site.items() == []


async def test_after_a_rollback_by_hand_the_session_works_again(site: Site) -> None:
    async def start_over(session: DBSession) -> None:
        await write(name="lost")(session)
        with suppress(DBAPIError):
            await through_the_session(session)
        await session.rollback()
        await write(name="kept")(session)

    exchange = await site.answer(start_over, transactional)
    assert (exchange.status, exchange.body) == (200, b"done")
    assert await site.items() == ["kept"]


@bad_statements
async def test_inside_a_savepoint_a_statement_may_fail(site: Site, bad: Statement) -> None:
    async def try_out(session: DBSession) -> None:
        await write()(session)
        await session.flush()
        with suppress(DBAPIError):
            async with session.begin_nested():
                session.add(Item(name="lost with the savepoint"))
                await session.flush()
                await bad(session)
        await write(name="b")(session)

    exchange = await site.answer(try_out, transactional)
    assert (exchange.status, exchange.body) == (200, b"done")
    assert await site.items() == ["a", "b"]


async def test_inside_a_savepoint_of_the_connection_a_statement_may_fail(site: Site) -> None:
    async def try_out(session: DBSession) -> None:
        await write()(session)
        await session.flush()
        connection = await session.connection()
        with suppress(DBAPIError):
            async with connection.begin_nested():
                await connection.execute(BAD_STATEMENT)

    exchange = await site.answer(try_out, transactional)
    assert (exchange.status, exchange.body) == (200, b"done")
    assert await site.items() == ["a"]


async def test_a_failure_swallowed_inside_a_savepoint_is_acknowledged_only_if_all_the_rest_is_there(
    site: Site,
) -> None:
    """PostgreSQL refuses to release such a savepoint; the others lose nothing by it."""

    async def swallow(session: DBSession) -> None:
        await write()(session)
        await session.flush()
        async with session.begin_nested():
            await write(name="b")(session)
            await session.flush()
            with suppress(IntegrityError):
                await through_a_duplicate(session)

    exchange = await site.answer(swallow, transactional)
    if "postgresql" in site.url:
        assert (exchange.status, exchange.complete) == (500, True)
        assert await site.items() == []
    else:
        assert (exchange.status, exchange.body) == (200, b"done")
        assert await site.items() == ["a", "b"]


@pytest.mark.parametrize("outer", [False, True], ids=["raised", "swallowed outside"])
async def test_a_flush_that_fails_inside_a_savepoint_takes_its_rest_with_it_and_says_so(
    site: Site, outer: bool
) -> None:
    async def swallow(session: DBSession) -> None:
        await write()(session)
        await session.flush()
        with suppress(FailedTransactionError) if outer else nullcontext():
            async with session.begin_nested():
                await session.execute(insert(Item).values(name="b"))
                with suppress(IntegrityError):
                    await through_a_flush(session)

    exchange = await site.answer(swallow, transactional, handlers=HANDLED)
    if outer:
        assert (exchange.status, exchange.body) == (200, b"done")
        assert await site.items() == ["a"]
    else:
        assert (exchange.status, exchange.body, exchange.error) == (409, b"handled", None)
        assert await site.items() == []


async def test_a_deadlock_is_never_acknowledged_although_it_hit_a_savepoint_only(
    framework: Framework, mysql_url: str
) -> None:
    """MariaDB rolls back the whole transaction then, and would commit what comes after it."""

    async def swallow(session: DBSession) -> None:
        await session.execute(text("UPDATE item SET note = 'ours' WHERE name = 'a'"))
        async with outside(mysql_url) as other:
            await other.execute("START TRANSACTION")
            await other.execute("UPDATE item SET note = 'theirs' WHERE name > 'a'")
            waiting = asyncio.create_task(other.execute("DELETE FROM item WHERE name = 'a'"))
            with suppress(DBAPIError):
                async with session.begin_nested():  # the smaller transaction is the victim
                    await session.execute(text("UPDATE item SET note = 'ours' WHERE name = 'b'"))
            await waiting
            await other.execute("ROLLBACK")
        await write(name="after the deadlock")(session)

    async with Site.on(framework, mysql_url) as site:
        await site.from_outside("INSERT INTO item (name) VALUES ('a'), ('b'), ('c'), ('d'), ('e')")
        exchange = await site.answer(swallow, transactional)
        assert (exchange.status, exchange.complete) == (500, True)
        assert await site.items() == ["a", "b", "c", "d", "e"]


async def test_a_conflict_that_ends_the_transaction_is_never_acknowledged_although_in_a_savepoint(
    framework: Framework, sqlite_url: str
) -> None:
    """SQLite would do what comes after it without any transaction."""

    async def swallow(session: DBSession) -> None:
        await write(name="before")(session)
        await session.flush()
        with suppress(DBAPIError):
            async with session.begin_nested():
                await session.execute(text("INSERT OR ROLLBACK INTO item (name) VALUES ('a')"))
        await write(name="after")(session)

    async with Site.on(framework, sqlite_url) as site:
        await site.from_outside("INSERT INTO item (name) VALUES ('a')")
        exchange = await site.answer(swallow, transactional)
        assert (exchange.status, exchange.complete) == (500, True)
        assert await site.items() == ["a"]


async def test_in_read_only_a_failed_statement_concerns_nobody_else(site: Site) -> None:
    await site.from_outside("INSERT INTO item (name) VALUES ('a')")

    async def read(session: DBSession) -> Answer:
        with suppress(DBAPIError):
            await through_the_session(session)
        item = await session.get_one(Item, "a")
        return Answer(200, item.name.encode())

    exchange = await site.answer(read, read_only)
    assert (exchange.status, exchange.body) == (200, b"a")
