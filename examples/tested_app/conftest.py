"""What the tests share: the tables, made once, and a sandbox around each test."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from asgi_db import Database
from tested_app.guestbook import Base, app, database


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """SQLAlchemy runs on asyncio alone."""
    return "asyncio"


@pytest.fixture(scope="session")
def asgi_db_database() -> Database:
    async def create_tables() -> None:
        async with database:
            await database.create_tables(Base.metadata)

    asyncio.run(create_tables())
    return database


@pytest.fixture(autouse=True)
def in_a_sandbox(sandbox: object) -> None:
    """Each test, whatever it uses."""


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
