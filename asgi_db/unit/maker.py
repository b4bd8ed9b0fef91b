"""`Database.sessionmaker`: what libraries take where they ask for an `async_sessionmaker`.

    async with database.sessionmaker() as session:  # rolled back, unless it was committed
    async with database.sessionmaker.begin() as session:  # committed

Its sessions are those of the database, each with a unit of work of its own. As with SQLAlchemy's,
one that was closed may be used again; so may one that was made outside of any event loop.
"""

from __future__ import annotations

from typing_extensions import TypeVar

from asgi_db.unit.session import DBSession

SessionT = TypeVar("SessionT", bound=DBSession)

OF_CONSTRUCTION = frozenset({"sync_session", "_proxied", "_async_bind", "_async_binds"})
