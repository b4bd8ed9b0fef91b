"""Awaiting what must not be cut off in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import anyio

T = TypeVar("T")


async def run_to_completion(coroutine: Coroutine[Any, Any, T], *, grace: float | None = None) -> T:
    """Await the coroutine to its end, also when this task is cancelled meanwhile, even twice.

    It runs in a task of its own, because a cancelled task throws into whatever it awaits.

    Args:
        coroutine: what is to be awaited.
        grace: seconds that it still gets when this task is cancelled; no limit if None.

    Raises:
        asyncio.CancelledError: this task was cancelled; the coroutine has nevertheless ended.
    """
    task = asyncio.ensure_future(coroutine)
    try:
        await asyncio.wait((task,))
    except asyncio.CancelledError:
        await _wait_shielded(task, grace)
        if not task.cancelled():
            task.exception()  # taken note of: the coroutine itself has logged what failed
        raise
    return task.result()


async def _wait_shielded(task: asyncio.Task[Any], grace: float | None) -> None:
    """Wait for a task, however often this one is cancelled meanwhile.

    The shield is against anyio's cancellation, which raises again at each await: without it the
    loop would spin. asyncio's own `shield` does not help there.
    """
    timer = None if grace is None else task.get_loop().call_later(grace, task.cancel)
    with anyio.CancelScope(shield=True):
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait((task,))
    if timer is not None:
        timer.cancel()


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


def current_task() -> asyncio.Task[Any] | None:
    """Return the running task; None in a thread, where a synchronous handler may run."""
    return None if running_loop() is None else asyncio.current_task()


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the running event loop, if there is one."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


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


_background: set[asyncio.Future[Any]] = set()


def in_background(work: Awaitable[Any]) -> asyncio.Future[Any]:
    """Let something that ends by itself go on beside everything else."""
    task = asyncio.ensure_future(work)
    _background.add(task)
    task.add_done_callback(_background.discard)
    return task


CONNECT_GRACE = 1.0
"""Seconds that a connect which was abandoned gets to end, before it is cut off after all."""


async def background_is_over(within: float) -> None:
    """Wait for what runs in the background of this event loop, up to so many seconds.

    Connects that were abandoned come first: they may leave something to the background.
    """
    if connects := _of_this_loop(_abandoned):
        _, late = await asyncio.wait(connects, timeout=CONNECT_GRACE)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=within)
    if tasks := _of_this_loop(_background):
        await asyncio.wait(tasks, timeout=within)


def _of_this_loop(futures: Iterable[asyncio.Future[Any]]) -> list[asyncio.Future[Any]]:
    loop = asyncio.get_running_loop()
    return [future for future in futures if future.get_loop() is loop]
