"""psycopg's connection: closed, and its statement cancelled, without waiting for the server.

Imported only where a connection of psycopg is used: psycopg need not be installed.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import socket
from typing import Any

from psycopg import AsyncConnection, generators
from psycopg.waiting import wait_async, wait_conn_async

from asgi_db.drivers.postgresql import PATIENCE

LOOK_AGAIN = 0.1
"""Seconds after which psycopg looks whether a socket that says nothing is still there."""


class PromptConnection(AsyncConnection[Any]):
    """A connection that can be interrupted, and closed, without waiting for the server.

    An interrupted statement is ended over another connection (`pool/abandoned.py`). psycopg's own
    `wait` asks the server to cancel it, and waits ten seconds for one that is silent.
    """

    _waits_in: asyncio.AbstractEventLoop | None = None
    is_terminated = False

    async def wait(self, *args: Any, **options: Any) -> Any:
        # psycopg has no public way to wait without that; the test of a server that stands still in
        # `test_psycopg.py` breaks when this changes.
        options.setdefault("interval", LOOK_AGAIN)
        (generator,) = args
        self._waits_in = asyncio.get_running_loop()
        try:
            return await wait_async(generator, self.pgconn.socket, **options)
        finally:
            self._waits_in = None
            if self.is_terminated:
                self.pgconn.finish()

    # SQLAlchemy calls these before it has a connection that it would close after an error. psycopg
    # lets others go first now and then, even if it waits for nothing; cancelled there, the
    # connection would stay out of its pool. A test in `test_psycopg.py` breaks when psycopg calls
    # its generators differently.

    async def set_autocommit(self, value: bool) -> None:
        await self._set(self._set_autocommit_gen(value))

    async def set_isolation_level(self, value: Any) -> None:
        await self._set(self._set_isolation_level_gen(value))

    async def set_read_only(self, value: bool | None) -> None:
        await self._set(self._set_read_only_gen(value))

    async def set_deferrable(self, value: bool | None) -> None:
        await self._set(self._set_deferrable_gen(value))

    async def _set(self, setting: Any) -> None:
        async with self.lock:
            if self._pipeline is not None:
                await self.wait(setting)
            else:
                collections.deque(setting, maxlen=0)

    def terminate(self) -> None:
        """Close it without waiting for anything."""
        self.is_terminated = True
        if self._waits_in is None or self._waits_in.is_closed():
            self.pgconn.finish()
        else:
            # The event loop watches this socket: closed under its eyes, the number would go to
            # another connection. The task that waits wakes up, and closes it.
            with contextlib.suppress(OSError), _socket_of(self.pgconn) as copy:
                copy.shutdown(socket.SHUT_RDWR)

    @property
    def is_waiting(self) -> bool:
        """Whether a task waits for the server."""
        return self._waits_in is not None

    def __del__(self, *_: Any) -> None:
        # The pool tells of a connection that was forgotten. psycopg would warn of one that is
        # collected together with its pool, too. libpq's own object closes the socket, but not
        # that of a parent process.
        pass


def _socket_of(pgconn: Any) -> socket.socket:
    return socket.socket(fileno=os.dup(pgconn.socket))


async def send(request: Any) -> None:
    """Send a cancel request, which was made while its connection was open; in time, or not."""
    # psycopg has no public way to send it after the connection is closed; the test of a second host
    # in `test_abandoned_elsewhere.py` breaks when this changes. Whatever the error is: the
    # statement is also ended over another connection.
    sending = generators.cancel(request)
    with contextlib.suppress(Exception):
        async with asyncio.timeout(PATIENCE):
            await wait_conn_async(sending, interval=LOOK_AGAIN)
