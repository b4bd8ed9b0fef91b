"""The counters as Prometheus metrics."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text
from sqlalchemy.pool import NullPool

from asgi_db import Database, DBSessionMiddleware, PoolProfile, read_only, transactional
from asgi_db.prometheus import DatabaseCollector
from asgi_db.types import Receive, Scope, Send
from tests.contract.client import call
from tests.internals import BUCKETS, WITHOUT_SESSION

QUERY = text("SELECT 1")
DATABASE = "database"


def metrics(*databases: Database) -> dict[tuple[str, ...], float]:
    """What a scrape says: each sample by its name and its labels, but for the database."""
    registry = CollectorRegistry()
    registry.register(DatabaseCollector(*databases))
    return samples(generate_latest(registry).decode())


def samples(scrape: str) -> dict[tuple[str, ...], float]:
    """Each sample of a scrape by its name and its labels, but for the database."""
    families = text_string_to_metric_families(scrape)
    return {
        (
            sample.name,
            *(value for name, value in sorted(sample.labels.items()) if name != DATABASE),
        ): sample.value
        for family in families
        for sample in family.samples
    }


async def test_a_scrape_says_what_each_route_has_done(database_url: str) -> None:
    async with Database(database_url, pool=PoolProfile(pool_size=2, max_overflow=3)) as database:

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            scope["route"] = type("Route", (), {"path": "/orders/{id}"})
            await scope["state"]["db"].execute(QUERY)
            status = int(scope["path"].rpartition("/")[2])
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        for status in 200, 201, 404:
            await call(DBSessionMiddleware(app, database, mode=transactional), f"/orders/{status}")
        await call(DBSessionMiddleware(app, database, mode=read_only), "/orders/200")
        async with database.engine.connect():
            found = await asyncio.to_thread(metrics, database)

    route = "POST /orders/{id}"
    assert found["asgi_db_units_total", "committed", route] == 2
    assert found["asgi_db_units_total", "rolled_back", route] == 1
    assert found["asgi_db_units_total", "failed", route] == 0
    assert found["asgi_db_units_total", "none", route] == 1
    assert found["asgi_db_statements_total", route] == 4
    assert found["asgi_db_connections_total", route] == 4
    assert found["asgi_db_retries_total", route] == 0
    assert found["asgi_db_timeouts_total", route] == 0
    assert found["asgi_db_conflicts_total", route] == 0
    for name in "held", "waited", "busy":
        assert 0 < found[f"asgi_db_{name}_seconds_sum", route] < 60
        assert found[f"asgi_db_{name}_seconds_count", route] == 4
        buckets = [
            count
            for (sample, *labels), count in found.items()
            if sample == f"asgi_db_{name}_seconds_bucket" and route in labels
        ]
        assert len(buckets) == len(BUCKETS) + 1
        assert buckets == sorted(buckets) and buckets[-1] == 4
    assert found["asgi_db_pool_connections", "used"] == 1
    assert found["asgi_db_pool_connections", "idle"] == 0
    assert found[("asgi_db_pool_size",)] == 2
    assert found[("asgi_db_pool_limit",)] == 5
    assert found[("asgi_db_pool_waiting",)] == 0


async def test_one_collector_serves_several_databases(tmp_path: Path) -> None:
    urls = [f"sqlite+aiosqlite:///{tmp_path}/{name}.db" for name in "ab"]
    async with Database(urls[0]) as a, Database(urls[1]) as b:
        async with a.engine.connect():
            pass
        registry = CollectorRegistry()
        registry.register(DatabaseCollector(a, b))
        used = "asgi_db_connections_total"
        labels = {"database": f"{tmp_path}/a.db", "route": WITHOUT_SESSION}
        assert registry.get_sample_value(used, labels) == 1
        assert registry.get_sample_value(used, {**labels, "database": f"{tmp_path}/b.db"}) is None
        for name in "ab":
            labels = {"database": f"{tmp_path}/{name}.db"}
            assert registry.get_sample_value("asgi_db_pool_size", labels) == 10


async def test_two_databases_of_one_name_are_added_up(sqlite_url: str) -> None:
    async with Database(sqlite_url) as a, Database(sqlite_url, pool="low") as b:
        for database in a, b:
            async with database.session() as session:
                await session.execute(QUERY)
        registry = CollectorRegistry()
        registry.register(DatabaseCollector(a, b))
        names = [
            line.rpartition(" ")[0]
            for line in generate_latest(registry).decode().splitlines()
            if not line.startswith("#")
        ]
        found = metrics(a, b)
    assert len(names) == len(set(names))
    route = "`async with database.session()`"
    assert found["asgi_db_statements_total", route] == 2
    assert found["asgi_db_units_total", "rolled_back", route] == 2
    assert found["asgi_db_pool_connections", "idle"] == 2
    assert found[("asgi_db_pool_size",)] == 10 + 5


async def test_what_a_pool_does_not_know_is_left_out(sqlite_url: str) -> None:
    async with Database(sqlite_url, engine_options={"poolclass": NullPool}) as database:
        _ = database.engine
        found = metrics(database)
    assert found["asgi_db_pool_connections", "used"] == 0
    for field in "size", "limit", "waiting":
        assert (f"asgi_db_pool_{field}",) not in found


def test_before_the_first_request_there_is_a_scrape_too() -> None:
    found = metrics(Database("postgresql://app:secret@db.example.org/shop"))
    assert found["asgi_db_pool_connections", "used"] == 0


def test_no_password_is_in_a_scrape() -> None:
    registry = CollectorRegistry()
    registry.register(DatabaseCollector(Database("postgresql://app:secret@db.example.org/shop")))
    scrape = generate_latest(registry).decode()
    assert 'database="db.example.org/shop"' in scrape
    assert "secret" not in scrape


# -- several processes -------------------------------------------------------------------------

WORKER = """
import asyncio, sys
from prometheus_client import REGISTRY
from sqlalchemy import text
from asgi_db import Database, DatabaseBusyError
from asgi_db.prometheus import DatabaseCollector

