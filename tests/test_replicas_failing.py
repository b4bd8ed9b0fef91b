"""Replicas and primaries that fail: what becomes of reads and writes, over HTTP."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy.engine import make_url

from tests import clusters
from tests.clusters import Cluster, SlowLink, Urls, port
from tests.limits import set_limits
from tests.own_writes import tables
from tests.servers import assert_idle, outside, running_statement, server_connections, sql
from tests.test_cli_servers import check
from tests.visitors import Seen, Shop, Visitor, opened, together

SMALL: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 1}


@pytest.fixture
async def urls(cluster: Cluster, urls: Urls) -> AsyncIterator[Urls]:
    async with tables(cluster, urls):
        yield urls


@pytest.fixture
async def postgresql_urls(
    postgresql_cluster: Cluster, postgresql_urls: Urls
) -> AsyncIterator[Urls]:
    async with tables(postgresql_cluster, postgresql_urls):
        yield postgresql_urls


@asynccontextmanager
async def readers(shop: Shop, number: int = 6) -> AsyncGenerator[list[Seen]]:
    """Visitors who read all the time until the end of the block, and what they have seen."""
    seen = list[Seen]()

    async def go_on_reading(visitor: Visitor) -> None:
        while goes_on:
            seen.append(await visitor.read())
            await asyncio.sleep(0.01)

    goes_on = True
    visitors = [await shop.visitor() for _ in range(number)]
    tasks = [asyncio.create_task(go_on_reading(visitor)) for visitor in visitors]
    try:
        yield seen
    finally:
        goes_on = False
        await asyncio.gather(*tasks)


async def until(holds: Callable[[], bool], within: float = 60) -> None:
    """Wait for something that is to come."""
    async with asyncio.timeout(within):
        while not holds():  # noqa: ASYNC110 - nobody says when
            await asyncio.sleep(0.01)


@asynccontextmanager
async def stopped(*stopping: clusters.Replica) -> AsyncGenerator[None]:
    """Replicas do not run until the end of the block; the shop is served meanwhile."""
    with ExitStack() as stack:
        for replica in stopping:
            await asyncio.to_thread(stack.enter_context, replica.server.stopped())
        yield
        await asyncio.to_thread(stack.close)


# -- a replica ---------------------------------------------------------------------------------


async def test_a_killed_replica_costs_no_request_an_error_and_serves_again(
    cluster: Cluster, urls: Urls
) -> None:
    killed = port(urls.replicas[0])
    async with opened(urls) as shop, readers(shop) as seen:
        await until(lambda: killed in {each.port for each in seen[-20:]})
        async with stopped(cluster.replicas[0]):
            before = len(seen)
            await until(lambda: len(seen) > before + 50)
            assert killed not in {each.port for each in seen[-20:]}
        await until(lambda: killed in {each.port for each in seen[-20:]})
    assert Counter(each.status for each in seen) == {200: len(seen)}


async def test_where_every_replica_is_killed_the_primary_serves_the_reads(
    cluster: Cluster, urls: Urls, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(urls) as shop:
        visitor = await shop.visitor()
        assert (await visitor.read()).port in map(port, urls.replicas)
        async with stopped(*cluster.replicas):
            assert set(await together(*(visitor.read() for _ in range(20)))) == {
                Seen(200, 0, port(urls.primary))
            }
            assert (await visitor.write()).status == 201
            assert await visitor.read() == Seen(200, 1, port(urls.primary))
    said = [each.getMessage() for each in caplog.records]
    assert sum("no replica can be used" in each for each in said) == 1  # once a minute


async def test_where_every_replica_is_late_a_client_reads_its_own_write_from_the_primary(
    cluster: Cluster, urls: Urls
) -> None:
    for replica in cluster.replicas:
        await asyncio.to_thread(replica.pause)
    async with opened(urls) as shop:
        writer, other = await shop.visitor(), await shop.visitor()
        other.id = writer.id
        assert (await writer.write()).status == 201
        assert await writer.read() == Seen(200, 1, port(urls.primary))
        assert await writer.read("snapshot") == Seen(200, 1, port(urls.primary))
        old = await other.read()
        assert (old.status, old.version, old.port in map(port, urls.replicas)) == (200, 0, True)
        assert await other.read("fresh") == Seen(200, 1, port(urls.primary))


async def test_a_frozen_replica_stops_no_request_that_comes_a_little_later(
    cluster: Cluster, urls: Urls
) -> None:
    """Those that wait for its answer already get it when it goes on, and no error."""
    frozen = port(urls.replicas[0])

    async def read_in_time() -> tuple[Seen, float]:
        began = time.monotonic()
        return await (await shop.visitor()).read(), time.monotonic() - began

    async with opened(urls) as shop:
        async with readers(shop, 2) as before:
            await until(lambda: frozen in {each.port for each in before})
        with cluster.replicas[0].server.frozen():
            early = [asyncio.create_task(read_in_time()) for _ in range(4)]
            await asyncio.sleep(4)
            late = await asyncio.gather(*(read_in_time() for _ in range(10)))
            assert frozen not in {seen.port for seen, _ in late}
            assert max(took for _, took in late) < 3
        seen = [await each for each in early] + late
        assert {each.status for each, _ in seen} == {200}
        async with readers(shop, 2) as after:
            await until(lambda: frozen in {each.port for each in after[-20:]})


TERMINATE = {
    "postgresql": "SELECT pg_terminate_backend({})",
    "mysql": "KILL {}",
}


each_way_to_read = pytest.mark.parametrize(
    ("path", "status"),
    [("slow", 200), ("then-slow", 200), ("slow-snapshot", 200), ("then-slow-snapshot", 503)],
)


@each_way_to_read
async def test_a_read_whose_replica_is_lost_runs_again_on_the_primary(
    cluster: Cluster, urls: Urls, path: str, status: int
) -> None:
    """Not in a snapshot of which it has read something already."""
    async with opened(urls, urls.replicas[0]) as shop:
        visitor = await shop.visitor()
        assert (await visitor.read()).port == port(urls.replicas[0])
        reading = asyncio.create_task(visitor.read(path, 1500))
        await running_statement(urls.replicas[0], "sleep")
        backend = make_url(urls.primary).get_backend_name()
        async with outside(urls.replicas[0]) as connection:
            for client in await server_connections(urls.replicas[0]):
                if "sleep" in client.query.lower():
                    await connection.execute(TERMINATE[backend].format(client.id))
        seen = await reading
        assert seen == (
            Seen(200, 0, port(urls.primary)) if status == 200 else Seen(503, reason="down")
        )


@each_way_to_read
async def test_a_read_that_conflicts_with_recovery_runs_again(
    postgresql_cluster: Cluster, postgresql_urls: Urls, path: str, status: int
) -> None:
    cluster, urls = postgresql_cluster, postgresql_urls
    clusters.change(cluster.prompt.server, "max_standby_streaming_delay", "0")
    async with opened(urls, urls.prompt) as shop:
        visitor = await shop.visitor()
        assert (await visitor.read()).port == port(urls.prompt)
        reading = asyncio.create_task(visitor.read(path, 2000))
        await running_statement(urls.prompt, "sleep")
        async with outside(urls.primary) as connection:
            await connection.execute("ALTER TABLE item ADD COLUMN more INTEGER")
        assert (await reading).status == status
    clusters.change(cluster.prompt.server, "max_standby_streaming_delay", "30000")


async def test_where_the_pool_of_the_replica_is_full_the_primary_serves(
    cluster: Cluster, urls: Urls
) -> None:
    async with opened(urls, urls.replicas[0], **SMALL) as shop:
        slow, quick, third = [await shop.visitor() for _ in range(3)]
        assert (await quick.read()).port == port(urls.replicas[0])
        first = asyncio.create_task(slow.read("slow", 4000))
        await running_statement(urls.replicas[0], "sleep")
        assert await quick.read() == Seen(200, 0, port(urls.primary))
        second = asyncio.create_task(quick.read("slow", 4000))
        await running_statement(urls.primary, "sleep")
        began = time.monotonic()
        assert await third.read() == Seen(503, reason="busy")
        assert time.monotonic() - began < 1.9  # one wait, not one for each pool
        assert {each.status for each in await asyncio.gather(first, second)} == {200}


async def test_a_statement_that_was_cut_off_is_ended_on_its_replica(
    cluster: Cluster, urls: Urls
) -> None:
    async with opened(urls, urls.replicas[0]) as shop:
        visitor = await shop.visitor()
        assert (await visitor.read()).port == port(urls.replicas[0])
        await visitor.read("cut-off", 500)
        await assert_idle(urls.replicas[0])
        await assert_idle(urls.primary)
        assert (await visitor.read()).status == 200


async def test_a_replica_that_is_cut_from_its_primary_is_left_out(
    cluster: Cluster, urls: Urls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lacks a commit of this process for too long; no clock of a server is asked."""
    set_limits(monkeypatch, most_lag=1)
    replica = cluster.replicas[0]
    await asyncio.to_thread(replica.detach)
    try:
        async with opened(urls, urls.replicas[0]) as shop:
            writer, reader = await shop.visitor(), await shop.visitor()
            reader.id = writer.id
            assert (await writer.write()).status == 201
            old = await reader.read()
            assert old == Seen(200, 0, port(urls.replicas[0]))
            await asyncio.sleep(1.2)
            assert await reader.read() == Seen(200, 1, port(urls.primary))
            await asyncio.to_thread(replica.follow, cluster.primary)
            await reader.read_until(port(urls.replicas[0]))
            assert (await reader.read()).version == 1
    finally:
        await asyncio.to_thread(replica.follow, cluster.primary)


