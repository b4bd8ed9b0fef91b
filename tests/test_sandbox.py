"""Sandboxes for the tests of applications: what is written in one is gone afterwards."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from litestar import Litestar, get, post
from litestar.testing import AsyncTestClient
from litestar.testing import TestClient as LitestarClient
from sqlalchemy import NullPool, delete, event, func, insert, make_url, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.testclient import TestClient

from asgi_db import (
    Database,
    DatabaseDownError,
    DatabaseTimeoutError,
    DBSession,
    DBSessionMiddleware,
    FailedTransactionError,
    ReadOnlyError,
    SandboxError,
    plain,
    read_only,
    transactional,
)
from asgi_db_fastapi import CurrentSession, CurrentSessionReadOnly, CurrentSessionTransaction
from asgi_db_litestar import DatabasePlugin
from tests.limits import set_limits
from tests.servers import assert_disconnected, outside, run
from tests.tables import Author, Base, Child, Deferred, Parent, authors
from tests.versions import FromQuery, NamedDependency

NAMES = select(Author.name).order_by(Author.name)
ENDLESS = {
    "postgresql": "(SELECT CAST(pg_sleep(3600) AS text))",
    "mysql": "SLEEP(3600)",
    "sqlite": "(WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c)"
    " SELECT count(*) FROM c)",
}
"""Expressions whose value does not come before the test is over."""


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A database with its tables, and one author who is really there."""
    async with Database(database_url) as database:
        await database.create_tables(Base.metadata)
        async with database.transaction() as session:
            session.add(Author(name="Ada"))
        yield database
    await assert_disconnected(database_url)


@pytest.fixture(params=["postgresql", "sqlite"])
def url_with_deferred_constraints(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


def add(name: str) -> Any:
    return insert(Author).values(name=name)


async def names(database: Database) -> list[str]:
    async with database.session(read_only) as session:
        return list(await session.scalars(NAMES))


def fastapi_app(database: Database) -> FastAPI:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=database)

    @app.post("/authors")
    async def create(name: str, session: CurrentSessionTransaction) -> int:
        author = Author(name=name)
        session.add(author)
        await session.flush()
        return author.id

    @app.post("/uncommitted")
    async def forget(name: str, session: CurrentSession) -> None:
        await session.execute(add(name))

    @app.get("/authors")
    async def show(session: CurrentSessionReadOnly) -> list[str]:
        return list(await session.scalars(NAMES))

    return app


def litestar_app(database: Database) -> Litestar:
    @post("/authors")
    async def create(
        name: FromQuery[str], db_session_transaction: NamedDependency[DBSession]
    ) -> None:
        db_session_transaction.add(Author(name=name))

    @get("/authors")
    async def show(db_session_read_only: NamedDependency[DBSession]) -> list[str]:
        return list(await db_session_read_only.scalars(NAMES))

    return Litestar([create, show], plugins=[DatabasePlugin(database)], openapi_config=None)


