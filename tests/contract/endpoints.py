"""What an application is made of, before any framework comes in."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from asgi_db import Database, DBSession, Mode, plain
from asgi_db.types import ASGIApp


@dataclass(frozen=True)
class Answer:
    """What an endpoint or an exception handler answers."""

    status: int = 200
    body: bytes = b"done"
    location: str | None = None
    stream: Callable[[], AsyncIterator[bytes]] | None = None
    background: Callable[[], Awaitable[None]] | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.location is None else {"location": self.location}


Work = Callable[[DBSession], Awaitable[Answer | None]]
"""What an endpoint does; None is `Answer()`."""

Handlers = Mapping[type[Any], Answer]
"""The exception handlers which an application registers."""


@dataclass(frozen=True)
class Route:
    """An endpoint, and where its mode comes from: its decorator, or the dependency it takes."""

    path: str
    work: Work
    decorator: Mode | None = None
    dependency: Mode | None = None

    def decorate(self, endpoint: Callable[..., Any]) -> Callable[..., Any]:
        """The endpoint under the name of the work, with its decorator."""
        endpoint.__name__ = self.work.__name__
        endpoint.__qualname__ = self.work.__qualname__
        return endpoint if self.decorator is None else self.decorator(endpoint)  # type: ignore[operator]


@dataclass(frozen=True)
class Setup:
    """What the same application is made of in each framework."""

    database: Database
    routes: list[Route]
    handlers: Handlers
    mode: Mode = plain
    before: Work | None = None
    """What a middleware inside the library's own does before the route is known."""


class Framework(Protocol):
    """How to say it in one framework."""

    name: str
    reraises: bool
    """Whether an unhandled error comes out of the application; Litestar only answers it."""

    def http_error(self, answer: Answer) -> Exception:
        """The framework's own exception for a status."""
        ...

    def app(self, setup: Setup, *, around: bool = False) -> ASGIApp:
        """The application with the middleware installed as the framework does, or around it."""
        ...
