"""Which clients may see the dashboard."""

from __future__ import annotations

import inspect
import ipaddress
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from asgi_db.errors import ConfigurationError
from asgi_db.logs import logger
from asgi_db.types import Scope

Allow: TypeAlias = Callable[[Scope], bool | Awaitable[bool]]
"""Says of a scope whether its client may see the dashboard."""

_FORWARDED = frozenset({b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via"})
"""With these headers the address is that of a proxy, on whose machine this server may run."""


class Access:
    """Asks the application which clients may see the dashboard, or lets in those of this machine.

    A request from this machine has a loopback address and a loopback name in its header `Host`, so
    that no page of somebody else, whose name resolves to 127.0.0.1, reads the answer; and it has
    come through no proxy.
    """

    def __init__(self, allow: Allow | None) -> None:
        """Prepare it.

        Raises:
            ConfigurationError: `allow` cannot be called.
        """
        if allow is not None and not callable(allow):
            raise ConfigurationError(
                f"allow={allow!r} must be a function of the scope that returns whether this client"
                " may see the dashboard: Dashboard(database, allow=is_operator)."
            )
        self._allow = allow
        self._has_refused = False

    async def permits(self, scope: Scope) -> bool:
        """Return whether the client of a request may see the dashboard."""
        if self._allow is not None:
            answer = self._allow(scope)
            return bool(await answer if inspect.isawaitable(answer) else answer)
        permitted = _is_of_this_machine(scope)
        if not permitted and not self._has_refused:
            self._has_refused = True
            logger.warning(
                "The dashboard has refused a client that is not on this machine, with 403; further"
                " ones are not logged. To let others in, say whom: Dashboard(database,"
                " allow=is_operator), a function of the scope, sync or async."
            )
        return permitted


def _is_of_this_machine(scope: Scope) -> bool:
    client: tuple[str, int] | None = scope.get("client")
    if client is None or not _is_loopback(client[0]):
        return False
    headers = {name.lower(): value for name, value in scope["headers"]}
    if headers.keys() & _FORWARDED:
        return False
    host = headers.get(b"host", b"").decode("latin-1")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name == "localhost" or name.endswith(".localhost") or _is_loopback(name)


def _is_loopback(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return found.is_loopback or (mapped is not None and mapped.is_loopback)
