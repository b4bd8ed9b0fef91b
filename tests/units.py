"""Units of work on their own, without a request."""

from __future__ import annotations

from asgi_db import Database, DBSession, Mode
from tests.internals import Block, UnitOfWork


def new_unit(
    database: Database, default: Mode, name: str, *, route: Mode | None = None
) -> UnitOfWork:
    """A unit of work for something of this name, whose route may set a mode of its own."""

    class Origin(Block):
        def route_mode(self) -> Mode | None:
            return route

    origin = Origin(database, default, name)
    return origin.unit_of_work(DBSession(origin))
