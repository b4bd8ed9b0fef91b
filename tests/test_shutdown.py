"""Start and stop of real servers: what they answer, what they keep, and what stays behind."""

import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from sqlalchemy import make_url

from tests.servers import DatabaseServer, assert_disconnected, postgresql, run
from tests.serving import (
    GRANIAN,
    GRANIAN_WITHOUT_LIFESPAN,
    GUNICORN,
    GUNICORN_UVICORN,
    HYPERCORN,
    PAIRS,
    UVICORN,
    UVICORN_WITHOUT_LIFESPAN,
    Answer,
    Databases,
    Program,
    Server,
    databases,
    run_program,
    serve,
    start,
)

CREATED = Answer(201, b"created")
BOUND = 30.0
"""Seconds in which every server has ended."""


def each(*programs: Program) -> pytest.MarkDecorator:
    """Run a test with each of these servers."""
    return pytest.mark.parametrize("program", programs, ids=lambda program: program.name)


@pytest.fixture(scope="module")
def two_databases(
    postgresql_server: DatabaseServer, mysql_server: DatabaseServer
) -> Iterator[Databases]:
    """A database of each kind, for all tests to save time."""
    with databases(postgresql_server, mysql_server) as both:
        yield both


@pytest.fixture
def both(two_databases: Databases) -> Databases:
    """A database of each kind, with empty tables."""
    assert_nobody_is_connected(two_databases)
    for name in two_databases.urls:
        two_databases.execute(name, "DELETE FROM author")
    return two_databases


def assert_nobody_is_connected(databases: Databases) -> None:
    """Whoever has ended is gone on the server too."""
    for url in databases.urls.values():
        run(assert_disconnected(url))


# -- under load --------------------------------------------------------------------------------


def write(server: Server, path: str) -> Answer:
    """One writer: a request, and then the server closes the connection."""
    with server.client() as client:
        answer = client.request("POST", path)
        assert client.rest() == b""
        return answer


@each(UVICORN, HYPERCORN, GRANIAN, GUNICORN_UVICORN)
def test_a_server_that_is_told_to_end_under_load_answers_whatever_it_has_begun(
    program: Program, both: Databases, tmp_path: Path
) -> None:
    """50 writers; the application's own lifespan writes before the first and after the last."""
    variables = {**both.variables, "POOL_TIMEOUT": "20", "LIFESPAN_WRITES": "yes"}
    paths = [f"/{name}/queries/{PAIRS + number}/0.2" for name in both.urls for number in range(25)]
    with serve(program, tmp_path, program.graceful_limit(10), **variables) as server:
        with ThreadPoolExecutor(len(paths)) as threads:
            answers = threads.map(partial(write, server), paths)
            server.wait_until(lambda: server.state()["begun"] == len(paths))
            assert server.stop(BOUND) in program.ends
            assert_nobody_is_connected(both)
            assert list(answers) == [CREATED] * len(paths)
        assert "Traceback" not in server.log
    for name in both.urls:
        assert both.pairs(name) == list(range(PAIRS, PAIRS + 25))
        rows = both.execute(name, "SELECT name FROM author WHERE name LIKE 'at %' ORDER BY id")
        assert rows == [("at startup",), ("at shutdown",)]


# -- while a query hangs -----------------------------------------------------------------------


# From Python 3.12 on hypercorn itself waits for ever: it awaits `Server.wait_closed()`, which there
# waits for open connections, before it looks at its graceful timeout.
CANCELLING = (UVICORN, HYPERCORN) if sys.version_info < (3, 12) else (UVICORN,)


@each(*CANCELLING)
def test_a_server_that_is_told_to_end_while_queries_hang_ends_them_too(
    program: Program, both: Databases, tmp_path: Path
) -> None:
    """It cancels the requests, and then the lifespan waits for their clean-up."""
    with serve(program, tmp_path, program.graceful_limit(1), **both.variables) as server:
        with ExitStack() as clients:
            for name in both.urls:
                client = clients.enter_context(server.client())
                client.send("POST", f"/{name}/queries/{PAIRS}/60")
            server.wait_until(lambda: all(both.clients(name) == ["active"] for name in both.urls))
            assert server.stop(BOUND) in program.ends
            assert_nobody_is_connected(both)
    assert [both.pairs(name) for name in both.urls] == [[], []]


@each(UVICORN_WITHOUT_LIFESPAN, GRANIAN)
def test_a_query_on_postgresql_does_not_outlive_a_process_that_just_dies(
    program: Program, both: Databases, tmp_path: Path
) -> None:
    """These servers kill what does not end in time. MariaDB could not be told to look after it."""
    with serve(program, tmp_path, program.graceful_limit(1), **both.variables) as server:
        with server.client() as client:
            assert client.request("POST", "/mysql/authors/1") == CREATED
            client.send("POST", f"/postgresql/queries/{PAIRS}/60")
            server.wait_until(lambda: both.clients("postgresql") == ["active"])
            assert both.clients("mysql") == ["idle"]
            assert server.stop(BOUND) in program.ends
            assert_nobody_is_connected(both)
    assert both.pairs("postgresql") == []


