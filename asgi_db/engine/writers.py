"""The one writer of a database that has no more: a task must not wait for itself.

SQLite lets one transaction write at a time, and another one waits for its end. If both belong to
one task, that wait can only end with the busy timeout.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from weakref import ReferenceType, WeakValueDictionary, ref

from sqlalchemy.pool import PoolProxiedConnection

from asgi_db.drivers.protocol import Driver
from asgi_db.errors import ConcurrentUseError
from asgi_db.tasks import acting_for


class OneWriter:
    """The connection that writes into a database which has one writer at a time."""

    def __init__(self, driver: Driver, describe: Callable[[PoolProxiedConnection], str]) -> None:
        """Prepare it.

        Args:
            driver: the driver of the database.
            describe: names the request or block that has a connection.
        """
        self._driver = driver
        self._describe = describe
        self._holder: ReferenceType[PoolProxiedConnection] | None = None
        self._task: ReferenceType[asyncio.Task[Any]] | None = None

    def claim(self, pooled: PoolProxiedConnection) -> None:
        """Note that a connection is about to write.

        Raises:
            ConcurrentUseError: this task writes on another connection already, and would wait for
                itself.
        """
        caller = acting_for.get()
        task = asyncio.current_task() if caller is None else caller()
        holder = None if self._holder is None else self._holder()
        if holder is pooled or task is None:
            return
        if holder is not None and self._task is not None and self._task() is task:
            if holder.is_valid and self._driver.is_in_transaction(holder.driver_connection):
                raise ConcurrentUseError.two_writers(self._describe(holder))
        self._holder, self._task = ref(pooled), ref(task)


_writers: WeakValueDictionary[str, OneWriter] = WeakValueDictionary()


def writer_of(
    database: str, driver: Driver, describe: Callable[[PoolProxiedConnection], str]
) -> OneWriter:
    """Return the writer of a database, which several engines may share.

    Args:
        database: the path of its file.
        driver: the driver of the database.
        describe: names the request or block that has a connection.
    """
    writer = _writers.get(database)
    if writer is None:
        writer = _writers[database] = OneWriter(driver, describe)
    return writer
