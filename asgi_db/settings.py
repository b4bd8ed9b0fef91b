"""Database URLs.

Everything here is decided before a connection exists, and every mistake is a `ConfigurationError`.
Its message never repeats a value that could hold a password: a URL with an unescaped character puts
part of the password where the host, the port or the database should be, and `repr(url)` shows it.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from os import PathLike
from typing import Any, Literal, Protocol, TypeAlias, cast, get_args, runtime_checkable

from sqlalchemy import URL
from sqlalchemy.exc import ArgumentError

from asgi_db.errors import ConfigurationError
from asgi_db.hosts import Host, hosts_of, is_host_name, is_port, make_url_of_hosts, with_hosts


@runtime_checkable
class Secret(Protocol):
    """What hides its value until it is asked for it, such as pydantic's `SecretStr`."""

    def get_secret_value(self) -> Any:
        """Return the value."""
        ...


DatabaseType: TypeAlias = Literal["postgresql", "postgresql+psycopg", "mysql", "mariadb", "sqlite"]
"""The databases that asgi-db works with; PostgreSQL by itself is used with asyncpg."""


_DRIVERS: Mapping[str, tuple[str, ...]] = {
    "postgresql": ("asyncpg", "psycopg"),
    "mysql": ("asyncmy",),
    "mariadb": ("asyncmy",),
    "sqlite": ("aiosqlite",),
}
"""The drivers for each database; the first is that of a URL which names none."""
_INSTALL = {
    "asyncpg": "asgi-db[postgresql]",
    "psycopg": "asgi-db[psycopg]",
    "asyncmy": "asgi-db[mysql]",
    "aiosqlite": "aiosqlite",
}
_accepted: set[str] = set()
"""Drivers that were registered besides those above, for any database."""
_MYSQL = ("mysql", "mariadb")
_PORTS = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306}
_ONE_HOST = (
    "names several hosts, and asyncmy connects to one: name the primary server, or a proxy that"
    " finds it, such as MaxScale, ProxySQL or HAProxy"
)
_MEMORY = ":memory:"
_TYPES: tuple[DatabaseType, ...] = get_args(DatabaseType)
TYPES = ", ".join(f'"{name}"' for name in _TYPES)
_SCHEMES = ", ".join(f"{name}://" for name in _DRIVERS)
_URL_PATTERN = "postgresql://user:password@host:5432/database"
_ESCAPES = "with @ : / ? # % in user and password written as %40 %3A %2F %3F %23 %25"


def create_database_url(
    type: DatabaseType,
    *,
    user: str | Secret | None = None,
    password: str | Secret | None = None,
    host: str | None = None,
    port: int | None = None,
    database: str | None = None,
    charset: str = "utf8mb4",
    unittest: bool = False,
) -> URL:
    """Build the URL of a database, with the asynchronous driver for its type.

    Values are taken as they are: nothing needs to be percent-encoded. A secret of pydantic, such as
    `SecretStr`, is unwrapped. The URL's `str` and `repr` hide the password.

    Args:
        host: name or address of the server, or of several PostgreSQL servers, separated by commas;
            default `localhost`.
        port: 1 to 65535; by default it is left out, so that the driver takes its own.
        database: name of the database; for SQLite the file, by default a database in memory.
        charset: character set of a MySQL or MariaDB connection; ignored for the others.
        unittest: name the database for tests instead, `<database>_test`, or for SQLite
            `shop_test.db` for `shop.db`; a database in memory stays one.

    Raises:
        ConfigurationError: a parameter is missing, does not fit the type or is out of range.
    """
    texts = [
        _text(name, value)
        for name, value in (
            ("user", user),
            ("password", password),
            ("host", host),
            ("database", database),
        )
    ]
    user, password, host, database = texts
    return UrlParts(type, user, password, host, port, database, charset, {}, unittest).url()


def _text(name: str, value: object) -> str | None:
    if isinstance(value, PathLike):
        value = os.fspath(cast("PathLike[str]", value))
    if isinstance(value, Secret) and not isinstance(value, type):
        value = value.get_secret_value()
    if value is not None and not isinstance(value, str):
        raise ConfigurationError(f"`{name}` must be a string, not {type(value).__name__}.")
    return value


