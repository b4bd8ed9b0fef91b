"""The log of the library: an error of a log handler never reaches a request."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import traceback
from collections.abc import Generator, Hashable
from typing import Any


class SafeLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger that swallows the errors of handlers and filters.

    Python's logging lets an error of `Handler.emit` through unless the handler itself catches it.
    Such an error would stop a unit of work in the middle of its end.
    """

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log a line; if that fails, write the error to stderr, as Python's handlers do."""
        try:
            # The log shall show the line of the caller.
            super().log(level, msg, *args, stacklevel=2, **kwargs)
        except Exception:
            if logging.raiseExceptions:
                with contextlib.suppress(Exception):
                    traceback.print_exc(file=sys.stderr)


logger = SafeLogger(logging.getLogger("asgi_db"))
"""The logger of every module of the library; its name is "asgi_db"."""


@contextlib.contextmanager
def about_a_raised_error() -> Generator[None]:
    """Keep Sentry, if the application uses it, from counting an error twice.

    It makes an event of each line at ERROR, and another one of the error that a caller gets. What
    is logged in this block stays in Sentry as a breadcrumb of that one.
    """
    new_scope = getattr(sys.modules.get("sentry_sdk"), "new_scope", None)  # since Sentry's 2.0
    with contextlib.ExitStack() as stack:
        if new_scope is not None:
            with contextlib.suppress(Exception):
                stack.enter_context(new_scope()).add_event_processor(_drop)
        yield


def _drop(_event: object, _hint: object) -> None:
    """Answer Sentry that an event is not to be sent."""


class Seldom:
    """Logs a warning at most once a minute, where every request may have one."""

    def __init__(self) -> None:
        self._last: float | None = None

    def warning(self, message: str, *args: object) -> None:
        """Log a warning, unless there was one in the last minute."""
        now = time.monotonic()
        if self._last is None or now - self._last >= _SELDOM:
            self._last = now
            logger.warning(message, *args)


_SELDOM = 60.0


class ErrorsOnce:
    """Logs only the first error of each kind, where every request may raise another one."""

    def __init__(self) -> None:
        self._seen: set[Hashable] = set()

    def log(self, where: Hashable, name: object, error: Exception) -> None:
        """Log the error that is being handled, unless one of its kind was logged before.

        Args:
            where: where it came from, which together with its type is its kind.
            name: the name of that place in the log.
        """
        kind = where, type(error).__qualname__
        if kind not in self._seen:
            self._seen.add(kind)
            logger.exception("%s has failed; further errors like this are not logged.", name)
