"""PgBouncer in transaction pooling: a transaction may run on any of the server's connections."""

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal, TypeAlias

import asyncpg
import pytest
from sqlalchemy import func, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError

from asgi_db import (
    Database,
    DatabaseTimeoutError,
    DBSession,
    DBSessionMiddleware,
    Mode,
    UnavailableError,
    plain,
    read_only,
    transactional,
)
from asgi_db.types import Receive, Scope, Send
from tests.contract.client import call
from tests.limits import set_limits
from tests.pgbouncer import pgbouncer, through
from tests.servers import (
    DatabaseServer,
    assert_disconnected,
    assert_idle,
    outside,
    run,
    server_connections,
)
from tests.tables import Author, Base, authors

Raw: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

MODES: dict[str, Mode] = {
    "plain": plain,
    "transactional": transactional,
    "read_only": read_only,
    "snapshot": read_only(snapshot=True),
    "serializable": transactional(isolation="SERIALIZABLE"),
    "deferrable": transactional(isolation="SERIALIZABLE", read_only=True, deferrable=True),
}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)

BACKEND = text("SELECT pg_backend_pid()")
SERVER_POOL = 3


@pytest.fixture(scope="module")
def port(postgresql_server: DatabaseServer) -> Iterator[int]:
    """The port of a PgBouncer whose clients share three connections for each database."""
    with pgbouncer(postgresql_server.url, pool_size=SERVER_POOL) as port:
        yield port


@pytest.fixture
def url(postgresql_url: str) -> str:
    """A database with tables, without the pooler in between."""

    async def create_tables() -> None:
        async with Database(postgresql_url) as database:
            await database.create_tables(Base.metadata)

    run(create_tables())
    return postgresql_url


def database_through(
    port: int, url: str, pooler: Literal["transaction"] | None = "transaction"
) -> Database:
    """The database behind the pooler, with no more connections of its own than it has clients."""
    options = {"pool_size": 5, "max_overflow": 0, "pool_timeout": 20}
    return Database(through(port, url), pooler=pooler, engine_options=options)


@asynccontextmanager
async def raw(url: str) -> AsyncGenerator[Raw]:
    """Another client, straight through the driver, which keeps no prepared statements."""
    dsn = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(dsn, statement_cache_size=0)
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def in_transaction(port: int, url: str) -> AsyncGenerator[Raw]:
    """Another client, which has the server's connection that was used last for itself."""
    async with raw(through(port, url)) as connection, connection.transaction():
        yield connection


# -- several processes -------------------------------------------------------------------------


async def work(session: DBSession, mode: str, number: int) -> bool:
    """Statements whose text, types and results depend on the number; whether all were right."""
    right = True
    wanted: int | str
    for step in range(3):
        match (number + step) % 3:
            case 0:
                sql, wanted = f"SELECT CAST(:n AS integer) + {number % 7}", number + number % 7
                found = await session.scalar(text(sql), {"n": number})
            case 1:
                sql, wanted = f"SELECT 'x{number % 5}' || :n", f"x{number % 5}{number}"
                found = await session.scalar(text(sql), {"n": str(number)})
            case _:
                sql, wanted = "SELECT upper(:a) || CAST(:n AS integer)", f"AB{number}"
                found = await session.scalar(text(sql), {"a": "ab", "n": number})
        right = right and found == wanted
    if not MODES[mode].read_only:
        session.add(Author(id=number, name=f"{mode} {number}"))
    if mode == "plain":
        await session.commit()
    return right


async def be_a_client(url: str, first: str, requests: str) -> None:
    """Serve requests in every mode, eight at a time, and print how they were answered."""
    async with Database(url, pooler="transaction", engine_options={"pool_size": 8}) as database:

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            _, mode, number = scope["path"].split("/")
            right = await work(scope["state"]["db"], mode, int(number))
            status = 200 if right else 418
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body"})

        served = DBSessionMiddleware(
            app, database=database, mode=lambda scope: MODES[scope["path"].split("/")[1]]
        )
        answers: Counter[str] = Counter()
        numbers = iter(range(int(first), int(first) + int(requests)))

        async def ask() -> None:
            for number in numbers:
                mode = list(MODES)[number % len(MODES)]
                answer = await call(served, f"/{mode}/{number}")
                answers[f"{mode} {answer.status} {answer.error or ''}"] += 1

        await asyncio.gather(*(ask() for _ in range(8)))
    print(json.dumps(answers))


