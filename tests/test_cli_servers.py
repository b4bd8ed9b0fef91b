"""`asgi-db check` where there is more than one server: which was reached, and what follows it."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from uuid import uuid4

import pytest
from sqlalchemy.engine import make_url

from tests import servers
from tests.clusters import Cluster, GtidReplica, Urls
from tests.limits import set_limits
from tests.pgbouncer import pgbouncer, through
from tests.programs import GALERA
from tests.servers import sql
from tests.test_cli import asgi_db, assert_found, fact, with_password


def place(url: str) -> str:
    return f"127.0.0.1:{make_url(url).port}"


def of_hosts(*urls: str, driver: str = "asyncpg", attributes: str = "") -> str:
    """The first URL, with the hosts of all of them."""
    first = make_url(urls[0]).set(drivername=f"postgresql+{driver}")
    whole = first.render_as_string(hide_password=False)
    return whole.replace(place(urls[0]), ",".join(map(place, urls))) + attributes


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_check_names_the_host_that_it_has_reached(postgresql_urls: Urls, driver: str) -> None:
    refusing = f"postgresql://app@127.0.0.1:{servers.free_port()}/shop"
    hosts = (postgresql_urls.prompt, refusing, postgresql_urls.primary)
    url = of_hosts(*hosts, driver=driver, attributes="?target_session_attrs=primary")
    done = asgi_db("check", "--url", url)
    assert done.returncode == 0, done.stdout
    assert fact(done.stdout, "host") == f"{place(postgresql_urls.primary)}, of 3 in the URL"
    assert fact(done.stdout, "role") == "primary, followed by 2 standbys"
    assert "several hosts" not in done.stdout
    assert fact(asgi_db("check", "--url", postgresql_urls.primary).stdout, "host") == place(
        postgresql_urls.primary
    )


def test_check_says_that_a_server_is_a_standby(postgresql_urls: Urls) -> None:
    done = asgi_db("check", "--url", postgresql_urls.prompt)
    assert fact(done.stdout, "role") == "standby"
    assert_found(done.stdout, "warning", "The server is a standby", "the primary server")


def test_several_hosts_that_may_all_be_written_to_are_a_warning(postgresql_urls: Urls) -> None:
    url = of_hosts(postgresql_urls.prompt, postgresql_urls.primary)
    done = asgi_db("check", "--url", url)
    assert fact(done.stdout, "role") == "standby"
    assert_found(done.stdout, "warning", "The URL names several", "target_session_attrs=primary")


def test_none_of_several_hosts_that_is_there_is_an_error_which_names_them() -> None:
    ports = [servers.free_port(), servers.free_port()]
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    done = asgi_db("check", "--url", f"postgresql://app@{hosts}/shop")
    assert done.returncode == 1
    assert_found(done.stdout, "error", f"127.0.0.1:{ports[0]}: ", f"Nobody listens at {hosts}")


def test_the_host_of_an_unencrypted_connection_is_named(postgresql_url: str) -> None:
    # Another way to write 127.0.0.1, which does not look like this machine.
    port = make_url(postgresql_url).port
    hosts = f"127.0.0.1:{servers.free_port()},2130706433:{port}"
    done = asgi_db("check", "--url", postgresql_url.replace(f"127.0.0.1:{port}", hosts))
    assert_found(done.stdout, "warning", "2130706433 is not encrypted", "sslmode")


# -- what a failover loses -----------------------------------------------------------------------

LOSES = "a failover loses the last writes of which clients were told"


@contextmanager
def changed(server: servers.DatabaseServer, name: str, value: str) -> Generator[None]:
    """Another value of a PostgreSQL server's setting, for a while."""
    sql(server.url, f"ALTER SYSTEM SET {name} = '{value}'", "SELECT pg_reload_conf()")
    try:
        yield
    finally:
        sql(server.url, f"ALTER SYSTEM RESET {name}", "SELECT pg_reload_conf()")


def test_commits_that_wait_for_no_standby_are_a_note(
    postgresql_urls: Urls, postgresql_cluster: Cluster
) -> None:
    primary = postgresql_cluster.primary
    done = asgi_db("check", "--url", postgresql_urls.primary)
    assert_found(done.stdout, "note", "synchronous_standby_names is empty", "'ANY 1 (*)'")
    assert LOSES in done.stdout
    with changed(primary, "synchronous_standby_names", "ANY 1 (*)"):
        waiting = asgi_db("check", "--url", postgresql_urls.primary)
        assert LOSES not in waiting.stdout
        local = f"{postgresql_urls.primary}?options=-csynchronous_commit%3Dlocal"
        done = asgi_db("check", "--url", local)
        assert_found(done.stdout, "note", "synchronous_commit is local", "ALTER SYSTEM")


