"""The README and the pages in `docs/` show programs that work: every Python block is run."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Generator
from dataclasses import fields
from importlib import import_module, invalidate_caches
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import pytest
from opentelemetry.instrumentation.sqlalchemy import (  # pyright: ignore[reportMissingTypeStubs]
    SQLAlchemyInstrumentor,
)
from prometheus_client import CollectorRegistry, generate_latest
from sqlalchemy import select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.testclient import TestClient

import asgi_db
from asgi_db import (
    Database,
    DBSessionMiddleware,
    Mode,
    PoolProfile,
    plain,
    read_only,
    session_of,
    transactional,
)
from asgi_db.errors import ReadOnlyError
from asgi_db.types import Message, Receive, Scope, Send
from tests.clusters import Cluster, Urls
from tests.internals import POOL_PROFILES, Queue, smallest_pool
from tests.nested import WITHOUT_SLOW_PLUGINS
from tests.pgbouncer import pgbouncer, through
from tests.servers import DatabaseServer, assert_disconnected, assert_idle, run, sql
from tests.snippets import PYTHON_BLOCK, files_of, sql_of

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TUTORIAL = "tutorial.md"

Modules: TypeAlias = dict[str, Any]
Load: TypeAlias = Callable[..., Modules]
Test = TypeVar("Test", bound=Callable[..., object])

COVERED = set[str]()


def covers(page: str) -> Callable[[Test], Test]:
    """Notes which page a test runs."""
    COVERED.add(page)
    return lambda test: test


def write_files(folder: Path, *pages: str) -> list[str]:
    """Writes the files which pages show, and returns the names of their modules."""
    files = {file: code for page in pages for file, code in files_of(DOCS / page).items()}
    for file, code in files.items():
        (folder / file).write_text(code)
    return [file.removesuffix(".py") for file in files]


@pytest.fixture
def load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sqlite_url: str
) -> Generator[Load, None, None]:
    """Writes the files of pages into one folder, and imports those that are no tests."""
    names = dict[str, None]()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def load_pages(*pages: str, url: str = sqlite_url) -> Modules:
        monkeypatch.setenv("DATABASE_URL", url)
        names.update(dict.fromkeys(write_files(tmp_path, *pages)))
        for name in names:
            monkeypatch.delitem(sys.modules, name, raising=False)
        invalidate_caches()
        return {name: import_module(name) for name in names if not name.startswith("test_")}

    yield load_pages
    for name in names:
        sys.modules.pop(name, None)


def serve(app: Any) -> TestClient:
    """A client for an application, which starts it and ends it with its block."""
    return TestClient(app, raise_server_exceptions=False, follow_redirects=False)


def items(url: str) -> list[str]:
    return [item for (item,) in sql(url, "SELECT item FROM orders ORDER BY id")]


def create_tables(url: str, base: Any) -> None:
    async def create() -> None:
        async with Database(url) as database:
            await database.create_tables(base.metadata)

    run(create())


# -- the README, and what begins like it --------------------------------------------------------

README = "../README.md"
FRAMEWORKS = "frameworks.md"


@pytest.mark.parametrize(
    ("page", "name"),
    [
        (README, "main"),
        ("index.md", "shop"),
        (FRAMEWORKS, "fastapi_app"),
        (FRAMEWORKS, "starlette_app"),
        (FRAMEWORKS, "litestar_app"),
    ],
)
@covers(README)
@covers("index.md")
@covers(FRAMEWORKS)
def test_the_complete_example_of_each_framework_writes_and_reads(
    load: Load, database_url: str, page: str, name: str
) -> None:
    with serve(load(page, url=database_url)[name].app) as client:
        assert client.get("/orders").json() == []
        response = client.post("/orders?item=tea")
        assert (response.status_code, response.json()) == (201, {"id": 1})
        assert items(database_url) == ["tea"]
        assert client.get("/orders").json() == ["tea"]
    run(assert_disconnected(database_url))


@pytest.mark.parametrize("name", ["starlette_app", "litestar_app", "bare_app"])
def test_the_short_examples_of_the_readme_write(load: Load, database_url: str, name: str) -> None:
    modules = load(README, url=database_url)
    create_tables(database_url, modules["tables"].Base)
    path = "/orders?tea" if name == "bare_app" else "/orders?item=tea"
    with serve(modules[name].app) as client:
        assert client.post(path).status_code == 201
        assert items(database_url) == ["tea"]
    run(assert_disconnected(database_url))


def test_the_bare_application_writes_and_reads(load: Load, database_url: str) -> None:
    modules = load(FRAMEWORKS, url=database_url)
    create_tables(database_url, modules["tables"].Base)
    with serve(modules["bare_app"].app) as client:
        assert [client.get("/").text, client.post("/?tea").text] == ["0", "1"]
        assert items(database_url) == ["tea"]
    run(assert_disconnected(database_url))


# -- the tutorial ------------------------------------------------------------------------------


@covers(TUTORIAL)
def test_the_tutorials_shop_takes_orders_on_every_database(load: Load, database_url: str) -> None:
    app = load(TUTORIAL, url=database_url)["app"].app
    with serve(app) as client:
        response = client.post("/orders?number=A1&item=tea")
        assert (response.status_code, response.json()) == (201, {"id": 1})
        assert items(database_url) == ["tea"]
        assert client.get("/orders").json() == ["tea"]
        assert client.get("/orders/A1").json() == {"number": "A1", "item": "tea"}
        assert client.get("/orders/B2").status_code == 404
        response = client.post("/orders?number=A1&item=coffee")
        assert (response.status_code, response.json()) == (
            409,
            {"detail": "There is such an order already."},
        )
        assert items(database_url) == ["tea"]
    run(assert_disconnected(database_url))


# -- how to ------------------------------------------------------------------------------------

STREAMS = "how-to/streams.md"


@pytest.fixture
@covers(STREAMS)
def streams(load: Load, sqlite_url: str) -> Generator[tuple[TestClient, Modules], None, None]:
    """The page about streams, with two orders."""
    modules = load(TUTORIAL, STREAMS)
    with serve(modules["app"].app) as client:
        for number, item in [("A1", "tea"), ("A2", "coffee")]:
            client.post(f"/orders?number={number}&item={item}")
        yield client, modules
    run(assert_disconnected(sqlite_url))


def test_no_connection_is_held_while_the_model_thinks(
    streams: tuple[TestClient, Modules], monkeypatch: pytest.MonkeyPatch, sqlite_url: str
) -> None:
    client, modules = streams
    connections = list[int]()

    async def ask_model(prompt: str) -> str:
        connections.append(modules["app"].database.engine.pool.checkedout())
        return f"A fine {prompt}"

    for name in ("descriptions", "stories"):
        monkeypatch.setattr(modules[name], "ask_model", ask_model)
    assert client.post("/orders/1/describe").json() == {"item": "A fine tea"}
    assert client.post("/orders/2/story").text == "A fine coffee. A fine day. A fine end. "
    assert connections == [0, 0, 0, 0]
    assert items(sqlite_url) == [
        "A fine tea",
        "coffee",
        "A fine coffee. A fine day. A fine end. ",
    ]


@pytest.mark.parametrize("path", ["/export/pages?page=1", "/export/snapshot"])
def test_an_export_is_whole(streams: tuple[TestClient, Modules], path: str) -> None:
    client, _ = streams
    assert client.get(path).text == "A1 tea\nA2 coffee\n"


def test_a_long_export_is_whole(load: Load, database_url: str) -> None:
    """As long that no driver fetches it all at once."""
    with serve(load(TUTORIAL, STREAMS, url=database_url)["app"].app) as client:
        rows = ",".join(f"({i}, 'A{i}', 'tea')" for i in range(1, 5001))
        sql(database_url, f"INSERT INTO orders (id, number, item) VALUES {rows}")
        lines = client.get("/export/snapshot").text.splitlines()
        assert lines == [f"A{i} tea" for i in range(1, 5001)]
    run(assert_disconnected(database_url))


@pytest.mark.filterwarnings("ignore:Previous unbuffered result")  # as in production
def test_as_the_limits_say_a_cursor_that_outlives_a_chunk_is_an_error(
    load: Load, database_url: str, tmp_path: Path
) -> None:
    """On no database may the stream end early as if it were whole."""
    (tmp_path / "cursors.py").write_text(CURSOR)
    with serve(load(TUTORIAL, url=database_url)["app"].app) as client:
        import_module("cursors")
        rows = ",".join(f"({i}, 'A{i}', 'tea')" for i in range(1, 5001))
        sql(database_url, f"INSERT INTO orders (id, number, item) VALUES {rows}")
        assert client.get("/cursor").text == ""
    sys.modules.pop("cursors")


CURSOR = """
from fastapi.responses import StreamingResponse
from sqlalchemy import select
from app import app
from asgi_db_fastapi import CurrentSession
from tables import Order

