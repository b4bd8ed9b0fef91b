"""Times in buckets, and the percentiles that are read from them."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterable

import pytest

from asgi_db import Database, transactional
from tests.internals import BOUNDS, BUCKETS, Histogram, no_counts


def of(times: Iterable[float]) -> Histogram:
    counts = no_counts()
    for seconds in times:
        counts[bisect_left(BOUNDS, seconds)] += 1
    return Histogram(tuple(counts))


def test_every_bucket_that_others_get_ends_at_a_bound_that_is_kept() -> None:
    assert set(BUCKETS) <= set(BOUNDS)
    assert list(BOUNDS) == sorted(BOUNDS)
    assert all(b / a <= 4 / 3 + 1e-9 for a, b in zip(BOUNDS, BOUNDS[1:], strict=False))


@pytest.mark.parametrize("percent", [1, 50, 95, 99, 100])
def test_a_percentile_is_right_within_one_bucket(percent: float) -> None:
    chance = random.Random(percent)
    times = sorted(chance.lognormvariate(-5, 1.5) for _ in range(5000))
    exact = times[max(0, round(len(times) * percent / 100) - 1)]
    found = of(times).percentile(percent)
    assert found is not None
    assert 0.74 * exact <= found <= 1.34 * exact or found <= BOUNDS[0]


def test_there_is_no_percentile_of_nothing() -> None:
    assert Histogram().percentile(95) is None
    assert Histogram().count == 0


def test_what_is_longer_than_all_bounds_counts_as_the_longest() -> None:
    assert of([1000.0]).percentile(50) == BOUNDS[-1]


def test_each_bucket_counts_what_is_at_most_as_long() -> None:
    found = of([0.0, 0.001, 0.0011, 0.5, 7, 1000])
    by_bound = dict(zip([*BUCKETS, None], found.cumulative(), strict=True))
    assert by_bound[0.001] == 2  # a time that is just a bound is within it
    assert by_bound[0.005] == 3
    assert by_bound[0.5] == 4
    assert by_bound[5.0] == 4
    assert by_bound[10.0] == 5
    assert by_bound[None] == found.count == 6


def test_two_are_added_up() -> None:
    assert of([0.1, 2]) + of([3]) == of([0.1, 2, 3])


async def test_each_unit_is_in_the_histograms_of_its_route(database_url: str) -> None:
    async with Database(database_url, engine_options={"pool_size": 1}) as database:
        for _ in range(3):
            async with database.transaction(transactional) as session:
                await session.connection()
        async with database.engine.connect():
            pass
        routes = database.stats().routes
    found = routes["`async with database.transaction()`"]
    for histogram, seconds in (
        (found.hold_times, found.held),
        (found.wait_times, found.waited),
        (found.busy_times, found.busy),
    ):
        assert histogram.count == found.units == 3
        longest = histogram.percentile(100)
        assert longest is not None and longest * 3 >= seconds * 0.7
    alone = routes["the engine, without a session"]
    assert (alone.hold_times.count, alone.wait_times.count, alone.busy_times.count) == (1, 0, 0)
