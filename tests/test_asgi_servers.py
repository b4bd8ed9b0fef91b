"""Over real HTTP, where the point is in the server: a client that goes leaves nothing behind."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count

import pytest

from tests.served_app import LOCKED, POOL_SIZE
from tests.servers import DatabaseServer, assert_idle, outside, run
from tests.serving import (
    GRANIAN,
    GUNICORN,
    HYPERCORN,
    PAIRS,
    UVICORN,
    Answer,
    Client,
    Databases,
    Server,
    databases,
    serve,
    slow_reader,
)

CREATED = Answer(201, b"created")

each_database = pytest.mark.parametrize("database", ["postgresql", "mysql"])


@dataclass(frozen=True)
class Site:
    """A server which serves the application, with its databases."""

    server: Server
    databases: Databases
    _ids: Iterator[int]

    def id(self) -> int:
        """A number which no test has used."""
        return next(self._ids)

    def wait_until_its_requests_have_ended(self) -> None:
        """Wait until the application has nothing to do, clean-up included."""
        self.server.wait_until(lambda: self.server.state()["requests"] == 0)

    def wait_until_the_whole_pool_is(self, state: str, database: str) -> None:
        """Wait until the database sees all connections of the pool in this state."""
        self.server.wait_until(lambda: self.databases.clients(database).count(state) == POOL_SIZE)

    def assert_nothing_is_held(self, database: str) -> None:
        """Look at the server, at the pool, and then use all of it."""
        run(assert_idle(self.databases.urls[database]))
        state = self.server.state()
        assert (state["requests"], state["checked_out"]) == (0, 0)
        with ThreadPoolExecutor(POOL_SIZE) as clients:
            paths = [f"/{database}/together"] * POOL_SIZE
            assert list(clients.map(self._status, paths)) == [200] * POOL_SIZE
        with self.server.client() as client:
            for id in (self.id() for _ in range(10)):
                path = f"/{database}/authors/{id}"
                assert client.request("POST", path) == CREATED
                assert client.request("GET", path) == Answer(200, b"author %d" % id)
                assert client.request("GET", path) == Answer(200, b"author %d" % id)

    def _status(self, path: str) -> int:
        with self.server.client() as client:
            return client.request("GET", path).status


@pytest.fixture(
    scope="module", params=[UVICORN, HYPERCORN, GRANIAN, GUNICORN], ids=lambda program: program.name
)
def site(
    request: pytest.FixtureRequest,
    postgresql_server: DatabaseServer,
    mysql_server: DatabaseServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    """Each server in turn, with the application on two databases."""
    folder = tmp_path_factory.mktemp("server")
    with databases(postgresql_server, mysql_server) as both:
        for name in both.urls:
            both.execute(name, f"INSERT INTO author (id, name) VALUES ({LOCKED}, 'locked')")
        with serve(request.param, folder, **both.variables) as server:
            yield Site(server, both, count(1))


# -- clients which go in the middle ------------------------------------------------------------


@each_database
def test_a_client_that_goes_while_its_request_waits(site: Site, database: str) -> None:
    """The server cancels the request, or tells it so and lets it run to its end."""
    ids = [PAIRS + site.id() for _ in range(POOL_SIZE)]
    before = site.databases.pairs(database)
    with ExitStack() as leaving:
        for id in ids:
            client = leaving.enter_context(site.server.client())
            client.send("POST", f"/{database}/until-gone/{id}")
        site.wait_until_the_whole_pool_is("idle in transaction", database)
    site.wait_until_its_requests_have_ended()
    site.assert_nothing_is_held(database)
    written = [] if site.server.program.cancels else ids
    assert site.databases.pairs(database) == before + written


@each_database
def test_a_client_that_goes_while_its_query_runs(site: Site, database: str) -> None:
    """A query whose request is cancelled does not stay on the database's server."""
    ids = [PAIRS + site.id() for _ in range(POOL_SIZE)]
    before = site.databases.pairs(database)

    async def lock_and_leave() -> None:
        async with outside(site.databases.urls[database]) as other:
            await other.execute("BEGIN")
            await other.execute(f"SELECT id FROM author WHERE id = {LOCKED} FOR UPDATE")
            with ExitStack() as leaving:
                for id in ids:
                    client = leaving.enter_context(site.server.client())
                    client.send("POST", f"/{database}/locks/{id}")
                site.wait_until_the_whole_pool_is("active", database)
            if site.server.program.cancels:
                site.wait_until_its_requests_have_ended()
                deadline = time.monotonic() + 1
                while "active" in site.databases.clients(database):
                    assert time.monotonic() < deadline
            await other.execute("ROLLBACK")

    run(lock_and_leave())
    site.wait_until_its_requests_have_ended()
    site.assert_nothing_is_held(database)
    written = [] if site.server.program.cancels else ids
    assert site.databases.pairs(database) == before + written


