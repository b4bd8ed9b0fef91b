"""The tables, and the page around them."""

import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from tests import documents
from tests.bench.contests import (
    CLIENTS,
    DELAY,
    FAR_READ,
    NOTHING,
    POOLS,
    READ,
    READS,
    WORKERS,
    WRITE,
)
from tests.bench.memory import STEPS
from tests.bench.samples import Case, Measured, Spread
from tests.contenders import BARE, DATABASES, FIELD, OURS, SEED, Contender

BEGIN = "<!-- bench: begin -->"
END = "<!-- bench: end -->"

Results = Mapping[str, Measured]
"""Measurements by their keys."""

EARLY = "†"
"""The mark of who answers before the COMMIT."""

PACKAGES = ["starlette", "sqlalchemy", "asyncpg", "asyncmy", "uvicorn", "uvloop", "httptools"]


def page(results: Results, servers: Sequence[str], pictures: Mapping[str, str]) -> str:
    """All that stands between the markers of the document.

    Args:
        results: all measurements.
        servers: names and versions of the database servers.
        pictures: the paths of the plots, by the section that they belong to.
    """
    parts = [_description(results, servers)]
    for title, key, make in SECTIONS:
        if text := make(results):
            parts += [f"### {title}", text]
            if key in pictures:
                parts.append(f"![{title}]({pictures[key]})")
    return "\n\n".join(parts)


def tables(results: Results) -> str:
    """The tables alone."""
    found = [(title, make(results)) for title, _, make in SECTIONS]
    return "\n\n".join(f"{title}\n\n{text}" for title, text in found if text)


def write(document: Path, text: str) -> None:
    """Put a new text between the markers of the document."""
    documents.write_between(document, BEGIN, END, text)


def failures(measured: Measured, contender: str) -> int:
    """Requests of a contender that failed, and its writes that are not there."""
    cases = measured.cases()
    failed = sum(measured.failures(contender, case) for case in cases)
    return failed + abs(measured.missing(contender))


# -- what was aimed at -----------------------------------------------------------------------------


def targets(results: Results) -> str:
    """What was aimed at, and what came of it."""
    lines = list[list[str]]()

    def line(aim: str, found: Spread | None, holds: Callable[[float], bool], form: str) -> None:
        if found is not None:
            answer = "yes" if holds(found.median) else "no"
            lines.append([aim, form.format(found.median), _range(found, form), answer])

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


# -- the sections ----------------------------------------------------------------------------------


def _hold_time(results: Results) -> str:
    return _contest(results, "hold_time", [FAR_READ])


def _throughput(results: Results) -> str:
    return _contest(results, "throughput", [NOTHING, READ, WRITE])


_ROUTES = {"nothing": "no database", "read": "a read", "write": "a write"}


def _contest(results: Results, name: str, cases: Sequence[Case]) -> str:
    columns = [
        (measured, case)
        for backend in DATABASES
        if (measured := results.get(f"{name} {backend}")) is not None
        for case in cases
    ]
    head = ["contender"]
    for measured, case in columns:
        head += [f"{DATABASES[measured.backend]}: {_ROUTES[case.route]}", "asgi-db serves"]
    lines = list[list[str]]()
    for contender in FIELD:
        line = [_title(results, contender)]
        for measured, case in columns:
            rate, ratio = measured.rate(contender.name, case), measured.ratio(contender.name, case)
            line.append(f"{rate.median:,.0f}/s" if rate else "")
            is_other = ratio is not None and contender != OURS
            line.append(f"{ratio.median:.2f} × {_range(ratio)}" if ratio and is_other else "")
        lines.append([*line, _besides(columns, contender)])
    lines = [line for line in lines if any(line[1:])]
    if not lines:
        return ""
    text = documents.table([*head, "besides"], lines, range(1, len(head)))
    trips = [
        f"{measured.facts['round trip']:.2f} ms on {DATABASES[measured.backend]}"
        for measured, _ in columns
        if "round trip" in measured.facts
    ]
    return text + (f"\n\nA round trip, as measured: {', '.join(trips)}." if trips else "")


def _besides(columns: Sequence[tuple[Measured, Case]], contender: Contender) -> str:
    failed = sum(measured.failures(contender.name, case) for measured, case in columns)
    measurements = {id(measured): measured for measured, _ in columns}.values()
    missing = sum(measured.missing(contender.name) for measured in measurements)
    words = [f"{failed} failed"] if failed else []
    return "; ".join([*words, *([f"writes sent, but not there: {missing}"] if missing else [])])


def _latency(results: Results) -> str:
    measured = results.get("throughput postgresql")
    if measured is None:
        return ""
    lines = list[list[str]]()
    for contender in FIELD:
        cells = [_latency_cell(measured.latency(contender.name, case)) for case in READS]
        if any(cells):
            lines.append([_title(results, contender), *cells])
    head = ["contender", *(f"{clients} clients" for clients in CLIENTS)]
    return documents.table(head, lines, range(1, len(head)))


def _round_trips(results: Results) -> str:
    backends = [backend for backend in DATABASES if f"round_trips {backend}" in results]
    routes = ("nothing", "read", "write")
    head = ["contender"]
    head += [f"{DATABASES[backend]}: {_ROUTES[r]}" for backend in backends for r in routes]
    lines = list[list[str]]()
    for contender in FIELD:
        cells = list[str]()
        for backend in backends:
            found = results[f"round_trips {backend}"].facts.get(contender.name, {})
            cells += [f"{found[route]:g}" if found else "" for route in routes]
        if any(cells):
            early = "before the COMMIT" if _is_early(results, contender) else "after it"
            lines.append([_title(results, contender), *cells, early])
    if not lines:
        return ""
    return documents.table([*head, "a write is answered"], lines, range(1, len(head)))


