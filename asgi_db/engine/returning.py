"""Whether a connection can go back to its pool where nothing can be awaited."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import AdaptedConnection
from sqlalchemy.pool import QueuePool

from asgi_db.drivers import driver_of, is_prepared
from asgi_db.drivers.protocol import Driver


def returns_silently(connection: Connection) -> bool:
    """Say whether nothing is sent when a connection in autocommit goes back to its pool.

    A pool takes leave of the server when it closes a connection for which it has no place. A
    stand-in, as in a sandbox, is not adapted, and has a transaction to roll back. So has a
    connection over which something was sent past SQLAlchemy, by a listener to `connect`, say.
    """
    engine = connection.engine
    pool = engine.pool
    if not isinstance(pool, QueuePool) or pool.overflow() > 0:
        return False
    lent = connection.connection
    # After `engine.dispose()` a connection goes back to the pool that was before. SQLAlchemy has no
    # public way from a connection to its pool; the tests of reads in a row break when this changes.
    if getattr(lent, "_pool", None) is not pool:
        return False
    adapted = lent.dbapi_connection
    if not isinstance(adapted, AdaptedConnection):
        return False
    reset, checkin, rollback = pool.dispatch.reset, pool.dispatch.checkin, engine.dispatch.rollback
    number = len(reset) + len(checkin) + len(rollback)
    known = _known.get(engine)
    if known is None or known[0] != number:
        driver = driver_of(engine.dialect)
        is_silent = all(map(_is_own, (*reset, *checkin, *rollback)))
        is_silent = is_silent and driver.returns_silently(is_prepared=is_prepared(engine))
        _known[engine] = known = number, driver if is_silent else None
    return known[1] is not None and not known[1].is_in_transaction(adapted.driver_connection)


_known: WeakKeyDictionary[Engine, tuple[int, Driver | None]] = WeakKeyDictionary()
"""How many listeners an engine and its pool had when they were last looked at, and the driver; None
if something may be sent in any case.

A listener of the user's own may send something. SQLAlchemy has no other way to ask for them; a test
in `test_kept_connections.py` breaks when that changes.
"""


def _is_own(listener: object) -> bool:
    function = getattr(listener, "func", listener)  # of a `functools.partial`
    return getattr(function, "__module__", "").startswith("asgi_db.")
