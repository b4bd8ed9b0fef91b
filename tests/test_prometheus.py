"""The counters as Prometheus metrics."""

from __future__ import annotations

import asyncio
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text
from sqlalchemy.pool import NullPool

from asgi_db import Database, DBSessionMiddleware, PoolProfile, read_only, transactional
from asgi_db.prometheus import DatabaseCollector
from asgi_db.types import Receive, Scope, Send
from tests.contract.client import call
from tests.internals import WITHOUT_SESSION

QUERY = text("SELECT 1")
DATABASE = "database"


def metrics(*databases: Database) -> dict[tuple[str, ...], float]:
    """What a scrape says: each sample by its name and its labels, but for the database."""
    registry = CollectorRegistry()
    registry.register(DatabaseCollector(*databases))
    families = text_string_to_metric_families(generate_latest(registry).decode())
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
    for name in "held", "waited", "busy":
        assert found[f"asgi_db_{name}_seconds_total", route] > 0
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
