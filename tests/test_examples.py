"""The examples and the README do what they show, on every database that they name."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Generator
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pytest
from opentelemetry.instrumentation.sqlalchemy import (  # pyright: ignore[reportMissingTypeStubs]
    SQLAlchemyInstrumentor,
)
from prometheus_client import CollectorRegistry, generate_latest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from starlette.testclient import TestClient

import asgi_db
from asgi_db import Database, DBSessionMiddleware, PoolProfile, session_of, transactional
from asgi_db.types import Message, Receive, Scope, Send
from models import Account
from tests.internals import POOL_PROFILES
from tests.nested import WITHOUT_SLOW_PLUGINS
from tests.servers import Row, assert_disconnected, assert_idle, run, sql
from tests.snippets import blocks_by_heading

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"

Load = Callable[[str], Any]
Test = TypeVar("Test", bound=Callable[..., object])

COVERED = set[str]()


def covers(*names: str) -> Callable[[Test], Test]:
    """Notes which example files a test runs."""
    COVERED.update(names)
    return lambda test: test


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, database_url: str) -> Load:
    """Imports an example anew, with DATABASE_URL for its database."""
    monkeypatch.setenv("DATABASE_URL", database_url)

    def load_example(name: str) -> Any:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return import_module(name)

    return load_example


def serve(app: Any) -> TestClient:
    """A client for any ASGI application, which starts it and ends it with its block."""
    return TestClient(app, raise_server_exceptions=False, follow_redirects=False)


# The four usage patterns, on each framework


@pytest.fixture(params=["fastapi_app", "starlette_app", "litestar_app"])
@covers("fastapi_app", "starlette_app", "litestar_app")
def bank(
    request: pytest.FixtureRequest, load: Load, database_url: str
) -> Generator[TestClient, None, None]:
    """The bank of an example, with Anna's account 1 of 100 and Ben's account 2 of 50."""
    with serve(load(request.param).app) as client:
        sql(
            database_url,
            "INSERT INTO accounts (id, owner, balance) VALUES (101, 'Anna', 100), (102, 'Ben', 50)",
        )
        yield client
    run(assert_disconnected(database_url))


def balances(url: str) -> list[Row]:
    return sql(url, "SELECT owner, balance FROM accounts ORDER BY owner")


def test_a_read_is_answered(bank: TestClient) -> None:
    response = bank.get("/accounts/101")
    assert response.status_code == 200
    assert response.json()["owner"] == "Anna" and response.json()["balance"] == 100
    assert bank.get("/accounts/999").status_code == 404


def test_a_write_is_committed_by_hand_and_refreshed(bank: TestClient, database_url: str) -> None:
    response = bank.post("/accounts", params={"owner": "Cleo"})
    assert response.status_code == 201
    assert response.json()["opened_at"]
    assert balances(database_url) == [("Anna", 100), ("Ben", 50), ("Cleo", 0)]


def test_a_transfer_moves_the_money(bank: TestClient, database_url: str) -> None:
    response = bank.post("/transfers", json={"source": 101, "target": 102, "amount": 30})
    assert (response.status_code, response.content) == (204, b"")
    assert balances(database_url) == [("Anna", 70), ("Ben", 80)]


@pytest.mark.parametrize(
    ("source", "refusal"), [(101, "Account 101 holds 100 only."), (999, "There is no account 999.")]
)
def test_a_transfer_which_fails_in_the_middle_rolls_back_whole(
    bank: TestClient, database_url: str, source: int, refusal: str
) -> None:
    response = bank.post("/transfers", json={"source": source, "target": 102, "amount": 500})
    assert (response.status_code, response.json()) == (409, {"detail": refusal})
    assert balances(database_url) == [("Anna", 100), ("Ben", 50)]


def test_an_explicit_block_commits_at_its_end(bank: TestClient, database_url: str) -> None:
    response = bank.post("/accounts/102/deposits", params={"amount": 5})
    assert response.status_code == 200
    assert response.json()["balance"] == 55
    assert balances(database_url) == [("Anna", 100), ("Ben", 55)]


def test_an_explicit_block_which_raises_rolls_back(bank: TestClient, database_url: str) -> None:
    response = bank.post("/accounts/102/deposits", params={"amount": -51})
    assert response.status_code == 409
    assert balances(database_url) == [("Anna", 100), ("Ben", 50)]


@covers("models")
async def test_the_database_itself_refuses_an_overdraft(database_url: str) -> None:
    async with Database(database_url) as database:
        await database.create_tables(Account.metadata)
        with pytest.raises(DBAPIError, match="never_overdrawn"):
            async with database.transaction() as session:
                await session.execute(
                    text("INSERT INTO accounts (id, owner, balance) VALUES (1, 'Anna', -1)")
                )


# The other programs


@covers("bare_asgi")
def test_a_bare_asgi_application_reads_and_writes(load: Load, database_url: str) -> None:
    with serve(load("bare_asgi").app) as client:
        assert client.get("/").json() == []
        response = client.post("/?Anna")
        assert (response.status_code, response.json()) == (201, ["Anna"])
        assert balances(database_url) == [("Anna", 0)]
        assert client.get("/").json() == ["Anna"]
    run(assert_disconnected(database_url))


@pytest.fixture
@covers("two_databases")
def two_databases(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Generator[tuple[TestClient, str], None, None]:
    """The example with two databases, and the URL of the second."""
    analytics_url = f"sqlite+aiosqlite:///{tmp_path}/analytics.db"
    monkeypatch.setenv("ANALYTICS_URL", analytics_url)
    with serve(load("two_databases").app) as client:
        yield client, analytics_url


VISITS = "SELECT path FROM visits"


def test_one_request_commits_in_both_databases(
    two_databases: tuple[TestClient, str], database_url: str
) -> None:
    client, analytics_url = two_databases
    assert client.post("/accounts?owner=Anna").status_code == 201
    assert balances(database_url) == [("Anna", 0)]
    assert sql(analytics_url, VISITS) == [("/accounts",)]


def test_where_the_inner_commit_fails_the_outer_database_rolls_back(
    two_databases: tuple[TestClient, str], database_url: str
) -> None:
    client, analytics_url = two_databases
    sql(analytics_url, "DROP TABLE visits")
    assert client.post("/accounts?owner=Anna").status_code == 500
    assert balances(database_url) == []


def test_where_the_outer_commit_fails_the_inner_database_stands(
    two_databases: tuple[TestClient, str], database_url: str
) -> None:
    client, analytics_url = two_databases
    sql(database_url, "DROP TABLE accounts")
    assert client.post("/accounts?owner=Anna").status_code == 500
    assert sql(analytics_url, VISITS) == [("/accounts",)]


@covers("script")
def test_the_script_works_outside_requests(database_url: str) -> None:
    process = python(EXAMPLES / "script.py", DATABASE_URL=database_url)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.splitlines() == [
        "refused: Account 1 holds 100 only.",
        "Anna: 70",
        "Ben: 30",
    ]
    assert balances(database_url) == [("Anna", 70), ("Ben", 30)]


def python(program: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs a program to its end."""
    return subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


