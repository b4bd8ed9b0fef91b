"""What a client, or a script, has written itself, and therefore must find when it reads.

A request begins with the position that its client brings. All sessions that are used while it is
served share what is known: that of the middleware and those of blocks, in the tasks and threads
that it starts too, because these copy its context. Elsewhere, as in a script, the context remembers
what was written in it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from contextvars import ContextVar, Token
from types import MappingProxyType

from asgi_db.drivers.replication import Position, latest

REMEMBERED_FOR = 30.0
"""Seconds for which a position is remembered. A replica that is later than that is not used in any
case; after a failover the position means nothing, and does not count for longer."""


class OwnWrites:
    """The positions that a client or a script must find, and what is committed for it now.

    Attributes:
        committed: the position of what was committed while the request is served.
        commits: how many commits that were.
        is_of_request: whether a request is being served, which reads from the primary alone after
            it has committed something. Elsewhere any server will do that has the position.
    """

    committed: Position | None = None
    commits = 0

    def __init__(self, *, is_of_request: bool = False) -> None:
        self.is_of_request = is_of_request
        self._known: dict[str, tuple[float, Position]] = {}

    @property
    def needs_primary(self) -> bool:
        """Whether everything is read from the primary."""
        return self.is_of_request and self.committed is not None

    @property
    def needed(self) -> Position | None:
        """The position that a server must have reached to be read from, if there is one."""
        if not self._known:
            return None
        self._forget_old()
        return latest([position for _, position in tuple(self._known.values())])

    def know(self, position: Position | None) -> None:
        """Note a position that the client has brought, if it has."""
        if position is not None:
            self._forget_old()
            _, earlier = self._known.get(position.system, (0.0, position))
            self._known[position.system] = time.monotonic(), max(earlier, position)

    def has_committed(self, position: Position) -> None:
        """Note the position of a COMMIT."""
        self.know(position)
        self.commits += 1
        earlier = [] if self.committed is None else [self.committed]
        self.committed = latest([*earlier, position])

    def _forget_old(self) -> None:
        # Another thread, in which a copy of the context runs, may do the same.
        since = time.monotonic() - REMEMBERED_FOR
        for system, (at, _) in tuple(self._known.items()):
            if at < since:
                self._known.pop(system, None)


class Clients:
    """Those that one database serves. It refers to nothing, because contexts refer to it."""

    def here(self) -> OwnWrites:
        """Return what is known in this context: in that of a request, what is known of it."""
        known = _own_writes.get()
        found = known.get(self)
        if found is None:
            found = OwnWrites()
            _own_writes.set({**known, self: found})
        return found

    def known_here(self) -> OwnWrites | None:
        """Return what is known in this context, if anything is."""
        return _own_writes.get().get(self)

    def enter(self, own_writes: OwnWrites) -> Token[Mapping[Clients, OwnWrites]]:
        """Let this be what is known in this context, until `leave`."""
        return _own_writes.set({**_own_writes.get(), self: own_writes})


def leave(token: Token[Mapping[Clients, OwnWrites]]) -> None:
    """Let the context be as it was before `enter`."""
    # A call that nothing has run to its end is ended by the garbage collector, in another context.
    with contextlib.suppress(ValueError):
        _own_writes.reset(token)


_own_writes: ContextVar[Mapping[Clients, OwnWrites]] = ContextVar(
    "asgi_db.own_writes", default=MappingProxyType({})
)
