"""Reads that go to replicas: on which server a unit of work runs, and what the client is told."""

import asyncio
import gc
import re
import weakref
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any, cast

import httpx
import pytest
from fastapi import Depends, FastAPI, Request, Response, WebSocket
from fastapi.responses import StreamingResponse
from sqlalchemy import String, make_url, text
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from asgi_db import (
    ConfigurationError,
    Database,
    DBSession,
    DBSessionMiddleware,
    plain,
    read_only,
    transactional,
)
from asgi_db.configured import configured_database
from asgi_db.drivers.mysql_replication import MariaDBReplication
from asgi_db.drivers.postgresql_replication import PostgreSQLReplication
from asgi_db.drivers.replication import UNKNOWN, Position, latest, parse_position
from asgi_db.types import Message, Scope
from asgi_db_fastapi import CurrentSessionReadOnly, CurrentSessionTransaction
from tests.clusters import Cluster, Urls

SERVER = {"postgresql": "SELECT inet_server_port()", "mysql": "SELECT @@port"}
NAME = "asgi-db-db"


class Servers:
    """Tells on which server a session reads."""

    def __init__(self, urls: Urls) -> None:
        primary = make_url(urls.primary)
        self._question = text(SERVER[primary.get_backend_name()])
        self._primary = primary.port

    async def of(self, session: DBSession) -> str:
        is_primary = await session.scalar(self._question) == self._primary
        return "primary" if is_primary else "replica"


@pytest.fixture
def servers(urls: Urls) -> Servers:
    return Servers(urls)


async def create_items(urls: Urls) -> None:
    """Create a table as another program does, so that this one does not remember that."""
    async with Database(urls.primary) as database, database.transaction() as session:
        await session.execute(text("CREATE TABLE items (id int)"))


@pytest.fixture
async def database(urls: Urls, cluster: Cluster) -> AsyncGenerator[Database]:
    """A database with replicas, on which there is an empty table."""
    database = Database(urls.primary, replicas=urls.replicas)
    async with database:
        await create_items(urls)
        cluster.wait_until_caught_up()
        yield database


def make_app(database: Database, servers: Servers) -> FastAPI:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=database)

    @app.post("/items/{id}")
    @transactional
    async def write(request: Request, id: int) -> str:
        db: DBSession = request.state.db
        await db.execute(text(f"INSERT INTO items VALUES ({id})"))
        return await servers.of(db)

    @app.get("/items")
    @read_only
    async def read(request: Request) -> list[int]:
        db: DBSession = request.state.db
        return list((await db.scalars(text("SELECT id FROM items ORDER BY id"))).all())

    @app.get("/read_only")
    @read_only
    async def where(request: Request) -> str:
        return await servers.of(request.state.db)

    @app.get("/snapshot")
    @read_only(snapshot=True)
    async def snapshot(request: Request) -> str:
        return await servers.of(request.state.db)

    @app.get("/fresh")
    @read_only(fresh=True)
    async def fresh(request: Request) -> str:
        return await servers.of(request.state.db)

    @app.get("/plain")
    @plain
    async def by_hand(request: Request) -> str:
        return await servers.of(request.state.db)

    @app.get("/transactional")
    @transactional
    async def in_transaction(request: Request) -> str:
        return await servers.of(request.state.db)

    @app.get("/count")
    @transactional
    async def count(request: Request) -> None:
        await request.state.db.execute(text("SELECT count(*) FROM items"))

    @app.get("/transactional/read_only")
    @transactional(read_only=True)
    async def in_read_only_transaction(request: Request) -> str:
        return await servers.of(request.state.db)

    @app.post("/by-hand/{id}")
    async def commit_by_hand(request: Request, response: Response, id: int) -> None:
        db: DBSession = request.state.db
        await db.execute(text(f"INSERT INTO items VALUES ({id})"))
        await db.commit()
        response.status_code = 409  # What was committed is there, whatever the answer says.

    @app.post("/refused/{id}")
    @transactional
    async def refuse(request: Request, response: Response, id: int) -> None:
        await request.state.db.execute(text(f"INSERT INTO items VALUES ({id})"))
        response.status_code = 400

    @app.post("/stream")
    @read_only
    async def stream(request: Request) -> StreamingResponse:
        db: DBSession = request.state.db
        first = await servers.of(db)

        async def lines() -> AsyncGenerator[str]:
            yield first + " "
            yield await servers.of(db)

        return StreamingResponse(lines())

    @app.websocket("/socket")
    @read_only
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        for _ in range(2):
            await websocket.send_text(await servers.of(websocket.state.db))
        await websocket.close()

    return app


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncGenerator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        yield client