def _held(results: Results) -> str:
    measured = results.get("held postgresql")
    if measured is None:
        return ""
    lines = list[list[str]]()
    for contender in FIELD:
        if points := measured.facts.get(contender.name):
            later = [number for seconds, number in points if seconds > 1]
            cells = [f"{mean(later):.2f}", str(max(later))]
            lines.append([_title(results, contender), *cells])
    return documents.table(["contender", "on average", "at most"], lines, {1, 2})


def _growth(results: Results) -> str:
    measured = results.get("growth postgresql")
    if measured is None:
        return ""
    head = ["contender", "workers", "pool", *(f"{n} clients" for n in CLIENTS), "512 : 64"]
    lines = list[list[str]]()
    for contender in FIELD:
        for workers in WORKERS:
            for pool in POOLS:
                cases = [Case("read", clients, pool, workers) for clients in CLIENTS]
                rates = [measured.rate(contender.name, case) for case in cases]
                cells = list[str]()
                for case, rate in zip(cases, rates, strict=True):
                    latency = _latency_cell(measured.latency(contender.name, case))
                    cells.append(f"{rate.median:,.0f}/s; {latency}" if rate else "")
                if rates[-1] is not None and rates[-2] is not None:
                    share = f"{rates[-1].median / rates[-2].median:.2f}"
                    lines.append([contender.title, str(workers), str(pool), *cells, share])
    return documents.table(head, lines, range(1, len(head)))


def _memory(results: Results) -> str:
    measured = results.get("memory postgresql")
    if measured is None:
        return ""
    head = ["kB for each of", *(f"{step:,}" for step in STEPS)]
    lines = list[list[str]]()
    for kind, words in {"socket": "WebSockets", "stream": "streams"}.items():
        for contender in (OURS, BARE):
            found = measured.facts[kind][contender.name]
            cells = [f"{found[str(step)] / 1000:.1f}" for step in STEPS]
            lines.append([f"{words}: {contender.title}", *cells])
    return documents.table(head, lines, range(1, len(head)))


def _cpu(results: Results) -> str:
    measured = results.get("cpu postgresql")
    if measured is None:
        return ""
    head = ["microseconds of CPU", "the bare route", "by hand", "asgi-db", "ratio", "on the clock"]
    lines = list[list[str]]()
    for route, found in measured.facts.items():
        cells = [
            f"{median(s[0] for s in found[name]):.1f}" if name in found else ""
            for name in ("bare", "hand", "asgi_db")
        ]
        if route == "nothing":
            ratios = [f"{added(measured).median:.3f} of what is added", ""]
        else:
            ratios = [f"{by_hand(measured, route, clock).median:.3f}" for clock in (0, 1)]
        lines.append([_ROUTES[route], *cells, *ratios])
    return documents.table(head, lines, range(1, len(head)))


def _imports(results: Results) -> str:
    measured = results.get("imports postgresql")
    if measured is None:
        return ""
    tries = measured.facts["seconds"]
    sqlalchemy, anyio, ours = (median(x) * 1000 for x in zip(*tries, strict=True))
    ratio = median((second + third) / first for first, second, third in tries)
    return (
        f"`import asgi_db` takes {ratio:.2f} of what `import sqlalchemy.ext.asyncio` takes before"
        f" it: {sqlalchemy:.0f} ms, then {anyio:.0f} ms for anyio and {ours:.0f} ms for the rest"
        f" (medians of {len(tries)} runs)."
    )


SECTIONS: list[tuple[str, str, Callable[[Results], str]]] = [
    ("Targets", "targets", targets),
    (f"A read with the database {DELAY * 1000:g} ms away", "hold_time", _hold_time),
    ("The database on the same machine", "throughput", _throughput),
    ("Latency of a read by clients (p50 / p99 in ms)", "latency", _latency),
    ("Round trips to the database", "round_trips", _round_trips),
    ("Connections held while 20 clients read slowly", "held", _held),
    ("Growth of a read (p50 / p99 in ms)", "growth", _growth),
    ("In the process", "cpu", _cpu),
    ("Memory for open connections", "memory", _memory),
    ("Import time", "imports", _imports),
]
"""Their titles, the names of their plots, and what makes them."""


# -- cells -----------------------------------------------------------------------------------------


def _is_early(results: Results, contender: Contender) -> bool:
    return any(
        measured.facts.get(contender.name, {}).get("early", False)
        for measured in results.values()
        if measured.name == "round_trips"
    )


def _title(results: Results, contender: Contender) -> str:
    return f"{contender.title} {EARLY}" if _is_early(results, contender) else contender.title


def _latency_cell(latency: tuple[float, float] | None) -> str:
    return f"{latency[0]:.3g} / {latency[1]:.3g}" if latency else ""


def _range(found: Spread, form: str = "{:.2f}") -> str:
    low, high = (form.format(x).removesuffix(" ×") for x in (found.low, found.high))
    return f"({low} to {high})"


def _description(results: Results, servers: Sequence[str]) -> str:
    days = " and ".join(sorted({measured.day for measured in results.values()}))
    seeds = " and ".join(map(str, sorted({measured.seed for measured in results.values()})))
    minutes = sum(measured.seconds for measured in results.values()) / 60
    names = [name for contender in FIELD for name in contender.packages]
    versions = documents.versions(sys.executable, [*names, *PACKAGES])
    return (
        f"Made on {days}, with seed {seeds}, on {os.cpu_count()} CPUs ({_processor()}, "
        f"{platform.system()}), Python {platform.python_version()}, {', '.join(servers)}; "
        f"{minutes:.0f} minutes.\nAll in one environment: {', '.join(versions)}.\n"
        f"{EARLY} answers a write before its COMMIT, so that it saves what the others wait for."
    )


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()
