"""What the dashboard keeps of one database: its pool's last minutes, and the units of interest.

Both are bounded: `HISTORY` samples, and `MOST_UNITS` units with at most `MOST_SHOWN` different
statements each, of at most a thousand characters. That is some 2 MB at the very most, and a few
hundred kilobytes in practice.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from asgi_db.database import Database
from asgi_db.engine.watching import time_statements
from asgi_db.sampling import Sampler
from asgi_db.statistics import PoolStats, Statistics, Tally
from asgi_db.trace import Trace

HISTORY = 300
"""Seconds for which the samples of the pool are kept."""

MOST_UNITS = 200
"""The units of interest that are kept; the oldest make room for new ones."""

MOST_SHOWN = 20
"""Different statements that are kept of a unit of interest."""

SLOW = 0.5
"""Seconds from the first statement to the end after which a unit is slow."""

_QUEUED = 0.005
"""Seconds of waiting for a connection after which others may wait too."""

REPEATED = 5
"""How often a unit sends one statement before it is marked as N+1."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The pool in one second.

    Attributes:
        at: when it was taken, in seconds since the epoch.
        used: the most connections that were seen in use.
        opened: the connections that were open, in use or free.
        waiting: the most tasks that were seen waiting for a connection.
        limit: the greatest number of connections; None if there is no bound.
        units: the units of work that ended.
        failed: those of them that have failed.
    """

    at: float
    used: int
    opened: int
    waiting: int
    limit: int | None
    units: int
    failed: int


@dataclass(frozen=True, slots=True)
class SentStatement:
    """A statement of a unit of interest.

    Attributes:
        text: the statement without its literals.
        times: how often it was sent.
        seconds: how long it ran, all of them together.
        longest: how long it ran at most.
        error: the name of its error, if it has failed.
    """

    text: str
    times: int
    seconds: float
    longest: float
    error: str | None

    @property
    def is_repeated(self) -> bool:
        """Whether it looks like one statement for each row of another: N+1."""
        return self.times >= REPEATED


@dataclass(frozen=True, slots=True)
class UnitOfInterest:
    """A unit of work that is worth a look.

    Attributes:
        number: counts the units of interest of this database.
        at: when it ended, in seconds since the epoch.
        kinds: why it is of interest: some of `KINDS`.
        route: the name of its route.
        mode: the name of its mode.
        outcome: how it ended.
        status: the status of the response that followed; None if there was none.
        attempt: which attempt at its request it was part of.
        error: the first error, by its name.
        lasted: seconds from its first statement to its end.
        held: seconds for which it held connections.
        waited: seconds for which it waited for connections.
        busy: seconds within calls of the session.
        count: how many statements it has sent.
        statements: the first of them, each text once.
        others: how many more statements it has sent that are not among them.
    """

    number: int
    at: float
    kinds: tuple[str, ...]
    route: str
    mode: str
    outcome: str
    status: int | None
    attempt: int
    error: str | None
    lasted: float
    held: float
    waited: float
    busy: float
    count: int
    statements: tuple[SentStatement, ...]
    others: int


KINDS = {
    "failed": "Failed",
    "unknown": "Outcome unknown",
    "rolled_back": "Rolled back behind a 2xx",
    "conflict": "Conflict",
    "retried": "Retried",
    "slow": "Slow",
    "repeated": "N+1",
}
"""Why a unit is of interest, the most severe first."""


class Recorder:
    """Watches one database.

    Attributes:
        units: the units of interest, the oldest first.
        found: how many there have been of each kind.
        total: how many there have been of all kinds.
    """

    def __init__(self, database: Database) -> None:
        """Begin to watch."""
        self.units: deque[UnitOfInterest] = deque(maxlen=MOST_UNITS)
        self.found = dict.fromkeys(KINDS, 0)
        self._samples: deque[Sample] = deque(maxlen=HISTORY)
        self.total = 0
        self._database = database
        self._sampler = Sampler(self.sample)
        self._used = self._waiting = self._ended = self._failed = 0
        statistics: Statistics = database.statistics
        statistics.observers += (self,)
        statistics.trace()
        for engine in database.engines():
            time_statements(engine.sync_engine)

    @classmethod
    def of(cls, database: Database) -> Recorder:
        """Return the one that watches a database, which begins now if there is none."""
        observers = database.statistics.observers
        found = (observer for observer in observers if isinstance(observer, Recorder))
        return next(found, None) or cls(database)

    # -- the pool ------------------------------------------------------------------------------

    def sample(self) -> None:
        """Note how the pool is, and what has happened since the last time."""
        pool = self._database.pool_stats()
        self._note(pool)
        self._samples.append(
            Sample(
                time.time(),
                self._used,
                max(pool.checked_out + pool.idle, self._used),
                self._waiting,
                pool.limit,
                self._ended,
                self._failed,
            )
        )
        self._used = self._waiting = self._ended = self._failed = 0

    def _note(self, pool: PoolStats) -> None:
        self._used = max(self._used, pool.checked_out)
        self._waiting = max(self._waiting, pool.waiting or 0)

    def history(self) -> list[Sample]:
        """Return a sample for each of the last `HISTORY` seconds, now included, the oldest first.

        While nothing uses the database no sample is taken, and nothing was in use.
        """
        now, pool = time.time(), self._database.pool_stats()
        samples = {int(now - sample.at): sample for sample in list(self._samples)}
        known, found = None, list[Sample]()
        for ago in range(HISTORY - 1, 0, -1):
            # Samples are a little more than a second apart, so that some seconds have none.
            sample = samples.get(ago) or _without_counts(samples.get(ago + 1))
            known = sample or known
            opened, limit = (known.opened, known.limit) if known else (0, pool.limit)
            found.append(sample or Sample(now - ago, 0, opened, 0, limit, 0, 0))
        used = max(self._used, pool.checked_out)
        waiting = max(self._waiting, pool.waiting or 0)
        opened = max(pool.checked_out + pool.idle, used)
        ended, failed = self._ended, self._failed
        return [*found, Sample(now, used, opened, waiting, pool.limit, ended, failed)]

    # -- what the statistics tell --------------------------------------------------------------

    def connection_taken(self, waited: float) -> None:
        """Note how full the pool is, at its fullest between two samples."""
        self._sampler.used()
        if waited > _QUEUED:
            self._note(self._database.pool_stats())
        else:
            self._used = max(self._used, self._database.checked_out())

    def connection_returned(self, held: float) -> None:
        """Have the pool sampled while it is in use."""
        self._sampler.used()

    def used_without_session(self, held: float) -> None:
        """Counted by the statistics themselves."""

    def retried(self, route: str) -> None:
        """Seen at the unit that follows."""

    def unit_ended(self, route: str, mode: str, tally: Tally) -> None:
        """Count the unit, and keep it if it is worth a look."""
        self._ended += 1
        lasted = time.monotonic() - tally.began if tally.began else 0.0
        kinds = tuple(_kinds(tally, lasted))
        if "failed" in kinds or "unknown" in kinds:
            self._failed += 1
        if kinds:
            for kind in kinds:
                self.found[kind] += 1
            self.total += 1
            self.units.append(self._unit(route, mode, tally, kinds, lasted))

    def _unit(
        self, route: str, mode: str, tally: Tally, kinds: tuple[str, ...], lasted: float
    ) -> UnitOfInterest:
        trace = tally.trace or Trace()
        statements = _statements(trace)
        shown = tuple(statements[:MOST_SHOWN])
        return UnitOfInterest(
            number=self.total,
            at=time.time(),
            kinds=kinds,
            route=route,
            mode=mode,
            outcome=tally.outcome or "none",
            status=tally.status,
            attempt=trace.attempt,
            error=trace.error or tally.raised,
            lasted=lasted,
            held=tally.held,
            waited=tally.waited,
            busy=tally.busy,
            count=tally.statements,
            statements=shown,
            others=max(tally.statements - sum(each.times for each in shown), 0),
        )


def _without_counts(sample: Sample | None) -> Sample | None:
    if sample is None:
        return None
    pool = sample.used, sample.opened, sample.waiting, sample.limit
    return Sample(sample.at + 1, *pool, units=0, failed=0)


def _kinds(tally: Tally, lasted: float) -> Iterator[str]:
    trace = tally.trace or Trace()
    if tally.is_unknown:
        yield "unknown"
    elif tally.conflicts:
        yield "conflict"
    elif _has_failed(tally, trace):
        yield "failed"
    if tally.outcome == "rolled_back" and trace.has_writes and (tally.status or 500) < 400:
        yield "rolled_back"
    if trace.attempt > 1:
        yield "retried"
    if lasted >= SLOW:
        yield "slow"
    if tally.statements >= REPEATED:
        if any(statement.is_repeated for statement in _statements(trace)):
            yield "repeated"


def _has_failed(tally: Tally, trace: Trace) -> bool:
    if tally.outcome == "failed" or tally.timeouts or tally.raised:
        return True
    # An error that the application has dealt with, in a savepoint for example, is none.
    return bool(trace.error) and tally.outcome != "committed" and (tally.status or 500) >= 400


def _statements(trace: Trace) -> list[SentStatement]:
    """The different statements of a unit, in order; literals make no difference."""
    found: dict[str, SentStatement] = {}
    for statement, sent in trace.sent.items():
        text = trace.shown(statement)
        same = found.get(text)
        found[text] = SentStatement(
            text,
            sent.times + (same.times if same else 0),
            sent.seconds + (same.seconds if same else 0.0),
            max(sent.longest, same.longest if same else 0.0),
            sent.error or (same.error if same else None),
        )
    return list(found.values())