@app.get("/cursor")
async def cursor(session: CurrentSession) -> StreamingResponse:
    items = await session.stream_scalars(select(Order.item).execution_options(yield_per=100))
    return StreamingResponse(items)
"""


async def test_as_the_page_says_what_had_not_left_with_a_chunk_is_rolled_back(
    load: Load, database_url: str
) -> None:
    """Starlette swallows the cancellation of a stream whose client has gone, and returns."""
    tables = load("how-to/scripts.md", TUTORIAL, url=database_url)["tables"]

    async def cut_stream(scope: Scope, receive: Receive, send: Send) -> None:
        session = session_of(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        session.add(tables.Order(number="A1", item="sent"))
        await session.flush()
        await send({"type": "http.response.body", "body": b"sent", "more_body": True})
        session.add(tables.Order(number="A2", item="not sent"))
        await session.flush()

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None: ...

    async with Database(database_url) as database:
        await database.create_tables(tables.Base.metadata)
        app = DBSessionMiddleware(cut_stream, database, mode=transactional)
        await app({"type": "http", "method": "GET", "path": "/"}, receive, send)
        assert items(database_url) == ["sent"]


@pytest.mark.parametrize("path", ["/totals", "/blocking"])
@covers("how-to/concurrency.md")
def test_tasks_and_threads_count_side_by_side(load: Load, database_url: str, path: str) -> None:
    modules = load(TUTORIAL, "how-to/concurrency.md", url=database_url)
    with serve(modules["app"].app) as client:
        for number, item in enumerate(("tea", "coffee", "coffee")):
            client.post(f"/orders?number=A{number}&item={item}")
        assert client.get(path).json() == ([1, 2] if path == "/totals" else 3)


@covers("how-to/websockets.md")
def test_the_websocket_commits_each_message(load: Load, database_url: str) -> None:
    with serve(load(TUTORIAL, "how-to/websockets.md", url=database_url)["app"].app) as client:
        with client.websocket_connect("/orders") as websocket:
            for number in range(1, 3):
                websocket.send_text(f"A{number}")
                assert websocket.receive_text() == "ordered"
                assert len(items(database_url)) == number
                run(assert_idle(database_url))


@covers("how-to/scripts.md")
def test_the_script_runs(load: Load, database_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(load(TUTORIAL, "how-to/scripts.md", url=database_url)["script"].main())
    assert capsys.readouterr().out == "['tea', 'coffee']\n"
    assert items(database_url) == ["tea", "coffee"]
    run(assert_disconnected(database_url))


BACKGROUND = "how-to/background-work.md"


@covers(BACKGROUND)
def test_background_tasks_and_tasks_of_ones_own_commit_their_work(
    load: Load, sqlite_url: str
) -> None:
    modules = load(TUTORIAL, BACKGROUND)
    with serve(modules["app"].app) as client:
        assert client.post("/sales?number=A1").status_code == 201
        assert items(sqlite_url) == ["tea", "receipt"]
        assert client.post("/mailed?number=A3").status_code == 201
        assert client.post("/mailed?number=A3").status_code == 409
        assert modules["mails"].sent == ["ordered: A3"]
        assert client.post("/parcels?number=A2").status_code == 202

        async def all_packed() -> None:
            while modules["parcels"].parcels:
                for parcel in list(modules["parcels"].parcels):
                    await parcel

        assert client.portal is not None
        client.portal.call(all_packed)
        assert items(sqlite_url) == ["tea", "receipt", "tea", "milk, packed"]


def test_the_worker_packs_what_waits_and_ends(load: Load, database_url: str) -> None:
    modules = load(TUTORIAL, BACKGROUND, url=database_url)
    create_tables(database_url, modules["tables"].Base)
    values = "('A1', 'tea'), ('A2', 'coffee, packed'), ('A3', 'milk')"
    sql(database_url, f"INSERT INTO orders (number, item) VALUES {values}")
    run(modules["worker"].main())
    assert items(database_url) == ["tea, packed", "coffee, packed", "milk, packed"]
    run(assert_disconnected(database_url))


TENANTS = "how-to/multi-tenancy.md"


@pytest.fixture
@covers(TENANTS)
def tenants(load: Load, postgresql_url: str) -> Generator[tuple[TestClient, Modules], None, None]:
    """The page about tenants, on one connection, as a role for which the policies hold."""
    create_tables(postgresql_url, load(TENANTS)["documents"].Base)
    script = ";".join(sql_of(DOCS / TENANTS)).split(";")
    sql(postgresql_url, *(statement for statement in script if statement.strip()))
    try:
        url = make_url(postgresql_url).set(username="shop_app", password="secret")
        modules = load(TENANTS, url=url.render_as_string(hide_password=False))
        with serve(modules["tenants"].app) as client:
            for tenant in ("anna", "ben"):
                response = client.post(
                    f"/documents?title=of-{tenant}&tenant={tenant}", headers={"x-tenant": tenant}
                )
                assert response.status_code == 201
            yield client, modules
    finally:
        sql(postgresql_url, "DROP OWNED BY shop_app", "DROP ROLE shop_app")


def test_each_tenant_sees_and_writes_its_own_rows_alone(
    tenants: tuple[TestClient, Modules], postgresql_url: str
) -> None:
    client, _ = tenants
    for tenant in ("anna", "ben", "anna"):
        headers = {"x-tenant": tenant}
        assert client.get("/documents", headers=headers).json() == [f"of-{tenant}"]
        assert client.get("/documents/stream", headers=headers).text == f"of-{tenant}\n"
    response = client.post("/documents?title=forged&tenant=ben", headers={"x-tenant": "anna"})
    assert response.status_code == 500
    assert sql(postgresql_url, "SELECT title FROM documents ORDER BY id") == [
        ("of-anna",),
        ("of-ben",),
    ]


@pytest.mark.parametrize(
    "mode",
    [plain, transactional, read_only, read_only(snapshot=True)],
    ids=["plain", "transactional", "read_only", "snapshot"],
)
def test_without_a_tenant_nothing_is_seen_on_the_connection_that_tenants_have_used(
    tenants: tuple[TestClient, Modules], mode: Mode
) -> None:
    client, modules = tenants
    database, documents = modules["tenants"].database, modules["documents"]

    async def count(tenant: str | None) -> int:
        assert database.engine.pool.checkedin() == 1
        async with database.session(mode) as session:
            if tenant is not None:
                modules["tenants"].confine(session, tenant)
            return len((await session.scalars(select(documents.Document))).all())

    assert client.portal is not None
    assert client.portal.call(count, None) == 0
    if mode.autocommit:
        with pytest.raises(ReadOnlyError):
            client.portal.call(count, "anna")
    else:
        assert client.portal.call(count, "anna") == 1
    assert client.portal.call(count, None) == 0


@covers("how-to/pgbouncer.md")
def test_the_application_behind_pgbouncer_answers(
    load: Load, postgresql_server: DatabaseServer, postgresql_url: str
) -> None:
    with pgbouncer(postgresql_server.url, pool_size=1) as port:
        modules = load("how-to/pgbouncer.md", url=through(port, postgresql_url))
        with serve(modules["pooled"].app) as client:
            for _ in range(3):
                assert client.get("/one").json() == 1
                assert client.get("/level").json() == "serializable"


TESTING = "how-to/testing.md"


@covers(TESTING)
def test_the_shops_own_tests_pass_and_leave_nothing(tmp_path: Path, database_url: str) -> None:
    write_files(tmp_path, TUTORIAL, TESTING)
    assert " 7 passed" in run_pytest(tmp_path, DATABASE_URL=database_url)
    assert items(database_url) == []
    run(assert_disconnected(database_url))


def test_the_shops_own_tests_pass_side_by_side(tmp_path: Path, postgresql_url: str) -> None:
    write_files(tmp_path, TUTORIAL, TESTING)
    of_tests = f"{make_url(postgresql_url).database}_test%"
    assert " 7 passed" in run_pytest(tmp_path, f"--asgi-db-url={postgresql_url}", "-n", "2")
    left = f"SELECT datname FROM pg_database WHERE datname LIKE '{of_tests}'"
    assert sql(postgresql_url, left) == []


def test_the_shops_own_tests_pass_beside_a_database_in_use(
    tmp_path: Path, load: Load, sqlite_url: str
) -> None:
    app_db = make_url(sqlite_url).set(database=str(tmp_path / "app.db"))
    url = app_db.render_as_string(hide_password=False)
    with serve(load(TUTORIAL, url=url)["app"].app) as client:
        client.post("/orders?number=T1&item=milk")
    write_files(tmp_path, TESTING)
    assert " 7 passed" in run_pytest(tmp_path, "--asgi-db-url=sqlite:///app.db")
    assert items(url) == ["milk"]
    assert not list(tmp_path.glob("app_test*"))


def run_pytest(folder: Path, *arguments: str, **environment: str) -> str:
    """Runs the tests of a folder as a user would, and returns what pytest printed."""
    # The shop uses anyio's plugin; pytest-asyncio is here for another example, and warns.
    without = ["-p", "no:cacheprovider", "-p", "no:asyncio", *WITHOUT_SLOW_PLUGINS]
    outside = {key: value for key, value in os.environ.items() if "PYTEST_XDIST" not in key}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-W", "error", *without, *arguments],
        cwd=folder,
        env={**outside, **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


SEVERAL = "how-to/several-databases.md"


@covers(SEVERAL)
def test_the_database_outside_is_never_committed_without_the_one_inside(
    load: Load, sqlite_url: str
) -> None:
    modules = load(TUTORIAL, SEVERAL)
    analytics_url = "sqlite:///analytics.db"
    with serve(modules["visits"].app) as client:
        assert client.post("/orders?number=A1").status_code == 201
        assert (client.get("/visits").json(), items(sqlite_url)) == (1, ["tea"])
        assert client.post("/visits?number=A0").status_code == 201
        assert (client.get("/visits").json(), items(sqlite_url)) == (2, ["tea", "a visit"])
        failing = "CREATE TRIGGER no BEFORE INSERT ON {} BEGIN SELECT RAISE(ABORT, 'no'); END"
        sql(sqlite_url, failing.format("orders"))
        assert client.post("/orders?number=A2").status_code == 500
        assert client.get("/visits").json() == 3  # as it says
        assert items(sqlite_url) == ["tea", "a visit"]
        sql(sqlite_url, "DROP TRIGGER no")
        sql(analytics_url, failing.format("visits"))
        assert client.post("/orders?number=A3").status_code == 500
        assert (client.get("/visits").json(), items(sqlite_url)) == (3, ["tea", "a visit"])


SERVERS = "how-to/more-than-one-server.md"


@covers(SERVERS)
def test_a_client_never_sees_less_than_it_was_told(
    load: Load,
    postgresql_cluster: Cluster,
    postgresql_urls: Urls,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster, urls = postgresql_cluster, postgresql_urls
    monkeypatch.setenv("DATABASE_REPLICA_URLS", " ".join(urls.replicas))
    modules = load(TUTORIAL, SERVERS, url=urls.primary)
    create_tables(urls.primary, modules["tables"].Base)
    cluster.wait_until_caught_up()
    replicated = modules["replicated"]
    with serve(replicated.app) as client:
        assert client.get("/orders").json() == []
        assert sum(one.units for one in replicated.database.stats().replicas) == 1
        for replica in cluster.replicas:
            replica.pause()
        response = client.post("/orders?number=A1&item=tea", headers={"Origin": SHOP})
        position = response.headers["asgi-db-db"]
        assert re.fullmatch("[0-9a-f]+:[0-9]+", position)
        cookie = f"asgi-db-db={position}; Max-Age=30; Path=/; HttpOnly; SameSite=Lax"
        assert response.headers["set-cookie"] == cookie
        assert "asgi-db-db" in response.headers["access-control-expose-headers"]
        assert client.get("/orders").json() == ["tea"]
        client.cookies.clear()
        assert client.get("/orders", headers={"asgi-db-db": position}).json() == ["tea"]
        assert client.get("/orders/last").json() == "tea"
        assert client.get("/orders").json() == []  # of a client who was told nothing
        asked = {"Origin": SHOP, "Access-Control-Request-Method": "GET"}
        asked["Access-Control-Request-Headers"] = "asgi-db-db"
        assert client.options("/orders", headers=asked).status_code == 200
    for url in (urls.primary, *urls.replicas):
        run(assert_disconnected(url))


SHOP = "https://shop.example.com"


def test_the_numbers_of_the_page_about_several_servers_are_computed_as_it_says() -> None:
    page = (DOCS / SERVERS).read_text()
    for processes, connections in [(1, 40), (2, 20), (4, 10), (8, 5)]:
        queue = Queue(connections, 600 / processes, 0.05)
        assert queue.utilization == pytest.approx(0.75)
        enough = processes * smallest_pool(queue.in_use)
        shown = f"{100 * queue.waiting:.1f} % | {1000 * queue.mean_wait:.1f} ms | {enough}"
        assert f"| {processes} | {connections} | {shown} |" in page


LIBRARIES = "how-to/libraries.md"


@covers(LIBRARIES)
@pytest.mark.parametrize("name", ["engines", "later"])
def test_a_panel_has_the_engine_of_the_database(load: Load, database_url: str, name: str) -> None:
    module = load(LIBRARIES, url=database_url)[name]
    with serve(module.app) as client:
        if name == "engines":
            assert client.get("/one").json() == 1
        panel = module.panel if name == "engines" else module.app.state.panel
        assert client.portal is not None
        assert client.portal.call(lambda: same_engine(panel, module.database))
        if name == "engines":
            client.portal.call(module.engine.dispose)
    run(assert_disconnected(database_url))


@covers(LIBRARIES)
def test_a_class_that_takes_a_sessionmaker_writes_through_it(load: Load, sqlite_url: str) -> None:
    modules = load(TUTORIAL, LIBRARIES)
    create_tables(sqlite_url, modules["tables"].Base)
    orders, order = modules["orders"], modules["tables"].Order

    async def create() -> None:
        async with orders.database:
            await orders.orders.create(kept := order(number="1", item="tea"))
            await orders.orders.create(deleted := order(number="2", item="coffee"))
            await orders.orders.delete(deleted)
            assert kept.item == "tea"

    run(create())
    assert items(sqlite_url) == ["tea"]


async def same_engine(panel: Any, database: Database) -> bool:
    return bool(panel.engine is database.engine)


CALL_HEROES = """
import asyncio
from starlette.testclient import TestClient
import count_heroes
from hero_app import app

