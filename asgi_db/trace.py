"""What one unit of work sends to the database, while a dashboard watches.

Kept are the statements and how often and how long each of them ran, never a parameter. What is
shown of a statement has its literals replaced; see `without_literals`.
"""

from __future__ import annotations

import functools
import re
import time

MOST_STATEMENTS = 50
"""Different statements that are kept of one unit; further ones are only counted."""

_LONGEST = 1000
"""The most characters of a statement that are shown."""


class Sent:
    """One statement of a unit, which may have been sent several times.

    Attributes:
        times: how often it was sent.
        seconds: how long it ran, all of them together.
        longest: how long it ran at most.
        error: why it has failed, in a word or two without any value; None if it has not.
    """

    __slots__ = ("error", "longest", "seconds", "times")

    def __init__(self) -> None:
        self.times = 0
        self.seconds = 0.0
        self.longest = 0.0
        self.error: str | None = None


class Trace:
    """What one unit of work has sent so far.

    Attributes:
        sent: the first `MOST_STATEMENTS` different statements, as they were first sent.
        last: the text of the statement that was sent last.
        is_running: whether that one is running now.
        error: the first error of the database, in a word or two without any value.
        has_double_quoted_strings: whether text in double quotes is a string, as on MySQL.
        has_writes: whether the unit had written when it ended.
        attempt: which attempt at a request it was part of.
    """

    is_running = False
    last = ""
    error: str | None = None
    has_double_quoted_strings = False
    has_writes = False
    attempt = 1
    _began = 0.0
    _running: Sent

    def __init__(self) -> None:
        self.sent: dict[str, Sent] = {}

    def begin(self, statement: str, *, has_double_quoted_strings: bool) -> None:
        """Note that a statement is about to be sent."""
        sent = self.sent.get(statement)
        if sent is None:
            sent = Sent()
            if len(self.sent) < MOST_STATEMENTS:
                self.sent[statement] = sent
        sent.times += 1
        self.last = statement
        self.has_double_quoted_strings = has_double_quoted_strings
        self._running = sent
        self.is_running = True
        self._began = time.monotonic()

    def end(self) -> None:
        """Note that it has ended."""
        if self.is_running:
            seconds = time.monotonic() - self._began
            self.is_running = False
            sent = self._running
            sent.seconds += seconds
            if seconds > sent.longest:
                sent.longest = seconds

    def fail(self, error: str, statement: str | None) -> None:
        """Note an error of the database.

        Args:
            error: its name.
            statement: the statement that has failed; None if it was a COMMIT, say.
        """
        self.error = self.error or error
        if statement is not None and statement == self.last:
            self._running.error = error

    def shown(self, statement: str) -> str:
        """Return a statement of this unit as it may be shown."""
        return without_literals(statement, has_double_quoted_strings=self.has_double_quoted_strings)


# -- statements as they are shown --------------------------------------------------------------

_ESCAPED = r"(?:[^'\\]|\\.|'')*(?:'|$)"
_LITERAL = re.compile(
    rf"""
      (?P<comment> /\*.*?(?:\*/|$) | --[^\n]* )
    | [eE]'{_ESCAPED}                              # where a backslash escapes
    | (?:[xXbBnN]|[uU]&)?'(?:[^']|'')*(?:'|$)
    | \$(?P<tag>[A-Za-z_]\w*|)\$.*?(?:\$(?P=tag)\$|$)
    | (?P<name> "(?:[^"]|"")*(?:"|$) | `[^`]*(?:`|$) )
    | (?<![\w$:.])(?:0[xX][0-9a-fA-F_]+|(?:\d[\d_]*)?\.?\d[\d_]*(?:[eE][+-]?\d+)?)(?![\w])
    """,
    re.DOTALL | re.VERBOSE,
)
_LITERAL_OF_MYSQL = re.compile(
    rf"""
      (?P<comment> /\*.*?(?:\*/|$) | --[^\n]* | \#[^\n]* )
    | (?:[xXbBnN]|_\w+\s*)?'{_ESCAPED}
    | "(?:[^"\\]|\\.|"")*(?:"|$)
    | (?P<name> `[^`]*(?:`|$) )
    | (?<![\w$:.])(?:0[xX][0-9a-fA-F]+|\d*\.?\d+(?:[eE][+-]?\d+)?)(?![\w])
    """,
    re.DOTALL | re.VERBOSE,
)
_PLACEHOLDER = r"(?:\?|\$\d+(?:::[\w ]+)?|%s|%\(\w+\)s|:\w+)"
_MANY = re.compile(rf"({_PLACEHOLDER})(?:,\s*{_PLACEHOLDER}){{2,}}")
"""More placeholders in a row than two, whose number says nothing."""
_MANY_ROWS = re.compile(r"(\([^()]*\))(?:,\s*\([^()]*\)){2,}")


def _replace(match: re.Match[str]) -> str:
    if match["comment"] is not None:  # It may hold a value too: some libraries write into it.
        return " "
    return match["name"] or "?"


@functools.lru_cache(maxsize=512)
def without_literals(statement: str, *, has_double_quoted_strings: bool = False) -> str:
    """Return a statement in one line, with its literals replaced and its comments left out.

    What is not closed, such as a quote, is a literal up to the end. Long lists of placeholders are
    shortened, so that the same statement with more of them looks the same.
    """
    literal = _LITERAL_OF_MYSQL if has_double_quoted_strings else _LITERAL
    text = " ".join(literal.sub(_replace, statement).split())
    text = _MANY_ROWS.sub(r"\1, …", _MANY.sub(r"\1, …", text))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
