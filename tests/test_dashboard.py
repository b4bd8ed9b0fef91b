"""The dashboard as a server sees it: who gets it, what it says, and what it never says."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import anyio
import pytest
from fastapi import FastAPI
from litestar import Litestar, asgi
from sqlalchemy import insert, select, text
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from asgi_db import ConfigurationError, Database, DBSessionMiddleware, transactional
from asgi_db.dashboard import Dashboard
from asgi_db.types import ASGIApp, Message, Receive, Scope, Send
from tests.internals import (
    MOST_ROWS,
    Markup,
    Tally,
    View,
    duration,
    percent,
    rate,
    seconds,
    steps,
    tag,
    top_of,
)
from tests.limits import set_limits
from tests.tables import Author, Base

SECRET = "Agnes-Grey-1847"
HERE = ("127.0.0.1", 51123)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A database with a table."""
    async with Database(database_url, pool="low", leak_threshold=60) as database:
        await database.create_tables(Base.metadata)
        yield database


async def get(
    app: ASGIApp,
    query: str = "",
    *,
    path: str = "/",
    method: str = "GET",
    client: tuple[str, int] | None = HERE,
    host: str = "localhost:8000",
    watch: Callable[[int], Awaitable[None]] | None = None,
    **headers: str,
) -> tuple[int, dict[str, str], str]:
    """Ask for the page, and return the status, the headers and the body.

    What watches is told the number of each message when it leaves.
    """
    fields = {"host": host, **{name.replace("_", "-"): v for name, v in headers.items()}}
    messages = list[Message]()

    async def receive() -> Message:
        await anyio.sleep_forever()

    async def send(message: Message) -> None:
        messages.append(message)
        if watch is not None:
            await watch(len(messages))

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "root_path": "",
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
        "client": client,
    }
    await app(scope, receive, send)
    start, *body = messages
    found = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], found, b"".join(m["body"] for m in body).decode()


def part(page: str, id: str) -> str:
    """A part of the page without its tags."""
    (found,) = re.findall(rf'<(?:dl|div)[^>]* ?id="{id}"[^>]*>(.*?)\n', page)
    return " ".join(re.sub(r"<[^>]*>", " ", found).split())


# -- who gets it -------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:80", "shop.localhost"])
async def test_without_allow_a_client_on_this_machine_is_let_in(
    sqlite_url: str, address: str, host: str
) -> None:
    dashboard = Dashboard(Database(sqlite_url))
    assert (await get(dashboard, client=(address, 1), host=host))[0] == 200


