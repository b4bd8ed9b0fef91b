"""Connecting to the first of several hosts that fits, each with a time limit of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

from asgi_db.drivers.outages import cause_of
from asgi_db.drivers.protocol import Driver
from asgi_db.hosts import Host

CONNECT_TIMEOUT = 10
"""Seconds that a host has to take a connection, unless the URL or `connect_args` says otherwise."""

SILENT_FOR = 60.0
"""Seconds for which a host that has not answered in time is only tried after all others."""


class NoHostError(ConnectionError):
    """Raised when none of several hosts could be connected to."""

    def __init__(self, failures: Sequence[tuple[Host, Exception]]) -> None:
        """Name each host, and why it was not used."""
        causes = (f"{host}: {_first_line(error)}" for host, error in failures)
        super().__init__("; ".join(causes))


def _first_line(error: Exception) -> str:
    return cause_of(error).partition("\n")[0].strip().rstrip(".")


def paired(names: Sequence[str], ports: Any) -> list[Host]:
    """Return the hosts with their ports, which may be one for each, one for all, or None.

    Raises:
        ValueError: there are more, or fewer, ports than hosts.
    """
    alone = not isinstance(ports, (list, tuple))
    each = [ports] * len(names) if alone else cast("Sequence[Any]", ports)
    return [Host(name, port) for name, port in zip(names, each, strict=True)]


_silent: dict[Host, float] = {}
"""The hosts that have not answered in time, with when that is to be forgotten."""


_reached: WeakKeyDictionary[Any, Host] = WeakKeyDictionary()


def host_reached(connection: Any) -> Host | None:
    """Return to which of several hosts a driver's connection was made."""
    return _reached.get(connection)


async def connect_to_first(
    hosts: Sequence[Host],
    driver: Driver,
    connect: Callable[..., Awaitable[Any]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Connect to the first host that fits, as libpq does.

    A host that has not answered in time is tried last for a while, or every new connection of the
    pool would wait for it again.

    Args:
        hosts: the hosts, in the order in which they are to be tried.
        driver: says what an error means.
        connect: the driver's function that connects, with `args` and `kwargs`.
        args: its positional arguments.
        kwargs: the other arguments, whose host, port and `target_session_attrs` are replaced.

    Raises:
        NoHostError: none of them fits.
    """
    wanted = kwargs.get("target_session_attrs") or os.environ.get("PGTARGETSESSIONATTRS", "any")
    failures: list[tuple[Host, Exception]] = []
    for host, attributes in _attempts(hosts, wanted, failures):
        if host in _silent:
            _note_silence(host)  # Only one connection at a time finds out whether it is over.
        place = {"host": host.name, "port": host.port, "target_session_attrs": attributes}
        try:
            connection = await connect(*args, **{**kwargs, **place})
        except Exception as error:
            if _is_silence(error):
                _note_silence(host)
            else:
                _silent.pop(host, None)
            if _concerns_all(driver, error):
                raise
            failures.append((host, error))
        else:
            _silent.pop(host, None)
            _reached[connection] = host
            return connection
    raise NoHostError(failures) from failures[-1][1]


def _attempts(
    hosts: Sequence[Host], wanted: str, failures: Sequence[tuple[Host, Exception]]
) -> Iterator[tuple[Host, str]]:
    """The hosts to try, and with which attributes, given those that have failed until then."""
    now = time.monotonic()
    answering = [host for host in hosts if _silent.get(host, 0) <= now]
    for group in (answering, [host for host in hosts if host not in answering]):
        if wanted != "prefer-standby":
            yield from ((host, wanted) for host in group)
            continue
        yield from ((host, "standby") for host in group)
        # There is none, so that one which is no standby will do.
        silent = {host for host, error in failures if _is_silence(error)}
        yield from ((host, "any") for host in group if host not in silent)


def _concerns_all(driver: Driver, error: Exception) -> bool:
    """Whether no other host is tried; as with libpq, where one has refused the settings."""
    is_of_host = isinstance(error, driver.connect_errors) and not isinstance(error, ValueError)
    return not is_of_host or driver.is_full(error) or driver.remedy(error) is not None


def _is_silence(error: Exception) -> bool:
    """Whether a host has not answered in time: asyncpg's error for that, or psycopg's."""
    return isinstance(error, TimeoutError) or type(error).__name__ == "ConnectionTimeout"


def _note_silence(host: Host) -> None:
    _silent[host] = time.monotonic() + SILENT_FOR