@pytest.mark.parametrize("is_missed", [True, False])
async def test_a_replica_that_comes_back_older_than_it_was_is_not_believed_to_be_as_far(
    postgresql_cluster: Cluster, postgresql_urls: Urls, is_missed: bool
) -> None:
    """After a crash a standby takes reads before it has replayed again all that it had."""
    urls, standby = postgresql_urls, postgresql_cluster.prompt
    async with opened(urls, urls.prompt) as shop:
        visitor = await shop.visitor()
        await asyncio.to_thread(sql, standby.server.url, "CHECKPOINT")
        assert (await visitor.write()).status == 201
        await visitor.read_until(port(urls.prompt))
        await asyncio.to_thread(standby.set_lag, 3600)
        async with stopped(standby):
            if is_missed:
                assert await visitor.read() == Seen(200, 1, port(urls.primary))
        for _ in range(40):
            assert (await visitor.read()).version == 1
            await asyncio.sleep(0.05)
        # Or else this test proves nothing.
        assert sql(urls.prompt, f"SELECT version FROM item WHERE id = {visitor.id}") == [(0,)]
        await asyncio.to_thread(standby.set_lag, 0)


# -- the primary -------------------------------------------------------------------------------


async def test_where_the_primary_is_down_reads_go_on_but_for_those_that_are_owed_more(
    cluster: Cluster, urls: Urls
) -> None:
    async with opened(urls) as shop:
        writer, earlier, anybody = [await shop.visitor() for _ in range(3)]
        assert (await earlier.write()).status == 201
        await asyncio.to_thread(cluster.wait_until_caught_up)
        assert (await earlier.read()).version == 1
        for replica in cluster.replicas:
            await asyncio.to_thread(replica.pause)
        assert (await writer.write()).status == 201
        await asyncio.to_thread(cluster.primary.stop, "immediate")
        try:
            for path in ("items", "snapshot"):
                for seen in await together(*(anybody.read(path) for _ in range(8))):
                    assert (seen.status, seen.version) == (200, 0)
                    assert seen.port in map(port, urls.replicas)
                assert (await earlier.read(path)).version == 1
                assert await writer.read(path) == Seen(503, reason="down")
            assert await anybody.read("fresh") == Seen(503, reason="down")
            assert await anybody.write() == Seen(503, reason="down")
        finally:
            await asyncio.to_thread(cluster.primary.start)
        for replica in cluster.replicas:
            await asyncio.to_thread(replica.resume)
        assert (await writer.write()).status == 201
        assert (await writer.read()).version == 2


