"""The states of a unit of work.

A session lives through many units, one after the other:

    IDLE ──first statement──▶ ACTIVE ──COMMIT or ROLLBACK──▶ ENDING ──▶ IDLE ──…──▶ CLOSED

`IDLE` holds nothing. `ACTIVE` may hold a connection; its first statement fixes the mode. `ENDING`
is a COMMIT, including one by hand, or the ROLLBACK at the end of a unit: it runs to its end in a
task of its own, even if the request is cancelled. `CLOSED` is final: the request is over, and the
session refuses to work.
"""

from __future__ import annotations

import enum


class State(enum.Enum):
    """The state of a unit of work; see the top of this file."""

    __hash__ = object.__hash__  # that of enums is a function of Python, and each request asks it

    IDLE = enum.auto()
    ACTIVE = enum.auto()
    ENDING = enum.auto()
    CLOSED = enum.auto()


TRANSITIONS: dict[State, tuple[State, ...]] = {
    State.IDLE: (State.ACTIVE, State.ENDING, State.CLOSED),
    State.ACTIVE: (State.IDLE, State.ENDING),
    State.ENDING: (State.IDLE,),
    State.CLOSED: (),
}


class LeftOver(enum.Enum):
    """Work of a session that belongs to no transaction."""

    KEPT = enum.auto()
    """Changed objects that `release` kept, and that the next transaction will flush."""
    DISCARDED = enum.auto()
    """Work that will not be committed, because the handler closed the session."""
