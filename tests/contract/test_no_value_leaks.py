"""No parameter, password or row value stands in the log, in an error of ours, or in an answer."""

import functools
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import String, TypeDecorator, bindparam, event, insert, select, text
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import DBAPIError, SQLAlchemyError, StatementError

from asgi_db import Database, DBSession, read_only, transactional
from tests.contract.endpoints import Answer, Work
from tests.contract.site import Item, Site

SECRET = "a1-secret-value"


class Refused(TypeDecorator[str]):
    """A type of the user's own, whose error repeats the value, as those of Python do."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        raise ValueError(f"{value} is none")


async def there(session: DBSession) -> None:
    """Have the item there before."""
    await session.execute(insert(Item).values(name=SECRET))
    await session.commit()
    session.expunge_all()


async def flush_in_the_commit(session: DBSession) -> None:
    await there(session)
    session.add(Item(name=SECRET))


async def swallowed_flush(session: DBSession) -> None:
    await there(session)
    session.add(Item(name=SECRET))
    with suppress(DBAPIError):
        await session.flush()


async def swallowed_statement(session: DBSession) -> None:
    await there(session)
    with suppress(DBAPIError):
        await session.execute(insert(Item).values(name=SECRET))


async def commit_by_hand(session: DBSession) -> None:
    await there(session)
    session.add(Item(name=SECRET))
    await session.commit()


async def value_that_a_type_refuses(session: DBSession) -> None:
    """SQLAlchemy's error for a value that is not sent: the session commits nothing then."""
    with suppress(StatementError):
        await session.execute(
            select(Item.name).where(Item.note == bindparam("it", SECRET, Refused))
        )
    await flush_in_the_commit(session)


async def failed_listener(session: DBSession) -> None:
    """The application's own check before COMMIT, which says what it did not like."""

    def check(_: Any) -> None:
        raise ValueError(SECRET)

    session.add(Item(name="b"))
    event.listen(session.sync_session, "before_commit", check, once=True)


async def hook_that_writes_it_again(session: DBSession) -> None:
    async def again() -> None:
        await session.execute(insert(Item).values(name=SECRET))

    session.on_commit(again)
    await session.execute(insert(Item).values(name=SECRET))


async def hook_with_an_argument(session: DBSession) -> None:
    def mail(_: str) -> None:
        raise LookupError("no mail today")

    session.on_commit(functools.partial(mail, SECRET))
    session.add(Item(name="b"))


WORKS: list[Work] = [
    flush_in_the_commit,
    swallowed_flush,
    swallowed_statement,
    commit_by_hand,
    value_that_a_type_refuses,
    failed_listener,
    hook_that_writes_it_again,
    hook_with_an_argument,
]


@contextmanager
def log(caplog: pytest.LogCaptureFixture) -> Generator[list[str]]:
    """What the library logs, tracebacks included."""
    lines = list[str]()
    yield lines
    lines += [
        caplog.handler.format(record) for record in caplog.records if record.name == "asgi_db"
    ]


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.__name__)
async def test_what_fails_is_logged_without_its_values(
    site: Site, work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    with log(caplog) as lines:
        exchange = await site.answer(work, transactional)
    assert lines or work is commit_by_hand
    assert SECRET not in "\n".join(lines)
    assert SECRET.encode() not in exchange.body
    assert all(SECRET not in str(error) for error in _ours(exchange.error))


def _ours(error: BaseException | None) -> list[BaseException]:
    found = list[BaseException]()
    while error is not None:
        if type(error).__module__.startswith("asgi_db"):
            found.append(error)
        error = error.__cause__ or error.__context__
    return found


async def test_the_traceback_of_a_failed_hook_names_its_lines(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    with log(caplog) as lines:
        await site.answer(hook_that_writes_it_again, transactional)
    (line,) = [line for line in lines if "hook failed" in line]
    assert "in again" in line and "await session.execute(insert(Item)" in line
    assert "IntegrityError" in line


@pytest.mark.parametrize("quote", ["'", '"'])
async def test_a_refused_statement_is_quoted_without_its_literals(site: Site, quote: str) -> None:
    """On MySQL double quotes are those of a string too, elsewhere of a name."""
    if quote == '"' and "mysql" not in site.url:
        return

    async def write(session: DBSession) -> Answer:
        statement = text(f"UPDATE item SET note = {quote}{SECRET}{quote}, name = 4711")
        with pytest.raises(SQLAlchemyError) as caught:
            await session.execute(statement)
        assert "UPDATE item SET note =" in str(caught.value)
        return Answer(200, str(caught.value).encode())

    exchange = await site.answer(write, read_only)
    assert exchange.status == 200
    assert SECRET.encode() not in exchange.body
    assert b"4711" not in exchange.body


async def test_errors_of_sqlalchemy_hide_the_parameters_unless_the_user_shows_them(
    site: Site,
) -> None:
    assert await _text_of_error(site.database) == (False, True)
    options = {"hide_parameters": False}
    async with Database(site.url, engine_options=options) as open_minded:
        assert await _text_of_error(open_minded) == (True, False)


async def _text_of_error(database: Database) -> tuple[bool, bool]:
    """Whether the text of an error has the parameter, and whether it says that it is hidden."""
    async with database.session() as session:
        with pytest.raises(DBAPIError) as caught:
            await session.execute(text("SELECT :it FROM no_such_table"), {"it": SECRET})
    return SECRET in str(caught.value), "parameters hidden" in str(caught.value)
