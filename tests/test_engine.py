"""The engine's care: how transactions begin, the moment of COMMIT, and connections that died."""

import asyncio
import gc
import sqlite3
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_db import Database, DBSession, Mode, plain, read_only, transactional
from asgi_db.errors import ConfigurationError, DatabaseConflictError, DatabaseDownError
from tests.internals import (
    BEGIN_OPTION,
    Beginning,
    Effect,
    Tally,
    begin_unit,
    driver_of,
    variant_options,
)
from tests.limits import limit, set_limits
from tests.relay import Relay
from tests.servers import assert_disconnected, assert_idle, outside
from tests.tables import Author, Base, Child, Deferred, Parent

ONE_CONNECTION = {"pool_size": 1, "max_overflow": 0}

# How transactions begin

SERIALIZABLE = transactional(isolation="SERIALIZABLE")
READING = transactional(read_only=True)
IMMEDIATE = Beginning(("BEGIN IMMEDIATE",), writes=True)
DEFERRABLE = transactional(isolation="SERIALIZABLE", read_only=True, deferrable=True)
SNAPSHOT = read_only(snapshot=True)


def engine_on(url: str) -> Engine:
    """An engine which nothing has prepared; it is never connected."""
    return create_async_engine(url).sync_engine


@pytest.mark.parametrize(
    ("url", "mode", "expected"),
    [
        ("postgresql+asyncpg://db/shop", plain, {}),
        ("postgresql+asyncpg://db/shop", transactional, {}),
        ("postgresql+asyncpg://db/shop", SERIALIZABLE, {"isolation_level": "SERIALIZABLE"}),
        (
            "postgresql+asyncpg://db/shop",
            transactional(isolation="READ UNCOMMITTED"),
            {"isolation_level": "READ COMMITTED"},
        ),
        ("postgresql+asyncpg://db/shop", READING, {"postgresql_readonly": True}),
        (
            "postgresql+asyncpg://db/shop",
            DEFERRABLE,
            {
                "isolation_level": "SERIALIZABLE",
                "postgresql_readonly": True,
                "postgresql_deferrable": True,
            },
        ),
        ("postgresql+asyncpg://db/shop", read_only, {}),
        (
            "postgresql+asyncpg://db/shop",
            SNAPSHOT,
            {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True},
        ),
        ("mysql+asyncmy://db/shop", plain, {}),
        (
            "mysql+asyncmy://db/shop",
            SERIALIZABLE,
            {BEGIN_OPTION: Beginning(("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",))},
        ),
        (
            "mysql+asyncmy://db/shop",
            READING,
            {BEGIN_OPTION: Beginning(("SET TRANSACTION READ ONLY",))},
        ),
        ("mariadb+asyncmy://db/shop", read_only, {"isolation_level": "AUTOCOMMIT"}),
        ("sqlite+aiosqlite://", plain, {BEGIN_OPTION: Beginning(("BEGIN",))}),
        ("sqlite+aiosqlite://", transactional, {BEGIN_OPTION: IMMEDIATE}),
        ("sqlite+aiosqlite://", SERIALIZABLE, {BEGIN_OPTION: IMMEDIATE}),
        ("sqlite+aiosqlite://", READING, {BEGIN_OPTION: Beginning(("BEGIN",))}),
        ("sqlite+aiosqlite://", read_only, {BEGIN_OPTION: Beginning()}),
        ("sqlite+aiosqlite://", SNAPSHOT, {BEGIN_OPTION: Beginning(("BEGIN",))}),
    ],
)
def test_each_mode_begins_as_its_database_needs_it(
    url: str, mode: Mode, expected: dict[str, Any]
) -> None:
    assert variant_options(engine_on(url), mode) == expected


@pytest.mark.parametrize(
    "url", ["mysql+asyncmy://db/shop", "mariadb+asyncmy://db/shop", "sqlite+aiosqlite://"]
)
def test_deferrable_off_postgresql_is_an_error_that_says_so(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"only on PostgreSQL, .* leave it out of"):
        variant_options(engine_on(url), DEFERRABLE)


