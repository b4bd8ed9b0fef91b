"""The calculator of `asgi-db check --rate`, beside a simulation, beside a real application."""

from __future__ import annotations

import random
from fractions import Fraction
from math import factorial, inf

import pytest
from sqlalchemy import make_url

from tests.capacity import arrivals, measure, share_above, simulate
from tests.internals import FEW, Queue, pools_of_servers, smallest_pool

# -- Erlang C ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("connections", "in_use", "waiting"),
    [
        (1, 0.5, 0.5),  # with one connection the share that waits is the share in use
        (2, 1, 1 / 3),
        (3, 2, 4 / 9),
        (10, 6, 0.1013),
        (11, 10, 0.682),  # the usual example of tables for call centres: 200 calls of 3 minutes
        (12, 10, 0.449),
        (13, 10, 0.285),
        (14, 10, 0.174),
    ],
)
def test_the_share_that_waits_is_that_of_the_tables(
    connections: int, in_use: float, waiting: float
) -> None:
    queue = Queue(connections, rate=10 * in_use, hold=0.1)
    assert queue.waiting == pytest.approx(waiting, rel=0.002)
    assert queue.mean_wait == pytest.approx(queue.waiting * 0.1 / (connections - in_use))


@pytest.mark.parametrize("connections", [1, 2, 15, 30, 60, 200])
@pytest.mark.parametrize("share", [Fraction(1, 100), Fraction(1, 2), Fraction(19, 20)])
def test_it_is_the_formula_as_it_is_written_in_exact_numbers(
    connections: int, share: Fraction
) -> None:
    load = connections * share
    all_busy = load**connections / factorial(connections) / (1 - share)
    some_free = sum(load**n / factorial(n) for n in range(connections))
    exact = all_busy / (some_free + all_busy)
    assert Queue(connections, float(load), 1).waiting == pytest.approx(float(exact), rel=1e-9)


def test_a_pool_that_is_full_makes_all_wait_for_ever() -> None:
    for rate in (100, 101):
        queue = Queue(10, rate, hold=0.1)
        assert (queue.waiting, queue.mean_wait, queue.full_at) == (1, inf, 100)


@pytest.mark.parametrize("in_use", [0.001, 0.9, 1, 4, 37.5, 400])
def test_the_smallest_pool_is_enough_and_one_connection_less_is_not(in_use: float) -> None:
    enough = smallest_pool(in_use)
    assert Queue(enough, in_use, 1).waiting <= FEW
    assert enough == 1 or Queue(enough - 1, in_use, 1).waiting > FEW


def test_a_server_that_is_a_replica_too_gets_two_pools_of_each_process() -> None:
    url = make_url("postgresql://app@/shop?host=pg1:5432&host=pg2:5432")
    replicas = [make_url(f"postgresql://app@{host}/shop") for host in ("pg2", "pg3:5432", "pg3:1")]
    assert pools_of_servers(url, replicas) == {"pg1": 1, "pg2": 2, "pg3": 1, "pg3:1": 1}


# -- the simulation ------------------------------------------------------------------------------


@pytest.mark.parametrize(("connections", "share"), [(1, 0.5), (5, 0.8), (10, 0.7), (15, 0.9)])
def test_the_simulation_finds_what_the_calculator_says(connections: int, share: float) -> None:
    queue = Queue(connections, share * connections, 1)
    waits = simulate(connections, arrivals(queue.rate, 1, 200_000, random.Random(connections)))
    assert share_above(0, waits) == pytest.approx(queue.waiting, rel=0.05)
    assert sum(waits) / len(waits) == pytest.approx(queue.mean_wait, rel=0.15)


def test_many_small_pools_make_more_requests_wait_than_one_large_one() -> None:
    """As the page says of processes, each of which gets its share of the requests by chance."""
    chance = random.Random(40)
    uses = arrivals(600, 0.05, 100_000, chance)
    one = simulate(40, uses)
    shares = [[use for use in uses if chance.random() < 0.25] for _ in range(4)]
    many = [wait for share in shares for wait in simulate(10, share)]
    assert share_above(0, one) == pytest.approx(Queue(40, 600, 0.05).waiting, rel=0.15)
    assert share_above(0, many) == pytest.approx(Queue(10, 150, 0.05).waiting, rel=0.15)
    assert share_above(0, many) > 4 * share_above(0, one)


async def test_as_many_requests_of_a_real_application_wait_as_the_simulation_says(
    postgresql_url: str,
) -> None:
    """It is told when each has really asked, and how long it has really held its connection."""
    connections, hold = 4, 0.04
    uses = arrivals(0.75 * connections / hold, hold, 200, random.Random(4))
    run = await measure(postgresql_url, connections, uses)
    assert run.stats.units == len(run.waits) == 200
    assert run.stats.timeouts == 0
    assert run.hold >= sum(use.held for use in uses) / 200  # the sleep, and what else it takes

    simulated = simulate(connections, run.uses)
    waited, expected = (share_above(hold / 10, waits) for waits in (run.waits, simulated))
    assert waited == pytest.approx(expected, abs=0.1)
    assert run.wait == pytest.approx(sum(simulated) / 200, rel=0.4)
    # A busy machine makes requests hold for longer, until there are too few connections.
    assert run.in_use == pytest.approx(min(run.computed.utilization, 1), rel=0.25)
    # With one connection more or less, the simulation is further from what was measured.
    waits = {n: sum(simulate(n, run.uses)) / 200 for n in (3, connections, 5)}
    assert min(waits, key=lambda n: abs(waits[n] - run.wait)) == connections