# -- workers -----------------------------------------------------------------------------------


def use_each_worker(server: Server, both: Databases) -> None:
    """Write and read until both workers have served, each on both databases."""
    used: set[int] = set()
    ids = count(1)

    def has_used_both() -> bool:
        with server.client() as client:  # whichever worker takes it keeps the connection
            for name in both.urls:
                id = next(ids)
                assert client.request("POST", f"/{name}/authors/{id}") == CREATED
                path = f"/{name}/authors/{id}"
                assert client.request("GET", path) == Answer(200, b"author %d" % id)
            used.add(json.loads(client.request("GET", "/state").body)["process"])
        return len(used) == 2

    server.wait_until(has_used_both)


@each(UVICORN, GRANIAN_WITHOUT_LIFESPAN)
def test_workers_which_use_their_database_while_they_import_the_application(
    program: Program, both: Databases, tmp_path: Path
) -> None:
    """On a loop of its own, which is closed without a word. One server has no lifespan at all."""
    variables = {**both.variables, "AT_IMPORT": "keep"}
    with serve(program, tmp_path, "--workers=2", **variables) as server:
        use_each_worker(server, both)
        server.stop(BOUND)
        assert_nobody_is_connected(both)
    assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("program", "at_import"),
    [(GUNICORN, "dispose"), (GUNICORN_UVICORN, "keep")],
    ids=lambda value: getattr(value, "name", value),
)
def test_workers_which_are_forked_after_their_parent_has_used_the_database(
    program: Program, at_import: str, both: Databases, tmp_path: Path
) -> None:
    """They leave the connections of the parent alone."""
    variables = {**both.variables, "AT_IMPORT": at_import}
    with serve(program, tmp_path, "--preload", "--workers=2", **variables) as server:
        of_parent = {name: both.client_ids(name) for name in both.urls}
        assert [len(ids) for ids in of_parent.values()] == [at_import == "keep"] * 2
        use_each_worker(server, both)
        for name, ids in of_parent.items():
            assert ids <= both.client_ids(name)
        assert server.stop(BOUND) in program.ends
        assert_nobody_is_connected(both)
    assert "Traceback" not in server.log


@pytest.fixture(params=["postgresql", "mysql", "file", "memory"])
def forking_url(request: pytest.FixtureRequest) -> str:
    """Each database, with that of SQLite which is in memory."""
    if request.param == "memory":
        return "sqlite://"
    name = {"file": "sqlite"}.get(request.param, request.param)
    url: str = request.getfixturevalue(f"{name}_url")
    return url


def test_a_process_that_is_forked_leaves_the_connections_of_its_parent_alone(
    forking_url: str, tmp_path: Path
) -> None:
    """Whatever the child does with the database, and however it ends."""
    ended = run_program("from tests.forking import main; main()", forking_url, folder=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")
    run(assert_disconnected(forking_url))


# -- start -------------------------------------------------------------------------------------


@each(UVICORN, GRANIAN)
def test_a_server_whose_database_does_not_come_up_ends_with_one_clear_line(
    program: Program, both: Databases, tmp_path: Path
) -> None:
    missing = make_url(both.urls["postgresql"]).set(database="missing", password="c0rrect-h0rse")
    variables = {**both.variables, "POSTGRESQL_URL": missing.render_as_string(hide_password=False)}
    with start(program, tmp_path, **variables, WAIT_FOR="0.3") as server:
        assert server.process.wait(BOUND) != 0
        assert_nobody_is_connected(both)
    lines = [line for line in server.log.splitlines() if "could not be started" in line]
    assert len(lines) == 1 and 'database "missing" does not exist' in lines[0]
    assert "c0rrect-h0rse" not in server.log


def test_a_server_waits_for_a_database_that_comes_up_later(tmp_path: Path) -> None:
    """One line for each try, and then it serves."""
    with postgresql(own=True) as database_server, databases(database_server) as late:
        database_server.stop()
        with start(UVICORN, tmp_path, **late.variables, WAIT_FOR="60") as server:
            server.wait_until(lambda: server.log.count("is not there yet") >= 3)
            assert not re.search(UVICORN.serving, server.log)
            database_server.start()
            server.wait_until_it_serves()
            with server.client() as client:
                assert client.request("POST", "/postgresql/authors/1") == CREATED
            assert server.stop(BOUND) in UVICORN.ends
            assert_nobody_is_connected(late)
        tries = [line for line in server.log.splitlines() if "is not there yet" in line]
        assert all(re.search(r"\(.+\); trying for \d+\.\d s more$", line) for line in tries)
        assert "Traceback" not in server.log
