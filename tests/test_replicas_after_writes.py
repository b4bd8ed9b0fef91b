"""Which server is read from after a write: in the same request, in a hook, in a WebSocket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect

from asgi_db import Database, DBSession, DBSessionMiddleware, Mode, plain, read_only, transactional
from asgi_db.types import ASGIApp, Receive, Scope, Send
from tests.clusters import Cluster, Urls, port
from tests.contract.client import call
from tests.own_writes import read, tables, write
from tests.serving import served_here


@pytest.fixture
async def urls(cluster: Cluster, urls: Urls) -> AsyncIterator[Urls]:
    async with tables(cluster, urls):
        yield urls


@pytest.fixture
async def database(urls: Urls) -> AsyncIterator[Database]:
    async with Database(urls.primary, replicas=urls.replicas) as database:
        yield database


def ports(urls: Urls) -> tuple[int, set[int]]:
    """Those of the primary, and of the replicas."""
    primary, *replicas = map(port, (urls.primary, *urls.replicas))
    return primary, set(replicas)


async def test_a_read_after_a_write_of_the_same_request_runs_on_the_primary(
    cluster: Cluster, urls: Urls, database: Database
) -> None:
    """Also if the write was committed by hand, and the read comes in the body of the response."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session: DBSession = scope["state"]["db"]
        await write(session, 1, 1)
        if scope["path"] == "/by-hand":
            await session.commit()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        body = await read(session, 1)
        await send({"type": "http.response.body", "body": body.encode()})

    for path, mode in (("/by-hand", plain), ("/", transactional)):
        exchange = await call(DBSessionMiddleware(app, database, mode=mode), path)
        assert exchange.body == f"1 {ports(urls)[0]}".encode()


async def test_a_hook_reads_where_it_is_told_to(
    cluster: Cluster, urls: Urls, database: Database
) -> None:
    """It finds what its request has committed, also without `fresh`."""
    for replica in cluster.replicas:
        await asyncio.to_thread(replica.pause)
    found = list[str]()

    async def hook() -> None:
        for mode in (read_only, read_only(fresh=True)):
            async with database.session(mode) as session:
                found.append(await read(session, 1))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session: DBSession = scope["state"]["db"]
        await write(session, 1, 1)
        session.on_commit(hook)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    exchange = await call(DBSessionMiddleware(app, database, mode=transactional))
    assert exchange.status == 200
    assert found == [f"1 {ports(urls)[0]}"] * 2


def talking(database: Database, *, in_block: bool) -> ASGIApp:
    """A WebSocket which reads for each message, or writes before that; a POST writes."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session: DBSession = scope["state"]["db"]
        await receive()
        if scope["type"] == "http":
            await write(session, 1, 1)
            await send({"type": "http.response.start", "status": 201, "headers": []})
            return await send({"type": "http.response.body"})
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            if message["text"] == "write":
                async with database.transaction() as writing:
                    await write(writing, 1, 2)
            if in_block:
                async with database.session(read_only) as block:
                    text = await read(block, 1)
            else:
                text = await read(session, 1)
            await send({"type": "websocket.send", "text": text})

    def mode(scope: Scope) -> Mode:
        return transactional if scope["type"] == "http" else read_only

    return DBSessionMiddleware(app, database, mode=mode)


@pytest.mark.parametrize("in_block", [False, True])
async def test_a_websocket_reads_what_its_client_was_told_before_and_what_it_has_written(
    cluster: Cluster, urls: Urls, database: Database, in_block: bool
) -> None:
    for replica in cluster.replicas:
        await asyncio.to_thread(replica.pause)
    async with served_here(talking(database, in_block=in_block)) as (_, port):
        async with httpx.AsyncClient(verify=False, trust_env=False) as http:
            written = await http.post(f"http://127.0.0.1:{port}/")
        assert written.status_code == 201
        cookie = written.headers["set-cookie"].partition(";")[0]
        headers: dict[str, Any]
        primary, replicas = ports(urls)
        for headers, version, expected in (
            ({}, 0, replicas),
            ({"cookie": cookie}, 1, {primary}),
        ):
            async with connect(
                f"ws://127.0.0.1:{port}/", additional_headers=headers, proxy=None
            ) as socket:
                for _ in range(3):
                    await socket.send("read")
                    there, server = map(int, str(await socket.recv()).split())
                    assert (there, server in expected) == (version, True)
                if headers:
                    await socket.send("write")
                    assert await socket.recv() == f"2 {primary}"
