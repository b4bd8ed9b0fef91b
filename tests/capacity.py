"""A pool under load: measured on a real application, simulated, and computed.

    python -m tests.capacity

prints the table in `docs/how-to/more-than-one-server.md`, in the environment of the tests.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import exp, inf

from sqlalchemy import text
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from asgi_db import Database, DBSession, DBSessionMiddleware
from tests import documents, servers
from tests.contract.client import call
from tests.internals import Queue, RouteStats, Tally


@dataclass(frozen=True, order=True)
class Use:
    """A request that asked for a connection at a time, and then held it for so many seconds."""

    asked: float
    held: float


def arrivals(rate: float, hold: float, number: int, chance: random.Random) -> list[Use]:
    """Requests as the calculator assumes them: independent arrivals, exponential hold times."""
    now, uses = 0.0, list[Use]()
    for _ in range(number):
        now += chance.expovariate(rate)
        uses.append(Use(now, chance.expovariate(1 / hold)))
    return uses


def simulate(connections: int, uses: Iterable[Use]) -> list[float]:
    """The seconds for which each request waits, where the first that asks is served first."""
    free_at = [-inf] * connections
    waits = list[float]()
    for use in sorted(uses):
        begins = max(use.asked, free_at[0])
        heapq.heapreplace(free_at, begins + use.held)
        waits.append(begins - use.asked)
    return waits


def share_above(seconds: float, waits: Sequence[float]) -> float:
    """Which share of the requests has waited for longer than that."""
    return sum(wait > seconds for wait in waits) / len(waits)


@dataclass
class Run:
    """What the requests of a real application have done to a pool of this size.

    It observes the database (`asgi_db.statistics.Observer`).

    Attributes:
        connections: the size of the pool.
        uses: when each request asked, and how long it held its connection.
        waits: how long each waited, as the library counts it.
        stats: what `database.stats()` says of the route.
    """

    connections: int
    uses: list[Use] = field(default_factory=list[Use])
    waits: list[float] = field(default_factory=list[float])
    stats: RouteStats = RouteStats()

    def unit_ended(self, route: str, mode: str, tally: Tally) -> None:
        if "/hold/" in route:
            self.uses.append(Use(tally.asked, tally.held))
            self.waits.append(tally.waited)

    def connection_taken(self, waited: float) -> None: ...
    def connection_returned(self, held: float) -> None: ...
    def used_without_session(self, held: float) -> None: ...
    def retried(self, route: str) -> None: ...

    @property
    def rate(self) -> float:
        """How many requests arrived in a second."""
        asked = [use.asked for use in self.uses]
        return len(asked) / (max(asked) - min(asked))

    @property
    def hold(self) -> float:
        """The mean time for which a request held a connection, as users find it in the counters."""
        return self.stats.held / self.stats.units

    @property
    def in_use(self) -> float:
        """Which share of the pool was in use, in the mean, until the last connection was back."""
        ended = (
            use.asked + wait + use.held for use, wait in zip(self.uses, self.waits, strict=True)
        )
        seconds = max(ended) - min(use.asked for use in self.uses)
        return self.stats.held / seconds / self.connections

    @property
    def wait(self) -> float:
        """The mean wait for a connection, as users find it in the counters."""
        return self.stats.waited / self.stats.units

    @property
    def computed(self) -> Queue:
        """What the calculator makes of the same rate and hold time."""
        return Queue(self.connections, self.rate, self.hold)


def application(database: Database) -> DBSessionMiddleware:
    """An application whose requests hold a connection for the time in their path."""

    async def hold(request: Request) -> Response:
        session: DBSession = request.state.db
        await session.execute(text("SELECT pg_sleep(:s)"), {"s": request.path_params["seconds"]})
        return Response()

    routes = [Route(f"/{name}/{{seconds:float}}", hold) for name in ("hold", "open")]
    return DBSessionMiddleware(Starlette(routes=routes), database)


async def measure(url: str, connections: int, uses: Sequence[Use]) -> Run:
    """Send these requests to a real application, and return what its counters say."""
    pool = {"pool_size": connections, "max_overflow": 0, "pool_timeout": 60}
    run = Run(connections)
    async with Database(url, engine_options=pool) as database, asyncio.TaskGroup() as requests:
        app = application(database)
        await asyncio.gather(*(call(app, "/open/0.2", method="GET") for _ in range(connections)))
        assert database.stats().pool.idle == connections
        database.statistics.observers += (run,)
        began = time.monotonic()
        for use in uses:
            await asyncio.sleep(max(0, began + use.asked - time.monotonic()))
            requests.create_task(call(app, f"/hold/{use.held:f}", method="GET"))
        while len(run.uses) < len(uses):  # noqa: ASYNC110 - a unit ends before its request does
            await asyncio.sleep(0.01)
        (route,) = (name for name in database.stats().routes if "/hold/" in name)
        run.stats = database.stats().routes[route]
    return run


# -- the table of the page -----------------------------------------------------------------------

CONNECTIONS, HOLD, REQUESTS = 10, 0.1, 6000
SHARES = (0.4, 0.6, 0.7, 0.8)
NOTICED = 0.01
"""Seconds from which a wait counts: a busy processor makes every request wait for a bit."""


def main() -> None:
    """Measure, and print the table."""
    lines = list[list[str]]()
    with servers.postgresql(own=True) as server, server.fresh_database() as url:
        for share in SHARES:
            rate = share * CONNECTIONS / HOLD
            uses = arrivals(rate, HOLD, REQUESTS, random.Random(f"{share}"))
            run = servers.run(measure(url, CONNECTIONS, uses))
            simulated, computed = simulate(CONNECTIONS, run.uses), run.computed
            waited = (
                share_above(NOTICED, run.waits),
                share_above(NOTICED, simulated),
                computed.waiting * exp((computed.in_use - CONNECTIONS) * NOTICED / run.hold),
            )
            waits = (run.wait, sum(simulated) / len(simulated), computed.mean_wait)
            lines.append(
                [
                    f"{run.rate:.1f}",
                    f"{1000 * run.hold:.0f} ms",
                    " / ".join(
                        f"{100 * used:.0f} %" for used in (run.in_use, computed.utilization)
                    ),
                    " / ".join(f"{100 * each:.1f} %" for each in waited),
                    " / ".join(f"{1000 * wait:.1f}" for wait in waits) + " ms",
                ]
            )
            print(lines[-1], flush=True)
    head = [
        "requests/s",
        "held",
        "in use: measured / computed",
        "waited: measured / simulated / computed",
        "mean wait: measured / simulated / computed",
    ]
    print(documents.table(head, lines, {0, 1, 2, 3, 4}))


if __name__ == "__main__":
    main()