def test_a_server_that_nobody_follows_loses_nothing_in_a_failover(postgresql_url: str) -> None:
    done = asgi_db("check", "--url", postgresql_url)
    assert fact(done.stdout, "role") == "primary"
    assert LOSES not in done.stdout


def test_commits_of_mariadb_that_wait_for_no_replica_are_a_note(
    mysql_urls: Urls, mysql_cluster: Cluster
) -> None:
    done = asgi_db("check", "--url", mysql_urls.primary)
    assert fact(done.stdout, "role") == "primary, followed by 1 replica"
    assert_found(done.stdout, "note", "its commits wait for none", "rpl_semi_sync_master_enabled")
    assert LOSES in done.stdout
    sql(mysql_cluster.primary.url, "SET GLOBAL rpl_semi_sync_master_enabled = 1")
    try:
        assert LOSES not in asgi_db("check", "--url", mysql_urls.primary).stdout
    finally:
        sql(mysql_cluster.primary.url, "SET GLOBAL rpl_semi_sync_master_enabled = 0")
    done = asgi_db("check", "--url", mysql_urls.late)
    assert fact(done.stdout, "role") == "replica"
    assert_found(done.stdout, "warning", "read_only is on", "the primary server")


# -- the replicas --------------------------------------------------------------------------------


def check(primary: str, *replicas: str) -> tuple[int, str]:
    done = asgi_db("check", "--url", primary, DATABASE_REPLICA_URLS=" ".join(replicas))
    return done.returncode, done.stdout


def findings_of_replicas(output: str) -> list[str]:
    return re.findall(r"^(?:error|warning|note): .*(?:replica |primary ).*$", output, re.MULTILINE)


def test_check_says_how_each_replica_stands(urls: Urls) -> None:
    code, output = check(urls.primary, *urls.replicas, urls.primary)
    assert code == 0, output
    for url in urls.replicas:
        assert re.fullmatch(r"has everything after \d+ ms", fact(output, f"replica {place(url)}"))
    primary = f"replica {place(urls.primary)}"
    assert fact(output, primary) == "the primary itself, at the moment"
    assert [each for each in findings_of_replicas(output) if "may take over" not in each] == []


