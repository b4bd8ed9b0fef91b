"""The `Database`: where it comes from, what it does outside requests, and how it ends."""

import asyncio
import contextlib
import gc
import logging
import os
import sqlite3
import threading
import traceback
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import event, make_url, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool, QueuePool

from asgi_db import (
    ConcurrentUseError,
    ConfigurationError,
    Database,
    DatabaseConflictError,
    DatabaseDownError,
    DBSession,
    FailedTransactionError,
    Mode,
    PoolProfile,
    ReadOnlyError,
    SessionExpiredError,
    create_database_url,
    plain,
    read_only,
    transactional,
)
from tests.internals import PoolName, background_is_over
from tests.servers import (
    DatabaseServer,
    assert_disconnected,
    assert_idle,
    assert_no_thread_of_sqlite,
    outside,
)
from tests.tables import Author, Base, Child, Deferred, authors

ONE_CONNECTION = {"pool_size": 1, "max_overflow": 0}
SECRET = "c0rrect-h0rse"

MODES = [plain, transactional, transactional(read_only=True), read_only, read_only(snapshot=True)]


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment without a database, in an empty working directory."""
    for name in [name for name in os.environ if name.startswith("DATABASE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(params=["postgresql", "mysql"])
def server_url(request: pytest.FixtureRequest) -> str:
    """A database on a server."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the library has logged, from WARNING up."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "asgi_db" and record.levelno >= logging.WARNING
    ]


async def write(session: DBSession, name: str = "Ada") -> None:
    """Write an author, without a commit."""
    session.add(Author(name=name))
    await session.flush()


# From a URL, from an engine, from the environment, from nothing


async def test_a_database_from_a_url_writes_and_reads(database_url: str) -> None:
    async with Database(database_url) as database:
        await database.create_tables(Base.metadata)
        async with database.transaction() as session:
            await write(session)
        assert await authors(database_url) == ["Ada"]
        async with database.session(read_only) as session:
            assert (await session.scalars(select(Author.name))).all() == ["Ada"]


async def test_a_url_object_will_do_too(tmp_path: Path) -> None:
    url = create_database_url("sqlite", database=str(tmp_path / "test.db"))
    async with Database(url) as database:
        assert database.url == url
        await database.ping()


async def test_nothing_is_opened_for_a_session_that_runs_no_statement(database_url: str) -> None:
    async with Database(database_url) as database:
        opened = list[object]()
        event.listen(database.engine.sync_engine, "connect", lambda *_: opened.append("connect"))
        for mode in MODES:
            async with database.session(mode) as session:
                session.add(author := Author(name="Ada"))
                session.expunge(author)
                await session.commit()
                await session.rollback()
                await session.release()
        assert opened == []
        await database.ping()
        assert opened == ["connect"]


