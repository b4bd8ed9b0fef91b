"""Times counted in buckets, from which percentiles are read.

A time costs one look-up in a table of bounds, and a route keeps three lists of small numbers,
however many units of work it has had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
"""The upper bounds, in seconds, of the histograms that other systems get.

Source: OpenTelemetry's conventions, `db.client.operation.duration`.
https://opentelemetry.io/docs/specs/semconv/db/database-metrics/
"""

BOUNDS = tuple(
    float(f"{mantissa}e{exponent}")
    for exponent in range(-4, 2)
    for mantissa in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
)
"""The upper bounds, in seconds, of the histograms that are kept: from 0.1 ms to 80 s.

Each is at most a third above the one before, and all of `BUCKETS` are among them.
"""

_NOTHING = (0,) * (len(BOUNDS) + 1)


def no_counts() -> list[int]:
    """Return the counts of a histogram in which nothing has been counted yet."""
    return list(_NOTHING)


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many times lay between which bounds, at one moment.

    Attributes:
        counts: how many were at most as long as each of `BOUNDS` and longer than the one before;
            last, those that were longer than all of them.
    """

    counts: tuple[int, ...] = _NOTHING

    def __add__(self, other: Histogram) -> Histogram:
        """Count both together."""
        return Histogram(tuple(map(sum, zip(self.counts, other.counts, strict=True))))

    @property
    def count(self) -> int:
        """How many times have been counted."""
        return sum(self.counts)

    def percentile(self, percent: float) -> float | None:
        """Return the time, in seconds, that so many percent of all did not exceed.

        It is an estimate between the bounds of a bucket; None if nothing has been counted.
        """
        wanted = self.count * percent / 100
        if not wanted:
            return None
        below, lower = 0, 0.0
        for bound, count in zip(BOUNDS, self.counts, strict=False):
            if count and below + count >= wanted:
                return lower + (bound - lower) * (wanted - below) / count
            below, lower = below + count, bound
        return BOUNDS[-1]

    def cumulative(self, buckets: Sequence[float] = BUCKETS) -> list[int]:
        """Return how many were at most as long as each of these bounds, and last all of them.

        Args:
            buckets: upper bounds, in order, which are among `BOUNDS`.
        """
        up_to = dict(zip(BOUNDS, accumulate(self.counts), strict=False))
        return [*(up_to[bound] for bound in buckets), self.count]
