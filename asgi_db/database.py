"""The `Database`: owns the engine, the sessions and their life."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self
from weakref import WeakSet

import anyio
from sqlalchemy import URL, Connection, Engine, MetaData, StaticPool, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext import asyncio as sqlalchemy_asyncio
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from asgi_db.drivers import driver_of_url
from asgi_db.drivers.base import lost_connection
from asgi_db.drivers.connecting import Connector, background_is_over
from asgi_db.drivers.sqlite import TemporaryFolder
from asgi_db.engine import isolation_options, refuse_autocommit, variant
from asgi_db.errors import ConfigurationError, DatabaseBusyError, DatabaseDownError, SandboxError
from asgi_db.modes import Mode, Transactional, plain, transactional
from asgi_db.pool.abandoned import connection_aside, connection_of
from asgi_db.pool.fair import FairPool
from asgi_db.pool.life import DISPOSE_TIMEOUT, EngineLife
from asgi_db.profiles import PoolName, PoolProfile, pool_profile
from asgi_db.settings import (
    create_database_url,
    database_url_from_env,
    engine_options_from_env,
    parse_database_url,
)
from asgi_db.statistics import DatabaseStats, Statistics, name_of, total
from asgi_db.tasks import run_to_completion
from asgi_db.unit.origin import Origin
from asgi_db.unit.session import DBSession

if TYPE_CHECKING:
    from asgi_db.testing import Sandbox

logger = logging.getLogger("asgi_db")

DEFAULT_FILE = "app.db"
"""The SQLite file that serves where nothing else is said."""

PING_TIMEOUT = 2.0
"""Seconds that `ping` waits for a pooled connection's answer, and then for one beside the pool."""


_databases: WeakSet[Database] = WeakSet()


