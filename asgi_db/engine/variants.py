"""How a transaction begins: the variants of an engine, one for each way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.pool import PoolProxiedConnection

from asgi_db.drivers import driver_of, is_prepared
from asgi_db.drivers.protocol import BEGIN_OPTION
from asgi_db.engine.watching import BEGINNING, watch
from asgi_db.errors import ConfigurationError
from asgi_db.modes import Mode


def refuse_autocommit(setting: str, options: Mapping[str, Any]) -> None:
    """Refuse an engine that commits each statement by itself, so that no mode could roll back.

    Args:
        setting: the setting of `Database` that the options come from.
        options: the options of `create_engine`.

    Raises:
        ConfigurationError: its isolation level is AUTOCOMMIT.
    """
    of_connections: Mapping[str, Any] = options.get("execution_options") or {}
    for level in (options.get("isolation_level"), of_connections.get("isolation_level")):
        # SQLAlchemy reads the level in the same way.
        if str(level).replace("_", " ").upper() == "AUTOCOMMIT":
            raise ConfigurationError(
                f"{setting} has the isolation level AUTOCOMMIT, with which transactional could not"
                " roll back: leave it out. To read without a transaction, use read_only."
            )


def isolation_options(engine: Engine) -> dict[str, Any]:
    """Return the options of `create_engine` that set the isolation level of an engine.

    One of the two cannot be read through a public API; the test of engines in autocommit in
    `test_database.py` breaks when this changes.
    """
    return {
        "isolation_level": getattr(engine.dialect, "_on_connect_isolation_level", None),
        "execution_options": engine.get_execution_options(),
    }


def variant_options(engine: Engine, mode: Mode) -> dict[str, Any]:
    """Return the execution options with which an engine serves this mode.

    Raises:
        ConfigurationError: the mode asks for a feature that this database does not have.
    """
    dialect = engine.dialect
    driver = driver_of(dialect)
    if mode.deferrable and not driver.has_deferrable:
        raise ConfigurationError(
            f"deferrable=True exists only on PostgreSQL, and this database is {dialect.name}: leave"
            " it out of transactional(...)."
        )
    return driver.begin_options(mode, is_prepared=is_prepared(engine))


def variant(engine: Engine, mode: Mode) -> Engine:
    """Return the variant of an engine whose transactions begin as the mode requires.

    Raises:
        ConfigurationError: the mode asks for a feature that this database does not have.
    """
    watch(engine)
    options = variant_options(engine, mode)
    if options.items() <= engine.get_execution_options().items():
        # The engine itself is faster than a variant, which looks up its events in the engine.
        return engine
    varied = engine.execution_options(**options)
    if (beginning := options.get(BEGIN_OPTION)) is not None:

        def raw_connection() -> PoolProxiedConnection:
            pooled = engine.raw_connection()
            # `do_begin` sees only this connection.
            pooled.info[BEGINNING] = beginning
            return pooled

        varied.raw_connection = raw_connection  # type: ignore[method-assign]
    return varied
