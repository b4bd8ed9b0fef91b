"""The options of a PostgreSQL URL for psycopg, which passes them to libpq as they are.

Sources: https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS,
https://www.psycopg.org/psycopg3/docs/api/connections.html#psycopg.AsyncConnection.connect
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from sqlalchemy import URL

from asgi_db.drivers.url_options import (
    OF_OTHER_PROGRAMS,
    Arguments,
    Option,
    Translate,
    choice,
    number,
    refuse,
    text,
    translate,
)
from asgi_db.errors import ConfigurationError

_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl")


def _whole(option: Option, arguments: Arguments) -> None:
    number(option.name, int)(option, arguments)


def _one_of(*values: str) -> Translate:
    def take(option: Option, arguments: Arguments) -> None:
        choice(option.name, *values)(option, arguments)

    return take


def _file(option: Option, arguments: Arguments) -> None:
    if not os.path.isfile(option.value) and (option.name, option.value) != (
        "sslrootcert",
        "system",
    ):
        raise option.refused("names no file: correct the path.")
    arguments[option.name] = option.value


def _prepare_threshold(option: Option, arguments: Arguments) -> None:
    if option.value.lower() == "none":
        arguments[option.name] = None
    else:
        _whole(option, arguments)


_switch = _one_of("0", "1")
_WRITE_PREPARE_THRESHOLD = "is asyncpg's: write prepare_threshold=, or leave it out."
_TABLE: Mapping[str, Translate] = {
    "sslmode": _one_of(*_MODES),
    "sslnegotiation": _one_of("postgres", "direct"),
    "sslcompression": _switch,
    "sslsni": _switch,
    "sslcertmode": _one_of("disable", "allow", "require"),
    **dict.fromkeys(_FILES, _file),
    "channel_binding": _one_of("disable", "prefer", "require"),
    "gssencmode": _one_of("disable", "prefer", "require"),
    "gssdelegation": _switch,
    "gsslib": _one_of("gssapi", "sspi"),
    "target_session_attrs": _one_of(
        "any", "read-write", "read-only", "primary", "standby", "prefer-standby"
    ),
    "load_balance_hosts": _one_of("disable", "random"),
    "connect_timeout": _whole,
    "keepalives": _switch,
    "keepalives_idle": _whole,
    "keepalives_interval": _whole,
    "keepalives_count": _whole,
    "tcp_user_timeout": _whole,
    "prepare_threshold": _prepare_threshold,
    "replication": refuse("makes a connection for replication: leave it out."),
    "autocommit": refuse("each mode of asgi-db sets itself: leave it out."),
    # What asyncpg calls otherwise.
    "ssl": refuse("is asyncpg's: write sslmode=."),
    "timeout": refuse("is asyncpg's: write connect_timeout=."),
    "command_timeout": refuse(
        "is asyncpg's: write options=-cstatement_timeout%3D and the milliseconds."
    ),
    "statement_cache_size": refuse(_WRITE_PREPARE_THRESHOLD),
    "prepared_statement_cache_size": refuse(_WRITE_PREPARE_THRESHOLD),
    "max_cached_statement_lifetime": refuse(_WRITE_PREPARE_THRESHOLD),
    "max_cacheable_statement_size": refuse(_WRITE_PREPARE_THRESHOLD),
    **OF_OTHER_PROGRAMS,
}
"""What can be judged here. libpq is told every option under its own name, and judges the others."""

_OWN = frozenset({"host", "port"})
_PARTS_OF_THE_URL = frozenset({"dbname", "user", "password"})


def _known_to_libpq() -> set[str]:
    try:
        psycopg = import_module("psycopg")
    except ImportError:
        raise ConfigurationError(
            "psycopg finds no libpq, on which it is built: run `pip install asgi-db[psycopg]`,"
            " which brings one along."
        ) from None
    return {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()}


def translate_url(url: URL) -> tuple[URL, dict[str, Any]]:
    """Move the options of a URL into arguments of `psycopg.AsyncConnection.connect`.

    Raises:
        ConfigurationError: psycopg has nothing for an option, or it has a value that cannot work.
    """
    others = {name: text(name) for name in _known_to_libpq() - _OWN - _PARTS_OF_THE_URL}
    translated, arguments = translate(url, {**others, **_TABLE}, _OWN, "psycopg or libpq")
    mode = arguments.get("sslmode", "prefer")
    for name in _FILES:
        if name in arguments and _MODES.index(mode) < _MODES.index("require"):
            raise Option(name, "").refused(
                "has an effect only with sslmode=require or more: add it."
            )
    return translated, arguments
