"""A network that stops in the middle: a relay before a database server."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Self

from sqlalchemy.engine import make_url


class Freezer:
    """A TCP relay before a server, which stops to forward while it is frozen.

    Attributes:
        url: the same database, through the relay.
        holds_something: set while there is something that it does not forward.
    """

    def __init__(self, url: str) -> None:
        self._target = make_url(url)
        self._flows = asyncio.Event()
        self._flows.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = ""
        self.holds_something = asyncio.Event()

    def freeze(self) -> None:
        """Forward nothing from now on."""
        self._flows.clear()

    def thaw(self) -> None:
        """Forward what has come meanwhile, and what comes."""
        self.holds_something.clear()
        self._flows.set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        through = self._target.set(host="127.0.0.1", port=port)
        self.url = through.render_as_string(hide_password=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_server = await asyncio.open_connection(self._target.host, self._target.port)
        for source, target in ((reader, to_server[1]), (to_server[0], writer)):
            task = asyncio.create_task(self._pump(source, target))
            self._tasks.add(task)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                if not self._flows.is_set():
                    self.holds_something.set()
                    await self._flows.wait()
                target.write(data)
        except OSError:
            pass  # the client has cut the connection off
        finally:
            target.close()
            with suppress(OSError):
                await target.wait_closed()