# -- where a unit runs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "server"),
    [
        ("read_only", "replica"),
        ("snapshot", "replica"),
        ("fresh", "primary"),
        ("plain", "primary"),
        ("transactional", "primary"),
        ("transactional/read_only", "primary"),
    ],
)
async def test_only_what_merely_reads_runs_on_a_replica(
    database: Database, servers: Servers, path: str, server: str
) -> None:
    async with client_of(make_app(database, servers)) as client:
        for _ in range(3):
            assert (await client.get(f"/{path}")).json() == server


async def test_a_client_reads_what_it_was_told_is_written(
    database: Database, servers: Servers, cluster: Cluster
) -> None:
    for replica in cluster.replicas:
        replica.pause()
    async with client_of(make_app(database, servers)) as client:
        assert (await client.post("/items/1")).json() == "primary"
        assert (await client.get("/items")).json() == [1]
        assert (await client.get("/read_only")).json() == "primary"
        async with client_of(make_app(database, servers)) as another:
            assert (await another.get("/items")).json() == []  # It was told nothing.
        for replica in cluster.replicas:
            replica.resume()
        cluster.wait_until_caught_up()
        while (await client.get("/read_only")).json() == "primary":
            assert (await client.get("/items")).json() == [1]
            await asyncio.sleep(0.1)


async def test_all_replicas_have_their_share(database: Database, servers: Servers) -> None:
    async with client_of(make_app(database, servers)) as client:
        for _ in range(40):
            assert (await client.get("/read_only")).json() == "replica"
            if all(replica.units > 2 for replica in database.stats().replicas):
                break
            await asyncio.sleep(0.1)
    assert min(replica.units for replica in database.stats().replicas) > 2


async def test_one_request_reads_from_one_server(database: Database, servers: Servers) -> None:
    app = FastAPI()

    @app.get("/{first}/{second}")
    async def two(request: Request, first: str, second: str) -> list[str]:
        session: DBSession = request.state.db
        found: list[str] = []
        for mode in first, second:
            session.origin.asked = {"read_only": read_only, "plain": plain}[mode]
            session.origin.is_asked_anew = True
            found.append(await servers.of(session))
            await session.release()
        return found

    app.add_middleware(DBSessionMiddleware, database=database)
    async with client_of(app) as client:
        for _ in range(2):
            assert (await client.get("/plain/read_only")).json() == ["primary", "primary"]
            assert (await client.get("/read_only/plain")).json() == ["replica", "primary"]
            found = (await client.get("/read_only/read_only")).json()
            assert found == ["replica", "replica"]


async def test_a_stream_reads_where_its_request_has_read(
    database: Database, servers: Servers
) -> None:
    async with client_of(make_app(database, servers)) as client:
        assert (await client.post("/stream")).text == "replica replica"


async def test_a_block_and_a_sessionmaker(database: Database, servers: Servers) -> None:
    async with database.session(read_only) as session:
        assert await servers.of(session) == "replica"
    async with database.session(read_only(fresh=True)) as session:
        assert await servers.of(session) == "primary"
    async with database.session() as session:
        assert await servers.of(session) == "primary"
    async with database.transaction() as session:
        assert await servers.of(session) == "primary"
    async with database.sessionmaker() as session:
        assert await servers.of(session) == "primary"


async def test_a_socket_reads_from_a_replica(database: Database, servers: Servers) -> None:
    app, sent = make_app(database, servers), list[Message]()

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {"type": "websocket", "path": "/socket", "headers": [], "query_string": b""}
    await app(scope, receive, send)
    assert [message["text"] for message in sent if "text" in message] == ["replica", "replica"]


async def test_in_a_sandbox_everything_runs_on_its_one_connection(
    database: Database, servers: Servers
) -> None:
    async with database.sandbox(), client_of(make_app(database, servers)) as client:
        written = await client.post("/items/1")
        assert written.status_code == 200
        assert NAME not in written.headers
        assert (await client.get("/items")).json() == [1]
        assert (await client.get("/read_only")).json() == "primary"
    async with client_of(make_app(database, servers)) as client:
        assert (await client.get("/items")).json() == []
        assert (await client.get("/read_only")).json() == "replica"