async def test_where_the_primary_was_demoted_reads_go_on_and_writes_are_back_at_once(
    cluster: Cluster, urls: Urls
) -> None:
    async with opened(urls) as shop:
        visitors = [await shop.visitor() for _ in range(8)]
        assert {each.status for each in await together(*(one.write() for one in visitors))} == {201}
        await asyncio.to_thread(cluster.read_only)
        try:
            for _ in range(3):
                refused = await together(*(one.write() for one in visitors))
                assert set(refused) == {Seen(503, reason="down")}
                seen = await together(*(one.read() for one in visitors))
                assert {(each.status, each.version) for each in seen} == {(200, 1)}
        finally:
            await asyncio.to_thread(cluster.read_only, False)
        assert {each.status for each in await together(*(one.write() for one in visitors))} == {201}


# -- promotion ---------------------------------------------------------------------------------

WRITERS = 30


@dataclass
class Failover:
    """What writers were answered while a replica became the primary."""

    urls: Urls
    shop: Shop
    answers: list[tuple[float, Seen]] = field(default_factory=list[tuple[float, Seen]])

    def statuses(self, since: int = 0) -> Counter[tuple[int, str]]:
        """What the writers were answered."""
        return Counter((seen.status, seen.reason) for _, seen in self.answers[since:])


