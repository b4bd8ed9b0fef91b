"""What a statement does, judged by its keywords.

Each database's file has a `Grammar`: a table of its commands, with the page that lists them. What
the table does not name counts as a write, so that a new command of the database is refused where
nothing may be written, until its place has been decided.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Callable

from sqlalchemy.engine import Compiled
from sqlalchemy.sql import visitors
from sqlalchemy.sql.selectable import ForUpdateArg

from asgi_db.errors import ReadOnlyError


class Effect(enum.IntEnum):
    """What a statement does to the database; the greatest effect of its parts counts."""

    READS = enum.auto()
    HOLDS = enum.auto()
    """It reads, and takes something that lasts as long as its transaction: a cursor, an advisory
    lock. Where each statement stands alone, that is lost at once."""
    SETS = enum.auto()
    """It changes something of its connection, which others will use after the transaction."""
    LOCKS = enum.auto()
    """It locks rows, which are to be changed afterwards."""
    CALLS = enum.auto()
    """It runs code that may write; in a read-only transaction the server checks that itself."""
    WRITES = enum.auto()


_STATEMENTS = (
    "SELECT|INSERT|UPDATE|DELETE|MERGE|REPLACE|WITH|VALUES|TABLE|CREATE|REFRESH|DECLARE|EXECUTE"
)
_PREFIX = re.compile(
    # EXPLAIN ANALYZE executes its statement, and so do MariaDB's ANALYZE and SET STATEMENT.
    rf"(?:(?P<explain>EXPLAIN|DESCRIBE|DESC)\b(?P<options>.*?)"
    rf"|ANALYZE\s+(?:FORMAT\s*=\s*\w+\s+)?(?!TABLE\b)|SET\s+STATEMENT\b.*?\bFOR\s+)"
    rf"\b(?P<statement>(?:{_STATEMENTS})\b.*)",
    re.IGNORECASE | re.DOTALL,
)
_ANALYZE = re.compile(r"\bANALY[SZ]E\b", re.IGNORECASE)

WRITING_WITH = (
    r"\AWITH\b.*?(?:\bAS\s*(?:NOT\s+)?(?:MATERIALIZED\s*)?\(|\))"
    r"\s*(?:INSERT|UPDATE|DELETE|MERGE|REPLACE)\b"
)
"""A statement whose WITH clause, or what follows it, writes."""

NOT_CODE = r"""'[^']*'|"[^"]*"|/\*.*?\*/|--[^\n]*"""
"""Literals, quoted names and comments in standard SQL."""


class Grammar:
    """Which statements of a database read, and which do more."""

    def __init__(
        self,
        *,
        reads: str,
        holds: str,
        sets: str = "",
        calls: str = "",
        writes: str = "",
        holding: str = "",
        locking: str = "",
        setting: str = "",
        writing: str = WRITING_WITH,
        not_code: str = NOT_CODE,
        is_code: str = "",
    ) -> None:
        """Make the table; commands and patterns are regular expressions, in upper case.

        Args:
            reads: the commands that only read, separated by `|`; a space means any whitespace.
            holds: those that take something which lasts as long as the transaction.
            sets: those that change something of the connection.
            calls: those that run code which may write.
            writes: exceptions to the three; every other command counts as a write anyway.
            holding: what makes a reading command take something which lasts.
            locking: what makes a reading command lock rows.
            setting: what makes a reading command change something of the connection.
            writing: what makes a reading command write.
            not_code: literals, quoted names and comments.
            is_code: what surrounds comments whose text the database executes.
        """
        commands = {
            Effect.WRITES: writes,
            Effect.CALLS: calls,
            Effect.HOLDS: holds,
            Effect.SETS: sets,
            Effect.READS: reads,
        }
        self._commands = [
            (effect, _compile(rf"(?:{words})(?!\w)".replace(" ", r"\s+")))
            for effect, words in commands.items()
            if words
        ]
        inside = {
            Effect.WRITES: writing,
            Effect.LOCKS: locking,
            Effect.SETS: setting,
            Effect.HOLDS: holding,
        }
        self._inside = [(effect, _compile(words)) for effect, words in inside.items() if words]
        self._not_code = _compile(not_code)
        self._is_code = _compile(is_code) if is_code else None

    def effect_of(self, sql: str) -> Effect:
        """Return the effect of this SQL; that of functions which it calls is not known."""
        code = self._not_code.sub(" ", sql)
        if self._is_code is not None:
            code = self._is_code.sub(" ", code)
        # Some drivers send several statements at once.
        parts = (part.lstrip("( \t\r\n\f\v") for part in code.split(";"))
        return max((self._effect_of_one(part) for part in parts if part), default=Effect.READS)

    def _effect_of_one(self, code: str) -> Effect:
        if (prefix := _PREFIX.match(code)) is not None:
            if prefix["explain"] and not _ANALYZE.search(prefix["options"]):
                return Effect.READS
            return self._effect_of_one(prefix["statement"])
        commands = (effect for effect, words in self._commands if words.match(code))
        effect = next(commands, Effect.WRITES)
        if effect is Effect.READS:
            return next((more for more, words in self._inside if words.search(code)), effect)
        return effect


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE | re.DOTALL)


