"""What `database.stats()` and the exporters say of the replicas, on servers that replicate."""

import asyncio
import logging
import re
import time
import traceback
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import URL, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_db import ConfigurationError, Database, DBSessionMiddleware, by_method, read_only
from asgi_db.dashboard import Dashboard
from asgi_db.drivers.replication import Position
from asgi_db.logs import Seldom
from asgi_db.prometheus import DatabaseCollector
from asgi_db.types import Receive, Scope, Send
from tests.clusters import Cluster, Urls
from tests.internals import ASK_AGAIN_AFTER, MOST_LAG, Commit, History, Lag
from tests.servers import DatabaseServer, sql
from tests.test_dashboard import events, get, part
from tests.test_opentelemetry import Telemetry, uninstrument
from tests.test_prometheus import scrape_beside_workers

QUERY, WRITE = text("SELECT id FROM items"), text("INSERT INTO items VALUES (1)")


@pytest.fixture
def urls(cluster: Cluster, urls: Urls) -> Urls:
    """A database with an empty table, on each server."""

    async def create_table() -> None:
        async with Database(urls.primary) as database, database.transaction() as session:
            await session.execute(text("CREATE TABLE items (id int)"))

    asyncio.run(create_table())
    cluster.wait_until_caught_up()
    return urls


@pytest.fixture
async def database(urls: Urls) -> AsyncGenerator[Database]:
    """The database with its replicas."""
    async with Database(urls.primary, replicas=urls.replicas) as database:
        yield database


on_one_kind = pytest.mark.parametrize("cluster", ["postgresql"], indirect=True)
"""For what does not depend on the kind of server."""


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    """OpenTelemetry, switched off again at the end."""
    yield Telemetry()
    uninstrument()


@asynccontextmanager
async def client_of(database: Database) -> AsyncGenerator[httpx.AsyncClient]:
    """A client with cookies, of an application that writes in POST and reads in GET."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        writes = scope["method"] == "POST"
        await scope["state"]["db"].execute(WRITE if writes else QUERY)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    transport = httpx.ASGITransport(DBSessionMiddleware(app, database, mode=by_method))
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        yield client


# -- database.stats() --------------------------------------------------------------------------


async def test_how_late_a_replica_was_when_it_last_answered(
    database: Database, cluster: Cluster
) -> None:
    def lags() -> list[float | None]:
        return [replica.lag for replica in database.stats().replicas]

    for replica in cluster.replicas:
        replica.pause()
    async with client_of(database) as client:
        assert lags() == [None] * len(cluster.replicas)
        await client.post("/")
        await client.get("/")
        late = lags()
        assert all(lag is not None and 0 < lag < 60 for lag in late)
        assert lags() == late  # It was not asked again.
        for replica in cluster.replicas:
            replica.resume()
        cluster.wait_until_caught_up()
        while lags() != [0.0] * len(cluster.replicas):
            assert (await client.get("/")).status_code == 200
            await asyncio.sleep(0.05)


@on_one_kind
async def test_reads_on_the_primary_that_a_replica_could_have_served(
    database: Database, cluster: Cluster
) -> None:
    for replica in cluster.replicas:
        replica.pause()
    async with client_of(database) as client:
        await client.get("/")  # It was told nothing.
        await client.post("/")
        for _ in range(3):
            await client.get("/")
    stats = database.stats()
    assert sum(replica.units for replica in stats.replicas) == 1
    assert [replica.behind for replica in stats.replicas] == [3] * len(cluster.replicas)
    assert stats.reads_on_primary == 3
    async with database.session(read_only(fresh=True)) as session:
        await session.execute(QUERY)
    assert database.stats().reads_on_primary == 3


def test_the_lag_of_a_replica_that_is_later_than_the_history_is_long() -> None:
    history, now = History(), time.monotonic()
    history.commits.append(Commit(now - 100, Position("a", 1)))
    lag = Lag(history)
    assert lag.seconds is None
    lag.answered({"a": 0})
    history.commits.append(Commit(now - MOST_LAG - 1, Position("a", 5)))
    history.add(Position("a", 7))
    assert len(history.commits) == 2
    for reached, least in ({"a": 0}, 100.0), ({"a": 4}, MOST_LAG + 1), ({"a": 5}, 0.0):
        lag.answered(reached)
        assert lag.seconds is not None
        assert least <= lag.seconds < least + 1
    lag.answered({"a": 7})
    assert lag.seconds == 0


def test_the_history_does_not_grow_while_nothing_reads() -> None:
    history, long_ago = History(), time.monotonic() - 1000
    history.commits.extend(Commit(long_ago + at, Position("a", at)) for at in range(900))
    history.add(Position("a", 901))
    assert [commit.position.number for commit in history.commits] == [899, 901]


def test_the_history_forgets_what_the_primary_before_a_failover_has_committed() -> None:
    """No replica may ever name it. Another domain has a history of its own."""
    history, now = History(), time.monotonic()
    earlier = [Position("0-1", 320), Position("1-1", 5), Position("0-1", 330)]
    history.commits.extend(Commit(now - MOST_LAG - 1, each) for each in earlier[:2])
    history.commits.append(Commit(now, earlier[2]))
    lag = Lag(history)
    lag.answered({"0-1": 310, "1-1": 5})
    assert (lag.seconds or 0) > MOST_LAG
    history.add(Position("0-2", 321))
    assert history.due() == Position("1-1", 5)
    history.commits.append(Commit(now, Position("0-2", 322)))
    lag.answered({"0-2": 321, "1-1": 5})
    assert (lag.seconds or 0) < 1


# -- Prometheus --------------------------------------------------------------------------------


def samples(scrape: str) -> dict[tuple[str, ...], float]:
    """Each sample by its name and its labels, in the order of the labels' names."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(scrape)
        for sample in family.samples
    }