# The shop and its demonstration


@pytest.fixture
@covers("shop")
def shop(load: Load, database_url: str) -> Generator[TestClient, None, None]:
    with serve(load("shop").app) as client:
        yield client
    run(assert_disconnected(database_url))


ORDERS = "SELECT product_id, quantity FROM orders"


def test_the_shop_reads_and_writes(shop: TestClient, database_url: str) -> None:
    assert shop.get("/products/1").json() == {"id": 1, "name": "Teapot"}
    assert shop.get("/products/99").status_code == 404
    assert shop.post("/orders?product_id=1&quantity=3").status_code == 201
    assert sql(database_url, ORDERS) == [(1, 3)]


def test_the_shop_answers_a_failed_commit_with_its_handler(
    shop: TestClient, database_url: str
) -> None:
    """MySQL and MariaDB have no deferred constraints: there the statement itself fails."""
    response = shop.post("/orders?product_id=99&quantity=1")
    assert response.status_code == 409
    assert "foreign key" in response.json()["detail"].lower()
    assert sql(database_url, ORDERS) == []


def test_the_brochure_of_the_shop_has_5_mb(shop: TestClient) -> None:
    response = shop.get("/brochure")
    assert response.status_code == 200
    assert len(response.content) == 5 * 1024 * 1024
    assert response.text.startswith("Teapot and Kettle ")
    state = shop.get("/pool").json()
    assert state["downloads"] == 0 and state["pool"].endswith("Current Checked out connections: 0")