@dataclass(frozen=True, repr=False)
class UrlParts:
    """The parts of a URL.

    A message calls them by `names`, which are environment variables, or else as parameters.
    """

    type: str
    user: str | None
    password: str | None
    host: str | None
    port: int | None
    database: str | None
    charset: str
    names: Mapping[str, str]
    unittest: bool = False

    def url(self) -> URL:
        """Build the URL.

        Raises:
            ConfigurationError: a part is missing, does not fit the type or is out of range.
        """
        if self.type not in _TYPES:
            raise self._error("type", f"must be one of {TYPES}")
        return self._sqlite_url() if self.type == "sqlite" else self._server_url()

    def _sqlite_url(self) -> URL:
        for part in ("user", "password", "host", "port"):
            if getattr(self, part) is not None:
                raise self._error(part, "has no meaning for SQLite, which is a file: leave it out")
        file = self.database or _MEMORY
        folder, name = os.path.split(file)
        if name in ("", ".", ".."):
            raise self._error("database", "must be the name of a file for SQLite, not of a folder")
        if self.unittest and file != _MEMORY:
            stem, suffix = os.path.splitext(name)
            file = os.path.join(folder, f"{stem}_test{suffix}")
        return URL.create("sqlite+aiosqlite", database=file)

    def _server_url(self) -> URL:
        if self.password is not None and not self.user:
            raise self._error("password", f"is set without a user: set {self._name('user')} too")
        if self.port is not None and not is_port(self.port):
            raise self._error("port", "must be a whole number from 1 to 65535")
        backend, _, driver = self.type.partition("+")
        url = URL.create(
            f"{backend}+{driver or _DRIVERS[backend][0]}",
            username=self.user or None,
            password=self.password,
            database=self._server_database(),
            query={"charset": self._mysql_charset()} if self.type in _MYSQL else {},
        )
        return with_hosts(url, self._hosts(backend), _PORTS[backend])

    def _hosts(self, backend: str) -> tuple[Host, ...]:
        names = [name.strip() for name in (self.host or "localhost").split(",")]
        if not all(map(is_host_name, names)):
            remedy = f"and the port goes into {self._name('port')}"
            raise self._error("host", f"must be a host name or an IP address alone, {remedy}")
        if len(names) > 1 and backend in _MYSQL:
            raise self._error("host", _ONE_HOST)
        return tuple(Host(name, self.port) for name in names)

    def _server_database(self) -> str:
        if not self.database:
            raise self._error("database", f"is missing: {self.type} needs the name of a database")
        name = f"{self.database}_test" if self.unittest else self.database
        self.check_length(name)
        return name

    def check_length(self, name: str) -> None:
        """Refuse a name of a database that the server would not take, or would shorten.

        Raises:
            ConfigurationError: it is too long.
        """
        # PostgreSQL truncates a longer name without an error: "<63 bytes>_test" would be the real
        # database, and not one for tests.
        size, limit = (
            (len(name), "64 characters")
            if self.type in _MYSQL
            else (len(name.encode("utf-8", "surrogatepass")), "63 bytes")
        )
        if size > int(limit.split()[0]):
            test = ' with "_test"' if self.unittest else ""
            raise self._error("database", f"is too long{test}: {self.type} allows {limit}")

    def _mysql_charset(self) -> str:
        if not _is_charset(self.charset):
            raise self._error(
                "charset",
                'must be the name of a character set that the driver knows, such as "utf8mb4"',
            )
        return self.charset

    def _name(self, part: str) -> str:
        return self.names.get(part, f"`{part}`")

    def _error(self, part: str, problem: str) -> ConfigurationError:
        return ConfigurationError(f"{self._name(part)} {problem}.")


def _is_charset(name: object) -> bool:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_]+", name):
        return False
    if find_spec("asyncmy") is None:
        return True  # without the driver there is no list of character sets
    return import_module("asyncmy.charset").charset_by_name(name) is not None


def accept_driver(name: str) -> None:
    """Let URLs name this driver too, as in `sqlite+name://`; such URLs are used as they are."""
    if name not in _INSTALL:
        _accepted.add(name)


def parse_database_url(url: str | URL | Secret) -> URL:
    """Read a database URL, and add the asynchronous driver if the URL names none.

    `postgres://`, `postgresql://`, `mysql://`, `mariadb://` and `sqlite://` are enough. MySQL and
    MariaDB get `charset=utf8mb4` unless the URL names another character set; a password in the
    query is moved to the part of the URL that SQLAlchemy hides. What other options mean to a
    driver stands in its own module.

    Raises:
        ConfigurationError: the URL cannot be parsed, its database, driver or character set is not
            supported, or the driver is not installed.
    """
    return read_url(url, "The database URL")


