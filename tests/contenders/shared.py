"""What the contenders have in common: the table, the settings of the pool, and what they send.

They are imported by the server that serves them, where `DATABASE_URL` is the database.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from sqlalchemy import BigInteger, String, TextClause, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

URL = os.environ["DATABASE_URL"]

REPLICA_URLS = os.environ.get("REPLICA_URLS", "").split()
"""The same database on replicas, for the contenders which read there; see `Contender`."""

IS_POOLED = bool(os.environ.get("IS_POOLED"))
"""Whether there is a PgBouncer in transaction pooling before each server."""

POOL = {
    "pool_size": int(os.environ.get("POOL_SIZE", "5")),
    "max_overflow": 0,
    "pool_timeout": int(os.environ.get("POOL_TIMEOUT", "2")),
}

ENGINE: dict[str, Any] = {**POOL}
"""The settings of an engine: asyncpg's caches do not suit a PgBouncer."""
if IS_POOLED:
    ENGINE["connect_args"] = {"statement_cache_size": 0, "prepared_statement_cache_size": 0}


class Base(DeclarativeBase):
    """The tables of the contenders."""


class Item(Base):
    __tablename__ = "items"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    value: Mapped[str] = mapped_column(String(64))


FIRST_VALUE = select(Item.value).where(Item.id == 1)
"""What a stream asks before each piece."""


def item(id: int) -> Item:
    """A new item, whose value follows from its id."""
    return Item(id=id, value=f"value-{id}")


def sleep(seconds: float) -> TextClause:
    """A statement that takes so long."""
    function = "pg_sleep" if URL.startswith("postgresql") else "SLEEP"
    return text(f"SELECT {function}(:seconds)").bindparams(seconds=seconds)


def long(seconds: int) -> TextClause:
    """The same, of which the server does not notice by itself that nobody waits for it any more.

    MariaDB's `SLEEP` looks for its client every 5 s.
    """
    if URL.startswith("postgresql"):
        return sleep(seconds)
    return text(f"SELECT SUM(SLEEP(0.1)) FROM seq_1_to_{seconds * 10}")


async def pieces(
    read: Callable[[], Awaitable[object]], chunks: int, seconds: float, form: str = "{}\n"
) -> AsyncIterator[str]:
    """A body in pieces, with a query before each."""
    for _ in range(chunks):
        yield form.format(await read())
        await asyncio.sleep(seconds)


EVENT = "data: {}\n\n"


async def megabytes() -> AsyncIterator[bytes]:
    """5 MB: more than all buffers between the application and a client that reads nothing."""
    for _ in range(80):
        yield b"x" * 65_536