async def work():
    async with database.engine.connect():
        pass
    for _ in range(int(sys.argv[2])):
        async with database.transaction() as session:
            await session.execute(text("SELECT 1"))
    database.statistics.retried("POST /orders")
    async with database.session() as session:
        await session.execute(text("SELECT 1"))
        print("holds", flush=True)
        await asyncio.sleep(1.5)
        print("was sampled", flush=True)
        await asyncio.to_thread(sys.stdin.readline)

database = Database(sys.argv[1], pool="low")
REGISTRY.register(DatabaseCollector(database))
asyncio.run(work())
"""
SCRAPE = """
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

registry = CollectorRegistry()
MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def scrape_beside_workers(program: str, *arguments: str, folder: Path, said: list[str]) -> str:
    """What is scraped in a third process, while two run the program.

    Args:
        program: what they run; its last argument is how many units of work each of them does.
        arguments: its other arguments.
        folder: where they leave their metrics.
        said: the lines that each of them writes before.
    """
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments, str(units)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for units in (2, 3)
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert [worker.stdout.readline().strip() for _ in said] == said
        done = subprocess.run(
            [sys.executable, "-c", SCRAPE], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    finally:
        for worker in workers:
            worker.communicate("end\n")
    assert [worker.returncode for worker in workers] == [0, 0]
    return done.stdout


@pytest.mark.timing
def test_the_processes_of_one_application_are_added_up(tmp_path: Path, sqlite_url: str) -> None:
    folder = tmp_path / "metrics"
    folder.mkdir()
    said = ["holds", "was sampled"]
    found = samples(scrape_beside_workers(WORKER, sqlite_url, folder=folder, said=said))
    route = "`async with database.transaction()`"
    assert found["asgi_db_units_total", "committed", route] == 5
    assert found["asgi_db_statements_total", route] == 5
    assert found["asgi_db_connections_total", WITHOUT_SESSION] == 2
    assert found["asgi_db_retries_total", "POST /orders"] == 2
    for name in "held", "waited", "busy":
        assert found[f"asgi_db_{name}_seconds_count", route] == 5
        assert 0 < found[f"asgi_db_{name}_seconds_sum", route] < 60
    assert found["asgi_db_pool_connections", "used"] == 2
    assert found[("asgi_db_pool_size",)] == 10
    assert found[("asgi_db_pool_limit",)] == 30
    assert found[("asgi_db_pool_waiting",)] == 0


def test_both_ways_have_the_same_metrics(tmp_path: Path, sqlite_url: str) -> None:
    """A dashboard for one process serves several too."""
    (tmp_path / "metrics").mkdir()
    names = """
import asyncio, os, sys
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from sqlalchemy import text
from asgi_db import Database
from asgi_db.prometheus import DatabaseCollector

async def work():
    async with database.transaction() as session:
        await session.execute(text("SELECT 1"))
    await asyncio.sleep(1.2)

registry = CollectorRegistry()
database = Database(sys.argv[1])
collector = DatabaseCollector(database)
if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
    MultiProcessCollector(registry)
else:
    registry.register(collector)
asyncio.run(work())
print(generate_latest(registry).decode())
"""
    found = [
        subprocess.run(
            [sys.executable, "-c", names, sqlite_url],
            env={**os.environ, **variables},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for variables in ({}, {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "metrics")})
    ]
    alone, together = (
        {
            (sample.name, *sorted(sample.labels))
            for family in text_string_to_metric_families(scrape)
            for sample in family.samples
        }
        for scrape in found
    )
    assert alone == together and len(alone) > 15
