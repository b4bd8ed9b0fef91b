"""One file for each database: what asgi-db has to know about it and its driver.

To add one, derive a class from `AnyDriver`, or from the most similar driver, and `register` an
instance of it.
"""

from __future__ import annotations

from sqlalchemy import URL, Engine
from sqlalchemy.engine import Dialect

from asgi_db.drivers.base import AnyDriver
from asgi_db.drivers.mysql import MySQL, asyncmy
from asgi_db.drivers.postgresql import PostgreSQL
from asgi_db.drivers.postgresql_asyncpg import asyncpg
from asgi_db.drivers.postgresql_psycopg import psycopg
from asgi_db.drivers.protocol import BEGIN_OPTION, Driver
from asgi_db.drivers.sqlite import SQLite, aiosqlite
from asgi_db.settings import accept_driver

_drivers: dict[str, Driver] = {
    driver.name: driver for driver in (asyncpg, psycopg, asyncmy, aiosqlite)
}

_other_drivers: dict[str, Driver] = {
    "postgresql": PostgreSQL(),
    "mysql": MySQL(),
    "mariadb": MySQL(),
    "sqlite": SQLite(),
}
"""What is known about a database if a user's own engine has another driver for it."""

_unknown = AnyDriver()


def register(driver: Driver) -> None:
    """Register a driver under its name in the URL; it replaces any other of that name."""
    _drivers[driver.name] = driver
    accept_driver(driver.name)


def driver_of(dialect: Dialect) -> Driver:
    """Return what is known about an engine's driver, including that of a user's own engine."""
    return _drivers.get(dialect.driver) or _other_drivers.get(dialect.name, _unknown)


def is_prepared(engine: Engine) -> bool:
    """Say whether an engine is one that `Driver.prepare` has prepared."""
    return BEGIN_OPTION in engine.get_execution_options()


def driver_of_url(url: URL) -> Driver:
    """Return the driver that a URL names, after `parse_database_url` has accepted it."""
    return _drivers[url.get_driver_name()]


def drivers_with_sandbox() -> list[str]:
    """Return the names of the drivers that have a sandbox for tests."""
    return [name for name, driver in _drivers.items() if driver.sandbox is not None]


def driver_packages() -> set[str]:
    """Return the packages whose errors are those of a database."""
    return {package for driver in _drivers.values() for package in driver.packages}


def error_code(error: BaseException) -> str | None:
    """Return the database's code for an error, which unlike its text contains no user data."""
    codes = (driver.code(error) for driver in _drivers.values())
    return next((code for code in codes if code), None)
