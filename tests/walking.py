"""One session, led step by step from outside; and what is to hold after each step.

A host keeps the session where an application would have it, in a block or behind a WebSocket, and
does there what it is told. Nothing of the session's inside is looked at but the `repr` of its unit
of work, in `state_of`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

from asgi_db import Database, DBSession, DBSessionMiddleware, Mode
from asgi_db.types import Receive, Scope, Send
from tests.contract.client import scope_of
from tests.pools import checked_out
from tests.servers import assert_idle, outside
from tests.sockets import Socket

T = TypeVar("T")
Work: TypeAlias = Callable[[DBSession], Awaitable[Any]]
Place: TypeAlias = Literal["block", "socket"]

PATIENCE = 20.0
"""Seconds that one step may take."""


class Stuck(AssertionError):
    """A step that does not end."""


class GivenUp(Exception):
    """What the application raises in order that its unit fails."""


def state_of(session: DBSession) -> str:
    """The state of the session's unit of work, as its `repr` says it."""
    unit: Any = session.unit_of_work
    found = re.match(r"<UnitOfWork (\w+)", repr(unit))
    assert found is not None, repr(unit)
    return found[1]


async def bounded(work: Awaitable[T]) -> T:
    """Await something that has to end."""
    task = asyncio.ensure_future(work)
    done, _ = await asyncio.wait((task,), timeout=PATIENCE)
    if not done:
        task.print_stack()
        raise Stuck("a step does not end")
    return task.result()


@dataclass
class Host:
    """Where the session lives.

    Attributes:
        session: the one that lives now.
    """

    database: Database
    mode: Mode
    place: Place
    session: DBSession = field(init=False)
    _told: asyncio.Queue[tuple[Work | bool, asyncio.Future[Outcome]]] = field(init=False)
    _task: asyncio.Task[None] | None = None
    _socket: Socket | None = None
    _waits: asyncio.Event = field(init=False)

    @property
    def is_open(self) -> bool:
        return self._waits.is_set()

    async def open(self) -> None:
        """Let there be a session."""
        self._told = asyncio.Queue()
        self._waits = asyncio.Event()
        if self.place == "block":
            self._task = asyncio.create_task(self._in_a_block())
        else:
            app = DBSessionMiddleware(self._behind_a_socket, self.database, mode=self.mode)
            self._socket = Socket(app, scope_of("websocket", "ws", "/", "2.3"))
            self._socket.send({"type": "websocket.connect"})
        await bounded(self._waits.wait())

    async def do(self, work: Work) -> Outcome:
        """Do something in the task that the session belongs to."""
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._told.put_nowait((work, answer))
        return await bounded(answer)

    async def end(self, *, success: bool) -> None:
        """End the unit of work, and raise what comes of it; the session may be another then."""
        error: BaseException | None = None
        if self._socket is not None:
            error = await self._end_on_the_socket(self._socket, success)
        else:
            assert self._task is not None
            self._told.put_nowait((success, asyncio.get_running_loop().create_future()))
            await self._has_ended(self._task)
            error = self._task.exception()
            self._waits.clear()
        if error is not None and not isinstance(error, GivenUp):
            raise error

    async def close(self) -> None:
        """Let it all be over, whatever that takes."""
        if self.is_open:
            await self.end(success=False)

    async def _has_ended(self, task: asyncio.Task[None]) -> None:
        await asyncio.wait((task,), timeout=PATIENCE)
        if not task.done():
            task.print_stack()
            raise Stuck("the unit does not end")

    async def _end_on_the_socket(self, socket: Socket, success: bool) -> BaseException | None:
        self._told.put_nowait((success, asyncio.get_running_loop().create_future()))
        answer = await bounded(socket.receive())
        if answer is not None:
            return None
        await socket.close()
        self._waits.clear()
        return socket.error

    async def _in_a_block(self) -> None:
        async with self.database.session(self.mode) as session:
            self.session = session
            if not await self._serve(session):
                raise GivenUp

    async def _behind_a_socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.session = session = scope["state"]["db"]
        while await self._serve(session):
            await send({"type": "websocket.send", "text": "done"})
        raise GivenUp

    async def _serve(self, session: DBSession) -> bool:
        """Do what is told, until a unit is to end; return whether with success."""
        self._waits.set()
        while True:
            work, answer = await self._told.get()
            if isinstance(work, bool):
                return work
            answer.set_result(await outcome_of(work, session))


@dataclass(frozen=True)
class Outcome:
    """What came of a step: a value, an error, or a cancellation."""

    error: BaseException | None = None
    value: Any = None

    @property
    def is_ok(self) -> bool:
        return self.error is None

    @property
    def was_cancelled(self) -> bool:
        return isinstance(self.error, asyncio.CancelledError)


async def outcome_of(work: Work, session: DBSession) -> Outcome:
    """Do something, and return what came of it, a cancellation included."""
    try:
        return Outcome(value=await work(session))
    except (Exception, asyncio.CancelledError) as error:
        return Outcome(error)


async def names(url: str) -> set[str]:
    """The names which another connection sees at this moment."""
    async with outside(url) as connection:
        return {name for (name,) in await connection.execute("SELECT name FROM author")}


async def assert_nothing_held(database: Database, url: str) -> None:
    """Neither the pool nor the server knows of a connection in use."""
    assert checked_out(database) == 0
    await assert_idle(url)
