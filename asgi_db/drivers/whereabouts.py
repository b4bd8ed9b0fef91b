"""Which server a connection leads to, so that no other is taken for it.

Behind a balancer, in a URL of several hosts and after a failover, two connections of one engine may
lead to two servers. Each of them numbers its own connections, so a number alone may be that of
somebody else's.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

MOST_ATTEMPTS = 20
"""How many connections are made to reach the server of another one, where several are in turn."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server, from when it was started until it ends; equal only to itself.

    Attributes:
        place: what stays as it is when it is started again: names, ports.
        started: when it was started, by its own clock.
        uptime: for how many seconds it had been running when it was asked.
        notices_clients: whether it soon ends a statement by itself when its client has gone.
    """

    place: tuple[object, ...]
    started: object
    uptime: float = field(compare=False)
    notices_clients: bool = field(default=False, compare=False)


class Reached(enum.Enum):
    """Which server a later connection has reached."""

    SAME = enum.auto()
    RESTARTED = enum.auto()
    """The same place, where another server has been started since; the first one has ended."""
    ANOTHER = enum.auto()


def reached(theirs: Server, here: Server | None, age: float) -> Reached:
    """Say which server a connection has reached that was made just now.

    Args:
        theirs: the server of another connection.
        here: the server that was reached, if it is known.
        age: how many seconds ago the other connection was made.
    """
    if here is None:
        return Reached.ANOTHER
    if here == theirs:
        return Reached.SAME
    if here.place == theirs.place and here.uptime < age:
        return Reached.RESTARTED
    return Reached.ANOTHER


def note_server(connection: Any, server: Server) -> None:
    """Remember to which server a driver's connection leads."""
    _servers[connection] = server


def server_of(connection: Any) -> Server | None:
    """Return the server of a driver's connection, if it has said which one it is."""
    return None if connection is None else _servers.get(connection)


_servers: WeakKeyDictionary[Any, Server] = WeakKeyDictionary()
