"""The path of a request through our own functions: `python -m tests.tracing`.

One warm request on FastAPI with SQLite, seen by Python's own profiler. What is counted, from the
middleware's `__call__` to its return:

    calls  of functions of our packages; a coroutine that goes on after an `await` is no new call
    hops   from one of our files to another, between one call and the next
    back   those of the hops that lead into a file in which the request has been before

SQLAlchemy runs in a greenlet, for which the profile function of the thread holds too: what it
calls back is counted. The driver's own thread is not.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from dataclasses import dataclass, field
from itertools import pairwise
from types import CodeType, FrameType
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, Request
from sqlalchemy import insert, select

import asgi_db
import asgi_db_fastapi
from asgi_db import Database, DBSession, DBSessionMiddleware, read_only, transactional
from asgi_db.types import ASGIApp, Message
from tests.contract.client import scope_of
from tests.internals import Recorder
from tests.tables import Author, Base

FOLDERS = tuple(
    os.path.dirname(os.path.abspath(str(package.__file__)))
    for package in (asgi_db, asgi_db_fastapi)
)
"""The packages whose functions are ours."""


@dataclass
class Path:
    """The way of one request.

    Attributes:
        steps: each call: how deep it is among our own, the file and the function.
    """

    steps: list[tuple[int, str, str]] = field(default_factory=list[tuple[int, str, str]])

    @property
    def calls(self) -> int:
        return len(self.steps)

    @property
    def hops(self) -> int:
        return sum(one[1] != other[1] for one, other in pairwise(self.steps))

    @property
    def files(self) -> int:
        return len({file for _, file, _ in self.steps})

    @property
    def back(self) -> int:
        return self.hops - (self.files - 1)

    def __str__(self) -> str:
        lines = [f"{'  ' * depth}{file}: {function}" for depth, file, function in self.steps]
        return "\n".join([*lines, self.summary])

    @property
    def summary(self) -> str:
        return f"{self.calls} calls, {self.hops} hops between {self.files} files, {self.back} back"


class Tracer:
    """Notes the calls of our own functions in this thread."""

    def __init__(self) -> None:
        self.path = Path()
        self._names: dict[CodeType, str] = {}
        self._seen: set[FrameType] = set()

    def __enter__(self) -> Path:
        sys.setprofile(self._event)
        return self.path

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        self._seen.clear()

    def _event(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or frame in self._seen:
            return
        if file := self._file_of(frame.f_code):
            self._seen.add(frame)
            self.path.steps.append((self._depth(frame), file, frame.f_code.co_qualname))

    def _depth(self, frame: FrameType) -> int:
        depth = 0
        while (caller := frame.f_back) is not None:
            frame = caller
            depth += bool(self._file_of(frame.f_code))
        return depth

    def _file_of(self, code: CodeType) -> str:
        name = self._names.get(code)
        if name is None:
            path = os.path.abspath(code.co_filename)
            folder = next((f for f in FOLDERS if path.startswith(f + os.sep)), "")
            name = os.path.relpath(path, os.path.dirname(folder)) if folder else ""
            self._names[code] = name
        return name


# -- what is traced ----------------------------------------------------------------------------


def application(database: Database) -> ASGIApp:
    """A read and a write as the documentation has them."""
    app = FastAPI()

    @app.get("/")
    @read_only
    async def read(request: Request) -> list[str]:
        session: DBSession = request.state.db
        return [*(await session.scalars(select(Author.name).limit(1))).all()]

    @app.post("/")
    @transactional
    async def write(request: Request) -> None:
        session: DBSession = request.state.db
        await session.execute(insert(Author).values(name=uuid4().hex))

    app.add_middleware(DBSessionMiddleware, database=database)
    return app


async def serve(app: ASGIApp, method: str) -> int:
    """Serve one request in this task, and return its status."""
    messages = list[Message]()

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        messages.append(message)

    await app(scope_of("http", "http", "/", "2.3") | {"method": method}, receive, send)
    return int(messages[0]["status"])


async def trace(database: Database, method: str) -> Path:
    """The path of one request, after the same one has been served a few times.

    It is the shortest of several: once a second the dashboard has the pool looked at, too.
    """
    app = application(database)
    found = list[Path]()
    for _ in range(3):
        assert await serve(app, method) == 200
    for _ in range(5):
        with Tracer() as path:
            assert await serve(app, method) == 200
        found.append(path)
    return min(found, key=lambda path: path.calls)


async def paths() -> dict[str, Path]:
    """The paths of a read and of a write, and those while a dashboard watches."""
    with tempfile.TemporaryDirectory() as folder:
        async with Database(f"sqlite+aiosqlite:///{folder}/test.db") as database:
            await database.create_tables(Base.metadata)
            found = {
                "a read_only read": await trace(database, "GET"),
                "a transactional write": await trace(database, "POST"),
            }
            Recorder.of(database)
            return {
                **found,
                "a watched read": await trace(database, "GET"),
                "a watched write": await trace(database, "POST"),
            }


def main() -> None:
    """Print both paths, then what they come to."""
    found = asyncio.run(paths())
    for name, path in found.items():
        print(f"{name}\n\n{path}\n")
    for name, path in found.items():
        print(f"{name}: {path.summary}")


if __name__ == "__main__":
    main()
