"""What each route has done to the database, and which of them have a connection now.

A unit of work counts in a `Tally` of its own, which is added to that of its route when the unit
ends: only then is it certain which route it was. A route is named by its template, never by the
path of a request, so there are as many tallies as the application has routes.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Literal, Protocol, TypeAlias

from sqlalchemy import URL, Engine

from asgi_db.histograms import BOUNDS, Histogram, no_counts
from asgi_db.hosts import describe_hosts
from asgi_db.logs import ErrorsOnce
from asgi_db.trace import Trace

Outcome: TypeAlias = Literal["committed", "rolled_back", "failed"]

_OUTCOMES = ("committed", "rolled_back", "failed", "none")

WITHOUT_SESSION = "the engine, without a session"
"""The name under which connections are counted that come from `database.engine` itself."""


@dataclass(frozen=True, slots=True)
class RouteStats:
    """What one route has done since the process began; all times are seconds.

    Attributes:
        units: units of work that have ended and had run a statement: the sum of the next four.
        committed: units which ended with COMMIT.
        rolled_back: units which ended with ROLLBACK; in `plain` also those that only read.
        failed: units whose COMMIT failed, or has an unknown outcome.
        none: units which ended with neither: `read_only` has no transaction.
        statements: statements sent, without those that begin and end transactions.
        retries: requests that were run again.
        conflicts: how often the database has given another transaction precedence.
        connections: how often a connection was taken from the pool.
        timeouts: how often no connection became free in time.
        held: time in which connections were checked out of the pool.
        held_max: the longest time for which one connection was checked out.
        waited: time until a connection was there, be it from the pool or new.
        waited_max: the longest of these times.
        busy: time within calls of the session: waiting for a connection and for the database, and
            making objects of rows. A route whose `held` is much greater does something else
            meanwhile: `await session.release()` is for that.
        hold_times: how long each unit held connections, all of them together.
        wait_times: how long each unit waited for connections, all of them together.
        busy_times: how long each unit was within calls of the session.
    """

    units: int = 0
    committed: int = 0
    rolled_back: int = 0
    failed: int = 0
    none: int = 0
    statements: int = 0
    retries: int = 0
    conflicts: int = 0
    connections: int = 0
    timeouts: int = 0
    held: float = 0.0
    held_max: float = 0.0
    waited: float = 0.0
    waited_max: float = 0.0
    busy: float = 0.0
    hold_times: Histogram = Histogram()
    wait_times: Histogram = Histogram()
    busy_times: Histogram = Histogram()

    def outcomes(self) -> dict[str, int]:
        """Return the number of units by their outcome; "none": there was no transaction to end."""
        return {outcome: getattr(self, outcome) for outcome in _OUTCOMES}


@dataclass(frozen=True, slots=True)
class PoolStats:
    """The connections of a pool, at one moment.

    Attributes:
        size: the number of connections that it keeps; None if it has no bound.
        limit: the greatest number that there may be, `max_overflow` included; None if there is no
            bound.
        checked_out: the number of connections in use.
        idle: the number of connections that are open and free.
        waiting: the number of tasks that wait for a connection; None for a pool of the user's own,
            which does not tell.
    """

    size: int | None = None
    limit: int | None = None
    checked_out: int = 0
    idle: int = 0
    waiting: int | None = 0


@dataclass(frozen=True, slots=True)
class Holder:
    """What has a connection that is checked out of the pool.

    Attributes:
        route: the request or block, as in the log: `POST /orders (create_order)`.
        age: seconds since the connection was checked out.
        is_late: whether that is longer than `leak_threshold=`.
        statement: what was sent over it last, without its literals; "" while no dashboard watches.
    """

    route: str
    age: float
    is_late: bool = False
    statement: str = ""

    def __str__(self) -> str:
        return f"{self.route} for {self.age:.1f} s"


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """A replica, as this process sees it at one moment.

    Attributes:
        name: the server, without user and password: `db2.example.org:5432/shop`.
        pool: the connections to it.
        units: the units of work that have run on it.
        behind: how often a read went elsewhere because it had not come far enough.
        is_down: whether it has failed, and has not answered since.
        lag: how late it was when it last answered, in seconds: the age of the oldest commit of this
            process that it did not have; 0 if it had them all; None while nothing has been
            committed or asked. Only reads ask it.
    """

    name: str
    pool: PoolStats
    units: int = 0
    behind: int = 0
    is_down: bool = False
    lag: float | None = None


@dataclass(frozen=True, slots=True)
class DatabaseStats:
    """What `database.stats()` returns: the state of this process at one moment.

    Attributes:
        name: the database, without user and password: `db.example.org:5432/shop`.
        pool: its connections.
        holders: what has the connections that are checked out, the oldest first.
        routes: the counters of each route that has used the database.
        replicas: the replicas, if it has some.
        reads_on_primary: the units of work that could have read from a replica, and ran on the
            primary because none was there, had come far enough or had a connection free.
    """

    name: str
    pool: PoolStats
    holders: tuple[Holder, ...]
    routes: Mapping[str, RouteStats]
    replicas: tuple[ReplicaStats, ...] = ()
    reads_on_primary: int = 0


class Tally:
    """What one unit of work has done so far; see `RouteStats`.

    Attributes:
        asked: when the unit last asked for a connection, by `time.monotonic()`.
        began: when its first statement asked for a connection, by `time.monotonic()`.
        outcome: how it ended.
        is_unknown: whether it ended without an answer to its COMMIT.
        status: the status of the response before which it ended; None if it was another end.
        raised: the name of the exception with which its request ended, if it was one.
        trace: what it has sent; None while no dashboard watches.
    """

    asked = 0.0
    began: float | None = None
    outcome: Outcome | None = None
    is_unknown = False
    status: int | None = None
    raised: str | None = None
    trace: Trace | None = None
    committed = rolled_back = failed = none = 0
    statements = retries = conflicts = connections = timeouts = 0
    held = held_max = waited = waited_max = busy = 0.0

    def add_wait(self, seconds: float) -> None:
        """Count the time in which a connection was waited for."""
        self.waited += seconds
        self.waited_max = max(self.waited_max, seconds)

    def add_hold(self, seconds: float) -> None:
        """Count a connection that has come back, and the time for which it was out."""
        self.connections += 1
        self.held += seconds
        self.held_max = max(self.held_max, seconds)


class TracedTally(Tally):
    """What one unit of work has done so far, with what it has sent."""

    def __init__(self) -> None:
        self.trace = Trace()


class RouteTally(Tally):
    """What has been counted of all units of a route.

    Each value is written at once, because another thread may read between two of them. The number
    of units is the sum of their outcomes, so that the two agree at every moment.
    """

    def __init__(self) -> None:
        self._hold_times, self._wait_times, self._busy_times = no_counts(), no_counts(), no_counts()

    def add_hold(self, seconds: float) -> None:
        """Count a connection that was taken without a unit."""
        super().add_hold(seconds)
        self._hold_times[bisect_left(BOUNDS, seconds)] += 1

    def add_unit(self, unit: Tally) -> None:
        """Add a unit of work that has ended."""
        outcome = unit.outcome or "none"
        setattr(self, outcome, getattr(self, outcome) + 1)
        self.statements += unit.statements
        self.conflicts += unit.conflicts
        self.timeouts += unit.timeouts
        self.connections += unit.connections
        self.held += unit.held
        self.held_max = max(self.held_max, unit.held_max)
        self.waited += unit.waited
        self.waited_max = max(self.waited_max, unit.waited_max)
        self.busy += unit.busy
        if unit.connections:
            self._hold_times[bisect_left(BOUNDS, unit.held)] += 1
        self._wait_times[bisect_left(BOUNDS, unit.waited)] += 1
        self._busy_times[bisect_left(BOUNDS, unit.busy)] += 1

    def stats(self) -> RouteStats:
        """Return the values as they are now."""
        values = {name: getattr(self, name) for name in _COUNTED}
        return RouteStats(
            units=sum(values[outcome] for outcome in _OUTCOMES),
            hold_times=Histogram(tuple(self._hold_times)),
            wait_times=Histogram(tuple(self._wait_times)),
            busy_times=Histogram(tuple(self._busy_times)),
            **values,
        )


_COUNTED = tuple(field.name for field in fields(RouteStats) if hasattr(Tally, field.name))


class Observer(Protocol):
    """What is told of each event as it happens, such as OpenTelemetry.

    An error that it raises is logged, and reaches nothing else.
    """

    def connection_taken(self, waited: float) -> None:
        """A connection is there, after so many seconds."""

    def connection_returned(self, held: float) -> None:
        """A connection is back, after so many seconds."""

    def used_without_session(self, held: float) -> None:
        """A connection that was taken without a session is back, after so many seconds."""

    def unit_ended(self, route: str, mode: str, tally: Tally) -> None:
        """A unit of work has ended."""

    def retried(self, route: str) -> None:
        """A request is run again."""


_Event: TypeAlias = Literal[
    "connection_taken", "connection_returned", "used_without_session", "unit_ended", "retried"
]


class Statistics:
    """The tallies of one `Database`.

    Attributes:
        observers: what is told of each event.
        new_tally: makes the tally of a unit of work.
        new_engine: what is told of each engine that is made, which is counted here.
    """

    new_tally: type[Tally] = Tally
    new_engine: tuple[Callable[[Engine], None], ...] = ()

    def __init__(self) -> None:
        self.observers: tuple[Observer, ...] = ()
        self._tallies: defaultdict[str, RouteTally] = defaultdict(RouteTally)
        self._errors = ErrorsOnce()

    @property
    def routes(self) -> Mapping[str, RouteStats]:
        """What has been counted for each route until now."""
        return {route: tally.stats() for route, tally in list(self._tallies.items())}

    @property
    def is_tracing(self) -> bool:
        """Whether it is noted what each unit sends."""
        return self.new_tally is TracedTally

    def trace(self) -> None:
        """Note what each unit of work sends, from now on."""
        self.new_tally = TracedTally

    def unit_ended(self, route: str, mode: str, tally: Tally) -> None:
        """Count a unit of work that has ended."""
        self._tallies[route].add_unit(tally)
        if self.observers:
            self._tell("unit_ended", route, mode, tally)

    def retried(self, route: str) -> None:
        """Count a request that is run again."""
        self._tallies[route].retries += 1
        self._tell("retried", route)

    def used_without_session(self, held: float) -> None:
        """Count a connection that was taken without a session, and is back."""
        self._tallies[WITHOUT_SESSION].add_hold(held)
        self._tell("used_without_session", held)

    def connection_taken(self, waited: float) -> None:
        """Tell the observers of a connection that is there."""
        self._tell("connection_taken", waited)

    def connection_returned(self, held: float) -> None:
        """Tell the observers of a connection that is back."""
        self._tell("connection_returned", held)

    def _tell(self, event: _Event, *what: object) -> None:
        """Tell every observer; the only place where one is called."""
        for observer in self.observers:
            try:
                getattr(observer, event)(*what)
            except Exception as error:
                name = f"{type(observer).__qualname__}.{event}()"
                self._errors.log((id(observer), event), name, error)


def total(pools: Iterable[PoolStats]) -> PoolStats:
    """Add up the pools of a database, which has one in each event loop that uses it."""
    return functools.reduce(_plus, pools, None) or PoolStats()


def pools_of(databases: Iterable[DatabaseStats]) -> dict[str, PoolStats]:
    """Return the pools of databases and of their replicas by name; equal names are added up."""
    by_name = defaultdict[str, list[PoolStats]](list)
    for database in databases:
        by_name[database.name].append(database.pool)
        for replica in database.replicas:
            by_name[replica.name].append(replica.pool)
    return {name: total(pools) for name, pools in by_name.items()}


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
    hosts = describe_hosts(url)
    server = f"{hosts}/" if hosts else ""
    return f"{server}{url.database or ''}" or url.get_backend_name()