def test_the_shop_has_interactive_documentation(shop: TestClient) -> None:
    assert shop.get("/").headers["location"] == "/docs"
    assert "swagger" in shop.get("/docs").text


def test_the_shop_has_a_live_page(load: Load) -> None:
    app = load("shop").app
    with TestClient(app, base_url="http://localhost", client=("127.0.0.1", 50000)) as client:
        client.get("/products/1")
        assert "GET /products/{product_id}" in client.get("/db").text


def test_the_shop_opens_again_with_what_it_holds(load: Load, database_url: str) -> None:
    for _ in range(2):
        with serve(load("shop").app) as client:
            assert client.get("/products/2").json()["name"] == "Kettle"
    assert sql(database_url, "SELECT count(*) FROM products") == [(2,)]


@covers("demo")
def test_the_demonstration_keeps_all_its_promises() -> None:
    process = python(EXAMPLES / "demo.py", DATABASE_URL="postgresql://nowhere/nothing")
    assert process.returncode == 0, process.stdout
    assert process.stdout.count("\n✓ ") == 6
    assert process.stdout.endswith("\nAll as promised.\n")
    assert process.stderr == ""


@pytest.mark.parametrize(
    ("right", "wrong", "broken"),
    [
        (
            "session: CurrentSessionTransaction",
            "session: CurrentSession",
            "write, failed_commit, after_the_failure",
        ),
        ("@app.exception_handler(IntegrityError)", "", "failed_commit"),
        (
            "        for _ in range(PAGES):\n    ",
            "        async with database.engine.connect():\n          for _ in range(PAGES):\n    ",
            "slow_downloads",
        ),
    ],
    ids=["no commit", "no handler", "a held connection"],
)
def test_the_demonstration_fails_where_a_promise_is_broken(
    tmp_path: Path, right: str, wrong: str, broken: str
) -> None:
    process = demonstrate(tmp_path, shop_source().replace(right, wrong))
    assert process.returncode == 1
    assert f"\nBROKEN: {broken}" in process.stdout
    assert process.stdout.count("\n✗ ") == process.stdout.count("\n    BROKEN: ") >= 1
    assert "All as promised" not in process.stdout


def test_the_demonstration_shows_why_the_shop_does_not_start(tmp_path: Path) -> None:
    process = demonstrate(tmp_path, "raise RuntimeError('closed on Sundays')")
    assert process.returncode == 1
    assert "\n✗ the shop ended:" in process.stdout
    assert "closed on Sundays" in process.stdout


def shop_source() -> str:
    return (EXAMPLES / "shop.py").read_text()


def demonstrate(folder: Path, shop: str) -> "subprocess.CompletedProcess[str]":
    """Runs the demonstration on another shop."""
    for name in ("demo.py", "models.py"):
        (folder / name).write_text((EXAMPLES / name).read_text())
    (folder / "shop.py").write_text(shop)
    return python(folder / "demo.py")


# The README

README = (ROOT / "README.md").read_text()

IMPORTS = """
import asyncio
from fastapi import Request, WebSocket
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import func
from sqlalchemy.exc import IntegrityError
from asgi_db import Readiness, read_only, transactional
from asgi_db_fastapi import CurrentSession
"""
"""What the fragments of the README leave out; they go on from its example for FastAPI."""


def readme_blocks() -> dict[str, str]:
    """The Python blocks of the README, by the heading above them."""
    return blocks_by_heading(README)


Run = Callable[..., Any]