@pytest.mark.timing
def test_a_replica_that_does_not_catch_up_is_a_warning(
    cluster: Cluster, urls: Urls, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limits(monkeypatch, most_lag=1)
    cluster.late.pause()
    sql(urls.primary, "CREATE TABLE late (id INTEGER PRIMARY KEY)")
    code, output = check(urls.primary, urls.late)
    assert code == 0, output
    assert fact(output, f"replica {place(urls.late)}") == "more than 1 s late"
    assert_found(output, "warning", "has not caught up with the primary within 1 s", "its log")


def test_a_replica_that_is_cut_off_is_a_warning(cluster: Cluster, urls: Urls) -> None:
    cluster.late.detach()
    try:
        code, output = check(urls.primary, urls.late)
    finally:
        cluster.late.follow(cluster.primary)
    assert code == 0, output
    assert_found(output, "warning", "is not connected to a primary", "SHOW REPLICA STATUS")


def test_a_server_of_another_system_is_an_error(
    cluster: Cluster, urls: Urls, request: pytest.FixtureRequest
) -> None:
    backend = make_url(urls.primary).get_backend_name()
    other: servers.DatabaseServer = request.getfixturevalue(f"{backend}_server")
    name = make_url(urls.primary).database
    sql(other.url, f"CREATE DATABASE {name}")
    try:
        url = make_url(other.url).set(database=name).render_as_string(hide_password=False)
        code, output = check(urls.primary, url)
    finally:
        sql(other.url, f"DROP DATABASE {name}")
    assert code == 1, output
    assert_found(output, "error", "nothing of what the primary has written", "Correct the URL")


def test_another_database_of_the_same_server_is_an_error(cluster: Cluster, urls: Urls) -> None:
    with cluster.fresh_database() as others:
        code, output = check(urls.primary, others.late)
    assert code == 1, output
    assert_found(output, "error", "leads to another database", "the same database in both")


def test_a_replica_that_cannot_be_reached_is_a_warning(urls: Urls) -> None:
    nobody = make_url(urls.late).set(port=servers.free_port())
    code, output = check(urls.primary, nobody.render_as_string(hide_password=False))
    assert code == 0, output
    assert fact(output, f"replica 127.0.0.1:{nobody.port}") == "cannot be reached"
    assert_found(output, "warning", f"The replica 127.0.0.1:{nobody.port}/", "the primary serve")


def test_a_replica_that_refuses_the_settings_is_an_error(urls: Urls) -> None:
    missing = make_url(urls.late).set(database=f"missing_{uuid4().hex[:8]}")
    code, output = check(urls.primary, with_password(str(missing), "password"))
    assert code == 1, output
    assert_found(output, "error", "cannot be used", "the same database")


def test_a_replica_of_mariadb_that_takes_writes_is_a_warning(
    mysql_cluster: Cluster, mysql_urls: Urls
) -> None:
    server = mysql_cluster.late.server
    assert isinstance(mysql_cluster.late, GtidReplica)
    sql(server.url, "SET GLOBAL read_only = 0")
    try:
        code, output = check(mysql_urls.primary, mysql_urls.late)
        assert code == 0
        assert_found(output, "warning", "takes writes", "SET GLOBAL read_only = 1")
        sql(server.url, "STOP SLAVE")
        code, output = check(mysql_urls.primary, mysql_urls.late)
        assert_found(output, "warning", "is no replica, or not any more", "follow the primary")
    finally:
        sql(server.url, "SET GLOBAL read_only = 1", "START SLAVE")


def test_more_connections_than_a_replica_allows_are_an_error(urls: Urls) -> None:
    check = ("check", "--pool", "high", "--processes", "9")
    told = asgi_db(*check, DATABASE_URL=urls.primary, DATABASE_REPLICA_URLS=urls.late).stdout
    problem = f"{make_url(urls.late).database} gets up to 540 connections, and allows "
    assert_found(told, "error", problem, "raise max_connections there")


def test_check_looks_at_replicas_through_poolers(postgresql_urls: Urls) -> None:
    urls = postgresql_urls
    check = ("check", "--pool", "high", "--processes", "9")
    with pgbouncer(urls.late, pool_size=2) as port:
        replica = through(port, urls.late)
        for _ in range(2):  # a statement that the first had prepared would be there
            done = asgi_db(*check, DATABASE_URL=urls.primary, DATABASE_REPLICA_URLS=replica)
            assert "has everything after" in fact(done.stdout, f"replica {place(replica)}")
            assert "gets up to" not in done.stdout


# -- Galera --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def galera_node() -> Iterator[servers.DatabaseServer]:
    """A Galera cluster of one node."""
    assert not GALERA.missing, GALERA.advice
    user, group = servers.unique_user(), servers.free_port()
    with servers.temporary_folder() as folder:
        servers.make_mariadb(folder, user)
        with servers.running_mariadb(
            folder,
            user,
            "--wsrep-on=ON",
            f"--wsrep-provider={GALERA.library}",
            f"--wsrep-provider-options=gmcast.listen_addr=tcp://127.0.0.1:{group};gcache.size=8M",
            f"--wsrep-node-address=127.0.0.1:{group}",
            "--wsrep-cluster-address=gcomm://",
            "--binlog-format=ROW",
            "--innodb-autoinc-lock-mode=2",
        ) as server:
            yield server


def test_check_knows_a_node_of_galera(galera_node: servers.DatabaseServer) -> None:
    done = asgi_db("check", "--url", galera_node.url)
    assert fact(done.stdout, "role") == "node of a Galera cluster of 1, Synced"
    assert_found(done.stdout, "note", "wsrep_sync_wait is 0", "?init_command=SET%20SESSION")
    wait = "?init_command=SET%20SESSION%20wsrep_sync_wait%3D1"
    assert "wsrep_sync_wait is" not in asgi_db("check", "--url", galera_node.url + wait).stdout
    done = asgi_db("check", "--url", galera_node.url, DATABASE_REPLICA_URLS=galera_node.url)
    assert done.returncode == 0, done.stdout


def test_a_node_without_its_cluster_is_an_error(galera_node: servers.DatabaseServer) -> None:
    alone = f"gcomm://127.0.0.1:{servers.free_port()}"
    sql(galera_node.url, f"SET GLOBAL wsrep_cluster_address = '{alone}'")
    done = asgi_db("check", "--url", galera_node.url)
    assert done.returncode == 1
    assert_found(done.stdout, "error", "1047", "has lost the majority of its cluster")
