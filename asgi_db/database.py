"""The `Database`: the one object that a user makes."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, cast

from sqlalchemy import URL, MetaData
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from typing_extensions import TypeVar

from asgi_db.engine.variants import isolation_options, refuse_autocommit
from asgi_db.environment import read_environment
from asgi_db.errors import ConfigurationError
from asgi_db.logs import logger
from asgi_db.modes import Mode, Transactional, as_mode, is_number, plain, transactional
from asgi_db.pool.definitions import define
from asgi_db.pool.engines import EngineSettings
from asgi_db.pool.life import EngineLife
from asgi_db.pool.ping import ping, wait_for_database
from asgi_db.profiles import PoolName, PoolProfile, pool_profile
from asgi_db.replicas.topology import topology
from asgi_db.settings import Secret, create_database_url, parse_database_url
from asgi_db.statistics import DatabaseStats, PoolStats, Statistics
from asgi_db.tasks import running_loop
from asgi_db.unit.block import Block
from asgi_db.unit.maker import SessionMaker
from asgi_db.unit.origin import UnitLife
from asgi_db.unit.session import DBSession
from asgi_db.unit.session_class import choose_session

if TYPE_CHECKING:
    from asgi_db.testing import CapturedStatements, Sandbox

SessionT_co = TypeVar("SessionT_co", bound=DBSession, default=DBSession, covariant=True)

DEFAULT_FILE = "app.db"
"""The SQLite file that is used if no database is configured."""


class Database(Generic[SessionT_co]):
    """Owns the engines and opens the sessions; the one object that a user makes.

        database = Database("postgresql+asyncpg://app@localhost/shop")

    The engine is made in the event loop that uses it: by `async with database`, by the
    middleware at the application's startup, or else at first use.

    With a session class of your own, `Database[HeroSession]` tells the type checker which one its
    sessions have.
    """

    def __init__(
        self,
        url: str | URL | Secret | None = None,
        *,
        engine: AsyncEngine | None = None,
        replicas: Sequence[str | URL | Secret | AsyncEngine] = (),
        pool: PoolName | PoolProfile = "medium",
        engine_options: Mapping[str, Any] | None = None,
        session_options: Mapping[str, Any] | None = None,
        pooler: Literal["transaction"] | None = None,
        wait_for: float = 0.0,
        leak_threshold: float | None = None,
    ) -> None:
        """Check the settings; nothing is opened yet.

        Args:
            url: where the database is; pydantic's `SecretStr` too. Without it, `DATABASE_URL` or
                `DATABASE_TYPE` and its companions name the place; without these, an SQLite file in
                the working directory is used.
            engine: an engine of your own instead; it is used as it is, and never disposed. Errors
                of its `async_creator`, if it has one, are not translated.
            replicas: the URLs of the primary's replicas, or with `engine=` their engines. A unit in
                `read_only` runs on one that has everything which its client was told is committed.
                Beside a URL from the environment, `DATABASE_REPLICA_URLS` names them.
            pool: the pool profile, "low", "medium" or "high", or a `PoolProfile` of your own.
            engine_options: for SQLAlchemy's `create_async_engine`; they override the profile.
            session_options: what SQLAlchemy's `async_sessionmaker` takes, over `autoflush=False`
                and `expire_on_commit=False`; with `class_` and `sync_session_class` for sessions
                of a class of your own.
            pooler: "transaction" behind PgBouncer in transaction pooling: the driver then keeps no
                prepared statements.
            wait_for: how long to wait at startup for a database that does not answer yet, in
                seconds.
            leak_threshold: seconds after which a connection that is still checked out is logged,
                once, with the stack that took it; off if None.

        Raises:
            ConfigurationError: a setting cannot work; the message names it, and the remedy.
        """
        _check_engine(engine, url=url, engine_options=engine_options, pooler=pooler)
        _check_numbers(wait_for=wait_for, leak_threshold=leak_threshold)
        self.url, options, replicas = _place(url, engine, engine_options, replicas)
        self._dialect = type(engine.dialect) if engine is not None else self.url.get_dialect()
        self.has_replicas = bool(replicas)
        choice = choose_session(session_options, self._dialect, has_replicas=self.has_replicas)
        self.session_class = cast(type[SessionT_co], choice.class_)
        self.session_options = choice.options
        self.statistics = Statistics()  # `asgi_db.opentelemetry` observes them
        self._wait_for = wait_for
        profile = pool if isinstance(pool, PoolProfile) else pool_profile(pool)
        settings = EngineSettings(
            self.url, profile, options, pooler, leak_threshold, has_replicas=self.has_replicas
        )
        self._topology = topology(settings, self.statistics, replicas, given=engine)
        self._engines = self._topology.primary
        self.clients = self._topology.clients
        # Without a step in between: each request asks it.
        self.life_on: Callable[[asyncio.AbstractEventLoop], UnitLife] = (
            self._topology.on if replicas else self._engines.on
        )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ, **options: Any) -> Self:
        """Make a database from environment variables alone.

        Reads `DATABASE_URL`, or `DATABASE_TYPE`, `_USER`, `_PASSWORD`, `_HOST`, `_PORT`,
        `_SCHEMA` (the name of the database) and `_CHARSET`; and `DATABASE_ECHO`, `_POOL_ECHO`,
        `_REPLICA_URLS`.

        Args:
            environ: the variables.
            options: the other arguments of `Database`.

        Raises:
            ConfigurationError: neither is set, or a variable has a value that cannot work.
        """
        url, engine_options, replicas = read_environment(environ)
        if url is None:
            raise ConfigurationError("Set DATABASE_URL, or DATABASE_TYPE and its companions.")
        engine_options.update(options.pop("engine_options", None) or {})
        options["replicas"] = options.get("replicas") or replicas
        return cls(url, engine_options=engine_options, **options)

    def __repr__(self) -> str:
        return f"<Database {self.url!r}>"  # SQLAlchemy's URL hides the password in its repr

    # -- the engine and its life ---------------------------------------------------------------

    @property
    def engine(self) -> AsyncEngine:
        """The engine of the running event loop; made at first use.

        Where no event loop runs, as in a synchronous endpoint, it is the only engine there is.

        Raises:
            RuntimeError: there is no running event loop, and no engine yet, or several.
        """
        return self._engines.running.engine

    @property
    def life(self) -> EngineLife:
        """The engine of the running event loop, with its life; made at first use."""
        return self._engines.running

    async def start(self) -> None:
        """Make the engine, and wait for the database for up to `wait_for=` seconds.

        Raises:
            ConnectionError: the database did not come up within `wait_for` seconds.
            ConfigurationError: this coroutine is not run by asyncio.
        """
        if running_loop() is None:
            raise ConfigurationError.without_asyncio()
        life = self.life
        if self._wait_for:
            await wait_for_database(life, self._wait_for, repr(self))

    async def dispose(self) -> None:
        """Close every connection; one that is still in use after 10 seconds is terminated.

        The database can be used again afterwards. An engine of your own is left alone.
        """
        await self._topology.dispose()

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
        """Check that the database answers, whether or not the pool has a connection free.

        Raises:
            DatabaseBusyError: it answers, but no connection was free within 2 seconds.
            DatabaseDownError: it cannot be reached, gave no answer within 2 seconds, or only reads
                although the application writes.
        """
        await ping(self.life)

    async def create_tables(self, metadata: MetaData) -> None:
        """Create the tables which do not exist yet.

        Several processes may do so at once: one creates the tables, and the others wait.
        """
        await define(self.engine, metadata.create_all)

    async def drop_tables(self, metadata: MetaData) -> None:
        """Drop the tables which exist."""
        await define(self.engine, metadata.drop_all)

    # -- statistics ----------------------------------------------------------------------------

    def pool_stats(self) -> PoolStats:
        """Return the connections of the pool at this moment; part of `stats()`, and cheaper."""
        return self._engines.pool_stats()

    def checked_out(self) -> int:
        """Return how many connections are in use at this moment; cheaper still."""
        return sum([life.connections.checked_out for life in self._engines.all()])

    def stats(self) -> DatabaseStats:
        """Return what each route has done, and what has a connection now, in this process.

        It opens nothing and needs no event loop: a thread may call it, too.
        """
        return self._topology.database_stats()

    def holders(self) -> list[str]:
        """Return the routes that have a connection checked out, and for how long."""
        return self.life.holders()

    def engines(self) -> list[AsyncEngine]:
        """Return the engines that have been made for the event loops, also for the replicas."""
        return [life.engine for life in self._topology.all()]

    # -- sessions outside requests -------------------------------------------------------------

    @asynccontextmanager
    async def session(self, mode: Mode = plain) -> AsyncGenerator[SessionT_co]:
        """Open a session for a script, a job or a test.

            async with database.session() as session:
                session.add(order)
                await session.commit()

        Args:
            mode: how its unit of work ends with the block; `plain` rolls back what is not
                committed by hand.

        Raises:
            ConfigurationError: that is no mode, or one with `retries=`.
        """
        mode = as_mode(mode, "The mode of database.session()")
        kind = "transaction" if mode.commits else "session"
        async with Block(self, mode, f"`async with database.{kind}()`").session() as session:
            yield session

    @asynccontextmanager
    async def transaction(self, mode: Transactional = transactional) -> AsyncGenerator[SessionT_co]:
        """Open a session which commits at the end of the block, or rolls back if it raises.

            async with database.transaction() as session:
                session.add(order)

        Args:
            mode: `transactional`, or `transactional(isolation=…)`.

        Raises:
            ConfigurationError: that is no mode which commits, or one with `retries=`.
        """
        if not as_mode(mode, "The mode of database.transaction()").commits:
            raise ConfigurationError(
                "database.transaction() commits, so its mode is transactional, with options or"
                " without; for another mode there is database.session(mode)."
            )
        async with self.session(mode) as session:
            yield session

    @functools.cached_property
    def sessionmaker(self) -> async_sessionmaker[SessionT_co]:
        """What libraries take where they ask for an `async_sessionmaker`.

            admin = Admin(app, session_maker=database.sessionmaker)

        Its sessions roll back at their end what was not committed, and those of its `begin()`
        commit. It may be used before there is an event loop; its options concern it alone.
        """
        return SessionMaker(self, self._dialect)

    # -- for tests -----------------------------------------------------------------------------

    def redirect(self, url: str | URL) -> None:
        """Let the database be at another URL, for a test run; all other settings stay.

        For a `Database` that an application makes with a URL of its own when it is imported. Its
        replicas are those of the other URL, and are left out.

        Raises:
            ConfigurationError: it has an engine already, or the URL cannot be used.
        """
        url = parse_database_url(url)
        self._engines.redirect(url)
        self._topology.leave_replicas()
        self.url = url

    def capture_statements(self) -> AbstractContextManager[CapturedStatements]:
        """Capture the statements that are sent in a block, for a test.

            with database.capture_statements() as statements:
                client.get("/orders")

        `len(statements)` is their number, and `statements.repeated` has those of an N+1. BEGIN,
        COMMIT, ROLLBACK and savepoints are no statements.
        """
        from asgi_db.testing.captured import capture

        return capture(self._topology.all, self._engines)

    def sandbox(self) -> Sandbox:
        """Begin a sandbox, for a test: nothing that is written in its block stays.

            with database.sandbox():  # or: async with
                response = client.post("/orders")

        It holds for requests, `session()`, `transaction()` and the engine, in every event loop.

        Raises:
            SandboxError: there is one already, or a connection is still held.
        """
        from asgi_db.testing import Sandbox

        return Sandbox(self._engines)


def _place(
    url: str | URL | Secret | None,
    engine: AsyncEngine | None,
    engine_options: Mapping[str, Any] | None,
    replicas: Sequence[str | URL | Secret | AsyncEngine],
) -> tuple[URL, dict[str, Any], Sequence[str | URL | Secret | AsyncEngine]]:
    """Return where the database is, the options of its engine, and its replicas.

    Raises:
        ConfigurationError: a URL, or a variable of the environment, cannot work.
    """
    options = dict(engine_options or {})
    if engine is not None:
        return engine.url, options, replicas
    if url is not None:
        return parse_database_url(url), options, replicas
    named = read_environment(os.environ)
    options = {**named.engine_options, **options}
    return named.url or _embedded(), options, replicas or named.replicas


def _check_engine(
    engine: AsyncEngine | None,
    *,
    url: str | URL | Secret | None,
    engine_options: Mapping[str, Any] | None,
    pooler: str | None,
) -> None:
    if engine is not None:
        if url is not None or engine_options is not None or pooler:
            raise ConfigurationError(
                "engine= comes ready made: leave out url=, engine_options= and pooler=, or leave"
                " out engine=."
            )
        refuse_autocommit("engine=", isolation_options(engine.sync_engine))
    refuse_autocommit("engine_options=", engine_options or {})
    if pooler not in (None, "transaction"):
        raise ConfigurationError(f"pooler={pooler!r} is unknown: use 'transaction', or None.")


def _check_numbers(*, wait_for: float, leak_threshold: float | None) -> None:
    if not (is_number(wait_for) and wait_for >= 0):
        raise ConfigurationError(f"wait_for={wait_for!r} must be seconds, 0 or more.")
    if leak_threshold is not None and not (is_number(leak_threshold) and leak_threshold > 0):
        raise ConfigurationError(
            f"leak_threshold={leak_threshold!r} must be seconds, more than 0; leave it out to"
            " switch it off."
        )


def _embedded() -> URL:
    logger.warning(
        "No database is configured: using the SQLite file %s. Set DATABASE_URL, or pass a URL to"
        " Database(...).",
        os.path.abspath(DEFAULT_FILE),
    )
    return create_database_url("sqlite", database=DEFAULT_FILE)
