"""What a measurement works with."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.samples import Measured
from tests.contenders import Backend, Contender
from tests.servers import DatabaseServer


@dataclass(frozen=True)
class Course:
    """A database server, who takes part, and for how long.

    Attributes:
        contenders: those that can use the database.
        folder: an empty folder.
        seed: where every chance comes from.
        seconds: of a slice of load.
        rounds: how many slices each contender gets in each case.
        share: by which other numbers of tries are multiplied.
    """

    contenders: Sequence[Contender]
    backend: Backend
    database: DatabaseServer
    folder: Path
    seed: int
    seconds: float
    rounds: int
    share: float
    random: random.Random
    ids: Iterator[int] = field(default_factory=lambda: itertools.count(1_000_000, 1_000_000))

    @property
    def few_rounds(self) -> int:
        """How many slices, where there are many cases."""
        return (self.rounds + 1) // 2

    def measured(self, name: str) -> Measured:
        """A measurement that has not begun."""
        return Measured(name, self.backend, self.seed)

    def only(self, *chosen: Contender) -> list[Contender]:
        """Those of the contenders who take part here."""
        return [contender for contender in self.contenders if contender in chosen]