hero = {"name": "Deadpond", "secret_name": "Dive Wilson"}
with TestClient(app, raise_server_exceptions=False) as client:
    response = client.post("/heroes", json=hero)
    assert (response.status_code, response.json()) == (201, {"id": 1, "name": "Deadpond"})
    assert client.get("/heroes").json() == [response.json()]
    assert client.get("/heroes/1").json() == response.json()
    assert client.get("/heroes/2").status_code == 404
    assert client.post("/heroes", json=hero).status_code == 500  # the name is taken
asyncio.run(count_heroes.main())
"""


@covers("how-to/sqlmodel.md")
def test_heroes_are_stored_and_found_by_sqlmodels_session(
    tmp_path: Path, database_url: str
) -> None:
    """In a process of its own, because SQLModel has one `MetaData` for all of a process."""
    write_files(tmp_path, "how-to/sqlmodel.md")
    done = subprocess.run(
        [sys.executable, "-c", CALL_HEROES],
        cwd=tmp_path,
        env={**os.environ, "DATABASE_URL": database_url},
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert sql(database_url, "SELECT name, secret_name FROM hero") == [("Deadpond", "Dive Wilson")]
    run(assert_disconnected(database_url))


AUTHENTICATION = "how-to/authentication.md"


@covers(AUTHENTICATION)
@pytest.mark.parametrize("name", ["members", "guarded", "counted", "litestar_members"])
def test_a_user_is_known_by_a_token(load: Load, database_url: str, name: str) -> None:
    modules = load(AUTHENTICATION, url=database_url)
    accounts = modules["accounts"]
    create_tables(database_url, accounts.Base)
    token_hash = accounts.hash_of("secret")
    columns = "id, name, token_hash, requests"
    sql(database_url, f"INSERT INTO users ({columns}) VALUES (7, 'Anna', '{token_hash}', 0)")
    right, wrong = ({"authorization": f"Bearer {token}"} for token in ("secret", "guessed"))
    app = modules["guarded" if name == "counted" else name].app
    with serve(app) as client:
        if "members" in name:
            assert client.get("/me", headers=right).json() == {"name": "Anna"}
            assert client.get("/me", headers=wrong).status_code == 401
        if name == "members":
            assert client.post("/notes?text=tea", headers=right).status_code == 201
            assert client.post("/notes?text=no", headers=wrong).status_code == 401
            assert sql(database_url, "SELECT user_id, text FROM notes") == [(7, "tea")]
        if name == "counted":
            response = client.post("/guarded?text=tea", headers=right)
            assert (response.status_code, response.json()) == (201, {"by": "Anna"})
            assert client.post("/guarded", headers=right).status_code == 422
            assert sql(database_url, "SELECT text FROM notes") == [("tea",)]
            assert sql(database_url, "SELECT requests FROM users") == [(2,)]
    run(assert_disconnected(database_url))


LAZY_LOADING = "how-to/lazy-loading.md"


@covers(LAZY_LOADING)
def test_the_response_model_finds_everything_loaded(load: Load, database_url: str) -> None:
    modules = load(LAZY_LOADING, url=database_url)
    with serve(modules["authors"].app) as client:
        response = client.post("/authors?name=Anna&title=Tea")
        assert (response.status_code, response.json()["name"]) == (201, "Anna")
        response = client.post("/authors/1/books?title=Coffee")
        assert [book["title"] for book in response.json()["books"]] == ["Tea", "Coffee"]
        assert client.get("/authors").json() == [response.json()]
    run(assert_disconnected(database_url))


async def test_as_the_page_says_a_forgotten_option_is_an_error_in_the_first_test(
    load: Load, sqlite_url: str
) -> None:
    library = load(LAZY_LOADING)["library"]
    async with Database(sqlite_url) as database:
        await database.create_tables(library.Base.metadata)
        async with database.transaction() as session:
            session.add(library.Author(name="Anna"))
        async with database.session(read_only) as session:
            author = (await session.scalars(select(library.Author))).one()
            with pytest.raises(InvalidRequestError) as raised:
                print(author.books)
            assert str(raised.value) in (DOCS / LAZY_LOADING).read_text()
            assert await author.awaitable_attrs.id == author.id


# -- moving over -------------------------------------------------------------------------------


BESIDE = ROOT / ".build" / f"beside-{Path(sys.prefix).name}"
"""Where `make suite` installs the libraries from which one may move over."""

ORDER_FROM_EACH = """
import asyncio, sys
from importlib import import_module
from starlette.testclient import TestClient
from asgi_db import Database

