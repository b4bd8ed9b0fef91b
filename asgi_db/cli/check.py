"""`asgi-db check`: connects as the application would, and says what it finds."""

from __future__ import annotations

import platform
import socket
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import anyio
from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from asgi_db.cli import mysql, postgresql, sqlite
from asgi_db.cli.replicas import TIMEOUT, check_replicas, connected
from asgi_db.cli.report import Plan, Report, describe
from asgi_db.database import Database
from asgi_db.drivers import driver_of_url
from asgi_db.drivers.hosts import host_reached
from asgi_db.errors import ConfigurationError
from asgi_db.hosts import Host, describe_hosts, hosts_of
from asgi_db.replicas.history import MOST_LAG

PINGS = 21
"""How many round trips are measured."""

SLOW_ROUND_TRIP = 5.0
"""Milliseconds from which a round trip is worth a note."""


async def check(database: Database, plan: Plan, replicas: Sequence[URL] = ()) -> Report:
    """Check a database and its replicas; what it finds is in the report, and never raised."""
    report = Report()
    report.facts["database"] = repr(database.url)
    report.facts["versions"] = ", ".join(
        f"{name} {version(name)}" for name in (database.url.get_driver_name(), "SQLAlchemy")
    )
    report.facts["versions"] += f", Python {platform.python_version()}"
    try:
        if plan.url.get_backend_name() == "sqlite":
            with anyio.fail_after(TIMEOUT):
                await _check_file(report, plan)
        else:
            await _check_server(report, database, plan, replicas)
    except (SQLAlchemyError, OSError, ConfigurationError) as error:
        report.error(f"The database cannot be used: {describe(error)}.", _remedy(error, plan.url))
    return report


async def _check_file(report: Report, plan: Plan) -> None:
    sqlite.check_file(report, plan)
    async with sqlite.connected(plan.url) as connection:
        if connection is not None:
            await sqlite.check_journal(report, connection)
            await _measure(report, connection)


async def _check_server(
    report: Report, database: Database, plan: Plan, replicas: Sequence[URL]
) -> None:
    is_postgresql = plan.url.get_backend_name() == "postgresql"
    # Each of several hosts may use up the time that it has to take a connection.
    hosts = hosts_of(plan.url) or (Host("localhost", None),)
    with anyio.fail_after(TIMEOUT * len(hosts) + (TIMEOUT + MOST_LAG) * len(replicas)):
        async with database, connected(database) as connection:
            raw = await connection.get_raw_connection()
            host = host_reached(raw.driver_connection) or hosts[0]
            report.facts["host"] = str(host)
            if len(hosts) > 1:
                report.facts["host"] += f", of {len(hosts)} in the URL"
            with anyio.fail_after(TIMEOUT):
                await (postgresql if is_postgresql else mysql).check(report, plan, connection, host)
                await _measure(report, connection)
            await check_replicas(report, plan, connection, replicas)


async def _measure(report: Report, connection: AsyncConnection) -> None:
    """Measure the round trip of a statement."""
    driver: Any = (await connection.get_raw_connection()).driver_connection
    is_postgresql = connection.dialect.name == "postgresql"
    # SQLAlchemy prepares a statement on PostgreSQL, which takes one more round trip.
    ping: Callable[[str], Awaitable[Any]] = (
        driver.execute if is_postgresql else connection.exec_driver_sql
    )
    times: list[float] = []
    for _ in range(PINGS):
        started = time.perf_counter()
        await ping("SELECT 1")
        times.append(1000 * (time.perf_counter() - started))
    median = statistics.median(times)
    report.facts["round trip"] = f"{median:.2f} ms, the median of {PINGS}"
    if median > SLOW_ROUND_TRIP:
        report.note(
            f"A round trip takes {median:.1f} ms, and each statement of a request waits for one.",
            "Run the application near its database; send fewer statements for a request.",
        )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


_FULL = "Close connections, or raise max_connections."
_OUTSIDE = (
    "This Galera node has lost the majority of its cluster: restore the network between the nodes,"
    " or name another node in the URL."
)

_REMEDIES: dict[str | int, str] = {"53300": _FULL, 1040: _FULL, 1203: _FULL, 1047: _OUTSIDE}
"""The remedies, by SQLSTATEs of PostgreSQL and error numbers of MySQL."""


def _remedy(error: BaseException, url: URL) -> str:
    if url.get_backend_name() == "sqlite":
        return (
            "Check that the file is an SQLite database, and the permissions of it and its folder."
        )
    several = len(hosts_of(url)) > 1
    place = describe_hosts(url) if several else f"{url.host}, port {url.port or 'by default'}"
    driver = driver_of_url(url)
    for cause in _causes(error):
        if (remedy := driver.remedy(cause)) is not None:
            return remedy
        for code in (getattr(cause, "sqlstate", None), next(iter(cause.args), None)):
            if isinstance(code, (str, int)) and code in _REMEDIES:
                return _REMEDIES[code]
        if isinstance(cause, socket.gaierror):
            return f"The host {describe_hosts(url)} is not known: correct it, or the name service."
        if isinstance(cause, ConnectionRefusedError):
            return (
                f"Nobody listens at {place}: start the server, or correct the place. `asgi-db wait`"
                " waits for a server that is about to come up."
            )
        if isinstance(cause, TimeoutError):
            return f"No answer from {place}: look at the server, and at firewalls on the way."
        if isinstance(cause, FileNotFoundError):
            return "Look at the socket or the certificate in the URL: there is no such file."
    return "Look at the options in the URL, and at what the log of the server says."
