"""A shop on servers that replicate, and visitors who use it over HTTP, each with their cookies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from sqlalchemy import Integer, func, literal_column, select

from asgi_db import Database, DBSession, DBSessionMiddleware, Mode, read_only
from asgi_db.types import Scope
from tests.clusters import Urls
from tests.own_writes import Endpoint, Item, bare_asgi, read
from tests.serving import served_here

SNAPSHOT = read_only(snapshot=True)
FRESH = read_only(fresh=True)


@dataclass(frozen=True)
class Seen:
    """The answer to a request.

    Attributes:
        status: of the response.
        version: the number that was read.
        port: the server that it was read from.
        reason: why a 503 was answered.
    """

    status: int
    version: int = 0
    port: int = 0
    reason: str = ""


class Visitor:
    """Somebody with one item in the shop, and with cookies."""

    def __init__(self, http: httpx.AsyncClient, id: int) -> None:
        self.http = http
        self.id = id
        self.version = 0

    async def write(self) -> Seen:
        """Give the item its next number, and say how that was answered."""
        answer = await self.http.post(f"/written/{self.id}/{self.version + 1}")
        self.version += answer.status_code == 201
        return _seen(answer)

    async def read_until(self, port: int, within: float = 60) -> None:
        """Read until a server answers."""
        async with asyncio.timeout(within):
            while (await self.read()).port != port:  # noqa: ASYNC110 - it is a question
                await asyncio.sleep(0.02)

    async def read(self, path: str = "items", *more: int, **headers: str) -> Seen:
        """Read the number of the item."""
        numbers = "/".join(map(str, (self.id, *more)))
        return _seen(await self.http.get(f"/{path}/{numbers}", headers=headers))


def _seen(answer: httpx.Response) -> Seen:
    if answer.status_code == 503:
        assert int(answer.headers["retry-after"]) > 0
        return Seen(503, reason=answer.json()["reason"])
    if answer.status_code != 200:
        return Seen(answer.status_code)
    version, port = map(int, answer.text.split())
    return Seen(200, version, port)


@dataclass
class Shop:
    """The application, which is served.

    Attributes:
        database: what it uses.
        address: where it is served.
    """

    database: Database
    address: str
    _stack: AsyncExitStack
    _ids: int = field(default=0, init=False)

    async def visitor(self) -> Visitor:
        """Somebody new."""
        http = httpx.AsyncClient(base_url=self.address, verify=False, trust_env=False, timeout=60)
        self._ids += 1
        return Visitor(await self._stack.enter_async_context(http), self._ids)


@asynccontextmanager
async def opened(urls: Urls, *replicas: str, url: str = "", **options: Any) -> AsyncGenerator[Shop]:
    """The shop, while the block lasts.

    Args:
        urls: the servers.
        replicas: which replicas it uses, if not all.
        url: what it is told of the primary, if not simply where it is.
        options: for its engines.
    """
    async with AsyncExitStack() as stack:
        database = Database(
            url or urls.primary, replicas=list(replicas or urls.replicas), engine_options=options
        )
        await stack.enter_async_context(database)
        app = DBSessionMiddleware(bare_asgi(more=_more()), database)
        _, port = await stack.enter_async_context(served_here(app))
        yield Shop(database, f"http://127.0.0.1:{port}", stack)


def _more() -> dict[str, Endpoint]:
    """What the visitors of this shop may do beside what the others may."""

    @read_only
    async def slow(scope: Scope, id: int, milliseconds: int) -> str:
        return await slow_read(scope["state"]["db"], id, milliseconds)

    @SNAPSHOT
    async def slow_snapshot(scope: Scope, id: int, milliseconds: int) -> str:
        return await slow_read(scope["state"]["db"], id, milliseconds)

    @read_only
    async def then_slow(scope: Scope, id: int, milliseconds: int) -> str:
        await read(scope["state"]["db"], id)
        return await slow_read(scope["state"]["db"], id, milliseconds)

    @SNAPSHOT
    async def then_slow_snapshot(scope: Scope, id: int, milliseconds: int) -> str:
        await read(scope["state"]["db"], id)
        return await slow_read(scope["state"]["db"], id, milliseconds)

    @read_only
    async def cut_off(scope: Scope, id: int, milliseconds: int) -> str:
        try:
            async with asyncio.timeout(milliseconds / 1000):
                return await slow_read(scope["state"]["db"], id, 60_000)
        except TimeoutError:
            return f"{id} 0"

    return {
        "slow": slow,
        "slow-snapshot": slow_snapshot,
        "then-slow": then_slow,
        "then-slow-snapshot": then_slow_snapshot,
        "cut-off": cut_off,
        "snapshot": _reading(SNAPSHOT),
        "fresh": _reading(FRESH),
    }


def _reading(mode: Mode) -> Endpoint:
    async def item(scope: Scope, id: int) -> str:
        return await read(scope["state"]["db"], id)

    decorate: Any = mode
    decorated: Endpoint = decorate(item)
    return decorated


async def slow_read(session: DBSession, id: int, milliseconds: int) -> str:
    """Read with one statement which takes a while on the server."""
    is_postgresql = session.get_bind().dialect.name == "postgresql"
    port = literal_column("inet_server_port()" if is_postgresql else "@@port", Integer())
    sleep = func.pg_sleep if is_postgresql else func.sleep
    selected = select(Item.version, port, sleep(milliseconds / 1000)).where(Item.id == id)
    version, there, _ = (await session.execute(selected)).one()
    return f"{version} {there}"


async def together(*requests: Awaitable[Seen]) -> list[Seen]:
    """Send requests at the same time, and wait for all answers."""
    return list(await asyncio.gather(*requests))