COMMON = Grammar(
    reads="SELECT|WITH|VALUES|TABLE|SHOW|EXPLAIN|DESCRIBE|DESC|HELP|PRAGMA"
    "|COMMIT|END|ABORT|ROLLBACK|SAVEPOINT|RELEASE|RESET|FETCH|CLOSE",
    holds="SET LOCAL|SET TRANSACTION|BEGIN|START TRANSACTION|LOCK|DECLARE",
    sets="SET|USE|PREPARE",
    calls="CALL|DO|EXEC|EXECUTE",
    writes="SET GLOBAL",
    locking=r"\bFOR\s+(?:NO\s+KEY\s+)?UPDATE\b",
)
"""What holds for a database of which nothing is known."""


class Judge:
    """Judges the statements of one dialect; what it has found out is kept.

    Attributes:
        effect_of: what an SQL statement does.
        drops_lock: whether a compiled statement asks for a row lock that its SQL does not mention.
    """

    def __init__(self, effect_of: Callable[[str], Effect], *, drops_row_locks: bool) -> None:
        """Prepare it for one database.

        Args:
            effect_of: what an SQL statement does there.
            drops_row_locks: whether SQLAlchemy leaves row locks out of its SQL.
        """
        self.effect_of = functools.lru_cache(maxsize=1024)(effect_of)
        self.drops_lock = functools.lru_cache(maxsize=1024)(
            _asks_for_row_lock if drops_row_locks else _asks_for_no_lock
        )


def not_read_only(effect: Effect, statement: str, mode: str, owner: str) -> ReadOnlyError:
    """Make the error for a statement that a mode cannot execute because it only reads.

    Args:
        effect: what the statement does.
        statement: its SQL, of which the beginning is shown without its literals.
        mode: the name of the mode.
        owner: the request or block, for the message.
    """
    shown = _LITERAL.sub("'…'", statement)[:60]
    if effect in (Effect.HOLDS, Effect.SETS):
        return ReadOnlyError(
            f"{owner}: what this statement takes, such as a lock or a setting, lasts as long as its"
            f" transaction or connection, and the read_only mode keeps neither: {shown!r}. Use"
            " read_only(snapshot=True), or put @transactional on the route."
        )
    does = "locks rows" if effect is Effect.LOCKS else "writes"
    return ReadOnlyError(
        f"{owner}: this statement {does}, but the mode is {mode} and only reads: {shown!r}. Put"
        " @transactional on the route, or ask for the transactional session."
    )


_LITERAL = re.compile(r"'[^']*'?")


def _asks_for_row_lock(compiled: Compiled | None) -> bool:
    statement = None if compiled is None else compiled.statement
    return statement is not None and any(
        isinstance(part, ForUpdateArg) for part in visitors.iterate(statement)
    )


def _asks_for_no_lock(_: Compiled | None) -> bool:
    return False