@pytest.fixture
@covers("README: Install")
def run_readme(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, database_url: str) -> Run:
    """Runs blocks of the README as one module, beside `tables.py`."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.chdir(tmp_path)

    def execute(name: str, **sources: str) -> Any:
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        for label, source in sources.items():
            exec(compile(source, label, "exec"), module.__dict__)
        return module

    def run_blocks(*headings: str, before: str = "") -> Any:
        *first, last = [readme_blocks()[heading] for heading in headings]
        execute("tables", tables=readme_blocks()["Install"])
        return execute("readme", **{"README.md": "\n".join(first)}, before=before, after=last)

    return run_blocks


def fragment(run_readme: Run, heading: str, more: str = "") -> TestClient:
    """The example for FastAPI, with a fragment added to it."""
    return serve(run_readme("FastAPI", heading, before=IMPORTS + more).app)


def items(url: str) -> list[str]:
    return [item for (item,) in sql(url, "SELECT item FROM orders ORDER BY id")]


@pytest.mark.parametrize("framework", ["FastAPI", "Starlette", "Litestar"])
@covers("README: FastAPI", "README: Starlette", "README: Litestar")
def test_the_readmes_example_of_each_framework_writes_and_reads(
    run_readme: Run, database_url: str, framework: str
) -> None:
    with serve(run_readme(framework).app) as client:
        assert client.get("/orders").json() == []
        response = client.post("/orders?item=tea")
        assert (response.status_code, response.json()) == (201, {"id": 1})
        assert items(database_url) == ["tea"]
        assert client.get("/orders").json() == ["tea"]
    run(assert_disconnected(database_url))


@covers("README: Any ASGI application")
def test_the_readmes_bare_application_writes_and_reads(run_readme: Run, database_url: str) -> None:
    readme = run_readme("Any ASGI application")

    async def create_tables() -> None:
        async with Database(database_url) as database:
            await database.create_tables(readme.Order.metadata)

    run(create_tables())
    with serve(readme.app) as client:
        assert [client.get("/").text, client.post("/?tea").text] == ["0", "1"]
        assert items(database_url) == ["tea"]
    run(assert_disconnected(database_url))


@covers("README: On a route")
def test_the_readmes_decorated_route_commits(run_readme: Run, database_url: str) -> None:
    with fragment(run_readme, "On a route") as client:
        client.post("/orders?item=tea")
        assert client.post("/orders/1/take").json() == {"item": "tea"}
        assert items(database_url) == []


@covers("README: A conflict is run again")
def test_the_readmes_claim_says_how_many_attempts_it_took(
    run_readme: Run, database_url: str
) -> None:
    with fragment(run_readme, "A conflict is run again") as client:
        client.post("/orders?item=tea")
        assert client.post("/orders/1/claim").json() == {"attempts": 1}
        assert items(database_url) == ["claimed: tea"]


@covers("README: A database that is busy or down")
def test_the_readmes_endpoint_says_that_the_database_is_ready(run_readme: Run) -> None:
    with fragment(run_readme, "A database that is busy or down") as client:
        response = client.get("/ready")
        assert (response.status_code, response.json()) == (200, {"status": "ready"})


@covers("README: A failed COMMIT")
def test_the_readmes_handler_answers_a_failed_commit(run_readme: Run, database_url: str) -> None:
    route = """
@app.post("/first")
async def first(session: CurrentSessionTransaction) -> None:
    session.add(Order(id=1, item="tea"))
"""
    with fragment(run_readme, "A failed COMMIT", route) as client:
        assert [client.post("/first").status_code for _ in range(2)] == [200, 409]
        assert items(database_url) == ["tea"]


@covers("README: After the commit")
def test_the_readmes_mail_waits_for_the_commit(run_readme: Run, database_url: str) -> None:
    mail = """
sent = []

async def send_mail(text: str) -> None:
    sent.append(text)
"""
    with fragment(run_readme, "After the commit", mail) as client:
        assert client.post("/orders/mailed?item=tea").status_code == 201
        assert items(database_url) == ["tea"]
        assert sys.modules["readme"].sent == ["ordered: tea"]


@covers("README: A long read in a stream")
def test_the_readmes_long_read_is_whole(run_readme: Run, database_url: str) -> None:
    """As long that no driver fetches it all at once."""
    with fragment(run_readme, "A long read in a stream") as client:
        rows = ",".join(f"({i}, 'tea {i}')" for i in range(1, 5001))
        sql(database_url, f"INSERT INTO orders (id, item) VALUES {rows}")
        response = client.get("/export")
        assert response.text.splitlines() == [f"tea {i}" for i in range(1, 5001)]
    run(assert_disconnected(database_url))


@covers("README: A slow call in the middle")
def test_the_readmes_slow_call_holds_no_connection(run_readme: Run, database_url: str) -> None:
    slow_call = """
