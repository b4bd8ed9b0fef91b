"""What a request costs in the process itself, without server and network.

The same Starlette routes are called by turns, with asgi-db and written by hand.
"""

import asyncio
import itertools
import json
import os
import random
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import uvloop
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from asgi_db import Database, DBSessionMiddleware, plain, read_only, transactional
from tests.bench.course import Course
from tests.bench.samples import Measured
from tests.contenders.served import create_table
from tests.serving import run_program

SLICES = 60
"""Of each application, in a full run."""

REQUESTS = {"nothing": 1000, "read": 200, "write": 200}
"""In a slice."""


def cpu(course: Course) -> Measured:
    """Microseconds for a request, by slices: CPU time of the process, and time on the clock."""
    measured = course.measured("cpu")
    program = "from tests.bench.cpu import main; main()"
    slices = max(2, round(SLICES * course.share))
    with course.database.fresh_database() as url:
        asyncio.run(create_table(url))
        done = run_program(program, url, str(slices), folder=course.folder, within=300)
    if done.returncode:
        raise RuntimeError(done.stderr)
    measured.facts.update(json.loads(done.stdout))
    return measured


class SessionMiddleware:
    """What one writes by hand: a session around every request."""

    def __init__(self, app: Any, make: async_sessionmaker[AsyncSession]) -> None:
        self.app = app
        self.make = make

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        async with self.make() as session:
            scope.setdefault("state", {})["db"] = session
            await self.app(scope, receive, send)


@asynccontextmanager
async def applications(url: str) -> AsyncGenerator[dict[str, dict[str, Starlette]]]:
    """The applications, by what they do and how: `bare`, by `hand`, or `asgi_db`."""
    os.environ["DATABASE_URL"] = url  # the contenders' table is for applications that are served
    from tests.contenders.shared import Item, item

    ids = itertools.count(os.getpid() * 1_000_000)
    autocommit = create_async_engine(
        url, isolation_level="AUTOCOMMIT", pool_reset_on_return=None, pool_size=1
    )
    engine = create_async_engine(url, pool_size=1)
    database = Database(url, engine_options={"pool_size": 1})
    make_reader = async_sessionmaker(autocommit, expire_on_commit=False)
    make = async_sessionmaker(engine, expire_on_commit=False)

    async def nothing(request: Request) -> Response:
        return PlainTextResponse("ok")

    async def answer(session: AsyncSession) -> Response:
        found = await session.get_one(Item, 1)
        return JSONResponse({"id": found.id, "value": found.value})

    async def answer_five(session: AsyncSession) -> Response:
        ids = [await session.scalar(select(Item.id).where(Item.id == id)) for id in range(1, 6)]
        return JSONResponse(ids)

    async def read_by_hand(request: Request) -> Response:
        async with make_reader() as session:
            return await answer(session)

    @read_only
    async def read(request: Request) -> Response:
        return await answer(request.state.db)

    async def read_plainly_by_hand(request: Request) -> Response:
        async with make() as session:
            return await answer(session)

    @plain
    async def read_plainly(request: Request) -> Response:
        return await answer(request.state.db)

    async def read_five_by_hand(request: Request) -> Response:
        async with make_reader() as session:
            return await answer_five(session)

    @read_only
    async def read_five(request: Request) -> Response:
        return await answer_five(request.state.db)

    async def write_by_hand(request: Request) -> Response:
        async with make.begin() as session:
            session.add(item(next(ids)))
        return PlainTextResponse("ok", 201)

    @transactional
    async def write(request: Request) -> Response:
        request.state.db.add(item(next(ids)))
        return PlainTextResponse("ok", 201)

    def application(endpoint: Any, *middleware: Middleware) -> Starlette:
        return Starlette(routes=[Route("/", endpoint)], middleware=middleware)

    ours = Middleware(DBSessionMiddleware, database=database)
    yield {
        "nothing": {
            "bare": application(nothing),
            "hand": application(nothing, Middleware(SessionMiddleware, make=make)),
            "asgi_db": application(nothing, ours),
        },
        "read": {"hand": application(read_by_hand), "asgi_db": application(read, ours)},
        "write": {"hand": application(write_by_hand), "asgi_db": application(write, ours)},
        "plain read": {
            "hand": application(read_plainly_by_hand),
            "asgi_db": application(read_plainly, ours),
        },
        "five reads": {
            "hand": application(read_five_by_hand),
            "asgi_db": application(read_five, ours),
        },
    }
    for one in (autocommit, engine, database):
        await one.dispose()


async def ask(app: Starlette) -> None:
    """One request, as a server would make it."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/",
        "raw_path": b"/",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"bench")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    await app(scope, _receive, _send)


async def _receive() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _send(message: Any) -> None:
    if message["type"] == "http.response.start" and message["status"] >= 300:
        raise RuntimeError(f"answered {message['status']}")


async def _measure(url: str, slices: int) -> dict[str, dict[str, list[tuple[float, float]]]]:
    found = dict[str, dict[str, list[tuple[float, float]]]]()
    async with applications(url) as all_of_them:
        for what, number in REQUESTS.items():
            apps = all_of_them[what]
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in apps}
            for turn in range(slices + 1):
                for name in random.sample(list(apps), len(apps)):
                    began, began_cpu = time.perf_counter(), time.process_time()
                    for _ in range(number):
                        await ask(apps[name])
                    cpu_time = time.process_time() - began_cpu
                    clock = time.perf_counter() - began
                    if turn:  # the first is to warm up
                        times[name].append((cpu_time / number * 1e6, clock / number * 1e6))
            found[what] = times
    return found


def main() -> None:
    """Measure on a database with the contenders' table, and print the slices."""
    url, slices = sys.argv[1:]
    print(json.dumps(uvloop.run(_measure(url, int(slices)))))