def scrape_of(database: Database) -> str:
    registry = CollectorRegistry()
    registry.register(DatabaseCollector(database))
    return generate_latest(registry).decode()


@on_one_kind
async def test_a_scrape_knows_the_replicas(urls: Urls, cluster: Cluster) -> None:
    nowhere = make_url(urls.primary).set(host="127.0.0.1", port=1)
    primary, late, dead = (name_of(url) for url in (urls.primary, urls.late, nowhere))
    async with Database(urls.primary, replicas=[urls.late, nowhere], pool="low") as database:
        cluster.late.pause()
        async with client_of(database) as client:
            for _ in range(4):
                await client.get("/")
            await client.post("/")
            await asyncio.sleep(ASK_AGAIN_AFTER)  # The first read may have asked it just now.
            await client.get("/")
        found = samples(await asyncio.to_thread(scrape_of, database))
    assert found["asgi_db_replica_units_total", primary, late] == 4
    assert found["asgi_db_replica_behind_total", primary, late] == 1
    assert found["asgi_db_replica_down", primary, late] == 0
    assert 0 < found["asgi_db_replica_lag_seconds", primary, late] < 60
    assert found["asgi_db_replica_units_total", primary, dead] <= 2
    assert found["asgi_db_replica_behind_total", primary, dead] == 0
    assert found["asgi_db_replica_down", primary, dead] == 1
    assert ("asgi_db_replica_lag_seconds", primary, dead) not in found
    assert found["asgi_db_reads_on_primary_total", primary] == 1
    for name, idle in (primary, 1), (late, 1), (dead, 0):
        assert found["asgi_db_pool_connections", name, "idle"] == idle
        assert found["asgi_db_pool_connections", name, "used"] == 0
        assert found["asgi_db_pool_size", name] == 5
    assert "password" not in scrape_of(database)


def test_a_scrape_without_replicas_has_nothing_of_them(sqlite_url: str) -> None:
    scrape = scrape_of(Database(sqlite_url))
    assert "asgi_db_pool_size" in scrape
    assert "asgi_db_replica" not in scrape and "asgi_db_reads" not in scrape


@on_one_kind
async def test_a_replica_of_two_databases_and_one_named_like_the_primary(urls: Urls) -> None:
    """All of one name are added up: no sample may come twice."""
    primary = name_of(urls.primary)
    async with (
        Database(urls.primary, replicas=[urls.primary], pool="low") as first,
        Database(urls.primary, replicas=[urls.primary], pool="low") as second,
    ):
        for database in first, second:
            async with database.session(read_only) as session:
                await session.execute(QUERY)
        registry = CollectorRegistry()
        registry.register(DatabaseCollector(first, second))
        scrape = generate_latest(registry).decode()
    lines = [line.rpartition(" ")[0] for line in scrape.splitlines() if line[0] != "#"]
    assert len(lines) == len(set(lines))
    found = samples(scrape)
    assert found["asgi_db_replica_units_total", primary, primary] == 2
    assert found["asgi_db_pool_size", primary] == 2 * (5 + 5)


WORKER = """
import asyncio, sys
from prometheus_client import REGISTRY
from sqlalchemy import text
from asgi_db import Database, read_only
from asgi_db.prometheus import DatabaseCollector

async def work():
    for _ in range(int(sys.argv[4])):
        async with database.session(read_only) as session:
            await session.execute(text("SELECT id FROM items"))
        await asyncio.sleep(0.6)
    await asyncio.sleep(0.6)
    print("was sampled", flush=True)
    await asyncio.to_thread(sys.stdin.readline)

database = Database(sys.argv[1], replicas=sys.argv[2:4], pool="low")
REGISTRY.register(DatabaseCollector(database))
asyncio.run(work())
"""