class Database:
    """Owns the engine, the session factory and their life; the one object that a user makes.

        database = Database("postgresql+asyncpg://app@localhost/shop")

    The engine is made in the event loop that uses it: by `async with database`, by the
    middleware at the application's startup, or else at first use.
    """

    def __init__(
        self,
        url: str | URL | None = None,
        *,
        engine: AsyncEngine | None = None,
        pool: PoolName | PoolProfile = "medium",
        engine_options: Mapping[str, Any] | None = None,
        session_options: Mapping[str, Any] | None = None,
        pooler: Literal["transaction"] | None = None,
        wait_for: float = 0.0,
        leak_threshold: float | None = None,
    ) -> None:
        """Check the settings; nothing is opened yet.

        Args:
            url: where the database is. Without it `DATABASE_URL` or `DATABASE_TYPE` and its
                companions say so, and without these an SQLite file in the working directory
                serves.
            engine: an engine of your own instead; it is used as it is, and never disposed. What an
                `async_creator` of its own raises comes as it is.
            pool: the pool profile, "low", "medium" or "high", or a `PoolProfile` of your own.
            engine_options: for SQLAlchemy's `create_async_engine`; they override the profile.
            session_options: for SQLAlchemy's `AsyncSession`, over `autoflush=False` and
                `expire_on_commit=False`.
            pooler: "transaction" behind PgBouncer in transaction pooling: asyncpg then keeps no
                prepared statements.
            wait_for: seconds in which a database that is not there yet may come up at startup.
            leak_threshold: seconds after which a connection that is still out of the pool is
                logged, once, with the stack that took it; off if None.

        Raises:
            ConfigurationError: a setting cannot work; the message says which, and the remedy.
        """
        if engine is not None and (url is not None or engine_options is not None or pooler):
            raise ConfigurationError(
                "engine= comes ready made: leave out url=, engine_options= and pooler=, or leave"
                " out engine=."
            )
        if pooler not in (None, "transaction"):
            raise ConfigurationError(f"pooler={pooler!r} is unknown: use 'transaction', or None.")
        if not wait_for >= 0:
            raise ConfigurationError(f"wait_for={wait_for!r} must be seconds, 0 or more.")
        if leak_threshold is not None and not leak_threshold > 0:
            raise ConfigurationError(
                f"leak_threshold={leak_threshold!r} must be seconds, more than 0; leave it out to"
                " switch it off."
            )
        if engine is not None:
            refuse_autocommit("engine=", isolation_options(engine.sync_engine))
        refuse_autocommit("engine_options=", engine_options or {})
        self.statistics = Statistics()  # which `asgi_db.opentelemetry` observes
        self._leak_threshold = leak_threshold
        self._given = (
            None
            if engine is None
            else EngineLife(engine, self.statistics, given=True, leak_threshold=leak_threshold)
        )
        self._profile = pool if isinstance(pool, PoolProfile) else pool_profile(pool)
        self._engine_options = dict(engine_options or {})
        if engine is not None:
            self.url = engine.url
        elif url is not None:
            self.url = parse_database_url(url)
        else:
            self.url = database_url_from_env(os.environ) or _embedded()
            self._engine_options = {**engine_options_from_env(os.environ), **self._engine_options}
        self.session_options: dict[str, Any] = {
            "autoflush": False,
            "expire_on_commit": False,
            **(session_options or {}),
        }
        self._pooler = pooler
        self._wait_for = wait_for
        self._lives: dict[asyncio.AbstractEventLoop, EngineLife] = {}
        self._lock = threading.RLock()  # for whoever adds to the engines, or takes one away
        self._folder: TemporaryFolder | None = None
        _databases.add(self)
        self._of_parent: list[EngineLife] = []
        self._variants: dict[tuple[Engine, tuple[object, ...]], Engine] = {}
        self.active_sandbox: Sandbox | None = None

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ, **options: Any) -> Self:
        """Make a database from environment variables alone.

        Reads `DATABASE_URL`, or `DATABASE_TYPE`, `_USER`, `_PASSWORD`, `_HOST`, `_PORT`,
        `_SCHEMA` (the name of the database) and `_CHARSET`; and `DATABASE_ECHO`, `_POOL_ECHO`.

        Args:
            environ: where to read.
            options: for `Database` itself.

        Raises:
            ConfigurationError: neither is set, or a variable has a value that cannot work.
        """
        url = database_url_from_env(environ)
        if url is None:
            raise ConfigurationError("Set DATABASE_URL, or DATABASE_TYPE and its companions.")
        engine_options = engine_options_from_env(environ)
        engine_options.update(options.pop("engine_options", None) or {})
        return cls(url, engine_options=engine_options, **options)

    def __repr__(self) -> str:
        return f"<Database {self.url!r}>"  # SQLAlchemy's URL hides the password in its repr

    # -- the engine and its life ---------------------------------------------------------------

    @property
    def engine(self) -> AsyncEngine:
        """The engine of the running event loop; made at first use.

        Raises:
            RuntimeError: there is no running event loop.
        """
        return self._life.engine

    @property
    def _life(self) -> EngineLife:
        return self._given or self._life_on(asyncio.get_running_loop())

    def _life_on(self, loop: asyncio.AbstractEventLoop) -> EngineLife:
        if self._given is not None:
            return self._given
        return self._lives.get(loop) or self._begin_life(loop)

    def _begin_life(self, loop: asyncio.AbstractEventLoop) -> EngineLife:
        with self._lock:  # a loop's first requests may be those of synchronous handlers, in threads
            life = self._lives.get(loop)
            if life is None:
                self._forget_closed_loops()
                life = self._lives[loop] = self._make_life()
                if self.active_sandbox is not None:
                    self.active_sandbox.cover(life)
            return life

    def _make_life(self, *, is_aside: bool = False) -> EngineLife:
        url = self.url
        driver = driver_of_url(url)
        in_memory = driver.is_in_memory(url)
        if in_memory:
            # Each connection to SQLite's own `:memory:` is a database of its own. A private file
            # is one database for all of them, with transactions that do not see each other.
            self._folder = self._folder or TemporaryFolder()
            url = url.set(database=os.path.join(self._folder.path, "memory.db"))
        engine = self._make_engine(url)
        pooler = self._pooler is not None
        driver.prepare(engine.sync_engine, pooler=pooler, durable=not in_memory)
        verify = self._profile.verify and not self._engine_options.get("pool_pre_ping")
        return EngineLife(
            engine,
            Statistics() if is_aside else self.statistics,
            pooler=pooler,
            verify=verify,
            leak_threshold=None if is_aside else self._leak_threshold,
        )

    async def start(self) -> None:
        """Make the engine, and wait for the database where `wait_for=` says so.

        Raises:
            ConnectionError: the database did not come up within `wait_for` seconds.
        """
        _ = self.engine
        deadline = time.monotonic() + self._wait_for
        delay = 0.1
        while self._wait_for:
            left = deadline - time.monotonic()
            try:
                with anyio.fail_after(max(left, 0.1)):  # also where it takes, but never answers
                    return await self.ping()
            except (SQLAlchemyError, OSError) as error:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self._not_there(error) from error
                logger.warning(
                    "%r is not there yet (%s); trying for %.1f s more",
                    self,
                    _cause(error),
                    left,
                )
                await anyio.sleep(min(delay, left))
                delay = min(delay * 2, 2.0)

    def _not_there(self, error: Exception) -> ConnectionError:
        return ConnectionError(
            f"{self!r} did not come up within {self._wait_for:g} s: {_cause(error)}"
        )

    async def dispose(self) -> None:
        """Close every connection, also those which are still out after a while.

        The database can be used again afterwards. An engine of your own is left alone.
        """
        if self._given is not None:
            await run_to_completion(self._given.dispose())
        with self._lock:
            self._forget_closed_loops()
            life = self._forget(asyncio.get_running_loop())
        try:
            if life is not None:
                await run_to_completion(life.dispose())
            await background_is_over(DISPOSE_TIMEOUT)  # SQLite's connections close in threads
        finally:
            self._remove_unused_folder()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.dispose()
            raise
        return self

    async def __aexit__(
        self,
        _: type[BaseException] | None,
        __: BaseException | None,
        ___: TracebackType | None,
    ) -> None:
        await self.dispose()

    async def ping(self) -> None:
        """Ask the database for a sign of life, whether or not the pool has a connection free.

        Raises:
            DatabaseBusyError: it lives, but no connection was free within 2 seconds.
            DatabaseDownError: it cannot be reached, or gave no answer within 2 seconds.
        """
        try:
            return await _ask(connection_of(self.engine))
        except DatabaseDownError:
            raise
        except (SQLAlchemyError, TimeoutError) as error:
            busy = DatabaseBusyError("database.ping()", self.holders())
            cause = error
        try:
            await _ask(connection_aside(self.engine))
        except (SQLAlchemyError, TimeoutError) as error:
            raise lost_connection(error) from error
        raise busy from cause

    async def create_tables(self, metadata: MetaData) -> None:
        """Create the tables which do not exist yet."""
        async with connection_of(self.engine) as connection, connection.begin():
            await connection.run_sync(metadata.create_all)

    async def drop_tables(self, metadata: MetaData) -> None:
        """Drop the tables which exist."""
        async with connection_of(self.engine) as connection, connection.begin():
            await connection.run_sync(metadata.drop_all)

    # -- who holds what ------------------------------------------------------------------------

    def stats(self) -> DatabaseStats:
        """Say what the routes have done, and who has which connection now.

        Opens nothing, and needs no event loop: a thread may ask, too. Covers this process.
        """
        lives = self._all_lives()
        holders = [holder for life in lives for holder in life.connections.holders()]
        return DatabaseStats(
            name=name_of(self.url),
            pool=total(life.connections.stats() for life in lives),
            holders=tuple(sorted(holders, key=lambda holder: -holder.age)),
            routes=self.statistics.routes,
        )

    def engines(self) -> list[AsyncEngine]:
        """Return the engines that have been made: one in each event loop that uses it."""
        return [life.engine for life in self._all_lives()]

    def _all_lives(self) -> list[EngineLife]:
        return list(self._lives.values()) if self._given is None else [self._given]

    # -- sessions outside requests -------------------------------------------------------------

    @asynccontextmanager
    async def session(self, mode: Mode = plain) -> AsyncGenerator[DBSession]:
        """Open a session for a script, a job or a test.

            async with database.session() as session:
                session.add(order)
                await session.commit()

        Args:
            mode: how its unit of work ends with the block; `plain` rolls back what is not
                committed by hand.
        """
        if mode.retries:
            raise ConfigurationError(
                f"A block cannot be run again: leave out retries={mode.retries}, and put the block"
                " into a loop of your own."
            )
        kind = "transaction" if mode.commits else "session"
        block = Block(self, mode, f"`async with database.{kind}()`")
        session = DBSession(block)
        unit = block.unit_of_work(session)
        try:
            yield session
        except BaseException:
            await unit.end(success=False)
            raise
        else:
            await unit.end(success=True)
        finally:
            try:
                await unit.run_late_hooks()
            finally:
                block.close()

    @asynccontextmanager
    async def transaction(self, mode: Transactional = transactional) -> AsyncGenerator[DBSession]:
        """Open a session which commits at the end of the block, or rolls back if it raises.

            async with database.transaction() as session:
                session.add(order)

        Args:
            mode: `transactional`, or `transactional(isolation=…)`.
        """
        async with self.session(mode) as session:
            yield session

    def sandbox(self) -> Sandbox:
        """Begin a sandbox, for a test: nothing that is written in its block stays.

            with database.sandbox():  # or: async with
                response = client.post("/orders")

        It holds for requests, `session()`, `transaction()` and the engine, in every event loop.

        Raises:
            SandboxError: there is one already, or a connection is still held.
        """
        from asgi_db.testing import Sandbox

        return Sandbox(self)

    # -- for the sandbox -----------------------------------------------------------------------

    @property
    def lives(self) -> list[EngineLife]:
        """The engines of all event loops, each with its life."""
        return [self._given] if self._given is not None else list(self._lives.values())

    def make_life_aside(self) -> EngineLife:
        """Make an engine that is made as the others are, and is not among them.

        Raises:
            SandboxError: the engine's only connection cannot be replaced.
        """
        if self._given is not None:
            engine = self._given.engine
            if isinstance(engine.pool, StaticPool):
                raise SandboxError(
                    "The pool of this engine is a StaticPool, so there is no second connection for"
                    " a sandbox, and a database in memory ends with the first. Let"
                    ' Database("sqlite://") make the engine, or use a file.'
                )
            aside = create_async_engine(engine.url, pool=engine.pool.recreate())
            return EngineLife(aside, Statistics())
        with self._lock:
            return self._make_life(is_aside=True)

    # -- for the unit of work ------------------------------------------------------------------

    def engine_on(self, loop: asyncio.AbstractEventLoop) -> AsyncEngine:
        """Return the engine of an event loop, also to a thread beside it; made at first use."""
        return self._life_on(loop).engine

    def bind_for(self, bind: Engine | Connection, mode: Mode) -> Engine | Connection:
        """Return the variant of an engine on which transactions begin as the mode says."""
        if isinstance(bind, Connection):
            return bind
        key = bind, mode.characteristics
        found = self._variants.get(key)
        if found is None:
            with self._lock:
                found = self._variants[key] = variant(bind, mode)
        return found

    def _make_engine(self, url: URL) -> AsyncEngine:
        # A pool class of the user's own, such as NullPool, need not take the profile's values.
        has_own_pool = "poolclass" in self._engine_options
        options: dict[str, Any] = {}
        if not has_own_pool:
            options.update(self._profile.engine_options(), poolclass=FairPool)
        driver = driver_of_url(url)
        options.update(driver.options(url, pooler=self._pooler is not None))
        for name, value in self._engine_options.items():
            both = isinstance(value, Mapping) and isinstance(options.get(name), Mapping)
            options[name] = {**options[name], **value} if both else value
        if creator := options.get("async_creator"):  # which SQLAlchemy calls without `do_connect`
            options["async_creator"] = Connector(driver, creator)
        # OpenTelemetry puts its own in the place of this function, whenever it is called upon.
        return sqlalchemy_asyncio.create_async_engine(url, **options)

    def holders(self) -> list[str]:
        """Say which routes have the connections that are out of the pool, and for how long."""
        return [str(holder) for holder in self._life.connections.holders()]

    def _forget(self, loop: asyncio.AbstractEventLoop) -> EngineLife | None:
        life = self._lives.pop(loop, None)
        if life is not None:
            base = life.engine.sync_engine
            self._variants = {key: v for key, v in self._variants.items() if key[0] is not base}
        return life

    def _forget_closed_loops(self) -> None:
        """Drop the engines of loops that ended without `dispose`: their connections are dead."""
        for loop in [loop for loop in self._lives if loop.is_closed()]:
            life = self._forget(loop)
            if life is not None:
                life.terminate()

    def _remove_unused_folder(self) -> None:
        """Let a database in memory go when its last engine has gone, the sandbox's included."""
        with self._lock:
            if self._folder is not None and not self._lives and self.active_sandbox is None:
                self._folder.remove()
                self._folder = None

    def _leave_to_parent(self) -> None:
        """After a fork: leave the parent's connections alone, whose sockets this process shares."""
        self._lock = threading.RLock()  # a thread that has not come along may hold the other
        self._folder = None
        for life in self._lives.values():
            life.leave_to_parent()
        self._of_parent.extend(self._lives.values())  # to collect them would close something
        self._lives.clear()
        self._variants.clear()


def _leave_all_to_parent() -> None:
    for database in _databases:
        database._leave_to_parent()  # pyright: ignore[reportPrivateUsage]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_all_to_parent)


class Block(Origin):
    """An `async with` block, for which a session is."""

    def __init__(self, database: Database, mode: Mode, name: str) -> None:
        self.database = database
        self._mode = mode
        self._name = name

    def default_mode(self) -> Mode:
        return self._mode

    def describe(self) -> str:
        return self._name


def _cause(error: Exception) -> str:
    return str(error).partition("\n")[0] or "no answer"


async def _ask(connecting: AbstractAsyncContextManager[AsyncConnection]) -> None:
    with anyio.fail_after(PING_TIMEOUT):
        async with connecting as connection:
            await connection.execute(text("SELECT 1"))


def _embedded() -> URL:
    logger.warning(
        "No database is configured: using the SQLite file %s. Set DATABASE_URL, or pass a URL to"
        " Database(...).",
        os.path.abspath(DEFAULT_FILE),
    )
    return create_database_url("sqlite", database=DEFAULT_FILE)
