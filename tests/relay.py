"""A TCP relay before a database server: it counts round trips, and is a network that can fail."""

from __future__ import annotations

import asyncio
import enum
import itertools
import re
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Self

from sqlalchemy.engine import make_url


class Fate(enum.Enum):
    """What becomes of something that a client sends."""

    FORWARDED = enum.auto()
    LOST = enum.auto()  # its connection is cut, and the server never sees it
    ANSWER_LOST = enum.auto()  # its connection is cut as soon as the server has answered
    HELD = enum.auto()  # the network freezes before the server has it
    ANSWER_HELD = enum.auto()  # the network freezes before the client has the answer


def once(words: bytes, fate: Fate) -> Callable[[bytes], Fate]:
    """A fate for the first thing with these words that a client sends."""
    return nth(1, fate, words)


def nth(number: int, fate: Fate, words: bytes = b"") -> Callable[[bytes], Fate]:
    """A fate for the nth thing (with these words) that a client sends, counted from 1."""
    # COMMIT, but neither AUTOCOMMIT nor READ COMMITTED.
    pattern = re.compile(rb"(?<![A-Z])" + re.escape(words) + rb"(?![A-Z])")
    seen = 0

    def fate_of(data: bytes) -> Fate:
        nonlocal seen
        if pattern.search(data) is None:
            return Fate.FORWARDED
        seen += 1
        return fate if seen == number else Fate.FORWARDED

    return fate_of


class Relay:
    """Forwards each connection to the server of a URL, or to several servers in turn.

    Its port is taken from the beginning; until `start` every connection is refused.

    Attributes:
        url: the same database, through the relay.
        round_trips: how often a client has spoken after the server had answered.
        connections: how many connections were made.
        open: how many of them are open now.
        faults: how many things have had another fate than to be forwarded.
        fate_of: what becomes of what a client sends; all is forwarded unless a test says otherwise.
        delay: seconds by which everything comes late, in both directions.
        holds_something: set while there is something that a frozen relay does not forward.
    """

    def __init__(self, url: str) -> None:
        target = make_url(url)
        self.turn_to(url)
        self._socket = _bound_to(0)
        self._port: int = self._socket.getsockname()[1]
        self._accepting: asyncio.Server | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        through = target.set(host="127.0.0.1", port=self._port)
        self.url = through.render_as_string(hide_password=False)
        self.round_trips = 0
        self.connections = 0
        self.faults = 0
        self.fate_of: Callable[[bytes], Fate] = lambda _: Fate.FORWARDED
        self.delay = 0.0
        self.holds_something = asyncio.Event()

    @property
    def open(self) -> int:
        return len(self._running)

    # -- what a test does to the network -------------------------------------------------------

    def turn_to(self, *urls: str) -> None:
        """Forward each new connection to the next of these servers; the open ones stay."""
        targets = map(make_url, urls)
        self._targets = itertools.cycle((str(url.host), int(url.port or 0)) for url in targets)

    async def start(self) -> None:
        """Accept connections from now on."""
        self._accepting = await asyncio.start_server(self._accept, sock=self._socket)

    def refuse(self) -> None:
        """Refuse new connections from now on, until it is started again."""
        if self._accepting is not None:
            self._accepting.close()
            self._accepting = None
            self._socket = _bound_to(self._port)

    def cut(self) -> None:
        """Cut every connection that is open."""
        for task in self._running:
            task.cancel()

    def freeze(self) -> None:
        """Forward nothing from now on, neither what is said nor that a connection was closed."""
        self._flows.clear()

    def thaw(self) -> None:
        """Forward what has come meanwhile, and what comes."""
        self.holds_something.clear()
        self._flows.set()

    async def stop(self) -> None:
        """Close the port and every connection."""
        if self._accepting is not None:
            self._accepting.close()
        self._socket.close()
        await _turns(5)  # those that were accepted just now begin
        self.cut()
        await asyncio.gather(*self._running, return_exceptions=True)
        await _turns(5)  # and are closed

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # -- how it forwards -----------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.ensure_future(self._forward(reader, writer))
        self._running.add(task)
        try:
            await asyncio.wait((task,))
        finally:
            self._running.discard(task)
            writer.close()  # also if it was cut before it began

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with _closed_at_the_end(writer):
            try:
                server_reader, server_writer = await asyncio.open_connection(*next(self._targets))
            except OSError:  # nobody there: this client is sent away, as a proxy does
                return
            async with _closed_at_the_end(server_writer):
                await self._forward_both(reader, writer, server_reader, server_writer)

    async def _forward_both(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        server_reader: asyncio.StreamReader,
        server_writer: asyncio.StreamWriter,
    ) -> None:
        answered = True
        loses_answer = False

        async def requests() -> None:
            nonlocal answered, loses_answer
            while data := await _read(reader):
                self.round_trips += answered
                answered = False
                fate = self.fate_of(data)
                self.faults += fate is not Fate.FORWARDED
                if fate is Fate.LOST:
                    return
                if fate is Fate.HELD:
                    self.freeze()
                await self._pass()
                loses_answer = fate is Fate.ANSWER_LOST
                server_writer.write(data)
                if fate is Fate.ANSWER_HELD:
                    self.freeze()
            await self._flows.wait()  # that it was closed comes late too

        async def answers() -> None:
            nonlocal answered
            while data := await _read(server_reader):
                answered = True
                if loses_answer:
                    return
                await self._pass()
                writer.write(data)
            await self._flows.wait()

        directions = [asyncio.ensure_future(requests()), asyncio.ensure_future(answers())]
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for direction in directions:
                direction.cancel()
            await asyncio.gather(*directions, return_exceptions=True)

    async def _pass(self) -> None:
        """Wait until what has come may go through."""
        if self.delay:
            await asyncio.sleep(self.delay)
        if not self._flows.is_set():
            self.holds_something.set()
            await self._flows.wait()


async def _turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


def _bound_to(port: int) -> socket.socket:
    """A socket which has the port, and refuses connections as long as nobody listens there."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    return bound


async def _read(reader: asyncio.StreamReader) -> bytes:
    """What has come; nothing at the end, also if the other side has cut the connection off."""
    try:
        return await reader.read(65536)
    except OSError:
        return b""


@asynccontextmanager
async def _closed_at_the_end(writer: asyncio.StreamWriter) -> AsyncGenerator[None, None]:
    try:
        yield
    except asyncio.CancelledError:
        writer.transport.abort()
        raise
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
