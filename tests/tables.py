"""The tables of the smaller tests."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

from sqlalchemy import ForeignKey, String
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from tests.servers import outside


class Base(AsyncAttrs, DeclarativeBase):
    """Tables on every database."""


class Author(Base):
    __tablename__ = "author"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), unique=True)
    books: Mapped[list[Book]] = relationship(back_populates="author")


class Book(Base):
    __tablename__ = "book"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(50))
    author_id: Mapped[int] = mapped_column(ForeignKey(Author.id))
    author: Mapped[Author] = relationship(back_populates="books")


class Deferred(DeclarativeBase):
    """Tables with a constraint that is checked at COMMIT: not on MariaDB, which has none."""


class Parent(Deferred):
    __tablename__ = "parent"

    id: Mapped[int] = mapped_column(primary_key=True)


class Child(Deferred):
    __tablename__ = "child"

    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int] = mapped_column(
        ForeignKey(Parent.id, deferrable=True, initially="DEFERRED")
    )


async def authors(url: str) -> list[str]:
    """The names which another connection sees at this moment."""
    async with outside(url) as connection:
        return [name for (name,) in await connection.execute("SELECT name FROM author ORDER BY 1")]


@asynccontextmanager
async def commits_held_back(url: str) -> AsyncGenerator[Callable[[], Awaitable[object]]]:
    """While the block lasts, the COMMIT of an author waits, until what is given is called.

    On PostgreSQL alone.
    """
    async with outside(url) as connection:
        await connection.execute("SELECT pg_advisory_lock(1)")
        await connection.execute("""
            CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END'
        """)
        await connection.execute("""
            CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON author DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION wait()
        """)
        try:
            yield lambda: connection.execute("SELECT pg_advisory_unlock(1)")
        finally:
            await connection.execute("SELECT pg_advisory_unlock_all()")
            await connection.execute("DROP FUNCTION wait CASCADE")
