"""The mode that the route asks for is the mode it gets, whatever was read before it is known."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import insert, select, text

from asgi_db import (
    DBSession,
    DBSessionMiddleware,
    Mode,
    ModeConflictError,
    plain,
    read_only,
    transactional,
)
from asgi_db.types import ASGIApp, Receive, Scope, Send
from tests.contract.client import call
from tests.contract.endpoints import Answer, Framework, Work
from tests.contract.site import Item, Site
from tests.contract.test_modes import warnings_of
from tests.servers import outside

CONFLICT: dict[type[Any], Answer] = {ModeConflictError: Answer(409, b"conflict")}

both = pytest.mark.parametrize("around", [False, True], ids=["inside", "around"])


async def read_user(session: DBSession) -> None:
    """What a middleware for logins does."""
    await session.scalars(select(Item))


async def write_audit(session: DBSession) -> None:
    """What a middleware for an audit trail does."""
    await session.execute(insert(Item).values(name="audit"))


def adding(how: str) -> Work:
    """An endpoint which writes an item, and leaves more or less of that to the end of its unit."""

    async def add(session: DBSession) -> Answer:
        if how == "statement":
            await session.execute(insert(Item).values(name="a"))
        else:
            session.add(Item(name="a"))
        if how == "flush":
            await session.flush()
        return Answer(201)

    return add


# -- a read before the route is known ----------------------------------------------------------


@both
@pytest.mark.parametrize("how", ["pending", "flush", "statement"])
async def test_a_read_before_the_route_is_known_does_not_take_the_mode_of_the_route_away(
    site: Site, around: bool, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    for default in plain, read_only:
        exchange = await site.answer(
            adding(how), transactional, default=default, around=around, before=read_user
        )
        assert (exchange.status, exchange.error) == (201, None)
        assert await site.items() == ["a"]
        await site.from_outside("DELETE FROM item")
    assert warnings_of(caplog) == []


@both
async def test_in_plain_too_the_route_gets_its_own_mode(site: Site, around: bool) -> None:
    async def commit(session: DBSession) -> Answer:
        session.add(Item(name="a"))
        await session.commit()
        session.add(Item(name="lost"))
        return Answer(201)

    for default in transactional, read_only:
        options: dict[str, Any] = {"default": default, "around": around, "before": read_user}
        assert (await site.answer(commit, plain, **options)).status == 201
        assert await site.items() == ["a"]
        await site.from_outside("DELETE FROM item")


@both
async def test_a_route_that_only_reads_holds_no_connection_whatever_was_read_before(
    site: Site, around: bool
) -> None:
    async def read(session: DBSession) -> None:
        await session.scalars(select(Item))
        await asyncio.sleep(0)
        assert site.checked_out == 0

    for default in transactional, plain:
        options: dict[str, Any] = {"default": default, "around": around, "before": read_user}
        assert (await site.answer(read, read_only, **options)).status == 200


@both
@pytest.mark.parametrize("default", [plain, read_only], ids=lambda mode: mode.name)
async def test_the_options_of_the_route_reach_the_server_whatever_was_read_before(
    framework: Framework, postgresql_url: str, around: bool, default: Mode
) -> None:
    async def ask(session: DBSession) -> Answer:
        return Answer(200, (await session.scalar(text("SHOW transaction_isolation"))).encode())

    async with Site.on(framework, postgresql_url) as site:
        mode = transactional(isolation="SERIALIZABLE")
        exchange = await site.answer(ask, mode, default=default, around=around, before=read_user)
        assert (exchange.status, exchange.body) == (200, b"serializable")


@both
async def test_the_time_of_the_route_counts_from_its_own_first_statement(
    server_site: Site, around: bool
) -> None:
    async def sleep(session: DBSession) -> None:
        is_postgresql = server_site.url.startswith("postgresql")
        await session.execute(text("SELECT pg_sleep(30)" if is_postgresql else "SELECT SLEEP(30)"))

    mode = transactional(timeout=0.3)
    options: dict[str, Any] = {"around": around, "before": read_user}
    assert (await server_site.answer(sleep, mode, **options)).status == 503


@both
async def test_commit_on_is_that_of_the_route(site: Site, around: bool) -> None:
    mode = transactional(commit_on=lambda status: status == 409)

    async def refuse(session: DBSession) -> Answer:
        session.add(Item(name="a"))
        return Answer(409)

    assert (await site.answer(refuse, mode, around=around, before=read_user)).status == 409
    assert await site.items() == ["a"]


@both
async def test_what_was_loaded_before_the_route_stays_usable_and_its_changes_are_kept(
    site: Site, around: bool
) -> None:
    await site.from_outside("INSERT INTO item VALUES ('user', 'old')")
    users: list[Item] = []

    async def login(session: DBSession) -> None:
        user = await session.get_one(Item, "user")
        user.note = "seen"
        users.append(user)

    async def order(session: DBSession) -> Answer:
        await session.execute(insert(Item).values(name="a"))
        assert users[0] in session
        return Answer(201, users[0].name.encode())

    exchange = await site.answer(order, transactional, around=around, before=login)
    assert (exchange.status, exchange.body) == (201, b"user")
    async with outside(site.url) as connection:
        rows = await connection.execute("SELECT name, note FROM item ORDER BY name")
    assert [tuple(row) for row in rows] == [("a", None), ("user", "seen")]


async def test_hooks_that_were_added_before_the_route_run_after_its_commit(site: Site) -> None:
    lines: list[str] = []

    async def login(session: DBSession) -> None:
        session.on_commit(lambda: lines.append("committed"))
        session.on_rollback(lambda: lines.append("rolled back"))
        await read_user(session)

    exchange = await site.answer(adding("statement"), transactional, around=True, before=login)
    assert (exchange.status, lines) == (201, ["committed"])


async def test_the_unit_before_the_route_is_counted_under_the_name_of_the_route(
    site: Site,
) -> None:
    await site.answer(adding("statement"), transactional, around=True, before=read_user)
    (found,) = site.database.stats().routes.items()
    assert "add" in found[0]
    assert (found[1].units, found[1].committed, found[1].rolled_back) == (2, 1, 1)


async def test_without_a_mark_on_the_route_nothing_is_given_back(site: Site) -> None:
    async def look(session: DBSession) -> Answer:
        assert site.checked_out == 1
        await session.scalars(select(Item))
        return Answer(201)

    exchange = await site.answer(look, around=True, before=read_user)
    assert exchange.status == 201
    (found,) = site.database.stats().routes.values()
    assert (found.units, found.connections) == (1, 1)


# -- more than reads ---------------------------------------------------------------------------


@both
@pytest.mark.parametrize("how", ["pending", "statement", "nothing"])
async def test_a_write_before_the_route_is_known_is_a_conflict_and_never_a_2xx(
    site: Site, around: bool, how: str
) -> None:
    if not around and site.framework.name == "litestar":
        pytest.skip("the route is known before any middleware runs")

    async def nothing(session: DBSession) -> Answer:
        return Answer(201)

    work = nothing if how == "nothing" else adding(how)
    for default, mode in (plain, transactional), (transactional, plain), (transactional, read_only):
        options: dict[str, Any] = {"default": default, "around": around, "before": write_audit}
        exchange = await site.answer(work, mode, handlers=CONFLICT, **options)
        assert (exchange.status, exchange.error) == (409, None)
        exchange = await site.answer(work, mode, **options)
        assert exchange.status == 500
        assert exchange.error is None or exchange.was_caused_by(ModeConflictError)
        assert await site.items() == []


async def test_what_was_committed_by_hand_before_the_route_is_no_conflict(site: Site) -> None:
    async def audit(session: DBSession) -> None:
        await write_audit(session)
        await session.commit()
        await read_user(session)

    exchange = await site.answer(adding("flush"), transactional, around=True, before=audit)
    assert exchange.status == 201
    assert await site.items() == ["a", "audit"]


async def test_a_route_without_a_mark_goes_on_with_what_was_written_before(site: Site) -> None:
    exchange = await site.answer(
        adding("flush"), default=transactional, around=True, before=write_audit
    )
    assert exchange.status == 201
    assert await site.items() == ["a", "audit"]


PINS: dict[str, list[str]] = {
    "postgresql": [
        "SELECT * FROM item FOR UPDATE",
        "SELECT * FROM item FOR NO KEY UPDATE",
        "SELECT * FROM item FOR KEY SHARE",
        "LOCK TABLE item",
        "SELECT pg_advisory_xact_lock(1)",
        "SET LOCAL statement_timeout = 1000",
        "SELECT set_config('app.tenant', '1', true)",
    ],
    "mysql": ["SELECT * FROM item FOR UPDATE", "SELECT * FROM item LOCK IN SHARE MODE"],
}


async def test_a_lock_or_a_setting_is_not_given_back_in_silence(server_site: Site) -> None:
    for statement in PINS[server_site.url.partition("+")[0]]:

        async def lock(session: DBSession, statement: str = statement) -> None:
            await session.execute(text(statement))

        exchange = await server_site.answer(
            adding("flush"), transactional, around=True, before=lock, handlers=CONFLICT
        )
        assert (exchange.status, exchange.error) == (409, None), statement
        assert await server_site.items() == []


@pytest.mark.parametrize(
    ("default", "status"), [(plain, 201), (transactional, 409)], ids=["plain", "transactional"]
)
async def test_a_function_that_is_not_known_may_have_written_where_that_would_be_committed(
    framework: Framework, postgresql_url: str, default: Mode, status: int
) -> None:
    async def login(session: DBSession) -> None:
        await session.execute(text("SELECT find_user()"))

    async with Site.on(framework, postgresql_url) as site:
        await site.from_outside(
            "CREATE OR REPLACE FUNCTION find_user() RETURNS int LANGUAGE sql AS 'SELECT 1'"
        )
        mode = transactional(isolation="SERIALIZABLE")
        options: dict[str, Any] = {"default": default, "around": True, "before": login}
        exchange = await site.answer(adding("flush"), mode, handlers=CONFLICT, **options)
        assert exchange.status == status


async def test_a_block_of_its_own_is_not_broken_by_the_mode_of_the_route(site: Site) -> None:
    """What stands around the application begins, and ends, its own transaction."""

    class Around:
        def __init__(self, app: ASGIApp) -> None:
            self._app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            session = scope["state"]["db"]
            async with session.begin():
                await read_user(session)
                await self._app(scope, receive, send)

    inner = site.app(adding("flush"), transactional, around=True, handlers=CONFLICT)
    app = DBSessionMiddleware(Around(inner), database=site.database)
    assert (await call(app)).status == 409
    await site.assert_nothing_held()
    assert await site.items() == []


# -- two dependencies in any order -------------------------------------------------------------


def after_reading_in(mode: Mode, read: Callable[[DBSession], Awaitable[Any]] = read_user) -> Work:
    """An endpoint whose first dependency reads in one mode, before another one is asked for."""

    async def order(session: DBSession) -> Answer:
        session.unit_of_work.ask(mode)
        await read(session)
        session.unit_of_work.ask(transactional)
        session.add(Item(name="a"))
        return Answer(201)

    return order


@pytest.mark.parametrize("first", [plain, read_only], ids=lambda mode: mode.name)
async def test_a_stronger_mode_can_be_had_after_reads(
    site: Site, first: Mode, caplog: pytest.LogCaptureFixture
) -> None:
    exchange = await site.answer(after_reading_in(first))
    assert (exchange.status, exchange.error) == (201, None)
    assert await site.items() == ["a"]
    assert warnings_of(caplog) == []


async def test_a_stronger_mode_cannot_be_had_after_writes(site: Site) -> None:
    exchange = await site.answer(after_reading_in(plain, write_audit), handlers=CONFLICT)
    assert (exchange.status, exchange.error) == (409, None)
    assert await site.items() == []


async def test_a_snapshot_that_was_asked_for_is_not_given_back_in_silence(site: Site) -> None:
    exchange = await site.answer(after_reading_in(read_only(snapshot=True)), handlers=CONFLICT)
    assert (exchange.status, exchange.error) == (409, None)
    assert await site.items() == []


async def test_an_isolation_level_that_was_set_by_hand_is_not_given_back_in_silence(
    site: Site,
) -> None:
    async def read(session: DBSession) -> None:
        options = {"isolation_level": "SERIALIZABLE"}
        await session.connection(execution_options=options)
        await read_user(session)

    exchange = await site.answer(after_reading_in(plain, read), handlers=CONFLICT)
    assert (exchange.status, exchange.error) == (409, None)
    assert await site.items() == []


async def test_a_server_side_cursor_that_is_open_is_not_given_back_in_silence(
    server_site: Site,
) -> None:
    await server_site.from_outside("INSERT INTO item VALUES ('x', NULL), ('y', NULL)")
    streams: list[Any] = []

    async def stream(session: DBSession) -> None:
        streams.append(await session.stream(select(Item.name)))

    exchange = await server_site.answer(after_reading_in(plain, stream), handlers=CONFLICT)
    assert (exchange.status, exchange.error) == (409, None)

    async def read_stream(session: DBSession) -> None:
        result = await session.stream(select(Item.name))
        assert len(await result.all()) == 2
        await result.close()

    assert (await server_site.answer(after_reading_in(plain, read_stream))).status == 201
