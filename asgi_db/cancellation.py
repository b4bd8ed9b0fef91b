"""Awaiting what must not be cut off in the middle."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import anyio

T = TypeVar("T")


async def run_to_completion(coroutine: Coroutine[Any, Any, T]) -> T:
    """Await the coroutine to its end, also when this task is cancelled meanwhile, even twice.

    It runs in a task of its own, because a cancelled task throws into whatever it awaits.
    The shield is against anyio's cancellation, which raises again at each await: without it the
    loop below would spin. asyncio's own `shield` does not help there.

    Raises:
        asyncio.CancelledError: this task was cancelled; the coroutine has nevertheless ended.
    """
    task = asyncio.ensure_future(coroutine)
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait((task,))
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # taken note of: the coroutine itself has logged what failed
        raise cancelled
    return task.result()


_abandoned: set[asyncio.Task[Any]] = set()


async def connect_whole(connect: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
    """Connect with a driver's own function, which is not cut off in its handshake.

    Cut off there, asyncpg leaves an exception behind that nobody retrieves, and aiosqlite a
    connection that nobody closes. A request that is
    cancelled does not wait; the connection is terminated as soon as it is there.
    """

    async def whole() -> Any:
        return await connect(*args, **kwargs)

    task = asyncio.ensure_future(whole())
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        _abandoned.add(task)
        task.add_done_callback(_terminate_abandoned)
        raise


def _terminate_abandoned(task: asyncio.Task[Any]) -> None:
    _abandoned.discard(task)
    if not task.cancelled() and task.exception() is None:
        connection = task.result()
        for name in ("terminate", "stop", "close"):  # asyncpg, aiosqlite, asyncmy
            if hasattr(connection, name):
                getattr(connection, name)()
                break
