"""What happens to an application on PostgreSQL with standbys.

Like those in `scenarios.py`, each scenario says what is a try, and when it is survived.
"""

import asyncio
from contextlib import ExitStack

from sqlalchemy.engine import make_url

from tests.chaos.client import request
from tests.chaos.scenarios import Scenario
from tests.chaos.world import Ledger, Outcome, World, repeat
from tests.pgbouncer import pgbouncer, through
from tests.relay import Relay
from tests.servers import DatabaseServer, assert_disconnected, outside, sql

CLIENTS = 20

LATER = 0.4
"""Seconds after which a client reads again: more than the replica is late."""

PAUSE = 2.0
"""Seconds for which the standby gets nothing before the primary dies."""


async def own_writes(world: World) -> Outcome:
    """2,000 × a write, and two reads by its client: at once, and 0.4 s later.

    The application reads from a standby that is 200 ms late. A try is a read; it is survived if it
    finds what the client has written. Clients send back the cookies that they get.
    """
    outcome = Outcome()
    *_, late = world.elsewhere
    await _write_and_read(world, outcome, 2000, world.url, late)
    outcome.remark(await _reads_on(late), "reads served by the standby")
    return outcome


async def pgbouncer_before_each(world: World) -> Outcome:
    """The same, 1,000 times, with a PgBouncer in transaction pooling before each server."""
    outcome = Outcome()
    *_, late = world.elsewhere
    with ExitStack() as stack:
        primary, replica = [
            through(await asyncio.to_thread(stack.enter_context, pgbouncer(url, pool_size=10)), url)
            for url in (world.url, late)
        ]
        await _write_and_read(world, outcome, 1000, primary, replica, IS_POOLED="1")
    outcome.remark(await _reads_on(late), "reads served by the standby")
    return outcome


async def failover_synchronous(world: World) -> Outcome:
    """The primary dies under 30 writers while its standby gets nothing, and the standby takes over.

    The primary waits for the standby before it acknowledges (`synchronous_standby_names`); the
    application has both in its URL. A try is a failover; it is survived if a write succeeds within
    5 s after it.
    """
    return await _fail_over(world, synchronous="*")


async def failover_asynchronous(world: World) -> Outcome:
    """The same with a primary that does not wait: what the standby has not got yet is lost.

    No application can change that, so that it counts as lost, but not as a fault of asgi-db.
    """
    return await _fail_over(world, synchronous="")


async def _write_and_read(
    world: World,
    outcome: Outcome,
    number: int,
    primary: str,
    replica: str,
    **environment: str,
) -> None:
    ledger, early = Ledger(), 0
    async with world.serving(url=primary, REPLICA_URLS=replica, **environment) as server:

        async def write_and_read(_: int) -> None:
            nonlocal early
            id = ledger.new_id()
            ledger.answers[id] = written = await request(server.port, "POST", f"/items/{id}")
            outcome.note(written)
            for pause in (0, LATER):
                await asyncio.sleep(pause)
                found = await request(server.port, "GET", f"/items/{id}", headers=written.cookies)
                if found.status == 404:
                    early += 1
                else:
                    outcome.note(found)
                outcome.tries += 1
                outcome.survived += found.is_success

        await repeat(world.times(number), CLIENTS, write_and_read)
        await world.settle(server, ledger, outcome)
    outcome.remark(early, "reads that missed the client's own write")


async def _reads_on(url: str) -> int:
    """How many reads of the table a server has counted, which it does as its clients leave."""
    await assert_disconnected(url)
    async with outside(url) as connection:
        ((reads,),) = await connection.execute(
            "SELECT seq_scan + coalesce(idx_scan, 0) FROM pg_stat_user_tables"
            " WHERE relname = 'items'"
        )
    return int(reads)


async def _fail_over(world: World, synchronous: str) -> Outcome:
    outcome, ledger = Outcome(tries=1, server_loses=not synchronous), Ledger()
    cluster, standby_url = world.standbys, world.elsewhere[0]
    standby = cluster.prompt
    await asyncio.to_thread(cluster.late.detach)
    async with Relay(world.url) as relay:
        await asyncio.to_thread(standby.follow, DatabaseServer(relay.url))
        await asyncio.to_thread(cluster.wait_until_caught_up, standby)
        await asyncio.to_thread(_set_synchronous, cluster.primary, synchronous)
        async with world.serving(url=_url_of_both(world.url, standby_url)) as server:
            async with world.writers(server.port, ledger, outcome, 30):
                await asyncio.sleep(2)
                relay.freeze()
                await asyncio.sleep(PAUSE)
                await asyncio.to_thread(cluster.primary.stop, "immediate")
                relay.cut()
                await asyncio.to_thread(standby.promote)
                world.url, world.elsewhere = standby_url, []
                outcome.survived += await world.is_served_again(server.port, ledger, within=5)
                await asyncio.sleep(1)
            await world.settle(server, ledger, outcome)
    outcome.remark(ledger.refused("down"), "told that the database is down")
    answers = ledger.answers.values()
    acknowledged = sum(answer is not None and answer.is_success for answer in answers)
    outcome.remark(acknowledged, "acknowledged")
    return outcome


def _set_synchronous(primary: DatabaseServer, names: str) -> None:
    sql(
        primary.url,
        f"ALTER SYSTEM SET synchronous_standby_names = '{names}'",
        "SELECT pg_reload_conf()",
    )


def _url_of_both(first: str, second: str) -> str:
    """A URL that names two servers, of which the one that takes writes is meant."""
    hosts = [f"{url.host}:{url.port}" for url in map(make_url, (first, second))]
    query = {"host": hosts, "target_session_attrs": "read-write"}
    url = make_url(first).set(host=None, port=None).update_query_dict(query)
    return url.render_as_string(hide_password=False)


ON_STANDBYS: dict[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (
        own_writes,
        pgbouncer_before_each,
        failover_synchronous,
        failover_asynchronous,
    )
}
"""Those for a primary with its standbys."""
