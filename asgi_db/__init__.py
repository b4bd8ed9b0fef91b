"""asgi-db: the right database session for every ASGI request.

from asgi_db import Database, DBSessionMiddleware, transactional
"""

from __future__ import annotations

from asgi_db.database import Database
from asgi_db.errors import (
    ConcurrentUseError,
    ConfigurationError,
    DatabaseBusyError,
    DatabaseDownError,
    DatabaseTimeoutError,
    FailedTransactionError,
    MissingMiddlewareError,
    ModeConflictError,
    OutcomeUnknownError,
    ReadOnlyError,
    SandboxError,
    SessionExpiredError,
    UnavailableError,
    UncommittedWorkError,
)
from asgi_db.middleware import DBSessionMiddleware, session_of
from asgi_db.modes import Mode, by_method, plain, read_only, transactional
from asgi_db.readiness import Readiness
from asgi_db.session import DBSession
from asgi_db.settings import PoolProfile, create_database_url, uuid4_str

__all__ = [
    "ConcurrentUseError",
    "ConfigurationError",
    "DBSession",
    "DBSessionMiddleware",
    "Database",
    "DatabaseBusyError",
    "DatabaseDownError",
    "DatabaseTimeoutError",
    "FailedTransactionError",
    "MissingMiddlewareError",
    "Mode",
    "ModeConflictError",
    "OutcomeUnknownError",
    "PoolProfile",
    "ReadOnlyError",
    "Readiness",
    "SandboxError",
    "SessionExpiredError",
    "UnavailableError",
    "UncommittedWorkError",
    "by_method",
    "create_database_url",
    "plain",
    "read_only",
    "session_of",
    "transactional",
    "uuid4_str",
]
