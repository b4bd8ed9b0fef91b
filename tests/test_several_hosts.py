"""URLs that name several hosts: every way to write them, and what happens when some do not work."""

from __future__ import annotations

from typing import Any, cast

import pytest
from sqlalchemy import URL, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_db import ConfigurationError, Database, create_database_url
from tests import servers
from tests.internals import database_url_from_env, parse_database_url

DRIVERS = ["asyncpg", "psycopg"]


def connect_arguments(url: URL) -> dict[str, Any]:
    """What SQLAlchemy hands to the driver's `connect` for this URL."""
    return cast("dict[str, Any]", url.get_dialect()().create_connect_args(url)[1])


def places(url: URL) -> tuple[list[str], list[str]]:
    """The hosts and ports of which the driver is told."""
    arguments = connect_arguments(url)
    return listed(arguments.get("host", "")), listed(arguments.get("port", ""))


def listed(value: Any) -> list[str]:
    """asyncpg takes a list, and psycopg a string."""
    return str(value).split(",") if isinstance(value, str | int) else [str(one) for one in value]


# -- the forms ---------------------------------------------------------------------------------

FORMS = {
    "postgresql://app:pw@a:1,b:2/shop": (["a", "b"], ["1", "2"]),
    "postgresql://a:1,b:2/shop": (["a", "b"], ["1", "2"]),
    "postgresql://a:1,b:2": (["a", "b"], ["1", "2"]),
    "postgresql://app@a,b/shop": (["a", "b"], ["5432", "5432"]),
    # With libpq a port belongs to its own host alone.
    "postgresql://app@a,b:2/shop": (["a", "b"], ["5432", "2"]),
    "postgresql://app@a:1,b/shop": (["a", "b"], ["1", "5432"]),
    "postgresql://app@a:1,b:2,c:3/shop?sslmode=require": (["a", "b", "c"], ["1", "2", "3"]),
    "postgresql://app:p,w@a:1,b:2/shop": (["a", "b"], ["1", "2"]),
    "postgresql://app:p%2Cw%40@a:1,b:2/shop": (["a", "b"], ["1", "2"]),
    "postgresql://app@[::1]:1,[fe80::2]:2/shop": (["::1", "fe80::2"], ["1", "2"]),
    "postgresql://app@[::1],b:2/shop": (["::1", "b"], ["5432", "2"]),
    "postgresql://%2Frun%2Fpg,b:2/shop": (["/run/pg", "b"], ["5432", "2"]),
    "postgresql://%2Frun%2Fpg:1,%2Frun%2Fpg:2/shop": (["/run/pg", "/run/pg"], ["1", "2"]),
    "postgresql:///shop?host=a:1&host=b:2": (["a", "b"], ["1", "2"]),
    "postgresql://app@/shop?host=a&host=b": (["a", "b"], ["5432", "5432"]),
    "postgresql://app@/shop?host=a,b&port=1,2": (["a", "b"], ["1", "2"]),
    "postgresql://app@/shop?host=a,b&port=1,": (["a", "b"], ["1", "5432"]),
    "postgresql://app@/shop?host=a,b&port=7": (["a", "b"], ["7", "7"]),
    "postgresql://app@:7/shop?host=a,b": (["a", "b"], ["7", "7"]),
    "postgresql://app@/shop?host=a:1&host=b&port=7": (["a", "b"], ["1", "7"]),
    "postgresql://app@/shop?host=a:1,b:2": (["a", "b"], ["1", "2"]),
    "postgresql://app@/shop?host=a&host=b&port=1&port=2": (["a", "b"], ["1", "2"]),
    "postgresql://app@/shop?host=[::1]:1&host=b:2": (["::1", "b"], ["1", "2"]),
    "postgresql://app@/shop?host=::1,b&port=1,2": (["::1", "b"], ["1", "2"]),
    "postgresql://app@/shop?host=/run/pg,/run/pg2&port=1,2": (["/run/pg", "/run/pg2"], ["1", "2"]),
    "postgresql://app@c:9/shop?host=a:1&host=b:2": (["a", "b"], ["1", "2"]),
    "postgresql://app@a:1/shop": (["a"], ["1"]),
    "postgresql:///shop?host=a:1": (["a"], ["1"]),
    "postgresql:///shop?host=a&port=1": (["a"], ["1"]),
    "postgresql:///shop?host=[::1]:1": (["::1"], ["1"]),
    "postgresql://%2Frun%2Fpg/shop": (["/run/pg"], [""]),
    "postgresql://app@%2frun%2fpg:1/shop": (["/run/pg"], ["1"]),
    "postgresql:///shop?host=/run/pg&port=1": (["/run/pg"], ["1"]),
    "postgresql:///shop?host=/cloudsql/a:b:c": (["/cloudsql/a:b:c"], [""]),
}


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(("url", "expected"), list(FORMS.items()), ids=list(FORMS))
def test_each_form_reaches_the_driver(
    driver: str, url: str, expected: tuple[list[str], list[str]]
) -> None:
    read = parse_database_url(url.replace("postgresql:", f"postgresql+{driver}:"))
    assert places(read) == expected
    assert read.database in ("shop", None)
    assert read.username in ("app", None)
    assert parse_database_url(read) == read, "it is read again by `redirect`, for example"
    assert parse_database_url(read.render_as_string(hide_password=False)) == read
    Database(read)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (URL.create("postgresql", host="a,b", port=7), (["a", "b"], ["7", "7"])),
        (URL.create("postgresql", host="a:1,b:2"), (["a", "b"], ["1", "2"])),
        (URL.create("postgresql", host="/run/pg", port=7), (["/run/pg"], ["7"])),
        (URL.create("postgresql", query={"host": ("a:1", "b:2")}), (["a", "b"], ["1", "2"])),
        (URL.create("postgresql", query={"host": "a,b"}), (["a", "b"], ["5432", "5432"])),
        (create_database_url("postgresql", host="a, b", database="d"), (["a", "b"], ["5432"] * 2)),
        (
            create_database_url("postgresql", host="a,::1", port=7, database="d"),
            (["a", "::1"], ["7", "7"]),
        ),
    ],
)
def test_url_objects_may_name_several_hosts_too(
    driver: str, url: URL, expected: tuple[list[str], list[str]]
) -> None:
    read = parse_database_url(url.set(drivername=f"postgresql+{driver}"))
    assert places(read) == expected