@asynccontextmanager
async def writers(failover: Failover) -> AsyncGenerator[list[Visitor]]:
    """Visitors who write, and read what they have written, until the end of the block."""

    async def go_on_writing(visitor: Visitor) -> None:
        while goes_on:
            written = await visitor.write()
            failover.answers.append((time.monotonic(), written))
            seen = await visitor.read()
            assert (seen.status, seen.reason) in ((200, ""), (503, "down"))
            if seen.status == 200:
                assert seen.version >= visitor.version
            await asyncio.sleep(0.01)

    goes_on = True
    visitors = [await failover.shop.visitor() for _ in range(WRITERS)]
    tasks = [asyncio.create_task(go_on_writing(visitor)) for visitor in visitors]
    try:
        yield visitors
    finally:
        goes_on = False
        await asyncio.gather(*tasks)


async def promote_under_writers(failover: Failover, switch: Callable[[], Any]) -> None:
    """Move the role of the primary to the first replica, and hold what came of it to account."""
    async with writers(failover) as visitors:
        await until(lambda: len(failover.answers) > 100)
        await asyncio.to_thread(switch)
        after = len(failover.answers)
        began = time.monotonic()
        await until(lambda: (201, "") in failover.statuses(after))
        first = next(at for at, seen in failover.answers[after:] if seen.status == 201)
        assert first - began < 5
        await until(lambda: failover.statuses(after)[201, ""] > 100)
    assert set(failover.statuses()) <= {(201, ""), (503, "down"), (503, "outcome-unknown")}
    rows = sql(failover.urls.replicas[0], "SELECT id, version FROM item")
    found = {int(id): int(version) for id, version in rows}
    for visitor in visitors:
        assert found[visitor.id] >= visitor.version


def of_both(urls: Urls) -> str:
    """The URL of the primary and the prompt standby, which leads to the one that takes writes."""
    first, second = (make_url(url) for url in (urls.primary, urls.prompt))
    query = {
        "host": [f"{each.host}:{each.port}" for each in (first, second)],
        "target_session_attrs": "read-write",
    }
    return first.set(host=None, port=None, query=query).render_as_string(hide_password=False)


async def test_a_standby_is_promoted_under_writers() -> None:
    with clusters.postgresql() as cluster:
        urls = cluster.create_database()
        url = of_both(urls)

        def switch() -> None:
            cluster.primary.stop("fast")  # which sends the standbys all that is committed
            cluster.prompt.promote()
            cluster.late.follow(cluster.prompt.server)

        async with tables(cluster, urls), opened(urls, url=url) as shop:
            await promote_under_writers(Failover(urls, shop), switch)
            visitor = await shop.visitor()
            assert (await visitor.write()).status == 201
            ((position,),) = sql(urls.prompt, "SELECT pg_current_wal_flush_lsn()::text")
            await until(lambda: cluster.late.shows(str(position)))
            await asyncio.to_thread(sql, cluster.late.server.url, "CHECKPOINT")
            await visitor.read_until(port(urls.late))  # whose timeline is known now
            assert (await visitor.read()).version == 1


