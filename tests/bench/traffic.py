"""What goes over the wire for a request, and how long a connection is held."""

import asyncio
import socket
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from statistics import median
from typing import Any

from sqlalchemy.engine import make_url

from tests.bench.course import Course
from tests.bench.field import Entrant, field
from tests.bench.samples import Measured
from tests.chaos.client import Connection, request
from tests.relay import Fate, Relay, nth

REQUESTS = 10
"""Whose round trips are counted; what counts is the median."""

LATE = 0.5
"""Seconds after which a status line that did not come is one that waits for the COMMIT."""

READERS = 20
READING = 5.0
"""Seconds for which they read."""
PIECE, PAUSE = 16_384, 0.0125
"""What each reads at a time, and how long it rests then: 5 MB take at least 4 s."""


def round_trips(course: Course) -> Measured:
    """How often a route waits for the database; and whether a write is answered before it is safe.

    Counted by a relay on a warm connection, with what comes after the answer. The relay then
    withholds the answer to the COMMIT, and looks whether the client has its status line.
    """
    measured = course.measured("round_trips")
    asyncio.run(_round_trips(course, measured))
    return measured


async def _round_trips(course: Course, measured: Measured) -> None:
    relay = Relay(course.database.url)
    async with relay, _served(course, proxy_port=make_url(relay.url).port, POOL_SIZE="2") as served:
        for entrant in served:

            async def read(entrant: Entrant = entrant) -> None:
                answer = await request(entrant.server.port, "GET", "/items/1")
                assert answer.is_success, answer

            async def write(entrant: Entrant = entrant) -> None:
                answer = await request(entrant.server.port, "POST", f"/items/{next(course.ids)}")
                assert answer.is_success, answer

            async def nothing(entrant: Entrant = entrant) -> None:
                answer = await request(entrant.server.port, "GET", "/nothing")
                assert answer.is_success, answer

            found: dict[str, Any] = {}
            for act in (nothing, read, write):
                for _ in range(4):  # each connection of the pool knows the statement
                    await act()
                found[act.__name__] = await _count(relay, act)
            found["early"] = await _answers_early(relay, course, entrant)
            measured.facts[entrant.name] = found


async def _count(relay: Relay, act: Callable[[], Any]) -> float:
    counts = list[int]()
    for _ in range(REQUESTS):
        await asyncio.sleep(0.03)  # what comes after an answer
        before = relay.round_trips
        await act()
        await asyncio.sleep(0.03)
        counts.append(relay.round_trips - before)
    return median(counts)


async def _answers_early(relay: Relay, course: Course, entrant: Entrant) -> bool:
    """Whether a client has its status line while the answer to the COMMIT is withheld."""
    for words in (b"COMMIT", b""):  # without a transaction the statement is its own COMMIT
        faults = relay.faults
        relay.fate_of = nth(1, Fate.ANSWER_HELD, words)
        connection = await Connection.open(entrant.server.port)
        connection.send("POST", f"/items/{next(course.ids)}")
        is_early = False
        with suppress(TimeoutError):
            async with asyncio.timeout(LATE):
                is_early = await connection.status() < 300
        await asyncio.sleep(0.05)
        was_withheld = relay.faults > faults
        relay.fate_of = lambda _: Fate.FORWARDED
        relay.thaw()
        await asyncio.sleep(0.1)
        connection.leave()
        if was_withheld:
            return is_early
    raise RuntimeError(f"{entrant.name} has written nothing")


def held(course: Course) -> Measured:
    """How many connections are out of a pool of 5 while 20 clients read 5 MB slowly."""
    measured = course.measured("held")
    asyncio.run(_held(course, measured))
    return measured


async def _held(course: Course, measured: Measured) -> None:
    async with _served(course, counted=True, POOL_SIZE="5") as entrants:
        for entrant in entrants:
            await request(entrant.server.port, "GET", "/items/1")
            readers = list[asyncio.Task[None]]()
            gauge = await Connection.open(entrant.server.port)
            points = list[tuple[float, int]]()
            began = time.monotonic()
            while (now := time.monotonic() - began) < READING + 0.5:
                if now > 0.25 and not readers:
                    readers = [
                        asyncio.create_task(_read_slowly(entrant.server.port))
                        for _ in range(READERS)
                    ]
                answer = await gauge.ask("GET", "/held")
                points.append((round(now, 2), int(answer.body)))
                await asyncio.sleep(0.02)
            measured.facts[entrant.name] = points
            gauge.leave()
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)


async def _read_slowly(port: int) -> None:
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PIECE)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", port))
        await loop.sock_sendall(
            client, b"GET /big HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n"
        )
        while True:
            if not await loop.sock_recv(client, PIECE):
                return
            await asyncio.sleep(PAUSE)


@asynccontextmanager
async def _served(course: Course, **options: Any) -> AsyncGenerator[list[Entrant], None]:
    context = field(course.contenders, course.database, course.folder, **options)
    entrants = await asyncio.to_thread(context.__enter__)
    try:
        yield entrants
    finally:
        await asyncio.to_thread(context.__exit__, None, None, None)
