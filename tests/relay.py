"""A TCP relay before a database server: it counts round trips, and it can come up late."""

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Self

from sqlalchemy.engine import make_url


class Relay:
    """Forwards each connection to the server of a URL.

    Its port is taken from the beginning; until `start` every connection is refused.

    Attributes:
        url: the same database, through the relay.
        round_trips: how often a client has spoken after the server had answered.
        connections: how many connections were made.
    """

    def __init__(self, url: str) -> None:
        target = make_url(url)
        self._target = str(target.host), int(target.port or 0)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._accepting: asyncio.Server | None = None
        self._running: set[asyncio.Task[None]] = set()
        through = target.set(host="127.0.0.1", port=self._socket.getsockname()[1])
        self.url = through.render_as_string(hide_password=False)
        self.round_trips = 0
        self.connections = 0

    async def start(self) -> None:
        """Accept connections from now on."""
        self._accepting = await asyncio.start_server(self._accept, sock=self._socket)

    async def stop(self) -> None:
        """Close the port and every connection."""
        if self._accepting is not None:
            self._accepting.close()
        self._socket.close()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.ensure_future(self._forward(reader, writer))
        self._running.add(task)
        try:
            await asyncio.wait((task,))
        finally:
            self._running.discard(task)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._target)
        except OSError:  # nobody there: this client is sent away, as a proxy does
            async with _closed_at_the_end(writer):
                return
        answered = True

        async def requests() -> None:
            nonlocal answered
            while data := await reader.read(65536):
                self.round_trips += answered
                answered = False
                server_writer.write(data)

        async def answers() -> None:
            nonlocal answered
            while data := await server_reader.read(65536):
                answered = True
                writer.write(data)

        async with _closed_at_the_end(writer), _closed_at_the_end(server_writer):
            directions = [asyncio.ensure_future(requests()), asyncio.ensure_future(answers())]
            try:
                await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for direction in directions:
                    direction.cancel()
                await asyncio.gather(*directions, return_exceptions=True)


@asynccontextmanager
async def _closed_at_the_end(writer: asyncio.StreamWriter) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