async def test_a_replica_of_mariadb_is_promoted_under_writers() -> None:
    async with AsyncExitStack() as stack:
        cluster = stack.enter_context(clusters.mariadb())
        urls = cluster.create_database()
        proxy = stack.enter_context(SlowLink(port(urls.primary), 0))
        url = make_url(urls.primary).set(port=proxy.port).render_as_string(hide_password=False)

        def switch() -> None:
            cluster.read_only()
            cluster.wait_until_caught_up()
            proxy.target = port(urls.replicas[0])
            cluster.primary.stop("immediate")
            cluster.replicas[0].promote()

        await stack.enter_async_context(tables(cluster, urls))
        shop = await stack.enter_async_context(opened(urls, url=url))
        await promote_under_writers(Failover(urls, shop), switch)


# -- a history that nobody goes on with --------------------------------------------------------


async def write_elsewhere(visitor: Visitor) -> None:
    """Write, once the first refusal has made the pool look for the new primary."""
    async with asyncio.timeout(60):
        while (await visitor.write()).status != 201:  # noqa: ASYNC110 - it is a question
            await asyncio.sleep(0.02)


async def assert_own_writes(shop: Shop, primary: str, diverged: str) -> None:
    """A client finds its writes, though another server has come farther on a lost branch."""
    visitor = await shop.visitor()
    assert (await visitor.read()).port == port(diverged)  # or else this test proves nothing
    await write_elsewhere(visitor)
    for _ in range(10):
        assert await visitor.read() == Seen(200, visitor.version, port(primary))
        await asyncio.sleep(0.02)


async def test_standbys_that_are_ahead_on_a_lost_timeline_do_not_count_as_having_a_commit() -> None:
    """The old primary, which goes on with reads, and a standby that had received more of it."""
    with clusters.postgresql() as cluster:
        urls = cluster.create_database()
        url = of_both(urls)

        def fail_over() -> None:
            cluster.prompt.detach()
            lost = "INSERT INTO item SELECT number, 0 FROM generate_series(1000, 50000) AS number"
            sql(urls.primary, lost)
            cluster.wait_until_caught_up(cluster.late)
            cluster.read_only()
            cluster.prompt.promote()
            cluster.late.follow(cluster.prompt.server)

        async with tables(cluster, urls):
            await asyncio.to_thread(fail_over)
            async with opened(urls, urls.primary, url=url) as shop:
                await assert_own_writes(shop, urls.prompt, urls.primary)
            await asyncio.to_thread(cluster.primary.stop, "immediate")
            async with opened(urls, urls.late, url=url) as shop:
                await assert_own_writes(shop, urls.prompt, urls.late)
            lost = "SELECT count(*) FROM item WHERE id >= 1000"
            assert (sql(urls.prompt, lost), sql(urls.late, lost)) == ([(0,)], [(49001,)])


async def test_a_primary_of_mariadb_that_comes_back_is_not_believed_to_have_later_commits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with AsyncExitStack() as stack:
        cluster = stack.enter_context(clusters.mariadb())
        urls = cluster.create_database()
        proxy = stack.enter_context(SlowLink(port(urls.primary), 0))
        url = make_url(urls.primary).set(port=proxy.port).render_as_string(hide_password=False)
        (replica,) = cluster.replicas

        def fail_over() -> None:
            replica.detach()
            lost = [f"INSERT INTO item VALUES ({number}, 0)" for number in range(1000, 1100)]
            sql(urls.primary, *lost)
            cluster.read_only()
            replica.promote()
            proxy.target = port(urls.late)

        await stack.enter_async_context(tables(cluster, urls))
        await asyncio.to_thread(fail_over)
        shop = await stack.enter_async_context(opened(urls, urls.primary, url=url))
        await assert_own_writes(shop, urls.late, urls.primary)
        set_limits(monkeypatch, most_lag=1)
        code, output = await asyncio.to_thread(check, urls.late, urls.primary)
        assert code == 0, output
        assert "more than 1 s late" in output
