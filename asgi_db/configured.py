"""The database of a middleware or plugin: the one that it was given, or that is configured."""

from __future__ import annotations

import os
from weakref import WeakValueDictionary

from asgi_db.database import DEFAULT_FILE, Database
from asgi_db.environment import read_environment
from asgi_db.errors import ConfigurationError

_configured: WeakValueDictionary[tuple[object, ...], Database] = WeakValueDictionary()


def configured_database() -> Database:
    """Return the database that the environment configures: the same one as long as it is in use.

    Raises:
        ConfigurationError: the environment's settings cannot work.
    """
    url, options, replicas = read_environment(os.environ)
    key = (url or os.path.abspath(DEFAULT_FILE), replicas, *sorted(options.items()))
    database = _configured.get(key)
    if database is None:
        database = _configured[key] = Database()
    return database


def as_database(value: object) -> Database:
    """Return a database; what is embedded or named by the environment if None is given.

    Raises:
        ConfigurationError: it is something else than a `Database`.
    """
    if isinstance(value, Database):
        return value  # pyright: ignore[reportUnknownVariableType]
    if value is not None:
        what = value.__name__ if isinstance(value, type) else f"a {type(value).__name__}"
        raise ConfigurationError(
            f"database= takes a Database, not {what}: write database=Database(...), with a URL or"
            " engine=."
        )
    return configured_database()
