"""A cancellation that arrives during COMMIT and is held back until the answer has been sent.

The client should learn what was committed. So there is a moment to send the answer, and only then
is the application's task cancelled.
"""

from __future__ import annotations

import asyncio

import anyio
import anyio.lowlevel

from asgi_db.types import Message, Send

DELIVERY_TIMEOUT = 1.0
"""Seconds in which an answer can still be sent after a cancellation during COMMIT."""


class LateCancellation:
    """The cancellation of one task, held back until it is raised.

    Attributes:
        is_pending: whether it has not been raised yet.
    """

    def __init__(self, *, belongs_to_stream: bool) -> None:
        """Prepare it for a task in a cancelled scope of anyio; otherwise `hold` follows.

        Args:
            belongs_to_stream: whether the task may be waiting for another one, which sends a
                stream for it.
        """
        self.is_pending = True
        self._belongs_to_stream = belongs_to_stream
        self._error: asyncio.CancelledError | None = None
        self._task: asyncio.Task[object] | None = None

    def hold(self, error: asyncio.CancelledError) -> None:
        """Hold back what was raised in this task; an anyio scope would raise its own again."""
        self._error = error
        self._task = asyncio.current_task()
        asyncio.get_running_loop().call_later(2 * DELIVERY_TIMEOUT, self._cancel_again)

    async def send(self, send: Send, message: Message) -> None:
        """Send the answer, or a part of it.

        Raises:
            TimeoutError: it could not be sent in time.
        """
        with anyio.fail_after(DELIVERY_TIMEOUT, shield=True):
            await send(message)

    async def raise_now(self) -> None:
        """Raise the cancellation; called in another task, have it raised in its own.

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
        """Cancel the task again, which has sent nothing meanwhile or left that to another task."""
        task = self._task
        self.end()
        if task is not None:
            self._error = None
            # The task's own `asyncio.timeout` sees one and the same cancellation.
            task.uncancel()
            task.cancel()

    def end(self) -> None:
        """Forget the task, because the cancellation was raised or the call has ended."""
        self.is_pending = False
        self._task = None