def in_process(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


# -- nothing stays, and the tools that see it meanwhile ----------------------------------------


async def test_what_the_application_and_the_test_commit_is_gone_afterwards(
    database: Database, database_url: str
) -> None:
    async with database.sandbox(), in_process(fastapi_app(database)) as client:
        async with database.transaction() as session:
            session.add(Author(name="Ben"))
        assert (await client.post("/authors", params={"name": "Cleo"})).status_code == 200
        async with database.session() as session:
            session.add(Author(name="Dora"))
            await session.commit()
        async with database.engine.begin() as connection:
            await connection.execute(add("Emil"))
        assert (await client.get("/authors")).json() == ["Ada", "Ben", "Cleo", "Dora", "Emil"]
        assert await authors(database_url) == ["Ada"]
    assert await authors(database_url) == ["Ada"]
    assert await names(database) == ["Ada"]
    await database.dispose()


async def test_after_the_sandbox_a_commit_is_real_again(
    database: Database, database_url: str
) -> None:
    async with database.sandbox(), in_process(fastapi_app(database)) as client:
        await client.post("/authors", params={"name": "Ben"})
    async with in_process(fastapi_app(database)) as client:
        await client.post("/authors", params={"name": "Cleo"})
    assert await authors(database_url) == ["Ada", "Cleo"]


async def test_what_is_not_committed_is_rolled_back_at_once(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    async with database.sandbox(), in_process(fastapi_app(database)) as client:
        await client.post("/uncommitted", params={"name": "Ben"})
        assert (await client.get("/authors")).json() == ["Ada"]
        with pytest.raises(ZeroDivisionError):
            async with database.transaction() as session:
                await session.execute(add("Cleo"))
                raise ZeroDivisionError
        assert await names(database) == ["Ada"]
    assert "POST /uncommitted" in caplog.text


@contextmanager
def served_in_another_loop(database_url: str) -> Generator[Database]:
    """A database whose tables were made in an event loop that is gone."""

    async def create() -> None:
        async with Database(database_url) as database:
            await database.create_tables(Base.metadata)

    run(create())
    yield Database(database_url)
    run(assert_disconnected(database_url))


def test_starlettes_client_with_its_lifespan(database_url: str) -> None:
    with served_in_another_loop(database_url) as database:
        with database.sandbox(), TestClient(fastapi_app(database)) as client:
            assert client.post("/authors", params={"name": "Ben"}).status_code == 200
            assert client.get("/authors").json() == ["Ben"]
        with database.sandbox(), TestClient(fastapi_app(database)) as client:
            assert client.get("/authors").json() == []


def test_starlettes_client_with_an_event_loop_for_each_request(database_url: str) -> None:
    with served_in_another_loop(database_url) as database:
        with database.sandbox():
            client = TestClient(fastapi_app(database))
            assert client.post("/authors", params={"name": "Ben"}).status_code == 200
            assert client.get("/authors").json() == ["Ben"]
        assert run(authors(database_url)) == []


def test_a_database_in_memory_stays_while_the_application_starts_again() -> None:
    """Its last engine is disposed with the application, but for the one of the sandbox."""
    with served_in_another_loop("sqlite://") as database, database.sandbox():
        run(database.create_tables(Base.metadata))
        with TestClient(fastapi_app(database)) as client:
            assert client.post("/authors", params={"name": "Ben"}).status_code == 200
        with TestClient(fastapi_app(database)) as client:
            assert client.post("/authors", params={"name": "Cleo"}).status_code == 200
            assert client.get("/authors").json() == ["Ben", "Cleo"]


async def test_the_application_in_one_event_loop_and_the_test_in_another(
    database: Database,
) -> None:
    async with database.sandbox():
        with TestClient(fastapi_app(database)) as client:
            async with database.session() as session:
                session.add(Author(name="Ben"))
                await session.commit()
                assert client.get("/authors").json() == ["Ada", "Ben"]
                client.post("/authors", params={"name": "Cleo"})
                assert list(await session.scalars(NAMES)) == ["Ada", "Ben", "Cleo"]


async def test_litestars_asynchronous_client(database: Database) -> None:
    async with database.sandbox(), AsyncTestClient(litestar_app(database)) as client:
        assert (await client.post("/authors", params={"name": "Ben"})).status_code == 201
        assert (await client.get("/authors")).json() == ["Ada", "Ben"]
    assert await names(database) == ["Ada"]


def test_litestars_synchronous_client(database_url: str) -> None:
    with served_in_another_loop(database_url) as database:
        with database.sandbox(), LitestarClient(litestar_app(database)) as client:
            assert client.post("/authors", params={"name": "Ben"}).status_code == 201
            assert client.get("/authors").json() == ["Ben"]
        assert run(authors(database_url)) == []


async def test_an_engine_of_ones_own_is_in_the_sandbox_too(database_url: str) -> None:
    engine = create_async_engine(database_url)
    async with Database(engine=engine) as database:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with database.sandbox():
            async with database.transaction() as session:
                await session.execute(add("Ben"))
            async with engine.connect() as connection:
                assert await connection.scalar(select(func.count()).select_from(Author)) == 1
        assert await names(database) == []
    await engine.dispose()
    await assert_disconnected(database_url)


async def test_an_engine_of_ones_own_that_is_disposed_in_the_sandbox_goes_on(
    database_url: str,
) -> None:
    engine = create_async_engine(database_url)
    database = Database(engine=engine)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with database.sandbox():
        async with database.transaction() as session:
            await session.execute(add("Ben"))
        await engine.dispose()
        assert await names(database) == ["Ben"]
    for _ in range(2):
        assert await names(database) == []
    async with database.transaction() as session:
        await session.execute(add("Cleo"))
    assert await authors(database_url) == ["Cleo"]
    await engine.dispose()


async def test_a_database_in_memory() -> None:
    async with Database("sqlite://") as database:
        await database.create_tables(Base.metadata)
        async with database.sandbox():
            async with database.transaction() as session:
                await session.execute(add("Ben"))
            assert await names(database) == ["Ben"]
        assert await names(database) == []


@pytest.mark.parametrize("is_given", [False, True], ids=["made", "given"])
async def test_a_creator_of_ones_own_is_replaced_while_the_sandbox_lasts(
    database_url: str, is_given: bool
) -> None:
    parameters = make_url(database_url)
    connects = 0

    async def connect() -> Any:
        nonlocal connects
        connects += 1
        arguments = parameters.get_dialect()().create_connect_args(parameters)
        driver = import_module(parameters.get_driver_name())
        connecting = getattr(driver, "AsyncConnection", driver).connect  # psycopg has both kinds
        return await connecting(*arguments[0], **arguments[1])

    engine = create_async_engine(parameters, async_creator=connect) if is_given else None
    if engine is not None:
        database = Database(engine=engine)
    else:
        database = Database(database_url, engine_options={"async_creator": connect})
    async with database:
        await database.create_tables(Base.metadata)
        for _ in range(2):
            connects = 0
            async with database.sandbox():
                async with database.transaction() as session:
                    await session.execute(add("Ben"))
                await database.engine.dispose()
                assert await names(database) == ["Ben"]
            assert connects == 1  # the sandbox's own
            assert await names(database) == []
            assert connects == 2
    if engine is not None:
        await engine.dispose()
    await assert_disconnected(database_url)


@pytest.mark.parametrize("is_given", [False, True], ids=["made", "given"])
async def test_a_listener_sets_up_the_one_connection_once(
    database_url: str, is_given: bool
) -> None:
    engine = create_async_engine(database_url, poolclass=NullPool)
    async with Database(engine=engine) if is_given else Database(database_url) as database:

        @event.listens_for(database.engine.sync_engine, "connect")
        def connect(connection: Any, _: Any) -> None:
            cursor = connection.cursor()
            cursor.execute("CREATE TEMPORARY TABLE settings (name VARCHAR(9))")
            cursor.execute("INSERT INTO settings VALUES ('Ada')")
            cursor.close()
            connection.commit()

        for _ in range(2):
            async with database.sandbox():
                for _ in range(2):
                    async with database.transaction() as session:
                        assert list(await session.scalars(text("SELECT name FROM settings"))) == [
                            "Ada"
                        ]
                    await database.engine.dispose()
        async with database.session() as session:
            assert list(await session.scalars(text("SELECT name FROM settings"))) == ["Ada"]
    await engine.dispose()
    await assert_disconnected(database_url)


@pytest.mark.parametrize("is_given", [False, True], ids=["own", "given"])
async def test_a_listener_that_uses_the_driver_sets_up_the_one_connection_once(
    database_url: str, is_given: bool
) -> None:
    """As one does that sets a codec."""
    seen: list[object] = []

    async def see(driver_connection: object) -> int:
        seen.append(driver_connection)
        return len(seen)

    engine = create_async_engine(database_url)
    async with Database(engine=engine) if is_given else Database(database_url) as database:

        @event.listens_for(database.engine.sync_engine, "connect")
        def connect(connection: Any, _: Any) -> None:
            connection.run_async(see)
            connection.run_async(see)

        for _ in range(2):
            seen.clear()
            async with database.sandbox():
                async with database.session() as one, database.session() as two:
                    assert await one.scalar(text("SELECT 1")) == 1
                    assert await two.scalar(text("SELECT 1")) == 1
                await database.engine.dispose()
                async with database.session() as session:
                    await session.scalar(text("SELECT 1"))
            assert len(seen) == 2
            assert seen[0] is seen[1]
        seen.clear()
        async with database.session() as session:
            await session.scalar(text("SELECT 1"))
        assert len(seen) == 2
    await engine.dispose()
    await assert_disconnected(database_url)


# -- as in production --------------------------------------------------------------------------


async def test_savepoints_nest(database: Database) -> None:
    async with database.sandbox():
        async with database.transaction() as session:
            await session.execute(add("Ben"))
            with pytest.raises(IntegrityError):
                async with session.begin_nested():
                    await session.execute(add("Cleo"))
                    async with session.begin_nested():
                        await session.execute(add("Ben"))
            async with session.begin_nested():
                await session.execute(add("Dora"))
        assert await names(database) == ["Ada", "Ben", "Dora"]


async def test_a_failed_statement_fails_the_commit(database: Database) -> None:
    async with database.sandbox():
        with pytest.raises(FailedTransactionError):
            async with database.transaction() as session:
                await session.execute(add("Ben"))
                with pytest.raises(IntegrityError):
                    await session.execute(add("Ben"))
        assert await names(database) == ["Ada"]


async def test_a_failed_statement_that_stands_alone_harms_no_other(database: Database) -> None:
    async with database.sandbox(), database.session(read_only) as session:
        with pytest.raises(DBAPIError):
            await session.execute(text("SELECT * FROM no_such_table"))
        assert list(await session.scalars(NAMES)) == ["Ada"]


async def test_a_mode_that_only_reads_refuses_to_write(database: Database) -> None:
    async with database.sandbox(), database.session(read_only) as session:
        with pytest.raises(ReadOnlyError):
            await session.execute(add("Ben"))


_FUNCTION_THAT_WRITES = """
    CREATE FUNCTION rename_all() RETURNS void LANGUAGE sql AS 'UPDATE author SET name = name'
"""


async def test_postgresql_itself_refuses_to_write_in_a_transaction_that_only_reads(
    postgresql_url: str,
) -> None:
    async with Database(postgresql_url) as database, database.sandbox():
        await database.create_tables(Base.metadata)
        async with database.transaction() as session:
            await session.execute(text(_FUNCTION_THAT_WRITES))
        hidden = text("SELECT rename_all()")
        with pytest.raises(DBAPIError, match="read-only transaction"):
            async with database.session(read_only(snapshot=True)) as session:
                await session.execute(hidden)
        async with database.session(read_only(snapshot=True)) as session:
            await session.execute(NAMES)
        async with database.transaction() as session:
            await session.execute(hidden)


async def test_a_commit_that_violates_a_deferred_constraint_fails(
    url_with_deferred_constraints: str,
) -> None:
    async with Database(url_with_deferred_constraints) as database, database.sandbox():
        await database.create_tables(Deferred.metadata)
        for _ in range(2):  # it is deferred in the next transaction too
            with pytest.raises(IntegrityError):
                async with database.transaction() as session:
                    await session.execute(insert(Child).values(id=1, parent_id=1))
            async with database.transaction() as session:
                await session.execute(insert(Child).values(id=2, parent_id=2))
                await session.execute(insert(Parent).values(id=2))
            async with database.transaction() as session:
                await session.execute(delete(Child))
                await session.execute(delete(Parent))


async def test_what_postgresql_sets_for_a_transaction_ends_with_it(postgresql_url: str) -> None:
    tenant = text("SELECT current_setting('app.tenant', true)")
    async with Database(postgresql_url) as database, database.sandbox():
        for statement in (
            text("SET LOCAL app.tenant = '7'"),
            text("SELECT set_config('app.tenant', '7', true)"),
            select(func.set_config("app.tenant", "7", True)),
        ):
            async with database.transaction() as session:
                await session.execute(statement)
                assert await session.scalar(tenant) == "7"
            async with database.transaction() as session:
                assert await session.scalar(tenant) in (None, "")


async def test_rows_are_streamed(database: Database) -> None:
    async with database.sandbox():
        async with database.transaction() as session:
            await session.execute(insert(Author), [{"name": f"n{n:03}"} for n in range(200)])
        async with database.session(read_only(snapshot=True)) as session:
            stream = await session.stream_scalars(NAMES)
            assert len([name async for name in stream]) == 201


async def test_a_unit_whose_time_is_over_is_rolled_back_and_the_sandbox_goes_on(
    database: Database,
) -> None:
    endless = ENDLESS[database.url.get_backend_name()]
    async with database.sandbox():
        for _ in range(2):
            with pytest.raises(DatabaseTimeoutError):
                async with database.transaction(transactional(timeout=0.3)) as session:
                    await session.execute(add("Ben"))
                    # It must not wait for this statement because of one that was cut off before.
                    asyncio.get_running_loop().call_later(0.1, gc.collect)
                    await session.execute(text(f"SELECT {endless}"))
            async with asyncio.timeout(30):
                assert await names(database) == ["Ada"]


@pytest.mark.parametrize("written", [False, True], ids=["read", "write"])
async def test_a_statement_without_an_end_does_not_keep_the_sandbox_from_ending(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    set_limits(monkeypatch, sandbox_close=0.5)
    endless = ENDLESS[database.url.get_backend_name()]
    statement = f"UPDATE author SET name = ({endless})" if written else f"SELECT {endless}"
    async with asyncio.timeout(30), database.sandbox():
        with pytest.raises(DatabaseTimeoutError):
            async with database.transaction(transactional(timeout=0.3)) as session:
                await session.execute(text(statement))
    assert await authors(database_url) == ["Ada"]
    async with database.transaction() as session:
        await session.execute(add("Ben"))


async def test_a_request_that_is_cancelled_in_a_statement_is_rolled_back(
    database: Database,
) -> None:
    async def write_for_ever() -> None:
        async with database.transaction() as session:
            await session.execute(add("Ben"))
            written.set()
            while True:
                await session.execute(update(Author).values(name=Author.name))

    written = asyncio.Event()
    async with database.sandbox():
        task = asyncio.create_task(write_for_ever())
        await written.wait()
        task.cancel()
        await asyncio.wait((task,))
        assert await names(database) == ["Ada"]


async def test_the_hooks_run_after_what_counts_as_a_commit(database: Database) -> None:
    ran: list[str] = []
    async with database.sandbox():
        async with database.transaction() as session:
            await session.execute(add("Ben"))
            session.on_commit(lambda: ran.append("committed"))
        with pytest.raises(ZeroDivisionError):
            async with database.transaction() as session:
                await session.execute(add("Cleo"))
                session.on_commit(lambda: ran.append("not this"))
                session.on_rollback(lambda: ran.append("rolled back"))
                raise ZeroDivisionError
    assert ran == ["committed", "rolled back"]


# -- one connection for all --------------------------------------------------------------------


async def test_a_session_that_has_only_read_does_not_stand_in_the_way(database: Database) -> None:
    async with database.sandbox(), in_process(fastapi_app(database)) as client:
        async with database.session() as session:
            assert list(await session.scalars(NAMES)) == ["Ada"]
            await client.post("/authors", params={"name": "Ben"})
            assert list(await session.scalars(NAMES)) == ["Ada", "Ben"]
        assert await names(database) == ["Ada", "Ben"]


@pytest.mark.parametrize(
    "sql", ["/* why */ SELECT 1", "-- why\nSELECT 1", "/* a */ -- b\n /* c */ SELECT 1"]
)
async def test_a_comment_does_not_make_a_write_of_a_read(database: Database, sql: str) -> None:
    async with database.sandbox(), database.session() as session:
        await session.execute(text(sql))
        assert await names(database) == ["Ada"]


async def test_a_savepoint_that_is_over_and_has_only_read_does_not_stand_in_the_way(
    database: Database,
) -> None:
    async with database.sandbox(), database.session() as session:
        async with session.begin_nested():
            await session.scalars(NAMES)
        assert await names(database) == ["Ada"]
        with pytest.raises(ZeroDivisionError):
            async with session.begin_nested():
                await session.scalars(NAMES)
                raise ZeroDivisionError
        assert await names(database) == ["Ada"]
        async with session.begin_nested():
            async with session.begin_nested():
                await session.scalars(NAMES)
            with pytest.raises(SandboxError, match="has a savepoint open"):
                await names(database)
            await session.execute(add("Ben"))
        with pytest.raises(SandboxError, match="has written on it"):
            await names(database)
        await session.commit()
        assert await names(database) == ["Ada", "Ben"]


async def test_two_that_write_at_once_come_one_after_the_other(database: Database) -> None:
    async with database.sandbox(), in_process(fastapi_app(database)) as client:
        await asyncio.gather(
            *(client.post("/authors", params={"name": f"n{n}"}) for n in range(20))
        )
        assert len(await names(database)) == 21


async def test_what_would_wait_for_ever_for_its_own_task_is_an_error_at_once(
    database: Database,
) -> None:
    async with database.sandbox(), database.session() as session:
        await session.execute(add("Ben"))
        with pytest.raises(SandboxError, match="has written on it.*await session.commit"):
            await names(database)
        await session.commit()
        assert await names(database) == ["Ada", "Ben"]


async def test_what_waits_too_long_for_another_task_is_an_error(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limits(monkeypatch, sandbox_wait=0.1)
    async with database.sandbox(), database.session() as session:
        await session.execute(add("Ben"))
        with pytest.raises(SandboxError, match=r"database.session\(\).*has written"):
            await asyncio.create_task(names(database))
        await session.rollback()


async def test_who_has_read_and_failed_does_not_stand_in_the_way(database: Database) -> None:
    async with database.sandbox(), database.session() as session:
        with pytest.raises(DBAPIError):
            await session.execute(text("SELECT * FROM no_such_table"))
        assert await names(database) == ["Ada"]


async def test_who_is_cancelled_while_it_waits_never_gets_its_turn(database: Database) -> None:
    async def write() -> None:
        async with database.transaction() as other:
            await other.execute(add("Cleo"))

    async with database.sandbox(), database.session() as session:
        await session.execute(add("Ben"))
        for steps in range(20):
            task = asyncio.create_task(write())
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait((task,))
        await session.commit()
        assert await names(database) == ["Ada", "Ben"]


# SQLAlchemy 2.0 leaves a connection whose ROLLBACK fails to the garbage collector.
@pytest.mark.filterwarnings("ignore:The garbage collector is trying to clean up")
@pytest.mark.parametrize(
    ("database_url", "sql"),
    [("postgresql", "/* hidden */ ROLLBACK"), ("mysql", "/* hidden */ CREATE TABLE t (id INT)")],
    indirect=["database_url"],
)
async def test_a_transaction_that_ends_behind_its_back_ends_the_sandbox(
    database: Database, database_url: str, sql: str
) -> None:
    async with database.sandbox():
        with pytest.raises((SandboxError, DBAPIError), match="has ended early|SAVEPOINT"):
            async with database.engine.connect() as connection:
                await connection.exec_driver_sql(sql)
        with pytest.raises((SandboxError, DatabaseDownError)):
            async with database.transaction() as session:
                await session.execute(add("Ben"))
    gc.collect()
    assert await authors(database_url) == ["Ada"]


# -- what a sandbox refuses --------------------------------------------------------------------


async def test_mariadb_would_commit_at_ddl_so_it_is_refused(mysql_url: str) -> None:
    async with Database(mysql_url) as database:
        async with database.sandbox():
            with pytest.raises(SandboxError, match="commit by themselves.*before the sandbox"):
                await database.create_tables(Base.metadata)
        await database.create_tables(Base.metadata)
        async with database.sandbox():
            await database.create_tables(Base.metadata)  # there is nothing to create


async def test_a_second_sandbox_at_the_same_time_is_refused(database: Database) -> None:
    async with database.sandbox():
        with pytest.raises(SandboxError, match="in a sandbox already"):
            await database.sandbox().__aenter__()
        assert await names(database) == ["Ada"]


async def test_a_sandbox_does_not_begin_while_a_connection_is_held(database: Database) -> None:
    async with database.session() as session:
        await session.execute(NAMES)
        with pytest.raises(SandboxError, match=r"held by: `async with database.session\(\)`"):
            await database.sandbox().__aenter__()
    async with database.sandbox():
        pass


async def test_an_engine_of_ones_own_in_memory_is_refused_and_left_as_it_is() -> None:
    engine = create_async_engine("sqlite+aiosqlite://")
    async with Database(engine=engine) as database:
        await database.create_tables(Base.metadata)
        async with database.transaction() as session:
            await session.execute(add("Ada"))
        with pytest.raises(SandboxError, match=r'StaticPool.*Database\("sqlite://"\)'):
            await database.sandbox().__aenter__()
        with pytest.raises(SandboxError, match="StaticPool"):
            await asyncio.to_thread(database.sandbox().__enter__)
        assert await names(database) == ["Ada"]
    await engine.dispose()


async def test_a_session_that_outlives_its_sandbox_cannot_write(
    database: Database, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with database.session(plain) as session:
        async with database.sandbox():
            await session.execute(add("Ben"))
        with pytest.raises(SandboxError, match="has ended"):
            await session.execute(add("Cleo"))
        with pytest.raises((SandboxError, FailedTransactionError, DBAPIError)):
            await session.commit()
        await session.rollback()
    assert await authors(database_url) == ["Ada"]
    assert await names(database) == ["Ada"]


@pytest.mark.parametrize("database_url", ["postgresql", "mysql"], indirect=True)
async def test_a_connection_that_is_lost_ends_the_sandbox_and_harms_nothing_else(
    database: Database, database_url: str
) -> None:
    kill = {"postgresql": "SELECT pg_terminate_backend({}, 5000)", "mysql": "KILL {}"}
    ask = {"postgresql": "SELECT pg_backend_pid()", "mysql": "SELECT connection_id()"}
    backend = database.url.get_backend_name()
    async with database.sandbox():
        async with database.transaction() as session:
            await session.execute(add("Ben"))
            id = await session.scalar(text(ask[backend]))
        async with outside(database_url) as connection:
            await connection.execute(kill[backend].format(id))
        for _ in range(2):
            with pytest.raises(DatabaseDownError):
                await names(database)
    assert await names(database) == ["Ada"]


async def test_nothing_of_a_sandbox_is_left_running(database: Database) -> None:
    async with database.sandbox():
        assert [t for t in threading.enumerate() if t.name == "asgi-db sandbox"]
        await names(database)
    assert not [t for t in threading.enumerate() if t.name == "asgi-db sandbox"]
    await database.dispose()


async def test_a_sandbox_on_a_server_that_cannot_be_reached_says_so_and_ends() -> None:
    database = Database("postgresql://nobody@127.0.0.1:1/nothing")
    with pytest.raises(DBAPIError, match="cannot be reached"):
        await database.sandbox().__aenter__()
    with pytest.raises(DBAPIError, match="cannot be reached"):
        database.sandbox().__enter__()
    await database.dispose()


async def test_what_stands_for_a_connection_behaves_like_one(database: Database) -> None:
    async with database.sandbox(), database.session() as session:
        raw = await (await session.connection()).get_raw_connection()
        adapted: Any = raw.dbapi_connection
        driver = raw.driver_connection
        assert adapted.driver_connection is driver

        def by_hand(_: Any) -> list[Any]:
            cursor = adapted.execute("SELECT 1")
            return [tuple(row) for row in cursor]

        assert await session.run_sync(by_hand) == [(1,)]
        for stand_in in (adapted, driver):
            assert not hasattr(stand_in, "_no_such_thing")


@pytest.mark.parametrize("database_url", ["postgresql", "mysql"], indirect=True)
async def test_what_the_drivers_connection_writes_first_is_rolled_back_with_its_transaction(
    database: Database,
) -> None:
    async def write(session: DBSession) -> None:
        raw = await (await session.connection()).get_raw_connection()
        driver: Any = raw.driver_connection
        if database.url.get_backend_name() == "mysql":
            await driver.query("INSERT INTO author (name) VALUES ('Ben')")
        else:
            await driver.execute("INSERT INTO author (name) VALUES ('Ben')")

    async with database.sandbox():
        with pytest.raises(ZeroDivisionError):
            async with database.transaction() as session:
                await write(session)
                raise ZeroDivisionError
        assert await names(database) == ["Ada"]
        async with database.transaction() as session:
            await write(session)
        assert await names(database) == ["Ada", "Ben"]
    assert await names(database) == ["Ada"]


@pytest.mark.parametrize(
    ("database_url", "sql"),
    [
        ("postgresql", "ROLLBACK"),
        ("postgresql", "ABORT"),
        ("mysql", "ROLLBACK"),
        ("sqlite", "ROLLBACK"),
    ],
    indirect=["database_url"],
)
async def test_a_rollback_in_words_is_one(database: Database, sql: str) -> None:
    async with database.sandbox():
        async with database.session() as session:
            await session.execute(add("undone"))
            await (await session.connection()).exec_driver_sql(sql)
            await session.execute(add("kept"))
            await session.commit()
        assert await names(database) == ["Ada", "kept"]
