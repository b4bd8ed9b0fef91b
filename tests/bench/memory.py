"""What an open connection costs: an idle WebSocket, and a stream between two pieces."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

from tests.bench.course import Course
from tests.bench.field import Entrant, field
from tests.bench.samples import Measured
from tests.chaos.client import Connection
from tests.chaos.world import repeat
from tests.contenders import BARE, OURS

STEPS = [250, 500, 1000]
"""How many connections are open when the memory is read."""

WARM = 50
"""How many are open before that."""


def memory(course: Course) -> Measured:
    """Resident memory of the server per connection, with asgi-db and without any database."""
    measured = course.measured("memory")
    for kind in ("socket", "stream"):
        with field([OURS, BARE], course.database, course.folder, POOL_SIZE="5") as entrants:
            for entrant in entrants:
                grown = asyncio.run(_grow(entrant, kind))
                measured.facts.setdefault(kind, {})[entrant.name] = grown
    return measured


async def _grow(entrant: Entrant, kind: str) -> dict[str, float]:
    """Bytes per connection, by the number of connections."""
    opened = list[Any]()
    port = entrant.server.port

    async def open_socket(_: int) -> None:
        url = f"ws://127.0.0.1:{port}/ws"
        socket: ClientConnection = await connect(url, ping_interval=None, close_timeout=1)
        opened.append(socket)
        await socket.send(str(1_000 + len(opened)))
        assert await socket.recv() == "ok"

    async def open_stream(_: int) -> None:
        stream = await Connection.open(port)
        opened.append(stream)
        stream.send("GET", "/stream?chunks=2&seconds=600")
        assert await stream.status() == 200
        await asyncio.sleep(0.01)

    act: Callable[[int], Awaitable[None]] = open_socket if kind == "socket" else open_stream
    grown = dict[str, float]()
    try:
        await repeat(WARM, 10, act)
        await asyncio.sleep(0.5)
        before = _resident(entrant)
        for step in STEPS:
            await repeat(step + WARM - len(opened), 10, act)
            await asyncio.sleep(0.5)
            grown[str(step)] = (_resident(entrant) - before) / step
    finally:
        for one in opened:
            if isinstance(one, Connection):
                one.leave(abruptly=True)
            else:
                one.transport.abort()
    return grown


def _resident(entrant: Entrant) -> int:
    """The bytes of the server's process."""
    status = Path(f"/proc/{entrant.server.process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024
