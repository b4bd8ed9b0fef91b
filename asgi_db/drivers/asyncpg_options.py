"""The options of a PostgreSQL URL, as libpq knows them and asyncpg takes them.

Sources: https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS,
https://magicstack.github.io/asyncpg/current/api/index.html#asyncpg.connection.connect
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import URL

from asgi_db.drivers.url_options import (
    CERTIFICATES,
    OF_OTHER_PROGRAMS,
    Arguments,
    Certificates,
    Option,
    Translate,
    choice,
    nothing,
    number,
    refuse,
    text,
    translate,
)

_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


def _server_setting(name: str) -> Translate:
    def take(option: Option, arguments: Arguments) -> None:
        arguments.setdefault("server_settings", {}).setdefault(name, option.value)

    return take


def _ssl(option: Option, arguments: Arguments) -> None:
    if option.value not in _MODES:
        raise option.refused(
            f"must be one of {', '.join(_MODES)}; with require the connection is encrypted and the"
            " server not verified."
        )
    arguments["ssl"] = option.value


_certificates = Certificates(
    {
        "ca": "sslrootcert",
        "cert": "sslcert",
        "key": "sslkey",
        "password": "sslpassword",
        "crl": "sslcrl",
    }
)


def _negotiation(option: Option, arguments: Arguments) -> None:
    choice("direct_tls", "postgres", "direct")(option, arguments)
    arguments["direct_tls"] = option.value == "direct"


_NOT_OF_ASYNCPG = "asyncpg cannot do: leave it out."
_KEEPALIVE = "asyncpg leaves to the operating system: leave it out."
_TABLE: Mapping[str, Translate] = {
    "ssl": _ssl,
    "sslmode": _ssl,
    **_certificates.table,
    "sslnegotiation": _negotiation,
    "sslsni": nothing("1", remedy=_NOT_OF_ASYNCPG),
    "sslcompression": nothing("0", remedy=_NOT_OF_ASYNCPG),
    "channel_binding": nothing(
        "prefer",
        "disable",
        remedy="asyncpg cannot do: leave it out, and write sslmode=verify-full, with which no other"
        " server can take the place of this one.",
    ),
    "gssencmode": nothing("prefer", "disable", remedy=_NOT_OF_ASYNCPG),
    "require_auth": refuse(_NOT_OF_ASYNCPG),
    "connect_timeout": number("timeout", zero=None),
    "timeout": number("timeout", zero=None),
    "command_timeout": number("command_timeout", zero=None),
    "statement_cache_size": number("statement_cache_size", int),
    "prepared_statement_cache_size": number("prepared_statement_cache_size", int),
    "max_cached_statement_lifetime": number("max_cached_statement_lifetime", int),
    "max_cacheable_statement_size": number("max_cacheable_statement_size", int),
    "application_name": _server_setting("application_name"),
    "fallback_application_name": _server_setting("application_name"),
    "options": _server_setting("options"),
    "client_encoding": nothing(
        "auto", "utf8", "utf-8", "unicode", remedy="asyncpg needs to be UTF8: leave it out."
    ),
    "target_session_attrs": choice(
        "target_session_attrs",
        "any",
        "primary",
        "standby",
        "prefer-standby",
        "read-write",
        "read-only",
    ),
    "load_balance_hosts": nothing("disable", remedy=_NOT_OF_ASYNCPG),
    "krbsrvname": text("krbsrvname"),
    "gsslib": choice("gsslib", "gssapi", "sspi"),
    "passfile": text("passfile"),
    "service": text("service"),
    "servicefile": text("servicefile"),
    **{
        name: refuse(_KEEPALIVE)
        for name in (
            "keepalives",
            "keepalives_idle",
            "keepalives_interval",
            "keepalives_count",
            "tcp_user_timeout",
        )
    },
    **OF_OTHER_PROGRAMS,
}


def translate_url(url: URL) -> tuple[URL, dict[str, Any]]:
    """Translate the options of a URL into arguments of `asyncpg.connect`.

    Raises:
        ConfigurationError: asyncpg has nothing for an option, or it has a value that cannot work.
    """
    client = "asyncpg or libpq"
    translated, arguments = translate(url, _TABLE, frozenset({"host", "port"}), client)
    files: dict[str, Option] = arguments.pop(CERTIFICATES, {})
    mode: str = arguments.get("ssl", "prefer")
    if files:
        first = next(iter(files.values()))
        if _MODES.index(mode) < _MODES.index("require"):
            raise first.refused("has an effect only with sslmode=require or more: add it.")
        # libpq verifies the server with `require` too, if it is told of an authority; with the
        # authorities of the system it always verifies the name.
        is_system = "ca" in files and files["ca"].value == "system"
        arguments["ssl"] = Certificates.context(
            files,
            verifies=mode != "require" or "ca" in files,
            names=mode == "verify-full" or is_system,
        )
    return translated, arguments
