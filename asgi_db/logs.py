"""The log of the library, which never hurts: a handler that raises reaches no request."""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
from collections.abc import Hashable
from typing import Any


class SafeLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger that swallows the errors of handlers and filters.

    Python's logging lets an error of `Handler.emit` through unless the handler itself catches it.
    There it would stop a unit of work in the middle of its end.
    """

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log a line; where that fails, write the error to stderr, as Python's handlers do."""
        try:
            # The line is the caller's, and not this one's.
            super().log(level, msg, *args, stacklevel=2, **kwargs)
        except Exception:
            if logging.raiseExceptions:
                with contextlib.suppress(Exception):
                    traceback.print_exc(file=sys.stderr)


logger = SafeLogger(logging.getLogger("asgi_db"))
"""What every module of the library logs with; to users it is the logger "asgi_db"."""


class ErrorsOnce:
    """Logs the first error of each kind, where every request may bring another one."""

    def __init__(self) -> None:
        self._seen: set[Hashable] = set()

    def log(self, where: Hashable, name: object, error: Exception) -> None:
        """Log an error that is being handled, unless there was one like it.

        Args:
            where: where it came from; together with its type this is its kind.
            name: names that place in the log.
        """
        kind = where, type(error).__qualname__
        if kind not in self._seen:
            self._seen.add(kind)
            logger.exception("%s has failed; further errors like this are not logged.", name)
