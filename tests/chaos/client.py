"""The clients: HTTP over a connection per request, which can be left at any moment."""

import asyncio
import json
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self


@dataclass(frozen=True)
class Answer:
    """What a client got for a request.

    Attributes:
        status: 0 if the connection was closed without an answer, -1 if there was none in time.
    """

    status: int
    headers: dict[str, str] = field(default_factory=dict[str, str])
    body: bytes = b""

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300

    @property
    def is_error(self) -> bool:
        """Whether the client was told that it did not work."""
        return self.status >= 400

    @property
    def is_unavailable(self) -> bool:
        """Whether it says "try again": a 503 with the seconds to wait."""
        return self.status == 503 and self.headers.get("retry-after", "").isdigit()

    @property
    def cookies(self) -> list[str]:
        """The header with which a browser sends back the cookie of this answer, if it has one."""
        cookie, _, _ = self.headers.get("set-cookie", "").partition(";")
        return [f"Cookie: {cookie}"] if cookie else []

    @property
    def reason(self) -> str:
        """The reason that a 503 of asgi-db gives."""
        with suppress(ValueError, AttributeError):
            return str(json.loads(self.body).get("reason", ""))
        return ""

    @property
    def leaves_open(self) -> bool:
        """Whether it says that the write may or may not have been applied."""
        return self.reason == "outcome-unknown"

    def __str__(self) -> str:
        match self.status:
            case 0:
                return "no answer"
            case -1:
                return "too late"
            case 503 if not self.is_unavailable:
                return "503 without Retry-After"
            case status:
                return str(status)


CUT_OFF = Answer(0)
TOO_LATE = Answer(-1)


class Connection:
    """One connection to the application's server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> Self:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def send(self, method: str, path: str, *headers: str) -> None:
        """Send a request."""
        lines = [f"{method} {path} HTTP/1.1", "Host: testserver", "Content-Length: 0", *headers]
        self._writer.write("\r\n".join([*lines, "", ""]).encode())

    async def status(self) -> int:
        """The status line of the answer, as soon as it is there."""
        line = await self._reader.readline()
        if not line.startswith(b"HTTP/1.1 "):
            raise ConnectionError(f"no status line: {line!r}")
        return int(line[9:12])

    async def rest(self, status: int) -> Answer:
        """What comes after the status line."""
        headers = dict[str, str]()
        while (line := await self._reader.readline()) != b"\r\n":
            name, colon, value = line.decode().partition(":")
            if not colon:
                raise ConnectionError("the headers were cut off")
            headers[name.lower()] = value.strip()
        body = b""
        if headers.get("transfer-encoding") == "chunked":
            while size := int(await self._reader.readline(), 16):
                body += (await self._reader.readexactly(size + 2))[:size]
            await self._reader.readline()
        else:
            body = await self._reader.readexactly(int(headers.get("content-length", 0)))
        return Answer(status, headers, body)

    async def ask(self, method: str, path: str, *headers: str) -> Answer:
        """Send a request, and return the whole answer."""
        self.send(method, path, *headers)
        return await self.rest(await self.status())

    def leave(self, *, abruptly: bool = False) -> None:
        """Close the connection, whatever is under way; abruptly: with a reset."""
        if abruptly:
            raw: socket.socket = self._writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.close()


async def request(
    port: int, method: str, path: str, within: float = 20, *, headers: Sequence[str] = ()
) -> Answer:
    """Send one request over a connection of its own, and return what comes of it."""
    connection: Connection | None = None
    try:
        async with asyncio.timeout(within):
            connection = await Connection.open(port)
            return await connection.ask(method, path, *headers)
    except TimeoutError:
        return TOO_LATE
    except (OSError, ValueError, asyncio.IncompleteReadError):
        return CUT_OFF
    finally:
        if connection is not None:
            connection.leave()
