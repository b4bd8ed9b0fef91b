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

from asgi_db.asgi.call import Site
from asgi_db.asgi.http import Exchange
from asgi_db.asgi.websocket import Socket
from asgi_db.drivers.replication import Position, latest, parse_position
from asgi_db.errors import ConfigurationError
from asgi_db.replicas.choice import Choice
from asgi_db.types import Message, Receive, Scope, Send
from asgi_db.unit.origin import UnitLife

COOKIE_MAX_AGE = 30
"""Seconds for which a client remembers its position. A replica that is later than that is not used
in any case. That of a write which a failover has lost may never be reached, so it has to end."""

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


class RoutedExchange(Exchange):
    """One HTTP request and its response, where the database has replicas."""

    _choice: Choice | None = None

    def __init__(self, site: Site, scope: Scope, receive: Receive, send: Send) -> None:
        super().__init__(site, scope, receive, send)
        self._send = functools.partial(self._send_with_position, send)

    def life(self) -> UnitLife:
        life = super().life()
        if isinstance(life, Choice):
            self._choice = life
            life.is_of_request = True
            life.needed = position_in(self._scope, self._site.key)
        return life

    async def _send_with_position(self, send: Send, message: Message) -> None:
        """Tell the client the position of what the request has committed."""
        choice = self._choice
        if message["type"] == "http.response.start" and choice is not None:
            if choice.committed is not None:
                is_secure = self._scope.get("scheme") == "https"
                message = _with_position(message, self._site.key, choice.committed, is_secure)
        await send(message)


class RoutedSocket(Socket):
    """One WebSocket, where the database has replicas.

    Its client sends what it was told with the request that opens it. What the socket itself
    commits is remembered by its session.
    """

    def life(self) -> UnitLife:
        life = super().life()
        if isinstance(life, Choice):
            life.needed = position_in(self._scope, self._site.key)
        return life


def position_in(scope: Scope, key: str) -> Position | None:
    """Return the latest position that the client has sent, in a cookie or a header."""
    return latest(filter(None, map(parse_position, _sent(scope, f"asgi-db-{key}".lower()))))


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
    cookie = f"{name}={position}; Max-Age={COOKIE_MAX_AGE}; Path=/; HttpOnly; SameSite=Lax"
    if is_secure:
        cookie += "; Secure"
    headers = [
        *message.get("headers", ()),
        (name.lower().encode(), str(position).encode()),
        (b"set-cookie", cookie.encode()),
    ]
    return {**message, "headers": headers}
