"""A pool in which nobody is passed over.

SQLAlchemy's keeps its connections in an `asyncio.Queue`. There a newcomer may take the connection
for which a waiter has just been woken, who then waits again behind all others: under load some
requests run into `pool_timeout` while others are served again and again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry
from sqlalchemy.util import await_
from sqlalchemy.util.queue import Empty, Full, QueueCommon

T = TypeVar("T")


class FairQueue(QueueCommon[T]):
    """A queue that hands each item to whoever has waited longest."""

    def __init__(self, maxsize: int = 0, use_lifo: bool = False) -> None:
        self.maxsize = maxsize
        self.use_lifo = use_lifo
        self.take_back: Callable[[T], None] = self.keep
        self._items: deque[T] = deque()
        self._waiting: deque[asyncio.Future[T]] = deque()

    def empty(self) -> bool:
        """Whether there is nothing in it."""
        return not self._items

    def full(self) -> bool:
        """Whether there is no room in it."""
        return 0 < self.maxsize <= len(self._items)

    def qsize(self) -> int:
        """How much is in it."""
        return len(self._items)

    def waiting(self) -> int:
        """How many wait for an item."""
        return sum(not waiter.done() for waiter in list(self._waiting))

    def put(self, item: T, block: bool = True, timeout: float | None = None) -> None:
        """Hand an item to the waiter that has waited longest, or keep it.

        The pool never waits for room.

        Raises:
            Full: nothing waits, and there is no room.
        """
        if self._waiting and self.hand(item):
            return
        if 0 < self.maxsize <= len(self._items):
            raise Full()
        self._items.append(item)

    def put_nowait(self, item: T) -> None:
        """Hand an item to the waiter that has waited longest, or keep it; see `put`."""
        self.put(item)

    def hand(self, item: T) -> bool:
        """Hand an item to whoever has waited longest; False if nobody waits."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(item)
                return True
        return False

    def keep(self, item: T) -> None:
        """Hand an item to who waits, or keep it even if there is no room: it may not be lost."""
        if not self.hand(item):
            self._items.append(item)

    def get(self, block: bool = True, timeout: float | None = None) -> T:
        """Take an item, or wait for one; who waits is served before who comes later.

        Raises:
            Empty: there is none, or none has come within `timeout` seconds.
        """
        if self._items:
            return self._items.pop() if self.use_lifo else self._items.popleft()
        if not block:
            raise Empty()
        return await_(self._wait(timeout))

    def get_nowait(self) -> T:
        """Take an item.

        Raises:
            Empty: there is none.
        """
        return self.get(block=False)

    async def _wait(self, seconds: float | None) -> T:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[T] = loop.create_future()
        self._waiting.append(waiter)
        timer = None if seconds is None else loop.call_later(seconds, _give_up, waiter)
        try:
            return await waiter
        except BaseException:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            elif not waiter.cancelled() and waiter.exception() is None:
                self.take_back(waiter.result())  # it came at the moment of the end
            raise
        finally:
            if timer is not None:
                timer.cancel()


def _give_up(waiter: asyncio.Future[T]) -> None:
    if not waiter.done():
        waiter.set_exception(Empty())


class FairPool(AsyncAdaptedQueuePool):
    """SQLAlchemy's pool with a fair queue.

    There is no public way to give it one; the tests in `test_fair_pool.py` break when this changes.
    """

    __module__ = "sqlalchemy.pool"  # after which SQLAlchemy names the logger

    _queue_class = FairQueue[ConnectionPoolEntry]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._queue.take_back = self._take_back

    @property
    def _queue(self) -> FairQueue[Any]:
        return cast(FairQueue[Any], self._pool)

    def _do_get(self) -> ConnectionPoolEntry:
        connection = super()._do_get()
        if connection is not _ROOM:
            return connection
        try:
            return self._create_connection()
        except BaseException:
            self._dec_overflow()
            raise

    def _dec_overflow(self) -> Literal[True]:
        """Let who waits open a connection in place of one that has gone, and not who comes next."""
        return True if self._queue.hand(_ROOM) else super()._dec_overflow()

    def _take_back(self, item: Any) -> None:
        if item is _ROOM:
            self._dec_overflow()
        else:
            self._queue.keep(item)

    def waiting(self) -> int:
        """How many wait for a connection."""
        return self._queue.waiting()


_ROOM = object()
"""What is handed to who waits where a connection may be opened."""
