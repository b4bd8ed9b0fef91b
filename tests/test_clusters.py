"""The clusters on which the tests of replicas rely: each replica follows, and does what it is told.

What the replicas show is asked through the drivers alone, without the library.
"""

import time

import pytest

from tests import clusters
from tests.clusters import LAG, Cluster, Urls
from tests.servers import sql


@pytest.fixture
def urls(cluster: Cluster, urls: Urls) -> Urls:
    sql(urls.primary, "CREATE TABLE item (id INTEGER PRIMARY KEY)")
    cluster.wait_until_caught_up()
    return urls


def count(url: str) -> int:
    ((found,),) = sql(url, "SELECT count(*) FROM item")
    return int(found)


def write(url: str, id: int) -> None:
    sql(url, f"INSERT INTO item VALUES ({id})")


def test_a_late_replica_shows_a_write_late(cluster: Cluster, urls: Urls) -> None:
    began = time.monotonic()
    write(urls.primary, 1)
    assert count(urls.late) == 0
    cluster.wait_until_caught_up(cluster.late)
    assert time.monotonic() - began >= LAG
    assert count(urls.late) == 1


def test_the_lag_can_be_changed(cluster: Cluster, urls: Urls) -> None:
    cluster.late.set_lag(0)
    began = time.monotonic()
    for id in range(5):
        write(urls.primary, id)
        cluster.wait_until_caught_up()
        assert count(urls.late) == id + 1
    assert time.monotonic() - began < 5 * LAG + 3


def test_a_replica_that_pauses_shows_nothing_new(cluster: Cluster, urls: Urls) -> None:
    cluster.late.set_lag(0)
    cluster.late.pause()
    write(urls.primary, 1)
    with pytest.raises(AssertionError, match="a replica lacks"):
        cluster.wait_until_caught_up(cluster.late, within=0.5)
    assert count(urls.late) == 0
    cluster.late.resume()
    cluster.wait_until_caught_up()
    assert count(urls.late) == 1


def test_a_prompt_standby_shows_a_write_at_once(
    postgresql_cluster: Cluster, postgresql_urls: Urls
) -> None:
    cluster, urls = postgresql_cluster, postgresql_urls
    cluster.late.pause()
    sql(urls.primary, "CREATE TABLE item (id INTEGER PRIMARY KEY)")
    write(urls.primary, 1)
    cluster.wait_until_caught_up(cluster.prompt)
    assert count(urls.prompt) == 1


def test_a_primary_that_only_reads_refuses_a_write(cluster: Cluster, urls: Urls) -> None:
    cluster.read_only()
    with pytest.raises(Exception, match="read.only"):
        write(urls.primary, 1)
    cluster.read_only(False)
    write(urls.primary, 1)
    assert count(urls.primary) == 1


def test_a_replica_refuses_a_write(urls: Urls) -> None:
    with pytest.raises(Exception, match="read.only"):
        write(urls.late, 1)


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_a_replica_is_cut_off_follows_again_and_is_promoted(kind: str) -> None:
    with getattr(clusters, kind)() as own:
        urls = own.create_database()
        sql(urls.primary, "CREATE TABLE item (id INTEGER PRIMARY KEY)")
        own.wait_until_caught_up()
        own.late.detach()
        write(urls.primary, 1)
        with pytest.raises(AssertionError, match="a replica lacks"):
            own.wait_until_caught_up(own.late, within=0.5)
        assert (count(urls.primary), count(urls.late)) == (1, 0)
        with own.primary.frozen():
            assert count(urls.late) == 0
        own.late.follow(own.primary)
        own.wait_until_caught_up()
        assert count(urls.late) == 1
        own.primary.stop("immediate")
        own.late.promote()
        write(urls.late, 2)
        assert count(urls.late) == 2
