"""The options of a MySQL or MariaDB URL, as their clients know them and asyncmy takes them.

Sources: https://dev.mysql.com/doc/refman/8.4/en/connection-options.html,
https://github.com/long2ice/asyncmy/blob/dev/asyncmy/connection.pyx
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import URL

from asgi_db.drivers.url_options import (
    CERTIFICATES,
    Arguments,
    Certificates,
    Option,
    Translate,
    number,
    refuse,
    switch,
    text,
    translate,
)

_MODES = ("DISABLED", "PREFERRED", "REQUIRED", "VERIFY_CA", "VERIFY_IDENTITY")
_MODE = "asgi_db_ssl_mode"


def _ssl_mode(option: Option, arguments: Arguments) -> None:
    mode = option.value.upper().replace("-", "_")
    if mode not in _MODES:
        raise option.refused(f"must be one of {', '.join(_MODES)}.")
    if mode == "PREFERRED":
        raise option.refused(
            "asyncmy cannot do: write ssl-mode=REQUIRED, or DISABLED inside a private network."
        )
    arguments[_MODE] = mode


_LONGEST = 31536000
"""The longest timeout that asyncmy takes, in seconds."""
_FILES = ("ca", "capath", "cert", "key", "cipher")
_certificates = [
    Certificates({part: f"ssl{separator}{part}" for part in _FILES}) for separator in "-_"
]
_WRITE_SSL_MODE = "is of another program: write ssl-mode=REQUIRED, or VERIFY_IDENTITY."
_TABLE: Mapping[str, Translate] = {
    "ssl-mode": _ssl_mode,
    "ssl_mode": _ssl_mode,
    **_certificates[0].table,
    **_certificates[1].table,
    "ssl_check_hostname": switch("ssl_check_hostname"),
    "connect-timeout": number("connect_timeout", int, zero=_LONGEST),
    "connect_timeout": number("connect_timeout", int, zero=_LONGEST),
    "read_timeout": number("read_timeout", int, zero=None),
    "max_allowed_packet": number("max_allowed_packet", int),
    "client_flag": number("client_flag", int),
    "stmt_cache_size": number("stmt_cache_size", int),
    "local_infile": switch("local_infile"),
    "use_unicode": switch("use_unicode"),
    "binary_prefix": switch("binary_prefix"),
    "init_command": text("init_command"),
    "sql_mode": text("sql_mode"),
    "program_name": text("program_name"),
    "unix_socket": text("unix_socket"),
    "socket": text("unix_socket"),
    "read_default_file": text("read_default_file"),
    "read_default_group": text("read_default_group"),
    "server_public_key": text("server_public_key"),
    # What other programs write into a URL.
    "timeout": refuse("asyncmy calls otherwise: write connect_timeout=."),
    "application_name": refuse("asyncmy calls otherwise: write program_name=."),
    "ssl": refuse(_WRITE_SSL_MODE),
    "sslmode": refuse(_WRITE_SSL_MODE),
    "sslaccept": refuse(_WRITE_SSL_MODE),
    "useSSL": refuse(_WRITE_SSL_MODE),
    "tls": refuse(_WRITE_SSL_MODE),
    "autocommit": refuse("each mode of asgi-db sets itself: leave it out."),
}


def translate_url(url: URL) -> tuple[URL, dict[str, Any]]:
    """Translate the options of a URL into arguments of `asyncmy.connect`.

    Raises:
        ConfigurationError: asyncmy has nothing for an option, or it has a value that cannot work.
    """
    own = frozenset({"charset", "host", "port"})
    client = "asyncmy or of a client of MySQL"
    translated, arguments = translate(url, _TABLE, own, client)
    files: dict[str, Option] = arguments.pop(CERTIFICATES, {})
    mode: str | None = arguments.pop(_MODE, None)
    names: bool = arguments.pop("ssl_check_hostname", True)
    if mode is None and files:  # as SQLAlchemy and asyncmy understand these options
        mode = "VERIFY_IDENTITY" if names and files.keys() & {"ca", "capath"} else "VERIFY_CA"
        if not files.keys() & {"ca", "capath"}:
            mode = "REQUIRED"
    if mode is not None and mode != "DISABLED":
        arguments["ssl"] = Certificates.context(
            files, verifies=mode.startswith("VERIFY"), names=mode == "VERIFY_IDENTITY"
        )
    return translated, arguments