@pytest.mark.parametrize(
    "who",
    [
        {"client": ("192.0.2.7", 1)},
        {"client": ("::ffff:192.0.2.7", 1)},
        {"client": ("testclient", 1)},
        {"client": None},
        {"host": "rebound.example.org"},
        {"host": ""},
        {"x_forwarded_for": "192.0.2.7"},
        {"forwarded": "for=192.0.2.7"},
        {"x_real_ip": "192.0.2.7"},
        {"via": "1.1 proxy"},
    ],
    ids=str,
)
async def test_without_allow_everybody_else_is_refused_and_the_log_says_what_to_set(
    sqlite_url: str, who: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    dashboard = Dashboard(Database(sqlite_url))
    for _ in range(3):
        status, headers, body = await get(dashboard, **who)
        assert (status, body) == (403, "You may not see this page.\n")
        assert headers["cache-control"] == "no-store"
    lines = [record for record in caplog.records if record.name == "asgi_db"]
    assert len(lines) == 1 and "allow=" in lines[0].getMessage()


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
async def test_allow_decides_for_every_request(sqlite_url: str, is_async: bool) -> None:
    asked = list[Scope]()

    def sync_allow(scope: Scope) -> bool:
        asked.append(scope)
        return bool(scope["client"][0] == "192.0.2.7")

    async def async_allow(scope: Scope) -> bool:
        return sync_allow(scope)

    dashboard = Dashboard(Database(sqlite_url), allow=async_allow if is_async else sync_allow)
    assert (await get(dashboard, client=("192.0.2.7", 1)))[0] == 200
    assert (await get(dashboard, client=HERE))[0] == 403
    assert (await get(dashboard, client=HERE, accept="text/event-stream"))[0] == 403
    assert (await get(dashboard, client=HERE, method="POST"))[0] == 403
    assert len(asked) == 4 and all(scope["type"] == "http" for scope in asked)


async def test_an_error_of_allow_shows_nothing(sqlite_url: str) -> None:
    def fail(scope: Scope) -> bool:
        raise LookupError

    with pytest.raises(LookupError):
        await get(Dashboard(Database(sqlite_url), allow=fail))


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS"])
async def test_it_can_only_be_read(sqlite_url: str, method: str) -> None:
    status, headers, _ = await get(Dashboard(Database(sqlite_url)), method=method)
    assert (status, headers["allow"]) == (405, "GET")


async def test_there_is_one_page(sqlite_url: str) -> None:
    dashboard = Dashboard(Database(sqlite_url))
    assert (await get(dashboard, path="/app.js"))[0] == 404
    assert (await get(dashboard, path=""))[0] == 200


async def test_a_socket_is_closed_and_a_lifespan_is_none_of_its_business(sqlite_url: str) -> None:
    sent = list[Message]()

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    dashboard = Dashboard(Database(sqlite_url))
    await dashboard({"type": "websocket"}, receive, send)
    await dashboard({"type": "lifespan"}, receive, send)
    assert sent == [{"type": "websocket.close"}]


def test_what_cannot_work_is_said_at_once(sqlite_url: str) -> None:
    database, anything = Database(sqlite_url), cast(Any, "sqlite://")
    for databases, allow in (((), None), ((anything,), None), ((database,), anything)):
        with pytest.raises(ConfigurationError, match=r"Dashboard\(database"):
            Dashboard(*databases, allow=allow)


# -- the page ----------------------------------------------------------------------------------


async def test_nothing_is_loaded_from_elsewhere_and_nothing_runs_without_the_nonce(
    sqlite_url: str,
) -> None:
    dashboard = Dashboard(Database(sqlite_url))
    nonces = set[str]()
    for _ in range(2):
        _, headers, page = await get(dashboard)
        policy = dict(
            directive.strip().split(" ", 1)
            for directive in headers["content-security-policy"].split(";")
        )
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"]
        nonces.add(policy["script-src"])
        nonce = policy["script-src"].removeprefix("'nonce-").removesuffix("'")
        assert re.findall(r"<(?:script|style)([^>]*)>", page) == [f' nonce="{nonce}"'] * 2
        assert not re.search(r'\s(?:style|on\w+)="', page)
        assert not re.search(r"https?://|@import|url\(", page)
    assert len(nonces) == 2


async def test_without_a_request_the_page_is_whole_too() -> None:
    dashboard = Dashboard(Database("postgresql://app:secret@db.example.org/shop"))
    _, headers, page = await get(dashboard)
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert "<h1>db.example.org/shop</h1>" in page and "secret" not in page
    assert "No request has used the database yet." in page
    assert "No connection is out of the pool." in page


async def test_replicas_have_a_section_where_there_are_some() -> None:
    url = "postgresql://app:secret@db{}.example.org/shop"
    without = Database(url.format(1))
    database = Database(url.format(1), replicas=[url.format("2"), url.format("3")])
    _, _, page = await get(Dashboard(without))
    assert "replica" not in re.sub(r"<style.*?</style>", "", page, flags=re.DOTALL)
    _, _, page = await get(Dashboard(database))
    assert "secret" not in page
    table = part(page, "replicas")
    assert table.startswith(
        "Server Share of reads Units Behind Lag In use Idle db2.example.org/shop"
    )
    assert "db3.example.org/shop 0 % 0 0 – 0 0 Primary 0 % 0 – – 0 0" in table
    assert page.count('aria-labelledby="replicas-title"') == 2


async def test_the_page_says_what_has_happened(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limits(monkeypatch, slow=600)
    dashboard = Dashboard(database)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = type("Route", (), {"path": "/authors/{id}"})
        session = scope["state"]["db"]
        for number in range(6):
            await session.execute(select(Author.name).where(Author.id == number))
        await session.execute(text(f"SELECT '{SECRET}'"))
        raise LookupError(SECRET)

    with pytest.raises(LookupError):
        await get(DBSessionMiddleware(app, database, mode=transactional), path="/authors/7")
    async with database.session() as session:
        await session.execute(insert(Author).values(name=SECRET))
        _, _, page = await get(dashboard)
    assert SECRET not in page and "/authors/7" not in page
    assert part(page, "tiles").startswith("In use 1 of 15")
    assert "session" in part(page, "holders") and "INSERT INTO author" in part(page, "holders")
    assert "GET /authors/{id} 1" in part(page, "routes")
    units = part(page, "units")
    assert units.startswith("All 1 Failed 1 N+1 1")
    assert "error LookupError" in units and "SELECT ?" in units
    assert re.search(r"WHERE author.id = \S+ N\+1 6×", units)


async def test_what_an_application_names_its_routes_is_escaped(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    dashboard = Dashboard(database)
    tally = Tally()
    tally.outcome, tally.conflicts = "failed", 1
    database.statistics.unit_ended("GET /<script>alert('&\")</script>", "plain", tally)
    _, _, page = await get(dashboard)
    assert page.count("<script") == 1
    assert "GET /&lt;script&gt;alert(&#x27;&amp;&quot;)&lt;/script&gt;" in page


@pytest.mark.parametrize("order", ["ascending", "descending"])
async def test_routes_are_sorted_by_any_column(sqlite_url: str, order: str) -> None:
    database = Database(sqlite_url)
    dashboard = Dashboard(database)
    for number, name in enumerate("bca", 1):
        tally = Tally()
        tally.outcome, tally.statements, tally.connections = "committed", number, 1
        tally.held = tally.waited = tally.busy = number / 10
        for _ in range(number):
            database.statistics.unit_ended(f"GET /{name}", "transactional", tally)
    _, _, page = await get(dashboard)
    columns = re.findall(r'href="\?sort=(\w+)', page)
    assert len(set(columns)) == 15
    for column in ["route", "share", *columns]:
        _, _, page = await get(dashboard, f"sort={column}&order={order}")
        (state,) = re.findall(r'<th[^>]*class="c-(\w+)"[^>]*aria-sort="(\w+)"', page)
        assert state == (column, order)
        routes = re.findall(r"GET /(.)<", page.partition('id="routes"')[2].partition("<section")[0])
        expected = {"route": "abc", "failed": "abc", "retries": "abc"}.get(column, "bca")
        if column in ("failed", "retries"):
            assert sorted(routes) == list("abc")
        else:
            assert "".join(routes) == (expected if order == "ascending" else expected[::-1])


async def test_what_cannot_be_shown_is_ignored(sqlite_url: str) -> None:
    dashboard = Dashboard(Database(sqlite_url))
    query = "database=7&database=x&sort=<b>&order=<b>&kind=<b>&rows=<b>&process=%FF&" + "&a=1" * 9
    status, _, page = await get(dashboard, query)
    assert status == 200 and "<b>" not in page.partition("<main")[2].replace("<b>0</b>", "")
    assert View.of(b"sort=units", 1, frozenset({"units"})).link() == "?sort=units&order=descending"


async def test_long_tables_are_cut_until_all_is_asked_for(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    dashboard = Dashboard(database)
    tally = Tally()
    tally.outcome = "failed"
    for number in range(MOST_ROWS + 5):
        database.statistics.unit_ended(f"GET /{number}", "transactional", tally)
    _, _, page = await get(dashboard)
    assert page.count('scope="row"') == page.count("<details>") == MOST_ROWS
    assert page.count(f"Show all {MOST_ROWS + 5}") == 2
    _, _, page = await get(dashboard, "rows=all")
    assert page.count('scope="row"') == page.count("<details>") == MOST_ROWS + 5


async def test_several_databases_have_a_page_each(sqlite_url: str) -> None:
    other = Database("postgresql://app:secret@db.example.org/shop")
    dashboard = Dashboard(Database(sqlite_url), other)
    _, _, first = await get(dashboard)
    _, _, second = await get(dashboard, "database=1")
    assert "<h1>db.example.org/shop</h1>" in second and "<h1>db.example" not in first
    assert second.count('aria-current="page"') == 1


async def test_conflicts_are_shown_by_route(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    dashboard = Dashboard(database)
    for conflicts in 1, 3:
        tally = Tally()
        tally.outcome, tally.conflicts = "failed", conflicts
        database.statistics.unit_ended(f"POST /{conflicts} (order)", "transactional", tally)
        database.statistics.retried(f"POST /{conflicts} (order)")
    _, _, page = await get(dashboard)
    found = part(page, "conflicts")
    assert found == "POST /3 (order) 3 lost, 1 run again POST /1 (order) 1 lost, 1 run again"


# -- events ------------------------------------------------------------------------------------


def events(body: str) -> list[tuple[str, Any]]:
    """The events of an answer, each with its data."""
    return [
        (fields["event"], json.loads(fields["data"]))
        for block in body.strip().split("\n\n")
        for fields in [dict(line.split(": ", 1) for line in block.split("\n"))]
    ]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events follow each other a hundred times as fast."""
    monkeypatch.setattr("asgi_db.dashboard.application.INTERVAL", 0.01)
    monkeypatch.setattr("asgi_db.dashboard.application.STREAM", 0.5)


@pytest.mark.usefixtures("fast")
async def test_each_event_has_the_parts_that_have_changed(database: Database) -> None:
    dashboard = Dashboard(database)

    async def work(number: int) -> None:
        if number == 2:  # after the first event
            async with database.session() as session:
                await session.execute(text("SELECT 1"))

    _, headers, body = await get(dashboard, accept="text/event-stream", watch=work)
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    found = events(body)
    assert {name for name, _ in found} == {"parts"} and 2 <= len(found)
    first, *others = (parts for _, parts in found)
    assert set(first) == {"tiles", "pool", "load", "holders", "routes", "units", "conflicts"}
    assert "conflicts" not in {name for parts in others for name in parts}
    assert "replicas" not in {name for parts in others for name in parts}
    assert "async with database.session()" in "".join(p.get("routes", "") for p in others)


@pytest.mark.usefixtures("fast")
async def test_events_hold_no_connection(database: Database) -> None:
    await get(Dashboard(database), accept="text/event-stream")
    assert database.stats().pool.checked_out == 0


@pytest.mark.usefixtures("fast")
async def test_a_page_of_another_process_is_told_so(sqlite_url: str) -> None:
    dashboard = Dashboard(Database(sqlite_url))
    _, _, page = await get(dashboard)
    (process,) = re.findall(r'data-process="([^"]+)"', page)
    _, _, body = await get(dashboard, f"process={process}", accept="text/event-stream")
    assert events(body)[0][0] == "parts"
    _, headers, body = await get(dashboard, "process=1-a", accept="text/event-stream")
    assert body.count("event: stranger") == 1 and "parts" not in body
    assert headers["connection"] == "close"


async def test_events_end_when_the_client_goes(sqlite_url: str) -> None:
    dashboard = Dashboard(Database(sqlite_url))
    gone = asyncio.Event()
    sent = list[Message]()

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)
        if len(sent) == 2:
            gone.set()

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/",
        "headers": [(b"host", b"localhost"), (b"accept", b"text/event-stream")],
        "client": HERE,
    }
    with anyio.fail_after(0.9):  # before the second event
        await dashboard(scope, receive, send)
    assert len(sent) == 2


# -- where it is mounted -----------------------------------------------------------------------


def fastapi_app(dashboard: Dashboard) -> Any:
    app = FastAPI()
    app.mount("/db", dashboard)
    return app


def starlette_app(dashboard: Dashboard) -> Any:
    return Starlette(routes=[Mount("/db", dashboard)])


def litestar_app(dashboard: Dashboard) -> Any:
    @asgi("/db", is_mount=True, copy_scope=True)
    async def page(scope: Scope, receive: Receive, send: Send) -> None:
        await dashboard(scope, receive, send)

    return Litestar([page])


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("make", [fastapi_app, starlette_app, litestar_app])
@pytest.mark.parametrize("is_wrapped", [False, True], ids=["alone", "in the middleware"])
def test_it_can_be_mounted(
    sqlite_url: str, make: Callable[[Dashboard], Any], is_wrapped: bool
) -> None:
    database = Database(sqlite_url)
    app = make(Dashboard(database))
    if is_wrapped:
        app = DBSessionMiddleware(app, database)
    client = TestClient(app, base_url="http://localhost", client=HERE)
    for path in "/db", "/db/":
        answer = client.get(path)
        assert answer.status_code == 200 and "<h1>" in answer.text
    answer = client.get("/db/", headers={"accept": "text/event-stream"})
    assert answer.text.count("event: parts") >= 2
    assert client.get("/db/other").status_code == 404
    assert client.post("/db/").status_code == 405


# -- how things are written --------------------------------------------------------------------


def test_a_part_is_escaped_unless_it_is_html_already() -> None:
    made = tag("p", "<&", tag("b", "x"), None, False, 0, class_="a", data_key='"', hidden=True)
    assert made == '<p class="a" data-key="&quot;" hidden>&lt;&amp;<b>x</b>0</p>'
    assert isinstance(made, Markup)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, "–"),
        (0.0, "0 ms"),
        (0.00042, "0.42 ms"),
        (0.0042, "4.2 ms"),
        (0.042, "42 ms"),
        (0.42, "420 ms"),
        (0.9996, "1.0 s"),
        (4.24, "4.2 s"),
        (42.4, "42 s"),
        (250.0, "4 min"),
    ],
)
def test_times_have_two_digits(value: float | None, written: str) -> None:
    assert seconds(value) == written


def test_other_numbers_are_short() -> None:
    assert [duration(s) for s in (9, 3600, 7500, 180000, 172800)] == [
        "9 s",
        "1 h",
        "2 h 5 min",
        "2 d 2 h",
        "2 d",
    ]
    assert [percent(part) for part in (0.0, 0.004, 0.12, 1.0)] == ["0 %", "0.4 %", "12 %", "100 %"]
    assert [rate(value) for value in (0.42, 12.4, 1234.0)] == ["0.4", "12", "1,234"]


def test_a_plot_has_a_round_scale_and_no_line_at_zero() -> None:
    assert [top_of([n]) for n in (0, 3, 5, 10, 11, 27, 130)] == [4, 4, 5, 10, 12, 30, 160]
    assert steps([0, 0, 5, 5, 0, 10], 10) == "M200 100V50H400V100M500 100V0H600V100"
    assert steps([], 10) == ""
