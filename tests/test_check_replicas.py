"""`asgi-db check` with replicas, against real servers that replicate."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import make_url

from tests.clusters import Cluster, Urls
from tests.servers import assert_disconnected, run, sql
from tests.test_cli import asgi_db, assert_found, fact

NOWHERE = "127.0.0.1:1"


@pytest.fixture(params=["postgresql", "mysql"])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    found: Cluster = request.getfixturevalue(f"{request.param}_cluster")
    return found


@pytest.fixture
def urls(cluster: Cluster) -> Iterator[Urls]:
    with cluster.fresh_database() as urls:
        yield urls


def place(url: str) -> str:
    return f"127.0.0.1:{make_url(url).port}"


def check(url: str, replicas: list[str], *options: str) -> str:
    urls = " ".join(replicas)
    done = asgi_db("check", *options, DATABASE_URL=url, DATABASE_REPLICA_URLS=urls)
    assert done.stdout.count("error:") == done.returncode, done.stdout
    return done.stdout


def test_check_says_how_far_each_replica_is_behind(cluster: Cluster, urls: Urls) -> None:
    cluster.wait_until_caught_up()
    told = fact(check(urls.primary, urls.replicas), f"replica {place(urls.late)}")
    assert "only reads, 0 " in told and "up to 30 of " in told
    cluster.late.pause()
    sql(urls.primary, "CREATE TABLE item (id INTEGER)")
    told = fact(check(urls.primary, urls.replicas), f"replica {place(urls.late)}")
    assert " behind, " in told and "only reads, 0 " not in told
    for url in (urls.primary, *urls.replicas):
        run(assert_disconnected(url))


def test_a_replica_that_cannot_be_reached_is_a_warning(urls: Urls) -> None:
    gone = urls.late.replace(place(urls.late), NOWHERE)
    told = check(urls.primary, [gone, urls.prompt])
    assert fact(told, f"replica {NOWHERE}") == "cannot be used"
    assert_found(told, "warning", f"{NOWHERE} cannot be used, and its reads", "Nobody listens at")
    assert "only reads" in fact(told, f"replica {place(urls.prompt)}")


def test_the_primary_may_be_listed_as_a_replica_and_another_server_may_not(
    request: pytest.FixtureRequest, urls: Urls
) -> None:
    told = check(urls.primary, [urls.primary, *urls.replicas])
    assert "takes writes, 0 " in fact(told, f"replica {place(urls.primary)}")
    assert "and is not in the URL of the primary" not in told
    backend = make_url(urls.primary).get_backend_name()
    stranger: str = request.getfixturevalue(f"{backend}_url")
    told = check(urls.primary, [stranger])
    assert_found(told, "error", "nothing of the history of the primary", "DATABASE_REPLICA_URLS")
    assert_found(told, "warning", "takes writes, and is not in the URL", "Add it to the hosts")


def test_more_connections_than_a_replica_allows_are_an_error(urls: Urls) -> None:
    told = asgi_db(
        *("check", "--pool", "high", "--processes", "9"),
        DATABASE_URL=urls.primary,
        DATABASE_REPLICA_URLS=urls.late,
    ).stdout
    problem = f"The replica {place(urls.late)} gets up to 540 connections, and allows "
    assert_found(told, "error", problem, "raise max_connections there")


def test_a_replica_of_another_kind_is_refused(postgresql_url: str) -> None:
    done = asgi_db(
        "check", "--url", postgresql_url, DATABASE_REPLICA_URLS="mysql://app@127.0.0.1/shop"
    )
    assert done.returncode == 1
    assert "replicas= has a URL of mysql+asyncmy" in done.stderr
