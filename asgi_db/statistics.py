"""Who holds what: what each route has done to the database, and who has a connection now.

A unit of work keeps a `Tally` of its own, and adds it to its route when it ends: only then is it
certain which route it was. A route is named by its template, never by the path of a request, so
there are as many counters as the application has routes.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from sqlalchemy import URL

Outcome: TypeAlias = Literal["committed", "rolled_back", "failed"]

_OUTCOMES = ("committed", "rolled_back", "failed", "none")

WITHOUT_SESSION = "the engine, without a session"
"""The name of whoever takes a connection from `database.engine` itself."""


@dataclass(frozen=True, slots=True)
class RouteStats:
    """What one route has done since the process began; all times are seconds.

    Attributes:
        units: units of work that have ended, each from its first statement on; those of all four
            outcomes.
        committed: those which ended with COMMIT.
        rolled_back: those which ended with ROLLBACK; in `plain` also those that only read.
        failed: those whose COMMIT failed, or has an outcome that is not known.
        none: those which ended with neither: `read_only` has no transaction.
        statements: statements sent, without those that begin and end transactions.
        retries: requests that were run again.
        connections: how often a connection was taken from the pool.
        timeouts: how often none became free in time.
        held: time in which connections were out of the pool.
        held_max: the longest of it in one piece.
        waited: time until a connection was there, be it from the pool or new.
        waited_max: the longest of it in one piece.
        busy: time within calls of the session: waiting for a connection and for the database, and
            making objects of rows. A route which holds for much longer than it is busy does
            something else meanwhile: `await session.release()` is for that.
    """

    units: int = 0
    committed: int = 0
    rolled_back: int = 0
    failed: int = 0
    none: int = 0
    statements: int = 0
    retries: int = 0
    connections: int = 0
    timeouts: int = 0
    held: float = 0.0
    held_max: float = 0.0
    waited: float = 0.0
    waited_max: float = 0.0
    busy: float = 0.0

    def outcomes(self) -> dict[str, int]:
        """Return how many units ended how; "none": there was no transaction to end."""
        return {outcome: getattr(self, outcome) for outcome in _OUTCOMES}


@dataclass(frozen=True, slots=True)
class PoolStats:
    """The connections of a pool, at one moment.

    Attributes:
        size: how many it keeps; None where it has no bound.
        limit: how many there may be at most, `max_overflow` included; None where there is no bound.
        checked_out: how many are out.
        idle: how many are open and free.
        waiting: how many wait for one; None for a pool of the user's own, which does not say so.
    """

    size: int | None = None
    limit: int | None = None
    checked_out: int = 0
    idle: int = 0
    waiting: int | None = 0


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has a connection that is out of the pool.

    Attributes:
        route: the request or block, as in the log: `POST /orders (create_order)`.
        age: seconds since it was taken.
    """

    route: str
    age: float

    def __str__(self) -> str:
        return f"{self.route} for {self.age:.1f} s"


@dataclass(frozen=True, slots=True)
class DatabaseStats:
    """What `database.stats()` says: one moment of this process.

    Attributes:
        name: the database, without user and password: `db.example.org:5432/shop`.
        pool: its connections.
        holders: who has those which are out, the longest first.
        routes: the counters of each route that has used the database.
    """

    name: str
    pool: PoolStats
    holders: tuple[Holder, ...]
    routes: Mapping[str, RouteStats]


class Tally:
    """What a unit of work has done so far; times are seconds.

    Attributes:
        asked: when it last asked for a connection, by `time.monotonic()`.
        began: when its first statement asked for a connection, by `time.monotonic()`.
        outcome: how it ended.
    """

    __slots__ = (
        "asked",
        "began",
        "busy",
        "connections",
        "held",
        "held_max",
        "outcome",
        "statements",
        "timeouts",
        "waited",
        "waited_max",
    )

    def __init__(self) -> None:
        self.asked = 0.0
        self.began: float | None = None
        self.outcome: Outcome | None = None
        self.statements = self.connections = self.timeouts = 0
        self.held = self.held_max = self.waited = self.waited_max = self.busy = 0.0

    def add_wait(self, seconds: float) -> None:
        """Note how long a connection was waited for."""
        self.waited += seconds
        self.waited_max = max(self.waited_max, seconds)

    def add_hold(self, seconds: float) -> None:
        """Note how long a connection was out, which is back now."""
        self.connections += 1
        self.held += seconds
        self.held_max = max(self.held_max, seconds)


