"""The table, and the machine on which it was made."""

import json
import os
import platform
import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests import documents
from tests.chaos.world import PLACES, Outcome, Place
from tests.contenders import CONTENDERS, Contender

BEGIN = "<!-- chaos: begin -->"
END = "<!-- chaos: end -->"


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
    place: Place
    outcome: Outcome
    seconds: float = 0
    seed: int = 0
    day: str = field(default_factory=lambda: f"{datetime.now(UTC):%Y-%m-%d}")

    @property
    def key(self) -> str:
        """What it is a row of."""
        return f"{self.scenario} {self.contender.name} {self.place}"

    def cells(self) -> list[str]:
        """What stands in the table."""
        outcome = self.outcome
        left = [self.scenario.replace("_", " "), self.contender.title, PLACES[self.place]]
        if outcome.not_applicable:
            return [*left, "n/a", "", "", "", outcome.not_applicable]
        errors = [f"{number} × {kind}" for kind, number in Counter(outcome.errors).most_common()]
        numbers = [outcome.tries, outcome.survived, outcome.lost, outcome.leaked]
        return [*left, *map(str, numbers), "; ".join([*errors, *outcome.remarks])]


def table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown, aligned so that it can be read as it is."""
    head = ["scenario", "contender", "database", "tries", "survived", "lost", "leaked", "besides"]
    return documents.table(head, [row.cells() for row in rows], range(3, 7))


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
        contenders = [row.contender for row in rows if row.contender.is_peer is is_peer]
        if contenders:
            lines.append(f"{whose}: {', '.join(_versions(python, contenders))}.")
    return "\n".join(lines)


def write(document: Path, text: str) -> None:
    """Put a new text between the markers of the document."""
    documents.write_between(document, BEGIN, END, text)


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


def _versions(python: str, contenders: Sequence[Contender]) -> list[str]:
    names = [name for contender in contenders for name in contender.packages]
    return documents.versions(python, [*names, "starlette", "sqlalchemy", "asyncpg", "uvicorn"])
