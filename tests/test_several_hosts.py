"""URLs that name several hosts: every way to write them, and what happens when some do not work."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any, cast

import pytest
from sqlalchemy import URL, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_db import ConfigurationError, Database, DatabaseDownError, create_database_url
from tests import servers
from tests.clusters import Urls
from tests.internals import database_url_from_env, parse_database_url, side_connection
from tests.limits import limit, set_limits
from tests.relay import Relay

DRIVERS = ["asyncpg", "psycopg"]
BACKENDS = ["postgresql+asyncpg", "postgresql+psycopg", "mysql+asyncmy"]


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


SHORT = {"asyncpg": 0.5, "psycopg": 2, "asyncmy": 1}
"""The shortest timeout that a driver takes, or that is useful."""


@contextmanager
def frozen() -> Generator[socket.socket]:
    """A host that takes connections, and never says anything."""
    with socket.create_server(("127.0.0.1", servers.free_port())) as silent:
        yield silent


def tried(silent: socket.socket) -> int:
    """How often the host was tried since the last time that this was asked."""
    number = 0
    silent.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            silent.accept()[0].close()
            number += 1
    return number


def port_of(listening: socket.socket) -> int:
    port: int = listening.getsockname()[1]
    return port


async def port_reached(database: Database) -> int | None:
    """The port of the server to which a new connection is made."""
    async with side_connection(database.engine) as connection:
        return cast("int", await connection.scalar(text("SELECT inet_server_port()")))


@pytest.mark.timing
@pytest.mark.parametrize(
    ("driver", "wanted"),
    [
        ("asyncpg", "any"),
        ("asyncpg", "primary"),
        ("asyncpg", "read-write"),
        ("asyncpg", "prefer-standby"),
        ("psycopg", "primary"),
        ("psycopg", "prefer-standby"),
    ],
)
async def test_a_frozen_host_does_not_take_the_time_of_the_next(
    postgresql_url: str, driver: str, wanted: str
) -> None:
    with frozen() as silent:
        url = hosts_before(postgresql_url, port_of(silent), servers.free_port(), driver=driver)
        url += f"?connect_timeout={SHORT[driver]}&target_session_attrs={wanted}"
        async with Database(url) as database:
            started = time.monotonic()
            assert await port_reached(database) == make_url(postgresql_url).port
            first = time.monotonic() - started
            assert first >= SHORT[driver]
            assert tried(silent) == 1
            for _ in range(10):
                assert await port_reached(database) == make_url(postgresql_url).port
            assert tried(silent) == 0, "it is not waited for again"


@pytest.mark.timing
@pytest.mark.parametrize("driver", DRIVERS)
async def test_the_startup_and_a_ping_get_past_a_frozen_host(
    postgresql_url: str, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of their attempts is shorter than the time that a host has."""
    set_limits(monkeypatch, ping=0.7)
    with frozen() as silent:
        url = hosts_before(postgresql_url, port_of(silent), driver=driver) + "?connect_timeout=2"
        async with Database(url, wait_for=30) as database:
            await database.ping()


