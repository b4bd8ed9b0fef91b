"""Whether a connection can go back to its pool where nothing can be awaited."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import AdaptedConnection
from sqlalchemy.pool import QueuePool

from asgi_db.drivers import driver_of


def returns_silently(connection: Connection) -> bool:
    """Say whether nothing is sent when a connection in autocommit goes back to its pool.

    A pool takes leave of the server when it closes a connection for which it has no place. A
    stand-in, as in a sandbox, is not adapted, and has a transaction to roll back.
    """
    engine = connection.engine
    pool = engine.pool
    if not isinstance(pool, QueuePool) or pool.overflow() > 0:
        return False
    if not isinstance(connection.connection.dbapi_connection, AdaptedConnection):
        return False
    events = pool.dispatch
    number = len(events.reset) + len(events.checkin)
    known = _known.get(engine)
    if known is None or known[0] != number:
        is_silent = driver_of(engine.dialect).returns_silently(engine)
        listeners = (*events.reset, *events.checkin)
        _known[engine] = known = number, is_silent and all(map(_is_own, listeners))
    return known[1]


_known: WeakKeyDictionary[Engine, tuple[int, bool]] = WeakKeyDictionary()
"""Of how many listeners an engine's pool had when it was last looked at, and the answer.

A listener of the user's own may send something. SQLAlchemy has no other way to ask for them; a test
in `test_kept_connections.py` breaks when that changes.
"""


def _is_own(listener: object) -> bool:
    function = getattr(listener, "func", listener)  # of a `functools.partial`
    return getattr(function, "__module__", "").startswith("asgi_db.")
