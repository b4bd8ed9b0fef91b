"""How a driver connects: whole, and with one error for all that can go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy.engine import Dialect
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from asgi_db.drivers.base import has_gone, lost_connection
from asgi_db.drivers.sqlite import _connect_sqlite
from asgi_db.errors import ConfigurationError, DatabaseDownError
from asgi_db.tasks import current_task, of_this_loop, wait_for_background


def terminate_adapted(dialect: Dialect, connection: DBAPIConnection) -> None:
    """Close a connection that is given up, without waiting for anything.

    SQLAlchemy's own way takes leave of the server first; and cut off there by a cancellation, the
    pool has one connection less for ever.
    """
    terminate(dialect.get_driver_connection(connection))


def _connect(
    dialect: Dialect, _: ConnectionPoolEntry | None, __: list[Any], parameters: dict[str, Any]
) -> None:
    """Let the driver connect in its own way, but whole; SQLAlchemy keeps the parameters."""
    if dialect.driver in DRIVERS and not isinstance(parameters.get(_CREATOR), Connector):
        driver = import_module(dialect.driver)
        connect = _connect_sqlite if dialect.driver == "aiosqlite" else driver.connect
        parameters[_CREATOR] = Connector(parameters.get(_CREATOR, connect), driver)


DRIVERS = ("asyncpg", "asyncmy", "aiosqlite")


_CREATOR = "async_creator_fn"


class Connector:
    """Connects, undisturbed by cancellation, and with one error for all that can go wrong."""

    def __init__(self, connect: Any, driver: Any) -> None:
        self._connect = connect
        self._errors: tuple[type[Exception], ...] = (OSError,)
        if hasattr(driver, "PostgresError"):  # asyncpg: SQLAlchemy leaves those as they are
            self._errors = OSError, driver.PostgresError, driver.InterfaceError

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the driver's connection.

        Raises:
            DatabaseDownError: there is none.
            ConfigurationError: the driver does not take what the URL asks for.
        """
        try:
            return await connect_whole(self._connect, *args, **kwargs)
        except self._errors as error:
            raise lost_connection(error) from error
        except UnicodeEncodeError as error:
            encoding = error.encoding
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                "The driver does not take the options in the URL, in connect_args or of"
                f" async_creator: {error}."
            ) from error
        # Outside the `except`: Python's error has the whole password in it, and would stay
        # reachable as the `__context__` of ours even with `from None`.
        raise ConfigurationError(
            "The user name, the password or another part of the URL has a character that the"
            f" driver, which sends it as {encoding}, cannot send: change it."
        )


def raise_if_connect_failed(error: BaseException) -> None:
    """Look after the connection that was being set up when this error came, if one was.

    SQLAlchemy leaves what the driver says there as it is.

    Raises:
        DatabaseDownError: the server had closed it.
    """
    driver = being_set_up()
    has_failed = driver is not None and has_gone(driver)
    abandon_connect()
    if has_failed and isinstance(error, Exception) and not isinstance(error, DatabaseDownError):
        raise lost_connection(error) from error


_being_set_up: WeakKeyDictionary[asyncio.Task[Any], Any] = WeakKeyDictionary()


async def connect_whole(connect: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
    """Connect with a driver's own function, which is not cut off in its handshake.

    Cut off there, asyncpg leaves an exception behind that nobody retrieves, and aiosqlite a
    connection that nobody closes. A request that is cancelled does not wait; the connection is
    terminated as soon as it is there.
    """

    async def whole() -> Any:
        return await connect(*args, **kwargs)

    task = asyncio.ensure_future(whole())
    try:
        connection = await asyncio.shield(task)
    except asyncio.CancelledError:
        _abandoned.add(task)
        task.add_done_callback(_terminate_abandoned)
        raise
    if (caller := asyncio.current_task()) is not None:
        _being_set_up[caller] = connection
    return connection


def connect_is_complete() -> None:
    """Say that the connection which this task has made is set up, and in the care of the pool."""
    if (task := current_task()) is not None:
        _being_set_up.pop(task, None)


def being_set_up() -> Any:
    """Return the connection which this task has made and is setting up, if it is."""
    task = current_task()
    return None if task is None else _being_set_up.get(task)


def abandon_connect() -> None:
    """Terminate the connection which this task has made, if it was cut off while setting it up.

    SQLAlchemy sends statements to set up a new connection, and forgets it if it is cut off there.
    """
    if not _being_set_up:
        return
    connection = being_set_up()
    connect_is_complete()
    if connection is not None:
        terminate(connection)


_abandoned: set[asyncio.Task[Any]] = set()


def _terminate_abandoned(task: asyncio.Task[Any]) -> None:
    _abandoned.discard(task)
    if not task.cancelled() and task.exception() is None:
        terminate(task.result())


def terminate(connection: Any) -> None:
    """Close a driver's connection at once, without a word to the server."""
    for name in ("terminate", "stop", "close"):  # asyncpg, aiosqlite, asyncmy
        if hasattr(connection, name):
            try:
                getattr(connection, name)()
            except RuntimeError:  # its event loop is closed
                _shut_socket(connection)
            break


def _shut_socket(driver: Any) -> None:
    """End a connection without its event loop, so that the server at least sees it go.

    There is no public way to the transport; the test of applications that start again without
    having been shut down, in `test_lifespan.py`, breaks when this changes.
    """
    with contextlib.suppress(OSError, TypeError, AttributeError):  # it is closed; uvloop sees to it
        driver._transport.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


CONNECT_GRACE = 1.0
"""Seconds that a connect which was abandoned gets to end, before it is cut off after all."""


async def background_is_over(within: float) -> None:
    """Wait for what runs in the background of this event loop, up to so many seconds.

    Connects that were abandoned come first: they may leave something to the background.
    """
    if connects := of_this_loop(_abandoned):
        _, late = await asyncio.wait(connects, timeout=CONNECT_GRACE)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=within)
    await wait_for_background(within)
