"""The state of the database for a load balancer, and the answer 503 to a refused request."""

from __future__ import annotations

import json
from collections.abc import Mapping

from asgi_db.database import Database
from asgi_db.errors import UnavailableError
from asgi_db.types import Receive, Scope, Send

RETRY_AFTER = 1
"""Seconds after which a refused client may try again."""


class Readiness:
    """An ASGI endpoint that says whether the next request can be served.

        app.router.routes.append(Route("/ready", Readiness(database)))

    | the database                           | status | body                                  |
    | -------------------------------------- | ------ | ------------------------------------- |
    | answers                                | 200    | `{"status": "ready"}`                 |
    | answers, but the pool is exhausted     | 503    | a problem with `"reason": "busy"`     |
    | cannot be reached, or does not answer  | 503    | a problem with `"reason": "down"`     |
    | only reads, and the application writes | 503    | a problem with `"reason": "down"`     |

    That an application writes is seen from what it does: one whose routes all read may use a server
    that is meant for it.

    It never waits for the pool, and answers within seconds even if the database hangs.
    """

    def __init__(self, database: Database) -> None:
        self.database = database

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; a WebSocket is closed."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            return
        try:
            await self.database.ping()
        except UnavailableError as error:
            await refuse(send, error)
        else:
            await _respond(send, 200, {"status": "ready"}, {"content-type": "application/json"})


async def refuse(send: Send, error: UnavailableError) -> None:
    """Send 503 with a problem document.

    Source: RFC 9457 (problem details), RFC 9110, section 10.2.3 (`Retry-After`).
    """
    problem = {
        "type": "about:blank",
        "title": "Service Unavailable",
        "status": 503,
        "detail": error.public_message,
        "reason": error.reason,
    }
    headers = {"content-type": "application/problem+json", "retry-after": str(RETRY_AFTER)}
    await _respond(send, 503, problem, headers)


async def _respond(
    send: Send, status: int, content: Mapping[str, object], headers: Mapping[str, str]
) -> None:
    body = json.dumps(content).encode()
    fields = {**headers, "content-length": str(len(body)), "cache-control": "no-store"}
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
