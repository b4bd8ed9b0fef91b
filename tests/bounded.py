"""Scenarios that may hang beyond any cancellation: they get a thread and an event loop."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

BOUND = 20.0
"""Seconds; a scenario takes a fraction of one."""


def run_within_bound(
    scenario: Callable[[], Coroutine[Any, Any, None]], within: float = BOUND
) -> None:
    """Run a scenario, and fail if it has not ended in time.

    A request that takes no notice of its cancellation would hang the whole run at the end of its
    event loop. So the scenario has a loop on a thread of its own, which is left behind.

    Args:
        scenario: opens what it needs itself, in its own event loop.
        within: seconds.
    """
    errors: list[BaseException] = []
    loops: list[asyncio.AbstractEventLoop] = []

    async def noted() -> None:
        loops.append(asyncio.get_running_loop())
        await scenario()

    def work() -> None:
        try:
            asyncio.run(noted())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True, name="scenario")
    thread.start()
    thread.join(within)
    if thread.is_alive():
        pytest.fail(f"it has not ended in {within} s:\n{_stacks(loops)}")
    if errors:
        raise errors[0]


def _stacks(loops: list[asyncio.AbstractEventLoop]) -> str:
    """Where the tasks of these event loops wait."""
    lines = io.StringIO()
    for task in (task for loop in loops for task in asyncio.all_tasks(loop)):
        task.print_stack(file=lines)
    return lines.getvalue()
