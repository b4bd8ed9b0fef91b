"""A storm of cancelled requests on any ASGI application, and what it leaves behind.

    python -m tests.chaos.cancellation module:app --url postgresql+asyncpg://...

Each request is cancelled at a random moment: before its first statement, inside a query, between
statements, inside COMMIT, during its response, inside its clean-up, and often twice. The runner
keeps a ledger of what was acknowledged, and asks the database itself, over a connection of its
own, what has become of it. It knows nothing of the library, so that the same storm can be let
loose on others.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import logging
import os
import platform
import random
import re
import selectors
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, Protocol, TypeAlias

import anyio
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response

from tests.relay import Relay
from tests.servers import Row, outside, server_connections

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Any, Receive, Send], Awaitable[None]]

WAYS = (
    "task",
    "scope",
    "timeout",
    "middleware-disconnect",
    "middleware-timeout",
    "stream",
    "sse",
)
"""How a request is cancelled. The last two are streams whose client goes away."""

STREAMS = {"stream": "/stream", "sse": "/events"}
PATIENCE = 10.0
"""Seconds after which a call that does not end is given up."""
ABANDONED = 10.0
"""Seconds that a query would go on if nobody ended it on the server."""
SLOW_COMMIT = 5
"""Every so many ids the COMMIT takes a while."""
READABLE = range(1, 51)
"""The ids of the rows that are there from the beginning."""

_KEY = "tests.chaos.cancellation"


@dataclass(frozen=True)
class Contender:
    """An application in the storm.

    Attributes:
        app: what serves the routes.
        checked_out: how many connections are out of its pool, if it can say.
        pool: how many connections it may have at once.
    """

    app: App
    checked_out: Callable[[], int] | None = None
    pool: int = 5


@dataclass
class Result:
    """What one way of cancelling has come to; the fields are those of the printed object."""

    requests: int = 0
    cancelled: int = 0
    cancelled_twice: int = 0
    cancelled_in_commit: int = 0
    acknowledged: int = 0
    lost: int = 0
    half_committed: int = 0
    refused_but_applied: int = 0
    applied_unanswered: int = 0
    applied_unsure: int = 0
    announced: int = 0
    wrong_rows: int = 0
    bystanders: int = 0
    bystanders_failed: int = 0
    stuck: int = 0
    outcomes: dict[str, int] = field(default_factory=dict[str, int])
    settled_after: float | None = None
    checked_out: int | None = None
    idle_in_transaction: int = 0
    active: int = 0
    held_up_turns: int = 0
    complaints: list[str] = field(default_factory=list[str])
    calm_reads_failed: int = 0
    calm_writes_failed: int = 0
    full_size: int = 0
    left_at_exit: int | None = None
    hung: bool = False
    skipped: bool = False
    error: str | None = None
    violations: list[str] = field(default_factory=list[str])

    def judge(self, pool: int, within: float) -> None:
        """Put into words what should not be so."""
        if self.skipped:
            return
        none_of = {
            "acknowledged, but not there": self.lost,
            "half committed": self.half_committed,
            "refused, but applied": self.refused_but_applied,
            "got another's rows": self.wrong_rows,
            "which nobody cancelled failed": self.bystanders_failed,
            "did not end": self.stuck,
            f"connections not back in the pool after {within:g} s": self.checked_out,
            f"connections idle in transaction after {within:g} s": self.idle_in_transaction,
            f"queries still active after {within:g} s": self.active,
            "complaints of the garbage collector or the event loop": len(self.complaints),
            "calm reads failed": self.calm_reads_failed,
            "calm writes failed": self.calm_writes_failed,
            "connections left at the exit": self.left_at_exit,
        }
        say = self.violations.append
        for what, number in none_of.items():
            if number:
                say(f"{number} {what}")
        most = self.applied_unanswered + self.applied_unsure
        if not self.applied_unanswered <= self.announced <= most:
            say(
                f"{self.applied_unanswered} committed without an answer, {self.applied_unsure} cut"
                f" off while it was sent, {self.announced} announced in the log"
            )
        if self.held_up_turns > 1000:
            say(f"the loop turned {self.held_up_turns} times while clean-ups were held up")
        if self.full_size < pool:
            say(f"only {self.full_size} of {pool} connections work")
        if self.hung:
            say("hung")
        if self.error is not None:
            say(self.error)


# -- one request -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """A moment to cancel, counted from the begin of a request or of its response."""

    turns: int = 0
    seconds: float = 0.0
    in_response: bool = False


@dataclass
class Call:
    """One request, and what the application handed to `send` for it.

    Attributes:
        ids: the rows which it writes.
        moment: when it is cancelled; None for a bystander.
        again: how long after that it is cancelled again.
        is_delivered: whether `send` has taken the status line, before anything cut it off.
        was_answered: whether it was so when the cancellation came.
        cancel: cancels it, in the way of the storm.
        cancellable: set as soon as `cancel` does that.
    """

    method: str
    path: str
    query: str = ""
    ids: tuple[int, ...] = ()
    reads: int | None = None
    moment: Moment | None = None
    again: Moment | None = None
    spec_version: str = "2.3"
    raises: bool = True

    status: int | None = None
    body: bytes = b""
    is_complete: bool = False
    is_delivered: bool = False
    was_answered: bool = False
    cancel: Callable[[], object] = lambda: None
    cancellable: asyncio.Event = field(default_factory=asyncio.Event)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def acknowledged(self) -> bool:
        return self.status is not None and 200 <= self.status < 300

    @property
    def is_unknown(self) -> bool:
        """Whether the answer says that nobody knows whether it was committed."""
        return b"outcome-unknown" in self.body

    @property
    def got_anothers_rows(self) -> bool:
        if self.status != 200 or not self.is_complete and self.reads is not None:
            return False
        if self.reads is not None:
            found: Any = json.loads(self.body)
            return bool(found != {"id": self.reads, "value": f"value-{self.reads}"})
        return any(value != b"value-1" for value in re.findall(rb"value-\d*", self.body))

    def note(self, message: Message) -> None:
        """Note a message of the application."""
        if message["type"] == "http.response.start":
            self.status = int(message["status"])
            self.started.set()
        elif message["type"] == "http.response.body":
            self.body += message.get("body", b"")
            self.is_complete = not message.get("more_body", False)

    def will_be_cancelled_by(self, cancel: Callable[[], object]) -> None:
        self.cancel = cancel
        self.cancellable.set()

    @property
    def scope(self) -> dict[str, Any]:
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": self.spec_version},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": self.query.encode(),
            "root_path": "",
            "headers": [(b"host", b"testserver")],
            "client": ("127.0.0.1", 1),
            "server": ("testserver", 80),
            _KEY: self,
        }


def noting(app: App) -> App:
    """The application, with a look at what it hands to `send`, below any other middleware."""

    async def noting_app(scope: Any, receive: Receive, send: Send) -> None:
        call: Call | None = scope.get(_KEY)

        async def note_and_send(message: Message) -> None:
            if call is not None:
                call.note(message)
            await send(message)
            if call is not None:
                call.is_delivered = True

        await app(scope, receive, note_and_send)

    return noting_app


async def serve(app: App, call: Call) -> None:
    """Serve a request as a server does which notices that its client has gone."""
    is_read = False

    async def receive() -> Message:
        nonlocal is_read
        if not is_read:
            is_read = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await call.gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        await asyncio.sleep(0)
        if call.gone.is_set():
            raise OSError("the client has gone")

    await app(call.scope, receive, send)


# -- the ways ----------------------------------------------------------------------------------


class Target(Protocol):
    """What is to be cancelled: it learns how.

    Attributes:
        gone: set when the client has gone.
        raises: whether a timeout comes out as an error, and is not answered.
    """

    gone: asyncio.Event
    raises: bool

    def will_be_cancelled_by(self, cancel: Callable[[], object]) -> None:
        """Take note of what cancels the request, which has just begun."""
        ...


class Disconnecting(BaseHTTPMiddleware):
    """Gives up a request whose client has gone: the recipe that is passed around."""

    def __init__(self, app: Any, target: Target) -> None:
        super().__init__(app)
        self.target = target

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        self.target.will_be_cancelled_by(self.target.gone.set)
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                await self.target.gone.wait()
                group.cancel_scope.cancel()

            group.start_soon(watch)
            response = await call_next(request)
            group.cancel_scope.cancel()
            return response
        raise ClientDisconnect


class TimingOut(BaseHTTPMiddleware):
    """Answers 504 when a request takes too long, or lets the timeout out."""

    def __init__(self, app: Any, target: Target) -> None:
        super().__init__(app)
        self.target = target

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        try:
            async with asyncio.timeout(None) as timeout:
                self.target.will_be_cancelled_by(partial(_expire, timeout))
                return await call_next(request)
        except TimeoutError:
            if self.target.raises:
                raise
            return PlainTextResponse("too late", 504)


def _expire(timeout: asyncio.Timeout) -> None:
    with suppress(RuntimeError):  # it has expired already, or its block has ended
        timeout.reschedule(0)


def cancellable(way: str, app: App, target: Target) -> App:
    """The application, with what cancels a request in this way around it."""

    async def cancellable_app(scope: Any, receive: Receive, send: Send) -> None:
        match way:
            case "task" | "twice":
                task = asyncio.current_task()
                assert task is not None
                target.will_be_cancelled_by(task.cancel)
                await app(scope, receive, send)
            case "scope":
                with anyio.CancelScope() as cancel_scope:
                    target.will_be_cancelled_by(cancel_scope.cancel)
                    await app(scope, receive, send)
            case "timeout":
                async with asyncio.timeout(None) as timeout:
                    target.will_be_cancelled_by(partial(_expire, timeout))
                    await app(scope, receive, send)
            case "middleware-disconnect":
                await Disconnecting(app, target)(scope, receive, send)
            case "middleware-timeout":
                await TimingOut(app, target)(scope, receive, send)
            case _:
                target.will_be_cancelled_by(target.gone.set)
                await app(scope, receive, send)
        for _ in range(3):  # the cancellation had its effect inside: nothing is left of it here
            await asyncio.sleep(0)

    return cancellable_app


# -- the storm ---------------------------------------------------------------------------------


class CountingSelector(selectors.DefaultSelector):
    """Counts the turns of the event loop."""

    turns = 0

    def select(self, timeout: float | None = None) -> Any:
        self.turns += 1
        return super().select(timeout)


class Storm:
    """The requests of one way, and the ledger of what came of them."""

    def __init__(self, contender: Contender, way: str, seed: int) -> None:
        self.app = noting(contender.app)
        self.way = way
        self.result = Result()
        self.calls: list[Call] = []
        self._random = random.Random(f"{seed} {way}")
        self._ids = itertools.count(1000)

    async def rage(self, requests: int, concurrency: int) -> None:
        """Send the requests which are to be cancelled, and others in between."""
        left = iter([self._plan() for _ in range(requests)])

        async def work() -> None:
            for number, call in enumerate(left):
                if number % 4 == 0:
                    self.result.bystanders += 1
                    self.result.bystanders_failed += not await self.bystander(self._calm())
                await self._cancelled(call)

        await asyncio.gather(*[work() for _ in range(concurrency)])

    async def bystander(self, call: Call) -> bool:
        """Send a request which nobody cancels; whether it was answered as it should be."""
        self.calls.append(call)
        task = asyncio.create_task(serve(self.app, call))
        if not await self._ends(task):
            return False
        return call.acknowledged and not call.got_anothers_rows

    def read(self) -> Call:
        id = self._random.choice(READABLE)
        return Call("GET", f"/items/{id}", reads=id)

    def write(self, *, slow_commit: bool = False) -> Call:
        id = self._next_id(slow_commit)
        return Call("POST", f"/items/{id}", ids=(id,))

    def slow(self, seconds: float) -> Call:
        id = self._next_id()
        return Call("POST", f"/slow/{id}", f"seconds={seconds}", ids=(id,))

    def pair(self, seconds: float) -> Call:
        id = self._next_id()
        return Call("POST", f"/pair/{id}", f"seconds={seconds}", ids=(id, -id))

    def stream(self, seconds: float = 0.01) -> Call:
        path = STREAMS.get(self.way, "/stream")
        return Call("GET", path, f"chunks=20&seconds={seconds}")

    async def held_up(self, relay: Relay, url: str) -> int:
        """Cancel while the network is frozen; return the turns of the loop until it flows."""
        selector = getattr(asyncio.get_running_loop(), "_selector")  # noqa: B009, no public way
        assert isinstance(selector, CountingSelector)
        if self.way in STREAMS:
            calls = [self.stream(), self.stream()]
            busy = 0
        else:
            calls = [self.slow(ABANDONED), self.pair(ABANDONED)]
            busy = len(calls)
        self.calls += calls
        tasks = [asyncio.create_task(self._serve(call)) for call in calls]
        with suppress(TimeoutError):  # a contender that is broken already
            async with asyncio.timeout(PATIENCE):
                await _are_busy(url, busy)
                relay.freeze()
                if not busy:
                    await relay.holds_something.wait()
        relay.freeze()
        await asyncio.sleep(0)
        before = selector.turns
        for call in calls:
            call.cancel()
        await asyncio.sleep(0.5)
        turns = selector.turns - before
        relay.thaw()
        for task in tasks:
            await self._ends(task)
        return turns

    # -- what is sent --------------------------------------------------------------------------

    def _plan(self) -> Call:
        choose = self._random
        if self.way in STREAMS:
            call = self.stream()
            call.spec_version = choose.choice(["2.3", "2.4"])
            call.moment = choose.choice(
                [
                    Moment(seconds=choose.uniform(0, 0.2)),
                    Moment(in_response=True, seconds=choose.uniform(0, 0.2)),
                    Moment(in_response=True, turns=choose.randrange(10)),
                ]
            )
            return call
        raises = self.way != "middleware-timeout" or choose.random() < 0.7
        long = ABANDONED if raises else 0.1  # else nobody ends the application either
        match choose.choice(["before", "query", "between", "commit", "response", "any"]):
            case "before":
                call = choose.choice([self.read(), self.write(), self.slow(long)])
                call.moment = Moment(turns=choose.randrange(6))
            case "query":
                call = self.slow(long)
                call.moment = Moment(seconds=choose.uniform(0.01, 0.15))
            case "between":
                call = self.pair(choose.uniform(0.05, 0.2))
                call.moment = Moment(seconds=choose.uniform(0.01, 0.2))
            case "commit":
                call = self.write(slow_commit=True)
                call.moment = Moment(seconds=choose.uniform(0.005, 0.1))
            case "response":
                call = choose.choice([self.write(), self.pair(0), self.stream(), self.read()])
                call.moment = Moment(in_response=True, turns=choose.randrange(4))
            case _:
                anything = [self.read(), self.write(), self.slow(0.02), self.pair(0.02)]
                call = choose.choice([*anything, self.stream(0.0)])
                call.moment = Moment(turns=choose.randrange(60))
        call.raises = raises
        call.spec_version = choose.choice(["2.3", "2.4"])
        if choose.random() < 0.5:
            again = Moment(turns=choose.randrange(12))
            call.again = choose.choice([again, Moment(seconds=choose.uniform(0, 0.02))])
        return call

    def _calm(self) -> Call:
        return self._random.choice([self.read(), self.write(), self.pair(0)])

    def _next_id(self, slow_commit: bool = False) -> int:
        while True:
            id = next(self._ids)
            if (id % SLOW_COMMIT == 0) == slow_commit:
                return id

    # -- how it is sent ------------------------------------------------------------------------

    async def _serve(self, call: Call) -> None:
        await serve(cancellable(self.way, self.app, call), call)

    async def _cancelled(self, call: Call) -> None:
        moment = call.moment
        assert moment is not None
        self.calls.append(call)
        self.result.requests += 1
        task = asyncio.create_task(self._serve(call))
        first = call.started if moment.in_response else call.cancellable
        event = asyncio.create_task(first.wait())
        await asyncio.wait((task, event), return_when=asyncio.FIRST_COMPLETED)
        event.cancel()
        await _pass(moment)
        if not task.done():
            self.result.cancelled += 1
            call.was_answered = call.status is not None
            call.cancel()
        if call.again is not None:
            await _pass(call.again)
            if not task.done():
                self.result.cancelled_twice += 1
                task.cancel()
        await self._ends(task)

    async def _ends(self, task: asyncio.Task[None]) -> bool:
        """Wait for the end of a call; what it raised is no matter, but that it ended is."""
        done, _ = await asyncio.wait((task,), timeout=PATIENCE)
        if not done:
            self.result.stuck += 1
            task.cancel()
            return False
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        outcome = "ended" if error is None else type(error).__name__
        self.result.outcomes[outcome] = self.result.outcomes.get(outcome, 0) + 1
        return error is None


async def _pass(moment: Moment) -> None:
    for _ in range(moment.turns):
        await asyncio.sleep(0)
    if moment.seconds:
        await asyncio.sleep(moment.seconds)


# -- what the server says ----------------------------------------------------------------------


async def _are_busy(url: str, number: int) -> None:
    """Wait until the server sees so many connections in a statement or a transaction."""
    while True:
        clients = await server_connections(url)
        if sum(client.state != "idle" for client in clients) >= number:
            return
        await asyncio.sleep(0.01)


async def _left(url: str, within: float) -> int:
    """How many connections are still there after a while."""
    deadline = time.monotonic() + within
    while True:
        left = len(await server_connections(url))
        if not left or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.02)


async def prepare(url: str) -> None:
    """Make the table, with a COMMIT that takes a while for some of its rows."""
    values = ", ".join(f"({id}, 'value-{id}')" for id in READABLE)
    async with outside(url) as connection:
        await connection.execute("DROP TABLE IF EXISTS items")
        await connection.execute(
            "CREATE TABLE items (id BIGINT PRIMARY KEY, value VARCHAR(64) NOT NULL)"
        )
        await connection.execute(f"INSERT INTO items VALUES {values}")
        if url.startswith("postgresql"):
            await connection.execute(
                "CREATE OR REPLACE FUNCTION slow_commit() RETURNS trigger LANGUAGE plpgsql"
                " AS 'BEGIN PERFORM pg_sleep(0.05); RETURN NULL; END'"
            )
            await connection.execute(
                "CREATE CONSTRAINT TRIGGER slow_commit AFTER INSERT ON items DEFERRABLE"
                f" INITIALLY DEFERRED FOR EACH ROW WHEN (NEW.id % {SLOW_COMMIT} = 0)"
                " EXECUTE FUNCTION slow_commit()"
            )


@asynccontextmanager
async def slow_commits(url: str) -> AsyncGenerator[None, None]:
    """Let COMMITs take a while on MariaDB too: again and again it makes all of them wait."""

    async def block() -> None:
        async with outside(url) as connection:
            while not over.is_set():
                await connection.execute("BACKUP STAGE START")
                await connection.execute("BACKUP STAGE BLOCK_COMMIT")
                await asyncio.sleep(0.05)
                await connection.execute("BACKUP STAGE END")
                await asyncio.sleep(0.05)

    over = asyncio.Event()
    blocking = None if url.startswith("postgresql") else asyncio.create_task(block())
    try:
        yield
    finally:
        over.set()
        if blocking is not None:
            await blocking


async def settle(contender: Contender, url: str, within: float, result: Result) -> None:
    """Wait until nothing is left of the storm; note what is, when the time is over."""
    begin = time.monotonic()
    while True:
        clients = await server_connections(url)
        waiting = [client for client in clients if client.state.startswith("idle in")]
        result.idle_in_transaction = len(waiting)
        result.active = sum(client.state == "active" for client in clients)
        if contender.checked_out is not None:
            result.checked_out = contender.checked_out()
        passed = time.monotonic() - begin
        if not (result.idle_in_transaction or result.active or result.checked_out):
            result.settled_after = round(passed, 3)
            return
        if passed > within:
            return
        await asyncio.sleep(0.02)


async def full_size(storm: Storm, contender: Contender, url: str) -> int:
    """How many connections of the pool work at once."""
    calls = [storm.slow(0.7) for _ in range(contender.pool)]
    tasks = [asyncio.create_task(storm.bystander(call)) for call in calls]
    most = 0
    while not all(task.done() for task in tasks) and most < contender.pool:
        clients = await server_connections(url)
        most = max(most, sum("sleep(" in client.query.lower() for client in clients))
        await asyncio.sleep(0.02)
    answered = sum(await asyncio.gather(*tasks))
    return min(most, answered)


async def audit(calls: list[Call], url: str, result: Result) -> None:
    """Compare the ledger with the table."""
    async with outside(url) as connection:
        rows: list[Row] = await connection.execute("SELECT id, value FROM items")
    there = {id for id, value in rows if value == f"value-{id}"}
    result.wrong_rows = len(rows) - len(there) + sum(call.got_anothers_rows for call in calls)
    for call in calls:
        if not call.ids:
            continue
        present = [id in there for id in call.ids]
        result.acknowledged += call.acknowledged
        result.cancelled_in_commit += (
            call.moment is not None and any(present) and not call.was_answered
        )
        result.applied_unsure += any(present) and call.status is not None and not call.is_delivered
        result.lost += call.acknowledged and not all(present)
        result.half_committed += any(present) and not all(present)
        if any(present) and not call.acknowledged:
            result.applied_unanswered += call.status is None
            result.refused_but_applied += call.status is not None and not call.is_unknown


# -- what the interpreter says -----------------------------------------------------------------

_LEAKS = re.compile(
    "garbage collector|never retrieved|was destroyed|never awaited|non-checked-in|unclosed",
    re.IGNORECASE,
)


class Listener(logging.Handler):
    """Keeps what the log says of commits without an answer, and of leaks."""

    def __init__(self) -> None:
        super().__init__()
        self.announced = 0
        self.complaints: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self.announced += "committed, answer not delivered" in message
        if _LEAKS.search(message):
            self.complaints.append(message[:300])


@contextmanager
def listening() -> Generator[Listener, None, None]:
    """Listen to everything that complains."""
    listener = Listener()
    hook = sys.unraisablehook
    sys.unraisablehook = lambda failure: listener.complaints.append(
        f"{failure.err_msg or 'unraisable'}: {failure.exc_value!r}"
    )
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.WARNING)
    root.addHandler(listener)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield listener
            gc.collect()
    finally:
        sys.unraisablehook = hook
        root.removeHandler(listener)
        root.setLevel(level)
    for warning in caught:
        text = str(warning.message)
        if issubclass(warning.category, ResourceWarning) or _LEAKS.search(text):
            listener.complaints.append(f"{warning.category.__name__}: {text[:300]}")


# -- one way from begin to end -----------------------------------------------------------------


@asynccontextmanager
async def lifespan(app: App) -> AsyncGenerator[bool, None]:
    """Start the application and shut it down; whether it has a lifespan at all."""
    inbox: asyncio.Queue[Message] = asyncio.Queue()
    outbox: asyncio.Queue[str] = asyncio.Queue()

    async def send(message: Message) -> None:
        outbox.put_nowait(message["type"])

    async def run() -> None:
        try:
            await app({"type": "lifespan", "asgi": {"version": "3.0"}}, inbox.get, send)
        except Exception:
            outbox.put_nowait("raised")

    running = asyncio.create_task(run())
    inbox.put_nowait({"type": "lifespan.startup"})
    first = await outbox.get()
    if first == "lifespan.startup.failed":
        raise RuntimeError("the application does not start")
    try:
        yield first == "lifespan.startup.complete"
    finally:
        inbox.put_nowait({"type": "lifespan.shutdown"})
        await asyncio.wait((running,), timeout=30)
        running.cancel()


@dataclass(frozen=True)
class Settings:
    """How hard the storm is."""

    requests: int = 1000
    seed: int = 1
    concurrency: int = 15
    within: float = 1.0


async def storm(
    make: Callable[[str], Contender], url: str, way: str, settings: Settings, listener: Listener
) -> Result:
    """Let the storm loose on an application that is made for the URL of a database."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(
        lambda _, context: listener.complaints.append(_described(context)[:300])
    )
    await prepare(url)
    async with Relay(url) as relay:
        contender = make(relay.url)
        async with lifespan(contender.app) as has_lifespan:
            storm = Storm(contender, way, settings.seed)
            if way in STREAMS and not await storm.bystander(storm.stream(0.0)):
                storm.result.skipped = True
                return storm.result
            await _measure(storm, contender, relay, url, settings)
        result = storm.result
        if has_lifespan:
            result.left_at_exit = await _left(url, settings.within)
        gc.collect()
        await asyncio.sleep(0)
        await audit(storm.calls, url, result)
    return result


