"""What replicas cost at the socket, also those who forge positions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import pytest

from tests.clusters import Cluster, Urls, port
from tests.limits import set_limits
from tests.own_writes import tables
from tests.relay import Relay
from tests.visitors import Seen, Shop, Visitor, opened, together

NAME = "asgi-db-db"
"""The name of the cookie and of the header."""


@pytest.fixture
async def urls(cluster: Cluster, urls: Urls) -> AsyncIterator[Urls]:
    async with tables(cluster, urls):
        yield urls


@dataclass
class Wired:
    """A shop, with a relay before its primary and before its replica, which count."""

    shop: Shop
    primary: Relay
    replica: Relay

    async def trips(self, visitor: Visitor, what: str, times: int = 5) -> tuple[float, float]:
        """The round trips to the primary and to the replica that one request takes."""
        for counted in (False, True):
            before = self.primary.round_trips, self.replica.round_trips
            for _ in range(times if counted else 10):  # a driver prepares what it meets often
                seen = await (visitor.write() if what == "write" else visitor.read())
                assert seen.status in (200, 201)
        return (
            (self.primary.round_trips - before[0]) / times,
            (self.replica.round_trips - before[1]) / times,
        )


@asynccontextmanager
async def wired(urls: Urls, replicas: bool = True) -> AsyncGenerator[Wired]:
    async with AsyncExitStack() as stack:
        primary = await stack.enter_async_context(Relay(urls.primary))
        replica = await stack.enter_async_context(Relay(urls.replicas[0]))
        through = Urls(primary.url, [replica.url] if replicas else [])
        yield Wired(await stack.enter_async_context(opened(through)), primary, replica)


@pytest.fixture
def undisturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection counts as idle and no replica as down, however slow the machine is."""
    set_limits(monkeypatch, verify_after_idle=1000, answer=60)


@pytest.mark.usefixtures("undisturbed")
async def test_a_write_takes_one_more_round_trip_on_postgresql_and_none_on_mariadb(
    cluster: Cluster, urls: Urls
) -> None:
    async with wired(urls, replicas=False) as without:
        alone = await without.trips(await without.shop.visitor(), "write")
    async with wired(urls) as with_replicas:
        visitor = await with_replicas.shop.visitor()
        both = await with_replicas.trips(visitor, "write")
    more = 1 if urls.primary.startswith("postgresql") else 0
    assert both == (alone[0] + more, 0)


@pytest.mark.usefixtures("undisturbed")
async def test_a_read_takes_no_more_round_trips_with_no_position_or_an_old_one(
    cluster: Cluster, urls: Urls
) -> None:
    async with wired(urls, replicas=False) as without:
        alone = await without.trips(await without.shop.visitor(), "read")
    async with wired(urls) as with_replicas:
        reader, writer = [await with_replicas.shop.visitor() for _ in range(2)]
        assert await with_replicas.trips(reader, "read") == (0, alone[0])
        assert (await writer.write()).status == 201
        await asyncio.to_thread(cluster.wait_until_caught_up)
        await writer.read_until(port(urls.replicas[0]))
        assert await with_replicas.trips(writer, "read") == (0, alone[0])


async def test_without_replicas_nothing_is_told(cluster: Cluster, urls: Urls) -> None:
    async with opened(Urls(urls.primary, [])) as shop:
        written = await (await shop.visitor()).http.post("/written/1/1")
        assert written.status_code == 201
        assert NAME not in written.headers and "set-cookie" not in written.headers


@pytest.mark.parametrize("where", ["cookie", "header"])
async def test_a_forged_position_reads_from_the_primary_and_seldom_asks_the_replica(
    cluster: Cluster, urls: Urls, where: str
) -> None:
    async with wired(urls) as site:
        visitor = await site.shop.visitor()
        position = (await visitor.http.post(f"/written/{visitor.id}/1")).headers[NAME]
        system, _, number = position.rpartition(":")
        visitor.http.cookies.clear()
        headers: dict[str, str] = {}
        futures = [f"{system}:{int(number) + 2**40}", f"{system}:{'9' * 30}", "abcdef:1"]
        await visitor.read()  # the replica has a connection
        began, before = time.monotonic(), site.replica.round_trips
        for turn in range(20):
            forged = futures[turn % len(futures)]
            if where == "header":
                headers = {NAME: forged}
            else:
                visitor.http.cookies.set(NAME, forged)
            seen = await together(*(visitor.read(**headers) for _ in range(10)))
            assert set(seen) == {Seen(200, 1, port(urls.primary))}
        took = time.monotonic() - began
        assert site.replica.round_trips - before <= 20 * took + 2


async def test_what_the_database_knows_of_its_replicas_counts_reads(
    cluster: Cluster, urls: Urls
) -> None:
    async with opened(urls, urls.replicas[0]) as shop:
        visitor = await shop.visitor()
        await together(*(visitor.read() for _ in range(7)))
        await asyncio.to_thread(cluster.replicas[0].pause)
        assert (await visitor.write()).status == 201
        assert (await visitor.read()).port == port(urls.primary)
        (replica,) = shop.database.stats().replicas
        assert replica.units == 7
        assert replica.behind == 1
        assert not replica.is_down
        assert str(port(urls.replicas[0])) in replica.name
        assert "password" not in repr(replica)
