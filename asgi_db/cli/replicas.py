"""What `asgi-db check` looks at on each replica."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Literal

import anyio
from sqlalchemy import URL, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from asgi_db.cli import mysql, postgresql
from asgi_db.cli.capacity import most_connections
from asgi_db.cli.report import Plan, Report, Server, describe
from asgi_db.database import Database
from asgi_db.drivers import driver_of
from asgi_db.drivers.replication import Position
from asgi_db.errors import ConfigurationError
from asgi_db.pool.abandoned import connection_of
from asgi_db.replicas.history import MOST_LAG
from asgi_db.statistics import name_of

TIMEOUT = 10.0
"""Seconds that a server has to answer everything that is asked of it."""

LOOK_AGAIN = 0.05
"""Seconds after which a replica that is late is asked again."""


@asynccontextmanager
async def connected(database: Database) -> AsyncGenerator[AsyncConnection]:
    """Connect to a database as the application would, in autocommit."""
    async with connection_of(database.engine) as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        yield connection


async def check_replicas(
    report: Report, plan: Plan, primary: AsyncConnection, urls: Sequence[URL]
) -> None:
    """Compare each replica with the primary, and with the connections that it will get.

    Args:
        report: where to put what is found.
        plan: what the application is going to do.
        primary: a connection to the server that the URL names.
        urls: those of the replicas.
    """
    # There may be a pooler, with which asyncpg's prepared statements fail; others need no care.
    pooler: Literal["transaction"] | None = (
        "transaction" if primary.dialect.name == "postgresql" else None
    )
    for url in urls:
        name = name_of(url)
        fact = f"replica {name.partition('/')[0]}"
        try:
            with anyio.fail_after(TIMEOUT + MOST_LAG):
                database = Database(url, pooler=pooler)
                async with database, connected(database) as replica:
                    report.facts[fact] = await _check(report, name, primary, replica)
                    wanted = most_connections(url, plan, urls)
                    _check_room(report, name, wanted, await _identify(replica))
        except ConfigurationError as error:
            report.facts[fact] = "cannot be used"
            report.error(
                f"The replica {name} cannot be used: {describe(error)}.",
                "Correct its URL: it has the same database and the same user as the primary.",
            )
        except (SQLAlchemyError, OSError) as error:
            report.facts[fact] = "cannot be reached"
            report.warning(
                f"The replica {name} cannot be reached: {describe(error)}.",
                "Start it, or correct its URL. Until then the others and the primary serve.",
            )


async def _identify(connection: AsyncConnection) -> Server:
    if connection.dialect.name == "postgresql":
        return await postgresql.identify(connection)
    return await mysql.identify(connection)


async def _check(
    report: Report, name: str, primary: AsyncConnection, replica: AsyncConnection
) -> str:
    """Compare a replica with the primary, and return in a few words how it stands."""
    of_primary, server = await _identify(primary), await _identify(replica)
    if server.identity == of_primary.identity:
        return "the primary itself, at the moment"
    needed = _last_of_each_history(await _positions(primary))
    if not needed:
        report.error(
            "The primary has no position that a replica could be compared with.",
            "Switch its binary log on: log_bin. The nodes of a Galera cluster are no replicas of"
            " each other: reads wait for what the others have committed with wsrep_sync_wait.",
        )
        return "not comparable"
    reached = await _positions(replica)
    if not {each.history for each in needed} & {each.history for each in reached}:
        report.error(
            f"The replica {name} has nothing of what the primary has written: it is a server of"
            " its own, or replicates another one. Reads there would find other data.",
            "Correct the URL, or set up the replication.",
        )
        return "no replica of this primary"
    if server.database != of_primary.database:
        report.error(
            f"The replica {name} leads to another database than the URL of the primary.",
            "Name the same database in both.",
        )
        return "another database"
    if not server.is_replica:
        report.warning(
            f"The server {name} is no replica, or not any more, and not the primary either: what"
            " is written there, or here, the other one lacks.",
            "If it was promoted, name it as the primary; else let it follow the primary again.",
        )
        return "no replica any more"
    _check_replication(report, name, server)
    lag = await _lag(replica, needed)
    if lag is None:
        report.warning(
            f"The replica {name} has not caught up with the primary within {MOST_LAG:g} s: nothing"
            " is read from it.",
            "Look at its log, and at the network between the two.",
        )
        return f"more than {MOST_LAG:g} s late"
    return f"has everything after {1000 * lag:.0f} ms"


def _check_room(report: Report, name: str, wanted: int, server: Server) -> None:
    if server.connections is not None and wanted > server.connections:
        report.error(
            f"The replica {name} gets up to {wanted} connections, and allows {server.connections}.",
            "Use fewer processes, a smaller PoolProfile, or a pooler such as PgBouncer; or raise"
            " max_connections there.",
        )


def _check_replication(report: Report, name: str, server: Server) -> None:
    if not server.receives:
        report.warning(
            f"The replica {name} is not connected to a primary: it gets nothing new.",
            "Look at its log; pg_stat_wal_receiver, or SHOW REPLICA STATUS, says more.",
        )
    if server.takes_writes:
        report.warning(
            f"The replica {name} takes writes: what is written there the primary never gets.",
            "SET GLOBAL read_only = 1 on the replica, and in its configuration.",
        )


async def _positions(connection: AsyncConnection) -> list[Position]:
    """Return how far a server has come, in each system that it knows."""
    replication = driver_of(connection.dialect).replication
    if replication is None:
        return []
    rows = (await connection.execute(text(replication.question))).all()
    return replication.reached(rows)


def _last_of_each_history(positions: Iterable[Position]) -> list[Position]:
    """Leave out what the servers before this one have written: not every replica can name it."""
    last: dict[str, Position] = {}
    for position in positions:
        if position.number >= last.get(position.history, position).number:
            last[position.history] = position
    return list(last.values())


async def _lag(replica: AsyncConnection, needed: Sequence[Position]) -> float | None:
    """Wait until a replica has what the primary had, and return the seconds that it took.

    A history of which it has nothing at all is one that it does not replicate.
    """
    started = time.monotonic()
    while time.monotonic() < started + MOST_LAG:
        positions = await _positions(replica)
        reached, known = dict(positions), {each.history for each in positions}
        due = [each for each in needed if each.history in known]
        if all(position.is_in(reached) for position in due):
            return time.monotonic() - started
        await anyio.sleep(LOOK_AGAIN)
    return None
