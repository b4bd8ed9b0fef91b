"""`asgi-db check`: connects as the application would, and says what it finds."""

from __future__ import annotations

import platform
import socket
import statistics
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import anyio
from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from asgi_db.cli import mysql, postgresql, sqlite
from asgi_db.cli.report import Plan, Report
from asgi_db.database import Database
from asgi_db.drivers import driver_of_url
from asgi_db.errors import ConfigurationError
from asgi_db.pool.abandoned import connection_of

TIMEOUT = 10.0
"""Seconds that the whole check may take."""

PINGS = 21
"""How many round trips are measured."""

SLOW_ROUND_TRIP = 5.0
"""Milliseconds from which a round trip is worth a note."""


async def check(database: Database, plan: Plan) -> Report:
    """Check a database; what it finds is in the report, and never raised."""
    report = Report()
    report.facts["database"] = repr(database.url)
    report.facts["versions"] = ", ".join(
        f"{name} {version(name)}" for name in (database.url.get_driver_name(), "SQLAlchemy")
    )
    report.facts["versions"] += f", Python {platform.python_version()}"
    try:
        with anyio.fail_after(TIMEOUT):
            if plan.url.get_backend_name() == "sqlite":
                await _check_file(report, plan)
            else:
                await _check_server(report, database, plan)
    except (SQLAlchemyError, OSError, ConfigurationError) as error:
        report.error(f"The database cannot be used: {describe(error)}.", _remedy(error, plan.url))
    return report


async def _check_file(report: Report, plan: Plan) -> None:
    sqlite.check_file(report, plan)
    async with sqlite.connected(plan.url) as connection:
        if connection is not None:
            await sqlite.check_journal(report, connection)
            await _measure(report, connection)


async def _check_server(report: Report, database: Database, plan: Plan) -> None:
    is_postgresql = plan.url.get_backend_name() == "postgresql"
    async with database, _connected(database) as connection:
        await (postgresql if is_postgresql else mysql).check(report, plan, connection)
        await _measure(report, connection)


@asynccontextmanager
async def _connected(database: Database) -> AsyncGenerator[AsyncConnection]:
    async with connection_of(database.engine) as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        yield connection


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


def describe(error: BaseException) -> str:
    """Say what an error is, in one line and without SQLAlchemy's advice."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig else error
    what = str(cause).partition("\n")[0].rstrip(".") or "no answer in time"
    name = type(cause).__name__
    return what if name in ("Error", "ConfigurationError") else f"{name}: {what}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


_FULL = "Close connections, or raise max_connections."

_REMEDIES: dict[str | int, str] = {"53300": _FULL, 1040: _FULL, 1203: _FULL}
"""The remedies, by SQLSTATEs of PostgreSQL and error numbers of MySQL."""


def _remedy(error: BaseException, url: URL) -> str:
    if url.get_backend_name() == "sqlite":
        return (
            "Check that the file is an SQLite database, and the permissions of it and its folder."
        )
    place = f"{url.host}, port {url.port or 'by default'}"
    driver = driver_of_url(url)
    for cause in _causes(error):
        if (remedy := driver.remedy(cause)) is not None:
            return remedy
        for code in (getattr(cause, "sqlstate", None), next(iter(cause.args), None)):
            if isinstance(code, (str, int)) and code in _REMEDIES:
                return _REMEDIES[code]
        if isinstance(cause, socket.gaierror):
            return f"The host {url.host} is not known: correct it, or the name service."
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
