"""Databases that last as long as a test run."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from urllib.parse import unquote, urlsplit

from anyio.from_thread import start_blocking_portal
from sqlalchemy import URL, NullPool, text
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_db.errors import ConfigurationError
from asgi_db.settings import parse_database_url, with_database_for_tests


def test_database_url(url: str | URL, *, worker: str | None = None) -> URL:
    """Return the URL of a database for tests: `shop_test` beside `shop`.

    Args:
        url: the URL of the real database, or of a database for tests.
        worker: the name of a worker process, such as pytest-xdist's `gw0`, which gets a database
            of its own: `shop_test_gw0`.

    Raises:
        ConfigurationError: the URL cannot be used, or the name would be too long.
    """
    return with_database_for_tests(parse_database_url(url), worker)


test_database_url.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it.


@contextmanager
def temporary_database(url: str | URL) -> Generator[URL]:
    """Create an empty database for tests, and drop it at the end.

    An existing database of this name is dropped first, so the name has to say that it is for tests.

    Args:
        url: the URL of the database, whose name ends with `_test` or contains `_test_`. The folders
            of an SQLite file do not count.

    Raises:
        ConfigurationError: the name does not say that it is for tests.
    """
    parsed = parse_database_url(url)
    name = _name_of(parsed)
    if not (name.endswith("_test") or "_test_" in name or name == ":memory:"):
        raise ConfigurationError(
            f"The database {name!r} would be dropped, but its name does not say that it is for"
            " tests: let it end with _test."
        )
    _replace(parsed, create=True)
    try:
        yield parsed
    finally:
        _replace(parsed, create=False)


def _name_of(url: URL) -> str:
    if url.get_backend_name() != "sqlite":
        return url.database or ""
    return os.path.splitext(os.path.basename(_file_of(url)))[0]


def _file_of(url: URL) -> str:
    """The file of an SQLite database, which the URL may name by a URI: `file:shop_test.db`."""
    (name,), options = url.get_dialect()().create_connect_args(url)
    return unquote(urlsplit(name).path) if options.get("uri") else str(name)


def _replace(url: URL, *, create: bool) -> None:
    if url.get_backend_name() == "sqlite":
        for suffix in ("", "-wal", "-shm", "-journal"):
            with suppress(FileNotFoundError):
                os.remove(f"{_file_of(url)}{suffix}")
        return
    # This also works while an event loop is running.
    with start_blocking_portal() as portal:
        portal.call(_replace_on_server, url, create)


async def _replace_on_server(url: URL, create: bool) -> None:
    is_postgresql = url.get_backend_name() == "postgresql"
    server = url.set(database="postgres" if is_postgresql else "")
    engine = create_async_engine(server, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    name = engine.dialect.identifier_preparer.quote_identifier(url.database or "")
    force = " WITH (FORCE)" if is_postgresql else ""
    charset = "" if is_postgresql else " CHARACTER SET utf8mb4"
    try:
        async with engine.connect() as connection:
            await connection.execute(text(f"DROP DATABASE IF EXISTS {name}{force}"))
            if create:
                await connection.execute(text(f"CREATE DATABASE {name}{charset}"))
    finally:
        await engine.dispose()