async def _measure(
    storm: Storm, contender: Contender, relay: Relay, url: str, settings: Settings
) -> None:
    result = storm.result
    async with slow_commits(url):
        await storm.rage(settings.requests, settings.concurrency)
    result.held_up_turns = await storm.held_up(relay, url)
    await settle(contender, url, settings.within, result)
    reads = [storm.bystander(storm.read()) for _ in range(60)]
    result.calm_reads_failed = 60 - sum([await read for read in reads])
    writes = [storm.bystander(storm.write()) for _ in range(20)]
    result.calm_writes_failed = 20 - sum(await asyncio.gather(*writes))
    result.full_size = await full_size(storm, contender, url)


def _described(context: dict[str, Any]) -> str:
    error = context.get("exception")
    return f"{context['message']}" + (f": {error!r}" if error is not None else "")


def run(make: Callable[[str], Contender], url: str, way: str, settings: Settings) -> Result:
    """Run the storm in an event loop of its own, on a thread of its own, and judge it."""

    def new_loop() -> asyncio.AbstractEventLoop:
        return asyncio.SelectorEventLoop(CountingSelector())

    def work() -> Result:
        pools: list[int] = []

        def make_noting_the_pool(url: str) -> Contender:
            contender = make(url)
            pools.append(contender.pool)
            return contender

        with listening() as listener, asyncio.Runner(loop_factory=new_loop) as runner:
            result = runner.run(storm(make_noting_the_pool, url, way, settings, listener))
        result.announced = listener.announced
        result.complaints = listener.complaints
        result.judge(pools[0], settings.within)
        return result

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(work).result()


