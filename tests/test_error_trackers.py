"""What a tracker of errors is told, which makes an event of each line at ERROR and of each error.

The module here has Sentry's names; `tests/ecosystem/test_sentry_sdk.py` runs with Sentry itself.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError

from asgi_db import Database
from tests.pools import checked_out, one_connection
from tests.servers import outside, running_statement
from tests.tables import Author, Base, Child

Processor = Callable[[object, object], object]


class Scope:
    def __init__(self) -> None:
        self.processors: list[Processor] = []

    def add_event_processor(self, processor: Processor) -> None:
        self.processors.append(processor)


class Tracker(logging.Handler):
    """Notes the lines at ERROR which no processor of the scope has dropped."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.events: list[str] = []
        self._scopes: list[Scope] = []

    @contextmanager
    def new_scope(self) -> Generator[Scope]:
        self._scopes.append(Scope())
        yield self._scopes[-1]
        self._scopes.pop()

    def emit(self, record: logging.LogRecord) -> None:
        for scope in self._scopes:
            if any(processor({}, {}) is None for processor in scope.processors):
                return
        self.events.append(record.getMessage())


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tracker]:
    tracker = Tracker()
    module = ModuleType("sentry_sdk")
    module.__dict__["new_scope"] = tracker.new_scope
    monkeypatch.setitem(sys.modules, "sentry_sdk", module)
    logging.getLogger("asgi_db").addHandler(tracker)
    yield tracker
    logging.getLogger("asgi_db").removeHandler(tracker)


async def test_a_failed_commit_that_the_caller_gets_is_no_event_of_the_log(
    sqlite_url: str, tracker: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    async with one_connection(sqlite_url) as database:
        with pytest.raises(IntegrityError):
            async with database.transaction() as session:
                session.add(Child(id=1, parent_id=77))
    assert "COMMIT failed" in caplog.text
    assert tracker.events == []


async def test_a_failed_commit_that_a_cancelled_caller_does_not_get_is_an_event(
    postgresql_url: str, tracker: Tracker
) -> None:
    async with Database(postgresql_url) as database, outside(postgresql_url) as gate:
        await database.create_tables(Base.metadata)
        await gate.execute(
            "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS"
            " $$BEGIN PERFORM pg_advisory_xact_lock(1); RAISE EXCEPTION 'no'; END$$"
        )
        await gate.execute(
            "CREATE CONSTRAINT TRIGGER fails AFTER INSERT ON author"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fail()"
        )
        await gate.execute("SELECT pg_advisory_lock(1)")

        async def write() -> None:
            async with database.transaction() as session:
                session.add(Author(name="ada"))

        writing = asyncio.create_task(write())
        await running_statement(postgresql_url, "commit")
        writing.cancel()
        await gate.execute("SELECT pg_advisory_unlock(1)")
        await asyncio.wait((writing,))
        assert writing.cancelled()
        [event] = tracker.events
        assert "COMMIT failed: DBAPIError" in event


async def test_a_tracker_that_fails_hides_no_error(
    sqlite_url: str, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Scope:
        raise LookupError("a tracker's own fault")

    monkeypatch.setitem(sys.modules["sentry_sdk"].__dict__, "new_scope", fail)
    async with one_connection(sqlite_url) as database:
        with pytest.raises(DBAPIError):
            async with database.transaction() as session:
                session.add(Child(id=1, parent_id=77))
        assert checked_out(database) == 0
    [event] = tracker.events
    assert "COMMIT failed" in event