async def create_tables(metadata):
    async with Database() as database:
        await database.create_tables(metadata)

tables, *applications = sys.argv[1:]
asyncio.run(create_tables(import_module(tables).Order.metadata))
for name in applications:
    with TestClient(import_module(name).app) as client:
        print(client.post(f"/orders?number={name}&item=tea").status_code)
"""


@pytest.mark.parametrize(
    ("page", "tables", "applications"),
    [
        ("from-get-db", "tables", ["before", "after"]),
        ("from-fastapi-async-sqlalchemy", "tables", ["before", "after", "bridge"]),
        (
            "from-advanced-alchemy",
            "models",
            ["fastapi_before", "fastapi_after", "litestar_before", "litestar_after"],
        ),
    ],
    ids=["get_db", "fastapi-async-sqlalchemy", "advanced-alchemy"],
)
@covers("how-to/from-get-db.md")
@covers("how-to/from-fastapi-async-sqlalchemy.md")
@covers("how-to/from-advanced-alchemy.md")
def test_a_route_works_before_and_after_moving_over(
    tmp_path: Path, sqlite_url: str, page: str, tables: str, applications: list[str]
) -> None:
    write_files(tmp_path, TUTORIAL, f"how-to/{page}.md")
    printed = run_beside(tmp_path, sqlite_url, ORDER_FROM_EACH, tables, *applications)
    assert printed.split() == ["201"] * len(applications)
    numbers = sql(sqlite_url, "SELECT number FROM orders ORDER BY id")
    assert numbers == [(name,) for name in applications]


def run_beside(folder: Path, url: str, program: str, *arguments: str) -> str:
    """Runs a program in the folder beside the other libraries, and returns what it prints."""
    assert BESIDE.exists(), f"`make suite` installs what one moves over from in {BESIDE}"
    path = os.pathsep.join([str(BESIDE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        env={**os.environ, "DATABASE_URL": url, "PYTHONPATH": path},
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


ORDERS_IN_LITESTAR = """
import sys
from importlib import import_module
from starlette.testclient import TestClient