# -- the command -------------------------------------------------------------------------------

TIME_LIMIT = 180.0
"""Seconds for one way."""


def load(app: str, pool: int) -> Callable[[str], Contender]:
    """How to import `module:attribute`, with its settings in the environment."""

    def make(url: str) -> Contender:
        os.environ["DATABASE_URL"] = url
        os.environ["POOL_SIZE"] = str(pool)
        module_name, _, attribute = app.partition(":")
        module = import_module(module_name)
        return Contender(
            getattr(module, attribute or "app"), getattr(module, "checked_out", None), pool
        )

    return make


def run_apart(arguments: list[str], way: str, requests: int) -> Result:
    """Run one way in a process of its own, so that what it breaks is gone with it."""
    safe = ["-P"] if sys.flags.safe_path else list[str]()
    command = [sys.executable, *safe, "-m", __spec__.name, *arguments]
    try:
        finished = subprocess.run(
            [*command, "--ways", way, "--requests", str(requests)],
            stdout=subprocess.PIPE,
            timeout=TIME_LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Result(hung=True, violations=["hung"])
    if finished.returncode != 0:
        error = f"the runner ended with {finished.returncode}"
        return Result(error=error, violations=[error])
    found: Any = json.loads(finished.stdout.decode().splitlines()[-1])
    return Result(**found["ways"][way])


_WORST = {"settled_after", "held_up_turns"}


def totals(results: list[Result]) -> dict[str, Any]:
    """The sum of all ways, or the worst of them where a sum says nothing."""
    found: dict[str, Any] = {}
    rows = [asdict(result) for result in results if not result.skipped]
    for name in asdict(Result()):
        values = [row[name] for row in rows if row[name] is not None]
        if name == "full_size":
            found[name] = min(values, default=0)
        elif name in _WORST:
            found[name] = max(values, default=0) if len(values) == len(rows) else None
        elif name in ("complaints", "violations"):
            found[name] = [text for value in values for text in value]
        elif name == "outcomes":
            outcomes = Counter[str]()
            for value in values:
                outcomes.update(value)
            found[name] = dict(outcomes)
        elif name not in ("skipped", "error"):
            found[name] = sum(values) if values else None
    return found


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description="A storm of cancelled requests, and what it leaves behind."
    )
    parser.add_argument("app", help="module:attribute")
    parser.add_argument("--url", required=True)
    parser.add_argument("--requests", type=int, default=1000, help="in all")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=15)
    parser.add_argument("--pool", type=int, default=5)
    parser.add_argument("--within", type=float, default=1.0)
    options = parser.parse_args()
    ways: list[str] = options.ways.split(",")
    results: dict[str, Result] = {}
    if len(ways) == 1:
        settings = Settings(options.requests, options.seed, options.concurrency, options.within)
        results[ways[0]] = run(load(options.app, options.pool), options.url, ways[0], settings)
    else:
        names = ("url", "seed", "concurrency", "pool", "within")
        arguments = [options.app, *[f"--{name}={getattr(options, name)}" for name in names]]
        for number, way in enumerate(ways):
            share = (options.requests + number) // len(ways)
            results[way] = run_apart(arguments, way, share)
    found = {
        "app": options.app,
        "database": options.url.partition("+")[0].partition(":")[0],
        "seed": options.seed,
        "python": platform.python_version(),
        "totals": totals(list(results.values())),
        "clean": not any(result.violations for result in results.values()),
        "ways": {way: asdict(result) for way, result in results.items()},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
