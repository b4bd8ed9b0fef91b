"""Clients over HTTP which write, and read at once and a little later what they have written.

The application is the same in bare ASGI, Starlette, FastAPI and Litestar, and each answer to a
read says which server it came from. It is served twice, each with a `Database` of its own: what
a client has written at one it reads from the other, as behind a balancer.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import fastapi
import httpx
import litestar
from sqlalchemy import Integer, insert, literal_column, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from asgi_db import Database, DBSession, DBSessionMiddleware, plain, read_only, transactional
from asgi_db.types import ASGIApp, Receive, Scope, Send
from asgi_db_fastapi import CurrentSession, CurrentSessionReadOnly, CurrentSessionTransaction
from asgi_db_litestar import DatabasePlugin
from tests.clusters import Cluster, Urls, port
from tests.serving import served_here

CLIENTS = 20
"""How many of them write and read at a time."""

ITEMS = 100
"""How many items there are, numbered from 0."""

LATER = 0.4
"""Seconds after which a client reads once more."""

WAYS = ("written", "committed", "redirected", "header")
"""How a client writes, and is told of it: in a transaction or with a `commit()` by hand, with a
cookie, with a redirect to what it has written, or by a header alone."""


class Base(DeclarativeBase):
    pass


class Item(Base):
    """What a client writes: the number of its last write."""

    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    version: Mapped[int]


async def write(session: DBSession, id: int, version: int) -> None:
    await session.execute(update(Item).where(Item.id == id).values(version=version))


async def write_and_commit(session: DBSession, id: int, version: int) -> None:
    await write(session, id, version)
    await session.commit()


async def read(session: DBSession, id: int) -> str:
    """The number of the last write, and the port of the server that says so."""
    ports = {"postgresql": "inet_server_port()", "mysql": "@@port"}
    column = literal_column(ports[session.get_bind().dialect.name], Integer())
    version, port = (await session.execute(select(Item.version, column).where(Item.id == id))).one()
    return f"{version} {port}"


# -- the application ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Framework:
    """The application in one framework."""

    name: str
    app: Callable[[Database], ASGIApp]


def in_asgi(database: Database) -> ASGIApp:
    return DBSessionMiddleware(bare_asgi(), database)


Endpoint = Callable[..., Awaitable[str | None]]
"""Takes the scope and the numbers in the path, and returns the body."""


def bare_asgi(reads_in: str = "db", more: Mapping[str, Endpoint] | None = None) -> ASGIApp:
    """The application without the middleware.

    Args:
        reads_in: the key of the session in which it reads.
        more: endpoints by the first part of the path.
    """

    @transactional
    async def written(scope: Scope, id: int, version: int) -> None:
        await write(scope["state"]["db"], id, version)

    @plain
    async def committed(scope: Scope, id: int, version: int) -> None:
        await write_and_commit(scope["state"]["db"], id, version)

    @read_only
    async def item(scope: Scope, id: int) -> str:
        return await read(scope["state"][reads_in], id)

    endpoints: dict[str, Endpoint] = {
        "written": written,
        "redirected": written,
        "committed": committed,
        "items": item,
        **(more or {}),
    }

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        _, name, *numbers = scope["path"].split("/")
        scope["endpoint"] = endpoints[name]
        body = await scope["endpoint"](scope, *map(int, numbers)) or ""
        status = 200 if scope["method"] == "GET" else 303 if name == "redirected" else 201
        headers = [(b"location", f"/items/{numbers[0]}".encode())] if status == 303 else []
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body.encode()})

    return app


def in_starlette(database: Database) -> ASGIApp:
    def numbers(request: Request) -> tuple[int, int]:
        return request.path_params["id"], request.path_params["version"]

    @transactional
    async def written(request: Request) -> Response:
        await write(request.state.db, *numbers(request))
        return Response(status_code=201)

    @transactional
    async def redirected(request: Request) -> Response:
        id, version = numbers(request)
        await write(request.state.db, id, version)
        return Response(status_code=303, headers={"location": f"/items/{id}"})

    async def committed(request: Request) -> Response:
        await write_and_commit(request.state.db, *numbers(request))
        return Response(status_code=201)

    @read_only
    async def item(request: Request) -> Response:
        return Response(await read(request.state.db, request.path_params["id"]))

    app = Starlette(
        routes=[
            Route("/written/{id:int}/{version:int}", written, methods=["POST"]),
            Route("/redirected/{id:int}/{version:int}", redirected, methods=["POST"]),
            Route("/committed/{id:int}/{version:int}", committed, methods=["POST"]),
            Route("/items/{id:int}", item),
        ]
    )
    app.add_middleware(DBSessionMiddleware, database=database)
    return app


def in_fastapi(database: Database) -> ASGIApp:
    app = fastapi.FastAPI(openapi_url=None)
    app.add_middleware(DBSessionMiddleware, database=database)

    @app.post("/written/{id}/{version}", status_code=201)
    async def written(session: CurrentSessionTransaction, id: int, version: int) -> None:
        await write(session, id, version)

    @app.post("/redirected/{id}/{version}")
    async def redirected(session: CurrentSessionTransaction, id: int, version: int) -> Response:
        await write(session, id, version)
        return Response(status_code=303, headers={"location": f"/items/{id}"})

    @app.post("/committed/{id}/{version}", status_code=201)
    async def committed(session: CurrentSession, id: int, version: int) -> None:
        await write_and_commit(session, id, version)

    @app.get("/items/{id}")
    async def item(session: CurrentSessionReadOnly, id: int) -> Response:
        return Response(await read(session, id))

    return app


LitestarRequest = litestar.Request[Any, Any, Any]


def in_litestar(database: Database) -> ASGIApp:
    def numbers(request: LitestarRequest) -> tuple[int, int]:
        return request.path_params["id"], request.path_params["version"]

    @litestar.post("/written/{id:int}/{version:int}")
    @transactional
    async def written(request: LitestarRequest) -> None:
        await write(request.state.db, *numbers(request))

    @litestar.post("/redirected/{id:int}/{version:int}")
    @transactional
    async def redirected(request: LitestarRequest) -> litestar.Response[None]:
        id, version = numbers(request)
        await write(request.state.db, id, version)
        return litestar.Response(None, status_code=303, headers={"location": f"/items/{id}"})

    @litestar.post("/committed/{id:int}/{version:int}")
    async def committed(request: LitestarRequest) -> None:
        await write_and_commit(request.state.db, *numbers(request))

    @litestar.get("/items/{id:int}", media_type="text/plain")
    @read_only
    async def item(request: LitestarRequest) -> str:
        return await read(request.state.db, request.path_params["id"])

    return litestar.Litestar(
        [written, redirected, committed, item],
        plugins=[DatabasePlugin(database)],
        openapi_config=None,
        logging_config=None,
    )


FRAMEWORKS = [
    Framework("asgi", in_asgi),
    Framework("starlette", in_starlette),
    Framework("fastapi", in_fastapi),
    Framework("litestar", in_litestar),
]


# -- the clients -------------------------------------------------------------------------------


@dataclass
class Seen:
    """What the clients have read.

    Attributes:
        stale: reads which lacked the client's own write.
        before: how many first reads each server has answered, by its port.
        at_once: the same for the reads right after a write.
        later: the same for the reads a little later.
    """

    stale: list[str] = field(default_factory=list[str])
    before: Counter[int] = field(default_factory=Counter[int])
    at_once: Counter[int] = field(default_factory=Counter[int])
    later: Counter[int] = field(default_factory=Counter[int])

    def share(self, *urls: str, of_later: bool = False) -> float:
        """The part of all reads, or of the later ones, which these servers have answered."""
        counted = self.later if of_later else self.before + self.at_once + self.later
        return sum(counted[port(url)] for url in urls) / counted.total()


@asynccontextmanager
async def tables(cluster: Cluster, urls: Urls) -> AsyncGenerator[None]:
    """The items, on every server."""
    async with Database(urls.primary) as database:
        await database.create_tables(Base.metadata)
        async with database.transaction() as session:
            items = [{"id": id, "version": 0} for id in range(ITEMS)]
            await session.execute(insert(Item), items)
    await asyncio.to_thread(cluster.wait_until_caught_up)
    yield


async def write_and_read(apps: Sequence[ASGIApp], pairs: int) -> Seen:
    """Let the clients write and read over HTTP, each write at another process than the reads."""
    seen = Seen()
    certificates = ssl.create_default_context()  # which takes a while to make
    async with AsyncExitStack() as stack:
        served = [await stack.enter_async_context(served_here(app)) for app in apps]
        addresses = [f"http://127.0.0.1:{port}" for _, port in served]

        async def client(id: int) -> None:
            async with httpx.AsyncClient(verify=certificates, trust_env=False, timeout=60) as http:
                way = WAYS[id % len(WAYS)]
                await _read(http, f"{addresses[0]}/items/{id}", {}, seen.before)
                for version in range(1, pairs // CLIENTS + 1):
                    turned = addresses[:: 1 if version % 2 else -1]
                    await _pair(http, turned, way, id, version, seen)

        await asyncio.gather(*map(client, range(CLIENTS)))
    return seen


async def _pair(
    http: httpx.AsyncClient, addresses: list[str], way: str, id: int, version: int, seen: Seen
) -> None:
    path = "written" if way == "header" else way
    written = await http.post(f"{addresses[0]}/{path}/{id}/{version}")
    assert written.status_code == (303 if way == "redirected" else 201), written.text
    headers: dict[str, str] = {}
    if way == "header":
        http.cookies.clear()
        headers = {name: text for name, text in written.headers.items() if name == "asgi-db-db"}
    for reads, pause in ((seen.at_once, 0), (seen.later, LATER)):
        await asyncio.sleep(pause)
        there = await _read(http, f"{addresses[-1]}/items/{id}", headers, reads)
        if there != version:
            seen.stale.append(f"client {id} ({way}) has written {version} and read {there}")


async def _read(
    http: httpx.AsyncClient, address: str, headers: dict[str, str], reads: Counter[int]
) -> int:
    found = await http.get(address, headers=headers)
    assert found.status_code == 200, found.text
    version, port = map(int, found.text.split())
    reads[port] += 1
    return version
