"""How a client carries the position of its last write from one request to the next.

    POST   →  201, asgi-db-db: 5f3c…:320, set-cookie: asgi-db-db=5f3c…:320; Max-Age=30; …
    GET    →  the same in a cookie, or in a header: a replica that is not there yet is not read from

Only answers to requests that have written carry it, so that all others can be cached as before. It
is not signed: whoever forges one sends but their own reads to the primary.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from urllib.parse import unquote

from asgi_db.asgi.call import Call, Site
from asgi_db.asgi.http import Exchange
from asgi_db.asgi.retry import Attempts
from asgi_db.asgi.websocket import Socket
from asgi_db.drivers.replication import Position, latest, parse_position
from asgi_db.errors import ConfigurationError
from asgi_db.replicas.choice import Choice
from asgi_db.replicas.own_writes import REMEMBERED_FOR, OwnWrites, leave
from asgi_db.types import Message, Receive, Scope, Send
from asgi_db.unit.origin import UnitLife
from asgi_db.unit.session import DBSession

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""What may be the name of a cookie and of a header.

Source: RFC 9110, section 5.6.2; RFC 6265, section 4.1.1.
"""


def check_name(key: str) -> None:
    """Refuse a key that cannot be part of the name of a cookie.

    Raises:
        ConfigurationError: it has another character than a name of a cookie may have.
    """
    if not _TOKEN.fullmatch(key):
        raise ConfigurationError(
            f"key={key!r} becomes part of the name of a cookie, because the database has"
            " replicas=: use letters, digits, - and _ alone."
        )


class _Routed(Call):
    """What is common to calls where the database has replicas.

    All sessions that are used while the call runs, also those of blocks and in tasks that it
    starts, know what its client was told and what was committed for it.
    """

    _serves_request = False

    def __init__(self, site: Site, scope: Scope, receive: Receive, send: Send) -> None:
        outer = _of_outer_call(site, scope)
        super().__init__(site, scope, receive, send)
        self._is_outermost = outer is None
        self._own_writes = outer or OwnWrites(is_of_request=self._serves_request)
        self._own_writes.know(position_in(scope, site.key))

    async def run(self) -> None:
        token = self._site.database.clients.enter(self._own_writes)
        try:
            await super().run()
        finally:
            leave(token)

    def life(self) -> UnitLife:
        life = super().life()
        if isinstance(life, Choice):
            life.own_writes = self._own_writes  # The session may be used in another context first.
            life.is_of_request = self._serves_request
        return life

    def shares(self, own_writes: OwnWrites) -> bool:
        """Return whether this is what is known of the request."""
        return self._own_writes is own_writes


class RoutedExchange(_Routed, Exchange):
    """One HTTP request and its response, where the database has replicas."""

    _serves_request = True

    def __init__(self, site: Site, scope: Scope, receive: Receive, send: Send) -> None:
        super().__init__(site, scope, receive, send)
        self._send = functools.partial(self._send_with_position, send)

    def join(self, attempts: Attempts) -> None:
        super().join(attempts)
        if attempts.own_writes is not None:
            self._own_writes = attempts.own_writes
        attempts.own_writes = self._own_writes

    async def run(self) -> None:
        try:
            await super().run()
        finally:
            if self._is_outermost and not self.needs_retry:
                # What the request has started may go on for long.
                self._own_writes.is_of_request = False

    async def _send_with_position(self, send: Send, message: Message) -> None:
        """Tell the client the position of what was committed while the request was served."""
        if message["type"] == "http.response.start":
            if (committed := self._own_writes.committed) is not None:
                is_secure = self._scope.get("scheme") == "https"
                message = _with_position(message, self._site.key, committed, is_secure)
        await send(message)


class RoutedSocket(_Routed, Socket):
    """One WebSocket, where the database has replicas.

    Its client sends what it was told with the request that opens it. What is committed while it is
    open is remembered like what a script writes.
    """


def _of_outer_call(site: Site, scope: Scope) -> OwnWrites | None:
    """Return what is known of the request, if it has another session of the same database.

    Each of their middlewares then tells the client the same, under a key of its own.
    """
    here = site.database.clients.known_here()
    if here is not None:  # Otherwise the request runs inside another one, as in a test.
        for placed in scope.values():
            if isinstance(placed, DBSession) and isinstance(placed.origin, _Routed):
                if placed.origin.shares(here):
                    return here
    return None


def position_in(scope: Scope, key: str) -> Position | None:
    """Return the latest position that the client has sent, in a cookie or a header."""
    name = f"asgi-db-{key}".lower()
    encoded = name.encode()
    for field, value in scope["headers"]:  # Most requests bring none.
        if field == encoded or (field == b"cookie" and encoded in value.lower()):
            return latest(filter(None, map(parse_position, _sent(scope, name))))
    return None


def _sent(scope: Scope, name: str) -> Iterable[str]:
    """Yield what was sent as a position.

    Some clients quote or escape the value of a cookie, and two headers may have become one.
    """
    for field, value in scope["headers"]:
        if field == b"cookie":
            for cookie in value.decode("latin-1").split(";"):
                cookie_name, _, content = cookie.strip().partition("=")
                if cookie_name.strip().lower() == name:
                    yield unquote(content.strip(' "'))
        elif field.decode("latin-1") == name:
            yield from map(str.strip, value.decode("latin-1").split(","))


def _with_position(message: Message, key: str, position: Position, is_secure: bool) -> Message:
    name = f"asgi-db-{key}"
    cookie = f"{name}={position}; Max-Age={REMEMBERED_FOR:.0f}; Path=/; HttpOnly; SameSite=Lax"
    if is_secure:
        cookie += "; Secure"
    headers = [
        *message.get("headers", ()),
        (name.lower().encode(), str(position).encode()),
        (b"set-cookie", cookie.encode()),
    ]
    return {**message, "headers": headers}
