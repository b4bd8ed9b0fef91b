"""The examples do what they show, on every database that they name."""

import os
import subprocess
import sys
from collections.abc import Callable, Generator
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from starlette.testclient import TestClient

from asgi_db import Database
from models import Account
from tests.servers import Row, assert_disconnected, run, sql

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
    nowhere = "postgresql://nowhere/nothing"
    process = python(EXAMPLES / "demo.py", DATABASE_URL=nowhere, DATABASE_REPLICA_URLS=nowhere)
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


# All of them


def test_every_example_has_a_test() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == COVERED
