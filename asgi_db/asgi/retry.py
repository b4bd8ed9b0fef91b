"""Runs a request again after its transaction conflicted with another one.

A server that cannot let two transactions both succeed rolls one of them back, and expects it to be
tried again. This module does so for `transactional(retries=…)` as long as nothing has been sent:
each attempt gets the original scope and body, and a session of its own.

The first statement of a further attempt waits for the other requests that have lost; see `Gates`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from asgi_db.asgi.frameworks import copy_scope
from asgi_db.asgi.turns import Gates, Turn
from asgi_db.replicas.own_writes import OwnWrites
from asgi_db.types import Message, Receive, Scope

BODY_LIMIT = 1024 * 1024
"""The most bytes of a body that are kept; a request with a longer body is not run again."""

FIRST_DELAY = 0.08
"""The longest delay before the fourth attempt, in seconds, or as long as the third one took if that
is longer; it triples with each attempt."""

LONGEST_DELAY = 1.0
"""The longest delay before any attempt, in seconds."""


class Attempts:
    """The attempts at one request.

    Attributes:
        number: the number of the running attempt, from 1.
        ends_at: when the `timeout=` of the request ends, by the event loop's clock; None if it
            has none, or no statement has run yet.
        own_writes: what they have committed together, where the database has replicas.
    """

    def __init__(self, scope: Scope, receive: Receive, gates: Gates) -> None:
        self.number = 1
        self.ends_at: float | None = None
        self.own_writes: OwnWrites | None = None
        self._scope = copy_scope(scope)
        self._receive = receive
        self._messages: list[Message] = []
        self._size = 0
        self._position = 0
        self._is_wanted: Callable[[], bool] = lambda: True
        # This is decided when the first piece of the body arrives.
        self._keeps_body: bool | None = None
        self._gates = gates
        self._route = ""
        self._turn: Turn | None = None
        self._began = 0.0  # set with the second attempt, after which there is the first delay

    def keep_body_if(self, wanted: Callable[[], bool]) -> None:
        """Keep the body only if this says so; it is asked when the body arrives.

        The route is known by then.
        """
        self._is_wanted = wanted

    async def receive(self) -> Message:
        """Receive for the application, first the messages that an earlier attempt received."""
        if self._position < len(self._messages):
            message = self._messages[self._position]
        else:
            message = await self._receive()
            self._keep(message)
        self._position += 1
        return message

    def _keep(self, message: Message) -> None:
        if self._keeps_body is None:
            self._keeps_body = self._is_wanted()
        if not self._keeps_body:
            return
        self._messages.append(message)
        self._size += len(message.get("body") or b"")
        if self._size > BODY_LIMIT:
            self._keeps_body = False
            self._messages.clear()

    def obstacle(self, retries: int) -> str:
        """Say why there cannot be another attempt; return an empty string if there can."""
        if self.number > retries:
            return f"{self.number} attempts have failed, and retries={retries}"
        if self._keeps_body is False:
            return (
                f"its body was not kept: it has more than {BODY_LIMIT} bytes, or was read before"
                " the route was known"
            )
        if self.ends_at is not None and self._longest_delay + _now() > self.ends_at:
            return "its timeout= is nearly over"
        return ""

    @property
    def _longest_delay(self) -> float:
        if self.number < 3:
            return 0.0
        took = _now() - self._began
        return min(max(FIRST_DELAY, took) * 3.0 ** (self.number - 3), LONGEST_DELAY)

    async def next(self, route: str) -> Scope:
        """Return the scope of the next attempt.

        From the third one on it goes alone in this process. What makes it lose nevertheless may be
        a request of another process, which has lost as well, so the next ones come after a delay
        left to chance.

        Args:
            route: the name of the route.
        """
        await asyncio.sleep(random.uniform(0, self._longest_delay))
        self._route = route
        if self._turn is not None:
            if self._turn.is_over:
                self._turn = None
            else:
                self._turn.extend()
        self._began = _now()
        self.number += 1
        self._position = 0
        return copy_scope(self._scope)

    async def wait_for_turn(self) -> None:
        """Wait for the other requests of the route that have lost."""
        if self._turn is None:
            self._turn = await self._gates.turn(self._route, self.ends_at)
            self._began = _now()

    @property
    def others_go_alone(self) -> bool:
        """Whether a request of some route has lost again in its turn."""
        return bool(self._gates.closed)

    async def let_others_go_alone(self, route: str) -> None:
        """Wait for a request of this route that has lost again in its turn."""
        await self._gates.wait_until_open(route)

    def end_turn(self) -> None:
        """Let the next request have its turn."""
        if self._turn is not None:
            self._turn.end()


def _now() -> float:
    return asyncio.get_running_loop().time()