_CLIENT = """
import asyncio, sys
sys.path.append(sys.argv[1])
from tests.test_pgbouncer import be_a_client
asyncio.run(be_a_client(*sys.argv[2:]))
"""


def test_the_requests_of_three_processes_are_all_answered_rightly_in_every_mode(
    port: int, url: str
) -> None:
    """360 requests on 3 connections of the server, and each has its own result."""
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-P", "-c", _CLIENT, root, through(port, url)]
    clients = [
        subprocess.Popen([*command, str(first), "120"], stdout=subprocess.PIPE, text=True)
        for first in (1_000, 2_000, 3_000)
    ]
    answers: Counter[str] = Counter()
    for client in clients:
        answers.update(json.loads(client.communicate()[0]))
    assert answers == {f"{mode} 200 ": 60 for mode in MODES}
    assert len(run(authors(url))) == 3 * 60
    assert len(run(server_connections(url))) <= SERVER_POOL
    run(assert_idle(url))


# -- one process -------------------------------------------------------------------------------


@each_mode
async def test_a_transaction_may_run_where_none_of_its_statements_was_seen_before(
    port: int, url: str, mode: Mode
) -> None:
    async with database_through(port, url) as database:
        async with database.session(mode) as session:
            before = await session.scalar(BACKEND)
        async with in_transaction(port, url) as other:
            assert await other.fetchval("SELECT pg_backend_pid()") == before
            async with database.session(mode) as session:
                assert await session.scalar(BACKEND) != before
                assert await session.scalar(select(func.count(Author.id))) == 0


@each_mode
async def test_statements_of_the_same_name_by_other_clients_do_no_harm(
    port: int, url: str, mode: Mode
) -> None:
    async with database_through(port, url) as database:
        async with raw(through(port, url)) as other:
            for name in await names_to_come(url):
                await other.execute(f'PREPARE "{name}" AS SELECT $1 || $2')
        for number in range(3):
            async with database.session(mode) as session:
                found = await session.scalar(text("SELECT CAST(:n AS integer)"), {"n": number})
                assert found == number


async def test_each_transaction_begins_as_its_mode_says_and_leaves_nothing_to_the_next(
    postgresql_server: DatabaseServer, url: str
) -> None:
    """All on one connection of the server."""
    characteristics = text(
        "SELECT current_setting('transaction_isolation'),"
        " current_setting('transaction_read_only'), current_setting('transaction_deferrable')"
    )
    usual = "read committed", "off", "off"
    with pgbouncer(postgresql_server.url, pool_size=1) as port:
        async with database_through(port, url) as database, raw(through(port, url)) as other:
            for mode, expected in {
                "plain": usual,
                "transactional": usual,
                "read_only": usual,
                "snapshot": ("repeatable read", "on", "off"),
                "serializable": ("serializable", "off", "off"),
                "deferrable": ("serializable", "on", "on"),
            }.items():
                async with database.session(MODES[mode]) as session:
                    found = (await session.execute(characteristics)).one()
                    assert tuple(found) == expected, mode
                assert tuple(await other.fetchrow(str(characteristics)) or ()) == usual, mode


async def test_a_snapshot_keeps_its_connection_and_its_view_until_its_end(
    port: int, url: str
) -> None:
    count = select(func.count(Author.id))
    async with database_through(port, url) as database:
        async with database.session(read_only(snapshot=True)) as session:
            assert await session.scalar(count) == 0
            async with database.transaction() as writing:
                writing.add(Author(name="ada"))
            assert await authors(url) == ["ada"]
            assert await session.scalar(count) == 0
            states = [connection.state for connection in await server_connections(url)]
            assert sorted(states) == ["idle", "idle in transaction"]
        await assert_idle(url)