async def test_statements_on_a_replica_are_captured_and_counted(
    database: Database, servers: Servers
) -> None:
    async with client_of(make_app(database, servers)) as client:
        with database.capture_statements() as statements:
            await client.get("/read_only")
        assert len(statements) == 1
    stats = database.stats()
    assert sum(route.statements for name, route in stats.routes.items() if "where" in name) == 1
    assert sum(replica.units for replica in stats.replicas) == 1
    assert stats.pool.checked_out == 0


async def test_a_handler_on_a_replica_is_a_holder(database: Database) -> None:
    async with database.session(read_only(snapshot=True)) as session:
        await session.execute(text("SELECT 1"))
        (holder,) = database.stats().holders
        assert holder.route == "`async with database.session()`"
        assert [replica.pool.checked_out for replica in database.stats().replicas].count(1) == 1


# -- what the client is told -------------------------------------------------------------------


async def test_only_the_answer_to_a_write_carries_a_position(
    database: Database, servers: Servers
) -> None:
    async with client_of(make_app(database, servers)) as client:
        for path in "read_only", "snapshot", "fresh", "plain", "count":
            answer = await client.get(f"/{path}")
            assert NAME not in answer.headers
            assert "set-cookie" not in answer.headers
        refused = await client.post("/refused/1")
        assert refused.status_code == 400
        assert NAME not in refused.headers
        written = await client.post("/items/1")
        position = written.headers[NAME]
        assert parse_position(position) not in (None, UNKNOWN)
        assert written.headers["set-cookie"] == (
            f"{NAME}={position}; Max-Age=30; Path=/; HttpOnly; SameSite=Lax"
        )
        by_hand = await client.post("/by-hand/2")
        assert by_hand.status_code == 409
        assert by_hand.headers[NAME] > position


async def test_over_https_the_cookie_is_secure(database: Database, servers: Servers) -> None:
    transport = httpx.ASGITransport(make_app(database, servers))
    async with httpx.AsyncClient(transport=transport, base_url="https://app") as client:
        assert (await client.post("/items/1")).headers["set-cookie"].endswith("; Secure")


async def test_a_client_without_cookies_sends_the_header_back(
    database: Database, servers: Servers, cluster: Cluster
) -> None:
    for replica in cluster.replicas:
        replica.pause()
    async with client_of(make_app(database, servers)) as client:
        position = (await client.post("/items/1")).headers[NAME]
        client.cookies.clear()
        assert (await client.get("/items")).json() == []
        assert (await client.get("/items", headers={NAME: position})).json() == [1]
        cookie = {"cookie": f"other=1; {NAME}={position}; more=2"}
        assert (await client.get("/items", headers=cookie)).json() == [1]
        earlier = re.sub(r":.*", ":1", position)
        both = {"cookie": f"{NAME}={earlier}", NAME: position}
        assert (await client.get("/items", headers=both)).json() == [1]


@pytest.mark.parametrize(
    "forged",
    [
        *("", ":", "x", "0:", ":5", "0:-1", "0:5:6", "0:" + "9" * 31, "'; DROP TABLE items", "é"),
        *("0:٣", "0-:5", "-1:5", "0-1-5", "0-1-5:5", "a-1:5", "0-12345678901:5"),
    ],
)
async def test_what_is_no_position_is_ignored(
    database: Database, servers: Servers, forged: str
) -> None:
    async with client_of(make_app(database, servers)) as client:
        cookie = f"{NAME}={forged}".encode()
        headers = [(NAME.encode(), forged.encode()), (b"cookie", cookie)]
        assert (await client.get("/read_only", headers=headers)).json() == "replica"


@pytest.mark.parametrize("forged", ["0:" + "9" * 30, "0-99:5", "abcdef:5", "unknown"])
async def test_a_position_that_no_replica_has_leads_to_the_primary(
    database: Database, servers: Servers, forged: str
) -> None:
    async with client_of(make_app(database, servers)) as client:
        assert (await client.get("/read_only", headers={NAME: forged})).json() == "primary"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cookie", f'a=1; {NAME}="abcdef:5"; b=2'),
        ("cookie", f"{NAME}=abcdef%3A5"),
        ("cookie", f"{NAME} = abcdef:5 ;b=2"),
        (NAME, "0:, abcdef:5"),
    ],
)
async def test_a_position_counts_as_clients_and_proxies_may_write_it(
    database: Database, servers: Servers, field: str, value: str
) -> None:
    """Quoted, escaped, with blanks around it, or two headers in one."""
    async with client_of(make_app(database, servers)) as client:
        assert (await client.get("/read_only", headers={field: value})).json() == "primary"


