"""The options of a transaction really reach the server, and end with it."""

import sqlite3
from importlib import import_module

import pytest
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from asgi_db import DBSession, Mode, plain, read_only, transactional
from asgi_db.errors import ConfigurationError
from tests.contract.endpoints import Answer, Framework, Work
from tests.contract.site import Site, write
from tests.servers import outside

LOCKED: type[Exception] = import_module("asyncmy").errors.OperationalError

POSTGRESQL = [
    "SHOW transaction_isolation",
    "SHOW transaction_read_only",
    "SHOW transaction_deferrable",
]


def ask(*questions: str) -> Work:
    """What the server says of the open transaction."""

    async def ask(session: DBSession) -> Answer:
        answers = [await session.scalar(text(question)) for question in questions]
        return Answer(200, ", ".join(str(answer) for answer in answers).encode())

    return ask


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (plain, b"read committed, off, off"),
        (transactional, b"read committed, off, off"),
        (transactional(isolation="REPEATABLE READ"), b"repeatable read, off, off"),
        (transactional(isolation="SERIALIZABLE", read_only=True), b"serializable, on, off"),
        (
            transactional(isolation="SERIALIZABLE", read_only=True, deferrable=True),
            b"serializable, on, on",
        ),
        (transactional(read_only=True), b"read committed, on, off"),
        (read_only(snapshot=True), b"repeatable read, on, off"),
    ],
)
async def test_postgresql_has_the_options_of_each_transaction_and_forgets_them(
    framework: Framework, postgresql_url: str, mode: Mode, expected: bytes
) -> None:
    async with Site.on(framework, postgresql_url) as site:
        exchange = await site.answer(ask(*POSTGRESQL), mode)
        assert (exchange.status, exchange.body) == (200, expected)
        exchange = await site.answer(ask(*POSTGRESQL), plain)
        assert (exchange.status, exchange.body) == (200, b"read committed, off, off")


def try_isolation(url: str) -> Work:
    """How many items are seen before and after another connection commits one, and what it met."""

    async def try_isolation(session: DBSession) -> Answer:
        count = text("SELECT count(*) FROM item")
        async with outside(url) as other:
            await other.execute("DELETE FROM item")
            await other.execute("SET SESSION innodb_lock_wait_timeout = 0")
            seen = [await session.scalar(count)]
            await other.execute("START TRANSACTION")
            try:
                await other.execute("INSERT INTO item (name) VALUES ('meanwhile')")
            except LOCKED as error:
                return Answer(200, str(error.args[0]).encode())
            seen.append(await session.scalar(count))
            await other.execute("COMMIT")
            seen.append(await session.scalar(count))
        return Answer(200, str(seen).encode())

    return try_isolation


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (plain, b"[0, 0, 0]"),
        (transactional(isolation="READ UNCOMMITTED"), b"[0, 1, 1]"),
        (transactional(isolation="READ COMMITTED"), b"[0, 0, 1]"),
        (transactional(isolation="REPEATABLE READ"), b"[0, 0, 0]"),
        (transactional(isolation="SERIALIZABLE"), b"1205"),  # what has been read is locked
        (read_only, b"[0, 0, 1]"),
        (read_only(snapshot=True), b"[0, 0, 0]"),
    ],
)
async def test_mariadb_isolates_each_transaction_as_asked_and_the_next_as_before(
    framework: Framework, mysql_url: str, mode: Mode, expected: bytes
) -> None:
    async with Site.on(framework, mysql_url) as site:
        exchange = await site.answer(try_isolation(site.url), mode)
        assert (exchange.status, exchange.body) == (200, expected)
        exchange = await site.answer(try_isolation(site.url), plain)
        assert (exchange.status, exchange.body) == (200, b"[0, 0, 0]")


@pytest.mark.parametrize("mode", [transactional(read_only=True), read_only(snapshot=True)])
async def test_a_server_itself_refuses_the_writes_of_a_read_only_transaction(
    site: Site, mode: Mode
) -> None:
    """What only the server can see: a function or procedure that writes."""
    if "postgresql" in site.url:
        await site.from_outside(
            "CREATE OR REPLACE FUNCTION add_item() RETURNS void LANGUAGE sql"
            " AS $$ INSERT INTO item (name) VALUES ('a') $$"
        )
        statement, refusal = "SELECT add_item()", "in a read-only transaction"
    elif "mysql" in site.url:
        await site.from_outside(
            "CREATE OR REPLACE PROCEDURE add_item() INSERT INTO item (name) VALUES ('a')"
        )
        statement, refusal = "CALL add_item()", "in a READ ONLY transaction"
    else:  # SQLite has neither, and no transaction that only reads: the library refuses
        statement, refusal = "INSERT INTO item (name) VALUES ('a')", "only reads"
    refusals: list[str] = []

    async def attempt(session: DBSession) -> None:
        try:
            await session.execute(text(statement))
        except SQLAlchemyError as error:
            refusals.append(str(error))
            raise

    exchange = await site.answer(attempt, mode, handlers={SQLAlchemyError: Answer(422)})
    assert (exchange.status, exchange.error) == (422, None)
    assert [refusal in message for message in refusals] == [True]
    assert await site.items() == []
    # the next transaction of the same connection writes
    assert (await site.answer(write(), transactional)).status == 200
    assert await site.items() == ["a"]


@pytest.mark.parametrize(
    ("mode", "locks"),
    [(transactional, True), (transactional(read_only=True), False), (plain, False)],
    ids=["transactional", "read-only", "plain"],
)
async def test_sqlite_takes_the_lock_at_the_begin_of_a_transaction_that_will_write(
    framework: Framework, sqlite_url: str, mode: Mode, locks: bool
) -> None:
    async def read(session: DBSession) -> Answer:
        await session.execute(text("SELECT * FROM item"))
        async with outside(sqlite_url) as other:
            await other.execute("PRAGMA busy_timeout = 0")
            try:
                await other.execute("INSERT INTO item (name) VALUES ('meanwhile')")
            except sqlite3.OperationalError as error:
                return Answer(200, str(error).encode())
        return Answer(200, b"free")

    async with Site.on(framework, sqlite_url) as site:
        exchange = await site.answer(read, mode)
        assert (exchange.status, exchange.body) == (
            (200, b"database is locked") if locks else (200, b"free")
        )
        assert await site.items() == ([] if locks else ["meanwhile"])


async def test_deferrable_is_refused_where_it_does_not_exist(site: Site) -> None:
    mode = transactional(isolation="SERIALIZABLE", read_only=True, deferrable=True)
    exchange = await site.answer(
        ask("SELECT 1"), mode, handlers={ConfigurationError: Answer(501, b"no such option")}
    )
    if "postgresql" in site.url:
        assert (exchange.status, exchange.body) == (200, b"1")
    else:
        assert (exchange.status, exchange.body) == (501, b"no such option")
        assert site.opened == 0
