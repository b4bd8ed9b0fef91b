"""The table, and the machine on which it was made."""

import json
import os
import platform
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.chaos.contenders import CONTENDERS, Backend, Contender
from tests.chaos.world import Outcome

BEGIN = "<!-- chaos: begin -->"
END = "<!-- chaos: end -->"

DATABASES: dict[Backend, str] = {
    "postgresql": "PostgreSQL",
    "mysql": "MariaDB",
    "sqlite": "SQLite",
}

_VERSIONS = """
import importlib.metadata, json, sys
print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))
"""


@dataclass(frozen=True)
class Row:
    """What a contender did in a scenario.

    Attributes:
        seconds: how long it took.
        seed: of the run.
        day: of the run.
    """

    scenario: str
    contender: Contender
    backend: Backend
    outcome: Outcome
    seconds: float = 0
    seed: int = 0
    day: str = field(default_factory=lambda: f"{datetime.now(UTC):%Y-%m-%d}")

    @property
    def key(self) -> str:
        """What it is a row of."""
        return f"{self.scenario} {self.contender.name} {self.backend}"

    def cells(self) -> list[str]:
        """What stands in the table."""
        outcome = self.outcome
        left = [self.scenario.replace("_", " "), self.contender.title, DATABASES[self.backend]]
        if outcome.not_applicable:
            return [*left, "n/a", "", "", "", outcome.not_applicable]
        errors = [f"{number} × {kind}" for kind, number in Counter(outcome.errors).most_common()]
        numbers = [outcome.tries, outcome.survived, outcome.lost, outcome.leaked]
        return [*left, *map(str, numbers), "; ".join([*errors, *outcome.remarks])]


def table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown, aligned so that it can be read as it is."""
    head = ["scenario", "contender", "database", "tries", "survived", "lost", "leaked", "besides"]
    lines = [head, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head) - 1)]
    rule = ["-" * width + (":" if 3 <= n <= 6 else "-") for n, width in enumerate(widths)]
    text = [
        "| "
        + " | ".join(
            cell.rjust(width) if 3 <= n <= 6 else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=False))
        )
        + f" | {line[-1]} |"
        for line in lines
    ]
    return "\n".join([text[0], f"| {' | '.join(r[1:] for r in rule)} | --- |", *text[1:]])


def description(rows: Sequence[Row], servers: Sequence[str], environments: dict[bool, str]) -> str:
    """When and where the table was made, and of what.

    Args:
        rows: of the table.
        servers: names and versions of the database servers.
        environments: the interpreters, by whether their contenders are peers.
    """
    days = " and ".join(sorted({row.day for row in rows}))
    seeds = " and ".join(map(str, sorted({row.seed for row in rows})))
    minutes = sum(row.seconds for row in rows) / 60
    lines = [
        f"Made on {days}, with seed {seeds}, on {os.cpu_count()} CPUs ({platform.system()} "
        f"{platform.machine()}), Python {platform.python_version()}, {', '.join(servers)}, "
        f"SQLite {sqlite3.sqlite_version}; {minutes:.0f} minutes of scenarios, two at a time."
    ]
    for is_peer, python in environments.items():
        whose = "The other libraries" if is_peer else "asgi-db and plain `Depends`"
        lines.append(f"{whose}: {', '.join(_versions(python, is_peer))}.")
    return "\n".join(lines)


def write(document: Path, text: str) -> None:
    """Put a new text between the markers of the document."""
    before, _, rest = document.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    document.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def merge(saved: Path, rows: Sequence[Row]) -> list[Row]:
    """Put the rows in place of older ones in a file, and return all that are there now."""
    contenders = {contender.name: contender for contender in CONTENDERS}
    found = dict[str, Row]()
    if saved.exists():
        entries: list[dict[str, Any]] = json.loads(saved.read_text())
        for entry in entries:
            entry["contender"] = contenders[entry["contender"]["name"]]
            entry["outcome"] = Outcome(**entry["outcome"])
            row = Row(**entry)
            found[row.key] = row
    found |= {row.key: row for row in rows}
    saved.parent.mkdir(parents=True, exist_ok=True)
    saved.write_text(json.dumps([asdict(row) for row in found.values()], indent=1))
    return list(found.values())


def _versions(python: str, is_peer: bool) -> list[str]:
    names = dict.fromkeys(
        name
        for contender in CONTENDERS
        if contender.is_peer is is_peer
        for name in contender.packages
    )
    command = [python, "-c", _VERSIONS, *names, "starlette", "sqlalchemy", "asyncpg", "uvicorn"]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, str] = json.loads(answer)
    return [f"{name} {version}" for name, version in found.items()]
