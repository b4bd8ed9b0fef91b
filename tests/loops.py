"""The event loops on which tests that ask for it run: `@every_loop`."""

import asyncio
import sys
from typing import Any

import pytest


def _eager_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    if sys.version_info >= (3, 12):
        loop.set_task_factory(asyncio.eager_task_factory)
    return loop


_LOOPS: dict[str, dict[str, Any]] = {"asyncio": {}, "asyncio+uvloop": {"use_uvloop": True}}
if sys.version_info >= (3, 12):
    _LOOPS["asyncio+eager"] = {"loop_factory": _eager_loop}

every_loop = pytest.mark.parametrize(
    "anyio_backend",
    [pytest.param(("asyncio", options), id=name) for name, options in _LOOPS.items()],
)
