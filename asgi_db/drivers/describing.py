"""What the log and the messages may say of an error and of a statement: never a value of a row.

The texts of a database and of SQLAlchemy repeat parameters and rows ("Key (email)=(…) already
exists"), and the text of a user's own error may do so too. The error itself still reaches the
application, with all that it says.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator

from sqlalchemy.exc import SQLAlchemyError, StatementError

from asgi_db.drivers import driver_packages, error_code
from asgi_db.errors import DatabaseConflictError


def brief(error: BaseException) -> str:
    """Describe an error in a line of the log, by its text only if that holds no value."""
    kind = type(error)
    if isinstance(error, StatementError):
        orig = error.orig
        return f"{kind.__name__} ({type(orig).__name__}, {orig and error_code(orig) or 'no code'})"
    if isinstance(error, OSError) or kind.__module__.partition(".")[0] == "asgi_db":
        return f"{kind.__name__}: {error}" if str(error) else kind.__name__
    code = error.code if isinstance(error, SQLAlchemyError) else error_code(error)
    return f"{kind.__name__} ({code})" if code else kind.__name__


def conflict_error(error: BaseException, where: str) -> DatabaseConflictError:
    """Make the error for a transaction that has lost a conflict with another one.

    Args:
        error: what the database says.
        where: the request or block.
    """
    orig = getattr(error, "orig", None) or error
    return DatabaseConflictError(
        f"{where}: the transaction has lost a conflict with another one ({brief(error)}). A"
        " request is run again with `transactional(retries=...)`, a block by a loop of your own.",
        orig,
    )


def may_hold_values(error: BaseException) -> bool:
    """Whether an error is, or comes from, one of the database, whose text may hold values."""
    return any(map(_is_of_database, _chain(error)))


def traceback_of(error: BaseException) -> str:
    """Format the traceback of an error and of its causes, without the texts of the database."""
    lines = list[str]()
    for one in _chain(error):
        lines += ["Traceback (most recent call last):\n", *traceback.format_tb(one.__traceback__)]
        if _is_of_database(one):
            lines.append(f"{brief(one)}\n")
        else:
            lines += traceback.format_exception_only(one)
    return "".join(lines).rstrip()


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Return an error after its causes, with the errors of a group."""
    earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if earlier is not None:
        yield from _chain(earlier)
    group: tuple[BaseException, ...] = getattr(error, "exceptions", ())
    for one in group:
        yield from _chain(one)
    yield error


def _is_of_database(error: BaseException) -> bool:
    packages = ("sqlalchemy", *driver_packages())
    return any(kind.__module__.partition(".")[0] in packages for kind in type(error).__mro__)


def opening_of(statement: str, *, has_double_quoted_strings: bool) -> str:
    """Return how SQL begins, up to the first string, number or comment in it.

    Args:
        has_double_quoted_strings: whether `"…"` is a string in this SQL, and not a name.
    """
    value = _VALUE_OR_DOUBLE_QUOTE if has_double_quoted_strings else _VALUE
    opening = value.split(statement.strip(), maxsplit=1)[0]
    return opening if len(opening) <= _LONGEST_OPENING else f"{opening[:_LONGEST_OPENING]}…"


_VALUE = re.compile(r"(?:\b[a-zA-Z])?'|(?<![\w$:%])[\d.]*\d|\$\w*\$|--|/\*|\#")
_VALUE_OR_DOUBLE_QUOTE = re.compile(_VALUE.pattern + '|"')
_LONGEST_OPENING = 60
