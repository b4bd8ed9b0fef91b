"""`python -m tests.chaos`: run the scenarios, print the table."""

import argparse
import multiprocessing
import os
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests import documents
from tests.chaos import report
from tests.chaos.report import Row
from tests.chaos.runner import SCENARIOS, Job, run
from tests.chaos.world import CLUSTERS, PLACES, Place
from tests.contenders import CONTENDERS, OURS, Contender
from tests.options import add_choice

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "reliability.md"
RESULTS = ROOT / ".build" / "chaos.json"
"""The rows of all full runs so far, the last of each."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; the result is 1 if our own contender is not clean."""
    options = _parse(arguments)
    seed: int = options.seed if options.seed is not None else random.randrange(1_000_000)
    print(f"seed {seed}", file=sys.stderr, flush=True)
    jobs = [
        Job(contender, place, scenarios, python, seed, options.scale)
        for contender in CONTENDERS
        if not options.contender or contender.name in options.contender
        for place in _places(contender)
        for python in [_python(contender, place, options)]
        if not options.database or place in options.database
        if (scenarios := _scenarios(place, options.only))
    ]
    spawn = multiprocessing.get_context("spawn")
    rows = list[Row]()
    with ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool:
        for result in pool.map(run, jobs):
            rows += result
            if options.scale == 1:
                report.merge(RESULTS, result)
    shown = report.merge(RESULTS, []) if options.write else rows
    text = _text(_sorted(shown), options)
    if options.write:
        report.write(DOCUMENT, text)
    print(text)
    return int(any(row.contender == OURS and not row.outcome.is_clean for row in rows))


def _text(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """The table of single servers, and that of clusters; for the document with what they are of."""
    servers = documents.server_versions() if options.write else []
    parts = list[str]()
    for is_cluster, title in ((False, ""), (True, "### Clusters")):
        shown = [row for row in rows if (row.place in CLUSTERS) is is_cluster]
        if shown and options.write:
            peers = options.peers_2_0 if is_cluster else options.peers
            environments = {False: sys.executable, True: peers}
            parts += [title, report.description(shown, servers, environments)]
        if shown:
            parts.append(report.table(shown))
    return "\n\n".join(filter(None, parts))


def _python(contender: Contender, place: Place, options: argparse.Namespace) -> str:
    """The interpreter of the environment in which a contender lives."""
    if not contender.is_peer:
        return sys.executable
    python: str = options.peers_2_0 if place == "standbys" else options.peers
    return python


def _places(contender: Contender) -> list[Place]:
    clusters: dict[Place, bool] = {
        "galera": "mysql" in contender.backends,
        "standbys": contender.reads_from_replicas,
    }
    return [*contender.backends, *(place for place, is_right in clusters.items() if is_right)]


def _scenarios(place: Place, only: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in SCENARIOS[place] if not only or name in only)


def _names() -> list[str]:
    """The scenarios, on whatever they take place, each once."""
    return list(dict.fromkeys(name for place in PLACES for name in SCENARIOS[place]))


def _sorted(rows: Sequence[Row]) -> list[Row]:
    scenarios, contenders = _names(), [contender.name for contender in CONTENDERS]
    places = list(PLACES)

    def place(row: Row) -> tuple[int, int, int]:
        return (
            scenarios.index(row.scenario),
            places.index(row.place),
            contenders.index(row.contender.name),
        )

    return sorted(rows, key=place)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make chaos ARGS=...", description=__doc__)

    add_choice(parser, "--only", _names(), "scenarios")
    add_choice(parser, "--contender", [one.name for one in CONTENDERS], "contenders")
    add_choice(parser, "--database", list(PLACES), "databases")
    parser.add_argument("--seed", type=int, help="that of an earlier run; chosen if left out")
    parser.add_argument("--scale", type=float, default=1, help="multiplies the numbers of tries")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="contenders at a time")
    parser.add_argument(
        "--peers",
        type=os.path.abspath,
        default=sys.executable,
        help="Python of the environment of the other libraries",
    )
    parser.add_argument(
        "--peers-2-0",
        type=os.path.abspath,
        default=sys.executable,
        help="the same with SQLAlchemy 2.0, for routing to standbys",
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help=f"replace the table in {DOCUMENT.name}; what this run leaves out is kept as it was",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
