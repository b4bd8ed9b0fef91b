"""A raw ASGI driver which acts as a server does: it runs one call and keeps what was sent.

It is stricter than a server: a second status line, or a body without one, fails the test.
"""

import asyncio
import contextvars
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, cast

from asgi_db.types import ASGIApp, Message

Watch = Callable[[Message], Awaitable[None]]
"""Awaited for each message at the moment when it leaves, before the application goes on."""


@dataclass
class Exchange:
    """One request and what came of it."""

    messages: list[Message] = field(default_factory=list[Message])
    """The status line and the body; not what ASGI's extensions add."""
    error: Exception | None = None
    """What came out of the application, which a server would log."""
    answered_by_server: bool = False
    """Whether the application began no response, so that the server answers with its own 500."""

    def was_caused_by(self, kind: type[Exception]) -> bool:
        """Whether this kind of error came out, or is what the framework's own error came from."""
        return _is_or_came_from(self.error, kind)

    @property
    def status(self) -> int:
        """The status that the client saw."""
        return 500 if self.answered_by_server else int(self.messages[0]["status"])

    @property
    def location(self) -> str:
        """Where the response redirects to."""
        headers: dict[bytes, bytes] = dict(self.messages[0]["headers"])
        return headers[b"location"].decode()

    @property
    def body(self) -> bytes:
        """The body that the client saw, as far as it came."""
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    @property
    def complete(self) -> bool:
        """Whether the client got the end of the response; else the server cut it off."""
        return self.answered_by_server or (bool(self.messages) and _is_last(self.messages[-1]))


def assert_refused(exchange: Exchange, reason: str) -> None:
    """The client was told, once and in due form, that the database cannot serve it now."""
    assert (exchange.status, exchange.complete, exchange.error) == (503, True, None), exchange
    assert not exchange.answered_by_server
    headers: dict[bytes, bytes] = dict(exchange.messages[0]["headers"])
    assert headers[b"content-type"] == b"application/problem+json"
    assert int(headers[b"retry-after"]) > 0
    assert int(headers[b"content-length"]) == len(exchange.body)
    problem = json.loads(exchange.body)
    assert problem.pop("detail")
    assert problem == {
        "type": "about:blank",
        "title": "Service Unavailable",
        "status": 503,
        "reason": reason,
    }
    assert b"POST" not in exchange.body and b"password" not in exchange.body


async def call(
    app: ASGIApp,
    path: str = "/",
    *,
    method: str = "POST",
    watch: Watch | None = None,
    spec_version: str = "2.3",
) -> Exchange:
    """Serve one request as uvicorn does: in a task with an empty context, without lifespan state.

    Args:
        app: the application.
        path: of the request.
        method: of the request.
        watch: looks at the world each time a message leaves.
        spec_version: before 2.4, which is what uvicorn says, Starlette streams from a task of its
            own.
    """
    exchange = Exchange()
    messages = exchange.messages
    requests: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]
    faults: list[str] = []
    answered = asyncio.Event()

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await answered.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] in ("http.response.start", "http.response.body"):
            is_start = message["type"] == "http.response.start"
            if is_start == bool(messages) or answered.is_set():
                faults.append(f"{message} after {messages}")
            messages.append(message)
        if watch is not None:
            await watch(message)
        if _is_last(message):
            answered.set()

    scope = scope_of("http", "http", path, spec_version) | {"method": method}

    async def serve() -> None:
        await app(scope, receive, send)

    try:
        await asyncio.create_task(serve(), context=contextvars.Context())
    except Exception as error:
        exchange.error = error
    assert not faults, faults
    exchange.answered_by_server = not messages
    return exchange


def scope_of(type: str, scheme: str, path: str, spec_version: str) -> dict[str, Any]:
    """The scope of a connection as a server without lifespan state makes it."""
    return {
        "type": type,
        "asgi": {"version": "3.0", "spec_version": spec_version},
        "http_version": "1.1",
        "scheme": scheme,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"testserver")],
        "client": ("127.0.0.1", 1),
        "server": ("testserver", 80),
    }


def _is_last(message: Message) -> bool:
    return message["type"] == "http.response.body" and not message.get("more_body", False)


def _is_or_came_from(error: BaseException | None, kind: type[Exception]) -> bool:
    if error is None or isinstance(error, kind):
        return error is not None
    inner: list[BaseException | None] = [error.__cause__, error.__context__]
    if isinstance(error, BaseExceptionGroup):
        inner += cast("BaseExceptionGroup[BaseException]", error).exceptions
    return any(_is_or_came_from(each, kind) for each in inner)
