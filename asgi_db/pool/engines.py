"""The engines of one database: how each is made, and one for each event loop."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, cast
from weakref import WeakSet

from sqlalchemy import URL, StaticPool
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext import asyncio as sqlalchemy_asyncio
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from asgi_db.drivers import driver_of_url
from asgi_db.drivers.connecting import Connector, background_is_over
from asgi_db.drivers.sqlite import TemporaryFolder
from asgi_db.errors import ConfigurationError, SandboxError
from asgi_db.pool.fair import FairPool
from asgi_db.pool.life import DISPOSE_TIMEOUT, EngineLife, OtherEngines
from asgi_db.profiles import PoolProfile
from asgi_db.statistics import PoolStats, Statistics, total
from asgi_db.tasks import run_to_completion, running_loop


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What the engines of a database are made from.

    Attributes:
        url: where the database is.
        profile: how many connections each engine keeps.
        options: the user's options for `create_async_engine`; they override the profile's.
        pooler: "transaction" if a pooler in transaction pooling stands before the server.
        leak_threshold: see `Connections`.
        has_replicas: whether the positions of commits are wanted, for the replicas.
    """

    url: URL
    profile: PoolProfile
    options: Mapping[str, Any]
    pooler: Literal["transaction"] | None
    leak_threshold: float | None
    has_replicas: bool = False

    def make_engine(self, url: URL, *, durable: bool) -> AsyncEngine:
        """Make an engine that is ready to connect.

        Args:
            url: the one of the settings, or the file that serves as a database in memory.
            durable: whether what is committed has to outlast a crash of the machine.
        """
        driver = driver_of_url(url)
        url, options = self._arguments(url)
        # OpenTelemetry replaces this function by its own, so it is looked up at each call.
        engine = sqlalchemy_asyncio.create_async_engine(url, **options)
        driver.prepare(engine.sync_engine, pooler=self.pooler is not None, durable=durable)
        if self.has_replicas and driver.replication is not None:
            driver.replication.prepare(engine.sync_engine)
        return engine

    def check(self) -> None:
        """Refuse options of the URL, or of the user, with which no engine could be made.

        Raises:
            ConfigurationError: there is no such option, or it cannot be combined with another.
        """
        url, options = self._arguments(self.url)
        if not self.options:
            return
        problem = ""
        try:
            create_async_engine(url, **options)
        except (TypeError, ValueError, SQLAlchemyError) as error:
            problem = (
                str(error).partition("\n")[0].partition(", using configuration")[0].rstrip(".")
            )
        if problem:
            raise ConfigurationError(f"engine_options= cannot work: {problem}. Correct it.")

    def _arguments(self, url: URL) -> tuple[URL, dict[str, Any]]:
        """Return the arguments of `create_async_engine`."""
        driver = driver_of_url(url)
        options: dict[str, Any] = {"hide_parameters": True}
        # A pool class of the user's own, such as NullPool, need not take the profile's values.
        if "poolclass" not in self.options:
            options.update(self.profile.engine_options(), poolclass=FairPool)
        url, arguments = driver.translate(url)
        options.update(driver.options(url, pooler=self.pooler is not None))
        options = _merged(options, {"connect_args": arguments})
        options = _merged(options, self.options)
        if creator := options.get("async_creator"):  # SQLAlchemy calls it without `do_connect`
            options["async_creator"] = Connector(driver, creator)
        return url, options


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return both, where values that are mappings are merged too; `theirs` win."""
    merged = dict(ours)
    for name, value in theirs.items():
        both = isinstance(value, Mapping) and isinstance(ours.get(name), Mapping)
        merged[name] = _merged(ours[name], cast("Mapping[str, Any]", value)) if both else value
    return merged


class Cover(Protocol):
    """Connects engines to something else than their server for a while, as a sandbox does."""

    def cover(self, life: EngineLife) -> None:
        """Let an engine that has just been made connect there too."""


class Engines:
    """The engines of one database: one for each event loop that uses it, or the user's own.

    Attributes:
        settings: what they are made from.
        statistics: where all of them are counted.
        active_cover: what they connect to instead of their server, if anything.
        others: the user's own engines to which sessions are bound beside them.
    """

    def __init__(
        self, settings: EngineSettings, statistics: Statistics, *, given: AsyncEngine | None = None
    ) -> None:
        """Prepare them; each is made when its event loop first asks for it.

        Args:
            given: an engine of the user's own, which serves every event loop and is not disposed.
        """
        self.settings = settings
        self.statistics = statistics
        self.active_cover: Cover | None = None
        self.others = OtherEngines(statistics, lambda: self.active_cover is not None)
        self._given = None
        if given is not None:
            self._given = EngineLife(
                given, statistics, self.others, given=True, leak_threshold=settings.leak_threshold
            )
        self._lives: dict[asyncio.AbstractEventLoop, EngineLife] = {}
        self._lock = threading.RLock()  # held while an engine is added or removed
        self._folder: TemporaryFolder | None = None
        self._of_parent: list[EngineLife] = []
        _all_engines.add(self)

    def __repr__(self) -> str:
        return f"<Engines {self.settings.url!r}>"  # SQLAlchemy's URL hides the password here

    @property
    def running(self) -> EngineLife:
        """The engine of the running event loop, with its life; made at first use.

        Where no event loop runs, as in the thread of a synchronous endpoint, it is the only one.

        Raises:
            RuntimeError: there is no running event loop, and no engine yet, or several.
        """
        if self._given is not None:
            return self._given
        loop = running_loop()
        return self._only() if loop is None else self.on(loop)

    def _only(self) -> EngineLife:
        lives = [life for loop, life in tuple(self._lives.items()) if not loop.is_closed()]
        if len(lives) == 1:
            return lives[0]
        raise RuntimeError(
            f"{self!r}: there is no running event loop here, and "
            + (
                f"there are {len(lives)} engines, each for an event loop of its own: ask inside"
                " the event loop that is meant."
                if lives
                else "no engine yet, because it is made in the event loop that uses it. Ask for"
                " `database.engine` when the application starts, in its lifespan, or later; what"
                " needs one already when it is imported, such as an admin panel, takes an engine of"
                " your own, and so does the database: Database(engine=...)."
            )
        )

    def on(self, loop: asyncio.AbstractEventLoop) -> EngineLife:
        """Return the engine of an event loop, with its life; made at first use.

        A thread may ask for the engine of a loop that runs elsewhere.
        """
        return self._given or self._lives.get(loop) or self._begin_life(loop)

    def redirect(self, url: URL) -> None:
        """Make the engines from another URL, from the first one on.

        Raises:
            ConfigurationError: there is an engine already, or none could be made from it.
        """
        with self._lock:
            self._forget_closed_loops()
            if self._given is not None or self._lives:
                raise ConfigurationError(
                    f"{self.settings.url!r} has an engine already: call redirect() before the"
                    " database is first used, and make an engine= of your own with the other URL."
                )
            settings = replace(self.settings, url=url)
            settings.check()
            self.settings = settings

    def all(self) -> list[EngineLife]:
        """Return the engines that have been made, each with its life."""
        return list(self._lives.values()) if self._given is None else [self._given]

    def pool_stats(self) -> PoolStats:
        """Return the connections of all of them at this moment."""
        return total(life.connections.stats() for life in self.all())

    def make_side_engine(self) -> EngineLife:
        """Make an engine that is made as the others are, and is not among them.

        Raises:
            SandboxError: the engine's only connection cannot be replaced.
        """
        if self._given is None:
            with self._lock:
                return self._make_life(Statistics(), None)
        engine = self._given.engine
        if isinstance(engine.pool, StaticPool):
            raise SandboxError(
                "The pool of this engine is a StaticPool, so there is no second connection for"
                " a sandbox, and a database in memory ends with the first. Let"
                ' Database("sqlite://") make the engine, or use a file.'
            )
        side_engine = create_async_engine(engine.url, pool=engine.pool.recreate())
        return EngineLife(side_engine, Statistics(), self.others)

    def _begin_life(self, loop: asyncio.AbstractEventLoop) -> EngineLife:
        with self._lock:  # a loop's first requests may be those of synchronous handlers, in threads
            life = self._lives.get(loop)
            if life is None:
                self._forget_closed_loops()
                life = self._make_life(self.statistics, self.settings.leak_threshold)
                if isinstance(pool := life.engine.pool, FairPool):
                    pool.loop = loop
                self._lives[loop] = life
                if self.active_cover is not None:
                    self.active_cover.cover(life)
            return life

    def _make_life(self, statistics: Statistics, leak_threshold: float | None) -> EngineLife:
        settings = self.settings
        url = settings.url
        in_memory = driver_of_url(url).is_in_memory(url)
        if in_memory:
            # Each connection to SQLite's own `:memory:` is a database of its own. A private file
            # is one database for all of them, with transactions that do not see each other.
            self._folder = self._folder or TemporaryFolder()
            url = url.set(database=os.path.join(self._folder.path, "memory.db"))
        return EngineLife(
            settings.make_engine(url, durable=not in_memory),
            statistics,
            self.others,
            pooler=settings.pooler is not None,
            verify=settings.profile.verify and not settings.options.get("pool_pre_ping"),
            leak_threshold=leak_threshold,
        )

    async def dispose(self) -> None:
        """Close every connection of this event loop's engine; see `EngineLife.dispose`."""
        if running_loop() is None:  # Not asyncio runs this coroutine, so it has no engine.
            return
        for user_engine in (*self.others.all(), *([self._given] if self._given else [])):
            await run_to_completion(user_engine.dispose())
        with self._lock:
            self._forget_closed_loops()
            life = self._lives.pop(asyncio.get_running_loop(), None)
        try:
            if life is not None:
                await run_to_completion(life.dispose())
            await background_is_over(DISPOSE_TIMEOUT)  # SQLite's connections close in threads
        finally:
            self._remove_unused_folder()

    def _forget_closed_loops(self) -> None:
        """Drop the engines of loops that ended without `dispose`: their connections are dead."""
        for loop in [loop for loop in self._lives if loop.is_closed()]:
            self._lives.pop(loop).terminate()

    def _remove_unused_folder(self) -> None:
        """Remove a database in memory after its last engine, that of a sandbox included."""
        with self._lock:
            if self._folder is not None and not self._lives and self.active_cover is None:
                self._folder.remove()
                self._folder = None

    def leave_to_parent(self) -> None:
        """After a fork: leave the parent's connections alone, whose sockets this process shares."""
        self._lock = threading.RLock()  # a thread of the parent may hold the other one for ever
        self._folder = None
        for life in self.all():
            life.leave_to_parent()
        self._of_parent.extend(self._lives.values())  # collecting them would close something
        self._lives.clear()


_all_engines: WeakSet[Engines] = WeakSet()


def _leave_all_to_parent() -> None:
    for engines in _all_engines:
        engines.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_all_to_parent)
