"""The commands of `asgi-db`."""

from __future__ import annotations

import asyncio
import math
import os
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import click
from sqlalchemy import URL, MetaData, Table
from sqlalchemy.exc import SQLAlchemyError

from asgi_db.cli.capacity import Load, check_load, check_servers, most_pools
from asgi_db.cli.check import check
from asgi_db.cli.report import Plan, Report, Severity, describe
from asgi_db.cli.tables import existing, load_metadata
from asgi_db.database import Database
from asgi_db.errors import ConfigurationError
from asgi_db.pool.abandoned import connection_of
from asgi_db.profiles import POOL_PROFILES, PoolName, pool_profile
from asgi_db.settings import read_url

T = TypeVar("T")

_COLOURS = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTE: "cyan"}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="asgi-db")
def cli() -> None:
    """Look after the database of an ASGI application.

    Where it is says --url, or the environment as for Database(): DATABASE_URL, or DATABASE_TYPE
    and its companions; without these it is the SQLite file app.db.
    """


_url = click.option("--url", help="Where the database is; `ps` shows it, unlike the environment.")
_tables = click.argument("tables", metavar="MODULE:BASE")


_POSITIVE = click.FloatRange(min=0, min_open=True)

_MOST_IN_USE = 100_000
"""Connections in use at once from which a load is a mistake."""