class Counters:
    """The counters of one route, which go on; see `RouteStats`.

    Each is written at once, because another thread may read between two of them. The units are
    the sum of their outcomes, so that they agree at every moment.
    """

    __slots__ = tuple(name for name in RouteStats.__slots__ if name != "units")

    def __init__(self) -> None:
        self.committed = self.rolled_back = self.failed = self.none = 0
        self.statements = self.retries = self.connections = self.timeouts = 0
        self.held = self.held_max = self.waited = self.waited_max = self.busy = 0.0

    def add(self, tally: Tally) -> None:
        """Add a unit of work that has ended."""
        outcome = tally.outcome or "none"
        setattr(self, outcome, getattr(self, outcome) + 1)
        self.statements += tally.statements
        self.timeouts += tally.timeouts
        self.waited += tally.waited
        self.waited_max = max(self.waited_max, tally.waited_max)
        self.busy += tally.busy
        self.add_held(tally)

    def add_held(self, tally: Tally) -> None:
        """Add the connections alone."""
        self.connections += tally.connections
        self.held += tally.held
        self.held_max = max(self.held_max, tally.held_max)

    def stats(self) -> RouteStats:
        """Say how they stand."""
        values = {name: getattr(self, name) for name in Counters.__slots__}
        return RouteStats(units=sum(values[outcome] for outcome in _OUTCOMES), **values)


class Observer(Protocol):
    """Who is told of each event as it happens, such as OpenTelemetry."""

    def connection_taken(self, waited: float) -> None:
        """A connection is there, after so many seconds."""

    def connection_returned(self, held: float) -> None:
        """A connection is back, after so many seconds."""

    def unit_ended(self, route: str, mode: str, tally: Tally) -> None:
        """A unit of work has ended."""


class Statistics:
    """The counters of one `Database`.

    Attributes:
        observers: who is told of each event.
    """

    def __init__(self) -> None:
        self.observers: tuple[Observer, ...] = ()
        self._counters: defaultdict[str, Counters] = defaultdict(Counters)

    @property
    def routes(self) -> Mapping[str, RouteStats]:
        """The counters of each route, which do not change any more."""
        return {route: counters.stats() for route, counters in list(self._counters.items())}

    def unit_ended(self, route: str, mode: str, tally: Tally) -> None:
        """Count a unit of work that has ended."""
        self._counters[route].add(tally)
        for observer in self.observers:
            observer.unit_ended(route, mode, tally)

    def retried(self, route: str) -> None:
        """Count a request that is run again."""
        self._counters[route].retries += 1

    def connection_held(self, tally: Tally) -> None:
        """Count the connections of somebody who uses no session."""
        self._counters[WITHOUT_SESSION].add_held(tally)

    def connection_taken(self, waited: float) -> None:
        """Tell the observers of a connection that is there."""
        for observer in self.observers:
            observer.connection_taken(waited)

    def connection_returned(self, held: float) -> None:
        """Tell the observers of a connection that is back."""
        for observer in self.observers:
            observer.connection_returned(held)


def total(pools: Iterable[PoolStats]) -> PoolStats:
    """Add up the pools of a database: it has one in each event loop that uses it."""
    return functools.reduce(_plus, pools, None) or PoolStats()


def _plus(first: PoolStats | None, second: PoolStats) -> PoolStats:
    if first is None:
        return second
    return PoolStats(
        size=_sum(first.size, second.size),
        limit=_sum(first.limit, second.limit),
        checked_out=first.checked_out + second.checked_out,
        idle=first.idle + second.idle,
        waiting=_sum(first.waiting, second.waiting),
    )


def _sum(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first + second


def name_of(url: URL) -> str:
    """Name a database, as OpenTelemetry names its pool: `server:port/database`."""
    port = "" if url.port is None else f":{url.port}"
    server = f"{url.host}{port}/" if url.host else ""
    return f"{server}{url.database or ''}" or url.get_backend_name()
