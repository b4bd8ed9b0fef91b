"""One framework on one database, and what can be seen of both from outside."""

import sqlite3
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, String, event, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import QueuePool

from asgi_db import Database, DBSession, Mode, plain
from asgi_db.types import ASGIApp, Message
from tests.contract.client import Exchange, Watch, call
from tests.contract.endpoints import Answer, Framework, Handlers, Route, Setup, Work
from tests.servers import assert_idle, outside


class Base(DeclarativeBase):
    """The tables."""


class Item(Base):
    """What the endpoints write."""

    __tablename__ = "item"

    name: Mapped[str] = mapped_column(String(50), primary_key=True)
    note: Mapped[str | None] = mapped_column(String(50))


_ITEMS = "CREATE TABLE item (name VARCHAR(50) PRIMARY KEY, note VARCHAR(50))"
_PARTS = "CREATE TABLE part (item VARCHAR(50) REFERENCES item DEFERRABLE INITIALLY DEFERRED)"


def _tables(url: str) -> list[str]:
    if "mysql" in url:  # no deferred constraints: see `cut`
        return ["DROP TABLE IF EXISTS item", _ITEMS]
    return ["DROP TABLE IF EXISTS part", "DROP TABLE IF EXISTS item", _ITEMS, _PARTS]


BAD_STATEMENT = text("SELECT * FROM no_such_table")
"""Fails on every database."""


def write(answer: Answer = Answer(), name: str = "a") -> Work:  # noqa: B008
    """The work of an endpoint which writes an item."""

    async def write(session: DBSession) -> Answer:
        session.add(Item(name=name))
        return answer

    return write


def at_start(look: Callable[[], Awaitable[None]]) -> Watch:
    """Look at the world when the status line leaves."""

    async def watch(message: Message) -> None:
        if message["type"] == "http.response.start":
            await look()

    return watch


@dataclass(frozen=True)
class Site:
    """A framework and a database on which it serves, with a pool of one connection."""

    framework: Framework
    url: str
    database: Database

    @classmethod
    @asynccontextmanager
    async def on(
        cls, framework: Framework, url: str, session_options: Mapping[str, Any] | None = None
    ) -> AsyncGenerator["Site"]:
        """Open a site on empty tables."""
        async with outside(url) as connection:
            for statement in _tables(url):
                await connection.execute(statement)
        options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}
        async with Database(
            url, engine_options=options, session_options=session_options
        ) as database:
            async with cls.around(database):
                yield cls(framework, url, database)

    @classmethod
    def around(cls, database: Database) -> AbstractAsyncContextManager[object]:
        """What stands around all that happens there."""
        return nullcontext()

    def app(
        self,
        work: Work | Mapping[str, Work],
        mode: Mode | None = None,
        *,
        dependency: Mode | None = None,
        default: Mode = plain,
        handlers: Handlers | None = None,
        around: bool = False,
        before: Work | None = None,
    ) -> ASGIApp:
        """The application of these endpoints.

        Args:
            work: what the one endpoint does, or each by its path.
            mode: what the routes are decorated with.
            dependency: the mode of the dependency that the endpoints take.
            default: the mode of the middleware.
            handlers: the exception handlers.
            around: whether the middleware stands around the application instead of inside.
            before: what a middleware does with the session before the route is known.
        """
        routes = [
            Route(path, each, mode, dependency)
            for path, each in ({"/": work} if callable(work) else work).items()
        ]
        setup = Setup(self.database, routes, handlers or {}, default, before)
        return self.framework.app(setup, around=around)

    async def answer(self, work: Work, mode: Mode | None = None, **options: Any) -> Exchange:
        """Serve one request with an application of this one endpoint; see `app`."""
        return await self.call(self.app(work, mode, **options))

    async def call(self, app: ASGIApp, path: str = "/", **options: Any) -> Exchange:
        """Serve one request, after which nothing may be left open; see `client.call`."""
        exchange = await call(app, path, **options)
        await self.assert_nothing_held()
        return exchange

    async def assert_nothing_held(self) -> None:
        """Neither the pool nor the server knows of a connection in use."""
        assert self.checked_out == 0
        await assert_idle(self.url)

    @property
    def checked_out(self) -> int:
        """How many connections are out of the pool."""
        return self._pool.checkedout()

    @property
    def opened(self) -> int:
        """How many connections the pool knows of."""
        return self._pool.checkedout() + self._pool.checkedin()

    @property
    def _pool(self) -> QueuePool:
        pool = self.database.engine.pool
        assert isinstance(pool, QueuePool)
        return pool

    async def items(self) -> list[str]:
        """The names of the items which another connection sees."""
        async with outside(self.url) as connection:
            rows = await connection.execute("SELECT name FROM item ORDER BY name")
        return [name for (name,) in rows]

    async def from_outside(self, sql: str) -> None:
        """Run a statement on another connection."""
        async with outside(self.url) as connection:
            await connection.execute(sql)

    # -- how a COMMIT comes to fail ------------------------------------------------------------

    @property
    def commit_error(self) -> type[DBAPIError]:
        """The type of the error after `spoil_commit`."""
        return DBAPIError if "mysql" in self.url else IntegrityError

    @property
    def unhandled(self) -> int:
        """The status with which `spoil_commit` is answered where no handler does it.

        In MariaDB no statement can let a COMMIT fail; it takes the connection away.
        """
        return 503 if "mysql" in self.url else 500

    async def spoil_commit(self, session: DBSession) -> None:
        """Let the COMMIT of the open transaction fail, and no statement before it."""
        await session.flush()
        if "mysql" in self.url:
            await self.cut(session)
        else:
            await session.execute(text("INSERT INTO part (item) VALUES ('missing')"))

    async def cut(self, session: DBSession) -> None:
        """Break the connection of the open transaction from outside, as a restart would."""
        if "postgresql" in self.url:
            pid = await session.scalar(text("SELECT pg_backend_pid()"))
            await self.from_outside(f"SELECT pg_terminate_backend({pid}, 5000)")
        else:
            await self.from_outside(f"KILL {await session.scalar(text('SELECT connection_id()'))}")

    async def spoil_rollback(self, session: DBSession) -> None:
        """Let the ROLLBACK of the open transaction fail."""
        if "sqlite" not in self.url:
            await self.cut(session)
            return

        def fail(_: Connection) -> None:
            raise sqlite3.OperationalError("disk I/O error")

        event.listen(self.database.engine.sync_engine, "rollback", fail, once=True)