async def test_between_statements_of_read_only_another_client_has_the_one_connection(
    postgresql_server: DatabaseServer, url: str
) -> None:
    with pgbouncer(postgresql_server.url, pool_size=1) as port:
        async with database_through(port, url) as database:
            async with database.session(read_only) as one, database.session(read_only) as other:
                assert await one.scalar(BACKEND) == await other.scalar(BACKEND)
                async with database.transaction() as writing:
                    writing.add(Author(name="ada"))
                for session in one, other, one:
                    assert await session.scalar(select(Author.name)) == "ada"


async def test_a_failed_commit_and_a_failed_statement_are_what_they_are_without_a_pooler(
    port: int, url: str
) -> None:
    async with database_through(port, url) as database:
        with pytest.raises(IntegrityError):
            async with database.transaction() as session:
                session.add_all([Author(name="ada"), Author(name="ada")])
        async with database.transaction() as session:
            session.add(Author(name="grace"))
            with pytest.raises(IntegrityError):
                async with session.begin_nested():
                    session.add(Author(name="grace"))
        await database.ping()
        assert await authors(url) == ["grace"]
        await assert_idle(url)


# -- what was cut off --------------------------------------------------------------------------


async def active(url: str) -> int:
    """How many of our sleeping queries the server is working at."""
    found = await server_connections(url)
    return sum(each.state == "active" and "pg_sleep" in each.query for each in found)


async def until_active(url: str, number: int) -> None:
    """Wait until the server is working at so many queries."""
    async with asyncio.timeout(10):
        while True:
            if await active(url) >= number:
                return
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("mode", [plain, transactional, read_only], ids=lambda mode: mode.name)
async def test_abandoned_queries_are_ended_behind_the_pooler_too(
    port: int, url: str, mode: Mode
) -> None:
    """More of them than the pooler has connections; and it lives on."""

    async def sleep(database: Database) -> None:
        async with database.session(mode) as session:
            if mode is transactional:
                await session.execute(text("INSERT INTO author (name) VALUES ('half')"))
            await session.execute(text("SELECT pg_sleep(60)"))

    async with database_through(port, url) as database:
        tasks = [asyncio.create_task(sleep(database)) for _ in range(5)]
        await until_active(url, 1 if mode is transactional else SERVER_POOL)
        for task in tasks:
            task.cancel()
            task.cancel()
        await asyncio.wait(tasks)
        await assert_idle(url)
        for _ in range(5):
            async with database.session(mode) as session:
                assert await session.scalar(select(func.count(Author.id))) == 0
    assert await active(url) == 0


async def test_a_timeout_ends_the_query_behind_the_pooler_too(port: int, url: str) -> None:
    async with database_through(port, url) as database:
        with pytest.raises(DatabaseTimeoutError):
            async with database.session(plain(timeout=0.3)) as session:
                await session.execute(text("SELECT pg_sleep(60)"))
        await assert_idle(url)
        await database.ping()


@pytest.mark.parametrize("cancelled", [True, False])
async def test_no_query_runs_on_after_the_database_was_disposed_and_the_pooler_lives_on(
    postgresql_server: DatabaseServer,
    url: str,
    cancelled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PgBouncer 1.18 dies of a cancel request that is cut off itself; not each time, so often."""
    set_limits(monkeypatch, dispose=0.1)

    async def sleep(database: Database) -> None:
        async with database.session() as session:
            await session.execute(text("SELECT pg_sleep(60)"))

    with pgbouncer(postgresql_server.url, pool_size=SERVER_POOL) as port:
        for _ in range(8):
            async with database_through(port, url) as database:
                task = asyncio.create_task(sleep(database))
                await until_active(url, 1)
                if cancelled:
                    task.cancel()
            await assert_idle(url)
            with pytest.raises(asyncio.CancelledError if cancelled else DBAPIError):
                await task


# -- a pooler that cannot serve ----------------------------------------------------------------


async def test_a_pooler_without_a_free_connection_is_unavailable_and_then_serves_again(
    postgresql_server: DatabaseServer, url: str
) -> None:
    with pgbouncer(postgresql_server.url, pool_size=1, query_wait_timeout=1) as port:
        async with database_through(port, url) as database:
            await database.ping()
            async with in_transaction(port, url):
                with pytest.raises(UnavailableError):  # on a connection of the pool
                    async with database.session() as session:
                        await session.execute(text("SELECT 1"))
                with pytest.raises(UnavailableError):  # on a new one
                    async with database.session() as session:
                        await session.execute(text("SELECT 1"))
            async with database.session() as session:
                assert await session.scalar(text("SELECT 1")) == 1


# -- without the setting -----------------------------------------------------------------------


async def names_to_come(url: str) -> list[str]:
    """The names which asyncpg will give to its next prepared statements; it counts per process."""
    async with outside(url) as probe:
        await probe.execute("SELECT 1")
        ((name,),) = await probe.execute(
            "SELECT name FROM pg_prepared_statements ORDER BY prepare_time DESC LIMIT 1"
        )
    last = int(name.removeprefix("__asyncpg_stmt_").removesuffix("__"), base=16)
    return [f"__asyncpg_stmt_{number:x}__" for number in range(last + 1, last + 30)]


def assert_names_the_setting(error: BaseException, cause: type[Exception]) -> None:
    """The message says what to do, and the driver's own error is not lost."""
    assert 'pooler="transaction"' in str(error)
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, cause):
        seen = seen.__cause__ or seen.__context__
    assert seen is not None, f"{cause.__name__} is not where {error!r} came from"


