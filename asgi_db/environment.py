"""The environment variables that name a database."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from sqlalchemy import URL

from asgi_db.errors import ConfigurationError
from asgi_db.settings import TYPES, UrlParts, read_url

_ENVIRONMENT = {
    "type": "DATABASE_TYPE",
    "user": "DATABASE_USER",
    "password": "DATABASE_PASSWORD",
    "host": "DATABASE_HOST",
    "port": "DATABASE_PORT",
    "database": "DATABASE_SCHEMA",
    "charset": "DATABASE_CHARSET",
}
_SWITCHES: Mapping[str, bool | Literal["debug"]] = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
    "debug": "debug",
}


class Environment(NamedTuple):
    """What the environment says about a database.

    Attributes:
        url: where it is; None if nothing says so.
        engine_options: options of its engine.
        replicas: the URLs of its replicas.
    """

    url: URL | None
    engine_options: dict[str, Any]
    replicas: tuple[str, ...]


def read_environment(environ: Mapping[str, str]) -> Environment:
    """Read all environment variables that name or configure a database.

    Raises:
        ConfigurationError: a variable is wrong or missing; the message names it.
    """
    return Environment(
        database_url_from_env(environ),
        engine_options_from_env(environ),
        replica_urls_from_env(environ),
    )


def database_url_from_env(environ: Mapping[str, str]) -> URL | None:
    """Read the database URL from environment variables; None if none of them is set.

    `DATABASE_URL` wins. Without it the URL is built from `DATABASE_TYPE`, `DATABASE_USER`,
    `DATABASE_PASSWORD`, `DATABASE_HOST`, `DATABASE_PORT`, `DATABASE_SCHEMA` (the name of the
    database) and `DATABASE_CHARSET`. An empty variable counts as not set.

    Raises:
        ConfigurationError: a variable is wrong or missing; the message names it.
    """
    if url := environ.get("DATABASE_URL", "").strip():
        return read_url(url, "DATABASE_URL")
    given = {part: environ[name] for part, name in _ENVIRONMENT.items() if environ.get(name)}
    if not given:
        return None
    if "type" not in given:
        raise ConfigurationError(
            f"DATABASE_TYPE is missing beside {_ENVIRONMENT[next(iter(given))]}: "
            f"set it to one of {TYPES}."
        )
    built = UrlParts(
        given["type"].strip().lower(),
        given.get("user"),
        given.get("password"),
        given.get("host"),
        _env_port(given.get("port")),
        given.get("database"),
        given.get("charset", "utf8mb4"),
        _ENVIRONMENT,
    ).url()
    return read_url(built, "DATABASE_TYPE")


def replica_urls_from_env(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Read the URLs of the replicas from `DATABASE_REPLICA_URLS`, where blanks separate them.

    Raises:
        ConfigurationError: something else separates them.
    """
    urls = environ.get("DATABASE_REPLICA_URLS", "")
    if re.search(r"[,;]\s*[\w+]+://|://\S*[,;](?:\s|$)", urls):
        raise ConfigurationError(
            "DATABASE_REPLICA_URLS has a comma or semicolon between its URLs: put blanks there."
        )
    return tuple(urls.split())


def _env_port(port: str | None) -> int | None:
    if port is None:
        return None
    # What is not a number becomes 0, which is reported as out of range.
    return int(port) if re.fullmatch(r"[0-9]{1,5}", port.strip()) else 0


def engine_options_from_env(environ: Mapping[str, str]) -> dict[str, Any]:
    """Read `DATABASE_ECHO` and `DATABASE_POOL_ECHO` as the engine options `echo` and `echo_pool`.

    Both take true, false, 1, 0, yes, no, on, off or debug, in upper or lower case. The result has
    only the options whose variables are set.

    Raises:
        ConfigurationError: a variable has another value; the message names it.
    """
    options: dict[str, Any] = {}
    for name, option in (("DATABASE_ECHO", "echo"), ("DATABASE_POOL_ECHO", "echo_pool")):
        if value := environ.get(name, "").strip().lower():
            if value not in _SWITCHES:
                raise ConfigurationError(f"{name} must be one of {', '.join(_SWITCHES)}.")
            options[option] = _SWITCHES[value]
    return options