def test_the_environment_may_name_several_hosts() -> None:
    url = database_url_from_env({"DATABASE_URL": "postgresql://app:pw@a:1,b:2/shop"})
    assert url is not None and places(url) == (["a", "b"], ["1", "2"])
    parts = {"DATABASE_TYPE": "postgresql", "DATABASE_HOST": "a,b", "DATABASE_PORT": "7"}
    url = database_url_from_env({**parts, "DATABASE_SCHEMA": "shop"})
    assert url is not None and places(url) == (["a", "b"], ["7", "7"])


def test_the_password_is_hidden_and_the_hosts_are_named() -> None:
    database = Database("postgresql://app:s3cr3t%2C@a:1,b:2/shop")
    assert database.url.password == "s3cr3t,"
    assert "s3cr3t" not in repr(database) + repr(database.url) + str(database.url)
    assert database.stats().name == "a:1,b:2/shop"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://app:pw@a:1,b:two/shop", "has a port that is not from 1 to 65535: correct"),
        ("postgresql://app:pw@a:1,b:99999/shop", "has a port that is not from 1 to 65535"),
        ("postgresql://app:pw@a,,b/shop", "has a host that is no name and no address: correct it"),
        ("postgresql://app:pw@,b/shop", "has a host that is no name and no address"),
        ("postgresql://app:pw@a:,b/shop", "has a host that is no name and no address"),
        ("postgresql://app:pw@[::1:1,b/shop", "has a host that is no name and no address"),
        ("postgresql://app:p@w,x@a:1,b:2/shop", 'has an "@" too many'),
        ("postgresql:///shop?host=a,b,c&port=1,2", "has not as many ports as hosts: write one for"),
        ("postgresql:///shop?host=a&port=1,2", "has not as many ports as hosts"),
        ("postgresql:///shop?host=a:1,b&port=1,2", "has ports both beside its hosts and in port="),
        ("postgresql:///shop?host=p/w:1", "has a host that is no name and no address"),
        ("mysql://app:pw@a,b/shop", "names several hosts, and asyncmy connects to one: name the"),
        ("mysql://app:pw@a:1,b:2/shop", "names several hosts, and asyncmy connects to one"),
        ("mariadb://app:pw@/shop?host=a&host=b", "names several hosts"),
        ("mysql://app:pw@/shop?host=a,b&port=1,2", "names several hosts"),
        ("sqlite://a:1,b:2/shop.db", "names a host or a user, which SQLite has not"),
        (URL.create("mysql", host="a,b"), "names several hosts"),
    ],
)
def test_hosts_that_cannot_work_are_refused_with_the_remedy(message: str, url: str | URL) -> None:
    with pytest.raises(ConfigurationError, match=f"^The database URL {message}") as raised:
        Database(url)
    assert raised.value.__context__ is None
    assert "pw" not in str(raised.value).replace("app:pw", "") and str(raised.value).endswith(".")


