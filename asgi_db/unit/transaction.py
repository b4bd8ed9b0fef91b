"""One transaction of a session, from before its first statement until after its end.

    OPEN ──▶ COMMITTING ──▶ SENT ──▶ COMMITTED
     ▲ │           │           └────▶ FAILED
     │ │           └── a flush fails, or COMMIT cannot be sent ──▶ FAILED
     ▼ └──▶ ROLLED_BACK
    KEPT

`KEPT` holds nothing but its connection, for the next of several reads in a row. `SENT` begins when
the driver sends COMMIT: from then on the outcome is unknown if the connection is closed. The
outcome of a unit of work is the last stage of its transaction.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from sqlalchemy import Connection, Result
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from asgi_db.drivers.statements import Effect
from asgi_db.errors import FailedTransactionError
from asgi_db.statistics import Outcome


class Stage(enum.Enum):
    """How far a transaction has come; see the top of this file."""

    __hash__ = object.__hash__  # that of enums is a function of Python, and each request asks it

    NONE = enum.auto()
    """There has been no transaction yet."""
    OPEN = enum.auto()
    KEPT = enum.auto()
    COMMITTING = enum.auto()
    SENT = enum.auto()
    COMMITTED = enum.auto()
    ROLLED_BACK = enum.auto()
    FAILED = enum.auto()


STAGES: dict[Stage, tuple[Stage, ...]] = {
    Stage.NONE: (),
    Stage.OPEN: (Stage.KEPT, Stage.COMMITTING, Stage.ROLLED_BACK, Stage.FAILED),
    # A COMMIT of the `SessionTransaction` itself is no operation of the session.
    Stage.KEPT: (Stage.OPEN, Stage.COMMITTING, Stage.ROLLED_BACK, Stage.FAILED),
    # Without a connection nothing is sent; with several, COMMIT is sent over each of them.
    Stage.COMMITTING: (Stage.SENT, Stage.COMMITTED, Stage.FAILED),
    Stage.SENT: (Stage.SENT, Stage.COMMITTED, Stage.FAILED),
    Stage.COMMITTED: (),
    Stage.ROLLED_BACK: (),
    Stage.FAILED: (),
}

OUTCOMES: dict[Stage, Outcome] = {
    Stage.COMMITTED: "committed",
    Stage.ROLLED_BACK: "rolled_back",
    Stage.FAILED: "failed",
}
"""The names of the last stages in the statistics."""


class Transaction:
    """What a unit of work knows about the transaction that is open, or was open last.

    Attributes:
        stage: how far it has come.
        connections: the connections on which it is open.
        goes_back_soon: whether the connection goes back when the event loop turns, if it is kept.
        streams: its results with an open server-side cursor.
        effect: the greatest effect of its statements; `HOLDS` also if its connection was handed
            out.
        was_handed_out: whether its connection was handed out, over which anything may be sent.
        failure: why it can no longer be committed, if so.
        was_cancelled: whether one of its statements, or its COMMIT, was running when the request
            was cancelled.
        when_sent: called when its COMMIT is sent, to limit the time for the answer.
    """

    stage = Stage.OPEN
    connections: tuple[Connection, ...] = ()
    goes_back_soon = False
    streams: tuple[Result[object], ...] = ()
    effect = Effect.READS
    was_handed_out = False
    failure: BaseException | None = None
    was_cancelled = False
    when_sent: Callable[[], None] | None = None

    def __repr__(self) -> str:
        return f"<Transaction {self.stage.name}>"

    @property
    def commit_was_sent(self) -> bool:
        """Whether its COMMIT is, or may be, on its way to the server."""
        return self.stage is Stage.SENT

    @property
    def is_open(self) -> bool:
        """Whether it has not ended yet."""
        return bool(STAGES[self.stage])

    def holds_more_than(self, effect: Effect) -> bool:
        """Return whether more than this effect would be lost if it were given back now."""
        return self.is_open and (
            self.effect > effect
            or any(not stream.closed for stream in self.streams)
            or any(_has_own_isolation(connection) for connection in self.connections)
        )

    @property
    def has_committed_writes(self) -> bool:
        """Whether it contains writes, and the database has committed them."""
        return self.effect.writes and self.stage is Stage.COMMITTED

    def move(self, to: Stage) -> None:
        """Move to another stage.

        Raises:
            RuntimeError: the present stage does not lead to that one.
        """
        if to not in STAGES[self.stage]:
            raise RuntimeError(f"a transaction cannot move from {self.stage.name} to {to.name}")
        self.stage = to

    def begin_commit(self) -> None:
        """Begin to commit, unless the database has discarded the transaction already.

        Raises:
            FailedTransactionError: it can no longer be committed.
        """
        if self.failure is not None:
            raise FailedTransactionError(statement_failed=True) from self.failure
        for connection in self.connections:
            if not connection.invalidated and not connection.connection.is_valid:
                raise FailedTransactionError(statement_failed=False)
        self.move(Stage.COMMITTING)

    def commit_is_sent(self) -> None:
        """Note that the driver is about to send COMMIT."""
        # In any other stage the COMMIT is not that of the session.
        if self.stage in (Stage.COMMITTING, Stage.SENT):
            self.move(Stage.SENT)
            if self.when_sent is not None:
                self.when_sent()

    def end(self) -> None:
        """Note that the session has ended it; after a COMMIT the stage has changed already."""
        if self.stage in (Stage.OPEN, Stage.KEPT):
            self.stage = Stage.ROLLED_BACK

    def fail(self) -> None:
        """Note that its COMMIT failed, unless the database has committed it."""
        if self.stage is not Stage.COMMITTED:
            self.stage = Stage.FAILED

    def note_failure(self, error: BaseException) -> None:
        """Note why it can no longer be committed; the first reason counts."""
        if self.failure is None:
            self.failure = error

    def note_error(self, error: BaseException, *, in_savepoint: bool) -> None:
        """Note the error of an operation; a failure inside a savepoint is confined to it."""
        if not isinstance(error, Exception):
            self.was_cancelled = True
        elif not isinstance(error, (DBAPIError, PoolTimeoutError)):
            # No statement has failed; perhaps `get_one` found no row.
            return
        if not in_savepoint:
            self.note_failure(error)


def _has_own_isolation(connection: Connection) -> bool:
    """Whether the handler has set the isolation level of a connection itself."""
    level = connection.get_execution_options().get("isolation_level")
    return level != connection.engine.get_execution_options().get("isolation_level")
