"""What happens to an application on a Galera cluster of three nodes.

Like those in `scenarios.py`, each scenario says what is a try, and when it is survived.
"""

import asyncio
import time
from collections import Counter
from contextlib import AsyncExitStack
from importlib import import_module

from tests.chaos.client import Connection
from tests.chaos.scenarios import WRITERS, Scenario
from tests.chaos.world import Ledger, Outcome, World
from tests.relay import Relay
from tests.servers import Outside, outside, server_connections, sql

SECONDS_WITHOUT_QUORUM = 3

ENDED_WITHIN = 10.0
"""Seconds in which a statement that nobody waits for has to end."""

_KILLED = "connections of others killed"
_RAN_ON = "statements that ran on"
_UNEQUAL = "times without equal numbers"

_LONG = 60
"""Seconds that such a statement would take."""


async def node_killed(world: World) -> Outcome:
    """Another node is killed (SIGKILL) under 50 writers on the first, 4 times, and joins again.

    A try is a killed node; it is survived if a write succeeds within 10 s. (What is committed
    meanwhile waits until the others give the dead node up, which takes them 2 s here.)
    """
    outcome, ledger = Outcome(), Ledger()
    _, *others = world.galera.nodes
    async with world.serving() as server:
        async with world.writers(server.port, ledger, outcome, WRITERS):
            for number in range(world.times(4)):
                await asyncio.sleep(world.random.uniform(0.3, 0.8))
                node = others[number % len(others)]
                await asyncio.to_thread(node.stop, "immediate")
                outcome.tries += 1
                outcome.survived += await world.is_served_again(server.port, ledger, within=10)
                await asyncio.to_thread(node.start)
                await asyncio.to_thread(world.galera.wait_until_synced)
        await world.settle(server, ledger, outcome)
    await _compare_nodes(world, outcome)
    return outcome


async def no_quorum(world: World) -> Outcome:
    """The application's node is cut off from the two others, 3 times, under 50 writers.

    A node without the majority answers 1047 to everything, here for 3 s. A try is a cut; it is
    survived if nothing is acknowledged meanwhile, and the first request afterwards is served.
    """
    outcome, ledger = Outcome(), Ledger()
    node, *_ = world.galera.nodes
    async with world.serving() as server:
        async with world.writers(server.port, ledger, outcome, WRITERS):
            for _ in range(world.times(3)):
                await asyncio.sleep(world.random.uniform(0.3, 0.8))
                await asyncio.to_thread(world.galera.isolate, node)
                await asyncio.to_thread(world.galera.wait_until, node, ready=False)
                served = await world.is_served_again(
                    server.port, ledger, within=SECONDS_WITHOUT_QUORUM
                )
                await asyncio.to_thread(world.galera.reconnect, node)
                await asyncio.to_thread(world.galera.wait_until_synced)
                answer = await world.write(server.port, ledger)
                outcome.note(answer)
                outcome.tries += 1
                outcome.survived += answer.is_success and not served
        await world.settle(server, ledger, outcome)
    outcome.remark(ledger.refused("down"), "told that the database is down")
    await _compare_nodes(world, outcome)
    return outcome


async def balancer(world: World) -> Outcome:
    """A balancer gives connections to the nodes in turn, so that these give equal numbers.

    30 times a client goes away in the middle of a long statement, while two other applications,
    whose connections have the same number on the other nodes, are in the middle of theirs. A try is
    such a statement, survived if it ends within 10 s; or a connection of the others, survived if it
    is left alone.
    """
    outcome, ledger = Outcome(), Ledger()
    found = Counter[str]()
    async with Relay(world.url) as relay:
        relay.turn_to(world.url, *world.elsewhere)
        async with world.serving(url=relay.url) as server:
            for _ in range(world.times(30)):
                found += await _leave_beside_others(world, relay, server.port)
            await world.settle(server, ledger, outcome)
    outcome.tries, outcome.survived = found["tries"], found["survived"]
    outcome.leaked += found[_RAN_ON]
    for words in (_KILLED, _RAN_ON, _UNEQUAL):
        outcome.remark(found[words], words)
    return outcome