@pytest.mark.timing
@on_one_kind
def test_the_replicas_of_the_processes_of_one_application(tmp_path: Path, urls: Urls) -> None:
    nowhere = make_url(urls.primary).set(host="127.0.0.1", port=1)
    primary, late, dead = (name_of(url) for url in (urls.primary, urls.late, nowhere))
    replicas = [urls.late, nowhere.render_as_string(hide_password=False)]
    arguments = (WORKER, urls.primary, *replicas)
    found = samples(scrape_beside_workers(*arguments, folder=tmp_path, said=["was sampled"]))
    assert found["asgi_db_replica_units_total", primary, late] == 5
    assert found["asgi_db_replica_behind_total", primary, late] == 0
    assert found["asgi_db_replica_down", primary, late] == 0
    assert found["asgi_db_replica_down", primary, dead] == 1  # And not two, for two processes.
    assert found["asgi_db_reads_on_primary_total", primary] == 0
    assert found["asgi_db_pool_connections", late, "idle"] == 2
    assert found["asgi_db_pool_size", late] == 10


# -- OpenTelemetry -----------------------------------------------------------------------------


@on_one_kind
async def test_opentelemetry_knows_the_replicas(
    urls: Urls, cluster: Cluster, telemetry: Telemetry
) -> None:
    nowhere = make_url(urls.primary).set(host="127.0.0.1", port=1)
    primary, late, dead = (name_of(url) for url in (urls.primary, urls.late, nowhere))
    database = Database(urls.primary, replicas=[urls.late, nowhere], pool="low")
    telemetry.instrument(database)
    async with database, client_of(database) as client:
        cluster.late.pause()
        for _ in range(4):
            await client.get("/")
        await client.post("/")
        await asyncio.sleep(ASK_AGAIN_AFTER)  # The first read may have asked it just now.
        await client.get("/")

        def values(name: str) -> dict[tuple[str, ...], float]:
            return {
                tuple(str(value) for _, value in sorted(point.attributes.items())): point.value
                for point in telemetry.points(name)
            }

        assert values("asgi_db.replica.units")[late, primary] == 4
        assert values("asgi_db.replica.behind") == {(late, primary): 1, (dead, primary): 0}
        assert values("asgi_db.replica.down") == {(late, primary): 0, (dead, primary): 1}
        assert values("asgi_db.reads_on_primary") == {(primary,): 1}
        ((replica, lag),) = values("asgi_db.replica.lag").items()
        assert replica == (late, primary) and 0 < lag < 60
        assert values("db.client.connection.idle.max") == {
            (each,): 5 for each in (primary, late, dead)
        }
        assert values("db.client.connection.count") == {
            **{(each, "idle"): 1 for each in (primary, late)},
            **{(each, "used"): 0 for each in (primary, late, dead)},
            (dead, "idle"): 0,
        }


async def test_opentelemetry_without_replicas_has_nothing_of_them(
    telemetry: Telemetry, sqlite_url: str
) -> None:
    async with Database(sqlite_url) as database:
        telemetry.instrument(database)
        async with database.session() as session:
            await session.execute(text("SELECT 1"))
        for name in "replica.units", "replica.behind", "replica.down", "replica.lag":
            assert telemetry.points(f"asgi_db.{name}") == []
        assert telemetry.points("asgi_db.reads_on_primary") == []
        assert telemetry.points("db.client.connection.count") != []


@on_one_kind
async def test_statements_on_a_replica_of_the_users_own_have_spans_too(
    urls: Urls, telemetry: Telemetry
) -> None:
    primary, replica = create_async_engine(urls.primary), create_async_engine(urls.late)
    try:
        async with Database(engine=primary, replicas=[replica]) as database:
            telemetry.instrument(database)
            async with database.session(read_only) as session:
                await session.execute(QUERY)
            assert sum(each.units for each in database.stats().replicas) == 1
            assert [span.name.split()[0] for span in telemetry.statements()] == ["SELECT"]
    finally:
        for engine in primary, replica:
            await engine.dispose()


# -- the log -----------------------------------------------------------------------------------

SECRET = "s3cret"


def shown(log: pytest.LogCaptureFixture) -> list[str]:
    """The warnings; nothing in the log has a password or a value."""
    formatter = logging.Formatter()
    assert SECRET not in "".join(map(formatter.format, log.records))
    return [record.getMessage() for record in log.records if record.name == "asgi_db"]


