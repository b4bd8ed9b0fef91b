"""The client's end of a WebSocket, in raw ASGI."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from asgi_db.types import ASGIApp, Message, Scope


class Socket:
    """One WebSocket, whose application runs in a task of its own and an empty context.

    Attributes:
        error: what came out of the application.
        waits: set while the application waits for a message.
    """

    def __init__(self, app: ASGIApp, scope: Scope) -> None:
        self.error: Exception | None = None
        self.waits = asyncio.Event()
        self._to_app: asyncio.Queue[Message] = asyncio.Queue()
        self._from_app: asyncio.Queue[Message | None] = asyncio.Queue()
        self._task = asyncio.create_task(self._run(app, scope), context=contextvars.Context())

    def send(self, message: Message) -> None:
        """Send an event to the application."""
        self.waits.clear()
        self._to_app.put_nowait(message)

    async def receive(self) -> Message | None:
        """The next event from the application; None once it has returned."""
        return await self._from_app.get()

    async def ask(self, text: str) -> str:
        """Send a text, and return the text which the application answers."""
        self.send({"type": "websocket.receive", "text": text})
        answer = await self.receive()
        assert answer is not None, f"the application has ended: {self.error!r}"
        return str(answer["text"])

    async def close(self) -> None:
        """Disconnect, and wait until the application has returned."""
        self.send({"type": "websocket.disconnect", "code": 1000, "reason": ""})
        await asyncio.wait((self._task,))

    async def _run(self, app: ASGIApp, scope: Scope) -> None:
        try:
            await app(scope, self._receive, self._send)
        except Exception as error:
            self.error = error
        finally:
            self._from_app.put_nowait(None)

    async def _receive(self) -> Message:
        if self._to_app.empty():
            self.waits.set()
        return await self._to_app.get()

    async def _send(self, message: Message) -> None:
        self._from_app.put_nowait(message)


@asynccontextmanager
async def websocket(app: ASGIApp, path: str = "/") -> AsyncGenerator[Socket, None]:
    """A WebSocket which the application has accepted; the client closes it with the block."""
    socket = Socket(
        app,
        {
            "type": "websocket",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "scheme": "ws",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"testserver")],
            "client": ("127.0.0.1", 1),
            "server": ("testserver", 80),
            "subprotocols": [],
        },
    )
    socket.send({"type": "websocket.connect"})
    answer = await socket.receive()
    assert answer is not None and answer["type"] == "websocket.accept", (answer, socket.error)
    try:
        yield socket
    finally:
        await socket.close()