@pytest.mark.parametrize("type", ["mysql", "mariadb"])
def test_parameters_with_several_hosts_are_refused_for_mysql(type: Any) -> None:
    with pytest.raises(ConfigurationError, match="^`host` names several hosts, .*MaxScale"):
        create_database_url(type, host="a,b", database="shop")
    parts = {"DATABASE_TYPE": type, "DATABASE_HOST": "a,b", "DATABASE_SCHEMA": "shop"}
    with pytest.raises(ConfigurationError, match="^DATABASE_HOST names several hosts"):
        database_url_from_env(parts)


def test_the_single_host_of_a_mysql_url_may_stand_in_the_query() -> None:
    url = parse_database_url("mysql://app@/shop?host=db&port=3307")
    assert (url.host, url.port) == ("db", 3307)


# -- a server that is there, among hosts that are not --------------------------------------------


def hosts_before(url: str, *ports: int, form: int = 0, driver: str = "asyncpg") -> str:
    """The URL with hosts on these ports before its own, in one of the forms."""
    parsed = make_url(url).set(drivername=f"postgresql+{driver}")
    there = [*ports, parsed.port]
    listed = [f"127.0.0.1:{port}" for port in there]
    own = f"127.0.0.1:{parsed.port}"
    whole = parsed.set(host="127.0.0.1").render_as_string(hide_password=False)
    match form:
        case 0:
            return whole.replace(own, ",".join(listed))
        case 1:
            return whole.replace(own, "") + "?" + "&".join(f"host={each}" for each in listed)
        case _:
            names, numbers = ["127.0.0.1"] * len(there), map(str, there)
            return whole.replace(own, "") + f"?host={','.join(names)}&port={','.join(numbers)}"


@pytest.mark.parametrize("form", [0, 1, 2])
@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_host_that_refuses_is_skipped(postgresql_url: str, driver: str, form: int) -> None:
    url = hosts_before(postgresql_url, servers.free_port(), form=form, driver=driver)
    database = Database("postgresql://app@elsewhere/shop")
    database.redirect(url)
    async with database, database.engine.connect() as connection:
        reached = await connection.scalar(text("SELECT inet_server_port()"))
    assert reached == make_url(postgresql_url).port
    engine = create_async_engine(database.url)  # as Alembic and scripts may do
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT inet_server_port()")) == reached
    await engine.dispose()
