"""The options in a database URL: what they mean in a driver's own terms.

Hosting services hand out URLs with the options of the database's own client, and a driver has other
names for them, or other types. What cannot be translated is refused before anything connects.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from sqlalchemy import URL

from asgi_db.errors import ConfigurationError

Arguments: TypeAlias = dict[str, Any]
"""The arguments of the driver's function that connects."""

Translate: TypeAlias = Callable[["Option", Arguments], None]
"""Adds what one option means to the arguments."""


class Option(NamedTuple):
    """An option of a URL."""

    name: str
    value: str

    def refused(self, remedy: str) -> ConfigurationError:
        """Make the error for an option or a value that cannot be translated."""
        return ConfigurationError(f"The database URL has {self.name}=, which {remedy}")


def translate(
    url: URL, table: Mapping[str, Translate], own: frozenset[str], client: str
) -> tuple[URL, Arguments]:
    """Translate the options of a URL that are in the table.

    Args:
        url: the URL.
        table: the options of the database's own client, in the order in which they are translated.
        own: the options that stay in the URL, because SQLAlchemy reads them.
        client: what the table is for, to be named in an error.

    Returns:
        The URL without the options, and what they mean.

    Raises:
        ConfigurationError: an option is unknown, or it has a value that cannot work.
    """
    query = url.normalized_query
    for name in query:
        if name not in table and name not in own:
            raise Option(name, "").refused(f"is no option of {client}: leave it out.")
    arguments: Arguments = {}
    for name, translate_one in table.items():
        if name in query:
            translate_one(Option(name, query[name][-1]), arguments)
    return url.difference_update_query([name for name in query if name in table]), arguments


# -- how one option is translated --------------------------------------------------------------


def number(argument: str, kind: type[int] | type[float] = float, *, zero: Any = 0) -> Translate:
    """Take a number, 0 or more.

    Args:
        argument: what the driver calls it.
        kind: int, or float.
        zero: what takes the place of 0.
    """

    def take(option: Option, arguments: Arguments) -> None:
        try:
            value = kind(option.value)
        except ValueError:
            value = -1
        if not 0 <= value < float("inf"):
            raise option.refused("must be a number, 0 or more.")
        arguments[argument] = value or zero

    return take


def choice(argument: str, *values: str) -> Translate:
    """Take one of these values."""

    def take(option: Option, arguments: Arguments) -> None:
        if option.value not in values:
            raise option.refused(f"must be one of {', '.join(values)}.")
        arguments[argument] = option.value

    return take


def text(argument: str) -> Translate:
    """Take any text."""

    def take(option: Option, arguments: Arguments) -> None:
        arguments[argument] = option.value

    return take


def switch(argument: str) -> Translate:
    """Take true or false."""

    def take(option: Option, arguments: Arguments) -> None:
        if option.value.lower() not in _SWITCH:
            raise option.refused("must be true or false.")
        arguments[argument] = _SWITCH[option.value.lower()]

    return take


_SWITCH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def nothing(*values: str, remedy: str) -> Translate:
    """Accept values that ask for what happens anyway.

    Args:
        values: those values.
        remedy: what to do about any other.
    """

    def take(option: Option, _: Arguments) -> None:
        if option.value.lower() not in values:
            raise option.refused(remedy)

    return take


def refuse(remedy: str) -> Translate:
    """Refuse an option for which there is another way."""
    return nothing(remedy=remedy)


OF_OTHER_PROGRAMS: Mapping[str, Translate] = {
    "pgbouncer": refuse('is an option of Prisma: write Database(..., pooler="transaction").'),
    "connection_limit": refuse("is an option of Prisma: write Database(..., pool=...)."),
    "pool_timeout": refuse("is an option of Prisma: write Database(..., pool=...)."),
    "schema": refuse("is an option of Prisma: write options=-csearch_path%3Dname."),
    "currentSchema": refuse("is an option of JDBC: write options=-csearch_path%3Dname."),
}
"""What other programs write into the URL of a PostgreSQL database."""


# -- encryption --------------------------------------------------------------------------------


class Certificates:
    """The files of an encrypted connection, collected option by option."""

    def __init__(self, names: Mapping[str, str]) -> None:
        """Prepare to collect them.

        Args:
            names: what this database calls each of `ca`, `capath`, `cert`, `key`, `crl`,
                `password` and `cipher`.
        """
        self._parts = {name: part for part, name in names.items()}
        self.table: dict[str, Translate] = dict.fromkeys(self._parts, self._collect)

    def _collect(self, option: Option, arguments: Arguments) -> None:
        arguments.setdefault(CERTIFICATES, {})[self._parts[option.name]] = option

    @staticmethod
    def context(files: Mapping[str, Option], *, verifies: bool, names: bool) -> ssl.SSLContext:
        """Make the context of an encrypted connection.

        Args:
            files: the options that name its files.
            verifies: whether the server's certificate is verified.
            names: whether its host name is verified too.

        Raises:
            ConfigurationError: a file cannot be read, or is not what it should be.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = names
        context.verify_mode = ssl.CERT_REQUIRED if verifies else ssl.CERT_NONE
        is_system = "ca" in files and files["ca"].value == "system"
        if verifies and (is_system or not files.keys() & {"ca", "capath"}):
            context.load_default_certs()
        loads: dict[str, Callable[[str], object]] = {
            "ca": lambda file: None if is_system else context.load_verify_locations(cafile=file),
            "capath": lambda folder: context.load_verify_locations(capath=folder),
            "crl": context.load_verify_locations,
            "cipher": context.set_ciphers,
            "cert": lambda file: context.load_cert_chain(
                file,
                files["key"].value if "key" in files else None,
                files["password"].value if "password" in files else None,
            ),
        }
        for part, option in files.items():
            if part in loads:
                _load(option, loads[part])
        if "crl" in files:
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
        return context


def _load(option: Option, load: Callable[[str], object]) -> None:
    try:
        load(option.value)
    except (OSError, ValueError) as error:
        problem = type(error).__name__
        raise option.refused(f"cannot be used ({problem}): correct the path or the file.") from None


CERTIFICATES = "asgi_db_certificates"
"""The key of the collected files among the arguments, until the mode of encryption is known."""
