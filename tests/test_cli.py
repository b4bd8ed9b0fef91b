"""The command line, `asgi-db`, as a shell runs it, against real servers."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
from click.testing import CliRunner
from sqlalchemy import text
from sqlalchemy.engine import make_url

from asgi_db import Database
from tests import servers
from tests.internals import PINGS, cli, file_system
from tests.pgbouncer import pgbouncer, through
from tests.relay import Fate, Relay, once
from tests.servers import DatabaseServer, assert_disconnected, run, sql

COMMAND = Path(sys.executable).with_name("asgi-db")
SECRET = "s3cr3t"


def environment(**variables: str) -> dict[str, str]:
    """This one, without what says where a database is."""
    others = {name: value for name, value in os.environ.items() if "DATABASE" not in name}
    return others | variables


def shell(
    *arguments: str, folder: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command with no terminal; the password of a URL may not be seen anywhere."""
    done = subprocess.run(
        [COMMAND, *arguments],
        cwd=folder,
        env=environment(**variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert SECRET not in done.stdout + done.stderr
    return done


def asgi_db(
    *arguments: str, folder: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command as `shell` does, but in this process: a new one takes seconds to begin."""
    without = {name: None for name in os.environ if name not in environment()}
    path, modules = sys.path[:], set(sys.modules)
    try:
        with chdir(folder or "."):
            done = CliRunner().invoke(cli, arguments, env={**without, **variables})
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if name.partition(".")[0] == "store":  # the next test has another one
                del sys.modules[name]
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise AssertionError(done.stderr) from done.exception
    assert SECRET not in done.stdout + done.stderr
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def with_password(url: str, password: str) -> str:
    return make_url(url).set(password=password).render_as_string(hide_password=False)


def assert_found(output: str, severity: str, problem: str, remedy: str) -> None:
    """The remedy stands in the line below the finding."""
    pattern = f"^{severity}: .*{re.escape(problem)}.*\n    .*{re.escape(remedy)}"
    assert re.search(pattern, output, re.MULTILINE), f"{severity}: {problem} / {remedy}\n{output}"


# -- check -------------------------------------------------------------------------------------


def test_check_says_what_and_where_the_database_is(database_url: str) -> None:
    run(_create(database_url))
    done = shell("check", DATABASE_URL=database_url)
    assert done.returncode == 0, done.stderr
    url = make_url(database_url)
    assert re.search(rf"^database +{re.escape(url.drivername)}://.*{url.database}", done.stdout)
    assert re.search(r"^versions +\w+ [\d.]+, SQLAlchemy 2\.[\d.]+, Python 3", done.stdout, re.M)
    assert re.search(r"^server +(PostgreSQL|MariaDB|SQLite) \d+\.\d+", done.stdout, re.M)
    assert re.search(r"^round trip +\d+\.\d+ ms", done.stdout, re.M)
    assert re.search(r"^0 errors, \d warnings?, \d notes?$", done.stdout, re.M)
    run(assert_disconnected(database_url))


async def _create(url: str) -> None:
    async with Database(url) as database, database.session() as session:
        await session.execute(text("SELECT 1"))


SETTINGS_OF_POSTGRESQL = [
    ("synchronous_commit", "off", "warning", "synchronous_commit is off", "ALTER SYSTEM SET"),
    (
        "default_transaction_isolation",
        "serializable",
        "note",
        "default_transaction_isolation is serializable",
        "transactional(isolation=...)",
    ),
    ("default_transaction_read_only", "on", "warning", "read-only", "the primary server"),
    (
        "idle_in_transaction_session_timeout",
        "0",
        "note",
        "idle_in_transaction_session_timeout is off",
        "ALTER ROLE",
    ),
    ("statement_timeout", "0", "note", "statement_timeout is off", "timeout= of the modes"),
]
HARMLESS = {
    "synchronous_commit": "on",
    "default_transaction_isolation": "'read committed'",
    "default_transaction_read_only": "off",
    "idle_in_transaction_session_timeout": "'60s'",
    "statement_timeout": "'30s'",
}


def set_for_database(url: str, settings: dict[str, str]) -> None:
    name = make_url(url).database
    sql(url, *(f"ALTER DATABASE {name} SET {key} = {value}" for key, value in settings.items()))


def test_check_finds_the_settings_of_postgresql_that_matter(postgresql_url: str) -> None:
    set_for_database(postgresql_url, {name: value for name, value, *_ in SETTINGS_OF_POSTGRESQL})
    done = asgi_db("check", "--url", postgresql_url)
    assert done.returncode == 0
    for _, _, severity, problem, remedy in SETTINGS_OF_POSTGRESQL:
        assert_found(done.stdout, severity, problem, remedy)


def findings_of(told: str) -> list[str]:
    """What check has found, apart from a slow round trip, as a busy machine has."""
    findings = re.findall(r"^(?:error|warning|note): .*$", told, re.MULTILINE)
    return [finding for finding in findings if "A round trip takes" not in finding]


def test_check_finds_nothing_in_the_settings_of_postgresql_that_are_well(
    postgresql_url: str,
) -> None:
    set_for_database(postgresql_url, HARMLESS)
    done = asgi_db("check", "--url", postgresql_url)
    findings = findings_of(done.stdout)
    assert [finding for finding in findings if "fsync" not in finding] == []  # as the tests have it
    assert re.search("^statement_timeout +30s$", done.stdout, re.MULTILINE)


def test_check_finds_a_database_that_cannot_hold_all_characters(
    postgresql_server: DatabaseServer,
) -> None:
    url = make_url(postgresql_server.url).set(database=f"test_{uuid4().hex[:12]}")
    options = "ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
    sql(postgresql_server.url, f"CREATE DATABASE {url.database} {options}")
    try:
        done = asgi_db("check", "--url", url.render_as_string(hide_password=False))
        assert_found(done.stdout, "warning", "server_encoding is SQL_ASCII", "ENCODING 'UTF8'")
    finally:
        sql(postgresql_server.url, f"DROP DATABASE {url.database} WITH (FORCE)")


@pytest.fixture
def limited_url(postgresql_url: str) -> Iterator[str]:
    """The database for a user who may have 20 connections."""
    user = f"limited_{uuid4().hex[:8]}"
    sql(postgresql_url, f"CREATE ROLE {user} LOGIN PASSWORD '{SECRET}' CONNECTION LIMIT 20")
    try:
        url = make_url(postgresql_url).set(username=user)
        yield with_password(url.render_as_string(), SECRET)
    finally:
        sql(postgresql_url, f"DROP ROLE {user}")


def test_more_connections_than_the_server_allows_are_an_error(limited_url: str) -> None:
    done = asgi_db("check", "--url", limited_url, "--pool", "low", "--processes", "2")
    assert done.returncode == 1
    problem = '2 processes with pool="low" may open 30 connections, and the server allows 20'
    assert_found(done.stdout, "error", problem, "fewer processes")
    done = asgi_db("check", "--url", limited_url, "--pool", "low")
    assert done.returncode == 0
    assert re.search(r"^connections +up to 15 for 1 process .*, of 20 ", done.stdout, re.MULTILINE)


def fact(output: str, name: str) -> str:
    """What the report says under this name."""
    found = re.search(rf"^{re.escape(name)}  +(.*)$", output, re.MULTILINE)
    assert found, output
    return found[1]


def test_check_says_how_much_of_the_pools_a_load_uses_and_what_waits(limited_url: str) -> None:
    load = ("--pool", "low", "--hold", "0.1", "--rate")
    done = asgi_db("check", "--url", limited_url, *load, "100")
    assert done.returncode == 0, done.stdout
    assert fact(done.stdout, "load, the pool") == (
        "100 requests/s use 67 % of each pool (10 of 15); full at 150"
    )
    assert fact(done.stdout, "wait, the pool") == (
        "10 % of the requests wait, 2.04 ms in the mean;"
        " 19 connections in each pool keep it below 1.0 %"
    )
    problem = "The pool makes 10 % of the requests wait for a connection, 2.04 ms in the mean"
    assert_found(done.stdout, "warning", problem, "19 connections in each pool, 19 at the server")

    done = asgi_db("check", "--url", limited_url, *load, "50")
    assert done.returncode == 0
    assert "0 % of the requests wait" in fact(done.stdout, "wait, the pool")
    assert "requests wait for a connection" not in done.stdout

    done = asgi_db("check", "--url", limited_url, *load, "150")
    assert done.returncode == 1
    problem = "The pool is full at 150 requests/s, and gets 150: requests wait ever longer"
    assert_found(done.stdout, "error", problem, "session.release()")
    assert fact(done.stdout, "wait, the pool") == "ever longer"


def test_two_processes_share_a_load_but_not_their_connections(postgresql_url: str) -> None:
    load = ("--pool", "low", "--hold", "0.1", "--rate", "200", "--processes", "2")
    done = asgi_db("check", "--url", postgresql_url, *load)
    assert "200 requests/s use 67 % of each pool (10 of 15); full at 300" in done.stdout
    assert_found(done.stdout, "warning", "The pool makes 10 %", "in each pool, 38 at the server")


REPLICAS = f"postgresql://app:{SECRET}@pg2/shop postgresql://app:{SECRET}@pg3/shop"


def test_check_says_how_many_connections_each_server_has_to_admit(postgresql_url: str) -> None:
    check = ("check", "--url", postgresql_url, "--pool", "low", "--processes", "2")
    place = f"127.0.0.1:{make_url(postgresql_url).port}"
    done = asgi_db(*check, DATABASE_REPLICA_URLS=REPLICAS)
    assert fact(done.stdout, "each server") == f"up to 30 at {place}, 30 at pg2, 30 at pg3"
    assert fact(done.stdout, "all servers") == "up to 90, with 2 replicas"
    # The primary may be listed as a replica too: after a failover one server is both.
    done = asgi_db(*check, DATABASE_REPLICA_URLS=f"{REPLICAS} postgresql://app@{place}/shop")
    assert fact(done.stdout, "each server").startswith(f"up to 60 at {place}, 30 at pg2")
    expected = 'up to 60 for 2 processes with pool="low" and 2 pools each, of '
    assert fact(done.stdout, "connections").startswith(expected)
    assert "each server" not in asgi_db(*check).stdout


def test_check_divides_the_load_among_the_primary_and_its_replicas(postgresql_url: str) -> None:
    load = ("--pool", "low", "--hold", "0.1", "--rate", "200", "--reads", "0.9")
    url = ("--url", postgresql_url)
    done = asgi_db("check", *url, *load, DATABASE_REPLICA_URLS=REPLICAS)
    assert done.returncode == 0, done.stdout
    assert fact(done.stdout, "load, the primary").startswith("20 requests/s use 13 % of each pool")
    assert fact(done.stdout, "load, each replica").startswith("90 requests/s use 60 % of each pool")
    assert fact(done.stdout, "load, the primary alone").startswith("200 requests/s use 133 %")
    problem = "While no replica serves, the primary is full at 150 requests/s, and gets 200"
    assert_found(done.stdout, "warning", problem, "32 connections in each pool")
    assert "primary alone" not in asgi_db("check", *url, *load[:-2]).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "10"], "--rate needs --hold"),
        (["--hold", "0.1"], "--hold needs --rate"),
        (["--reads", "0.5"], "--reads needs --rate and --hold"),
        (["--rate", "0", "--hold", "1"], "--rate"),
        (["--rate", "nan", "--hold", "1"], "--rate"),
        (["--rate", "10", "--hold", "inf"], "--hold"),
        (["--rate", "10", "--hold", "-1"], "--hold"),
        (["--rate", "10", "--hold", "0.1", "--reads", "1.5"], "--reads"),
        (["--rate", "10", "--hold", "0.1", "--reads", "nan"], "--reads"),
        (["--rate", "10", "--hold", "0.1", "--reads", "1"], "DATABASE_REPLICA_URLS names none"),
        (["--rate", "5000", "--hold", "30"], "--rate times --hold is 150,000 connections"),
    ],
)
def test_a_load_that_cannot_be_is_an_error_that_names_the_option(
    arguments: list[str], message: str
) -> None:
    done = asgi_db("check", "--url", f"postgresql://app:{SECRET}@127.0.0.1:1/shop", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""


def test_a_load_on_sqlite_and_a_wrong_replica_are_errors_too() -> None:
    load = ("--rate", "10", "--hold", "0.1")
    assert (
        "one transaction writes at a time" in asgi_db("check", "--url", "sqlite://", *load).stderr
    )
    done = asgi_db("check", "--url", "sqlite://", DATABASE_REPLICA_URLS="oracle://app@db/shop")
    assert done.returncode == 1
    assert 'DATABASE_REPLICA_URLS names the unknown database "oracle"' in done.stderr


def test_check_notices_a_pooler_and_works_through_it(
    postgresql_server: DatabaseServer, postgresql_url: str
) -> None:
    with pgbouncer(postgresql_server.url, pool_size=2) as port:
        for _ in range(2):  # a statement that the first had prepared would be there
            done = asgi_db("check", "--url", through(port, postgresql_url), "--processes", "99")
            assert done.returncode == 0, done.stdout
            assert_found(done.stdout, "warning", "pooler", 'Database(..., pooler="transaction")')
            assert_found(done.stdout, "note", "client_connection_check_interval", "ALTER SYSTEM")


@pytest.fixture(scope="module")
def own_postgresql() -> Iterator[DatabaseServer]:
    """A server of this file, which its tests may stop."""
    with servers.postgresql(own=True) as server:
        yield server


@pytest.fixture(scope="module")
def own_mariadb() -> Iterator[DatabaseServer]:
    """The same, whose settings the tests may change."""
    with servers.mariadb(own=True) as server:
        yield server


@pytest.fixture(params=["postgresql", "mariadb"])
def own_server(request: pytest.FixtureRequest) -> DatabaseServer:
    """Each in turn."""
    server: DatabaseServer = request.getfixturevalue(f"own_{request.param}")
    return server


def test_a_connection_across_a_network_that_is_not_encrypted_is_a_warning(
    own_server: DatabaseServer,
) -> None:
    assert "not encrypted" not in asgi_db("check", "--url", own_server.url).stdout
    # Another way to write 127.0.0.1, which does not look like this machine.
    done = asgi_db("check", "--url", own_server.url.replace("127.0.0.1", "2130706433"))
    assert_found(done.stdout, "warning", "2130706433 is not encrypted", "ssl")


SETTINGS_OF_MYSQL = [
    ("wait_timeout", "600", "warning", "wait_timeout is 600 s", "pool_recycle"),
    (
        "innodb_lock_wait_timeout",
        "50",
        "note",
        "innodb_lock_wait_timeout is 50 s",
        "SET GLOBAL innodb_lock_wait_timeout",
    ),
    (
        "innodb_flush_log_at_trx_commit",
        "0",
        "warning",
        "innodb_flush_log_at_trx_commit is 0",
        "SET GLOBAL innodb_flush_log_at_trx_commit = 1",
    ),
    ("sql_mode", "''", "warning", "sql_mode is not strict", "STRICT_TRANS_TABLES"),
    ("default_storage_engine", "MyISAM", "warning", "is MyISAM", "= InnoDB"),
    ("tx_isolation", "'SERIALIZABLE'", "note", "isolation is SERIALIZABLE", "isolation=..."),
    ("read_only", "ON", "warning", "read_only is on", "the primary server"),
    ("max_connections", "25", "error", "the server allows 25", "raise max_connections"),
]


def test_check_finds_the_settings_of_mariadb_that_matter(own_mariadb: DatabaseServer) -> None:
    with own_mariadb.fresh_database() as url:
        name = make_url(url).database
        sql(url, f"ALTER DATABASE {name} CHARACTER SET latin1")
        sql(url, *(f"SET GLOBAL {name} = {value}" for name, value, *_ in SETTINGS_OF_MYSQL))
        done = asgi_db("check", "--url", f"{url}?charset=latin1")
        assert done.returncode == 1
        for _, _, severity, problem, remedy in SETTINGS_OF_MYSQL:
            assert_found(done.stdout, severity, problem, remedy)
        for setting in ("character_set_database", "character_set_connection"):
            assert_found(done.stdout, "warning", f"{setting} is latin1", "utf8mb4")
        sql(url, "SET GLOBAL read_only = OFF", "SET GLOBAL tx_isolation = 'READ-UNCOMMITTED'")
        done = asgi_db("check", "--url", url)
        assert_found(done.stdout, "warning", "READ-UNCOMMITTED", "REPEATABLE READ")
    own_mariadb.restart()  # and nothing of it is left


def test_check_finds_nothing_in_a_mariadb_that_is_set_up_well(own_mariadb: DatabaseServer) -> None:
    with own_mariadb.fresh_database() as url:
        sql(
            url,
            f"ALTER DATABASE {make_url(url).database} CHARACTER SET utf8mb4",
            "SET GLOBAL innodb_flush_log_at_trx_commit = 1",
            "SET GLOBAL innodb_lock_wait_timeout = 10",
        )
        done = asgi_db("check", "--url", url)
        assert done.returncode == 0
        assert findings_of(done.stdout) == []


# -- check on SQLite ---------------------------------------------------------------------------


def test_check_leaves_an_sqlite_file_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "a file #1.db"
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE old (id INTEGER)")
    connection.close()
    before = file.read_bytes()
    done = asgi_db("check", DATABASE_TYPE="sqlite", DATABASE_SCHEMA=str(file))
    assert done.returncode == 0
    assert_found(done.stdout, "note", "journal_mode is delete", "Nothing to do")
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == [file.name]


def test_check_makes_no_sqlite_file(tmp_path: Path) -> None:
    done = shell("check", folder=tmp_path)
    assert done.returncode == 0
    assert "app.db (does not exist yet" in done.stdout
    assert "Set DATABASE_URL" in done.stderr
    assert os.listdir(tmp_path) == []


def test_check_finds_nothing_on_a_file_of_asgi_db_and_tells_its_settings_truly(
    sqlite_url: str,
) -> None:
    async def settings() -> list[object]:
        async with Database(sqlite_url) as database, database.session() as session:
            names = ("journal_mode", "foreign_keys", "busy_timeout")
            return [await session.scalar(text(f"PRAGMA {name}")) for name in names]

    assert run(settings()) == ["wal", 1, 30_000]
    done = asgi_db("check", "--url", sqlite_url)
    assert findings_of(done.stdout) == []
    assert re.search("^journal_mode +wal$", done.stdout, re.MULTILINE)
    assert re.search("^foreign_keys +ON, ", done.stdout, re.MULTILINE)
    assert re.search("^busy_timeout +30 s, ", done.stdout, re.MULTILINE)
    done = asgi_db("check", "--url", f"{sqlite_url}?timeout=2")
    assert re.search("^busy_timeout +2 s, ", done.stdout, re.MULTILINE)


def test_a_place_where_sqlite_cannot_work_is_an_error(tmp_path: Path) -> None:
    done = asgi_db("check", "--url", f"sqlite:///{tmp_path}/nowhere/app.db")
    assert done.returncode == 1
    assert_found(done.stdout, "error", "nowhere does not exist", f"mkdir -p {tmp_path}/nowhere")
    done = asgi_db("check", "--url", f"sqlite:///{tmp_path}")
    assert done.returncode == 1
    assert_found(done.stdout, "error", f"{tmp_path} is not a file", "another file")
    (tmp_path / "letter.db").write_text("Dear Anna, this is no database but a letter." * 99)
    done = asgi_db("check", "--url", f"sqlite:///{tmp_path}/letter.db")
    assert done.returncode == 1
    assert_found(done.stdout, "error", "file is not a database", "Check that the file")


AS_NOBODY = """
import os, sys
from sqlalchemy import make_url
from asgi_db.cli.report import Plan, Report
from asgi_db.cli.check import PINGS
from asgi_db.cli.sqlite import check_file
from asgi_db.profiles import PoolProfile
if os.geteuid() == 0:  # who may write everywhere
    os.setuid(65534)
report = Report()
check_file(report, Plan(make_url(sys.argv[1]), "medium", PoolProfile(), 1))
for found in report.findings:
    print(f"{found.severity.value}: {found.problem}\\n    {found.remedy}")
"""
"""Not the command itself: nobody may load what it needs where Python is a superuser's own."""


def test_an_sqlite_file_that_cannot_be_written_is_an_error() -> None:
    with servers.temporary_folder() as folder:
        file = folder / "app.db"
        sqlite3.connect(file).close()
        file.touch()
        file.chmod(0o444)
        folder.chmod(0o555)
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, f"sqlite:///{file}"],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert_found(done.stdout, "error", f"The file {file} cannot be written", "chown")
    assert_found(done.stdout, "error", f"The folder {folder} cannot be written", "chown")


def test_a_database_in_memory_is_a_note() -> None:
    done = asgi_db("check", "--url", "sqlite://")
    assert done.returncode == 0
    assert_found(done.stdout, "note", "in memory", "Name a file")


def test_the_file_system_of_a_folder_is_that_of_the_nearest_mount(tmp_path: Path) -> None:
    mounts = ["/dev/vda / ext4 rw 0 0", f"server:/data {tmp_path}/the\\040data nfs4 rw 0 0"]
    (tmp_path / "the data" / "app").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "the data")
    assert file_system(tmp_path / "the data" / "app", mounts) == "nfs4"
    assert file_system(tmp_path / "link", mounts) == "nfs4"
    assert file_system(tmp_path, mounts) == "ext4"
    assert file_system(tmp_path, []) is None


# -- check, where there is no database ---------------------------------------------------------


@pytest.mark.parametrize("scheme", ["postgresql", "mysql"])
@pytest.mark.parametrize(
    ("place", "remedy"),
    [
        ("127.0.0.1:1", "Nobody listens at 127.0.0.1, port 1"),
        ("nowhere.invalid", "The host nowhere.invalid is not known"),
    ],
)
def test_a_server_that_cannot_be_reached_is_an_error(scheme: str, place: str, remedy: str) -> None:
    done = asgi_db("check", DATABASE_URL=f"{scheme}://app:{SECRET}@{place}/shop")
    assert done.returncode == 1
    assert_found(done.stdout, "error", "The database cannot be used", remedy)


@pytest.mark.parametrize("backend", ["postgresql", "mysql"])
def test_a_database_that_is_not_there_is_an_error(
    request: pytest.FixtureRequest, backend: str
) -> None:
    url = make_url(request.getfixturevalue(f"{backend}_url")).set(database="nowhere")
    done = asgi_db("check", "--url", url.render_as_string(hide_password=False))
    assert done.returncode == 1
    assert_found(done.stdout, "error", "nowhere", "CREATE DATABASE")


def test_a_wrong_password_is_an_error_that_does_not_show_it(mysql_url: str) -> None:
    done = asgi_db("check", "--url", with_password(mysql_url, SECRET))
    assert done.returncode == 1
    assert_found(done.stdout, "error", "Access denied", "Correct the user and the password")


@pytest.mark.parametrize("backend", ["postgresql", "mysql"])
async def test_a_slow_network_is_a_note_and_a_round_trip_is_counted_as_one(
    request: pytest.FixtureRequest, backend: str
) -> None:
    async with Relay(request.getfixturevalue(f"{backend}_url")) as relay:
        relay.delay = 0.005
        done = await asyncio.to_thread(asgi_db, "check", "--url", relay.url)
    assert done.returncode == 0, done.stderr
    assert_found(done.stdout, "note", "A round trip takes", "near its database")
    assert PINGS < relay.round_trips < 2 * PINGS


@pytest.mark.parametrize("backend", ["postgresql", "mysql"])
async def test_a_connection_that_is_lost_in_the_middle_is_an_error(
    request: pytest.FixtureRequest, backend: str
) -> None:
    async with Relay(request.getfixturevalue(f"{backend}_url")) as relay:
        words = b"pg_settings" if backend == "postgresql" else b"SHOW VARIABLES"
        relay.fate_of = once(words, Fate.LOST)
        done = await asyncio.to_thread(asgi_db, "check", "--url", relay.url)
    assert relay.faults == 1
    assert done.returncode == 1
    assert_found(done.stdout, "error", "The database cannot be used", "the log of the server")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("backend", ["postgresql", "mysql"])
@pytest.mark.parametrize("option", ["nonsense", "ssl"])
def test_an_option_of_the_url_that_the_driver_does_not_take_is_an_error(
    request: pytest.FixtureRequest, backend: str, option: str
) -> None:
    url = make_url(request.getfixturevalue(f"{backend}_url")).update_query_dict({option: "1x"})
    done = asgi_db("check", "--url", url.render_as_string(hide_password=False))
    assert done.returncode == 1
    assert f"Error: The database URL has {option}=, which" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("wait", "--timeout", "1"),
        ("create-tables", "store.tables:Base"),
        ("drop-tables", "store.tables:Base", "--yes"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_such_an_option_is_an_error_of_the_other_commands_too(
    folder: Path, arguments: tuple[str, ...]
) -> None:
    url = f"postgresql://app:{SECRET}@127.0.0.1:1/shop?nonsense=1"
    done = asgi_db(*arguments, folder=folder, DATABASE_URL=url)
    assert done.returncode == 1
    assert "nonsense" in done.stderr
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stderr


@pytest.mark.timing
def test_a_server_that_takes_a_connection_and_never_answers_is_an_error_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        done = asgi_db("check", "--url", f"mysql://127.0.0.1:{silent.getsockname()[1]}/shop")
    assert time.monotonic() - started < 30
    assert done.returncode == 1
    assert_found(done.stdout, "error", "TimeoutError", "No answer from 127.0.0.1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--url", f"oracle://app:{SECRET}@db/shop"], 'the unknown database "oracle"'),
        (["wait", "--url", f"postgresql://app:{SECRET}@db@x/shop"], 'an "@" too many'),
        (["wait", "--timeout", "0"], "--timeout"),
        (["check", "--processes", "0"], "--processes"),
        (["check", "--pool", "huge"], "--pool"),
        (["create-tables"], "MODULE:BASE"),
    ],
)
def test_a_mistake_in_the_arguments_is_named(arguments: list[str], message: str) -> None:
    done = asgi_db(*arguments)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


