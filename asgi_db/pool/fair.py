"""A pool that serves its waiters in the order in which they came.

SQLAlchemy's pool keeps its connections in an `asyncio.Queue`. There a newcomer may take the
connection for which a waiter has just been woken, and the waiter goes to the end of the queue:
under load some requests run into `pool_timeout` while others are served again and again.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry
from sqlalchemy.pool.base import _ConnectionRecord  # pyright: ignore[reportPrivateUsage]
from sqlalchemy.util.queue import Empty, Full, QueueCommon

from asgi_db.drivers.connecting import check_loop
from asgi_db.drivers.outages import ServerFullError
from asgi_db.logs import logger
from asgi_db.sqlalchemy_versions import await_

T = TypeVar("T")


class FairQueue(QueueCommon[T]):
    """A queue that hands each item to the waiter that has waited longest.

    Attributes:
        receive: makes an item of what a waiter was handed.
        take_back: takes what a waiter was handed that has ended meanwhile.
        loop: the event loop that it serves; None if any.
    """

    loop: asyncio.AbstractEventLoop | None = None

    def __init__(self, maxsize: int = 0, use_lifo: bool = False) -> None:
        self.maxsize = maxsize
        self.use_lifo = use_lifo
        self.receive: Callable[[T], T] = _unchanged
        self.take_back: Callable[[T], None] = self.keep
        self._items: deque[T] = deque()
        self._waiting: deque[asyncio.Future[T]] = deque()

    def empty(self) -> bool:
        """Say whether the queue holds no item."""
        return not self._items

    def full(self) -> bool:
        """Say whether the queue has no room for another item."""
        return 0 < self.maxsize <= len(self._items)

    def qsize(self) -> int:
        """Return the number of items in the queue."""
        return len(self._items)

    def waiting(self) -> int:
        """Return the number of waiters."""
        return sum(not waiter.done() for waiter in list(self._waiting))

    def put(self, item: T, block: bool = True, timeout: float | None = None) -> None:
        """Hand an item to the waiter that has waited longest, or keep it.

        The pool never waits for room.

        Raises:
            Full: there is no waiter, and no room.
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
        """Hand an item to the waiter that has waited longest; False if there is none."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(item)
                return True
        return False

    def keep(self, item: T) -> None:
        """Hand an item to a waiter, or keep it even if there is no room, so as not to lose it."""
        if not self.hand(item):
            self._items.append(item)

    def get(self, block: bool = True, timeout: float | None = None) -> T:
        """Take an item, or wait for one; waiters are served in the order in which they came.

        Raises:
            Empty: there is no item, or none came within `timeout` seconds.
            ConcurrentUseError: this is another event loop than the one that it serves.
        """
        # Each request comes here, so the common case is told without a call.
        if self.loop is not None and asyncio.get_running_loop() is not self.loop:
            check_loop(self.loop, "The engine was used")
        if self._items:
            return self._items.pop() if self.use_lifo else self._items.popleft()
        if not block:
            raise Empty()
        ends = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if ends is None else max(ends - time.monotonic(), 0)
            try:
                return self.receive(await_(self._wait(left)))
            except WaitOn:
                continue

    def get_nowait(self) -> T:
        """Take an item.

        Raises:
            Empty: there is no item.
        """
        return self.get(block=False)

    async def _wait(self, seconds: float | None) -> T:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[T] = loop.create_future()
        self._waiting.append(waiter)
        timer = None if seconds is None else loop.call_later(seconds, _time_out, waiter)
        try:
            return await waiter
        except BaseException:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            elif not waiter.cancelled() and waiter.exception() is None:
                # The item came at the last moment.
                self.take_back(waiter.result())
            raise
        finally:
            if timer is not None:
                timer.cancel()


class WaitOn(Exception):
    """Raised by `receive` if the waiter has to wait for another item."""


def _unchanged(item: T) -> T:
    return item


def _time_out(waiter: asyncio.Future[T]) -> None:
    if not waiter.done():
        waiter.set_exception(Empty())


class _Entry(_ConnectionRecord):
    """A place in the pool that becomes free again even if a listener of "checkin" raises.

    SQLAlchemy itself would then never return the connection, and the pool would be smaller for
    good. There is no public API for this; a test in `test_fair_pool.py` breaks when this changes.
    """

    def __init__(self, pool: FairPool) -> None:
        super().__init__(pool)
        self._pool = pool

    def checkin(self, _fairy_was_created: bool = True) -> None:
        try:
            super().checkin(_fairy_was_created)
        except BaseException as error:
            self._pool.return_after_error(self)
            if not isinstance(error, Exception):
                raise
            logger.exception("A listener of the pool's event `checkin` has failed.")


class FairPool(AsyncAdaptedQueuePool):
    """SQLAlchemy's pool with a fair queue.

    SQLAlchemy has no public API for this; the tests in `test_fair_pool.py` break when it changes.
    """

    # SQLAlchemy derives the name of its logger from this.
    __module__ = "sqlalchemy.pool"

    _queue_class = FairQueue[ConnectionPoolEntry]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._queue.receive = self._receive
        self._queue.take_back = self._take_back

    @property
    def _queue(self) -> FairQueue[Any]:
        return cast(FairQueue[Any], self._pool)

    def _create_connection(self) -> ConnectionPoolEntry:
        """Open a connection; if the server takes no more of them, wait for one that is in use."""
        try:
            return _Entry(self)
        except ServerFullError as error:
            if not self._others_are_open():
                raise
            full = error
        self._give_up_place()
        try:
            entry: ConnectionPoolEntry = self._queue.get(timeout=self.timeout())
        except BaseException as error:
            self._overflow += 1  # The caller gives up the place once more.
            if not isinstance(error, Empty):
                raise
            raise PoolTimeoutError(
                "The server takes no more connections, and none became free in time."
            ) from full
        return entry

    def _others_are_open(self) -> bool:
        """Whether there is a connection, or an attempt at one, besides the one being opened."""
        return self.checkedout() > 1

    def _give_up_place(self) -> None:
        """Leave the place of a connection that the server has refused; no waiter would get it."""
        super()._dec_overflow()

    def recreate(self) -> FairPool:
        """Return a new pool for the same event loop, which SQLAlchemy asks for at `dispose`."""
        pool = super().recreate()
        assert isinstance(pool, FairPool)
        pool.loop = self.loop
        return pool

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop that it serves; None if any."""
        return self._queue.loop

    @loop.setter
    def loop(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self._queue.loop = loop

    def return_after_error(self, entry: ConnectionPoolEntry) -> None:
        """Return a connection that SQLAlchemy itself has not returned because of an error."""
        self._return_conn(entry)

    def _dec_overflow(self) -> Literal[True]:
        """Let a waiter, rather than a newcomer, open a connection in place of a closed one."""
        return True if self._queue.hand(_ROOM) else super()._dec_overflow()

    def _receive(self, item: Any) -> Any:
        if item is not _ROOM:
            return item
        try:
            return _Entry(self)
        except ServerFullError:
            if self._others_are_open():
                self._give_up_place()
                raise WaitOn from None
            self._dec_overflow()
            raise
        except BaseException:
            self._dec_overflow()
            raise

    def _take_back(self, item: Any) -> None:
        if item is _ROOM:
            self._dec_overflow()
        else:
            self._queue.keep(item)

    def waiting(self) -> int:
        """Return the number of tasks that are waiting for a connection."""
        return self._queue.waiting()


_ROOM = object()
"""Handed to a waiter that may open a new connection."""