@pytest.fixture
async def own_engine(database_url: str) -> AsyncGenerator[AsyncEngine, None]:
    """An engine which the user has made, as SQLAlchemy makes it."""
    engine = create_async_engine(database_url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield engine
    await engine.dispose()


async def test_every_mode_works_on_an_existing_engine(
    own_engine: AsyncEngine, database_url: str
) -> None:
    async with Database(engine=own_engine) as database:
        assert database.engine is own_engine
        for round in ("1", "2"):  # the second time on connections that have served other modes
            async with database.session() as session:
                await write(session, f"by hand {round}")
                await session.commit()
            async with database.session() as session:
                await write(session, "lost")
            async with database.transaction() as session:
                await write(session, f"by itself {round}")
            with pytest.raises(ZeroDivisionError):
                async with database.transaction() as session:
                    await write(session, "lost")
                    _ = 1 / 0
            for mode in (read_only, read_only(snapshot=True), transactional(read_only=True)):
                async with database.session(mode) as session:
                    found = (await session.scalars(select(Author.name))).all()
                    assert len(found) == 2 * int(round)
                    with pytest.raises(ReadOnlyError):
                        await session.execute(text("DELETE FROM author"))
            await assert_idle(database_url)
    assert await authors(database_url) == ["by hand 1", "by hand 2", "by itself 1", "by itself 2"]


async def test_an_existing_engine_is_never_disposed(
    own_engine: AsyncEngine, database_url: str
) -> None:
    database = Database(engine=own_engine)
    pool = own_engine.pool
    async with database:
        await database.ping()
    await database.dispose()
    assert own_engine.pool is pool
    assert isinstance(pool, QueuePool) and pool.checkedin() == 1
    await database.ping()
    assert pool.checkedin() == 1


async def test_the_pool_of_an_existing_engine_is_used_as_it_is(own_engine: AsyncEngine) -> None:
    """Its owner's own use of it, too, goes on as before."""
    taken, returned = list[object](), list[object]()
    event.listen(own_engine.sync_engine, "checkout", lambda *_: taken.append(1))
    event.listen(own_engine.sync_engine, "checkin", lambda *_: returned.append(1))
    pool = own_engine.sync_engine.pool

    def listeners() -> list[int]:
        names = ("first_connect", "reset")
        return [len(list(getattr(pool.dispatch, name))) for name in names]

    before = listeners()
    async with Database(engine=own_engine) as database:
        for mode in MODES:
            async with database.session(mode) as session:
                await session.execute(select(Author))
    assert listeners() == before
    assert len(taken) == len(returned) == len(MODES)
    async with own_engine.begin() as connection:
        await connection.execute(text("INSERT INTO author (id, name) VALUES (1, 'by its owner')"))
    async with own_engine.connect() as connection:
        assert (await connection.scalars(text("SELECT name FROM author"))).all() == ["by its owner"]
        await connection.execute(text("DELETE FROM author"))
        await connection.rollback()
        assert (await connection.scalars(text("SELECT name FROM author"))).all() == ["by its owner"]


async def test_a_database_from_the_environment_reads_database_url(
    no_environment: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{no_environment}/of-the-environment.db")
    monkeypatch.setenv("DATABASE_ECHO", "true")
    for make in (Database, Database.from_env):
        async with make() as database:
            await database.ping()
            assert database.engine.echo is True
    assert (no_environment / "of-the-environment.db").exists()
    assert messages(caplog) == []


async def test_a_database_from_the_environment_reads_the_single_variables(
    database_url: str, no_environment: Path
) -> None:
    url = Database(database_url).url
    environ = {
        "DATABASE_TYPE": url.get_backend_name(),
        "DATABASE_USER": url.username or "",
        "DATABASE_PASSWORD": str(url.password or ""),
        "DATABASE_HOST": url.host or "",
        "DATABASE_PORT": str(url.port or ""),
        "DATABASE_SCHEMA": url.database or "",
        "DATABASE_POOL_ECHO": "debug",
    }
    options: dict[str, Any] = {"engine_options": {"pool_recycle": 17}, "pool": "low"}
    async with Database.from_env(environ, **options) as database:
        await database.create_tables(Base.metadata)
        pool = database.engine.sync_engine.pool
        assert (pool.echo, getattr(pool, "_recycle")) == ("debug", 17)  # noqa: B009
    assert await authors(database_url) == []


async def test_an_option_in_the_code_wins_over_the_environment(
    no_environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "sqlite:///test.db")
    monkeypatch.setenv("DATABASE_ECHO", "true")
    for make in (Database, Database.from_env):
        async with make(engine_options={"echo": False}) as database:
            assert database.engine.echo is False


def test_an_environment_without_a_database_is_an_error_where_it_was_asked_for(
    no_environment: Path,
) -> None:
    with pytest.raises(ConfigurationError, match="^Set DATABASE_URL, or DATABASE_TYPE"):
        Database.from_env()
    with pytest.raises(ConfigurationError, match="^Set DATABASE_URL, or DATABASE_TYPE"):
        Database.from_env({"PATH": "/bin"})


async def test_without_any_setting_an_sqlite_file_serves_and_one_log_line_says_so(
    no_environment: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with Database() as database:
        await database.create_tables(Base.metadata)
        async with database.transaction() as session:
            await write(session)
    async with Database(f"sqlite:///{no_environment}/app.db") as database:
        async with database.session() as session:
            assert (await session.scalars(select(Author.name))).all() == ["Ada"]
    (line,) = messages(caplog)
    assert str(no_environment / "app.db") in line
    assert "Set DATABASE_URL, or pass a URL" in line


# What cannot work


@pytest.mark.parametrize(
    ("setting", "options"),
    [
        ("engine=", {"engine": True, "url": "sqlite://"}),
        ("engine_options=", {"engine": True, "engine_options": {}}),
        ("pooler=", {"engine": True, "pooler": "transaction"}),
        ("pooler=", {"url": "sqlite://", "pooler": "session"}),
        ("wait_for=", {"url": "sqlite://", "wait_for": -1}),
        ("wait_for=", {"url": "sqlite://", "wait_for": float("nan")}),
        ("`pool`", {"url": "sqlite://", "pool": "huge"}),
        ("The database URL", {"url": "shop"}),
        ("The database URL", {"url": ""}),
        ("The database URL", {"url": 5}),
        ("The database URL", {"url": "oracle://db/shop"}),
    ],
)
def test_a_setting_that_cannot_work_is_an_error_that_names_it(
    setting: str, options: dict[str, Any]
) -> None:
    if "engine" in options:
        options = {**options, "engine": create_async_engine("sqlite+aiosqlite://")}
    with pytest.raises(ConfigurationError, match=setting):
        Database(**options)


IN_AUTOCOMMIT: list[dict[str, Any]] = [
    {"isolation_level": "AUTOCOMMIT"},
    {"isolation_level": "autocommit"},
    {"execution_options": {"isolation_level": "AUTOCOMMIT"}},
]


@pytest.mark.parametrize("options", IN_AUTOCOMMIT)
@pytest.mark.parametrize("url", ["postgresql+asyncpg://db/shop", "mysql+asyncmy://db/shop"])
def test_an_engine_in_autocommit_is_refused_as_no_transaction_could_be_rolled_back(
    url: str, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError, match="^engine_options= has .* AUTOCOMMIT"):
        Database(url, engine_options=options)
    engine = create_async_engine(url, **options)
    with pytest.raises(ConfigurationError, match="^engine= has .* AUTOCOMMIT"):
        Database(engine=engine)
    engine = create_async_engine(url).execution_options(isolation_level="AUTOCOMMIT")
    with pytest.raises(ConfigurationError, match="^engine= has .* AUTOCOMMIT"):
        Database(engine=engine)


@pytest.mark.parametrize("name", ["DATABASE_URL", "DATABASE_PORT", "DATABASE_ECHO"])
def test_a_wrong_variable_is_an_error_that_names_it(
    name: str, no_environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_TYPE", "postgresql")
    monkeypatch.setenv("DATABASE_SCHEMA", "shop")
    monkeypatch.setenv(name, "?")
    for make in (Database, Database.from_env):
        with pytest.raises(ConfigurationError, match=name):
            make()


def test_the_engine_belongs_to_a_running_event_loop() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        _ = Database("sqlite://").engine


async def test_no_log_line_error_or_repr_shows_the_password(
    server_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Logged in full, the pool's and the driver's own lines included."""
    caplog.set_level(logging.DEBUG)
    url = make_url(server_url).set(port=1, database="missing", password=SECRET)
    options = {"echo": "debug", "echo_pool": "debug"}
    database = Database(url, wait_for=1.5, engine_options=options)
    with pytest.raises(ConnectionError, match="did not come up within") as raised:
        await database.start()
    await database.dispose()
    assert "is not there yet" in caplog.text
    trace = "".join(traceback.format_exception(raised.value))
    for shown in (caplog.text, trace, repr(raised.value), repr(database), str(database)):
        assert SECRET not in shown
    assert repr(database).startswith("<Database ")
    assert f"{url.host}:{url.port}/missing" in repr(database)


@pytest.mark.parametrize("character", ["Ω", "\ud800"])  # the second no encoding has
async def test_a_password_that_the_driver_cannot_encode_is_in_no_error(
    character: str, mysql_url: str
) -> None:
    url = make_url(mysql_url).set(password=f"{SECRET}{character}")
    async with Database(url) as database:
        with pytest.raises(ConfigurationError, match="the password .* cannot send") as raised:
            await database.ping()
    assert SECRET not in "".join(traceback.format_exception(raised.value))
    errors: list[BaseException | None] = [raised.value]
    for error in errors:
        if error is not None:
            assert SECRET not in repr(error) and character not in repr(error)
            assert SECRET not in repr(vars(error))
            errors += [error.__cause__, error.__context__]


# Settings which reach the engine and the session


@pytest.mark.parametrize(
    ("pool", "settings"),
    [("low", (5, 10, 60, 7200)), ("medium", (10, 20, 30, 3600)), ("high", (20, 40, 15, 1800))],
)
async def test_the_profile_sets_the_pool(
    pool: PoolName, settings: tuple[int, int, float, int], database_url: str
) -> None:
    async with Database(database_url, pool=pool) as database:
        assert pool_settings(database) == settings


def pool_settings(database: Database) -> tuple[int, int, float, int]:
    """What SQLAlchemy's pool was made with; it has no public names for three of the four."""
    pool: Any = database.engine.sync_engine.pool
    return pool.size(), pool._max_overflow, pool._timeout, pool._recycle


async def test_a_pool_class_of_the_users_own_needs_none_of_the_profiles_values(
    database_url: str,
) -> None:
    async with Database(database_url, engine_options={"poolclass": NullPool}) as database:
        async with database.session() as session:
            assert await session.scalar(text("SELECT 42")) == 42
        await assert_disconnected(database_url)


async def test_modes_that_begin_alike_share_one_variant_of_the_engine(sqlite_url: str) -> None:
    """A callable may make a mode for each request, with a rule of its own in it."""
    rules: list[Callable[[int], bool] | None] = [lambda _: True, lambda _: False, None]
    async with Database(sqlite_url) as database:
        binds = {
            id(database.life.bind_for(database.engine.sync_engine, transactional(commit_on=rule)))
            for rule in rules
        }
        assert len(binds) == 1


async def test_engine_options_override_the_profile_one_by_one(sqlite_url: str) -> None:
    options = {"max_overflow": 0, "pool_timeout": 0.1}
    async with Database(sqlite_url, pool="high", engine_options=options) as database:
        assert pool_settings(database) == (20, 0, 0.1, 1800)
    profile = PoolProfile(pool_size=2)
    async with Database(sqlite_url, pool=profile, engine_options=options) as database:
        assert pool_settings(database) == (2, 0, 0.1, 3600)


async def test_an_engine_option_that_is_a_dictionary_is_merged(postgresql_url: str) -> None:
    options: dict[str, Any] = {
        "connect_args": {"server_settings": {"application_name": "shop"}},
        "execution_options": {"postgresql_readonly": False},
    }
    async with Database(postgresql_url, pooler="transaction", engine_options=options) as database:
        async with database.session() as session:
            assert await session.scalar(text("SHOW application_name")) == "shop"
        assert await statement_caches(database) == (0, 0)


async def test_sessions_neither_flush_nor_expire_by_themselves_unless_told_to(
    sqlite_url: str,
) -> None:
    async with Database(sqlite_url) as database:
        await database.create_tables(Base.metadata)
        async with database.transaction() as session:
            assert not session.autoflush
            session.add(author := Author(name="Ada"))
            assert (await session.scalars(select(Author))).all() == []
        assert author.name == "Ada"
    options = {"autoflush": True, "info": {"of": "the test"}}
    async with Database(sqlite_url, session_options=options) as database:
        async with database.session() as session:
            session.add(Author(name="Grace"))
            assert len((await session.scalars(select(Author))).all()) == 2
            assert session.info == {"of": "the test"}
            await session.rollback()


async def statement_caches(database: Database) -> tuple[int, int]:
    """The sizes of the driver's cache of prepared statements, and of the dialect's."""
    async with database.engine.connect() as connection:
        adapted: Any = (await connection.get_raw_connection()).dbapi_connection
        driver = adapted.driver_connection
        caching = driver._config.statement_cache_size, adapted._prepared_statement_cache
        return caching[0], 0 if caching[1] is None else caching[1].capacity


async def test_behind_a_transaction_pooler_both_statement_caches_are_off(
    postgresql_url: str,
) -> None:
    async with Database(postgresql_url) as database:
        assert min(await statement_caches(database)) > 0
    async with Database(
        postgresql_url, pooler="transaction", engine_options=ONE_CONNECTION
    ) as database:
        assert await statement_caches(database) == (0, 0)
        await database.create_tables(Base.metadata)
        for number in range(3):
            async with database.transaction() as session:
                await write(session, f"{number}")
            for mode in MODES:
                async with database.session(mode) as session:
                    assert len((await session.scalars(select(Author))).all()) == number + 1
        async with database.session() as session:
            kept = await session.scalar(text("SELECT count(*) FROM pg_prepared_statements"))
        assert kept == 0


@pytest.mark.parametrize("url", ["mysql_url", "sqlite_url"])
async def test_a_pooler_means_nothing_to_the_other_databases(
    url: str, request: pytest.FixtureRequest
) -> None:
    async with Database(request.getfixturevalue(url), pooler="transaction") as database:
        await database.ping()


# What it does


async def test_threads_that_are_first_to_use_a_database_make_one_engine(sqlite_url: str) -> None:
    """As synchronous handlers do where the server sends no lifespan."""
    both_make_one = threading.Barrier(2)

    class Meeting(NullPool):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            with contextlib.suppress(threading.BrokenBarrierError):
                both_make_one.wait(timeout=1)

    database = Database(sqlite_url, engine_options={"poolclass": Meeting})
    loop = asyncio.get_running_loop()
    first, second = await asyncio.gather(
        asyncio.to_thread(database.life_on, loop), asyncio.to_thread(database.life_on, loop)
    )
    assert first is second is database.life
    assert both_make_one.broken
    await database.dispose()


async def test_ping_answers_only_if_the_database_does(
    database_url: str, mysql_url: str, postgresql_url: str
) -> None:
    async with Database(database_url) as database:
        await database.ping()
        await assert_idle(database_url)
    nowhere: dict[str, Any] = {
        "postgresql": Database(postgresql_url).url.set(database="missing"),
        "mysql": Database(mysql_url).url.set(database="missing"),
        "sqlite": "sqlite:////no/such/folder/test.db",
    }
    async with Database(nowhere[Database(database_url).url.get_backend_name()]) as database:
        with pytest.raises(ConfigurationError, match="database|folder"):
            await database.ping()
    await assert_no_thread_of_sqlite()


async def test_an_option_that_the_driver_does_not_take_is_named(server_url: str) -> None:
    url = make_url(server_url).update_query_dict({"nonsense": "1"})
    with pytest.raises(ConfigurationError, match="^The database URL has nonsense="):
        Database(url)
    options = {"connect_args": {"nonsense": 1}}
    async with Database(server_url, engine_options=options) as database:
        with pytest.raises(ConfigurationError, match="options in the URL.*nonsense"):
            await database.ping()


async def test_a_creator_of_the_users_own_that_finds_no_server_is_a_database_that_is_down(
    database_url: str,
) -> None:
    async def connect() -> Any:
        raise ConnectionRefusedError("nobody is there")

    async with Database(database_url, engine_options={"async_creator": connect}) as database:
        with pytest.raises(DatabaseDownError, match="nobody is there"):
            await database.ping()
        with pytest.raises(DatabaseDownError, match="nobody is there"):
            async with database.session() as session:
                await session.execute(text("SELECT 1"))


async def test_a_creator_of_the_users_own_makes_the_connections(postgresql_url: str) -> None:
    url = make_url(postgresql_url).set(drivername="postgresql")
    name = url.database

    async def connect() -> Any:
        return await asyncpg.connect(url.set(database=name).render_as_string(hide_password=False))

    async with Database(postgresql_url, engine_options={"async_creator": connect}) as database:
        async with database.session() as session:
            assert await session.scalar(text("SELECT 42")) == 42
        name = "missing"
        await database.dispose()
        with pytest.raises(ConfigurationError, match='database "missing" does not exist'):
            await database.ping()


async def test_ping_says_so_if_no_connection_is_free_in_time(database_url: str) -> None:
    options = {**ONE_CONNECTION, "pool_timeout": 0.1}
    async with Database(database_url, engine_options=options) as database:
        async with database.session() as session:
            await session.execute(text("SELECT 1"))
            with pytest.raises(PoolTimeoutError):
                await database.ping()
        await database.ping()


async def test_tables_are_created_and_dropped_and_both_may_be_repeated(database_url: str) -> None:
    async with Database(database_url) as database:
        for _ in range(2):
            await database.create_tables(Base.metadata)
        assert await authors(database_url) == []
        for _ in range(2):
            await database.drop_tables(Base.metadata)
        await database.create_tables(Base.metadata)
        assert await authors(database_url) == []


async def test_async_with_disposes_at_the_end_also_after_an_error(database_url: str) -> None:
    for error in (None, ZeroDivisionError("boom"), asyncio.CancelledError()):
        try:
            async with Database(database_url) as database:
                await database.ping()
                if error is not None:
                    raise error
        except (ZeroDivisionError, asyncio.CancelledError) as raised:
            assert raised is error
        await assert_disconnected(database_url)


async def test_a_start_that_fails_leaves_no_connection(database_url: str) -> None:
    def refuse(connection: Any, entry: Any) -> None:
        made.append(connection)
        raise ConnectionRefusedError("not yet")

    made = list[Any]()
    database = Database(database_url, wait_for=1)
    event.listen(database.engine.sync_engine, "connect", refuse)
    with pytest.raises(ConnectionError, match="did not come up within 1 s"):
        async with database:
            raise AssertionError("it has started")
    assert made
    await assert_disconnected(database_url)


async def test_a_database_can_be_used_again_after_it_was_disposed(database_url: str) -> None:
    database = Database(database_url)
    engines = set[AsyncEngine]()
    for _ in range(3):
        async with database:
            engines.add(database.engine)
            async with database.transaction() as session:
                await session.execute(text("SELECT 1"))
        await assert_disconnected(database_url)
    await database.dispose()
    assert len(engines) == 3


# session() and transaction()


@pytest.fixture
async def database(database_url: str) -> AsyncGenerator[Database, None]:
    """A database with tables, and one connection."""
    async with Database(database_url, engine_options=ONE_CONNECTION) as database:
        await database.create_tables(Base.metadata)
        yield database
        assert_nothing_out(database)
    await assert_disconnected(database_url)


def assert_nothing_out(database: Database) -> None:
    """Every connection is back in the pool."""
    pool = database.engine.pool
    assert isinstance(pool, QueuePool) and pool.checkedout() == 0


async def test_a_plain_session_is_rolled_back_unless_it_was_committed(
    database: Database, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with database.session() as session:
        await write(session, "committed")
        await session.commit()
        assert await session.scalar(select(Author.name)) == "committed"
    assert messages(caplog) == []
    async with database.session() as session:
        await write(session, "flushed")
    async with database.session() as session:
        session.add(Author(name="not even flushed"))
    assert_nothing_out(database)
    assert await authors(database_url) == ["committed"]
    assert len(messages(caplog)) == 2
    for line in messages(caplog):
        assert "`async with database.session()`: uncommitted work was rolled back" in line


async def test_work_that_was_rolled_back_by_hand_or_by_an_error_needs_no_warning(
    database: Database, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with database.session() as session:
        await write(session)
        await session.rollback()
    with pytest.raises(ZeroDivisionError):
        async with database.session() as session:
            await write(session)
            _ = 1 / 0
    async with database.session() as session:
        assert (await session.scalars(select(Author))).all() == []
    assert messages(caplog) == []
    assert await authors(database_url) == []


async def test_a_plain_session_may_use_explicit_transaction_blocks(
    database: Database, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with database.session() as session:
        async with session.begin():
            session.add(Author(name="Ada"))
        async with session.begin():
            session.add(Author(name="Grace"))
        assert_nothing_out(database)
    assert await authors(database_url) == ["Ada", "Grace"]
    assert messages(caplog) == []


async def test_a_transaction_commits_at_the_end_of_its_block(
    database: Database, database_url: str
) -> None:
    async with database.transaction() as session:
        session.add(author := Author(name="Ada"))
        await session.flush()
        assert await authors(database_url) == []
    assert await authors(database_url) == ["Ada"]
    assert (author.id, author.name) == (1, "Ada")


@pytest.mark.parametrize("error", [ZeroDivisionError("boom"), asyncio.CancelledError()])
async def test_a_transaction_is_rolled_back_whole_if_its_block_raises(
    database: Database, database_url: str, error: BaseException
) -> None:
    with pytest.raises(type(error)) as raised:
        async with database.transaction() as session:
            await write(session)
            raise error
    assert raised.value is error
    assert_nothing_out(database)
    assert await authors(database_url) == []


async def test_a_failed_commit_is_raised_by_the_block_and_logged(
    deferring_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Database(deferring_url, engine_options=ONE_CONNECTION) as database:
        await database.create_tables(Deferred.metadata)
        with pytest.raises(IntegrityError):
            async with database.transaction() as session:
                session.add(Child(parent_id=404))
        assert_nothing_out(database)
        (line,) = messages(caplog)
        assert "`async with database.transaction()`: COMMIT failed" in line
        async with database.session() as session:
            assert (await session.scalars(select(Child))).all() == []


@pytest.fixture(params=["postgresql", "sqlite"])
def deferring_url(request: pytest.FixtureRequest) -> str:
    """A database which can check a foreign key at COMMIT."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


async def test_a_commit_on_a_connection_that_was_killed_is_raised_by_the_block(
    mysql_url: str,
) -> None:
    async with Database(mysql_url, engine_options=ONE_CONNECTION) as database:
        await database.create_tables(Base.metadata)
        with pytest.raises(DBAPIError):
            async with database.transaction() as session:
                await write(session)
                id = await session.scalar(text("SELECT connection_id()"))
                async with outside(mysql_url) as other:
                    await other.execute(f"KILL {id}")
        assert_nothing_out(database)
        assert await authors(mysql_url) == []
        async with database.transaction() as session:
            await write(session)
        assert await authors(mysql_url) == ["Ada"]


async def test_a_transaction_in_which_a_failed_statement_was_swallowed_is_not_committed(
    database: Database, database_url: str
) -> None:
    with pytest.raises(FailedTransactionError):
        async with database.transaction() as session:
            await write(session)
            with pytest.raises(DBAPIError):
                await session.execute(text("SELECT * FROM missing"))
    assert await authors(database_url) == []


async def test_a_statement_may_fail_inside_a_savepoint(
    database: Database, database_url: str
) -> None:
    async with database.transaction() as session:
        await write(session)
        with pytest.raises(DBAPIError):
            async with session.begin_nested():
                await session.execute(text("SELECT * FROM missing"))
    assert await authors(database_url) == ["Ada"]


async def test_a_transaction_takes_a_variant_of_its_mode(postgresql_url: str) -> None:
    async with Database(postgresql_url, engine_options=ONE_CONNECTION) as database:
        serializable = transactional(isolation="SERIALIZABLE")
        async with database.transaction(serializable) as session:
            level = await session.scalar(text("SHOW transaction_isolation"))
        assert level == "serializable"
        async with database.transaction() as session:
            level = await session.scalar(text("SHOW transaction_isolation"))
        assert level == "read committed"


async def test_serializable_transactions_that_conflict_do_not_both_commit(
    postgresql_url: str,
) -> None:
    async with Database(postgresql_url) as database:
        await database.create_tables(Base.metadata)
        serializable = transactional(isolation="SERIALIZABLE")
        with pytest.raises(DBAPIError, match="lost a conflict .*40001"):
            async with database.transaction(serializable) as one:
                assert (await one.scalars(select(Author))).all() == []
                async with database.transaction(serializable) as other:
                    assert (await other.scalars(select(Author))).all() == []
                    await write(other, "other")
                await write(one, "one")
        assert await authors(postgresql_url) == ["other"]


@pytest.mark.parametrize("mode", MODES)
async def test_a_session_used_after_its_block_says_what_to_use_instead(
    mode: Mode, database: Database
) -> None:
    async with database.session(mode) as session:
        found = (await session.scalars(select(Author))).all()
    assert found == []
    uses: list[Callable[[], Any]] = [
        lambda: session.execute(select(Author)),
        lambda: session.get(Author, 1),
        session.commit,
        session.flush,
        session.connection,
    ]
    for use in uses:
        with pytest.raises(SessionExpiredError, match=r"`async with database.session\(\)"):
            await use()
    await session.close()
    assert_nothing_out(database)


async def test_a_session_that_outlives_its_block_in_another_task_is_refused_there(
    database: Database,
) -> None:
    left = asyncio.Event()

    async def outlive(session: DBSession) -> None:
        await left.wait()
        await session.execute(select(Author))

    async with database.session() as session:
        task = asyncio.create_task(outlive(session))
        await session.execute(select(Author))
    left.set()
    with pytest.raises(SessionExpiredError):
        await task


async def test_two_tasks_in_one_session_are_an_error_that_says_so(database: Database) -> None:
    with pytest.raises(ConcurrentUseError, match="one task at a time"):
        async with database.session() as session:
            await asyncio.gather(*(session.execute(text("SELECT 1")) for _ in range(2)))
    assert_nothing_out(database)


async def test_release_gives_the_connection_back_inside_the_block(
    database: Database, database_url: str
) -> None:
    async with database.transaction() as session:
        await write(session)
        await session.commit()
        author = (await session.scalars(select(Author))).one()
        await session.release()
        assert_nothing_out(database)
        await assert_idle(database_url)
        assert author.name == "Ada"
        author.name = "Countess of Lovelace"
    assert await authors(database_url) == ["Countess of Lovelace"]


# SQLite


@asynccontextmanager
async def in_memory() -> AsyncGenerator[tuple[Database, Path], None]:
    """A database in memory with tables, and the folder in which it lives."""
    async with Database("sqlite://") as database:
        await database.create_tables(Base.metadata)
        yield database, Path(str(database.engine.url.database)).parent


async def test_all_connections_see_one_and_the_same_database_in_memory() -> None:
    async with in_memory() as (database, _):
        async with database.session() as one, database.session() as other:
            await write(one)
            await one.commit()
            assert (await other.scalars(select(Author.name))).all() == ["Ada"]
            assert len({id(await driver_connection(session)) for session in (one, other)}) == 2


async def driver_connection(session: DBSession) -> object:
    """The driver's own connection which the session has."""
    raw = await (await session.connection()).get_raw_connection()
    return raw.driver_connection


async def test_transactions_in_memory_are_isolated_from_each_other() -> None:
    async with in_memory() as (database, _):
        async with database.session() as writing, database.session() as reading:
            await write(writing)
            assert (await reading.scalars(select(Author))).all() == []
            await reading.rollback()
            await writing.rollback()
            assert (await reading.scalars(select(Author))).all() == []
            await reading.rollback()
            await write(writing)
            await writing.commit()
            assert (await reading.scalars(select(Author.name))).all() == ["Ada"]


async def test_a_database_in_memory_is_gone_once_it_is_disposed() -> None:
    async with in_memory() as (database, folder):
        async with database.transaction() as session:
            await write(session)
        assert folder.is_dir()
    assert not folder.exists()
    async with database:
        with pytest.raises(DBAPIError, match="no such table"):
            async with database.session() as session:
                await session.execute(select(Author))
        again = Path(str(database.engine.url.database)).parent
    assert again != folder and not again.exists()


async def test_two_databases_in_memory_are_separate() -> None:
    async with in_memory() as (one, _), in_memory() as (other, _):
        async with one.transaction() as session:
            await write(session)
        async with other.session() as session:
            assert (await session.scalars(select(Author))).all() == []


def test_a_database_in_memory_is_the_same_in_every_event_loop_until_it_is_disposed() -> None:
    """A test client without `with` has a loop for each request, and closes it without a word."""
    database = Database("sqlite://")

    async def create() -> Path:
        await database.create_tables(Base.metadata)
        async with database.transaction() as session:
            await write(session)
        return Path(str(database.engine.url.database)).parent

    async def read() -> list[str]:
        async with database.session() as session:
            names = list(await session.scalars(select(Author.name)))
        await background_is_over(60)  # the connections of the closed loop close in this one
        return names

    async def read_and_dispose_beside_another_loop() -> None:
        async with database:
            assert await read() == ["Ada"]
            await asyncio.to_thread(asyncio.run, dispose_after(read()))
            assert await read() == ["Ada"]

    async def dispose_after(reading: Coroutine[Any, Any, list[str]]) -> None:
        assert await reading == ["Ada"]
        await database.dispose()

    folder = asyncio.run(create())
    assert asyncio.run(read()) == ["Ada"]
    assert folder.is_dir()
    asyncio.run(database.dispose())  # in a loop that has not used it
    assert not folder.exists()
    again = asyncio.run(create())
    asyncio.run(read_and_dispose_beside_another_loop())
    assert again != folder and not again.exists()


def test_the_folder_of_a_database_in_memory_goes_with_a_forgotten_database() -> None:
    async def forget() -> Path:
        database = Database("sqlite://")
        folder = Path(str(database.engine.url.database)).parent
        assert folder.is_dir()
        return folder

    folder = asyncio.run(forget())
    gc.collect()
    assert not folder.exists()


@pytest.mark.parametrize("place", ["file", "memory"])
async def test_sqlite_has_foreign_keys_wal_and_a_busy_timeout_on_every_connection(
    place: str, sqlite_url: str
) -> None:
    async with Database(sqlite_url if place == "file" else "sqlite://") as database:
        async with database.session() as one, database.session(transactional) as other:
            for session in (one, other):
                pragmas = {
                    name: await session.scalar(text(f"PRAGMA {name}"))
                    for name in ("foreign_keys", "journal_mode", "busy_timeout")
                }
                assert pragmas == {
                    "foreign_keys": 1,
                    "journal_mode": "wal",
                    "busy_timeout": 30_000,
                }


@pytest.mark.parametrize("place", ["the URL", "connect_args"])
async def test_a_busy_timeout_of_the_users_own_wins(place: str, sqlite_url: str) -> None:
    url = f"{sqlite_url}?timeout=2" if place == "the URL" else sqlite_url
    options = {"connect_args": {"timeout": 2}} if place == "connect_args" else {}
    async with Database(url, engine_options=options) as database, database.session() as session:
        assert await session.scalar(text("PRAGMA busy_timeout")) == 2_000


async def test_a_broken_reference_is_refused_by_sqlite(sqlite_url: str) -> None:
    async with Database(sqlite_url) as database:
        await database.create_tables(Base.metadata)
        with pytest.raises(IntegrityError, match="FOREIGN KEY"):
            async with database.transaction() as session:
                await session.execute(text("INSERT INTO book VALUES (1, 'Notes', 404)"))


async def test_an_sqlite_file_is_durable_and_one_in_memory_need_not_be(sqlite_url: str) -> None:
    synchronous = text("PRAGMA synchronous")
    async with Database(sqlite_url) as database, database.session() as session:
        assert await session.scalar(synchronous) in (1, 2)  # NORMAL or FULL
    async with Database("sqlite://") as database, database.session() as session:
        assert await session.scalar(synchronous) == 0


async def test_an_sqlite_file_for_reading_alone_is_read(tmp_path: Path) -> None:
    file = tmp_path / "test.db"
    with sqlite3.connect(file) as other:
        other.execute("CREATE TABLE author (id INTEGER PRIMARY KEY, name)")
        other.execute("INSERT INTO author VALUES (1, 'Ada')")
    other.close()
    async with Database(f"sqlite:///file:{file}?mode=ro&uri=true") as database:
        for mode in (plain, read_only, read_only(snapshot=True)):
            async with database.session(mode) as session:
                assert await session.scalar(text("SELECT name FROM author")) == "Ada"
        with pytest.raises(DBAPIError, match="readonly database"):
            async with database.transaction() as session:
                await write(session)
        await database.ping()
    assert os.listdir(tmp_path) == [file.name]


async def test_an_sqlite_file_that_cannot_be_set_to_wal_for_another_reason_is_an_error(
    sqlite_url: str,
) -> None:
    other = sqlite3.connect(sqlite_url.partition("///")[2], isolation_level=None)
    with contextlib.closing(other):
        other.execute("CREATE TABLE author (id INTEGER PRIMARY KEY)")
        other.execute("BEGIN EXCLUSIVE")
        async with Database(f"{sqlite_url}?timeout=0.1") as database:
            with pytest.raises(DatabaseConflictError, match="SQLITE_BUSY"):
                await database.ping()


async def test_wal_lets_a_reader_in_while_somebody_writes(sqlite_url: str) -> None:
    async with Database(sqlite_url) as database:
        await database.create_tables(Base.metadata)
        async with database.transaction() as writing:
            await write(writing)
            for mode in (plain, read_only, read_only(snapshot=True)):
                async with database.session(mode) as reading:
                    assert (await reading.scalars(select(Author))).all() == []
    with sqlite3.connect(sqlite_url.partition("///")[2]) as witness:
        assert witness.execute("SELECT name FROM author").fetchall() == [("Ada",)]
    witness.close()


# MySQL's character set


@pytest.fixture
async def latin1_url(mysql_server: DatabaseServer) -> AsyncGenerator[str, None]:
    """A database on a server whose default character set is latin1."""
    async with outside(mysql_server.url) as administrator:
        sql = "SELECT @@global.character_set_server, @@global.collation_server"
        ((charset, collation),) = await administrator.execute(sql)
        await administrator.execute("SET GLOBAL character_set_server = latin1")
        try:
            with mysql_server.fresh_database() as url:
                yield url
        finally:
            await administrator.execute(f"SET GLOBAL character_set_server = {charset}")
            await administrator.execute(f"SET GLOBAL collation_server = {collation}")


async def test_mysql_talks_utf8mb4_also_where_the_server_defaults_to_latin1(
    latin1_url: str,
) -> None:
    name = "Ada 👩‍💻 ä ß 漢"
    async with Database(latin1_url) as database:
        async with database.session() as session:
            found = await session.execute(
                text(
                    "SELECT @@character_set_client, @@character_set_connection,"
                    " @@character_set_results, @@character_set_server"
                )
            )
            assert found.one() == ("utf8mb4", "utf8mb4", "utf8mb4", "latin1")
            await session.execute(text("CREATE TABLE note (t VARCHAR(50) CHARACTER SET utf8mb4)"))
            await session.execute(text("INSERT INTO note VALUES (:name)"), {"name": name})
            await session.commit()
        async with database.session(read_only) as session:
            assert await session.scalar(text("SELECT t FROM note")) == name
            assert await session.scalar(text("SELECT char_length(t) FROM note")) == len(name)
    async with outside(latin1_url) as witness:
        assert await witness.execute("SELECT t FROM note") == [(name,)]


async def test_another_charset_of_a_url_is_the_one_that_is_used(mysql_url: str) -> None:
    given = Database(mysql_url).url
    url = create_database_url(
        "mysql",
        user=given.username,
        password=str(given.password),
        host=given.host,
        port=given.port,
        database=given.database,
        charset="latin1",
    )
    async with Database(url) as database, database.session() as session:
        assert await session.scalar(text("SELECT @@character_set_client")) == "latin1"


async def test_every_connection_has_what_a_listener_sets_up_that_is_added_after_the_wait(
    database_url: str,
) -> None:
    """The wait leaves no connection in the pool that the listener has not seen."""
    async with Database(database_url, wait_for=5) as database:
        seen: list[object] = []

        @event.listens_for(database.engine.sync_engine, "connect")
        def connect(connection: Any, _: Any) -> None:
            seen.append(connection)

        for _ in range(2):
            async with database.session() as session:
                raw = await (await session.connection()).get_raw_connection()
                assert seen == [raw.dbapi_connection]
