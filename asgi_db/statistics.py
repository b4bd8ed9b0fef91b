"""What each route has done to the database, and which of them hold a connection now.

A unit of work counts in its own `Tally`, which is added to that of its route when the unit ends:
only then is the route certain. A route is named by its template, never by the path of a request,
so there are as many tallies as the application has routes.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Literal, Protocol, TypeAlias

from sqlalchemy import URL

from asgi_db.logs import ErrorsOnce

Outcome: TypeAlias = Literal["committed", "rolled_back", "failed"]

_OUTCOMES = ("committed", "rolled_back", "failed", "none")

WITHOUT_SESSION = "the engine, without a session"
"""The name for the counters of connections taken from `database.engine` itself."""


@dataclass(frozen=True, slots=True)
class RouteStats:
    """What one route has done since the process began; all times are seconds.

    Attributes:
        units: units of work that sent a statement and have ended, with any of the four outcomes.
        committed: units that ended with COMMIT.
        rolled_back: units that ended with ROLLBACK; in `plain` also those that only read.
        failed: units whose COMMIT failed, or has an unknown outcome.
        none: units that ended with neither: `read_only` has no transaction.
        statements: statements sent, without those that begin and end transactions.
        retries: requests that were run again.
        connections: how often a connection was taken from the pool.
        timeouts: how often no connection became free in time.
        held: time for which connections were checked out.
        held_max: the longest time for which one was checked out.
        waited: time spent waiting for connections, from the pool or new.
        waited_max: the longest wait for one connection.
        busy: time within calls of the session: waiting for a connection and for the database, and
            making objects from rows. A route that holds connections for much longer than it is
            busy does something else meanwhile, and should call `await session.release()`.
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
        """Return the number of units by outcome; "none" means that there was no transaction."""
        return {outcome: getattr(self, outcome) for outcome in _OUTCOMES}


@dataclass(frozen=True, slots=True)
class PoolStats:
    """The connections of a pool, at one moment.

    Attributes:
        size: how many it keeps; None without a limit.
        limit: the most that it may open, including `max_overflow`; None without a limit.
        checked_out: how many are checked out.
        idle: how many are open and free.
        waiting: how many tasks wait for one; None if a pool of the user's own does not tell.
    """

    size: int | None = None
    limit: int | None = None
    checked_out: int = 0
    idle: int = 0
    waiting: int | None = 0


@dataclass(frozen=True, slots=True)
class Holder:
    """The holder of a connection that is checked out.

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
    """What `database.stats()` returns: the state of this process at one moment.

    Attributes:
        name: the database, without user and password: `db.example.org:5432/shop`.
        pool: its connections.
        holders: the holders of those checked out, the longest first.
        routes: the counters of each route that has used the database.
    """

    name: str
    pool: PoolStats
    holders: tuple[Holder, ...]
    routes: Mapping[str, RouteStats]


class Tally:
    """The counters of one unit of work, or of all units of a route; see `RouteStats`.

    Each value is always valid, because another thread may read at any time. The number of units is
    the sum of their outcomes, so that the two agree at every moment.

    Attributes:
        asked: when a unit last asked for a connection, by `time.monotonic()`.
        began: when a unit's first statement asked for a connection, by `time.monotonic()`.
        outcome: how a unit ended.
    """

    asked = 0.0
    began: float | None = None
    outcome: Outcome | None = None
    committed = rolled_back = failed = none = 0
    statements = retries = connections = timeouts = 0
    held = held_max = waited = waited_max = busy = 0.0

    def add_wait(self, seconds: float) -> None:
        """Count the time spent waiting for a connection."""
        self.waited += seconds
        self.waited_max = max(self.waited_max, seconds)

    def add_hold(self, seconds: float) -> None:
        """Count a returned connection, and the time for which it was checked out."""
        self.connections += 1
        self.held += seconds
        self.held_max = max(self.held_max, seconds)

    def add_unit(self, unit: Tally) -> None:
        """Add a unit of work that has ended to the tally of its route."""
        outcome = unit.outcome or "none"
        setattr(self, outcome, getattr(self, outcome) + 1)
        self.statements += unit.statements
        self.timeouts += unit.timeouts
        self.connections += unit.connections
        self.held += unit.held
        self.held_max = max(self.held_max, unit.held_max)
        self.waited += unit.waited
        self.waited_max = max(self.waited_max, unit.waited_max)
        self.busy += unit.busy

    def stats(self) -> RouteStats:
        """Return the values as they are now."""
        values = {name: getattr(self, name) for name in _COUNTED}
        return RouteStats(units=sum(values[outcome] for outcome in _OUTCOMES), **values)


_COUNTED = tuple(field.name for field in fields(RouteStats) if field.name != "units")


class Observer(Protocol):
    """Called for each event as it happens; OpenTelemetry is one.

    An error that it raises is only logged.
    """

    def connection_taken(self, waited: float) -> None:
        """A connection was taken after this many seconds of waiting."""

    def connection_returned(self, held: float) -> None:
        """A connection was returned after this many seconds of use."""

    def unit_ended(self, route: str, mode: str, tally: Tally) -> None:
        """A unit of work has ended."""


_Event: TypeAlias = Literal["connection_taken", "connection_returned", "unit_ended"]


class Statistics:
    """The tallies of one `Database`.

    Attributes:
        observers: called for each event.
    """

    def __init__(self) -> None:
        self.observers: tuple[Observer, ...] = ()
        self._tallies: defaultdict[str, Tally] = defaultdict(Tally)
        self._errors = ErrorsOnce()

    @property
    def routes(self) -> Mapping[str, RouteStats]:
        """The counters of each route until now."""
        return {route: tally.stats() for route, tally in list(self._tallies.items())}

    def unit_ended(self, route: str, mode: str, tally: Tally) -> None:
        """Count a unit of work that has ended."""
        self._tallies[route].add_unit(tally)
        if self.observers:
            self._tell("unit_ended", route, mode, tally)

    def retried(self, route: str) -> None:
        """Count a request that is run again."""
        self._tallies[route].retries += 1

    def connection_taken(self, waited: float) -> None:
        """Tell the observers that a connection was taken."""
        if self.observers:
            self._tell("connection_taken", waited)

    def connection_returned(self, held: float, tally: Tally | None) -> None:
        """Count a returned connection, and tell the observers.

        Args:
            held: seconds for which it was checked out.
            tally: the tally of its unit; None if it was taken without a session.
        """
        (self._tallies[WITHOUT_SESSION] if tally is None else tally).add_hold(held)
        if self.observers:
            self._tell("connection_returned", held)

    def _tell(self, event: _Event, *what: object) -> None:
        """Call every observer; this is the only place that does."""
        for observer in self.observers:
            try:
                getattr(observer, event)(*what)
            except Exception as error:
                name = f"{type(observer).__qualname__}.{event}()"
                self._errors.log((id(observer), event), name, error)


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
    """Name a database as OpenTelemetry names its pool: `server:port/database`."""
    port = "" if url.port is None else f":{url.port}"
    server = f"{url.host}{port}/" if url.host else ""
    return f"{server}{url.database or ''}" or url.get_backend_name()
