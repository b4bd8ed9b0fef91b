"""Any other contender, and how many connections are out of its pool.

`tests.contenders.counted:seed` is the application of `seed.py`, with a route more: `GET /held`
answers with the number. SQLAlchemy's own events count it, for every library alike.
"""

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


def __getattr__(name: str) -> Any:
    try:
        contender: Any = import_module(f"tests.contenders.{name}")
    except ModuleNotFoundError as error:
        raise AttributeError(name) from error

    async def app(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] != "http" or scope["path"] != "/held":
            await contender.app(scope, receive, send)
            return
        uses_sqlalchemy = name != "asyncpg_by_hand"
        body = str(out if uses_sqlalchemy else contender.checked_out()).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app
