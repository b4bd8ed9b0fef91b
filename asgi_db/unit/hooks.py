"""The functions to call after a commit or a rollback.

A hook belongs to the unit of work in which it was added, and to the savepoint that was open then.
It waits until the database has answered; then it is due, or it is discarded:

    pending ──COMMIT──▶ due (`on_commit`)      pending ──ROLLBACK──▶ due (`on_rollback`)
            ──ROLLBACK TO SAVEPOINT──▶ discarded, like all other work in the savepoint
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Literal, NamedTuple, TypeAlias

from sqlalchemy.orm import SessionTransaction

from asgi_db.drivers.describing import may_hold_values, traceback_of
from asgi_db.logs import logger
from asgi_db.tasks import run_to_completion

HookFunction: TypeAlias = Callable[[], Awaitable[object] | object]
HookOutcome: TypeAlias = Literal["commit", "rollback"]
When: TypeAlias = Literal["before_response", "after_response"]

HOOKS_TIMEOUT = 5.0
"""Seconds that hooks still have if their request was cancelled after its COMMIT."""


class Hook(NamedTuple):
    """A function, and when it is to be called."""

    function: HookFunction
    outcome: HookOutcome
    when: When = "before_response"
    robust: bool = True

    @property
    def names(self) -> tuple[str, str]:
        """The event that it waited for and the function, for the log.

        The `repr` of a `functools.partial` would show its arguments.
        """
        function = self.function
        while isinstance(function, functools.partial):
            function = function.func
        name = getattr(function, "__qualname__", None) or type(function).__qualname__
        return self.outcome.upper(), f"{getattr(function, '__module__', '')}.{name}"


class Hooks:
    """The hooks of one session."""

    def __init__(self) -> None:
        self._pending: list[Hook] = []
        self._savepoints: dict[SessionTransaction, int] = {}
        self._due: deque[Hook] = deque()
        self._late: deque[Hook] = deque()
        self._is_running = False

    @property
    def are_waiting(self) -> bool:
        """Whether a hook is pending or due before the response."""
        return bool(self._pending or self._due)

    def add(self, hook: Hook) -> None:
        """Let a hook wait for the end of the current transaction or savepoint."""
        self._pending.append(hook)

    def savepoint_began(self, savepoint: SessionTransaction) -> None:
        """Note where the hooks of a savepoint begin."""
        self._savepoints[savepoint] = len(self._pending)

    def savepoint_rolled_back(self, savepoint: SessionTransaction) -> None:
        """Discard the hooks of a savepoint, like all other work in it."""
        # An unknown savepoint began before the first hook was added.
        del self._pending[self._savepoints.get(savepoint, 0) :]

    def settle(self, outcome: HookOutcome) -> None:
        """Make the hooks due that waited for this outcome, and discard the others."""
        for hook in self._pending:
            if hook.outcome == outcome:
                (self._late if hook.when == "after_response" else self._due).append(hook)
        self._pending.clear()
        self._savepoints.clear()

    async def run(self, describe: Callable[[], str]) -> None:
        """Run the hooks that are due, in order; an error of one does not stop the others.

        Args:
            describe: names the request or block, for the log.

        Raises:
            Exception: the first error of a hook that is not robust; all hooks have run by then.
            asyncio.CancelledError: the request was cancelled; the hooks have nevertheless run, for
                up to `HOOKS_TIMEOUT` seconds.
        """
        # They are running already if a hook itself commits; the loop then continues with the rest.
        if self._due and not self._is_running:
            self._is_running = True
            try:
                calls = _call_each(self._due, describe)
                error = await run_to_completion(calls, grace=HOOKS_TIMEOUT)
            finally:
                self._is_running = False
            if error is not None:
                raise error

    async def run_late(self, describe: Callable[[], str]) -> None:
        """Run the hooks that waited for the response; their errors are only logged.

        Raises:
            asyncio.CancelledError: see `run`.
        """
        if self._late:
            await run_to_completion(_call_each(self._late, describe), grace=HOOKS_TIMEOUT)


async def _call_each(hooks: deque[Hook], describe: Callable[[], str]) -> BaseException | None:
    """Call each hook, and return the first error of one that is not robust."""
    first: BaseException | None = None
    while hooks:
        hook = hooks.popleft()
        try:
            result = hook.function()
            if inspect.isawaitable(result):
                await result
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and _is_being_cancelled():
                logger.error("%s: a hook was cancelled after %s: %s", describe(), *hook.names)
                raise
            line = "%s: a hook failed after %s: %s"
            if may_hold_values(error):
                logger.error(f"{line}\n%s", describe(), *hook.names, traceback_of(error))
            else:
                logger.exception(line, describe(), *hook.names)
            if first is None and not hook.robust:
                first = error
    return first


def _is_being_cancelled() -> bool:
    """Return whether this task is being cancelled, rather than something the hook awaited."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