def read_url(url: str | URL | Secret, label: str) -> URL:
    """Read a database URL as `parse_database_url` does.

    Args:
        label: what a message calls it.
    """
    parsed = _hide_credentials(_read(url, label))
    backend, _, driver = parsed.drivername.partition("+")
    if driver in _accepted:
        return parsed
    backend = "postgresql" if backend == "postgres" else backend
    if backend not in _DRIVERS:
        raise ConfigurationError(
            f'{label} names the unknown database "{backend}": write one of {_SCHEMES}.'
        )
    supported = _DRIVERS[backend]
    if driver not in ("", *supported):
        schemes = ", ".join(f"{backend}+{name}://" for name in supported)
        raise ConfigurationError(
            f'{label} names the driver "{driver}", which asgi-db does not support: write '
            f"{schemes} or just {backend}://."
        )
    driver = driver or supported[0]
    parsed = _with_place(parsed, backend, label)
    if find_spec(driver) is None:
        raise ConfigurationError(
            f"{label} needs the driver {driver}, which is not installed: "
            f"run `pip install {_INSTALL[driver]}`."
        )
    if backend in _MYSQL and not _is_charset(parsed.query.get("charset", "utf8mb4")):
        raise ConfigurationError(
            f"{label} has in charset= the name of no character set that the driver knows: write"
            " charset=utf8mb4, or leave it out."
        )
    return _with_defaults(parsed.set(drivername=f"{backend}+{driver}"), backend)


def _read(url: object, label: str) -> URL:
    if isinstance(url, URL):
        return url
    if isinstance(url, Secret):
        url = url.get_secret_value()
    if not isinstance(url, str):
        raise ConfigurationError(
            f"{label} must be a string or a sqlalchemy.URL, not {type(url).__name__}."
        )
    parsed = _make_url(url)
    if parsed is None:
        raise ConfigurationError(
            f"{label} cannot be parsed: write it like {_URL_PATTERN}, {_ESCAPES}."
        )
    _check_escapes(url, parsed, label)
    return parsed


def _make_url(url: str) -> URL | None:
    # The caller raises, outside the `except`: SQLAlchemy's error may quote a part of the password,
    # and would stay reachable as the `__context__` of ours even with `from None`.
    try:
        return make_url_of_hosts(url)
    except (ArgumentError, ValueError):
        return None


def _check_escapes(url: str, parsed: URL, label: str) -> None:
    # SQLAlchemy ends the password at the first "@". With a second "@" the rest of the password
    # would be taken for the host, and stand in every log line that names the database.
    expected = 0 if parsed.username is None else 1
    if not parsed.drivername.startswith("sqlite") and url.count("@") > expected:
        raise ConfigurationError(
            f'{label} has an "@" too many: write it like {_URL_PATTERN}, {_ESCAPES}.'
        )


def _hide_credentials(url: URL) -> URL:
    # Both drivers accept `?user=…&password=…`, but SQLAlchemy's repr shows the query as it is.
    query = url.normalized_query
    return url.set(
        username=query["user"][-1] if "user" in query else None,
        password=query["password"][-1] if "password" in query else None,
    ).difference_update_query(["user", "password"])


def _with_place(url: URL, backend: str, label: str) -> URL:
    """Return the URL with its hosts in the form that SQLAlchemy understands."""
    if backend == "sqlite":
        if any(part is not None for part in (url.username, url.password, url.host, url.port)):
            raise ConfigurationError(
                f"{label} names a host or a user, which SQLite has not: write three slashes before"
                " a relative path, sqlite:///shop.db, and four before an absolute one, "
                "sqlite:////srv/shop.db."
            )
        return url
    problem = ""
    hosts: tuple[Host, ...] = ()
    try:
        hosts = hosts_of(url)
    except ValueError as error:
        problem = str(error)
    if len(hosts) > 1 and backend in _MYSQL:
        problem = _ONE_HOST
    if problem:
        raise ConfigurationError(f"{label} {problem}.")
    return with_hosts(url, hosts, _PORTS[backend]) if hosts else url


def _with_defaults(url: URL, backend: str) -> URL:
    if backend == "sqlite":
        return url.set(database=url.database or _MEMORY)
    if backend in _MYSQL:
        return url if "charset" in url.query else url.update_query_dict({"charset": "utf8mb4"})
    return url


def with_database_for_tests(url: URL, worker: str | None) -> URL:
    """Return the URL of the database for tests: `shop_test` for `shop`, or `shop_test_gw0`.

    Raises:
        ConfigurationError: the name is too long.
    """
    backend = url.get_backend_name()
    name = url.database or ""
    if name == _MEMORY:
        return url
    stem, suffix = os.path.splitext(name) if backend == "sqlite" else (name, "")
    stem = stem if stem.endswith("_test") else f"{stem}_test"
    name = f"{stem}_{worker}{suffix}" if worker else f"{stem}{suffix}"
    if backend != "sqlite":
        UrlParts(
            backend, None, None, None, None, name, "", {"database": "The database for tests"}
        ).check_length(name)
    return url.set(database=name)


def uuid4_str() -> str:
    """Return a random UUID as a string of 36 characters, for databases with no UUID type."""
    return str(uuid.uuid4())
