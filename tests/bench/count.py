"""`make count`: the machine instructions of a request, which no noise of the machine changes.

Valgrind's callgrind counts what the process executes, with all its threads and without the
database server. Each application serves a few requests, and three times as many, in a process of
its own; the difference is what the further requests have cost. All these processes are forked from
one that has imported everything, because imports are slow under valgrind.

Source: https://valgrind.org/docs/manual/cl-manual.html
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TypeAlias

from tests import documents, servers
from tests.bench.cpu import applications, ask
from tests.contenders.served import create_table
from tests.programs import VALGRIND

ROOT = Path(__file__).parents[2]
BACKENDS = ("sqlite", "postgresql", "mysql")
TITLES = {"sqlite": "SQLite", "postgresql": "PostgreSQL", "mysql": "MariaDB"}
CONTENDERS = {
    "nothing": ("bare", "hand", "asgi_db"),
    "read": ("hand", "asgi_db"),
    "write": ("hand", "asgi_db"),
    "plain read": ("hand", "asgi_db"),
    "five reads": ("hand", "asgi_db"),
}
"""By what a request does: the bare route, the same by hand, and asgi-db."""
ROUTES = {
    "nothing": "no statement",
    "read": "`read_only`, one read",
    "write": "`transactional`, one write",
    "plain read": "`plain`, one read",
    "five reads": "`read_only`, five reads",
}
WARM_UP = 10
"""Requests before the first that counts: caches are filled, and the connection is there."""

Counts: TypeAlias = dict[str, dict[str, float]]
"""Instructions of one request, by what it does and by the application."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Count on each database, and print a table for each."""
    options = _parse(arguments)
    if VALGRIND.wanted:
        sys.exit(VALGRIND.advice)
    for backend in options.database or BACKENDS:
        counts = count(backend, options.only or list(CONTENDERS), options.requests)
        print(f"\n{table(backend, counts)}", flush=True)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.count", description=__doc__)
    parser.add_argument("--database", choices=BACKENDS, action="append")
    parser.add_argument("--only", choices=list(CONTENDERS), action="append")
    parser.add_argument("--requests", type=int, default=100, help="N; 3 N are served too")
    return parser.parse_args(arguments)


def count(backend: str, kinds: Sequence[str], requests: int) -> Counts:
    """Count the instructions of one request of each kind and application."""
    with tempfile.TemporaryDirectory() as folder, _database(backend, Path(folder)) as url:
        asyncio.run(create_table(url))
        jobs = [
            (kind, name, number)
            for kind in kinds
            for name in CONTENDERS[kind]
            for number in (requests, 3 * requests)
        ]
        totals = _totals(url, jobs, Path(folder))
    found: Counts = {kind: {} for kind in kinds}
    for few, many in zip(totals[::2], totals[1::2], strict=True):
        (kind, name, number), instructions = few
        found[kind][name] = (many[1] - instructions) / (2 * number)
    return found


Job: TypeAlias = tuple[str, str, int]
"""What the requests do, which application serves them, and how many."""


def _totals(url: str, jobs: Sequence[Job], folder: Path) -> list[tuple[Job, int]]:
    """The instructions of a process for each job, with those of its start."""
    done = subprocess.run(
        [
            "valgrind",
            "--quiet",
            "--tool=callgrind",
            f"--callgrind-out-file={folder}/%p",
            sys.executable,
            "-c",
            "from tests.bench.count import serve; serve()",
            url,
            json.dumps(jobs),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    pids = [int(line) for line in done.stdout.splitlines()]
    return [(job, total_of(folder / str(pid))) for job, pid in zip(jobs, pids, strict=True)]


def total_of(file: Path) -> int:
    """The total of one output file of callgrind."""
    for line in file.read_text().splitlines():
        if line.startswith("summary:"):
            return int(line.split()[1])
    raise RuntimeError(f"callgrind has written no total into {file.name}")


def serve() -> None:
    """Serve each job in a process of its own, and print the numbers of these processes."""
    url, jobs = sys.argv[1], json.loads(sys.argv[2])
    os.environ["DATABASE_URL"] = url
    import_module("tests.contenders.shared")  # its table, before the processes are forked

    gc.freeze()
    for kind, name, number in jobs:
        pid = os.fork()
        if not pid:
            asyncio.run(_serve(url, kind, name, number))
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            sys.exit(f"{name}: {kind} has failed")
        print(pid, flush=True)


async def _serve(url: str, kind: str, name: str, number: int) -> None:
    async with applications(url) as found:
        for _ in range(WARM_UP + number):
            await ask(found[kind][name])


@contextmanager
def _database(backend: str, folder: Path) -> Generator[str]:
    if backend == "sqlite":
        yield f"sqlite+aiosqlite:///{folder}/count.db"
        return
    start = servers.postgresql if backend == "postgresql" else servers.mariadb
    with start(own=True) as server, server.fresh_database() as url:
        yield url


def table(backend: str, counts: Counts) -> str:
    """Instructions in thousands, and the ratio of asgi-db to the same by hand."""
    lines = list[list[str]]()
    for kind, found in counts.items():
        bare = found.get("bare", 0.0)
        ratio = (found["asgi_db"] - bare) / (found["hand"] - bare)
        cells = [f"{found[name] / 1000:,.0f}" for name in ("hand", "asgi_db")]
        lines.append([ROUTES[kind], *cells, f"{ratio:.2f}{' of what is added' if bare else ''}"])
    head = [f"thousands of instructions, {TITLES[backend]}", "by hand", "asgi-db", "ratio"]
    return documents.table(head, lines, range(1, len(head)))


if __name__ == "__main__":
    sys.exit(main())
