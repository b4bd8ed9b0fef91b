"""What a scenario works with: a contender that is served, its database, and the witnesses."""

import asyncio
import itertools
import random
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from tests.chaos.client import Answer, request
from tests.chaos.galera import Galera
from tests.clusters import Cluster
from tests.contenders import DATABASES, Backend, Contender
from tests.contenders.served import serving
from tests.servers import DatabaseServer, ServerConnection, outside, server_connections
from tests.serving import Server

Place: TypeAlias = Backend | Literal["galera", "standbys"]
"""What a scenario takes place on: one server, a file, or a cluster."""

PLACES: dict[Place, str] = {
    "postgresql": DATABASES["postgresql"],
    "mysql": DATABASES["mysql"],
    "sqlite": DATABASES["sqlite"],
    "galera": "Galera",
    "standbys": "PostgreSQL with standbys",
}

CLUSTERS: tuple[Place, ...] = ("galera", "standbys")

POOL_SIZE = 5

SETTLING = 1.0
"""Seconds after which everything has to be clean again."""

_COMPLAINT = re.compile(
    r"non-checked-in connection|never retrieved|was destroyed but it is pending|was never awaited"
)


@dataclass
class Outcome:
    """What has come of a scenario.

    Attributes:
        tries: how many faults, or requests, it consists of.
        survived: how many of them went as they should; what that means, the scenario says.
        lost: writes about which a client was told something that is not so.
        leaked: connections, transactions and queries that stay behind.
        errors: answers other than success and "try again later", by their kind.
        remarks: what else is to be said.
        not_applicable: why the contender cannot take part, if it cannot.
        server_loses: whether the server itself is set to lose writes that it has acknowledged, so
            that `lost` says nothing of the contender.
    """

    tries: int = 0
    survived: int = 0
    lost: int = 0
    leaked: int = 0
    errors: dict[str, int] = field(default_factory=dict[str, int])
    remarks: list[str] = field(default_factory=list[str])
    not_applicable: str = ""
    server_loses: bool = False

    @property
    def is_clean(self) -> bool:
        """Whether everything is as it should be."""
        lost = self.lost and not self.server_loses
        return self.survived == self.tries and not (lost or self.leaked or self.errors)

    def note(self, answer: Answer) -> None:
        """Count an answer that is neither success nor "try again later"."""
        if not answer.is_success and not answer.is_unavailable:
            self.errors[str(answer)] = self.errors.get(str(answer), 0) + 1

    def remark(self, number: int, words: str) -> None:
        """Say how many of something there were, if there were any."""
        if number:
            self.remarks.append(f"{words}: {number}")


class Ledger:
    """What the clients were told about each write.

    Attributes:
        answers: by the id that was to be written; none if the client did not wait for it.
    """

    def __init__(self) -> None:
        self.answers: dict[int, Answer | None] = {}
        self._pairs: set[int] = set()
        self._ids = itertools.count(1_000)

    def new_id(self, *, pair: bool = False) -> int:
        """An id that nobody has used, for a write that nobody has been told about yet."""
        id = next(self._ids)
        self.answers[id] = None
        if pair:
            self._pairs.add(id)
        return id

    def refused(self, reason: str) -> int:
        """How many writes were refused for this reason."""
        return sum(
            answer is not None and answer.reason == reason for answer in self.answers.values()
        )

    async def settle(self, url: str, outcome: Outcome) -> None:
        """Compare what clients were told with what is there."""
        async with outside(url) as connection:
            there = {int(id) for (id,) in await connection.execute("SELECT id FROM items")}
        told = {id: answer for id, answer in self.answers.items() if answer is not None}
        missing = sum(answer.is_success and id not in there for id, answer in told.items())
        ghosts = sum(
            answer.is_error and not answer.leaves_open and id in there
            for id, answer in told.items()
        )
        halves = sum((id in there) != (-id in there) for id in self._pairs)
        outcome.lost += missing + ghosts + halves
        outcome.remark(missing, "acknowledged, but missing")
        outcome.remark(ghosts, "refused, but there")
        outcome.remark(halves, "half written")
        outcome.remark(
            sum(answer.leaves_open for answer in told.values()), "told that the outcome is unknown"
        )


