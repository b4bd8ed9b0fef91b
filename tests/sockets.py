"""The client's end of a WebSocket, in raw ASGI."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from asgi_db.types import ASGIApp, Message, Scope
from tests.contract.client import scope_of


class Socket:
    """One WebSocket, whose application runs in a task of its own and an empty context.

    Attributes:
        error: what came out of the application.
        waits: set while the application waits for a message.
    """

    def __init__(self, app: ASGIApp, scope: Scope) -> None:
        self.error: BaseException | None = None
        self._has_vanished = False
        self.waits = asyncio.Event()
        self._to_app: asyncio.Queue[Message] = asyncio.Queue()
        self._from_app: asyncio.Queue[Message | None] = asyncio.Queue()
        self._task = asyncio.create_task(self._run(app, scope), context=contextvars.Context())

    def send(self, message: Message) -> None:
        """Send an event to the application."""
        self.waits.clear()
        self._to_app.put_nowait(message)

    def tell(self, text: str) -> None:
        """Send a text."""
        self.send({"type": "websocket.receive", "text": text})

    @property
    def has_answer(self) -> bool:
        """Whether the application has sent something that was not received yet."""
        return not self._from_app.empty()

    async def receive(self) -> Message | None:
        """The next event from the application; None once it has returned."""
        async with asyncio.timeout(20):
            return await self._from_app.get()

    async def ask(self, text: str) -> str:
        """Send a text, and return the text which the application answers."""
        self.tell(text)
        return await self.hear()

    async def hear(self) -> str:
        """Return the next text of the application."""
        answer = await self.receive()
        assert answer is not None, f"the application has ended: {self.error!r}"
        return str(answer["text"])

    async def close(self) -> None:
        """Disconnect, and wait until the application has returned."""
        self.send({"type": "websocket.disconnect", "code": 1000, "reason": ""})
        await self._end()

    def vanish(self) -> None:
        """Be gone without a word: what the application sends is an error from now on."""
        self._has_vanished = True
        self.send({"type": "websocket.disconnect", "code": 1006, "reason": ""})

    async def cancel(self) -> None:
        """Cancel the application, as a server does that has to end, and wait for its end."""
        self._task.cancel()
        await self._end()

    async def _end(self) -> None:
        await asyncio.wait((self._task,), timeout=20)
        assert self._task.done(), "the application does not end"

    async def _run(self, app: ASGIApp, scope: Scope) -> None:
        try:
            await app(scope, self._receive, self._send)
        except BaseException as error:
            self.error = error
            if not isinstance(error, Exception):
                raise
        finally:
            self._from_app.put_nowait(None)

    async def _receive(self) -> Message:
        if self._to_app.empty():
            self.waits.set()
        return await self._to_app.get()

    async def _send(self, message: Message) -> None:
        if self._has_vanished:
            raise ConnectionResetError
        self._from_app.put_nowait(message)


@asynccontextmanager
async def websocket(
    app: ASGIApp, path: str = "/", *subprotocols: str
) -> AsyncGenerator[Socket, None]:
    """A WebSocket which the application has accepted; the client closes it with the block."""
    scope = scope_of("websocket", "ws", path, "2.3")
    socket = Socket(app, scope | {"subprotocols": list(subprotocols)})
    socket.send({"type": "websocket.connect"})
    answer = await socket.receive()
    assert answer is not None and answer["type"] == "websocket.accept", (answer, socket.error)
    try:
        yield socket
    finally:
        await socket.close()
