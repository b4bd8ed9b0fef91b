"""Units of work on their own, without a request."""

from __future__ import annotations

from typing import cast

from asgi_db import Database, DBSession, Mode
from tests.internals import Block, UnitOfWork


class NewUnit(UnitOfWork):
    """A unit of work, whose session is of our own class."""

    session: DBSession  # pyright: ignore[reportIncompatibleVariableOverride]


def new_unit(database: Database, default: Mode, name: str, *, route: Mode | None = None) -> NewUnit:
    """A unit of work for something of this name, whose route may set a mode of its own."""

    class Origin(Block):
        def route_mode(self) -> Mode | None:
            return route

    origin = Origin(database, default, name)
    return cast(NewUnit, DBSession(origin).unit_of_work)