app = import_module(sys.argv[1]).app
with TestClient(app, raise_server_exceptions=False) as client:
    for step in sys.argv[2:]:
        method, name = (step.split() + [""])[:2]
        path = f"/orders?number={name}" if method == "POST" else f"/orders/{name}"
        answer = client.request(method, path)
        print(answer.status_code, answer.text if answer.is_success else "")
"""


@pytest.mark.parametrize(
    ("application", "answer"),
    [("litestar_before", '201 {"number":"A1","id":2}'), ("litestar_after", "500")],
    ids=["before", "after"],
)
def test_an_application_with_autocommit_moves_over_and_hears_of_a_failed_commit(
    tmp_path: Path, postgresql_url: str, application: str, answer: str
) -> None:
    sql(
        postgresql_url,
        "CREATE SEQUENCE orders_id_seq",
        "CREATE TABLE orders (id bigint PRIMARY KEY DEFAULT nextval('orders_id_seq'),"
        " number varchar(20) UNIQUE DEFERRABLE INITIALLY DEFERRED)",
    )
    write_files(tmp_path, "how-to/from-advanced-alchemy.md")
    steps = ["POST A1", "GET", "GET last", "POST A1", "GET 77", "GET"]
    printed = run_beside(tmp_path, postgresql_url, ORDERS_IN_LITESTAR, application, *steps)
    one_order = '200 [{"number":"A1","id":1}]'
    assert [line.strip() for line in printed.splitlines()] == [
        '201 {"number":"A1","id":1}',
        one_order,
        "200 A1",
        answer,
        "404",
        one_order,
    ]
    sql(postgresql_url, "INSERT INTO orders (number) SELECT generate_series(2, 1000)")
    printed = run_beside(tmp_path, postgresql_url, ORDERS_IN_LITESTAR, application, "POST A2")
    assert printed.split() == ["403"]
    run(assert_disconnected(postgresql_url))


# -- GraphQL -----------------------------------------------------------------------------------

ASK_GRAPHQL = """
import sys
from starlette.testclient import TestClient
from api import app, database
import envelopes
from tables import Base