# -- wait --------------------------------------------------------------------------------------


def test_wait_ends_well_when_the_database_is_there(database_url: str) -> None:
    done = asgi_db("wait", DATABASE_URL=database_url)
    assert done.returncode == 0, done.stderr
    assert re.search(r" answers, after \d+\.\d s\.$", done.stdout)


def test_wait_waits_for_a_server_that_comes_up_later(own_server: DatabaseServer) -> None:
    own_server.stop()
    with subprocess.Popen(
        [COMMAND, "wait", "--timeout", "60", "--url", own_server.url],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as waiting:
        assert waiting.stderr is not None and waiting.stdout is not None
        assert "is not there yet" in waiting.stderr.readline()
        own_server.start()
        assert " answers, after " in waiting.stdout.read()
    assert waiting.returncode == 0


def test_wait_gives_up_in_time() -> None:
    url = f"postgresql://app:{SECRET}@127.0.0.1:1/shop"
    done = shell("wait", "--timeout", "0.5", DATABASE_URL=url)
    assert done.returncode == 1
    assert "did not come up within 0.5 s" in done.stderr
    assert "Traceback" not in done.stderr


# -- tables ------------------------------------------------------------------------------------

TABLES = """
from sqlalchemy import ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

class Base(DeclarativeBase):
    pass

class Line(Base):
    __tablename__ = "order_lines"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id"))

class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)

class Empty(DeclarativeBase):
    pass

metadata = Base.metadata
number = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with a module of tables, in a package."""
    folder = tmp_path / "project"
    (folder / "store").mkdir(parents=True)
    (folder / "store" / "tables.py").write_text(TABLES)
    return folder


def test_tables_are_created_and_dropped(folder: Path, database_url: str) -> None:
    def command(*arguments: str) -> str:
        done = asgi_db(*arguments, "store.tables:Base", folder=folder, DATABASE_URL=database_url)
        assert done.returncode == 0, done.stderr
        assert str(make_url(database_url).database) in done.stdout
        return done.stdout

    assert "created: orders, order_lines" in command("create-tables")
    sql(database_url, "INSERT INTO orders (id) VALUES (1)", "DROP TABLE order_lines")
    again = command("create-tables")
    assert "created: order_lines" in again and "left as they are: orders" in again
    assert sql(database_url, "SELECT id FROM orders") == [(1,)]

    assert "tables: orders, order_lines" in command("drop-tables", "--yes")
    assert "none of the tables" in command("drop-tables", "--yes")
    sql(database_url, "CREATE TABLE orders (id INTEGER)")
    run(assert_disconnected(database_url))


@pytest.mark.parametrize("name", ["metadata", "Base.metadata"])
def test_the_tables_may_be_named_by_their_metadata(
    folder: Path, sqlite_url: str, name: str
) -> None:
    tables = f"store.tables:{name}"
    done = shell("create-tables", tables, folder=folder, DATABASE_URL=sqlite_url)
    assert "created: orders, order_lines" in done.stdout
    assert has_tables(sqlite_url)


@pytest.fixture
def with_tables(folder: Path, sqlite_url: str) -> str:
    """The URL of a database with the tables."""
    asgi_db("create-tables", "store.tables:Base", folder=folder, DATABASE_URL=sqlite_url)
    assert sql(sqlite_url, "SELECT * FROM orders") == []
    return sqlite_url


def has_tables(url: str) -> bool:
    return bool(sql(url, "SELECT 1 FROM sqlite_master WHERE name = 'orders'"))


def test_without_a_terminal_nothing_is_dropped_unless_yes_is_said(
    folder: Path, with_tables: str
) -> None:
    done = shell("drop-tables", "store.tables:Base", folder=folder, DATABASE_URL=with_tables)
    assert done.returncode == 1
    assert "--yes" in done.stderr
    assert has_tables(with_tables)


@contextmanager
def asked(folder: Path, url: str) -> Generator[tuple[subprocess.Popen[str], int]]:
    """`drop-tables` at a terminal, and the other end of the terminal."""
    ours, theirs = pty.openpty()
    try:
        with subprocess.Popen(
            [COMMAND, "drop-tables", "store.tables:Base"],
            cwd=folder,
            env=environment(DATABASE_URL=url),
            stdin=theirs,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            yield process, ours
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize(("answer", "is_dropped"), [("y", True), ("n", False), ("", False)])
def test_at_a_terminal_drop_tables_asks_and_names_the_database_and_the_tables(
    folder: Path, with_tables: str, answer: str, is_dropped: bool
) -> None:
    with asked(folder, with_tables) as (process, terminal):
        os.write(terminal, f"{answer}\n".encode())
        assert process.stdout is not None
        question = process.stdout.read()
        assert str(make_url(with_tables).database) in question
        assert "orders, order_lines" in question and "[y/N]" in question
    assert process.returncode == (0 if is_dropped else 1)
    assert has_tables(with_tables) is not is_dropped


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ("store.tables", "does not say where the tables are. Write module:Base"),
        ("store.tables:", "does not say where the tables are"),
        ("store.nothing:Base", "There is no module 'store.nothing' in"),
        ("nothing.tables:Base", "There is no module 'nothing' in"),
        ("store.tables:Nothing", "there is no 'Nothing' in it"),
        ("store.tables:number", "neither a MetaData nor a declarative base, but int"),
        ("store.tables:Empty", "has no tables"),
    ],
)
def test_tables_that_cannot_be_found_are_named(folder: Path, tables: str, message: str) -> None:
    done = asgi_db("create-tables", tables, folder=folder, DATABASE_URL="sqlite://")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_mistake_in_the_module_of_the_tables_is_shown_where_it_is(folder: Path) -> None:
    (folder / "broken.py").write_text("import not_installed\n")
    done = shell("create-tables", "broken:Base", folder=folder, DATABASE_URL="sqlite://")
    assert done.returncode == 1
    assert "import not_installed" in done.stderr
    assert "No module named 'not_installed'" in done.stderr


@pytest.mark.parametrize("arguments", [("create-tables",), ("drop-tables", "--yes")])
def test_tables_of_a_server_that_cannot_be_reached_are_an_error(
    folder: Path, arguments: tuple[str, ...]
) -> None:
    url = f"postgresql://app:{SECRET}@127.0.0.1:1/shop"
    done = asgi_db(*arguments, "store.tables:Base", folder=folder, DATABASE_URL=url)
    assert done.returncode == 1
    assert "ConnectionRefusedError" in done.stderr
    assert "Traceback" not in done.stderr


# -- the program itself ------------------------------------------------------------------------


def test_the_command_says_its_version_and_its_commands() -> None:
    assert re.search(r"\d+\.\d+\.\d+", shell("--version").stdout)
    commands = shell("--help").stdout
    for name in ("check", "wait", "create-tables", "drop-tables"):
        assert name in commands


def test_without_click_the_command_names_the_extra_to_install() -> None:
    program = "import sys; sys.modules['click'] = None; from asgi_db.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert 'pip install "asgi-db[cli]"' in done.stderr
    assert "Traceback" not in done.stderr
