"""A server that was demoted, or only reads, is down for what writes, until another one is there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import insert, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_db import (
    Database,
    DatabaseDownError,
    DBSession,
    DBSessionMiddleware,
    Mode,
    OutcomeUnknownError,
    Readiness,
    plain,
    read_only,
    transactional,
)
from asgi_db.types import ASGIApp, Receive, Scope, Send
from tests import servers
from tests.contract.client import Exchange, assert_refused, call
from tests.drivers import server_settings
from tests.limits import set_limits
from tests.pools import checked_out
from tests.relay import Relay
from tests.servers import DatabaseServer, assert_idle, outside, server_connections
from tests.tables import Author, Base, authors

POOL = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 5}
ONE_CONNECTION = {**POOL, "pool_size": 1}

ONLY_READS = {
    "postgresql": ("default_transaction_read_only", "on", "off"),
    "mysql": ("read_only", "1", "0"),
}
"""The setting by which each server only reads, and its values; what fails over sets it."""


@dataclass
class Demotable:
    """A database on a server of its own, which can be told to refuse writes.

    Attributes:
        url: for a user who, unlike that of the tests, may not write there in spite of it.
        admin_url: for the tests' own user.
    """

    url: str
    admin_url: str

    @property
    def backend(self) -> str:
        return make_url(self.url).get_backend_name()

    async def demote(self) -> None:
        """Let it only read from now on."""
        name, on, _ = ONLY_READS[self.backend]
        await self._set(name, on)

    async def promote(self) -> None:
        """Let it write again."""
        name, _, off = ONLY_READS[self.backend]
        await self._set(name, off)

    async def _set(self, name: str, value: str) -> None:
        async with outside(self.admin_url) as connection:
            if self.backend == "mysql":
                await connection.execute(f"SET GLOBAL {name} = {value}")
                return
            await connection.execute(f"ALTER SYSTEM SET {name} = {value}")
            await connection.execute("SELECT pg_reload_conf()")
        # Each process of the server takes note when it next has nothing to do.
        async with asyncio.timeout(20):
            while True:
                async with outside(self.admin_url) as connection:
                    if await connection.execute(f"SHOW {name}") == [(value,)]:
                        return
                await asyncio.sleep(0.01)


@pytest.fixture(params=[servers.postgresql, servers.mariadb], scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[DatabaseServer]:
    """A server of its own."""
    with request.param(own=True) as server:
        yield server


@pytest.fixture
def demotable(server: DatabaseServer) -> Iterator[Demotable]:
    """An empty database on it."""
    with server.fresh_database() as url:
        yield (database := Demotable(_for_mere_user(url), url))
        servers.run(database.promote())


def _for_mere_user(admin_url: str) -> str:
    """The URL for a user who has all rights in a database, and none on its server."""
    url = make_url(admin_url)
    if url.get_backend_name() == "postgresql":
        return admin_url  # A superuser is refused, too.
    servers.sql(
        admin_url,
        "CREATE USER IF NOT EXISTS mere@'%' IDENTIFIED BY 'password'",
        f"GRANT ALL ON {url.database}.* TO mere@'%'",
    )
    return url.set(username="mere").render_as_string(hide_password=False)


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncGenerator[Database]:
    """A database with its tables, and a full pool."""
    async with Database(url, engine_options={**POOL, **options}) as database:
        await database.create_tables(Base.metadata)
        await fill(database)
        yield database


async def fill(database: Database) -> None:
    """Open as many connections as the pool may have."""

    async def read() -> None:
        async with database.session() as session:
            await session.scalar(text("SELECT 1"))
            await everybody.wait()

    everybody = asyncio.Barrier(database.stats().pool.limit or 1)
    await asyncio.gather(*(read() for _ in range(everybody.parties)))


def app(database: Database, mode: Mode, *statements: Any) -> ASGIApp:
    """An application which executes these, and answers 201."""

    async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
        session: DBSession = scope["state"]["db"]
        for statement in statements:
            await session.execute(text(statement) if isinstance(statement, str) else statement)
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body"})

    return DBSessionMiddleware(endpoint, database, mode=mode)


def write(name: str) -> Any:
    return insert(Author).values(name=name)


async def numbers(url: str) -> set[int]:
    """The numbers of the connections to a database."""
    return {client.id for client in await server_connections(url)}


async def serve(application: ASGIApp) -> Exchange:
    async with asyncio.timeout(30):
        return await call(application)


async def is_ready(database: Database) -> bool:
    exchange = await call(Readiness(database), method="GET")
    if exchange.status == 200:
        return True
    assert_refused(exchange, "down")
    return False


# -- demoted, and promoted again ---------------------------------------------------------------


async def test_a_write_is_a_503_and_the_pool_is_discarded(demotable: Demotable) -> None:
    async with opened(demotable.url) as database:
        writing = app(database, transactional, write("lost"))
        before = await numbers(demotable.admin_url)
        assert len(before) == 2
        await demotable.demote()
        assert_refused(await serve(writing), "down")
        await fill(database)
        assert not before & await numbers(demotable.admin_url)
        assert checked_out(database) == 0
        await assert_idle(demotable.admin_url)


@pytest.mark.parametrize("mode", [plain, transactional])
async def test_the_first_request_after_the_failover_succeeds(
    demotable: Demotable, mode: Mode
) -> None:
    async with opened(demotable.url) as database:
        await demotable.demote()
        for number in range(5):
            assert_refused(await serve(app(database, mode, write(str(number)))), "down")
        await demotable.promote()
        for number in range(5):
            exchange = await serve(app(database, transactional, write(f"kept {number}")))
            assert (exchange.status, exchange.error) == (201, None)
        assert await authors(demotable.admin_url) == [f"kept {number}" for number in range(5)]


async def test_reads_go_on_meanwhile(demotable: Demotable) -> None:
    async with opened(demotable.url) as database:
        await demotable.demote()
        assert_refused(await serve(app(database, transactional, write("lost"))), "down")
        for mode in (read_only, read_only(snapshot=True), transactional(read_only=True), plain):
            exchange = await serve(app(database, mode, "SELECT * FROM author"))
            assert (exchange.status, exchange.error) == (201, None)


async def test_the_log_says_so_once(demotable: Demotable, caplog: pytest.LogCaptureFixture) -> None:
    async with opened(demotable.url) as database:
        for _ in range(2):
            await demotable.demote()
            caplog.clear()
            for number in range(5):
                await serve(app(database, transactional, write(str(number))))
            warnings = [each for each in caplog.records if each.levelno == logging.WARNING]
            assert ["this server only reads" in each.getMessage() for each in warnings] == [True]
            await demotable.promote()
            assert (await serve(app(database, plain, write("x")))).status == 201
            assert await is_ready(database)


async def test_it_is_not_ready_until_it_writes_again(demotable: Demotable) -> None:
    async with opened(demotable.url) as database:
        assert await is_ready(database)
        await demotable.demote()
        assert not await is_ready(database)
        with pytest.raises(DatabaseDownError, match="this server only reads"):
            await database.ping()
        await demotable.promote()
        assert await is_ready(database)


async def test_one_that_only_reads_anyway_is_ready(demotable: Demotable) -> None:
    """All its routes read, on a server that is meant for reading."""
    servers.sql(demotable.admin_url, "CREATE TABLE author (id int, name varchar(50))")
    await demotable.demote()
    async with Database(demotable.url, engine_options=POOL, wait_for=5) as database:
        assert await is_ready(database)
        for mode in (read_only, read_only(snapshot=True), transactional(read_only=True), plain):
            exchange = await serve(app(database, mode, "SELECT * FROM author"))
            assert (exchange.status, exchange.error) == (201, None)
            assert await is_ready(database)


async def test_one_that_meets_such_a_server_with_its_first_write_is_down(
    demotable: Demotable,
) -> None:
    servers.sql(demotable.admin_url, "CREATE TABLE author (id int, name varchar(50))")
    await demotable.demote()
    async with Database(demotable.url, engine_options=POOL) as database:
        assert_refused(await serve(app(database, transactional, write("lost"))), "down")
        assert not await is_ready(database)
        await demotable.promote()
        assert await is_ready(database)


@pytest.mark.parametrize("server", [servers.mariadb], indirect=True)
async def test_a_user_who_may_write_there_all_the_same_is_ready(demotable: Demotable) -> None:
    """On MariaDB it is a matter of rights; on PostgreSQL nobody may."""
    async with opened(demotable.admin_url) as database:
        await demotable.demote()
        assert (await serve(app(database, transactional, write("kept")))).status == 201
        assert await is_ready(database)


async def test_an_engine_of_ones_own_is_served_alike(demotable: Demotable) -> None:
    engine = create_async_engine(demotable.url, **POOL)
    async with Database(engine=engine) as database:
        await database.create_tables(Base.metadata)
        await fill(database)
        before = await numbers(demotable.admin_url)
        await demotable.demote()
        assert_refused(await serve(app(database, transactional, write("lost"))), "down")
        assert not await is_ready(database)
        await fill(database)
        assert not before & await numbers(demotable.admin_url)
        await demotable.promote()
        assert (await serve(app(database, transactional, write("kept")))).status == 201
        assert await is_ready(database)
    await engine.dispose()


async def test_a_lock_of_rows_is_a_write_too(demotable: Demotable) -> None:
    async with opened(demotable.url) as database:
        await demotable.demote()
        locking = app(database, transactional, "SELECT * FROM author FOR UPDATE")
        assert_refused(await serve(locking), "down")


@pytest.mark.parametrize("server", [servers.postgresql], indirect=True)
async def test_what_has_begun_before_the_demotion_is_committed(demotable: Demotable) -> None:
    """PostgreSQL looks only when a transaction begins."""
    async with opened(demotable.url) as database:
        async with database.transaction() as session:
            await session.execute(write("kept"))
            await demotable.demote()
        assert await authors(demotable.admin_url) == ["kept"]


@pytest.mark.parametrize("server", [servers.mariadb], indirect=True)
async def test_a_commit_that_is_refused_has_a_known_outcome(demotable: Demotable) -> None:
    """MariaDB looks again at COMMIT."""
    async with opened(demotable.url) as database:
        with pytest.raises(DatabaseDownError, match="this server only reads") as caught:
            async with database.transaction() as session:
                await session.execute(write("lost"))
                await demotable.demote()
        assert not isinstance(caught.value, OutcomeUnknownError)
        await demotable.promote()
        assert await authors(demotable.admin_url) == []


# -- another server takes over -----------------------------------------------------------------


@pytest.fixture
def successor(demotable: Demotable, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of the same database on another server."""
    other: DatabaseServer = request.getfixturevalue(f"{demotable.backend}_server")
    with servers.same_database(demotable.url, other) as url:
        servers.run(_create_tables(url))
        yield url