ONE = 'order(number: "%s", item: "tea")'
ORDER = f'mutation {{ first: {ONE} second: {ONE.replace("tea", "cup")} }}'

def over_http(client, query):
    response = client.post("/graphql", json={"query": query})
    assert response.status_code == 200, response.text
    return response.json()

def over_a_socket(client, query):
    with client.websocket_connect("/graphql", ["graphql-transport-ws"]) as socket:
        socket.send_json({"type": "connection_init"})
        assert socket.receive_json()["type"] == "connection_ack"
        for id in "1", "2":  # side by side
            socket.send_json({"type": "subscribe", "id": id, "payload": {"query": query % id}})
        found = {}
        while len(found) < 2:
            message = socket.receive_json()
            if message["type"] == "next":
                found[message["id"]] = message["payload"]
        return found

with TestClient(app) as client:
    done = over_http(client, ORDER % ("A1", "A2"))
    assert "errors" not in done and set(done["data"]) == {"first", "second"}, done
    failed = over_http(client, ORDER % ("A3", "A3"))
    assert "errors" in failed, failed
    assert over_http(client, "{ items again: items }")["data"]["again"] == ["tea", "cup"]
    both = over_http(client, '{ a: item(number: "A1") b: item(number: "A2") c: item(number: "") }')
    assert both["data"] == {"a": "tea", "b": "cup", "c": None}
    with client.websocket_connect("/graphql", ["graphql-transport-ws"]) as socket:
        socket.send_json({"type": "connection_init"})
        assert socket.receive_json()["type"] == "connection_ack"
        query = "subscription { count(times: 2) }"
        socket.send_json({"type": "subscribe", "id": "1", "payload": {"query": query}})
        events = [socket.receive_json() for _ in range(3)]
        counts = [event["payload"]["data"]["count"] for event in events[:2]]
        assert counts == [2, 2] and events[2]["type"] == "complete", events
    found = over_a_socket(client, ORDER.replace('"%s"', '"S%s"', 1).replace('"%s"', '"T"'))
    errors = sorted("errors" in payload for payload in found.values())
    assert errors == [False, True], found
    assert client.post("/rpc?number=B1&item=tea").json() == {"ok": True}
    assert client.post("/rpc?number=B2&item=nothing").json()["ok"] is False
