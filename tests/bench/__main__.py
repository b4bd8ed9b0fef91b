"""`python -m tests.bench`: measure, print the tables."""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from tests import documents, servers
from tests.bench import load, report
from tests.bench.contests import growth, hold_time, throughput
from tests.bench.course import Course
from tests.bench.cpu import cpu
from tests.bench.imports import imports
from tests.bench.memory import memory
from tests.bench.samples import Measured, merge
from tests.bench.traffic import held, round_trips
from tests.contenders import FIELD, OURS, Backend
from tests.contenders.served import allow_many_sockets
from tests.options import add_choice

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "performance.md"
RESULTS = ROOT / ".build" / "bench.json"
"""All full measurements so far, the last of each."""

Measurement: TypeAlias = Callable[[Course], Measured]
EVERYWHERE: list[Measurement] = [round_trips, hold_time, throughput]
"""What is measured on each database."""
ON_POSTGRESQL: list[Measurement] = [held, growth, memory, imports, cpu]

BACKENDS: list[Backend] = ["postgresql", "mysql"]

SECONDS, ROUNDS = 2, 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for; the result is 1 if a request to asgi-db has failed."""
    options = _parse(arguments)
    load.require()
    allow_many_sockets()
    seed: int = options.seed if options.seed is not None else random.randrange(1_000_000)
    print(f"seed {seed}", file=sys.stderr, flush=True)
    results: Path = options.results or RESULTS
    is_saved = options.results is not None or not (options.quick or options.contender)
    found = dict[str, Measured]()
    backends: list[Backend] = [] if options.only_write else options.database or BACKENDS
    for backend in backends:
        start = servers.postgresql if backend == "postgresql" else servers.mariadb
        with start(own=True) as database:
            for measurement in _measurements(backend, options.only):
                measured = _run(measurement, backend, database, seed, options)
                found[measured.key] = measured
                if is_saved:
                    merge(results, [measured])
    shown = merge(results, []) if options.write or options.only_write else found
    text = report.tables(shown)
    if options.write or options.only_write:
        from tests.bench import plots  # matplotlib is in the environment of the other libraries

        document: Path = options.document
        pictures = plots.draw(shown, document.parent / "bench")
        text = report.page(shown, documents.server_versions(), pictures)
        report.write(document, text)
    print(text)
    failed = [one for one in found.values() if report.failures(one, OURS.name)]
    return int(bool(failed))


def _measurements(backend: Backend, only: Sequence[str]) -> list[Measurement]:
    every = [*EVERYWHERE, *ON_POSTGRESQL] if backend == "postgresql" else EVERYWHERE
    return [one for one in every if not only or one.__name__ in only]


def _run(
    measurement: Measurement,
    backend: Backend,
    database: servers.DatabaseServer,
    seed: int,
    options: argparse.Namespace,
) -> Measured:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="asgi-db-bench-") as folder:
        course = Course(
            contenders=[
                contender
                for contender in FIELD
                if not options.contender or contender.name in options.contender
                if backend == "postgresql" or not contender.is_for_postgresql_alone
            ],
            backend=backend,
            database=database,
            folder=Path(folder),
            seed=seed,
            random=random.Random(f"{seed} {measurement.__name__} {backend}"),
            seconds=1 if options.quick else options.seconds,
            rounds=1 if options.quick else options.rounds,
            share=0.1 if options.quick else 1,
        )
        measured = measurement(course)
    measured.seconds = time.monotonic() - began
    print(f"{measured.seconds:5.0f} s | {measured.key}", file=sys.stderr, flush=True)
    return measured


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench ARGS=...", description=__doc__)

    measurements = [one.__name__ for one in [*EVERYWHERE, *ON_POSTGRESQL]]
    add_choice(parser, "--only", measurements, "measurements")
    names = [contender.name for contender in FIELD]
    add_choice(parser, "--contender", names, "contenders, asgi_db being what ratios are to")
    add_choice(parser, "--database", BACKENDS, "databases")
    parser.add_argument("--seed", type=int, help="that of an earlier run; chosen if left out")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="of a slice of load")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="slices for each contender")
    parser.add_argument("--quick", action="store_true", help="a single second of each: a rehearsal")
    parser.add_argument(
        "--results",
        type=Path,
        help="keep the measurements in this file (full ones are kept in .build/bench.json)",
    )
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="for --write")
    parser.add_argument(
        "--only-write", action="store_true", help="measure nothing, and write what is kept"
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help=f"replace tables and plots of {DOCUMENT.name}; what this run leaves out is kept",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
