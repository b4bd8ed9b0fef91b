"""Requests that are cancelled around what replicas add to them: two more questions to a server.

That for the position of a commit, right after COMMIT (on PostgreSQL), and that to a replica, how
far it has come.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from sqlalchemy import insert, select
from sqlalchemy.engine import make_url

from asgi_db import Database, DBSession, Mode, plain, read_only, transactional
from asgi_db.types import ASGIApp, Receive, Scope, Send
from tests.cancelling import (
    POOL,
    WAYS,
    Points,
    Site,
    answer,
    create_tables,
    no_complaints,
    outcome,
    turns,
    watched_tasks,
)
from tests.clusters import Cluster, Urls
from tests.contract.client import Exchange, call
from tests.limits import set_limits
from tests.relay import Fate, Relay, once
from tests.servers import assert_disconnected, assert_idle, outside, sql
from tests.tables import Author, authors

ANNOUNCED = "committed, answer not delivered"
POSITION = b"pg_current_wal_insert_lsn"
QUESTION = {"postgresql": b"pg_last_wal_replay_lsn", "mysql": b"gtid_current_pos"}


@pytest.fixture(scope="module", params=["postgresql", "mysql"])
def module_urls(
    request: pytest.FixtureRequest, postgresql_driver: str
) -> Iterator[tuple[Cluster, Urls]]:
    """A database with the tables for the whole file, because it takes a while to make."""
    cluster: Cluster = request.getfixturevalue(f"{request.param}_cluster")
    with cluster.fresh_database() as urls:
        create_tables(urls.primary)
        yield cluster, urls


@pytest.fixture
def urls(module_urls: tuple[Cluster, Urls]) -> Urls:
    cluster, urls = module_urls
    sql(urls.primary, "DELETE FROM author")
    cluster.wait_until_caught_up()
    return urls


async def cancel(site: Site, way: str) -> None:
    """Cancel the request of a site, once or twice."""
    for _ in range(2 if way == "twice" else 1):
        site.cancel()
        await turns(10)


def backend_of(urls: Urls) -> str:
    return make_url(urls.primary).get_backend_name()


async def assert_clean(site: Site, urls: Urls) -> None:
    """Nothing is left of the request at any server, and the next one is served."""

    def checked_out() -> int:
        stats = site.database.stats()
        return sum(pool.checked_out for pool in (stats.pool, *(r.pool for r in stats.replicas)))

    async with asyncio.timeout(20):  # a question goes on without the request that has asked it
        while checked_out():  # noqa: ASYNC110 - nobody says when
            await asyncio.sleep(0.01)
    for url in (urls.primary, urls.replicas[0]):
        await assert_idle(url)
    async with site.database.session(read_only) as session:
        assert (await session.scalars(select(Author.id).limit(1))).all() is not None
    async with site.database.transaction() as session:
        await session.execute(insert(Author).values(name="next"))
    assert "next" in await authors(urls.primary)


async def writes(session: DBSession, send: Send) -> None:
    await session.execute(insert(Author).values(name="ada"))
    await answer(send)


async def writes_by_hand(session: DBSession, send: Send) -> None:
    await session.execute(insert(Author).values(name="ada"))
    await session.commit()
    await answer(send)


async def reads(session: DBSession, send: Send) -> None:
    await session.scalars(select(Author.name))
    await answer(send)


def owed(app: ASGIApp, position: str) -> ASGIApp:
    """The application for a client that was told this position."""

    async def with_position(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [*scope["headers"], (b"asgi-db-db", position.encode())]
        await app({**scope, "headers": headers}, receive, send)

    return with_position


async def position_of(site: Site) -> str:
    """What a client is told who writes now."""
    exchange: Exchange = await call(site.app(writes, "task"))
    headers: dict[bytes, bytes] = dict(exchange.messages[0]["headers"])
    return headers[b"asgi-db-db"].decode()


# -- held up by the network --------------------------------------------------------------------


only_postgresql = pytest.mark.parametrize("module_urls", ["postgresql"], indirect=True)
"""MariaDB tells the position in its answer to COMMIT."""


@only_postgresql
@pytest.mark.parametrize("style", ["transactional", "by hand"])
@pytest.mark.parametrize(
    ("way", "fate"), [*[(way, Fate.HELD) for way in WAYS], ("task", Fate.ANSWER_HELD)]
)
@pytest.mark.sweep
async def test_cancelled_while_it_asks_for_the_position_of_its_commit(
    urls: Urls, style: str, way: str, fate: Fate, caplog: pytest.LogCaptureFixture
) -> None:
    """What is committed is answered, or announced."""
    async with (
        Relay(urls.primary) as relay,
        Database(relay.url, replicas=urls.replicas[:1], engine_options=POOL) as database,
    ):
        site = Site(urls.primary, database)
        mode, endpoint = (
            (transactional, writes) if style == "transactional" else (plain, writes_by_hand)
        )
        relay.fate_of = once(POSITION, fate)
        request = asyncio.create_task(site.serve(site.app(endpoint, way, mode)))
        await relay.holds_something.wait()
        await cancel(site, way)
        relay.thaw()
        await site.assert_cancelled(request, way)
        assert await authors(urls.primary) == ["ada"]
        delivered = "http.response.start" in site.delivered
        assert delivered == (ANNOUNCED not in caplog.text)
        assert delivered or style == "by hand"
        await assert_clean(site, urls)
    await assert_disconnected(urls.primary)


@only_postgresql
async def test_a_position_that_is_not_told_in_time_does_not_undo_the_commit(
    urls: Urls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client reads from the primary for a while."""
    set_limits(monkeypatch, position=0.3)
    async with (
        Relay(urls.primary) as relay,
        Database(relay.url, replicas=urls.replicas[:1], engine_options=POOL) as database,
    ):
        site = Site(urls.primary, database)
        relay.fate_of = once(POSITION, Fate.HELD)
        request = asyncio.create_task(call(site.app(writes, "task")))
        await relay.holds_something.wait()
        exchange = await request
        relay.thaw()
        assert exchange.status == 201
        headers: dict[bytes, bytes] = dict(exchange.messages[0]["headers"])
        assert headers[b"asgi-db-db"] == b"unknown"
        assert await authors(urls.primary) == ["ada"]
        await assert_clean(site, urls)


