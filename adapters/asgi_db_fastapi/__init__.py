"""asgi-db for FastAPI: the session as a dependency.

    @app.post("/orders")
    async def create_order(session: CurrentSessionTransaction) -> None: ...

None of these dependencies has exit code that could run too late: the middleware ends the
transaction.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from fastapi import Depends
from fastapi.requests import HTTPConnection

from asgi_db import DBSession, plain, read_only, session_of, transactional

__all__ = [
    "CurrentSession",
    "CurrentSessionReadOnly",
    "CurrentSessionTransaction",
    "get_db",
    "get_db_read_only",
    "get_db_transaction",
]


async def get_db(connection: HTTPConnection) -> DBSession:
    """Return the session, in the `plain` mode: the handler commits by hand."""
    return session_of(connection.scope, plain)


async def get_db_transaction(connection: HTTPConnection) -> DBSession:
    """Return the session, in the `transactional` mode: committed before the status line."""
    return session_of(connection.scope, transactional)


async def get_db_read_only(connection: HTTPConnection) -> DBSession:
    """Return the session, in the `read_only` mode: no transaction, each read runs by itself."""
    return session_of(connection.scope, read_only)


CurrentSession: TypeAlias = Annotated[DBSession, Depends(get_db)]
"""The session in the `plain` mode, as the annotation of a parameter."""

CurrentSessionTransaction: TypeAlias = Annotated[DBSession, Depends(get_db_transaction)]
"""The session in the `transactional` mode, as the annotation of a parameter."""

CurrentSessionReadOnly: TypeAlias = Annotated[DBSession, Depends(get_db_read_only)]
"""The session in the `read_only` mode, as the annotation of a parameter."""
