"""The page: all tables and plots, and of what they were made."""

import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests import documents
from tests.bench import sections
from tests.bench.cells import EARLY
from tests.bench.contests import (
    DELAY,
)
from tests.bench.samples import Measured, Results
from tests.bench.targets import targets
from tests.contenders import FIELD

SECTIONS: list[tuple[str, str, Callable[[Results], str]]] = [
    ("Targets", "targets", targets),
    (f"A read with the database {DELAY * 1000:g} ms away", "hold_time", sections.hold_time),
    ("The database on the same machine", "throughput", sections.throughput),
    ("Latency of a read by clients (p50 / p99 in ms)", "latency", sections.latency),
    ("Round trips to the database", "round_trips", sections.round_trips),
    ("Connections held while 20 clients read slowly", "held", sections.held),
    ("Growth of a read (p50 / p99 in ms)", "growth", sections.growth),
    ("In the process", "cpu", sections.cpu),
    ("Memory for open connections", "memory", sections.memory),
    ("Import time", "imports", sections.imports),
]
"""Their titles, the names of their plots, and what makes them."""


BEGIN = "<!-- bench: begin -->"
END = "<!-- bench: end -->"

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