@each_database
def test_a_client_that_goes_in_the_middle_of_a_stream_that_queries(
    site: Site, database: str
) -> None:
    """What was committed before its piece was sent stays, and all of it."""
    sent: list[int] = []
    with ExitStack() as leaving:
        for _ in range(POOL_SIZE):
            client = leaving.enter_context(site.server.client())
            client.send("GET", f"/{database}/streams/0")
            assert client.status() == 200
            sent.append(int(client.first_chunk()))
            sent.append(int(client.next_chunk()))
    site.wait_until_its_requests_have_ended()
    site.assert_nothing_is_held(database)
    assert set(sent) <= set(site.databases.pairs(database))


@each_database
def test_a_client_that_goes_while_the_query_of_a_stream_runs(site: Site, database: str) -> None:
    before = site.databases.pairs(database)
    with ExitStack() as leaving:
        for _ in range(POOL_SIZE):
            client = leaving.enter_context(site.server.client())
            client.send("GET", f"/{database}/streams/60")
        site.wait_until_the_whole_pool_is("active", database)
    site.wait_until_its_requests_have_ended()
    site.assert_nothing_is_held(database)
    assert site.databases.pairs(database) == before


@each_database
def test_a_client_that_goes_between_two_server_sent_events(site: Site, database: str) -> None:
    with ExitStack() as leaving:
        for _ in range(2 * POOL_SIZE):  # more than the pool has: waiting holds none
            client = leaving.enter_context(site.server.client())
            client.send("GET", f"/{database}/events")
            assert client.status() == 200
            assert client.first_chunk() == b"data: read\n\n"
        assert site.server.state()["checked_out"] == 0
    site.wait_until_its_requests_have_ended()
    site.assert_nothing_is_held(database)


# -- the contract, where the server has a part in it -------------------------------------------


@pytest.mark.timing
def test_a_request_is_served_at_once_beside_20_slow_readers_on_a_pool_of_5(site: Site) -> None:
    with ExitStack() as stack:
        readers = [
            stack.enter_context(slow_reader(site.server.port, "/postgresql/download"))
            for _ in range(20)
        ]
        site.server.wait_until(lambda: site.server.state()["streams"] == 20)
        path = f"/postgresql/authors/{site.id()}"
        with site.server.client() as client:
            assert client.request("POST", path) == CREATED
            assert client.request("GET", path).status == 200
        assert (site.server.state()["streams"], site.server.state()["checked_out"]) == (20, 0)
        clients = site.databases.clients("postgresql")
        assert 1 <= len(clients) <= POOL_SIZE
        assert set(clients) == {"idle"}
        readers[0].settimeout(20)
        received = 0
        while received < 5_000_000:
            received += len(readers[0].recv(65_536))
    site.wait_until_its_requests_have_ended()  # the other readers have gone in the middle
    site.assert_nothing_is_held("postgresql")


@each_database
def test_more_slow_uploads_than_the_pool_has_connections_leave_it_to_the_others(
    site: Site, database: str
) -> None:
    """Each has read before it waits for its body."""
    ids = [site.id() for _ in range(2 * POOL_SIZE)]
    with ExitStack() as stack:
        clients = [stack.enter_context(site.server.client()) for _ in ids]
        for id, client in zip(ids, clients, strict=True):
            client.send("POST", f"/{database}/uploads/{id}", "Content-Length: 20")
            client.send_body(b"author ")
        site.server.wait_until(lambda: site.server.state()["uploads"] == len(ids))
        site.server.wait_until(lambda: site.server.state()["checked_out"] == 0)
        run(assert_idle(site.databases.urls[database]))
        with site.server.client() as other:
            assert other.request("POST", f"/{database}/authors/{site.id()}") == CREATED
        for id, client in zip(ids, clients, strict=True):
            client.send_body(b"%13d" % id)
            assert client.status() == 201
            assert client.body() == b"created"
    for id in ids:
        sql = f"SELECT name FROM author WHERE id = {id}"
        assert site.databases.execute(database, sql) == [(f"author {id:13}",)]
    site.wait_until_its_requests_have_ended()
    site.assert_nothing_is_held(database)


