"""The errors for a database that cannot be reached, or that refuses the settings."""

from __future__ import annotations

from asgi_db.errors import ConfigurationError, DatabaseDownError


def cause_of(error: BaseException) -> str:
    """Name an error of the driver, for a message."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class ServerFullError(DatabaseDownError):
    """Raised when the server takes no more connections, although it works."""


def connection_error(error: BaseException, where: str = "", cause: str = "") -> DatabaseDownError:
    """Make the error for a connection which is closed, or could not be made.

    Args:
        error: what the driver or the network says.
        where: the request or block, as the beginning of the message.
        cause: what to say of the error, if its own text may hold a value.
    """
    cause = cause or cause_of(error)
    return DatabaseDownError(f"{where}the database cannot be reached ({cause})", error)


def only_reads_error(error: BaseException | None, where: str, cause: str) -> DatabaseDownError:
    """Make the error for a write, where the server only reads.

    Args:
        error: what the driver says, if a write was refused.
        where: the request or block, as the beginning of the message.
        cause: how it is known.
    """
    message = f"{where}this server only reads, and so is no place for what writes ({cause})"
    return DatabaseDownError(message, error or ConnectionError(message))


REMEDIES = {
    "certificate": "Name the authority that has signed the server's certificate, and the host for"
    " which it was signed.",
    "database": "Create it with CREATE DATABASE, or correct its name.",
    "encryption": "The server wants an encrypted connection: ask for one in the URL.",
    "login": "Correct the user and the password, or the access rules of the server (pg_hba.conf,"
    " GRANT).",
    "option": "Correct the settings for the server in the URL or in connect_args.",
}
"""What to do about settings with which a server refuses to be connected to, whenever one tries."""


class WrongSettingsError(ConfigurationError):
    """Raised when a server refuses a connection because of the settings for it."""


def wrong_settings(error: BaseException, remedy: str) -> WrongSettingsError:
    """Make the error for settings with which no connection can be made."""
    return WrongSettingsError(f"The database refuses the connection ({cause_of(error)}). {remedy}")