async def test_no_password_is_in_the_log_of_replicas_that_cannot_be_used(
    urls: Urls, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "asgi_db")
    wrong = make_url(urls.late).set(username="nobody", password=SECRET)
    database = Database(urls.primary, replicas=[wrong, wrong.set(port=1)])
    async with database, client_of(database) as client:
        await client.get("/")
        assert all(replica.is_down for replica in database.stats().replicas)
    lines = shown(caplog)
    assert not [line for line in lines if ".." in line]
    for url in wrong, wrong.set(port=1):
        assert sum(f"The replica {name_of(url)} cannot be used: " in line for line in lines) == 1
    assert sum("The primary serves all reads" in line for line in lines) == 1
    assert len(lines) == 3


async def test_no_value_is_in_the_log_of_a_replica_that_fails_in_a_statement(
    urls: Urls, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "asgi_db")
    query = text("SELECT :value").bindparams(value=SECRET)
    async with Database(urls.primary, replicas=[urls.late]) as database:
        for _ in range(2):
            async with database.session(read_only) as session:
                assert await session.scalar(query) == SECRET
            end_connections(cluster.late.server, make_url(urls.late))
        while any(replica.is_down for replica in database.stats().replicas):
            async with database.session(read_only) as session:
                assert await session.scalar(query) == SECRET
            await asyncio.sleep(0.1)
    lines = shown(caplog)
    assert f"The replica {name_of(urls.late)} cannot be used: " in lines[0]
    assert lines[-1] == f"The replica {name_of(urls.late)} is there again."


@on_one_kind  # MariaDB tells the position without being asked.
async def test_no_value_is_in_the_log_of_a_position_that_is_not_found_out(
    database: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asgi_db.replicas.commits.POSITION_TIMEOUT", 0)
    # Another test may have had this warning in the last minute.
    monkeypatch.setattr("asgi_db.replicas.commits._warnings", Seldom())
    async with database.transaction() as session:
        await session.execute(WRITE)
        await session.execute(text("SELECT :value").bindparams(value=SECRET))
    assert any("could not be found out (TimeoutError)" in line for line in shown(caplog))


@pytest.mark.parametrize(
    "replicas",
    [
        f"postgresql://app:{SECRET}@db2/shop",
        [f"mysql://app:{SECRET}@db2/shop"],
        [f"postgresql+psycopg://app:{SECRET}@db2/shop"],
        [f"postgresql://app:{SECRET}@db2:{SECRET}/shop"],
        [f"postgresql://app:{SECRET}@db2/shop?sslmode={SECRET}"],
        [create_async_engine(f"postgresql+asyncpg://app:{SECRET}@db2/shop")],
    ],
)
def test_no_password_is_in_the_error_of_a_replica_that_cannot_work(replicas: Any) -> None:
    with pytest.raises(ConfigurationError) as raised:
        Database("postgresql://app@db1/shop", replicas=replicas)
    assert SECRET not in "".join(traceback.format_exception_only(raised.value))


def end_connections(server: DatabaseServer, to: URL) -> None:
    """Let the server end its connections to a database."""
    if to.get_backend_name() == "postgresql":
        ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        sql(server.url, f"{ended} WHERE datname = '{to.database}'")
    else:
        asked = f"SELECT id FROM information_schema.processlist WHERE db = '{to.database}'"
        sql(server.url, *(f"KILL {id}" for (id,) in sql(server.url, asked)))


# -- the dashboard -----------------------------------------------------------------------------


@on_one_kind
async def test_the_dashboard_shows_the_replicas_and_follows_them(
    urls: Urls, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asgi_db.dashboard.application.INTERVAL", 0.01)
    monkeypatch.setattr("asgi_db.dashboard.application.STREAM", 0.1)
    nowhere = make_url(urls.primary).set(host="127.0.0.1", port=1)
    database = Database(urls.primary, replicas=[urls.late, nowhere])
    dashboard = Dashboard(database)
    async with database, client_of(database) as client:
        cluster.late.pause()
        for _ in range(3):
            await client.get("/")
        _, _, body = await get(dashboard, accept="text/event-stream")
        late, dead = name_of(urls.late), name_of(nowhere)
        assert f">{late}<" in events(body)[0][1]["replicas"]
        await client.post("/")
        await client.get("/")
        _, _, page = await get(dashboard)
        assert re.search(
            rf" {late} 75 % 3 1 [\d.]+ m?s 0 1 {dead} down 0 % 0 0 – 0 0 Primary 25 % 1 – – 0 1$",
            part(page, "replicas"),
        )


def name_of(url: str | URL) -> str:
    server = make_url(url)
    return f"{server.host}:{server.port}/{server.database}"