@pytest.mark.timing
@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_host_that_answers_again_is_the_first_again(
    postgresql_url: str, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limits(monkeypatch, silent_for=0)
    async with Relay(postgresql_url) as relay:
        relay.freeze()
        port = make_url(relay.url).port or 0
        url = hosts_before(postgresql_url, port, driver=driver)
        async with Database(f"{url}?connect_timeout={SHORT[driver]}") as database:
            await port_reached(database)
            relay.thaw()
            before = relay.connections
            await port_reached(database)
            assert relay.connections == before + 1


@pytest.mark.timing
@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_server_has_ten_seconds_by_default(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert limit("connect") == 10
    short = SHORT[backend.partition("+")[2]]
    set_limits(monkeypatch, connect=short)
    with frozen() as silent:
        database = Database(f"{backend}://app:pw@127.0.0.1:{port_of(silent)}/shop")
        started = time.monotonic()
        async with database:
            with pytest.raises(DatabaseDownError):
                await database.engine.connect()
        assert short <= time.monotonic() - started < short + 8


@pytest.mark.timing
@pytest.mark.parametrize("backend", BACKENDS)
async def test_the_url_and_connect_args_may_change_that(backend: str) -> None:
    short = SHORT[backend.partition("+")[2]]
    with frozen() as silent:
        url = f"{backend}://app:pw@127.0.0.1:{port_of(silent)}/shop"
        name = "timeout" if "asyncpg" in backend else "connect_timeout"
        in_arguments = Database(url, engine_options={"connect_args": {name: short}})
        for database in (Database(f"{url}?connect_timeout={short}"), in_arguments):
            started = time.monotonic()
            async with database:
                with pytest.raises(DatabaseDownError):
                    await database.engine.connect()
            assert short <= time.monotonic() - started < short + 7


@pytest.mark.timing
@pytest.mark.parametrize("driver", DRIVERS)
async def test_if_none_can_be_reached_each_is_named_with_the_reason(
    postgresql_url: str, driver: str
) -> None:
    refusing = servers.free_port()
    with frozen() as silent:
        frozen_port = port_of(silent)
        url = hosts_before(postgresql_url, refusing, frozen_port, driver=driver)
        url += f"?target_session_attrs=standby&connect_timeout={SHORT[driver]}"
        async with Database(url) as database:
            with pytest.raises(DatabaseDownError) as raised:
                await database.engine.connect()
    message = str(raised.value)
    own = make_url(postgresql_url).port
    assert re.search(f"127.0.0.1:{refusing}: [^;]*(refused|failed)", message), message
    assert re.search(f"127.0.0.1:{frozen_port}: [^;]*[tT]imeout", message), message
    assert re.search(f"127.0.0.1:{own}: [^;]*(attribute|standby)", message), message
    assert "password" not in message


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_single_host_that_does_not_fit_is_down(postgresql_url: str, driver: str) -> None:
    url = make_url(postgresql_url).set(drivername=f"postgresql+{driver}")
    async with Database(url.update_query_dict({"target_session_attrs": "standby"})) as database:
        with pytest.raises(DatabaseDownError, match="attribute|standby"):
            await database.engine.connect()


@pytest.mark.parametrize("driver", DRIVERS)
async def test_after_a_refused_login_no_other_host_is_tried(
    postgresql_url: str, driver: str
) -> None:
    """As with libpq: a wrong setting is to be noticed, and not only when the other host is down."""
    async with Relay(postgresql_url) as relay:
        first = make_url(relay.url).port or 0
        url = parse_database_url(hosts_before(postgresql_url, first, driver=driver))
        async with Database(url.set(database="no_such_database")) as database:
            with pytest.raises(ConfigurationError, match="Create it with CREATE DATABASE"):
                await database.engine.connect()
        assert relay.connections == 1


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_cancelled_connect_leaves_nothing_open(postgresql_url: str, driver: str) -> None:
    with frozen() as silent:
        silent.setblocking(False)
        loop = asyncio.get_running_loop()
        url = hosts_before(postgresql_url, port_of(silent), driver=driver) + "?connect_timeout=2"
        async with Database(url) as database:
            connecting = asyncio.ensure_future(port_reached(database))
            accepted, _ = await loop.sock_accept(silent)
            connecting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await connecting
        with accepted:
            accepted.setblocking(False)
            while await asyncio.wait_for(loop.sock_recv(accepted, 4096), 15):
                pass  # what it had said before it was closed
        await servers.assert_disconnected(postgresql_url)


@pytest.mark.parametrize("form", ["URL", "connect_args", "environment"])
@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("hosts", ["one host", "several hosts"])
async def test_wrong_session_attributes_are_a_wrong_setting(
    postgresql_url: str, driver: str, hosts: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a 503, which would have clients try again for ever."""
    before = [servers.free_port()] if hosts == "several hosts" else []
    url = hosts_before(postgresql_url, *before, driver=driver)
    if form == "URL":
        with pytest.raises(ConfigurationError, match="target_session_attrs=.* one of .*primary"):
            Database(f"{url}?target_session_attrs=bogus")
        return
    options: dict[str, Any] = {}
    if form == "environment":
        monkeypatch.setenv("PGTARGETSESSIONATTRS", "bogus")
    else:
        options = {"connect_args": {"target_session_attrs": "bogus"}}
    async with Database(url, engine_options=options) as database:
        with pytest.raises(ConfigurationError, match="target_session_attrs|bogus"):
            await database.engine.connect()


@pytest.mark.parametrize("backend", ["mysql", "mariadb"])
def test_mysql_knows_no_session_attributes(backend: str) -> None:
    with pytest.raises(ConfigurationError, match="target_session_attrs=, which is no option of"):
        Database(f"{backend}://app@db/shop?target_session_attrs=primary")


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        ("any", True),
        ("read-write", True),
        ("primary", True),
        ("prefer-standby", True),
        ("read-only", False),
        ("standby", False),
    ],
)
async def test_each_of_the_session_attributes_is_known_to_both_drivers(
    postgresql_url: str, driver: str, wanted: str, fits: bool
) -> None:
    url = hosts_before(postgresql_url, servers.free_port(), driver=driver)
    async with Database(f"{url}?target_session_attrs={wanted}") as database:
        if fits:
            assert await port_reached(database) == make_url(postgresql_url).port
        else:
            with pytest.raises(DatabaseDownError):
                await port_reached(database)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    ("wanted", "is_primary"),
    [
        ("primary", True),
        ("read-write", True),
        ("standby", False),
        ("read-only", False),
        ("prefer-standby", False),
    ],
)
async def test_the_server_that_fits_is_found_in_any_order(
    postgresql_urls: Urls, driver: str, wanted: str, is_primary: bool
) -> None:
    primary, standby = make_url(postgresql_urls.primary), make_url(postgresql_urls.prompt)
    fits = primary if is_primary else standby
    refusing = servers.free_port()
    for first, last in ((primary, standby), (standby, primary)):
        url = hosts_before(str(last), refusing, first.port or 0, driver=driver)
        url = url.replace("***", "password")
        async with Database(f"{url}?target_session_attrs={wanted}") as database:
            assert await port_reached(database) == fits.port


async def test_libpq_may_choose_among_the_hosts_at_random(postgresql_url: str) -> None:
    port = make_url(postgresql_url).port
    hosts = f"127.0.0.1:{port},localhost:{port}"
    url = postgresql_url.replace("+asyncpg", "+psycopg").replace(f"127.0.0.1:{port}", hosts)
    reached = set[str]()
    async with Database(f"{url}?load_balance_hosts=random") as database:
        for _ in range(30):
            async with side_connection(database.engine) as connection:
                raw: Any = (await connection.get_raw_connection()).driver_connection
                reached.add(raw.info.host)
    assert reached == {"127.0.0.1", "localhost"}


async def test_libpq_may_be_told_the_addresses_too(postgresql_url: str) -> None:
    """Then it finds its own way among the hosts."""
    url = hosts_before(postgresql_url, servers.free_port(), driver="psycopg")
    url = url.replace("127.0.0.1:", "elsewhere.invalid:")
    async with Database(f"{url}?hostaddr=127.0.0.1,127.0.0.1") as database:
        assert await port_reached(database) == make_url(postgresql_url).port


def test_the_name_of_a_database_is_found_in_any_url_of_an_engine() -> None:
    def name_of(**parts: Any) -> str:
        url = URL.create("postgresql+asyncpg", database="shop", **parts)
        return Database(engine=create_async_engine(url)).stats().name

    assert name_of(query={"host": ("a:1", "b:2")}) == "a:1,b:2/shop"
    assert name_of(query={"host": "/run/pg"}) == "shop"
    assert name_of(host="a,b:x") == "shop"