async def suggest_a_name(name: str) -> str:
    return f"{name}, beside {database.engine.pool.checkedout()} connections"
"""
    with fragment(run_readme, "A slow call in the middle", slow_call) as client:
        client.post("/orders?item=tea")
        response = client.post("/orders/1/rename")
        assert response.json() == {"item": "tea, beside 0 connections"}
        assert items(database_url) == ["tea, beside 0 connections"]


@covers("README: Work side by side")
def test_the_readmes_tasks_have_sessions_of_their_own(run_readme: Run) -> None:
    with fragment(run_readme, "Work side by side") as client:
        for item in ("tea", "coffee", "coffee"):
            client.post(f"/orders?item={item}")
        assert client.get("/totals").json() == [1, 2]


@covers("README: WebSockets")
def test_the_readmes_websocket_commits_each_message(run_readme: Run, database_url: str) -> None:
    with fragment(run_readme, "WebSockets") as client:
        with client.websocket_connect("/orders") as websocket:
            for number, item in enumerate(["tea", "coffee"], 1):
                websocket.send_text(item)
                assert websocket.receive_text() == "ordered"
                assert len(items(database_url)) == number
                run(assert_idle(database_url))


@covers("README: Where the database is")
def test_the_readmes_settings_are_accepted(run_readme: Run) -> None:
    readme = run_readme("Where the database is")
    assert readme.url.password == "p@ss/word"
    assert str(readme.url) == "mysql+asyncmy://app:***@db/shop?charset=utf8mb4"
    assert readme.database.url.database == "shop.db"


@covers("README: Several databases")
def test_the_readmes_two_databases_both_commit(run_readme: Run, database_url: str) -> None:
    second = """
from sqlalchemy import String
from sqlalchemy.orm import Mapped, mapped_column
analytics = Database("sqlite:///analytics.db")
class Visit(Base):
    __tablename__ = "visits"
    id: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str] = mapped_column(String(100))
async def prepare() -> None:
    await database.create_tables(Base.metadata)
    await analytics.create_tables(Base.metadata)