async def test_deferrable_off_postgresql_fails_before_anything_is_opened(sqlite_url: str) -> None:
    async with Database(sqlite_url) as database:
        with pytest.raises(ConfigurationError, match="deferrable"):
            async with database.transaction(DEFERRABLE) as session:
                await session.execute(text("SELECT 1"))
        assert "Connections in pool: 0" in database.engine.pool.status()


@pytest.mark.parametrize(
    ("mode", "locks"),
    [(transactional, True), (SERIALIZABLE, True), (plain, False), (READING, False)],
)
async def test_a_transaction_that_will_write_takes_the_lock_of_sqlite_at_its_begin(
    mode: Mode, locks: bool, sqlite_url: str
) -> None:
    async with Database(sqlite_url) as database, outside(sqlite_url) as other:
        await database.create_tables(Base.metadata)
        await other.execute("PRAGMA busy_timeout = 0")
        async with database.session(mode) as session:
            await session.execute(select(Author))
            if locks:
                with pytest.raises(sqlite3.OperationalError, match="database is locked"):
                    await other.execute("BEGIN IMMEDIATE")
            else:
                await other.execute("BEGIN IMMEDIATE")
                await other.execute("ROLLBACK")
        await other.execute("BEGIN IMMEDIATE")
        await other.execute("ROLLBACK")


@pytest.mark.parametrize(
    ("mode", "isolation", "reading", "waiting"),
    [
        (plain, "read committed", "off", "off"),
        (transactional, "read committed", "off", "off"),
        (SERIALIZABLE, "serializable", "off", "off"),
        (READING, "read committed", "on", "off"),
        (DEFERRABLE, "serializable", "on", "on"),
        (SNAPSHOT, "repeatable read", "on", "off"),
        (read_only, "read committed", "off", "off"),
    ],
)
async def test_postgresql_has_the_transaction_that_the_mode_asks_for(
    mode: Mode, isolation: str, reading: str, waiting: str, postgresql_url: str
) -> None:
    async with Database(postgresql_url, engine_options=ONE_CONNECTION) as database:
        for _ in range(2):  # the second time on a connection that has served the mode already
            async with database.session(mode) as session:
                assert [
                    await session.scalar(text(f"SHOW transaction_{name}"))
                    for name in ("isolation", "read_only", "deferrable")
                ] == [isolation, reading, waiting]
            async with database.session() as session:
                shown = await session.scalar(text("SHOW transaction_isolation"))
                assert shown == "read committed"
                assert await session.scalar(text("SHOW transaction_read_only")) == "off"


@pytest.mark.parametrize(
    ("mode", "isolation", "reading"),
    [
        (plain, "REPEATABLE READ", 0),
        (SERIALIZABLE, "SERIALIZABLE", 0),
        (transactional(isolation="READ COMMITTED"), "READ COMMITTED", 0),
        (READING, "REPEATABLE READ", 1),
        (SNAPSHOT, "REPEATABLE READ", 1),
    ],
)
async def test_mariadb_has_the_transaction_that_the_mode_asks_for(
    mode: Mode, isolation: str, reading: int, mysql_url: str
) -> None:
    async with Database(mysql_url, engine_options=ONE_CONNECTION) as database:
        await database.create_tables(Base.metadata)
        for _ in range(2):
            async with database.session(mode) as session:
                assert await innodb_transaction(session) == (isolation, reading)
            async with database.session() as session:
                assert await innodb_transaction(session) == ("REPEATABLE READ", 0)


async def innodb_transaction(session: DBSession) -> tuple[str, int]:
    """Isolation level and "reads only", as InnoDB itself reports them (from a cache of 0.1 s)."""
    await session.execute(select(Author))
    await session.execute(text("SELECT sleep(0.11)"))
    transaction = await session.execute(
        text(
            "SELECT trx_isolation_level, trx_is_read_only FROM information_schema.innodb_trx"
            " WHERE trx_mysql_thread_id = connection_id()"
        )
    )
    isolation, reads_only = transaction.one()
    return isolation, reads_only


# The moment of COMMIT


class DiaryOfTransaction:
    """A transaction that writes down what the engine tells it."""

    commit_was_sent = False
    effect = Effect.READS
    was_handed_out: bool = False

    def __init__(self) -> None:
        self.entries: list[str] = []

    def __setattr__(self, name: str, value: object) -> None:
        if value is Effect.WRITES:
            self.entries.append("write")
        super().__setattr__(name, value)

    def commit_is_sent(self) -> None:
        self.entries.append("commit")

    def note_failure(self, error: BaseException) -> None:
        self.entries.append("failure")