@dataclass
class World:
    """A contender on one database.

    Attributes:
        contender: who is put to the test.
        place: on what.
        database: the server; None for SQLite, and for a cluster.
        url: an empty database.
        python: the interpreter of the contender's environment.
        folder: an empty folder.
        random: where every chance comes from.
        scale: by which the numbers of tries are multiplied.
        cluster: the servers, where there are more than one.
        elsewhere: the same database on the others of them.
    """

    contender: Contender
    place: Place
    database: DatabaseServer | None
    url: str
    python: str
    folder: Path
    random: random.Random
    scale: float = 1
    cluster: Cluster | Galera | None = None
    elsewhere: list[str] = field(default_factory=list[str])

    @property
    def galera(self) -> Galera:
        """The Galera cluster."""
        assert isinstance(self.cluster, Galera)
        return self.cluster

    @property
    def standbys(self) -> Cluster:
        """The primary with its standbys."""
        assert isinstance(self.cluster, Cluster)
        return self.cluster

    @property
    def server(self) -> DatabaseServer:
        """The database server."""
        assert self.database is not None
        return self.database

    def times(self, number: int) -> int:
        """So many tries, in a full run."""
        return max(1, round(number * self.scale))

    @asynccontextmanager
    async def serving(
        self, *options: str, url: str = "", **environment: str
    ) -> AsyncGenerator[Server, None]:
        """Serve the contender; the arguments are for uvicorn, and for its environment."""
        context = serving(
            self.contender.app,
            self.python,
            self.folder,
            "--http=h11",
            *options,
            DATABASE_URL=url or self.url,
            POOL_SIZE=str(POOL_SIZE),
            **environment,
        )
        server = await asyncio.to_thread(context.__enter__)
        try:
            yield server
        finally:
            await asyncio.to_thread(context.__exit__, None, None, None)

    async def write(self, port: int, ledger: Ledger, kind: str = "items", more: str = "") -> Answer:
        """Write a new item, and enter in the ledger what came of it."""
        id = ledger.new_id(pair=kind == "pair")
        ledger.answers[id] = answer = await request(port, "POST", f"/{kind}/{id}{more}")
        return answer

    async def write_somehow(self, port: int, ledger: Ledger) -> Answer:
        """The same, in a way left to chance."""
        seconds = self.random.uniform(0.01, 0.1)
        kind = self.random.choices(["items", "slow", "pair"], [6, 3, 1])[0]
        return await self.write(
            port, ledger, kind, "" if kind == "items" else f"?seconds={seconds}"
        )

    @asynccontextmanager
    async def writers(
        self, port: int, ledger: Ledger, outcome: Outcome, number: int = 50
    ) -> AsyncGenerator[None, None]:
        """Clients which write, one write after the other, for as long as the block runs."""
        done = asyncio.Event()

        async def keep_writing() -> None:
            while not done.is_set():
                answer = await self.write_somehow(port, ledger)
                outcome.note(answer)
                if not answer.is_success:
                    await asyncio.sleep(self.random.uniform(0.02, 0.1))

        tasks = [asyncio.create_task(keep_writing()) for _ in range(number)]
        try:
            yield
        finally:
            done.set()
            await asyncio.gather(*tasks)

    async def is_served_again(self, port: int, ledger: Ledger, within: float = 1) -> bool:
        """Whether a write succeeds within so many seconds."""
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            if (await self.write(port, ledger)).is_success:
                return True
            await asyncio.sleep(0.05)
        return False

    async def settle(self, server: Server, ledger: Ledger, outcome: Outcome) -> None:
        """Take stock: what is left behind on the server, and what became of the writes."""
        busy = await self.busy_connections(SETTLING)
        idle = sum(client.state.startswith("idle") for client in busy)
        outcome.leaked += len(busy)
        outcome.remark(idle, "idle in transaction")
        outcome.remark(len(busy) - idle, "queries still active")
        missing = 0
        tries = 0 if self.place == "sqlite" else 3  # a busy machine may start them one by one
        for _ in range(tries):
            missing = await self.missing_from_pool(server.port, ledger)
            if not missing:
                break
        outcome.leaked += missing
        outcome.remark(missing, f"unusable of the pool's {POOL_SIZE} connections")
        complaints = len(_COMPLAINT.findall(server.log))
        outcome.leaked += complaints
        outcome.remark(complaints, "complaints in the log")
        await self.busy_connections(5)  # what comes after the answer may still come now
        await ledger.settle(self.url, outcome)

    async def connections(self) -> list[ServerConnection]:
        """The connections to the database, on all servers that have it."""
        urls = [self.url, *self.elsewhere]
        return [client for url in urls for client in await server_connections(url)]

    async def busy_connections(self, within: float) -> list[ServerConnection]:
        """The connections that are still in a statement or a transaction after so many seconds."""
        deadline = time.monotonic() + within
        while True:
            clients = await self.connections()
            busy = [client for client in clients if client.state != "idle"]
            if not busy or time.monotonic() > deadline:
                return busy
            await asyncio.sleep(0.02)

    async def missing_from_pool(self, port: int, ledger: Ledger) -> int:
        """How many of the pool's connections do not work when all are wanted at once."""
        sleepers = [
            asyncio.create_task(self.write(port, ledger, "slow", "?seconds=1"))
            for _ in range(POOL_SIZE)
        ]
        most = 0
        while most < POOL_SIZE and not all(sleeper.done() for sleeper in sleepers):
            clients = await self.connections()
            most = max(most, sum(client.state == "active" for client in clients))
            await asyncio.sleep(0.02)
        await asyncio.gather(*sleepers)
        return POOL_SIZE - most


async def repeat(number: int, at_once: int, act: Callable[[int], Awaitable[None]]) -> None:
    """Do something a number of times, so many at once."""
    numbers = iter(range(number))

    async def keep_acting() -> None:
        for n in numbers:
            await act(n)

    await asyncio.gather(*(keep_acting() for _ in range(at_once)))
