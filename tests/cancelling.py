"""Requests that are cancelled: how, at what moment, and what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import pytest
from sqlalchemy import text
from sqlalchemy.pool import QueuePool

from asgi_db import Database, DBSession, DBSessionMiddleware, Mode, transactional
from asgi_db.types import ASGIApp, Message, Receive, Scope, Send
from tests.chaos.cancellation import cancellable
from tests.contract.client import Exchange, call
from tests.internals import driver_of
from tests.servers import DatabaseServer, assert_idle, outside, run, server_connections
from tests.tables import Author, Base, authors

Test = TypeVar("Test", bound=Callable[..., Any])

WAYS = ["task", "twice", "scope", "timeout"]


def each_way(test: Test) -> Test:
    """In each way of cancelling; on MariaDB and SQLite in one of them, unless all are asked for."""
    parametrized: Test = pytest.mark.parametrize("way", WAYS)(pytest.mark.sweep(test))
    return parametrized


@contextmanager
def tables_on(server: DatabaseServer) -> Generator[str, None, None]:
    """The URL of a database with the tables: for a whole file, because it takes a while to make."""
    with server.fresh_database() as url:
        create_tables(url)
        yield url


def create_tables(url: str) -> None:
    """Creates the tables, whatever loop the caller is in."""

    async def create() -> None:
        async with Database(url) as database:
            await database.create_tables(Base.metadata)

    run(create())


def emptied(url: str) -> str:
    """The URL, when there are no rows any more; the next gets the number 1."""
    is_postgresql = url.startswith("postgresql")
    run(_empty(url, _EMPTY_POSTGRESQL if is_postgresql else _EMPTY_MYSQL))
    return url


_EMPTY_POSTGRESQL = ["TRUNCATE author, book RESTART IDENTITY"]
_EMPTY_MYSQL = ["DELETE FROM author", "ALTER TABLE author AUTO_INCREMENT = 1"]


async def _empty(url: str, statements: list[str]) -> None:
    async with outside(url) as connection:
        for statement in statements:
            await connection.execute(statement)


async def turns(number: int) -> None:
    """Let everybody else go on."""
    for _ in range(number):
        await asyncio.sleep(0)


@asynccontextmanager
async def no_complaints() -> AsyncGenerator[None, None]:
    """What the event loop has to complain of meanwhile: nothing."""
    complaints: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    yield
    loop.set_exception_handler(None)
    assert complaints == []


class Counted(Coroutine[Any, Any, Any]):
    """Counts how often a coroutine is resumed, and says so each time when it begins to wait."""

    def __init__(
        self, coroutine: Coroutine[Any, Any, Any], waits: Callable[[], object] = lambda: None
    ) -> None:
        self._coroutine = coroutine
        self._waits = waits
        self.resumed = 0

    def send(self, value: Any) -> Any:
        return self._resume(self._coroutine.send, value)

    def throw(self, *error: Any) -> Any:
        return self._resume(self._coroutine.throw, *error)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        like_a_generator: Any = self
        return like_a_generator  # type: ignore[no-any-return]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        return self.send(None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coroutine, name)

    def _resume(self, resume: Callable[..., Any], *args: Any) -> Any:
        self.resumed += 1
        step = resume(*args)
        self._waits()
        return step


class Points:
    """Counts the points at which a request waits, in whichever of its tasks, and cancels at some.

    Attributes:
        passed: how many there have been.
    """

    def __init__(self, site: Site, *cancel_at: int) -> None:
        self.passed = 0
        self._site = site
        self._cancel_at = cancel_at

    def __call__(self) -> None:
        self.passed += 1
        if self.passed in self._cancel_at:
            self._site.cancel()

    def watch(self, app: ASGIApp) -> ASGIApp:
        """The application, with each of its points counted."""

        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            async def serve() -> None:
                await app(scope, receive, send)

            _watching.set(self)
            await Counted(serve(), self)

        return watched


_watching: ContextVar[Points] = ContextVar("watching")


@contextmanager
def watched_tasks() -> Generator[None]:
    """Let the tasks which a watched request begins be watched too, on the running loop."""

    def make_task(
        loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any
    ) -> asyncio.Task[Any]:
        points = _watching.get(None)
        if points is not None:
            coroutine = Counted(coroutine, points)
        return asyncio.Task(coroutine, loop=loop, **options)

    loop = asyncio.get_running_loop()
    loop.set_task_factory(make_task)
    yield
    loop.set_task_factory(None)


POOL = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}

Endpoint = Callable[[DBSession, Send], Awaitable[None]]


@dataclass
class Site:
    """An application with a pool of one connection, and how to cancel its requests.

    Attributes:
        cancel: cancels the request in the way of the test.
        sent: what the last request has handed to the server.
        delivered: which of that the server has taken, before anything cut it off.
    """

    url: str
    database: Database
    cancel: Callable[[], object] = lambda: None
    sent: list[str] = field(default_factory=list[str])
    delivered: list[str] = field(default_factory=list[str])
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    raises = True

    def app(self, endpoint: Endpoint, way: str, mode: Mode = transactional) -> ASGIApp:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await endpoint(scope["state"]["db"], send)

        return cancellable(way, DBSessionMiddleware(app, self.database, mode=mode), self)

    def will_be_cancelled_by(self, cancel: Callable[[], object]) -> None:
        self.cancel = cancel

    async def serve(self, app: ASGIApp, spec_version: str = "2.3") -> Exchange:
        """Serve a request; the client takes its time."""

        async def take(message: Message) -> None:
            self.sent.append(message["type"])
            await asyncio.sleep(0)
            self.delivered.append(message["type"])

        self.sent, self.delivered = [], []
        return await call(app, watch=take, spec_version=spec_version)

    async def cancelled_call(self, app: ASGIApp, way: str, when: Awaitable[object]) -> None:
        """Serve a request, and cancel it when the moment has come."""
        request = asyncio.create_task(self.serve(app))
        await when
        self.cancel()
        if way == "twice":
            await turns(3)
            self.cancel()
        await self.assert_cancelled(request, way)

    async def assert_cancelled(self, request: asyncio.Task[Exchange], way: str) -> None:
        """Wait until the request has ended, by its cancellation and by nothing else."""
        await asyncio.wait((request,), timeout=20)
        if way == "timeout" and self.delivered[-1:] == ["http.response.body"]:
            assert outcome(request) in ("TimeoutError", "ended")  # it comes a turn later
        else:
            expected = {"scope": "ended", "timeout": "TimeoutError"}.get(way, "cancelled")
            assert outcome(request) == expected

    async def assert_clean(self) -> None:
        await self.assert_returned()
        await assert_idle(self.url)
        async with self.database.transaction() as session:  # on the same connection, or a new one
            session.add(Author(name="next"))
        assert "next" in await authors(self.url)

    async def lose_connection(self) -> None:
        """Let the server close the pool's connection, and the driver notice it; SQLite has none."""
        number = {"postgresql": "SELECT pg_backend_pid()", "mysql": "SELECT connection_id()"}
        kill = {"postgresql": "SELECT pg_terminate_backend({})", "mysql": "KILL {}"}
        backend = self.database.url.get_backend_name()
        if backend not in number:
            return
        async with self.database.session() as session:
            id = await session.scalar(text(number[backend]))
            driver = (await (await session.connection()).get_raw_connection()).driver_connection
        async with outside(self.url) as connection:
            await connection.execute(kill[backend].format(id))
        while not self._is_closed(driver):  # noqa: ASYNC110 - the driver gives no event for it
            await asyncio.sleep(0.001)

    def _is_closed(self, driver: object) -> bool:
        return driver_of(self.database.engine.dialect).is_closed(driver)

    async def assert_returned(self) -> None:
        pool = self.database.engine.pool
        assert isinstance(pool, QueuePool)
        assert pool.checkedout() == 0


def outcome(request: asyncio.Task[Exchange]) -> str:
    """How a request has ended."""
    if not request.done():
        return "still running"
    if request.cancelled():
        return "cancelled"
    error = request.result().error
    return "ended" if error is None else type(error).__name__


async def answer(send: Send) -> None:
    await send({"type": "http.response.start", "status": 201, "headers": []})
    await send({"type": "http.response.body"})


SLEEP = {"postgresql": "SELECT pg_sleep(60)", "mysql": "SELECT SLEEP(60)"}
"""By the name of the database; nobody waits for its end."""


async def on_the_server(url: str, query: str) -> None:
    """Wait until the server runs this statement."""
    while True:
        clients = await server_connections(url)
        if any(client.state == "active" and query in client.query for client in clients):
            return
        await asyncio.sleep(0.01)