"""


@covers("how-to/graphql.md")
def test_a_mutation_with_an_error_in_its_answer_stores_nothing(
    tmp_path: Path, database_url: str
) -> None:
    assert BESIDE.exists(), f"`make suite` installs Strawberry in {BESIDE}"
    write_files(tmp_path, TUTORIAL, "how-to/graphql.md")
    beside = os.pathsep.join((str(BESIDE), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-c", ASK_GRAPHQL],
        cwd=tmp_path,
        env={**os.environ, "DATABASE_URL": database_url, "PYTHONPATH": beside},
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "rolled back" not in done.stderr
    assert len(numbers := sql(database_url, "SELECT number FROM orders ORDER BY id")) == 5
    assert {("A1",), ("A2",), ("T",), ("B1",)} < set(numbers)


# -- session classes ---------------------------------------------------------------------------


@covers("how-to/session-class.md")
def test_a_session_class_of_ones_own_serves_requests_and_blocks(
    load: Load, sqlite_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    modules = load(TUTORIAL, "how-to/session-class.md")
    create_tables(sqlite_url, modules["tables"].Base)
    warehouse, routing = modules["warehouse"], modules["routing"]
    with serve(warehouse.app) as client:
        assert client.post("/orders?number=1&item=tea").status_code == 201
        assert client.get("/items").json() == ["tea"]

    class Archived(DeclarativeBase):
        pass

    class Archive(Archived):
        __tablename__ = "archived_orders"
        id: Mapped[int] = mapped_column(primary_key=True)

    async def use_both() -> None:
        async with warehouse.database:
            await warehouse.print_items()
        async with Database(engine=routing.archive) as archive, routing.database as database:
            await archive.create_tables(Archived.metadata)
            async with database.transaction() as session:
                session.add(Archive())
            async with database.session(read_only) as session:
                assert len((await session.scalars(select(Archive))).all()) == 1
                order = modules["tables"].Order
                assert (await session.scalars(select(order.item))).all() == ["tea"]
        await routing.archive.dispose()

    run(use_both())
    assert capsys.readouterr().out == "['tea']\n"


# -- the pool ----------------------------------------------------------------------------------


@covers("pool.md")
def test_the_pools_of_the_guide_are_made_and_its_numbers_are_right(load: Load) -> None:
    pools = load("pool.md")["pools"]

    async def sizes() -> list[int]:
        made = [pools.small, pools.usual, pools.busy, pools.own]
        return [database.engine.pool.size() for database in made]

    assert run(sizes()) == [5, 10, 20, 4]
    page = (DOCS / "pool.md").read_text()
    for name, profile in POOL_PROFILES.items():
        most = profile.pool_size + profile.max_overflow
        assert f'| `"{name}"` | {most} | {4 * most} | {97 // most} |' in page


# -- the dashboard -----------------------------------------------------------------------------


@covers("how-to/dashboard.md")
@pytest.mark.parametrize("name", ["app", "litestar_app"])
def test_the_dashboard_of_the_guide_is_for_operators(load: Load, name: str) -> None:
    with serve(load("how-to/dashboard.md")[name].app) as client:
        assert client.get("/db/").status_code == 403
        assert "<h1>shop.db</h1>" in client.get("/db/", headers={"x-operator": "yes"}).text


WATCHING = "how-to/watching.md"


@covers(WATCHING)
def test_the_endpoint_says_what_the_routes_have_done(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = CollectorRegistry()
    monkeypatch.setattr("prometheus_client.REGISTRY", registry)
    instrumentor: Any = SQLAlchemyInstrumentor()
    try:
        modules = load(TUTORIAL, WATCHING)
        with serve(modules["app"].app) as client:
            assert client.post("/orders?number=A1&item=tea").status_code == 201
            stats = client.get("/stats").json()
            scrape = generate_latest(registry).decode()
            assert len(modules["app"].database.statistics.observers) == 1
        assert instrumentor.is_instrumented_by_opentelemetry
    finally:
        instrumentor.uninstrument()
    assert stats["routes"]["POST /orders (create_order)"]["committed"] == 1
    assert (stats["pool"]["checked_out"], stats["holders"]) == (0, [])
    assert 'outcome="committed",route="POST /orders (create_order)"} 1.0' in scrape


@covers("how-to/deployment.md")
def test_the_probes_say_that_the_application_is_ready_and_alive(load: Load) -> None:
    with serve(load(TUTORIAL, "how-to/deployment.md")["app"].app) as client:
        response = client.get("/ready")
        assert (response.status_code, response.json()) == (200, {"status": "ready"})
        assert client.get("/live").json() == {"status": "alive"}


# -- the reference -----------------------------------------------------------------------------

MODES = "reference/modes.md"
SETTINGS = "reference/settings.md"


@covers(MODES)
def test_decorated_routes_commit_and_say_how_many_attempts_it_took(
    load: Load, database_url: str
) -> None:
    with serve(load(TUTORIAL, MODES, url=database_url)["app"].app) as client:
        client.post("/orders?number=A1&item=tea")
        assert client.post("/orders/1/claim").json() == {"attempts": 1}
        assert items(database_url) == ["claimed: tea"]
        assert client.post("/orders/1/take").json() == {"item": "claimed: tea"}
        assert items(database_url) == []


@covers(SETTINGS)
def test_the_settings_that_are_shown_are_accepted(load: Load) -> None:
    settings = load(SETTINGS)["settings"]
    assert settings.url.password == "p@ss/word"
    assert str(settings.url) == "mysql+asyncmy://app:***@db/shop?charset=utf8mb4"
    assert settings.embedded.url.database == "shop.db"


def test_the_pool_profiles_are_shown_as_they_are() -> None:
    page = (DOCS / SETTINGS).read_text()
    for name, profile in POOL_PROFILES.items():
        column = 2 + list(POOL_PROFILES).index(name)
        for option in fields(PoolProfile):
            value = getattr(profile, option.name)
            shown = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
            row = re.search(rf"^\| `{option.name}`.*$", page, re.MULTILINE)
            assert row and row[0].split("|")[column].strip() == shown, f"{name} {option.name}"


# -- all pages ---------------------------------------------------------------------------------


RUN_ELSEWHERE = {"how-to/alembic.md"}  # in test_alembic.py


def test_every_page_with_python_is_run() -> None:
    pages = {str(page.relative_to(DOCS)): page.read_text() for page in DOCS.glob("**/*.md")}
    with_python = {name for name, text in pages.items() if PYTHON_BLOCK.search(text)}
    assert with_python - RUN_ELSEWHERE == COVERED - {README}


def test_the_pages_beside_the_reference_name_everything_public() -> None:
    pages = [page for page in DOCS.glob("**/*.md") if page.name != "asgi_db.md"]
    text = "\n".join(page.read_text() for page in pages)
    for name in asgi_db.__all__:
        assert re.search(rf"\b{name}\b", text), f"{name} is missing"
