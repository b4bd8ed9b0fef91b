"""asgi-db: the right database session for every ASGI request.

from asgi_db import Database, DBSessionMiddleware, transactional
"""

from __future__ import annotations

from asgi_db.asgi.call import session_of
from asgi_db.asgi.middleware import DBSessionMiddleware
from asgi_db.asgi.readiness import Readiness
from asgi_db.database import Database
from asgi_db.errors import (
    ConcurrentUseError,
    ConfigurationError,
    DatabaseBusyError,
    DatabaseConflictError,
    DatabaseDownError,
    DatabaseTimeoutError,
    FailedTransactionError,
    MissingMiddlewareError,
    ModeConflictError,
    OutcomeUnknownError,
    ReadOnlyError,
    SandboxError,
    SessionExpiredError,
    StatementTimeoutError,
    UnavailableError,
    UncommittedWorkError,
)
from asgi_db.modes import Mode, by_method, plain, read_only, transactional
from asgi_db.profiles import PoolProfile
from asgi_db.settings import create_database_url, uuid4_str
from asgi_db.unit.session import DBSession

__all__ = [
    "ConcurrentUseError",
    "ConfigurationError",
    "DBSession",
    "DBSessionMiddleware",
    "Database",
    "DatabaseBusyError",
    "DatabaseConflictError",
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
    "StatementTimeoutError",
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
