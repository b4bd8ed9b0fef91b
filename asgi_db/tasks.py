"""Awaiting work that must not be interrupted in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
from collections.abc import Awaitable, Coroutine, Generator, Iterable
from contextvars import ContextVar
from typing import Any, TypeVar
from weakref import ref

import anyio

T = TypeVar("T")


async def run_to_completion(coroutine: Coroutine[Any, Any, T], *, grace: float | None = None) -> T:
    """Await a coroutine to its end, even if this task is cancelled meanwhile, once or more.

    It runs in a task of its own, because a cancelled task throws into whatever it awaits.

    Args:
        coroutine: the coroutine.
        grace: seconds that it still has if this task is cancelled; no limit if None.

    Raises:
        asyncio.CancelledError: this task was cancelled; the coroutine has nevertheless ended.
    """
    return await finish(asyncio.ensure_future(coroutine), grace=grace)


async def finish(task: asyncio.Task[T], *, grace: float | None = None) -> T:
    """Wait for the end of a task, even if this one is cancelled meanwhile, once or more.

    Args:
        task: the task.
        grace: seconds that it still has if this task is cancelled; no limit if None.

    Raises:
        asyncio.CancelledError: this task was cancelled; the other one has nevertheless ended.
    """
    try:
        await asyncio.wait((task,))
    except asyncio.CancelledError:
        await _wait_shielded(task, grace)
        if not task.cancelled():
            # This marks the exception as retrieved; the task itself has logged it.
            task.exception()
        raise
    return task.result()


async def _wait_shielded(task: asyncio.Task[Any], grace: float | None) -> None:
    """Wait for a task, however often this one is cancelled meanwhile.

    The shield protects from anyio's cancellation, which raises again at each await, so that the
    loop would spin. asyncio's own `shield` does not help against that.
    """
    timer = None if grace is None else task.get_loop().call_later(grace, task.cancel)
    with anyio.CancelScope(shield=True):
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait((task,))
    if timer is not None:
        timer.cancel()


@contextlib.contextmanager
def cancelled_once() -> Generator[None]:
    """Clean up without raising a cancellation again that this task has met before.

    A scope of anyio raises its cancellation at each await, and asyncio's may be repeated. Raised
    out of a clean-up, it would replace the error for which that cleans up, and nobody would learn
    of the error. Nothing is lost without it: anyio's comes again, and asyncio keeps its count.
    """
    was_cancelled = _is_cancelled()
    try:
        yield
    except asyncio.CancelledError:
        if not was_cancelled:
            raise


def _is_cancelled() -> bool:
    """Return whether a cancellation of this task has led to the clean-up that begins now."""
    if anyio.current_effective_deadline() == -math.inf:
        return True
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0 and sys.exc_info()[1] is not None


def current_task() -> asyncio.Task[Any] | None:
    """Return the running task; None in a thread, where a synchronous handler may run."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the running event loop, if there is one."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def is_of_another_loop(loop: asyncio.AbstractEventLoop | None) -> bool:
    """Return whether another event loop than this one is running here, and this one still lives."""
    running = running_loop()
    return loop is not None and running not in (None, loop) and not loop.is_closed()


acting_for: ContextVar[ref[asyncio.Task[Any]] | None] = ContextVar("acting_for", default=None)
"""In a task that ends a unit of work, the task that waits for that."""


_background: set[asyncio.Future[Any]] = set()


def in_background(work: Awaitable[Any]) -> asyncio.Future[Any]:
    """Run work that ends by itself in the background."""
    task = asyncio.ensure_future(work)
    _background.add(task)
    task.add_done_callback(_background.discard)
    return task


async def wait_for_background(within: float) -> None:
    """Wait a limited time for the background tasks of this event loop."""
    if tasks := of_this_loop(_background):
        await asyncio.wait(tasks, timeout=within)


def of_this_loop(futures: Iterable[asyncio.Future[Any]]) -> list[asyncio.Future[Any]]:
    """Return the futures that belong to the running event loop."""
    loop = asyncio.get_running_loop()
    return [future for future in futures if future.get_loop() is loop]
