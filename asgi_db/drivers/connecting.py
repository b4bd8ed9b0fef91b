"""How a driver connects: without interruption, and with one error for every failure."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy.engine import Dialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry

from asgi_db.drivers import driver_of
from asgi_db.drivers.describing import may_hold_values
from asgi_db.drivers.outages import ServerFullError, connection_error, wrong_settings
from asgi_db.drivers.protocol import Driver
from asgi_db.errors import ConcurrentUseError, ConfigurationError, DatabaseDownError
from asgi_db.tasks import current_task, is_of_another_loop, of_this_loop, wait_for_background


def let_driver_connect(
    dialect: Dialect, _: ConnectionPoolEntry | None, __: list[Any], parameters: dict[str, Any]
) -> None:
    """Have the driver connect without interruption; SQLAlchemy then uses the changed parameters."""
    driver = driver_of(dialect)
    if driver.is_supported and not isinstance(parameters.get(_CREATOR), Connector):
        parameters[_CREATOR] = Connector(driver, parameters.get(_CREATOR))


_CREATOR = "async_creator_fn"


class Connector:
    """Connects without interruption by a cancellation, and with one error for every failure."""

    def __init__(self, driver: Driver, connect: Callable[..., Awaitable[Any]] | None) -> None:
        """Prepare to connect.

        Args:
            driver: the driver that connects.
            connect: the user's own function; if None, the driver's.
        """
        self._driver = driver
        self._connect = connect or driver.connect
        self._errors = driver.connect_errors

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the driver's connection.

        Raises:
            DatabaseDownError: the connection failed.
            ConfigurationError: the driver does not accept the options or the URL.
        """
        try:
            return await _connect_uninterrupted(self._driver, self._connect, *args, **kwargs)
        except UnicodeEncodeError as error:
            if not self._is_refused_by_driver(error):
                raise
            encoding = error.encoding
        except ConfigurationError:
            raise
        except (TypeError, ValueError) as error:
            if not self._is_refused_by_driver(error):
                raise
            raise ConfigurationError(
                "The driver does not take the options in the URL, in connect_args or of"
                f" async_creator: {error}."
            ) from error
        except self._errors as error:
            if (remedy := self._driver.remedy(error)) is not None:
                raise wrong_settings(error, remedy) from error
            down = connection_error(error)
            if self._driver.is_full(error):
                down = ServerFullError(str(down.args[0]), error)
            raise down from error
        # This is raised outside the `except`, because Python's error contains the whole password
        # and would remain reachable as the `__context__` even with `from None`.
        raise ConfigurationError(
            "The user name, the password or another part of the URL has a character that the"
            f" driver, which sends it as {encoding}, cannot send: change it."
        )

    def _is_refused_by_driver(self, error: Exception) -> bool:
        """Whether the driver has raised an error, and not the user's own function."""
        return self._connect == self._driver.connect or _is_raised_by(self._driver, error)


def _is_raised_by(driver: Driver, error: BaseException) -> bool:
    """Whether an error comes from the code of the driver, or from asyncio's below it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = str(frames[-1].f_globals.get("__name__")) if frames else ""
    return module.partition(".")[0] in (*driver.packages, "asyncio")


def check_loop(loop: asyncio.AbstractEventLoop | None, what: str) -> None:
    """Refuse to use something in another event loop than its own, if it has one.

    Raises:
        ConcurrentUseError: it belongs to another event loop.
    """
    if is_of_another_loop(loop):
        raise ConcurrentUseError.in_another_loop(
            what,
            "Each event loop has an engine of its own: ask for `database.engine` in the loop that"
            " uses it.",
        )


def raise_if_connect_failed(error: BaseException) -> None:
    """Discard the connection that was being set up when this error was raised, if any.

    SQLAlchemy does not translate the driver's errors in that phase.

    Raises:
        DatabaseDownError: the server had closed the connection.
    """
    made = _being_set_up_here()
    was_closed = made is not None and made.driver.is_closed(made.connection)
    abandon_connect()
    if made is None or not was_closed or not isinstance(error, Exception):
        return
    # The connection may also have been closed because the user's own listener has failed.
    is_of_database = isinstance(error, (OSError, DBAPIError)) or may_hold_values(error)
    if is_of_database or _is_raised_by(made.driver, error):
        if not isinstance(error, DatabaseDownError):
            raise connection_error(error) from error


class _Made(NamedTuple):
    """A connection that a driver has made."""

    driver: Driver
    connection: Any


being_set_up: WeakKeyDictionary[asyncio.Task[Any], _Made] = WeakKeyDictionary()
"""The connection that each task has made and not yet set up."""


async def _connect_uninterrupted(
    driver: Driver, connect: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any
) -> Any:
    """Connect without being interrupted in the handshake.

    If interrupted there, asyncpg leaves an exception that is never retrieved, and aiosqlite a
    connection that is never closed. A cancelled request does not wait; its connection is
    terminated as soon as it has been made.
    """

    async def make() -> _Made:
        return _Made(driver, await connect(*args, **kwargs))

    task = asyncio.ensure_future(make())
    try:
        made = await asyncio.shield(task)
    except asyncio.CancelledError:
        _abandoned.add(task)
        task.add_done_callback(_terminate_abandoned)
        raise
    if (caller := asyncio.current_task()) is not None:
        being_set_up[caller] = made
    return made.connection


def connect_is_complete() -> None:
    """Note that the connection made by this task is set up and belongs to the pool now."""
    if (task := current_task()) is not None:
        being_set_up.pop(task, None)


def _being_set_up_here() -> _Made | None:
    """Return the connection that this task is setting up, if any."""
    task = current_task()
    return None if task is None else being_set_up.get(task)


def abandon_connect() -> None:
    """Terminate the connection that this task was setting up when it was interrupted, if any.

    SQLAlchemy sends statements to set up a new connection, and forgets the connection if it is
    interrupted meanwhile.
    """
    made = _being_set_up_here()
    connect_is_complete()
    if made is not None:
        made.driver.terminate(made.connection)


_abandoned: set[asyncio.Task[_Made]] = set()


def _terminate_abandoned(task: asyncio.Task[_Made]) -> None:
    _abandoned.discard(task)
    if not task.cancelled() and task.exception() is None:
        made = task.result()
        made.driver.terminate(made.connection)


CONNECT_GRACE = 1.0
"""Seconds that an abandoned connect has to end before it is cancelled."""


async def background_is_over(within: float) -> None:
    """Wait a limited time for the background tasks of this event loop.

    Abandoned connects come first, because they may start background tasks.
    """
    if connects := of_this_loop(_abandoned):
        _, late = await asyncio.wait(connects, timeout=CONNECT_GRACE)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=within)
    await wait_for_background(within)
