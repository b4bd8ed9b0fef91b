"""How pools, processes and replicas relate to the load: what `asgi-db check --rate` computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from math import inf

from sqlalchemy import URL

from asgi_db.cli.report import Plan, Report
from asgi_db.hosts import Host, hosts_of

FEW = 0.01
"""The share of requests that may wait for a connection without a warning."""


@dataclass(frozen=True)
class Queue:
    """One pool, and the requests that take a connection from it.

    It is computed as the queue M/M/c, with Erlang's C formula (A. K. Erlang, 1917; L. Kleinrock,
    Queueing Systems, volume 1, 1975, "M/M/m"). Its assumptions: requests arrive independently of
    each other, the times for which they hold a connection are distributed exponentially and do not
    depend on the load, the request that has waited longest is served first, and none gives up.
    The pool does serve in that order. Where all hold times are equal, the mean wait is about half.

    Attributes:
        connections: how many there are, `max_overflow` included.
        rate: requests per second that take one.
        hold: the mean time for which one of them holds it, in seconds.
    """

    connections: int
    rate: float
    hold: float

    @property
    def in_use(self) -> float:
        """The mean number of connections in use, if there are enough: Little's law."""
        return self.rate * self.hold

    @property
    def utilization(self) -> float:
        """The share of the connections that is in use; 1 or above: there are too few."""
        return self.in_use / self.connections

    @property
    def full_at(self) -> float:
        """The requests per second from which all connections are in use at all times."""
        return self.connections / self.hold

    @property
    def waiting(self) -> float:
        """The share of requests that have to wait: Erlang C."""
        if self.utilization >= 1:
            return 1.0
        *_, waiting = islice(_waiting(self.in_use), self.connections)
        return waiting

    @property
    def mean_wait(self) -> float:
        """The mean wait of all requests, in seconds; infinite if there are too few connections."""
        if self.utilization >= 1:
            return inf
        return self.waiting * self.hold / (self.connections - self.in_use)


def smallest_pool(in_use: float, share: float = FEW) -> int:
    """Return the smallest number of connections with which at most this share of requests waits.

    Args:
        in_use: the mean number of connections in use.
        share: of the requests.
    """
    return next(n for n, waiting in enumerate(_waiting(in_use), 1) if waiting <= share)


def _waiting(in_use: float) -> Iterator[float]:
    """Say for one connection, for two and so on which share of the requests has to wait."""
    blocked = 1.0  # Erlang B, by its recursion, which neither overflows nor loses digits.
    for connections in count(1):
        blocked = in_use * blocked / (connections + in_use * blocked)
        utilization = in_use / connections
        yield 1.0 if utilization >= 1 else blocked / (1 - utilization * (1 - blocked))


@dataclass(frozen=True)
class Load:
    """What the application is expected to serve.

    Attributes:
        rate: requests per second that use the database, in all processes together.
        hold: the mean time for which one of them holds a connection, in seconds.
        reads: the share of them that replicas serve.
    """

    rate: float
    hold: float
    reads: float = 0.0


def pools_of_servers(url: URL, replicas: Iterable[URL]) -> dict[str, int]:
    """Return for each server how many pools of one process may lead to it.

    Each host of the URL may be, or become, the primary server. One that is a replica too gets the
    connections of both pools after a failover.
    """
    pools: Counter[str] = Counter(_servers(url))
    for replica in replicas:
        pools.update(_servers(replica))
    return dict(pools)


def most_pools(url: URL, primary: URL, replicas: Iterable[URL]) -> int:
    """Return how many pools of one process may lead to one of the servers of a URL."""
    pools = pools_of_servers(primary, replicas)
    return max(pools[server] for server in _servers(url))


def most_connections(url: URL, plan: Plan, replicas: Iterable[URL]) -> int:
    """Return how many connections one of the servers of a URL may get."""
    each = (plan.profile.pool_size + plan.profile.max_overflow) * plan.processes
    return each * most_pools(url, plan.url, replicas)


def _servers(url: URL) -> list[str]:
    default = {"postgresql": 5432}.get(url.get_backend_name(), 3306)
    hosts = hosts_of(url) or (Host("localhost", None),)
    without = (Host(host.name, None if host.port == default else host.port) for host in hosts)
    return list(dict.fromkeys(map(str, without)))


def check_servers(report: Report, plan: Plan, replicas: Sequence[URL]) -> None:
    """Say how many connections each server has to admit, where there are replicas."""
    if not replicas:
        return
    each = (plan.profile.pool_size + plan.profile.max_overflow) * plan.processes
    pools = pools_of_servers(plan.url, replicas)
    shown = ", ".join(f"{each * number} at {server}" for server, number in pools.items())
    report.facts["each server"] = f"up to {shown}"
    report.facts["all servers"] = f"up to {each * (1 + len(replicas))}, with {len(replicas)} " + (
        "replica" if len(replicas) == 1 else "replicas"
    )


def check_load(report: Report, plan: Plan, load: Load, replicas: Sequence[URL]) -> None:
    """Compare the pools with the load, and say what waits."""
    if not replicas:
        return _check_pool(report, plan, load, "the pool", load.rate)
    read = load.rate * load.reads
    _check_pool(report, plan, load, "the primary", load.rate - read)
    if read:
        _check_pool(report, plan, load, "each replica", read / len(replicas))
        _check_pool(report, plan, load, "the primary alone", load.rate, is_spare=True)


def _check_pool(
    report: Report, plan: Plan, load: Load, name: str, rate: float, *, is_spare: bool = False
) -> None:
    """Compare one pool of each process with the requests that it gets.

    Args:
        name: what the pool leads to.
        rate: requests per second, of all processes.
        is_spare: whether this is the load of the primary while no replica serves.
    """
    connections = plan.profile.pool_size + plan.profile.max_overflow
    queue = Queue(connections, rate / plan.processes, load.hold)
    enough = smallest_pool(queue.in_use)
    full_at = queue.full_at * plan.processes
    report.facts[f"load, {name}"] = (
        f"{_number(rate)} requests/s use {_percent(queue.utilization)} of each pool"
        f" ({_number(queue.in_use)} of {connections}); full at {_number(full_at)}"
    )
    report.facts[f"wait, {name}"] = (
        f"{_percent(queue.waiting)} of the requests wait, {1000 * queue.mean_wait:.2f} ms in the"
        f" mean; {enough} connections in each pool keep it below {_percent(FEW)}"
        if queue.utilization < 1
        else "ever longer"
    )
    remedy = (
        "Hold connections for a shorter time (await session.release() around slow calls), or use"
        f" {enough} connections in each pool, {enough * plan.processes} at the server."
    )
    where = "While no replica serves, the primary" if is_spare else name.capitalize()
    if queue.utilization >= 1:
        find = report.warning if is_spare else report.error
        find(
            f"{where} is full at {_number(full_at)} requests/s, and gets {_number(rate)}: requests"
            f" wait ever longer, and those that have waited for {plan.profile.pool_timeout:g} s are"
            " answered with 503.",
            remedy,
        )
    elif queue.waiting > FEW and not is_spare:
        report.warning(
            f"{where} makes {_percent(queue.waiting)} of the requests wait for a connection,"
            f" {1000 * queue.mean_wait:.2f} ms in the mean.",
            remedy,
        )


def _percent(share: float) -> str:
    """Write a share: 0.4 %, 12 %."""
    value = 100 * share
    return f"{value:.1f} %" if 0.05 <= value < 9.95 else f"{value:.0f} %"


def _number(value: float) -> str:
    """Write a number with three digits that count."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{float(f'{value:.3g}'):.10f}".rstrip("0").rstrip(".")