def test_a_failed_commit_leaves_the_keep_alive_connection_in_order(site: Site) -> None:
    """Exactly one answer to each request: one byte more or less would break the next one."""
    children = site.databases.execute("postgresql", "SELECT count(*) FROM child")
    log = len(site.server.log)
    with site.server.client() as client:
        for _ in range(3):
            assert client.request("POST", "/postgresql/children") == Answer(409, b"conflict")
            for id in (site.id() for _ in range(10)):
                path = f"/postgresql/authors/{id}"
                assert client.request("POST", path) == CREATED
                assert client.request("GET", path) == Answer(200, b"author %d" % id)
        assert client.request("GET", "/state", "Connection: close").status == 200
        assert client.rest() == b""
    assert "Traceback" not in site.server.log[log:]
    assert site.server.log[log:].count("COMMIT failed") == 3
    assert site.databases.execute("postgresql", "SELECT count(*) FROM child") == children
    site.assert_nothing_is_held("postgresql")


@pytest.mark.parametrize("where", ["statement", "commit"])
def test_what_a_request_that_failed_leaves_behind_is_nothing(site: Site, where: str) -> None:
    for _ in range(20):
        with site.server.client() as client:  # some servers close it after an error
            assert client.request("POST", f"/postgresql/fails/{where}").status == 500
    site.wait_until_its_requests_have_ended()

    def nothing_is_left() -> bool:
        with site.server.client() as client:
            return int(client.request("GET", "/left").body) == 0

    # The timer of a keep-alive connection holds the last request on it for some seconds.
    site.server.wait_until(nothing_is_left)


@each_database
def test_who_got_the_status_line_of_a_write_finds_the_row_at_once(
    site: Site, database: str
) -> None:
    """60 writes, each read again on another connection before its body has come."""

    def write_and_read(paths: list[str]) -> list[int]:
        found: list[int] = []
        with site.server.client() as writing, site.server.client() as reading:
            for path in paths:
                writing.send("POST", path)
                assert writing.status() == 201
                found.append(reading.request("GET", path).status)
                writing.body()
        return found

    work = [[f"/{database}/authors/{site.id()}" for _ in range(20)] for _ in range(3)]
    with ThreadPoolExecutor(3) as clients:
        assert list(clients.map(write_and_read, work)) == [[200] * 20] * 3


def assert_unavailable(client: Client, method: str, path: str, reason: str) -> None:
    """The answer is a 503 which says when to come again, and why."""
    answer = client.request(method, path)
    assert (answer.status, client.headers["content-type"]) == (503, "application/problem+json")
    assert int(client.headers["retry-after"]) >= 1
    problem = json.loads(answer.body)
    assert (problem["status"], problem["reason"]) == (503, reason)


def test_a_database_that_is_down_is_a_503_and_the_connection_stays_in_order(site: Site) -> None:
    with site.server.client() as client:
        for _ in range(3):
            assert_unavailable(client, "GET", "/nowhere/authors/1", "down")
            assert client.request("GET", "/state").status == 200


@each_database
def test_an_exhausted_pool_is_a_503_until_the_first_connection_is_free(
    site: Site, database: str
) -> None:
    with ExitStack() as leaving, site.server.client() as client:
        for _ in range(POOL_SIZE):
            other = leaving.enter_context(site.server.client())
            other.send("POST", f"/{database}/until-gone/{PAIRS + site.id()}")
        site.server.wait_until(lambda: site.server.state()["checked_out"] == POOL_SIZE)
        assert_unavailable(client, "POST", f"/{database}/authors/{site.id()}", "busy")
        assert client.request("GET", "/state").status == 200
        leaving.close()
        site.wait_until_its_requests_have_ended()
        assert client.request("POST", f"/{database}/authors/{site.id()}") == CREATED
    site.assert_nothing_is_held(database)