def test_positions_of_different_systems_are_not_compared() -> None:
    assert latest([Position("a", 1), Position("a", 3), Position("a", 2)]) == Position("a", 3)
    assert latest([Position("a", 1), Position("b", 3)]) == UNKNOWN
    assert latest([Position("a", 1), UNKNOWN]) == UNKNOWN
    assert latest([]) is None
    assert parse_position(str(UNKNOWN)) == UNKNOWN
    for position in Position("af", 7), Position("f" * 16, 2**96), Position("0-1", 320):
        assert parse_position(str(position)) == position


# -- settings ----------------------------------------------------------------------------------

PRIMARY = "postgresql://app@db1/shop"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Database(PRIMARY, replicas="postgresql://app@db2/shop"), "takes a list"),
        (lambda: Database(PRIMARY, replicas=cast(Any, make_url(PRIMARY))), "takes a list"),
        (lambda: Database(PRIMARY, replicas=["mysql://app@db2/shop"]), "use the same driver"),
        (
            lambda: Database(PRIMARY, replicas=["postgresql+psycopg://app@db2/shop"]),
            "use the same driver",
        ),
        (lambda: Database(PRIMARY, replicas=["nonsense"]), "A URL in replicas="),
        (lambda: Database(PRIMARY, replicas=["postgresql://db2/x?sslmode=bogus"]), "sslmode"),
        (lambda: Database("sqlite://", replicas=["sqlite://"]), "replicas= needs PostgreSQL"),
        (
            lambda: Database(engine=_engine(PRIMARY), replicas=["postgresql://app@db2/shop"]),
            "takes URLs where the Database has a URL",
        ),
        (
            lambda: Database(PRIMARY, replicas=[_engine("postgresql://app@db2/shop")]),
            "takes URLs where the Database has a URL",
        ),
    ],
)
def test_replicas_that_cannot_work_are_refused_when_the_database_is_made(
    make: Callable[[], Database], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def _engine(url: str) -> AsyncEngine:
    return create_async_engine(url.replace("postgresql:", "postgresql+asyncpg:"))


def test_no_password_is_shown() -> None:
    database = Database(PRIMARY, replicas=["postgresql://app:secret@db2/shop"])
    assert "secret" not in repr(database)
    assert [replica.name for replica in database.stats().replicas] == ["db2/shop"]


def test_the_environment_names_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"DATABASE_URL": PRIMARY, "DATABASE_REPLICA_URLS": f"{PRIMARY}2 \n{PRIMARY}3"}
    names = ["db1/shop2", "db1/shop3"]
    assert [each.name for each in Database.from_env(environ).stats().replicas] == names
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert [each.name for each in Database().stats().replicas] == names
    assert Database(PRIMARY).stats().replicas == ()  # Its URL does not come from there either.


def test_at_another_url_the_database_has_no_replicas() -> None:
    database = Database(PRIMARY, replicas=[f"{PRIMARY}2"])
    database.redirect("postgresql://app@localhost/test")
    assert database.stats().replicas == ()


@pytest.mark.parametrize("key", ["a b", "é", "a;b", "a=b"])
def test_a_key_that_is_no_name_of_a_cookie(key: str) -> None:
    database = Database(PRIMARY, replicas=[f"{PRIMARY}2"])
    with pytest.raises(ConfigurationError, match="name of a cookie"):
        DBSessionMiddleware(FastAPI(), database=database, key=key)
    DBSessionMiddleware(FastAPI(), database=Database(PRIMARY), key=key)


async def test_engines_of_the_user(urls: Urls, servers: Servers) -> None:
    primary, *replicas = [create_async_engine(url) for url in (urls.primary, *urls.replicas)]
    database = Database(engine=primary, replicas=replicas)
    async with database:
        await create_items(urls)
        async with database.session(read_only) as session:
            assert await servers.of(session) == "replica"
        async with client_of(make_app(database, servers)) as client:
            assert NAME in (await client.post("/items/1")).headers
            assert (await client.get("/items")).json() == [1]
    for engine in primary, *replicas:
        await engine.dispose()