class Diary:
    """A unit of work whose transaction writes down what the engine tells it."""

    mode: Mode = plain
    fixed_mode: Mode | None = plain
    conflict: DatabaseConflictError | None = None

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.transaction = DiaryOfTransaction()
        self.tally = Tally()

    @property
    def entries(self) -> list[str]:
        return self.transaction.entries

    def describe(self) -> str:
        return "a test"

    def overdue_stream(self) -> None:
        return None


async def test_the_unit_learns_of_commit_when_it_is_sent_and_not_before(database_url: str) -> None:
    async with Database(database_url, engine_options=ONE_CONNECTION) as database:
        await database.create_tables(Base.metadata)
        diary = Diary()
        async with database.engine.connect() as connection:
            await connection.run_sync(begin_unit, diary, plain)
            await connection.execute(select(Author))
            async with connection.begin_nested():
                await connection.execute(insert(Author).values(name="Ada"))
            assert "commit" not in diary.entries
            await connection.commit()
            assert diary.entries[-1] == "commit"
            await connection.rollback()
        assert diary.entries == ["write", "commit"]
        assert diary.tally.connections == 1


async def test_the_unit_learns_of_the_commit_of_both_phases(mysql_url: str) -> None:
    async with Database(mysql_url, engine_options=ONE_CONNECTION) as database:
        await database.create_tables(Base.metadata)
        diary = Diary()
        async with database.engine.connect() as connection:
            await connection.run_sync(begin_unit, diary, plain)

            def commit_in_two_phases(connection: Connection) -> None:
                transaction = connection.begin_twophase()
                connection.execute(insert(Author).values(name="Ada"))
                transaction.prepare()
                assert "commit" not in diary.entries
                transaction.commit()

            await connection.run_sync(commit_in_two_phases)
        assert "commit" in diary.entries
        assert await rows(mysql_url, "author") == 1


async def test_a_commit_over_a_connection_that_is_closed_is_not_sent(server_url: str) -> None:
    async with Database(server_url, engine_options=ONE_CONNECTION) as database:
        diary = Diary()
        async with database.engine.connect() as connection:
            await connection.run_sync(begin_unit, diary, plain)
            await connection.execute(text("SELECT 1"))
            driver = (await connection.get_raw_connection()).driver_connection
            driver_of(connection.dialect).terminate(driver)
            assert driver_of(connection.dialect).is_closed(driver)
            with pytest.raises(DatabaseDownError):
                await connection.commit()
        assert "commit" not in diary.entries


# Connections that died in the pool


async def own_id(session: DBSession) -> int:
    """The number of the session's connection at the server."""
    sql = "SELECT connection_id()"
    if session.get_bind().dialect.name == "postgresql":
        sql = "SELECT pg_backend_pid()"
    return int(await session.scalar(text(sql)) or 0)


async def kill(url: str, *ids: int) -> None:
    """End these connections at the server, and wait until they are gone."""
    end = "SELECT pg_terminate_backend({})" if "postgresql" in url else "KILL {}"
    async with outside(url) as probe:
        for id in ids:
            await probe.execute(end.format(id))
    await assert_disconnected(url)


