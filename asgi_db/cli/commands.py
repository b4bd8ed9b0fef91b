"""The commands of `asgi-db`."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import click
from sqlalchemy import MetaData, Table
from sqlalchemy.exc import SQLAlchemyError

from asgi_db.cli.check import check, describe
from asgi_db.cli.report import Plan, Report, Severity
from asgi_db.cli.tables import existing, load_metadata
from asgi_db.database import Database
from asgi_db.errors import ConfigurationError
from asgi_db.pool.abandoned import connection_of
from asgi_db.profiles import POOL_PROFILES, PoolName, pool_profile

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
def check_command(url: str | None, pool: PoolName, processes: int) -> None:
    """Say how the database is set up, and what to change.

    The exit code is 1 if there is an error: something with which the application cannot work.
    """
    database = _database(url)
    plan = Plan(database.url, pool, pool_profile(pool), processes)
    report = asyncio.run(check(database, plan))
    _show(report)
    if report.count(Severity.ERROR):
        sys.exit(1)


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