@pytest.mark.parametrize(
    ("way", "fate"), [*[(way, Fate.HELD) for way in WAYS], ("task", Fate.ANSWER_HELD)]
)
@pytest.mark.sweep
async def test_cancelled_while_it_asks_a_replica_how_far_it_has_come(
    urls: Urls, way: str, fate: Fate
) -> None:
    async with (
        Relay(urls.replicas[0]) as relay,
        Database(urls.primary, replicas=[relay.url], engine_options=POOL) as database,
    ):
        site = Site(urls.primary, database)
        relay.fate_of = once(QUESTION[backend_of(urls)], fate)
        request = asyncio.create_task(site.serve(site.app(reads, way, read_only)))
        await relay.holds_something.wait()
        await cancel(site, way)
        relay.thaw()
        await site.assert_cancelled(request, way)
        assert site.delivered == []
        await assert_clean(site, urls)
    for url in (urls.primary, urls.replicas[0]):
        await assert_disconnected(url)


# -- at each point -----------------------------------------------------------------------------


@pytest.fixture
async def sweep() -> AsyncIterator[None]:
    async with no_complaints():
        with watched_tasks():
            yield


Style = tuple[Mode, Callable[[DBSession, Send], Awaitable[None]], bool]
STYLES: dict[str, Style] = {
    "writes": (transactional, writes, False),
    "writes by hand": (plain, writes_by_hand, False),
    "reads": (read_only, reads, False),
    "is owed more": (read_only, reads, True),
    "snapshot": (read_only(snapshot=True), reads, True),
}


@pytest.mark.usefixtures("sweep")
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("way", ["task", "twice", "scope", "timeout"])
@pytest.mark.sweep
async def test_cancelled_at_each_point_where_it_waits(
    urls: Urls,
    style: str,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each request has to ask: nothing that was known before counts."""
    set_limits(monkeypatch, ask_again_after=0)
    mode, endpoint, is_owed = STYLES[style]
    async with Database(urls.primary, replicas=urls.replicas[:1], engine_options=POOL) as database:
        site = Site(urls.primary, database)
        app = site.app(endpoint, way, mode)
        if is_owed:
            system, _, number = (await position_of(site)).rpartition(":")
            app = owed(app, f"{system}:{int(number) + 2**40}")
        async with outside(urls.primary) as witness:
            point = 0
            for point in itertools.count(1):
                await witness.execute("DELETE FROM author")
                caplog.clear()
                points = Points(site, point, *([point + 1] if way == "twice" else []))
                request = asyncio.create_task(site.serve(points.watch(app)))
                await asyncio.wait((request,), timeout=20)
                if points.passed < point:
                    assert outcome(request) == "ended"
                    break
                await site.assert_cancelled(request, way)
                rows = await witness.execute("SELECT name FROM author")
                delivered = "http.response.start" in site.delivered
                if endpoint is not reads:
                    assert len(rows) == (delivered or ANNOUNCED in caplog.text), point
                if backend_of(urls) == "postgresql":  # MariaDB's are too slow
                    await assert_idle(urls.primary)
                    await assert_idle(urls.replicas[0])
        assert point > 5
        await assert_clean(site, urls)
    for url in (urls.primary, urls.replicas[0]):
        await assert_disconnected(url)
