"""What a test does with the driver of PostgreSQL itself: each driver has its way."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Sequence
from typing import Any

import asyncpg
import psycopg
from sqlalchemy.engine import make_url

UNIQUE_VIOLATIONS = asyncpg.UniqueViolationError, psycopg.errors.UniqueViolation


def is_psycopg(url: str) -> bool:
    """Whether the URL names psycopg."""
    return make_url(url).get_driver_name() == "psycopg"


def server_settings(url: str, **settings: str) -> dict[str, Any]:
    """The `connect_args` with which the server gets these settings."""
    if is_psycopg(url):
        return {"options": " ".join(f"-c{name}={value}" for name, value in settings.items())}
    return {"server_settings": settings}


def prepares_at_once(url: str) -> dict[str, Any]:
    """The `connect_args` with which each statement is prepared; psycopg prepares the sixth."""
    return {"prepare_threshold": 0} if is_psycopg(url) else {}


async def copy(connection: Any, table: str, rows: Sequence[tuple[Any, ...]], column: str) -> None:
    """Copy rows into a column of a table, over the connection of the driver."""
    if hasattr(connection, "copy_records_to_table"):
        await connection.copy_records_to_table(table, records=rows, columns=[column])
        return
    async with (
        connection.cursor() as cursor,
        cursor.copy(f"COPY {table} ({column}) FROM STDIN") as copying,
    ):
        for row in rows:
            await copying.write_row(row)


async def connect(url: str) -> Any:
    """A connection of the driver."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    if is_psycopg(url):
        return await psycopg.AsyncConnection.connect(plain)
    return await asyncpg.connect(plain)


def has_seen_its_end(connection: Any) -> bool:
    """Whether the end of its stream has reached the driver, or the socket of psycopg."""
    if isinstance(connection, psycopg.AsyncConnection):
        end = select.poll()
        end.register(connection.fileno(), select.POLLRDHUP)
        return bool(end.poll(0))
    if hasattr(connection, "is_closed"):
        return bool(connection.is_closed())
    return bool(connection._stream_broken)  # asyncmy has no public word for it


async def until_closed(connection: Any) -> None:
    """Wait until the server has closed the connection, and the driver can know it."""
    async with asyncio.timeout(10):
        while True:
            if has_seen_its_end(connection):
                return
            await asyncio.sleep(0.001)
