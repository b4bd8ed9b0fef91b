"""Awaiting what must not be cut off in the middle."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
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
