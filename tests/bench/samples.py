"""What was measured: samples, what they amount to, and a file of them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

from tests.bench.load import Load
from tests.contenders import OURS, Backend


@dataclass(frozen=True)
class Case:
    """What was served, and how it was driven.

    Attributes:
        route: `nothing`, `read` or `write`.
        clients: how many at once.
        pool: how many connections the pool has.
        workers: how many processes serve.
    """

    route: str
    clients: int
    pool: int
    workers: int = 1


@dataclass(frozen=True)
class Sample:
    """One slice of load on one contender.

    Attributes:
        measurement: what it is part of.
        round: in which turn; samples of the same turn were taken one after the other.
        missing: writes that went out, but are not in the table.
    """

    measurement: str
    backend: Backend
    contender: str
    case: Case
    round: int
    load: Load
    missing: int = 0


@dataclass(frozen=True)
class Spread:
    """A median, and between what it lies."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """That of some values, of which there is one at least."""
        found = sorted(values)
        return cls(median(found), found[0], found[-1])


@dataclass
class Measured:
    """All that a measurement has brought, and when.

    Attributes:
        samples: of load.
        facts: anything else, by contender, or by what it is.
    """

    name: str
    backend: Backend
    seed: int
    seconds: float = 0
    samples: list[Sample] = field(default_factory=list[Sample])
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    day: str = field(default_factory=lambda: f"{datetime.now(UTC):%Y-%m-%d}")

    @property
    def key(self) -> str:
        """What it is the last of."""
        return f"{self.name} {self.backend}"

    def cases(self) -> list[Case]:
        """Its cases, in their order."""
        return list(dict.fromkeys(sample.case for sample in self.samples))

    def of(self, contender: str, case: Case) -> list[Sample]:
        """The samples of a contender in a case, by their turns."""
        found = [s for s in self.samples if (s.contender, s.case) == (contender, case)]
        return sorted(found, key=lambda sample: sample.round)

    def rate(self, contender: str, case: Case) -> Spread | None:
        """Good answers per second; none where a contender has no part."""
        samples = self.of(contender, case)
        return Spread.of(sample.load.rate for sample in samples) if samples else None

    def ratio(self, contender: str, case: Case, ours: str = OURS.name) -> Spread | None:
        """How many times as much as the contender asgi-db serves, turn by turn."""
        others = {sample.round: sample.load.rate for sample in self.of(contender, case)}
        ratios = [
            sample.load.rate / others[sample.round]
            for sample in self.of(ours, case)
            if others.get(sample.round)
        ]
        return Spread.of(ratios) if ratios else None

    def latency(self, contender: str, case: Case) -> tuple[float, float] | None:
        """The medians over the turns of p50 and p99, in milliseconds."""
        loads = [sample.load for sample in self.of(contender, case) if sample.load.answers]
        if not loads:
            return None
        return median(load.p50 for load in loads), median(load.p99 for load in loads)

    def failures(self, contender: str, case: Case) -> int:
        """Whatever was not a good answer in time."""
        return sum(sample.load.failures for sample in self.of(contender, case))

    def missing(self, contender: str) -> int:
        """Writes that went out, but are not in the table."""
        return sum(sample.missing for sample in self.samples if sample.contender == contender)


Results: TypeAlias = Mapping[str, Measured]
"""Measurements by their keys."""


def merge(saved: Path, measured: Sequence[Measured]) -> dict[str, Measured]:
    """Put measurements in place of older ones in a file, and return all that are there now."""
    found = dict[str, Measured]()
    if saved.exists():
        found = {entry["key"]: _read(entry["measured"]) for entry in json.loads(saved.read_text())}
    found |= {one.key: one for one in measured}
    saved.parent.mkdir(parents=True, exist_ok=True)
    entries = [{"key": key, "measured": asdict(one)} for key, one in found.items()]
    saved.write_text(json.dumps(entries, indent=1))
    return found


def _read(entry: Any) -> Measured:
    entry["samples"] = [
        Sample(**(sample | {"case": Case(**sample["case"]), "load": Load(**sample["load"])}))
        for sample in entry["samples"]
    ]
    return Measured(**entry)