async def _create_tables(url: str) -> None:
    async with Database(url) as database:
        await database.create_tables(Base.metadata)


@pytest.mark.parametrize("meanwhile", ["nothing", "reads", "writes"])
async def test_an_address_that_moves_without_cutting_a_connection_is_followed(
    demotable: Demotable, successor: str, meanwhile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demoted server is still there, and goes on answering whoever is connected."""
    set_limits(monkeypatch, verify_after_idle=0)
    async with Relay(demotable.url) as relay, opened(relay.url) as database:
        await demotable.demote()
        if meanwhile == "writes":
            assert_refused(await serve(app(database, transactional, write("lost"))), "down")
        if meanwhile != "nothing":
            assert (await serve(app(database, read_only, "SELECT 1"))).status == 201
            await fill(database)
        relay.turn_to(successor)
        for number in range(3):
            exchange = await serve(app(database, transactional, write(f"kept {number}")))
            assert (exchange.status, exchange.error) == (201, None)
        assert await authors(successor) == ["kept 0", "kept 1", "kept 2"]
        assert await is_ready(database)


async def test_busy_readers_do_not_keep_the_connections_to_the_demoted_server(
    demotable: Demotable, successor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No connection is ever idle; a refused write is the only sign of the demotion."""
    set_limits(monkeypatch, verify_after_idle=0.3)
    async with Relay(demotable.url) as relay, opened(relay.url, **ONE_CONNECTION) as database:
        reading = app(database, read_only, "SELECT 1")
        await demotable.demote()
        assert_refused(await serve(app(database, transactional, write("lost"))), "down")
        assert (await serve(reading)).status == 201
        relay.turn_to(successor)
        until = asyncio.get_running_loop().time() + 0.5
        while asyncio.get_running_loop().time() < until:
            assert (await serve(reading)).status == 201
        assert (await serve(app(database, transactional, write("kept")))).status == 201
        assert await authors(successor) == ["kept"]


@pytest.mark.parametrize("server", [servers.postgresql], indirect=True)
async def test_a_standby_is_down_until_it_is_promoted(
    demotable: Demotable, server: DatabaseServer
) -> None:
    """As a primary that comes back as a standby, at the same address."""
    async with opened(demotable.url) as database:
        await asyncio.to_thread(server.restart_as_standby)
        assert not await is_ready(database)
        modes = transactional, plain, transactional(isolation="SERIALIZABLE")
        for mode in modes:
            assert_refused(await serve(app(database, mode, write("lost"))), "down")
        assert (await serve(app(database, read_only, "SELECT * FROM author"))).status == 201
        async with outside(demotable.url) as connection:
            await connection.execute("SELECT pg_promote()")
        for number, mode in enumerate(reversed(modes)):
            assert (await serve(app(database, mode, write(str(number))))).status == 201
        assert await is_ready(database)


# -- what the mode, or the user, has asked for is no outage -------------------------------------


def writing_function(url: str) -> str:
    """A statement that seems to read, and calls a function that writes."""
    if url.startswith("postgresql"):
        body = "RETURNS int LANGUAGE sql AS $$INSERT INTO author VALUES (1, 'by f') RETURNING 1$$"
        servers.sql(url, f"CREATE FUNCTION sneak() {body}")
    else:
        body = "BEGIN INSERT INTO author VALUES (1, 'by f'); RETURN 1; END"
        servers.sql(url, f"CREATE FUNCTION sneak() RETURNS int {body}")
    return "SELECT sneak()"


async def assert_no_outage(database: Database, url: str, mode: Mode, *statements: Any) -> None:
    """It is an ordinary error, and the pool stays as it is."""
    before = await numbers(url)
    exchange = await serve(app(database, mode, *statements))
    assert exchange.status == 500
    assert isinstance(exchange.error, DBAPIError)
    assert not isinstance(exchange.error, DatabaseDownError)
    await fill(database)
    assert await numbers(url) == before
    assert await is_ready(database)


@pytest.mark.parametrize(
    ("mode", "demoted"),
    [
        pytest.param(mode, demoted, id=f"{name}-{'demoted' if demoted else 'as it was'}")
        for name, mode in {
            "transactional": transactional(read_only=True),
            "snapshot": read_only(snapshot=True),
            "read_only": read_only,
        }.items()
        for demoted in (False, True)
        if demoted or not mode.autocommit  # which leaves it to the server
    ],
)
async def test_a_write_that_the_mode_refuses_is_no_outage(
    demotable: Demotable, mode: Mode, demoted: bool
) -> None:
    servers.run(_create_tables(demotable.admin_url))
    sneak = writing_function(demotable.admin_url)
    async with Database(demotable.url, engine_options=POOL) as database:
        await fill(database)
        if demoted:
            await demotable.demote()
        await assert_no_outage(database, demotable.admin_url, mode, sneak)


READ_ONLY = [
    (servers.postgresql, "SET TRANSACTION READ ONLY"),
    (servers.postgresql, "SET LOCAL transaction_read_only = on"),
    (servers.postgresql, "SELECT set_config('transaction_read_only', 'on', true)"),
    (servers.mariadb, "SET TRANSACTION READ ONLY"),
    (servers.mariadb, "START TRANSACTION READ ONLY"),
    (servers.mariadb, "SET SESSION TRANSACTION READ ONLY"),
]


@pytest.mark.parametrize(("server", "statement"), READ_ONLY, indirect=["server"])
async def test_a_transaction_that_the_user_has_made_read_only_is_no_outage(
    demotable: Demotable, statement: str
) -> None:
    async with opened(demotable.url) as database:
        exchange = await serve(app(database, plain, statement, write("refused")))
        assert exchange.status == 500
        assert not isinstance(exchange.error, DatabaseDownError)
        assert await is_ready(database)
        assert (await serve(app(database, transactional, write("kept")))).status == 201


@pytest.mark.parametrize("server", [servers.postgresql], indirect=True)
async def test_so_it_is_by_an_option_of_the_connection_or_over_the_driver_itself(
    demotable: Demotable,
) -> None:
    async with opened(demotable.url) as database:
        before = await numbers(demotable.admin_url)
        async with database.session() as session:
            await session.connection(execution_options={"postgresql_readonly": True})
            with pytest.raises(DBAPIError) as caught:
                await session.execute(write("refused"))
            assert not isinstance(caught.value, DatabaseDownError)
        async with database.session() as session:
            raw = await (await session.connection()).get_raw_connection()
            driver: Any = raw.driver_connection
            await driver.execute("SET TRANSACTION READ ONLY")
            with pytest.raises(DBAPIError) as caught:
                await session.execute(write("refused"))
            assert not isinstance(caught.value, DatabaseDownError)
        async with database.engine.connect() as connection:
            await connection.execute(text("SET TRANSACTION READ ONLY"))
            with pytest.raises(DBAPIError) as caught:
                await connection.execute(write("refused"))
            assert not isinstance(caught.value, DatabaseDownError)
        assert await numbers(demotable.admin_url) == before


CHOSEN = [
    (servers.postgresql, "url"),
    (servers.postgresql, "role"),
    (servers.mariadb, "url"),
]


@pytest.mark.parametrize(("server", "where"), CHOSEN, indirect=["server"])
async def test_so_it_is_for_a_whole_connection(demotable: Demotable, where: str) -> None:
    """By the URL, or the role, of somebody who is to read only."""
    servers.run(_create_tables(demotable.admin_url))
    arguments: dict[str, Any] = {}
    user = make_url(demotable.url).username
    role = f"ALTER ROLE {user} SET default_transaction_read_only"
    if where == "role":
        servers.sql(demotable.admin_url, f"{role} = on")
    elif demotable.backend == "postgresql":
        arguments = server_settings(demotable.url, default_transaction_read_only="on")
    else:
        arguments = {"init_command": "SET SESSION TRANSACTION READ ONLY"}
    try:
        options = {**POOL, "connect_args": arguments}
        async with Database(demotable.url, engine_options=options) as database:
            await fill(database)
            await assert_no_outage(database, demotable.admin_url, transactional, write("refused"))
    finally:
        if where == "role":
            servers.sql(
                demotable.admin_url,
                "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE",
                f"{role} TO DEFAULT",
            )


# -- what MariaDB and MySQL say -----------------------------------------------------------------

SAID = {
    1047: ("WSREP has not yet prepared node for application use", "down", "down"),
    3032: ("The server is currently in offline mode", "down", "down"),
    1290: ("The server is running with the --super-read-only option", "down", ""),
    1836: ("Running in read-only mode", "down", ""),
    1874: ("InnoDB is in read only mode", "down", ""),
    1792: ("Cannot execute statement in a READ ONLY transaction", "down", ""),
    # Another option than the one that lets it only read.
    -1290: ("The server is running with the --secure-file-priv option", "", ""),
}
"""Numbers, their words, and what becomes of them in a mode that writes, and in one that reads."""


@pytest.mark.parametrize(("number", "said"), SAID.items(), ids=map(str, SAID))
async def test_what_a_server_says_is_understood(
    mysql_url: str, number: int, said: tuple[str, str, str]
) -> None:
    """The server is told to say it, as one that fails over or has no quorum does."""
    words, *outcomes = said
    signal = f"SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = {abs(number)}, MESSAGE_TEXT = '{words}'"
    async with Database(mysql_url, engine_options=POOL) as database:
        for mode, outcome in zip((transactional, read_only), outcomes, strict=True):
            exchange = await serve(app(database, mode, signal))
            if outcome:
                assert_refused(exchange, outcome)
            else:
                assert (exchange.status, type(exchange.error)) == (500, OperationalError)
