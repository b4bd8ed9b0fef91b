"""A cancellation that comes during COMMIT, and waits until the answer has left.

The client is to learn of what is committed. So the answer gets a moment to leave, and only then
the application's task is cancelled after all.
"""

from __future__ import annotations

import asyncio

import anyio
import anyio.lowlevel

from asgi_db.types import Message, Send

DELIVERY_TIMEOUT = 1.0
"""Seconds in which an answer may still leave, after its request was cancelled during COMMIT."""


class LateCancellation:
    """The cancellation of one task, until it is raised.

    Attributes:
        is_pending: whether it is still to be raised.
    """

    def __init__(self, *, belongs_to_stream: bool) -> None:
        """Prepare it for the cancelled scope of anyio in which this task is; see `hold`.

        Args:
            belongs_to_stream: the task may wait for another one, which sends a stream for it.
        """
        self.is_pending = True
        self._belongs_to_stream = belongs_to_stream
        self._error: asyncio.CancelledError | None = None
        self._task: asyncio.Task[object] | None = None

    def hold(self, error: asyncio.CancelledError) -> None:
        """Hold back what was raised in this task; an anyio scope raises its own again."""
        self._error = error
        self._task = asyncio.current_task()
        asyncio.get_running_loop().call_later(2 * DELIVERY_TIMEOUT, self._cancel_again)

    async def send(self, send: Send, message: Message) -> None:
        """Send the answer, or a part of it.

        Raises:
            TimeoutError: it did not leave in time.
        """
        with anyio.fail_after(DELIVERY_TIMEOUT, shield=True):
            await send(message)

    async def raise_now(self) -> None:
        """Raise the cancellation; in another task than its own, let it be raised there.

        Raises:
            asyncio.CancelledError: nearly always.
        """
        if not self.is_pending:
            return
        if self._task not in (None, asyncio.current_task()):
            if self._belongs_to_stream:
                asyncio.get_running_loop().call_soon(self._cancel_again)
            return
        self.end()
        error, self._error = self._error, None
        if error is not None:
            raise error from None
        await anyio.lowlevel.checkpoint()

    def _cancel_again(self) -> None:
        """Cancel the task again: it has sent nothing meanwhile, or leaves that to another one."""
        task = self._task
        self.end()
        if task is not None:
            self._error = None
            task.uncancel()  # to its `asyncio.timeout` it is the same cancellation
            task.cancel()

    def end(self) -> None:
        """Forget the task: the cancellation was raised, or the call has ended."""
        self.is_pending = False
        self._task = None
