"""A session serves one task at a time, and only as long as its request lasts."""

import asyncio

import pytest
from sqlalchemy import text

from asgi_db import DBSession, Mode, plain, read_only, transactional
from asgi_db.errors import ConcurrentUseError, SessionExpiredError
from tests.contract.client import call
from tests.contract.endpoints import Answer
from tests.contract.site import Site, write

MODES = [plain, transactional, read_only]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
async def test_two_tasks_at_once_on_the_session_are_an_error_every_time(
    site: Site, mode: Mode
) -> None:
    async def order(session: DBSession) -> None:
        """The second round is on a warm session, where SQLAlchemy itself lets it pass."""
        if len(errors) % 2:
            await session.execute(text("SELECT 1"))
        try:
            await asyncio.gather(
                session.execute(text("SELECT 1")), session.execute(text("SELECT 2"))
            )
        except ConcurrentUseError as error:
            errors.append(str(error))
            raise

    async def read(session: DBSession) -> Answer:
        return Answer(200, str(await session.scalar(text("SELECT 42"))).encode())

    errors: list[str] = []
    app = site.app({"/order": order, "/read": read}, mode)
    for tries in range(1, 11):
        exchange = await call(app, "/order")
        assert (exchange.status, exchange.complete) == (500, True)
        assert len(errors) == tries
        assert site.checked_out == 0
        exchange = await call(app, "/read")  # on the same connection, or its replacement
        assert (exchange.status, exchange.body) == (200, b"42")
    assert all("POST /order" in error and "one task at a time" in error for error in errors)
    await site.assert_nothing_held()


class Left:
    """Work which leaves a task behind that uses the session, or is just about to."""

    def __init__(self, *, in_a_statement: bool) -> None:
        self.in_a_statement = in_a_statement
        self.tasks: list[asyncio.Task[object]] = []

    async def __call__(self, session: DBSession) -> Answer:
        """Write, and leave the task behind."""
        await write()(session)
        await session.flush()
        self.tasks.append(asyncio.create_task(session.execute(text("SELECT 1"))))
        if self.in_a_statement:
            await asyncio.sleep(0)  # the task runs up to where it waits for the database
        return Answer(201, b"ordered")


async def test_a_request_that_ends_while_another_task_uses_its_session_is_not_acknowledged(
    site: Site,
) -> None:
    left = Left(in_a_statement=True)

    async def order(session: DBSession) -> Answer:
        return await left(session)

    handlers = {ConcurrentUseError: Answer(500, b"two tasks")}
    exchange = await site.answer(order, transactional, handlers=handlers)
    assert (exchange.status, exchange.body, exchange.complete) == (500, b"two tasks", True)
    assert left.tasks[0].done()
    assert await site.items() == []
    assert (await site.answer(write(), transactional)).status == 200
    assert await site.items() == ["a"]


async def test_a_task_that_uses_the_session_once_its_commit_has_begun_gets_the_error_itself(
    site: Site,
) -> None:
    left = Left(in_a_statement=False)

    async def order(session: DBSession) -> Answer:
        return await left(session)

    exchange = await site.answer(order, transactional)
    assert (exchange.status, exchange.body, exchange.complete) == (201, b"ordered", True)
    with pytest.raises(ConcurrentUseError, match="one task at a time"):
        await left.tasks[0]
    assert await site.items() == ["a"]


@pytest.mark.parametrize("in_a_statement", [False, True], ids=["about to use it", "in a statement"])
async def test_a_task_left_by_a_background_task_takes_no_connection_with_it(
    site: Site, in_a_statement: bool
) -> None:
    left = Left(in_a_statement=in_a_statement)

    async def order(session: DBSession) -> Answer:
        async def continue_later() -> None:
            await left(session)

        return Answer(background=continue_later)

    exchange = await site.answer(order, transactional)
    assert (exchange.status, exchange.body, exchange.complete) == (200, b"done", True)
    assert exchange.was_caused_by(ConcurrentUseError) == in_a_statement
    assert await site.items() == ([] if in_a_statement else ["a"])
    if in_a_statement:
        assert left.tasks[0].done()
    else:
        with pytest.raises(ConcurrentUseError, match="one task at a time"):
            await left.tasks[0]
    assert (await site.answer(write(name="next"), transactional)).status == 200


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
async def test_a_task_that_outlives_its_request_gets_an_error_which_says_what_to_use(
    site: Site, mode: Mode
) -> None:
    over = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def order(session: DBSession) -> None:
        await session.execute(text("SELECT 1"))

        async def outlive() -> None:
            await over.wait()
            await session.execute(text("SELECT 1"))

        tasks.append(asyncio.create_task(outlive()))

    exchange = await site.answer(order, mode)
    assert (exchange.status, exchange.body) == (200, b"done")
    over.set()
    with pytest.raises(SessionExpiredError, match=r"POST / .*database\.session\(\)"):
        await tasks[0]
    await site.assert_nothing_held()