async def _leave_beside_others(world: World, relay: Relay, port: int) -> Counter[str]:
    """One time of `balancer`; the result are the tries, and what there is to be said of them."""
    await _level(world)
    async with AsyncExitStack() as stack:
        connections = relay.connections
        client = await Connection.open(port)
        client.send("GET", f"/long?seconds={_LONG}")
        while relay.connections == connections:  # noqa: ASYNC110 (there is no event of it)
            await asyncio.sleep(0.001)
        others = [await stack.enter_async_context(outside(relay.url)) for _ in range(2)]
        numbers = [(await other.execute("SELECT CONNECTION_ID()"))[0][0] for other in others]
        done = asyncio.Event()
        undisturbed = [asyncio.create_task(_is_left_alone(other, done)) for other in others]
        url, number = await _where_it_runs(world)
        # The next connection goes to any of the nodes.
        for _ in range(world.random.randrange(len(world.elsewhere) + 1)):
            async with outside(relay.url):
                pass
        client.leave(abruptly=True)
        ended = await _ends(url, number)
        done.set()
        alone = await asyncio.gather(*undisturbed)
        if not ended:
            sql(url, f"KILL {number}")
    return Counter(
        {
            "tries": 1 + len(others),
            "survived": ended + sum(alone),
            _KILLED: alone.count(False),
            _RAN_ON: int(not ended),
            _UNEQUAL: int(numbers != [number] * len(others)),
        }
    )


async def _level(world: World) -> None:
    """Let the next connection have the same number on each node."""
    next_numbers = dict[str, int]()
    for url in (world.url, *world.elsewhere):
        next_numbers[url] = await _number_of_a_connection(url)
    for url, number in next_numbers.items():
        while number < max(next_numbers.values()):
            number = await _number_of_a_connection(url)


async def _number_of_a_connection(url: str) -> int:
    async with outside(url) as connection:
        return int((await connection.execute("SELECT CONNECTION_ID()"))[0][0])


async def _is_left_alone(connection: Outside, done: asyncio.Event) -> bool:
    """Whether a connection works as long as its client wants it to."""
    try:
        while not done.is_set():
            await connection.execute("SELECT SLEEP(0.2)")
        await asyncio.sleep(0.5)  # who kills it may be late
        return await connection.execute("SELECT 1") == [(1,)]
    except import_module("asyncmy").errors.Error:
        return False


async def _where_it_runs(world: World, within: float = 20) -> tuple[str, int]:
    """The node that works at the long statement, and the number of its connection there."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        for url in (world.url, *world.elsewhere):
            for client in await server_connections(url):
                if client.query.startswith("SELECT SUM(SLEEP"):
                    return url, client.id
        await asyncio.sleep(0.02)
    raise RuntimeError("the long statement does not begin")


async def _ends(url: str, number: int) -> bool:
    """Whether a connection is at no statement any more, in time."""
    deadline = time.monotonic() + ENDED_WITHIN
    while any(client.id == number and client.query for client in await server_connections(url)):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.05)
    return True


async def _compare_nodes(world: World, outcome: Outcome) -> None:
    """Count what is on one node and not on the others: it would be lost with the node."""
    await asyncio.to_thread(world.galera.wait_until_synced)
    here, *elsewhere = [
        set(sql(url, "SELECT id FROM items")) for url in (world.url, *world.elsewhere)
    ]
    differing = sum(len(here ^ there) for there in elsewhere)
    outcome.lost += differing
    outcome.remark(differing, "not on all nodes")


ON_GALERA: dict[str, Scenario] = {
    scenario.__name__: scenario for scenario in (node_killed, no_quorum, balancer)
}
"""Those for a Galera cluster."""
