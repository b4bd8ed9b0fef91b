"""What was aimed at, and whether it is reached."""

from collections.abc import Callable
from statistics import median
from typing import Any

from tests import documents
from tests.bench.cells import between
from tests.bench.contests import FAR_READ
from tests.bench.samples import Measured, Results, Spread
from tests.contenders import DATABASES, FIELD, OURS, SEED, Contender


def targets(results: Results) -> str:
    """What was aimed at, and what came of it."""
    lines = list[list[str]]()

    def line(aim: str, found: Spread | None, holds: Callable[[float], bool], form: str) -> None:
        if found is not None:
            answer = "yes" if holds(found.median) else "no"
            lines.append([aim, form.format(found.median), between(found, form), answer])

    for backend in DATABASES:
        far = results.get(f"hold_time {backend}")
        if far is None:
            continue
        where = f"reads per second on {DATABASES[backend]}, 1 ms away"
        seed = far.ratio(SEED.name, FAR_READ)
        line(f"{where}: at least 4 × {SEED.title}", seed, lambda x: x >= 4, "{:.2f} ×")
        if best := best_public(far):
            ratio = far.ratio(best.name, FAR_READ)
            aim = f"{where}: at least 2.5 × the best library ({best.title})"
            line(aim, ratio, lambda x: x >= 2.5, "{:.2f} ×")
    if cpu := results.get("cpu postgresql"):
        aim = "a route without database: what the middleware adds, at most 1/10 of"
        aim += " `async with sessionmaker()`"
        line(aim, added(cpu), lambda x: x <= 0.1, "{:.2f} ×")
        for route in ("read", "write"):
            aim = f"CPU time of a {route}: at most 1.02 × the same by hand"
            line(aim, by_hand(cpu, route, 0), lambda x: x <= 1.02, "{:.3f} ×")
    if not lines:
        return ""
    return documents.table(["target", "measured", "between", "reached"], lines, {1, 2})


def best_public(measured: Measured) -> Contender | None:
    """The library, other than ours, that serves most reads from afar."""
    rates = {
        contender.name: rate.median
        for contender in FIELD
        if contender.is_public and contender != OURS
        if (rate := measured.rate(contender.name, FAR_READ)) is not None
    }
    return max(
        (contender for contender in FIELD if contender.name in rates),
        key=lambda contender: rates[contender.name],
        default=None,
    )


def by_hand(measured: Measured, route: str, clock: int) -> Spread:
    """What asgi-db takes over what the same by hand takes, slice by slice.

    Args:
        measured: the measurement `cpu`.
        route: `read` or `write`.
        clock: 0 for CPU time, 1 for the time on the clock.
    """
    found = measured.facts[route]
    pairs = zip(found["asgi_db"], found["hand"], strict=True)
    return _middle(ours[clock] / theirs[clock] for ours, theirs in pairs)


def added(measured: Measured) -> Spread:
    """What the middleware adds to a bare route over what a session by hand adds, by slices."""
    found = measured.facts["nothing"]
    slices = zip(found["asgi_db"], found["hand"], found["bare"], strict=True)
    return _middle((ours[0] - bare[0]) / (theirs[0] - bare[0]) for ours, theirs, bare in slices)


def _middle(values: Any) -> Spread:
    """The median, and between what the middle half lies: single slices are short."""
    found = sorted(values)
    quarter = len(found) // 4
    return Spread(median(found), found[quarter], found[-1 - quarter])
