"""Another contender (`COUNTED` names its module), and how many connections are out of its pool.

`GET /held` answers with the number. SQLAlchemy's own events count it, for every library alike.
"""

import os
from collections.abc import Awaitable, Callable
from importlib import import_module
from typing import Any

from sqlalchemy import event
from sqlalchemy.pool import Pool

out = 0


@event.listens_for(Pool, "checkout")
def _out(*_: object) -> None:
    global out
    out += 1


@event.listens_for(Pool, "checkin")
def _in(*_: object) -> None:
    global out
    out -= 1


counted: Any = import_module(f"tests.contenders.{os.environ['COUNTED']}")


def held() -> int:
    """How many connections are out."""
    uses_sqlalchemy = os.environ["COUNTED"] != "asyncpg_by_hand"
    number: int = out if uses_sqlalchemy else counted.checked_out()
    return number


async def app(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
    """The contender, and one route more."""
    if scope["type"] != "http" or scope["path"] != "/held":
        await counted.app(scope, receive, send)
        return
    body = str(held()).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
