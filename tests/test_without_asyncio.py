"""Where something else than asyncio runs the coroutines, as trio does, one sentence says so."""

from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from asgi_db import ConfigurationError, Database, DBSessionMiddleware
from asgi_db.types import Message, Receive, Scope, Send


def run_without_asyncio(coroutine: Coroutine[Any, Any, object]) -> None:
    """Run a coroutine that waits for nothing, without any event loop."""
    with pytest.raises(StopIteration):
        coroutine.send(None)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that is never reached."""
    raise AssertionError


def middleware() -> DBSessionMiddleware:
    """The middleware, on any database."""
    return DBSessionMiddleware(app, database=Database("postgresql://app@localhost/shop"))


class Server:
    """A server with another kind of event loop."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        """Return the only event."""
        return {"type": "lifespan.startup"}

    async def send(self, message: Message) -> None:
        """Keep a message."""
        self.sent.append(message)


@pytest.mark.parametrize("kind", ["http", "websocket", "lifespan"])
def test_the_middleware_says_that_it_needs_asyncio(kind: str) -> None:
    server = Server()
    scope: dict[str, Any] = {"type": kind, "path": "/", "headers": []}
    with pytest.raises(ConfigurationError, match="needs asyncio"):
        run_without_asyncio(middleware()(scope, server.receive, server.send))
    if kind == "lifespan":
        (failed,) = server.sent
        assert failed["type"] == "lifespan.startup.failed"
        assert "needs asyncio" in failed["message"]


async def in_a_block(database: Database) -> None:
    """Open a session."""
    async with database.session():
        raise AssertionError


async def in_a_transaction(database: Database) -> None:
    """Open a transaction."""
    async with database.transaction():
        raise AssertionError


async def as_a_context(database: Database) -> None:
    """Start the database."""
    async with database:
        raise AssertionError


@pytest.mark.parametrize("use", [in_a_block, in_a_transaction, as_a_context])
def test_a_script_is_told_so_too(use: Callable[[Database], Coroutine[Any, Any, None]]) -> None:
    with pytest.raises(ConfigurationError, match="needs asyncio"):
        run_without_asyncio(use(Database("sqlite://")))