async def test_a_session_class_of_the_user(urls: Urls, servers: Servers) -> None:
    class Sync(Session):
        pass

    class Own(AsyncSession):
        sync_session_class = Sync

    database = Database(urls.primary, replicas=urls.replicas, session_options={"class_": Own})
    async with database, database.session(read_only) as session:
        assert isinstance(session, Own)
        assert isinstance(session.sync_session, Sync)
        assert await servers.of(session) == "replica"


# -- what is left behind -----------------------------------------------------------------------


async def test_a_finished_request_leaves_nothing(database: Database, servers: Servers) -> None:
    async with client_of(make_app(database, servers)) as client:

        async def serve() -> None:
            await client.post("/items/1")
            await client.get("/items")
            await client.get("/snapshot")

        await serve()
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                await serve()
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            left = {type(each).__name__ for each in gc.garbage}
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        assert not left & {"RoutedExchange", "DBSession", "UnitOfWork", "Choice", "OwnWrites"}


async def test_a_loop_that_has_ended_leaves_no_servers(urls: Urls, servers: Servers) -> None:
    database = Database(urls.primary, replicas=urls.replicas)

    async def use() -> weakref.ref[AsyncEngine]:
        async with database.session(read_only) as session:
            assert await servers.of(session) == "replica"
        engine = weakref.ref(database.engine)
        await database.dispose()
        return engine

    engines = [await asyncio.to_thread(asyncio.run, use()) for _ in range(2)]
    async with database.session(read_only) as session:
        assert await servers.of(session) == "replica"
    await database.dispose()
    gc.collect()
    assert [engine() for engine in engines] == [None, None]


async def test_the_primary_serves_what_no_replica_can(
    urls: Urls, servers: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = make_url(urls.primary).set(port=1).render_as_string(hide_password=False)
    database = Database(urls.primary, replicas=[nowhere])
    async with database, client_of(make_app(database, servers)) as client:
        for _ in range(3):
            assert (await client.get("/read_only")).json() == "primary"
        (replica,) = database.stats().replicas
        assert replica.is_down
        assert replica.units == 0
        assert database.stats().reads_on_primary == 3
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2
    assert "cannot be used" in warnings[0]
    assert "The primary serves all reads" in warnings[1]


async def test_a_replica_that_refuses_the_login_costs_no_request_an_error(
    urls: Urls, servers: Servers
) -> None:
    wrong = make_url(urls.replicas[0]).set(password="wrong", username="nobody")
    database = Database(urls.primary, replicas=[wrong, urls.replicas[0]])
    async with database, client_of(make_app(database, servers)) as client:
        for _ in range(4):
            assert (await client.get("/read_only")).json() == "replica"


def test_middlewares_without_a_database_share_the_one_with_these_replicas(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DATABASE_URL", PRIMARY)
    without = configured_database()
    monkeypatch.setenv("DATABASE_REPLICA_URLS", f"{PRIMARY}2")
    having = configured_database()
    assert having is configured_database()
    assert (without.has_replicas, having.has_replicas) == (False, True)


# -- positions of MariaDB ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "logged", "reached"),
    [
        ("", "", {}),
        ("0-1-320", "0-1-320", {"0-1": 320}),
        ("0-2-321", "0-1-320,0-2-321", {"0-1": 320, "0-2": 321}),
        ("0-2-321", "", {"0-2": 321}),  # a replica that logs nothing of what it replicates
        ("0-1-330", "0-2-330,0-1-330", {"0-1": 330}),  # the other one may not be applied yet
        ("0-2-321,1-1-7", "0-2-321,1-3-6,2-1-5", {"0-2": 321, "1-1": 7, "1-3": 6}),
    ],
)
def test_what_a_server_has_of_each_server_that_has_written(
    last: str, logged: str, reached: dict[str, int]
) -> None:
    assert dict(MariaDBReplication().reached([(last, logged)])) == reached


# -- positions of PostgreSQL -------------------------------------------------------------------


async def test_a_replica_reaches_a_position_at_the_end_of_a_page(
    postgresql_urls: Urls,
) -> None:
    """Messages fill a page of the log exactly, and nothing comes after that."""
    replication = PostgreSQLReplication()
    async with _autocommit(postgresql_urls.primary) as primary:
        here = await _fill_a_page(primary)
        (there,) = replication.reached((await primary.execute(text(replication.question))).all())
    assert there.number % 2**64 == here - 24
    async with _autocommit(postgresql_urls.prompt) as standby:
        while True:
            answer = (await standby.execute(text(replication.question))).all()
            if replication.reached(answer) == [there]:
                break
            await asyncio.sleep(0.05)


@asynccontextmanager
async def _autocommit(url: str) -> AsyncGenerator[AsyncConnection]:
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        yield connection
    await engine.dispose()


async def _fill_a_page(connection: AsyncConnection) -> int:
    """Fill a page of the log exactly; return the place of what comes next."""
    place = text("SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint")
    message = text("SELECT pg_logical_emit_message(false, '', repeat('x', :size))")

    async def place_after(size: int) -> int:
        await connection.execute(message, {"size": size})
        return cast(int, await connection.scalar(place))

    here, around = await place_after(8), 0
    for _ in range(100):
        left = 8192 - here % 8192
        # A message of more than 255 bytes has more around it.
        size = left - 250 if left > 300 else left - around if around and left > around else 8
        before, here = here, await place_after(size)
        if here % 8192 == 24:
            return here
        if size == 8 and here // 8192 == before // 8192:
            around = here - before - 8
    raise AssertionError("something else writes into the log")


# -- from a replica to the primary -------------------------------------------------------------


class _Base(DeclarativeBase):
    pass


class Account(_Base):
    __tablename__ = "accounts"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    balance: Mapped[int]


class Share(_Base):
    __tablename__ = "shares"
    account_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(String(20), primary_key=True)
    number: Mapped[int]


def make_bank(database: Database) -> FastAPI:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=database)

    async def account(session: CurrentSessionReadOnly) -> Account:
        await session.get_one(Share, (1, "x"))
        return await session.get_one(Account, 1)

    async def gone(session: CurrentSessionReadOnly) -> Account | None:
        return await session.get(Account, 2)

    @app.post("/spend/{amount}")
    async def spend(
        amount: int,
        account: Annotated[Account, Depends(account)],
        gone: Annotated[Account | None, Depends(gone)],
        session: CurrentSessionTransaction,
    ) -> list[int]:
        share = await session.get_one(Share, (1, "x"))
        if account.balance >= amount:
            account.balance -= amount
        return [account.balance, share.number, gone.balance if gone else -1]

    return app