@pytest.fixture(params=["postgresql", "mysql"])
def server_url(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.mark.parametrize("mode", [plain, transactional, read_only, SNAPSHOT])
async def test_an_idle_connection_that_died_is_replaced_before_it_is_used(
    mode: Mode, server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limits(monkeypatch, verify_after_idle=-1)
    ids: list[int] = []
    async with Database(server_url, engine_options=ONE_CONNECTION) as database:
        for _ in range(3):
            for _ in range(2):  # the second time on the connection of the first
                async with database.session(mode) as session:
                    ids.append(await own_id(session))
            await kill(server_url, ids[-1])
    assert ids[0::2] == ids[1::2]
    assert len(set(ids)) == 3


async def test_all_connections_of_a_pool_that_died_are_replaced(
    server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limits(monkeypatch, verify_after_idle=-1)

    async def hold(database: Database, everybody: asyncio.Barrier) -> int:
        async with database.transaction() as session:
            id = await own_id(session)
            await everybody.wait()
            return id

    async with Database(server_url) as database:
        seen = set[int]()
        for _ in range(2):
            everybody = asyncio.Barrier(10)
            ids = await asyncio.gather(*(hold(database, everybody) for _ in range(10)))
            seen.update(ids)
            await kill(server_url, *ids)
        assert len(seen) == 20


async def test_the_low_profile_does_not_verify_but_notices_what_the_server_has_closed(
    server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limits(monkeypatch, verify_after_idle=-1)
    async with Database(server_url, pool="low", engine_options=ONE_CONNECTION) as database:
        async with database.session() as session:
            id = await own_id(session)
            driver = (await (await session.connection()).get_raw_connection()).driver_connection
        await kill(server_url, id)
        async with asyncio.timeout(5):
            while not driver_of(database.engine.dialect).is_closed(driver):  # noqa: ASYNC110 - the driver gives no event for it
                await asyncio.sleep(0.01)
        await database.ping()


# Connections that the pool gets no more


@pytest.mark.filterwarnings("ignore:The garbage collector is trying to clean up")
@pytest.mark.parametrize("given", [False, True], ids=["own engine", "given engine"])
async def test_a_connection_that_was_forgotten_frees_its_place_in_the_pool(
    given: bool, database_url: str
) -> None:
    async def forget() -> None:
        connection = await database.engine.connect()
        await connection.execute(text("SELECT 1"))

    options = {**ONE_CONNECTION, "pool_timeout": 5}
    engine = create_async_engine(database_url, **options)
    own = Database(database_url, engine_options=options)
    async with Database(engine=engine) if given else own as database:
        await forget()
        gc.collect()
        assert (database.stats().holders, database.stats().pool.idle) == ((), 0)
        await read_once(database)
    await engine.dispose()
    await assert_disconnected(database_url)


@asynccontextmanager
async def counted(
    url: str, mode: Mode = read_only, **options: Any
) -> AsyncGenerator[tuple[Database, Relay], None]:
    """A database whose one connection goes through a relay, and has served the mode already."""
    async with (
        Relay(url) as relay,
        Database(relay.url, engine_options=ONE_CONNECTION, **options) as database,
    ):
        await read_once(database, mode)
        yield database, relay


async def read_once(database: Database, mode: Mode = read_only) -> None:
    async with database.session(mode) as session:
        assert await session.scalar(text("SELECT 1")) == 1


COSTS = {
    "postgresql": {"read_only": 1, "plain": 3, "transactional": 3},  # BEGIN, statement, COMMIT
    "mysql": {"read_only": 1, "plain": 2, "transactional": 2},  # statement, COMMIT
}


@pytest.mark.parametrize("mode", [read_only, plain, transactional])
async def test_a_unit_with_one_statement_costs_as_few_round_trips_as_the_server_allows(
    mode: Mode, server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert limit("verify_after_idle") == 1  # second: longer than this test takes, but who knows
    set_limits(monkeypatch, verify_after_idle=60)
    cost = COSTS["postgresql" if "postgresql" in server_url else "mysql"][mode.name]
    async with counted(server_url, mode) as (database, relay):
        for _ in range(10):
            await read_once(database, mode)  # psycopg prepares what is often executed
        before = relay.round_trips
        for _ in range(20):
            await read_once(database, mode)
        assert relay.round_trips - before == 20 * cost
        assert relay.connections == 1


async def test_a_read_costs_one_round_trip_though_writes_go_over_the_same_connection(
    server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only MariaDB pays for the change: autocommit is a setting of the connection there."""
    set_limits(monkeypatch, verify_after_idle=60)
    async with counted(server_url) as (database, relay):
        for _ in range(3):
            await read_once(database, transactional)
            await read_once(database, read_only)
            before = relay.round_trips
            await read_once(database, read_only)
            assert relay.round_trips - before == 1
        assert relay.connections == 1


async def test_a_unit_without_a_statement_costs_nothing(server_url: str) -> None:
    async with Relay(server_url) as relay, Database(relay.url) as database:
        for mode in (plain, transactional, read_only, SNAPSHOT):
            async with database.session(mode) as session:
                await session.commit()
        assert (relay.connections, relay.round_trips) == (0, 0)


async def test_only_a_connection_that_was_idle_is_pinged(
    server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with counted(server_url) as (database, relay):
        busy, idle = list[int](), list[int]()
        for cost, limit in ((busy, 1000.0), (idle, -1.0), (busy, 1000.0)):
            set_limits(monkeypatch, verify_after_idle=limit)
            before = relay.round_trips
            await read_once(database)
            cost.append(relay.round_trips - before)
        assert busy[0] == busy[1] < idle[0]
        assert relay.connections == 1


async def test_the_low_profile_pings_nothing(
    server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with counted(server_url, pool="low") as (database, relay):
        costs = set[int]()
        for limit in (1000.0, -1.0):
            set_limits(monkeypatch, verify_after_idle=limit)
            before = relay.round_trips
            await read_once(database)
            costs.add(relay.round_trips - before)
        assert len(costs) == 1


async def test_an_existing_engine_and_pool_pre_ping_keep_their_own_way_of_verifying(
    server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`engine_options={"pool_pre_ping": True}` pings at each checkout, and only SQLAlchemy does."""
    set_limits(monkeypatch, verify_after_idle=-1)
    async with Relay(server_url) as relay:
        costs = set[int]()
        for pool in ("low", "medium"):
            options = {**ONE_CONNECTION, "pool_pre_ping": True}
            async with Database(relay.url, pool=pool, engine_options=options) as database:
                await read_once(database)
                before = relay.round_trips
                await read_once(database)
                costs.add(relay.round_trips - before)
        assert len(costs) == 1


# SQLite under concurrent writers, and connections whose COMMIT failed


@pytest.mark.parametrize("place", ["file", "memory"])
async def test_no_update_is_lost_when_50_tasks_read_modify_and_write_on_sqlite(
    place: str, sqlite_url: str
) -> None:
    async def increment(database: Database) -> None:
        async with database.transaction() as session:
            author = await session.get_one(Author, 1)
            author.name = str(int(author.name) + 1)

    async with Database(sqlite_url if place == "file" else "sqlite://") as database:
        await database.create_tables(Base.metadata)
        async with database.transaction() as session:
            session.add(Author(id=1, name="0"))
        await asyncio.gather(*(increment(database) for _ in range(50)))
        async with database.session() as session:
            assert (await session.get_one(Author, 1)).name == "50"


async def rows(url: str, table: str) -> int:
    """How many rows another connection sees."""
    async with outside(url) as witness:
        ((number,),) = await witness.execute(f"SELECT count(*) FROM {table}")
        return int(number)


@pytest.fixture(params=["postgresql", "sqlite"])
def deferring_url(request: pytest.FixtureRequest) -> str:
    """A database which can check a foreign key at COMMIT."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


async def test_a_connection_whose_commit_failed_serves_the_next_as_if_nothing_had_been(
    deferring_url: str,
) -> None:
    """SQLite leaves the transaction open when its COMMIT fails."""
    async with Database(deferring_url, engine_options=ONE_CONNECTION) as database:
        await database.create_tables(Deferred.metadata)
        for number in range(5):
            with pytest.raises(IntegrityError):
                async with database.transaction() as session:
                    session.add(Child(parent_id=404))
            for mode in (transactional, plain, read_only, SNAPSHOT):
                async with database.session(mode) as session:
                    assert (await session.scalars(select(Child))).all() == []
            async with database.transaction() as session:
                session.add(Parent(id=number))
            await assert_idle(deferring_url)
            assert await rows(deferring_url, "parent") == number + 1


async def test_a_commit_by_hand_which_failed_leaves_a_clean_connection_behind(
    deferring_url: str,
) -> None:
    async with Database(deferring_url, engine_options=ONE_CONNECTION) as database:
        await database.create_tables(Deferred.metadata)
        for number in range(5):
            async with database.session() as session:
                session.add(Child(parent_id=404))
                with pytest.raises(IntegrityError):
                    await session.commit()
            async with database.transaction() as session:
                session.add(Parent(id=number))
        assert await rows(deferring_url, "child") == 0
        assert await rows(deferring_url, "parent") == 5
