"""What is held, at the pool and at the server, in each step of what takes long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import pytest
from sqlalchemy import event, func, insert, inspect, select, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import selectinload

from asgi_db import (
    Database,
    DBSession,
    DBSessionMiddleware,
    Mode,
    plain,
    read_only,
    transactional,
)
from asgi_db.types import Message, Receive, Scope, Send
from tests.contract.apps import FRAMEWORKS, InStarlette
from tests.contract.client import call
from tests.contract.endpoints import Answer, Framework
from tests.contract.site import Item, Site, write
from tests.pools import checked_out
from tests.relay import Relay
from tests.servers import outside, server_connections
from tests.sockets import websocket
from tests.tables import Author, Base, Book, authors

MODES = {
    "plain": plain,
    "transactional": transactional,
    "read_only": read_only,
    "snapshot": read_only(snapshot=True),
}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)

NOTE = select(Item.note)

HELD = 1, ["idle in transaction"]
FREE = 0, list[str]()


def held_after_a_statement(mode: Mode) -> tuple[int, list[str]]:
    """In `read_only` each statement gives its connection back."""
    return FREE if mode is read_only else HELD


@dataclass
class Ledger:
    """What was held in each step: connections out of the pool, and what the server sees of them."""

    site: Site
    steps: list[tuple[str, tuple[int, list[str]]]] = field(
        default_factory=list[tuple[str, tuple[int, list[str]]]]
    )

    async def look(self, step: str) -> None:
        """Write down how things stand."""
        connections = await server_connections(self.site.url)
        busy = [connection.state for connection in connections if connection.state != "idle"]
        self.steps.append((step, (self.site.checked_out, busy)))

    async def watch(self, message: Message) -> None:
        """Look when a piece of the response leaves."""
        if message["type"] == "http.response.start":
            await self.look("the status line leaves")
        elif body := message.get("body"):
            await self.look(f"{body.decode()} leaves")


PLACES = [*((framework, "postgresql") for framework in FRAMEWORKS), (InStarlette(), "mysql")]


@pytest.fixture(params=PLACES, ids=lambda place: f"{place[0].name}-{place[1]}")
async def ledger(request: pytest.FixtureRequest) -> AsyncIterator[Ledger]:
    """Every framework on PostgreSQL, and one on MariaDB; with one connection and one item."""
    framework: Framework
    framework, server = request.param
    url: str = request.getfixturevalue(f"module_{server}_url")
    async with Site.on(framework, url) as site:
        await site.from_outside("INSERT INTO item (name, note) VALUES ('a', 'loaded')")
        yield Ledger(site)
        await site.assert_nothing_held()


# -- a slow service between two reads ----------------------------------------------------------


@each_mode
@pytest.mark.parametrize("releases", [False, True], ids=["kept", "released"])
async def test_what_a_request_holds_around_a_call_of_a_slow_service(
    ledger: Ledger, mode: Mode, releases: bool
) -> None:
    async def order(session: DBSession) -> None:
        await ledger.look("at the beginning")
        await session.scalar(NOTE)
        await ledger.look("after the first read")
        if releases:
            await session.release()
        await ledger.look("in the slow service")
        await session.scalar(NOTE)
        await ledger.look("after the second read")

    app = ledger.site.app(order, mode)
    assert (await ledger.site.call(app, watch=ledger.watch)).status == 200
    after_a_read = held_after_a_statement(mode)
    assert ledger.steps == [
        ("at the beginning", FREE),
        ("after the first read", after_a_read),
        ("in the slow service", FREE if releases else after_a_read),
        ("after the second read", after_a_read),
        ("the status line leaves", FREE),
        ("done leaves", FREE),
    ]


@pytest.mark.parametrize("releases", [False, True], ids=["kept", "released"])
async def test_while_a_released_request_waits_another_one_has_its_connection(
    ledger: Ledger, releases: bool
) -> None:
    """The pool has one. A request that kept it lets the other one wait until it is done."""
    site = ledger.site
    in_service, service = asyncio.Event(), asyncio.Event()

    async def slow(session: DBSession) -> None:
        await session.scalar(NOTE)
        if releases:
            await session.release()
        in_service.set()
        await service.wait()
        await write(name="slow")(session)

    app = site.app({"/slow": slow, "/quick": write(name="quick")}, transactional)
    slowly = asyncio.create_task(call(app, "/slow"))
    await in_service.wait()
    quickly = asyncio.create_task(call(app, "/quick"))
    if releases:
        assert (await quickly).status == 200
        assert await site.items() == ["a", "quick"]
    else:
        await asyncio.wait((quickly,), timeout=0.1)
        assert not quickly.done()
    service.set()
    assert (await slowly).status == (await quickly).status == 200
    assert await site.items() == ["a", "quick", "slow"]


# -- a stream ----------------------------------------------------------------------------------


@each_mode
async def test_what_a_stream_holds_that_queries_between_its_chunks(
    ledger: Ledger, mode: Mode
) -> None:
    async def export(session: DBSession) -> Answer:
        async def chunks() -> AsyncIterator[bytes]:
            for chunk in "one", "two":
                await ledger.look(f"before the query of {chunk}")
                await session.scalar(NOTE)
                await ledger.look(f"after the query of {chunk}")
                yield chunk.encode()

        await session.scalar(NOTE)
        await ledger.look("in the endpoint")
        return Answer(stream=chunks)

    app = ledger.site.app(export, mode)
    exchange = await ledger.site.call(app, watch=ledger.watch)
    assert (exchange.status, exchange.body, exchange.complete) == (200, b"onetwo", True)
    after_a_read = held_after_a_statement(mode)
    assert ledger.steps == [
        ("in the endpoint", after_a_read),
        ("the status line leaves", FREE),
        ("before the query of one", FREE),
        ("after the query of one", after_a_read),
        ("one leaves", FREE),
        ("before the query of two", FREE),
        ("after the query of two", after_a_read),
        ("two leaves", FREE),
    ]


async def test_a_stream_may_release_between_its_query_and_something_slow(ledger: Ledger) -> None:
    async def export(session: DBSession) -> Answer:
        async def chunks() -> AsyncIterator[bytes]:
            item = (await session.scalars(select(Item))).one()
            await ledger.look("after the query")
            await session.release()
            await ledger.look("in something slow")
            yield str(item.note).encode()

        return Answer(stream=chunks)

    app = ledger.site.app(export, plain)
    exchange = await ledger.site.call(app, watch=ledger.watch)
    assert (exchange.body, exchange.complete) == (b"loaded", True)
    assert ledger.steps == [
        ("the status line leaves", FREE),
        ("after the query", HELD),
        ("in something slow", FREE),
        ("loaded leaves", FREE),
    ]


async def test_a_cursor_that_would_have_to_outlive_a_chunk_is_an_error_and_no_shorter_download(
    ledger: Ledger,
) -> None:
    await ledger.site.from_outside("INSERT INTO item (name) VALUES ('b'), ('c')")

    async def export(session: DBSession) -> Answer:
        async def chunks() -> AsyncIterator[bytes]:
            async for name in await session.stream_scalars(select(Item.name)):
                yield name.encode()

        return Answer(stream=chunks)

    app = ledger.site.app(export, read_only(snapshot=True))
    exchange = await ledger.site.call(app)
    assert (exchange.status, exchange.body, exchange.complete) == (200, b"a", False)
    assert exchange.was_caused_by(InvalidRequestError)


async def test_a_stream_with_a_session_of_its_own_holds_that_one_for_the_whole_download(
    ledger: Ledger,
) -> None:
    """It is what a cursor over many rows takes; so it is asked for by name."""
    site = ledger.site
    await site.from_outside("INSERT INTO item (name) VALUES ('b')")

    async def export(session: DBSession) -> Answer:
        async def chunks() -> AsyncIterator[bytes]:
            async with site.database.session(read_only(snapshot=True)) as own:
                names = select(Item.name).order_by(Item.name)
                async for name in await own.stream_scalars(names):
                    yield name.encode()
            await ledger.look("after the block")

        return Answer(stream=chunks)

    exchange = await site.call(site.app(export, plain), watch=ledger.watch)
    assert (exchange.body, exchange.complete) == (b"ab", True)
    assert ledger.steps == [
        ("the status line leaves", FREE),
        ("a leaves", HELD),
        ("b leaves", HELD),
        ("after the block", FREE),
    ]


# -- a background task -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [plain, transactional], ids=lambda mode: mode.name)
async def test_what_a_background_task_holds_that_writes(ledger: Ledger, mode: Mode) -> None:
    async def order(session: DBSession) -> Answer:
        async def later() -> None:
            await ledger.look("in the background")
            await write(name="b")(session)
            await session.flush()
            await ledger.look("after its write")
            await session.commit()
            await ledger.look("after its commit")
            await session.scalar(NOTE)
            await ledger.look("after its read")
            await session.release()
            await ledger.look("after its release")
            await write(name="c")(session)

        await session.scalar(NOTE)
        return Answer(background=later)

    app = ledger.site.app(order, mode)
    exchange = await ledger.site.call(app, watch=ledger.watch)
    assert (exchange.body, exchange.complete) == (b"done", True)
    assert ledger.steps == [
        ("the status line leaves", FREE),
        ("done leaves", FREE),
        ("in the background", FREE),
        ("after its write", HELD),
        ("after its commit", FREE),
        ("after its read", HELD),
        ("after its release", FREE),
    ]
    assert await ledger.site.items() == ["a", "b", *(["c"] if mode is transactional else [])]


# -- objects after release() -------------------------------------------------------------------


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with ada_with_two_books(database_url) as database:
        yield database


@asynccontextmanager
async def ada_with_two_books(url: str) -> AsyncGenerator[Database, None]:
    """A database with one connection, which nobody holds at the end."""
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}
    async with Database(url, engine_options=options) as database:
        await database.create_tables(Base.metadata)
        async with database.transaction() as session:
            books = [Book(title="Notes"), Book(title="Sketch")]
            session.add(Author(name="ada", books=books))
        yield database
        assert checked_out(database) == 0


def counting(database: Database) -> Callable[[], int]:
    """How many statements have been sent since."""
    statements: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    event.listen(database.engine.sync_engine, "before_cursor_execute", note)
    return lambda: len(statements)


@each_mode
async def test_what_was_loaded_is_read_after_release_without_a_statement(
    database: Database, mode: Mode
) -> None:
    async with database.session(mode) as session:
        ada = await session.get_one(Author, 1, options=[selectinload(Author.books)])
        await session.release()
        sent = counting(database)
        assert ada.name == "ada"
        assert sorted(book.title for book in ada.books) == ["Notes", "Sketch"]
        assert ada.books[0].author is ada
        assert await session.get(Author, 1) is ada
        assert (sent(), checked_out(database)) == (0, 0)
        assert not inspect(ada).expired_attributes
        assert ada in session


@each_mode
async def test_a_lazy_load_after_release_begins_a_new_unit(database: Database, mode: Mode) -> None:
    async with database.session(mode) as session:
        ada = await session.get_one(Author, 1)
        await session.release()
        assert checked_out(database) == 0
        books = await ada.awaitable_attrs.books
        assert sorted(book.title for book in books) == ["Notes", "Sketch"]
        await asyncio.sleep(0)
        assert checked_out(database) == (0 if mode is read_only else 1)
        await session.release()
        assert checked_out(database) == 0
        assert books[0].author is ada


async def test_what_is_changed_added_and_deleted_after_release_is_committed(
    database: Database, database_url: str
) -> None:
    async with database.transaction() as session:
        ada = await session.get_one(Author, 1, options=[selectinload(Author.books)])
        await session.release()
        ada.name = "countess"
        ada.books.append(Book(title="Letters"))
        session.add(Author(name="grace"))
        await session.delete(next(book for book in ada.books if book.title == "Sketch"))
        assert checked_out(database) == 0
        await session.release()  # once more, with all that in hand
        assert checked_out(database) == 0
    assert await authors(database_url) == ["countess", "grace"]
    async with outside(database_url) as witness:
        titles = await witness.execute("SELECT title FROM book ORDER BY 1")
    assert titles == [("Letters",), ("Notes",)]


@each_mode
async def test_what_others_have_changed_meanwhile_is_seen_after_a_refresh(
    database: Database, database_url: str, mode: Mode
) -> None:
    """An object stays as it was loaded; a new statement sees what is there now."""
    async with database.session(mode) as session:
        ada = await session.get_one(Author, 1)
        await session.release()
        async with outside(database_url) as other:
            await other.execute("UPDATE author SET name = 'countess'")
        assert ada.name == "ada"
        assert await session.scalar(select(func.max(Author.name))) == "countess"
        assert ada.name == "ada"
        await session.refresh(ada)
        assert ada.name == "countess"


# -- what release() has kept -------------------------------------------------------------------


async def test_a_rollback_after_release_undoes_what_the_session_has_kept(
    database: Database, database_url: str
) -> None:
    """It is in no transaction, of which a ROLLBACK could be sent."""
    async with database.transaction() as session:
        ada = await session.get_one(Author, 1)
        ada.name = "countess"
        session.add(Author(name="order"))
        await session.release()
        await session.rollback()
        session.add(Author(name="grace"))
    assert await authors(database_url) == ["ada", "grace"]


async def test_a_message_of_a_socket_that_fails_after_release_leaves_nothing_to_the_next(
    database: Database, database_url: str
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session: DBSession = scope["state"]["db"]
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            name: str = message["text"]
            try:
                await session.execute(text("SELECT 1"))
                session.add(Author(name=name))
                if name == "bad":
                    await session.release()
                    raise LookupError
                await send({"type": "websocket.send", "text": "ok"})
            except LookupError:
                await send({"type": "websocket.send", "text": "refused"})

    async with websocket(DBSessionMiddleware(app, database, mode=transactional)) as socket:
        assert await socket.ask("bad") == "refused"
        assert await socket.ask("good") == "ok"
    assert await authors(database_url) == ["ada", "good"]


async def test_a_release_whose_connection_is_lost_keeps_what_is_to_be_written(
    server_url: str,
) -> None:
    """As after a restart: nothing was sent on it, so the next one takes it all."""

    async def order(scope: Scope, receive: Receive, send: Send) -> None:
        session: DBSession = scope["state"]["db"]
        ada = await session.get_one(Author, 1)
        session.add(Author(name="new"))
        relay.cut()
        await session.release()
        ada.name = "countess"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    async with Relay(server_url) as relay, ada_with_two_books(relay.url) as database:
        exchange = await call(DBSessionMiddleware(order, database, mode=transactional))
        assert (exchange.status, exchange.error) == (200, None)
        assert await authors(server_url) == ["countess", "new"]


async def test_a_release_that_is_cancelled_keeps_what_is_to_be_written(
    database: Database, database_url: str
) -> None:
    async with database.transaction() as session:
        await session.execute(text("SELECT 1"))
        session.add(Author(name="order"))
        with anyio.move_on_after(0) as scope:
            await session.release()
            await anyio.sleep_forever()  # the slow service
        assert scope.cancelled_caught
    assert await authors(database_url) == ["ada", "order"]


CUT_OFF = [
    ("postgresql", "release"),
    ("postgresql", "commit"),
    ("postgresql", "rollback"),
    ("postgresql", "close"),
    ("mysql", "release"),
    ("mysql", "commit"),
]


SEEMS_NOT_TO_END = "result object is closed|outside of a transaction|cursor .* does not exist"


@pytest.mark.parametrize(("server", "how"), CUT_OFF)
async def test_a_stream_that_is_cut_off_does_not_seem_to_be_at_its_end(
    request: pytest.FixtureRequest, server: str, how: str
) -> None:
    url: str = request.getfixturevalue(f"{server}_url")
    names: list[str] = []
    async with ada_with_two_books(url) as database:
        async with database.transaction() as session:
            many = [{"name": f"{number:04}"} for number in range(500)]
            await session.execute(insert(Author), many)
        with pytest.raises(Exception, match=SEEMS_NOT_TO_END):
            async with database.session(read_only(snapshot=True)) as session:
                few = select(Author.name).execution_options(yield_per=10)
                async for name in await session.stream_scalars(few):
                    names.append(name)
                    if len(names) == 1:
                        await getattr(session, how)()
        assert len(names) < 501