async def test_what_a_replica_has_shown_is_read_again_before_the_primary_writes(
    urls: Urls, cluster: Cluster
) -> None:
    async with Database(urls.primary, replicas=urls.replicas) as database:
        await database.create_tables(_Base.metadata)
        async with database.transaction() as session:
            session.add_all([Account(id=1, balance=100), Account(id=2, balance=5)])
            session.add(Share(account_id=1, name="x", number=7))
        cluster.wait_until_caught_up()
        for replica in cluster.replicas:
            replica.pause()
        async with Database(urls.primary) as elsewhere, elsewhere.transaction() as session:
            await session.execute(text("UPDATE accounts SET balance = 40 WHERE id = 1"))
            await session.execute(text("UPDATE shares SET number = 8"))
            await session.execute(text("DELETE FROM accounts WHERE id = 2"))
        async with client_of(make_bank(database)) as client:
            with database.capture_statements() as statements:
                assert (await client.post("/spend/80")).json() == [40, 8, 5]
            assert len(statements) == 5  # three on the replica, and one for each class
            assert (await client.post("/spend/30")).json() == [10, 8, 5]
        async with database.session() as session:
            assert await session.scalar(text("SELECT balance FROM accounts WHERE id = 1")) == 10


async def test_a_function_that_writes_runs_on_the_primary(postgresql_urls: Urls) -> None:
    urls = postgresql_urls
    async with Database(urls.primary, replicas=urls.replicas) as database:
        async with database.session(read_only) as session:
            assert await session.scalar(text("SELECT pg_is_in_recovery()"))
            assert await session.scalar(text("SELECT txid_current()"))
            assert not await session.scalar(text("SELECT pg_is_in_recovery()"))


@pytest.mark.parametrize("between", [",", ", ", " , ", ";", ",\n"])
def test_replicas_are_separated_by_blanks(between: str) -> None:
    environ = {"DATABASE_URL": PRIMARY, "DATABASE_REPLICA_URLS": f"{PRIMARY}2{between}{PRIMARY}3"}
    with pytest.raises(ConfigurationError, match="put blanks there"):
        Database.from_env(environ)
    environ["DATABASE_REPLICA_URLS"] = "postgresql://a,b/x postgresql://app:a,b@db3/x"
    assert len(Database.from_env(environ).stats().replicas) == 2