def _finite(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    """Refuse nan and infinity, which are within every range."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a number to compute with.", context, option)
    return value


@cli.command("check")
@_url
@click.option(
    "--pool",
    type=click.Choice(list(POOL_PROFILES)),
    default="medium",
    show_default=True,
    help="The pool profile of the application.",
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many processes of the application there are, on all machines.",
)
@click.option(
    "--rate",
    type=_POSITIVE,
    callback=_finite,
    help="Requests per second that use the database, of all processes together; needs --hold.",
)
@click.option(
    "--hold",
    type=_POSITIVE,
    callback=_finite,
    help="Seconds for which such a request holds a connection, in the mean: held / units of"
    " database.stats().",
)
@click.option(
    "--reads",
    type=click.FloatRange(0, 1),
    callback=_finite,
    help="The share of these requests that replicas serve, from 0 to 1; needs"
    " DATABASE_REPLICA_URLS.",
)
def check_command(
    url: str | None,
    pool: PoolName,
    processes: int,
    rate: float | None,
    hold: float | None,
    reads: float | None,
) -> None:
    """Say how the database is set up, and what to change.

    With --rate and --hold also how much of the pools is in use, and what waits for a connection.

    The exit code is 1 if there is an error: something with which the application cannot work.
    """
    database, replicas = _database(url), _replicas()
    load = _load_of(database.url, rate, hold, reads, replicas)
    pools = most_pools(database.url, database.url, replicas) if replicas else 1
    plan = Plan(database.url, pool, pool_profile(pool), processes, pools)
    report = asyncio.run(check(database, plan, replicas))
    check_servers(report, plan, replicas)
    if load is not None:
        check_load(report, plan, load, replicas)
    _show(report)
    if report.count(Severity.ERROR):
        sys.exit(1)


def _replicas() -> list[URL]:
    try:
        urls = os.environ.get("DATABASE_REPLICA_URLS", "").split()
        return [read_url(url, "DATABASE_REPLICA_URLS") for url in urls]
    except ConfigurationError as error:
        raise click.ClickException(str(error)) from None


def _load_of(
    url: URL,
    rate: float | None,
    hold: float | None,
    reads: float | None,
    replicas: Sequence[URL],
) -> Load | None:
    """Return the load that the options describe; None if they describe none."""
    if rate is None or hold is None:
        for name, value, missing in (
            ("--rate", rate, "--hold, the seconds for which a request holds a connection"),
            ("--hold", hold, "--rate, the requests per second of all processes"),
            ("--reads", reads, "--rate and --hold"),
        ):
            if value is not None:
                raise click.UsageError(f"{name} needs {missing}.")
        return None
    if url.get_backend_name() == "sqlite":
        raise click.UsageError(
            "--rate is for a server: on SQLite one transaction writes at a time, whatever the pool."
        )
    if reads is not None and not replicas:
        raise click.UsageError("--reads needs replicas, and DATABASE_REPLICA_URLS names none.")
    if rate * hold > _MOST_IN_USE:
        raise click.UsageError(
            f"--rate times --hold is {rate * hold:,.0f} connections in use at once, and no server"
            " has that many: --hold is in seconds."
        )
    return Load(rate, hold, reads or 0.0)


def _show(report: Report) -> None:
    for values in (report.facts, report.settings):
        if values:
            width = max(map(len, values))
            for name, value in values.items():
                click.echo(f"{name:{width}}  {value}")
            click.echo()
    for severity in Severity:
        for finding in report.findings:
            if finding.severity is severity:
                click.secho(f"{severity.value}: ", fg=_COLOURS[severity], bold=True, nl=False)
                click.echo(f"{finding.problem}\n    {finding.remedy}")
    numbers = [_number(report.count(severity), severity.value) for severity in Severity]
    click.echo(", ".join(numbers))


def _number(count: int, name: str) -> str:
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


@cli.command()
@_url
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=30,
    show_default=True,
    help="Seconds after which to give up.",
)
def wait(url: str | None, timeout: float) -> None:
    """Wait until the database answers, as in a container's start.

    The exit code is 1 if it does not.
    """
    database = _database(url, wait_for=timeout)
    started = time.monotonic()
    _run(database, lambda: asyncio.sleep(0))
    click.echo(f"{database.url!r} answers, after {time.monotonic() - started:.1f} s.")


@cli.command()
@_url
@_tables
def create_tables(url: str | None, tables: str) -> None:
    """Create the tables that do not exist yet.

    Those that exist stay as they are: to change them is for Alembic. MODULE:BASE is where the
    tables are, such as shop.tables:Base; it is imported from the working directory too.
    """
    database, metadata = _database(url), _load(tables)
    there = _run(database, lambda: _create(database, metadata))
    created = [table for table in metadata.sorted_tables if table not in there]
    click.echo(f"{database.url!r}")
    click.echo(f"created: {_names(created)}")
    if there:
        click.echo(f"there already, and left as they are: {_names(there)}")


async def _create(database: Database, metadata: MetaData) -> list[Table]:
    there = await _existing(database, metadata)
    await database.create_tables(metadata)
    return there


@cli.command()
@_url
@_tables
@click.option("--yes", is_flag=True, help="Do not ask.")
def drop_tables(url: str | None, tables: str, yes: bool) -> None:
    """Drop the tables, with all that is in them.

    Asks first. MODULE:BASE is where the tables are, such as shop.tables:Base.
    """
    database, metadata = _database(url), _load(tables)
    there = _run(database, lambda: _existing(database, metadata))
    click.echo(f"{database.url!r}")
    if not there:
        click.echo(f"has none of the tables of {tables}.")
        return
    click.echo(f"tables: {_names(there)}")
    if not yes:
        if not sys.stdin.isatty():
            raise click.ClickException("There is no terminal to ask at: say --yes.")
        click.confirm("Drop these tables, with all that is in them?", abort=True)
    _run(database, lambda: database.drop_tables(metadata))
    click.echo("dropped.")


async def _existing(database: Database, metadata: MetaData) -> list[Table]:
    async with connection_of(database.engine) as connection:
        return await connection.run_sync(existing, metadata)


def _names(tables: list[Table]) -> str:
    return ", ".join(table.fullname for table in tables) or "none"


def _database(url: str | None, *, wait_for: float = 0) -> Database:
    try:
        place = Database(url).url
        # There may be a pooler, with which asyncpg's prepared statements fail; others need no care.
        is_postgresql = place.get_backend_name() == "postgresql"
        return Database(place, pooler="transaction" if is_postgresql else None, wait_for=wait_for)
    except ConfigurationError as error:
        raise click.ClickException(str(error)) from None


def _load(tables: str) -> MetaData:
    try:
        return load_metadata(tables)
    except ConfigurationError as error:
        raise click.ClickException(str(error)) from None


def _run(database: Database, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    async def started() -> T:
        async with database:
            return await work()

    try:
        return asyncio.run(started())
    except SQLAlchemyError as error:
        raise click.ClickException(f"{database.url!r}: {describe(error)}") from None
    except (ConnectionError, ConfigurationError) as error:  # it did not come up, or never will
        raise click.ClickException(str(error)) from None