app = FastAPI(on_startup=[prepare])
"""
    with fragment(run_readme, "Several databases", second) as client:
        assert client.post("/visits").status_code == 201
    assert items(database_url) == ["a visit"]
    assert sql("sqlite:///analytics.db", VISITS) == [("/visits",)]


@covers("README: Outside requests")
def test_the_readmes_script_runs(
    run_readme: Run, database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = "from sqlalchemy import select\nfrom asgi_db import Database\nfrom tables import *\n"
    run_readme("Outside requests", before=IMPORTS + tables)
    assert capsys.readouterr().out == "['tea', 'coffee']\n"
    assert items(database_url) == ["tea", "coffee"]
    run(assert_disconnected(database_url))


@covers("README: Watching it")
def test_the_readmes_endpoint_says_what_the_routes_have_done(run_readme: Run) -> None:
    with fragment(run_readme, "Watching it") as client:
        client.post("/orders?item=tea")
        stats = client.get("/stats").json()
        assert stats["routes"]["POST /orders (create_order)"]["committed"] == 1
        assert (stats["pool"]["checked_out"], stats["holders"]) == (0, [])


@covers("README: OpenTelemetry")
def test_the_readmes_database_reports_to_opentelemetry(run_readme: Run) -> None:
    instrumentor: Any = SQLAlchemyInstrumentor()
    try:
        with fragment(run_readme, "OpenTelemetry") as client:
            assert client.post("/orders?item=tea").status_code == 201
            assert len(sys.modules["readme"].database.statistics.observers) == 1
        assert instrumentor.is_instrumented_by_opentelemetry
    finally:
        instrumentor.uninstrument()


@covers("README: A live page")
def test_the_readmes_live_page_is_for_operators(run_readme: Run) -> None:
    operator = "def is_operator(scope): return (b'x-operator', b'yes') in scope['headers']"
    with fragment(run_readme, "A live page", operator) as client:
        assert client.get("/db/").status_code == 403
        assert "<h1>" in client.get("/db/", headers={"x-operator": "yes"}).text


@covers("README: Prometheus")
def test_the_readmes_collector_counts_for_prometheus(
    run_readme: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = CollectorRegistry()
    monkeypatch.setattr("prometheus_client.REGISTRY", registry)
    with fragment(run_readme, "Prometheus") as client:
        client.post("/orders?item=tea")
        scrape = generate_latest(registry).decode()
    assert 'outcome="committed",route="POST /orders (create_order)"} 1.0' in scrape


@covers("README: Testing your application", "README: A test in a sandbox")
def test_the_readmes_tests_pass_on_a_database_of_their_own(
    database_url: str, tmp_path: Path
) -> None:
    blocks = readme_blocks()
    for name, heading in {
        "tables": "Install",
        "main": "FastAPI",
        "conftest": "Testing your application",
        "test_orders": "A test in a sandbox",
    }.items():
        (tmp_path / f"{name}.py").write_text(blocks[heading])
    options = [
        f"--asgi-db-url={database_url}",
        "-W",
        "error",
        "-p",
        "no:asyncio",
        *WITHOUT_SLOW_PLUGINS,
    ]
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "2 passed" in done.stdout, done.stdout + done.stderr


async def test_as_the_readme_says_what_had_not_left_with_a_chunk_is_rolled_back(
    database_url: str,
) -> None:
    """Starlette swallows the cancellation of a stream whose client has gone, and returns."""

    async def cut_stream(scope: Scope, receive: Receive, send: Send) -> None:
        session = session_of(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        session.add(Account(owner="sent"))
        await session.flush()
        await send({"type": "http.response.body", "body": b"sent", "more_body": True})
        session.add(Account(owner="not sent"))
        await session.flush()

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None: ...

    async with Database(database_url) as database:
        await database.create_tables(Account.metadata)
        app = DBSessionMiddleware(cut_stream, database, mode=transactional)
        await app({"type": "http", "method": "GET", "path": "/"}, receive, send)
        assert balances(database_url) == [("sent", 0)]


@pytest.mark.filterwarnings("ignore:Previous unbuffered result")  # as in production
def test_as_the_readme_says_a_cursor_that_outlives_a_chunk_is_an_error(
    run_readme: Run, database_url: str
) -> None:
    """On no database may the stream end early as if it were whole."""
    route = """
@app.get("/cursor")
async def cursor(session: CurrentSession) -> StreamingResponse:
    items = await session.stream_scalars(select(Order.item).execution_options(yield_per=100))
    return StreamingResponse(items)
"""
    with fragment(run_readme, "A failed COMMIT", route) as client:
        rows = ",".join(f"({i}, 'tea')" for i in range(1, 5001))
        sql(database_url, f"INSERT INTO orders (id, item) VALUES {rows}")
        response = client.get("/cursor")
        assert response.text == ""


def test_the_readme_names_everything_public() -> None:
    for name in asgi_db.__all__:
        assert re.search(rf"\b{name}\b", README), f"{name} is missing"


def test_the_readme_shows_the_pool_profiles_as_they_are() -> None:
    for name, profile in POOL_PROFILES.items():
        column = 2 + list(POOL_PROFILES).index(name)
        for option in fields(PoolProfile):
            value = getattr(profile, option.name)
            shown = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
            row = re.search(rf"^\| `{option.name}`.*$", README, re.MULTILINE)
            assert row and row[0].split("|")[column].strip() == shown, f"{name} {option.name}"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_every_make_target_and_file_that_is_named_exists(name: str) -> None:
    page, makefile = (ROOT / name).read_text(), (ROOT / "Makefile").read_text()
    targets = re.findall(r"`make ([\w-]+)", page)
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    for link in re.findall(r"\]\(([^)]+)\)", page):
        assert (ROOT / link).exists(), link


def test_every_example_and_every_block_of_the_readme_has_a_test() -> None:
    examples = {path.stem for path in EXAMPLES.glob("*.py")}
    assert examples | {f"README: {heading}" for heading in readme_blocks()} == COVERED
