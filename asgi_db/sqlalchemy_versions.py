"""What differs between the versions of SQLAlchemy that the library supports: 2.0 and 2.1.

All of it is here, and the rest of the library uses only what both have. The tests in
`test_sqlalchemy_versions.py` break when a difference moves to another version, and when 2.0 is not
supported any more, so that this module can go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session
from sqlalchemy.util import concurrency

if TYPE_CHECKING or hasattr(concurrency, "await_"):
    from sqlalchemy.util.concurrency import await_
else:
    from sqlalchemy.util.concurrency import await_only as await_

__all__ = ["NEW_OPERATIONS", "await_", "has_begun"]

NEW_OPERATIONS = tuple(name for name in ("delete_all", "merge_all") if hasattr(Session, name))
"""The methods of `Session` that may talk to the database and that only 2.1 has."""


def has_begun(adapted: Any) -> bool:
    """Whether SQLAlchemy's adapter of an asyncpg connection has sent BEGIN.

    2.0 keeps a transaction that could not begin, and a flag beside it.
    """
    started: bool | None = getattr(adapted, "_started", None)
    return adapted._transaction is not None if started is None else started
