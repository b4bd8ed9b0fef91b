"""What belongs to the sandbox's connection and is awaited in its event loop, such as a cursor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Self

Use = Callable[[Callable[[], Coroutine[Any, Any, Any]]], Coroutine[Any, Any, Any]]
"""Awaits what a function returns in the event loop of the sandbox."""


class Elsewhere:
    """Stands for an object of the driver, whose coroutines run in the sandbox's event loop."""

    def __init__(self, of: Any, use: Use, lives_there: Callable[[object], bool]) -> None:
        """Stand for an object.

        Args:
            of: the object.
            use: awaits its coroutines.
            lives_there: whether what one of its methods returns is such an object too.
        """
        self._of = of
        self._use = use
        self._lives_there = lives_there

    def __getattr__(self, name: str) -> Any:
        return called_elsewhere(getattr(self._of, name), self._use, self._lives_there)

    def _shown(self, value: Any) -> Any:
        return shown(value, self._use, self._lives_there)

    async def __aenter__(self) -> Any:
        entered = await self._use(self._of.__aenter__)
        return self if entered is self._of else self._shown(entered)

    async def __aexit__(self, *error: Any) -> Any:
        return await self._use(partial(self._of.__aexit__, *error))

    def __aiter__(self) -> Self:
        return Elsewhere(aiter(self._of), self._use, self._lives_there)  # type: ignore[return-value]

    async def __anext__(self) -> Any:
        try:
            return await self._use(partial(_next, self._of))
        except _Exhausted:
            raise StopAsyncIteration from None


class _Exhausted(Exception):
    """Raised at the end of an iteration, because `StopAsyncIteration` ends a coroutine."""


async def _next(iterator: Any) -> Any:
    try:
        return await anext(iterator)
    except StopAsyncIteration:
        raise _Exhausted from None


def shown(value: Any, use: Use, lives_there: Callable[[object], bool]) -> Any:
    """Return what stands for a value; see `Elsewhere`."""
    return Elsewhere(value, use, lives_there) if lives_there(value) else value


def called_elsewhere(attribute: Any, use: Use, lives_there: Callable[[object], bool]) -> Any:
    """Return what stands for an attribute of such an object; see `Elsewhere`."""
    if inspect.iscoroutinefunction(attribute):

        async def call(*args: Any, **kwargs: Any) -> Any:
            result = await use(partial(attribute, *args, **kwargs))
            return shown(result, use, lives_there)

        return call
    if not inspect.ismethod(attribute):
        return attribute

    def call_now(*args: Any, **kwargs: Any) -> Any:
        return shown(attribute(*args, **kwargs), use, lives_there)

    return call_now