@pytest.mark.asyncpg
@each_mode
async def test_without_the_setting_a_statement_that_is_elsewhere_is_an_error_that_names_it(
    port: int, url: str, mode: Mode
) -> None:
    async with database_through(port, url, pooler=None) as database:
        async with database.session(mode) as session:
            await session.execute(BACKEND)
        async with in_transaction(port, url):
            with pytest.raises(Exception) as caught:
                async with database.session(mode) as session:
                    await session.execute(BACKEND)
        assert_names_the_setting(caught.value, asyncpg.InvalidSQLStatementNameError)


@pytest.mark.asyncpg
@pytest.mark.parametrize("first", [True, False], ids=["the first connection", "a later statement"])
async def test_without_the_setting_a_name_that_is_taken_is_an_error_that_names_it(
    port: int, url: str, first: bool
) -> None:
    async with database_through(port, url, pooler=None) as database:
        if not first:
            await database.ping()
        async with raw(through(port, url)) as other:
            for name in await names_to_come(url):
                await other.execute(f'PREPARE "{name}" AS SELECT 1')
        with pytest.raises(Exception) as caught:
            async with database.session() as session:
                await session.execute(text("SELECT 2"))
        assert_names_the_setting(caught.value, asyncpg.DuplicatePreparedStatementError)


@pytest.mark.asyncpg
async def test_without_the_setting_a_statement_of_somebody_else_is_an_error_that_names_it(
    port: int, url: str
) -> None:
    statement, parameters = text("SELECT CAST(:n AS integer)"), {"n": 1}
    async with database_through(port, url, pooler=None) as database:
        async with database.session() as session:
            await session.execute(statement, parameters)
        async with in_transaction(port, url) as first:
            names = await first.fetch("SELECT name FROM pg_prepared_statements")
            async with raw(through(port, url)) as second:
                for row in names:
                    await second.execute(f'PREPARE "{row["name"]}" AS SELECT $1 || $2')
            with pytest.raises(Exception) as caught:
                async with database.session() as session:
                    await session.execute(statement, parameters)
        assert_names_the_setting(caught.value, asyncpg.ProtocolViolationError)


async def test_without_the_setting_one_warning_says_that_there_is_a_pooler(
    port: int, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Not every mistake is an error: a statement of somebody else may answer, and be wrong."""
    async with database_through(port, url, pooler=None) as database:
        async with database.session() as one, database.session() as other:
            await one.execute(text("SELECT 1"))
            await other.execute(text("SELECT 2"))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert 'pooler="transaction"' in caplog.text


@pytest.mark.parametrize("direct", [True, False], ids=["no pooler", "the setting is there"])
async def test_there_is_nothing_to_warn_of(
    port: int, url: str, direct: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with Database(url) if direct else database_through(port, url) as database:
        await database.ping()
    assert caplog.records == []
    if direct:
        await assert_disconnected(url)
