"""What `asgi-db check` looks at on each replica."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import NamedTuple

import anyio
from sqlalchemy import URL, text
from sqlalchemy.exc import SQLAlchemyError

from asgi_db.cli.capacity import most_pools, servers_of
from asgi_db.cli.check import TIMEOUT, describe, remedy_of
from asgi_db.cli.report import Plan, Report
from asgi_db.database import Database
from asgi_db.drivers import driver_of_url
from asgi_db.drivers.replication import Replication
from asgi_db.errors import ConfigurationError
from asgi_db.pool.abandoned import connection_of

_STATES = {
    "postgresql": text("""
        SELECT current_setting('server_version'), pg_is_in_recovery(),
        sum(CASE name WHEN 'max_connections' THEN setting::int ELSE -setting::int END)
        FROM pg_settings
        WHERE name IN ('max_connections', 'superuser_reserved_connections', 'reserved_connections')
    """),
    "mysql": text("SELECT version(), @@global.read_only, @@global.max_connections"),
}
_UNITS = {"postgresql": "bytes of the log", "mysql": "transactions"}


class _State(NamedTuple):
    """What a server says of itself.

    Attributes:
        version: the version of the server.
        only_reads: whether it takes no writes.
        limit: how many connections it allows.
        positions: how far it has come, in each history that it has.
    """

    version: str
    only_reads: bool
    limit: int
    positions: dict[str, int]


async def check_replicas(report: Report, plan: Plan, replicas: Sequence[URL]) -> None:
    """Look at each replica, and how far it is behind the primary."""
    replication = driver_of_url(plan.url).replication
    if not replicas or replication is None:
        return
    primary = await _state_of(plan.url, replication)
    states = await asyncio.gather(*(_state_of(url, replication) for url in replicas))
    for url, state in zip(replicas, states, strict=True):
        name = ", ".join(servers_of(url))
        if not isinstance(state, _State):
            report.facts[f"replica {name}"] = "cannot be used"
            report.warning(
                f"The replica {name} cannot be used, and its reads run elsewhere:"
                f" {describe(state)}.",
                remedy_of(state, url),
            )
            continue
        behind = None
        if isinstance(primary, _State):
            behind = _behind(primary.positions, state.positions)
            _check_history(report, name, behind)
        _check_replica(report, plan, replicas, url, state, behind)


async def _state_of(url: URL, replication: Replication) -> _State | Exception:
    backend = url.get_backend_name()
    database = Database(url, pooler="transaction" if backend == "postgresql" else None)
    try:
        with anyio.fail_after(TIMEOUT):
            async with database, connection_of(database.engine) as connection:
                await connection.execution_options(isolation_level="AUTOCOMMIT")
                version, only_reads, limit = (await connection.execute(_STATES[backend])).one()
                rows = (await connection.execute(text(replication.question))).all()
    except (SQLAlchemyError, OSError, ConfigurationError) as error:
        return error
    reached = dict[str, int]()
    for system, number in replication.reached(rows):
        reached[system] = max(number, reached.get(system, 0))
    return _State(re.split("[ -]", str(version))[0], bool(only_reads), int(limit), reached)


def _behind(primary: dict[str, int], replica: dict[str, int]) -> int | None:
    """Return by how much a replica is behind; None if it has another history than the primary."""
    if not primary.keys() <= replica.keys():
        return None
    return max((max(0, primary[each] - replica[each]) for each in primary), default=0)


def _check_history(report: Report, name: str, behind: int | None) -> None:
    if behind is None:
        report.error(
            f"The replica {name} has nothing of the history of the primary: clients would read from"
            " another database.",
            "Correct DATABASE_REPLICA_URLS, or let the server follow this primary.",
        )


def _check_replica(
    report: Report,
    plan: Plan,
    replicas: Sequence[URL],
    url: URL,
    state: _State,
    behind: int | None,
) -> None:
    name, backend = ", ".join(servers_of(url)), url.get_backend_name()
    each = (plan.profile.pool_size + plan.profile.max_overflow) * plan.processes
    wanted = each * most_pools(url, plan.url, replicas)
    lag = "" if behind is None else f"{behind:,} {_UNITS[backend]} behind, "
    report.facts[f"replica {name}"] = (
        f"{state.version}, {'only reads' if state.only_reads else 'takes writes'}, {lag}"
        f"up to {wanted} of {state.limit} connections"
    )
    if not state.only_reads and not set(servers_of(url)) & set(servers_of(plan.url)):
        report.warning(
            f"The replica {name} takes writes, and is not in the URL of the primary: what is"
            " written there is found nowhere else.",
            "Add it to the hosts of the URL if it may become the primary; otherwise let it follow"
            " the primary, or take it out of DATABASE_REPLICA_URLS.",
        )
    if wanted > state.limit:
        report.error(
            f"The replica {name} gets up to {wanted} connections, and allows {state.limit}.",
            "Use fewer processes, a smaller PoolProfile, or a pooler such as PgBouncer; or raise"
            " max_connections there.",
        )
