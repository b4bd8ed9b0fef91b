from __future__ import annotations

import asyncio
import dataclasses
import re
import sys
import traceback
import uuid
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import quote

import pytest
from asyncmy.connection import Connection as AsyncmyConnection
from hypothesis import assume, given
from hypothesis import strategies as st
from sqlalchemy import URL, make_url
from sqlalchemy.ext.asyncio import create_async_engine

from asgi_db import PoolProfile, create_database_url, uuid4_str
from asgi_db.errors import ConfigurationError
from tests.internals import (
    POOL_PROFILES,
    DatabaseType,
    PoolName,
    database_url_from_env,
    engine_options_from_env,
    parse_database_url,
    pool_profile,
)
from tests.versions import IS_SQLALCHEMY_2_0

SERVERS: list[DatabaseType] = ["postgresql", "mysql", "mariadb"]
MYSQL: list[DatabaseType] = ["mysql", "mariadb"]


def connect_arguments(url: URL) -> dict[str, Any]:
    """What SQLAlchemy hands to the driver's `connect` for this URL."""
    return cast("dict[str, Any]", url.get_dialect()().create_connect_args(url)[1])


# create_database_url


@pytest.mark.parametrize(
    ("type", "expected"),
    [
        ("postgresql", "postgresql+asyncpg://app:pw@db:5433/shop"),
        ("postgresql+psycopg", "postgresql+psycopg://app:pw@db:5433/shop"),
        ("mysql", "mysql+asyncmy://app:pw@db:5433/shop?charset=utf8mb4"),
        ("mariadb", "mariadb+asyncmy://app:pw@db:5433/shop?charset=utf8mb4"),
    ],
)
def test_a_url_has_all_the_parts_and_the_asynchronous_driver(
    type: DatabaseType, expected: str
) -> None:
    url = create_database_url(
        type, user="app", password="pw", host="db", port=5433, database="shop"
    )
    assert url.render_as_string(hide_password=False) == expected


@pytest.mark.parametrize("type", SERVERS)
def test_host_defaults_to_localhost_and_the_port_is_left_to_the_driver(type: DatabaseType) -> None:
    url = create_database_url(type, user="app", database="shop")
    assert (url.host, url.port, url.password) == ("localhost", None, None)


@pytest.mark.parametrize(
    "host", ["db", "db.example.org", "my_db-1", "10.0.0.1", "::1", "fe80::1%eth0"]
)
def test_a_host_is_a_name_or_an_address(host: str) -> None:
    url = create_database_url("postgresql", host=host, database="shop")
    assert url.host == make_url(str(url)).host == host


@pytest.mark.parametrize(
    ("database", "expected"),
    [
        (None, ":memory:"),
        ("", ":memory:"),
        (":memory:", ":memory:"),
        ("shop.db", "shop.db"),
        ("/srv/a@b/shop.db", "/srv/a@b/shop.db"),
    ],
)
def test_sqlite_is_a_file_or_in_memory(database: str | None, expected: str) -> None:
    url = create_database_url("sqlite", database=database)
    assert (url.drivername, url.database, dict(url.query)) == ("sqlite+aiosqlite", expected, {})


@pytest.mark.parametrize(
    ("type", "database", "expected"),
    [
        ("postgresql", "shop", "shop_test"),
        ("mysql", "shop", "shop_test"),
        ("mariadb", "shop", "shop_test"),
        ("sqlite", "shop.db", "shop_test.db"),
        ("sqlite", "shop", "shop_test"),
        ("sqlite", "./data.d/shop.v2.sqlite", "./data.d/shop.v2_test.sqlite"),
        ("sqlite", "/srv/shop.db", "/srv/shop_test.db"),
        ("sqlite", ":memory:", ":memory:"),
        ("sqlite", None, ":memory:"),
    ],
)
def test_the_unittest_form_names_the_test_database(
    type: DatabaseType, database: str | None, expected: str
) -> None:
    assert create_database_url(type, database=database, unittest=True).database == expected


@pytest.mark.parametrize(
    ("type", "longest"),
    [("postgresql", "ö" * 31 + "x"), ("mysql", "ö" * 64), ("mariadb", "ö" * 64)],
)
def test_a_name_which_the_server_would_cut_off_is_an_error(
    type: DatabaseType, longest: str
) -> None:
    """PostgreSQL would connect "<63 bytes>_test" to the real database, which the tests empty."""
    assert create_database_url(type, database=longest).database == longest
    with pytest.raises(ConfigurationError, match=f"`database` is too long: {type} allows 6"):
        create_database_url(type, database=longest + "x")
    with pytest.raises(ConfigurationError, match='`database` is too long with "_test": '):
        create_database_url(type, database=longest, unittest=True)


@pytest.mark.parametrize("charset", ["utf8mb4", "latin1"])
@pytest.mark.parametrize("type", MYSQL)
def test_the_charset_reaches_the_mysql_driver(type: DatabaseType, charset: str) -> None:
    url = create_database_url(type, user="app", database="shop", charset=charset)
    arguments = connect_arguments(url)
    arguments.pop("client_flag")

    async def charset_of_a_connection() -> object:
        return cast("Any", AsyncmyConnection)(**arguments).character_set_name()

    assert asyncio.run(charset_of_a_connection()) == charset


def test_without_its_driver_any_name_of_a_charset_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asyncmy", None)
    url = create_database_url("mysql", database="shop", charset="utf8mb5")
    assert dict(url.query) == {"charset": "utf8mb5"}


@pytest.mark.parametrize("type", ["postgresql", "sqlite"])
def test_the_charset_is_ignored_where_it_has_no_meaning(type: DatabaseType) -> None:
    assert not create_database_url(type, database="shop", charset="latin1").query


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (
            '^`type` must be one of "postgresql", "postgresql.psycopg", "mysql", "mariadb"',
            {"type": "oracle"},
        ),
        ("^`port` must be a whole number from 1 to 65535", {"port": 0}),
        ("^`port` must be a whole number from 1 to 65535", {"port": 65536}),
        ("^`port` must be a whole number from 1 to 65535", {"port": True}),
        ("^`port` must be a whole number from 1 to 65535", {"port": "5432"}),
        ("^`host` must be a host name .* the port goes into `port`", {"host": "db:5432"}),
        ("^`host` must be a host name", {"host": "app@db"}),
        ("^`host` must be a host name", {"host": "/run/postgresql"}),
        ("^`host` must be a host name", {"host": "::1%a/b"}),
        ("^`database` is missing: postgresql needs the name", {"database": None}),
        ("^`database` is missing: mysql needs the name", {"type": "mysql", "database": ""}),
        ("^`password` is set without a user: set `user` too", {"password": "pw"}),
        ('^`charset` must be .* such as "utf8mb4"', {"type": "mysql", "charset": ""}),
        ("^`charset` must be", {"type": "mariadb", "charset": "utf8mb4;"}),
        ("^`charset` must be", {"type": "mysql", "charset": "utf8mb5"}),
        ("^`host` has no meaning for SQLite", {"type": "sqlite", "host": "db"}),
        ("^`port` has no meaning for SQLite", {"type": "sqlite", "port": 1}),
        ("^`user` has no meaning for SQLite", {"type": "sqlite", "user": "app"}),
        ("^`password` has no meaning for SQLite", {"type": "sqlite", "password": "pw"}),
        ("^`database` must be the name of a file", {"type": "sqlite", "database": "data/"}),
        ("^`database` must be the name of a file", {"type": "sqlite", "database": ".."}),
    ],
)
def test_a_wrong_parameter_is_an_error_that_names_it(
    message: str, arguments: dict[str, Any]
) -> None:
    complete: dict[str, Any] = {"type": "postgresql", "database": "shop"} | arguments
    with pytest.raises(ConfigurationError, match=message):
        create_database_url(**complete)


names = st.text(min_size=1, max_size=15)


@given(type=st.sampled_from(SERVERS), user=names, password=st.text(), database=names)
def test_odd_characters_survive_the_way_through_a_url_string(
    type: DatabaseType, user: str, password: str, database: str
) -> None:
    # SQLAlchemy 2.0 writes the name of the database into the URL as it is.
    assume(not IS_SQLALCHEMY_2_0 or quote(database, safe=" +/") == database)
    url = create_database_url(type, user=user, password=password, database=database)
    assert (url.username, url.password, url.database) == (user, password, database)
    text = url.render_as_string(hide_password=False)
    assert make_url(text) == parse_database_url(text) == url


# parse_database_url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgres://app@db/shop", "postgresql+asyncpg://app@db/shop"),
        ("postgresql://app@db/shop", "postgresql+asyncpg://app@db/shop"),
        ("postgresql+asyncpg://app@db/shop", "postgresql+asyncpg://app@db/shop"),
        ("postgres+asyncpg://db", "postgresql+asyncpg://db"),
        ("postgresql:///shop?host=/run/pg", "postgresql+asyncpg:///shop?host=%2Frun%2Fpg"),
        ("mysql://db/shop", "mysql+asyncmy://db/shop?charset=utf8mb4"),
        ("mysql+asyncmy://db/shop?charset=", "mysql+asyncmy://db/shop?charset=utf8mb4"),
        ("mariadb://db:3307/shop", "mariadb+asyncmy://db:3307/shop?charset=utf8mb4"),
        ("mysql://db/shop?charset=latin1", "mysql+asyncmy://db/shop?charset=latin1"),
        ("sqlite:///shop.db", "sqlite+aiosqlite:///shop.db"),
        ("sqlite:////srv/a@b.db", "sqlite+aiosqlite:////srv/a@b.db"),
        ("sqlite://", "sqlite+aiosqlite:///:memory:"),
        ("sqlite+aiosqlite:///:memory:", "sqlite+aiosqlite:///:memory:"),
    ],
)
@pytest.mark.parametrize("as_object", [False, True], ids=["string", "object"])
def test_a_url_gets_the_asynchronous_driver_and_a_full_character_set(
    url: str, expected: str, as_object: bool
) -> None:
    assert parse_database_url(make_url(url) if as_object else url) == make_url(expected)


@pytest.mark.parametrize(
    ("message", "url"),
    [
        ("cannot be parsed: write it like postgresql://user:password@host", "shop.db"),
        ("cannot be parsed", ""),
        ("cannot be parsed", "postgresql://app:pw@db:port/shop"),
        ("cannot be parsed", "postgresql://app:pw"),
        ('has an "@" too many: .* written as %40', "postgresql://app:p@w@db/shop"),
        ('has an "@" too many', "postgresql://app:p@w/x@db/shop"),
        ('has an "@" too many', "postgresql://app:p@w?x@db/shop"),
        ('has an "@" too many', "postgresql://ap/p:pw@db/shop"),
        ("has a port that is not from 1 to 65535", "postgresql://app:123456"),
        ("has a port that is not from 1 to 65535", "mysql://db:0/shop"),
        ('names the unknown database "oracle": write one of postgresql://, ', "oracle://db/shop"),
        ('names the unknown database "asyncpg"', "asyncpg://db/shop"),
        (
            r'names the driver "psycopg2", .*: write postgresql\+asyncpg://, .* or just postgresql://',
            "postgresql+psycopg2://db/shop",
        ),
        (r'names the driver "psycopg2", .*postgresql\+asyncpg://', "postgres+psycopg2://db/shop"),
        (r'names the driver "pymysql", .*: write mysql\+asyncmy://', "mysql+pymysql://db/shop"),
        (r'names the driver "pysqlite", .*: write sqlite\+aiosqlite://', "sqlite+pysqlite://"),
        ("names a host or a user, which SQLite has not: write three slashes", "sqlite://shop.db"),
        ("names a host or a user, which SQLite has not", "sqlite://app:pw@db/shop.db"),
        ("names a host or a user, which SQLite has not", "sqlite:///shop.db?password=pw"),
        ("has in charset= the name of no character set", "mysql://db/shop?charset=utf8mb5"),
        ("has in charset= the name of no", "mariadb://db/shop?charset=latin1&charset=utf8mb4"),
        ("must be a string or a sqlalchemy.URL, not NoneType", None),
        ("must be a string or a sqlalchemy.URL, not bytes", b"sqlite://"),
    ],
)
def test_a_wrong_url_is_one_sentence_with_the_remedy(message: str, url: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"^The database URL {message}") as raised:
        parse_database_url(url)
    assert str(raised.value).endswith(".")
    assert raised.value.__context__ is None, "SQLAlchemy's error may quote the URL"


@pytest.mark.parametrize(
    ("driver", "url", "package"),
    [
        ("asyncpg", "postgres://app:pw@db/shop", r"asgi-db\[postgresql\]"),
        ("asyncmy", "mysql://app:pw@db/shop", r"asgi-db\[mysql\]"),
        ("asyncmy", "mariadb://app:pw@db/shop", r"asgi-db\[mysql\]"),
        ("aiosqlite", "sqlite:///shop.db", "aiosqlite"),
    ],
)
def test_a_driver_which_is_not_installed_is_an_error_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, driver: str, url: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, driver, None)  # Python's own way to block an import
    with pytest.raises(ConfigurationError, match=f"{driver}, .*: run `pip install {package}`"):
        parse_database_url(url)


@pytest.mark.parametrize("backend", ["postgresql", "mysql"])
def test_credentials_in_the_query_are_used_and_hidden(backend: str) -> None:
    url = parse_database_url(f"{backend}://db/shop?user=app&password=hunter2")
    assert "hunter2" not in repr(url)
    arguments = connect_arguments(url)
    assert (arguments["user"], arguments["password"]) == ("app", "hunter2")


@pytest.mark.parametrize(
    "url", ["postgres://app@db/shop?sslmode=require", "mysql://app@db/shop", "sqlite://"]
)
def test_reading_a_url_twice_changes_nothing(url: str) -> None:
    once = parse_database_url(url)
    assert parse_database_url(once) == once


# No password is ever shown

SECRET = "hunter2"
passwords = st.text(
    st.sampled_from("@:/?#%&=[]+ \\'\"\n\0é€ab1") | st.characters(codec="utf-8"), max_size=12
).flatmap(lambda rest: st.sampled_from([SECRET + rest, rest + SECRET, rest + SECRET + rest]))
url_forms = st.sampled_from(
    [
        "postgresql://app:{}@db/shop",
        "postgresql://app:{}@db:port/shop",
        "postgresql://app:{}@db:99999/shop",
        "postgresql://ap/p:{}@db/shop",
        "postgresql://app:{}",
        "postgresql://app:{}@a:1,b:2/shop",
        "postgresql://app:{}@a,b:port/shop",
        "postgresql+psycopg://app@/shop?host=a,b&port=1&password={}",
        "mysql://app:{}@a,b/shop",
        "postgresql+psycopg2://app:{}@db/shop",
        "postgresql:/app:{}@db/shop",
        "mysql://app:{}@[::1]:3306/shop",
        "mysql+pymysql://app:{}@db/shop",
        "mariadb://app:{}@/shop?charset=latin1",
        "oracle://app:{}@db/shop",
        "sqlite://app:{}@db/shop",
        "app:{}@db/shop",
        "postgresql://app@db/shop?password={}",
        "mysql://db/shop?user=app&password={}",
        "sqlite:///shop.db?password={}",
    ]
)


def shown(call: Callable[[], object]) -> str:
    """All that a log or a console could show of the call: its result, or the error as printed."""
    try:
        result = call()
    except ConfigurationError as error:
        assert error.__context__ is None
        return "".join(traceback.format_exception(error)) + repr(error)
    return f"{result} {result!r}"


@given(form=url_forms, password=passwords)
def test_no_url_shows_its_password_however_it_is_written(form: str, password: str) -> None:
    url = form.format(password)
    assume(":@" not in url)  # an empty password, behind which the host begins
    assume("@" in url or not re.match("[0-9]+,", password))  # ports of several hosts, then
    assert SECRET not in shown(lambda: parse_database_url(url))
    assert SECRET not in shown(lambda: database_url_from_env({"DATABASE_URL": url}))


@given(
    type=st.sampled_from(["postgresql", "mysql", "mariadb", "sqlite", "oracle"]),
    user=st.sampled_from([None, "app"]),
    host=st.sampled_from([None, "db", "d@b"]),
    port=st.sampled_from([None, 1, 99999]),
    database=st.sampled_from([None, "shop"]),
    password=passwords,
)
def test_no_set_of_parameters_shows_its_password(
    type: Any,
    user: str | None,
    host: str | None,
    port: int | None,
    database: str | None,
    password: str,
) -> None:
    assert SECRET not in shown(
        lambda: create_database_url(
            type, user=user, password=password, host=host, port=port, database=database
        )
    )


@given(
    variable=st.sampled_from(["TYPE", "USER", "HOST", "PORT", "SCHEMA", "CHARSET", "URL", "ECHO"]),
    password=passwords,
)
def test_a_url_in_the_wrong_variable_is_not_repeated(variable: str, password: str) -> None:
    """A user name and the name of a database are shown: only there the password is escaped."""
    environ = {
        "DATABASE_TYPE": "mysql",
        "DATABASE_SCHEMA": "shop",
        "DATABASE_USER": "app",
        "DATABASE_PASSWORD": password,
        f"DATABASE_{variable}": f"mysql:// app:{password}@db",
    }
    if variable not in ("USER", "SCHEMA"):
        assert SECRET not in shown(lambda: database_url_from_env(environ))
    assert SECRET not in shown(lambda: engine_options_from_env(environ | {"DATABASE_ECHO": "?"}))


# The environment


@pytest.mark.parametrize(
    "environ", [{}, {"PATH": "/bin"}, {"DATABASE_URL": "", "DATABASE_TYPE": ""}]
)
def test_an_environment_without_a_database_gives_none(environ: dict[str, str]) -> None:
    assert database_url_from_env(environ) is None


def test_database_url_wins_over_the_single_variables() -> None:
    environ = {"DATABASE_URL": " postgres://app@db/shop\n", "DATABASE_TYPE": "oracle"}
    assert str(database_url_from_env(environ)) == "postgresql+asyncpg://app@db/shop"


def test_the_single_variables_make_a_url() -> None:
    url = database_url_from_env(
        {
            "DATABASE_TYPE": "MySQL",
            "DATABASE_USER": "app",
            "DATABASE_PASSWORD": " p@w/ ",
            "DATABASE_HOST": "db",
            "DATABASE_PORT": "3307",
            "DATABASE_SCHEMA": "shop",
            "DATABASE_CHARSET": "latin1",
        }
    )
    assert url is not None
    assert str(url) == "mysql+asyncmy://app:***@db:3307/shop?charset=latin1"
    assert url.password == " p@w/ "


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"DATABASE_TYPE": "sqlite"}, "sqlite+aiosqlite:///:memory:"),
        ({"DATABASE_TYPE": "sqlite", "DATABASE_SCHEMA": "a.db"}, "sqlite+aiosqlite:///a.db"),
        (
            {"DATABASE_TYPE": "mariadb", "DATABASE_SCHEMA": "shop", "DATABASE_PORT": ""},
            "mariadb+asyncmy://localhost/shop?charset=utf8mb4",
        ),
    ],
)
def test_what_is_not_set_has_its_default(environ: dict[str, str], expected: str) -> None:
    assert database_url_from_env(environ) == make_url(expected)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("DATABASE_URL cannot be parsed", {"DATABASE_URL": "shop"}),
        ('DATABASE_URL names the driver "pymysql"', {"DATABASE_URL": "mysql+pymysql://db/shop"}),
        ('DATABASE_TYPE must be one of "postgresql"', {"DATABASE_TYPE": "oracle"}),
        ("DATABASE_TYPE is missing beside DATABASE_USER: set it to", {"DATABASE_TYPE": ""}),
        ("DATABASE_PORT must be a whole number", {"DATABASE_PORT": "many"}),
        ("DATABASE_PORT must be a whole number", {"DATABASE_PORT": "-1"}),
        ("DATABASE_PORT must be a whole number", {"DATABASE_PORT": "65536"}),
        ("DATABASE_HOST must be .* the port goes into DATABASE_PORT", {"DATABASE_HOST": "db:1"}),
        ("DATABASE_SCHEMA is missing", {"DATABASE_SCHEMA": ""}),
        ("DATABASE_PASSWORD is set without a user: set DATABASE_USER", {"DATABASE_USER": ""}),
        ("DATABASE_CHARSET must be", {"DATABASE_TYPE": "mysql", "DATABASE_CHARSET": "utf-8"}),
        ("DATABASE_CHARSET must be", {"DATABASE_TYPE": "mysql", "DATABASE_CHARSET": "utf8mb5"}),
        ("DATABASE_URL has in charset=", {"DATABASE_URL": "mysql://db/shop?charset=utf8mb5"}),
        ("DATABASE_USER has no meaning for SQLite", {"DATABASE_TYPE": "sqlite"}),
    ],
)
def test_a_wrong_variable_is_an_error_that_names_it(message: str, changes: dict[str, str]) -> None:
    environ = {
        "DATABASE_TYPE": "postgresql",
        "DATABASE_USER": "app",
        "DATABASE_PASSWORD": "pw",
        "DATABASE_SCHEMA": "shop",
    }
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        database_url_from_env(environ | changes)


def test_a_missing_driver_is_reported_with_the_variable_that_asks_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "aiosqlite", None)
    with pytest.raises(ConfigurationError, match="^DATABASE_TYPE needs the driver aiosqlite"):
        database_url_from_env({"DATABASE_TYPE": "sqlite"})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, True) for text in ("true", "1", "yes", "on", "TRUE", " On ")),
        *((text, False) for text in ("false", "0", "no", "off", "False")),
        ("debug", "debug"),
    ],
)
def test_echo_switches_take_the_usual_words(text: str, value: bool | str) -> None:
    assert engine_options_from_env({"DATABASE_ECHO": text}) == {"echo": value}
    assert engine_options_from_env({"DATABASE_POOL_ECHO": text}) == {"echo_pool": value}


def test_only_the_echo_switches_which_are_set_become_options() -> None:
    assert engine_options_from_env({"DATABASE_ECHO": "", "DATABASE_URL": "sqlite://"}) == {}
    assert engine_options_from_env({"DATABASE_ECHO": "1", "DATABASE_POOL_ECHO": "debug"}) == {
        "echo": True,
        "echo_pool": "debug",
    }


@pytest.mark.parametrize("name", ["DATABASE_ECHO", "DATABASE_POOL_ECHO"])
def test_another_word_for_an_echo_switch_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name} must be one of true, 1, yes, on, false"):
        engine_options_from_env({name: "maybe"})


# Pool profiles


@pytest.mark.parametrize(
    ("name", "profile"),
    [
        ("low", PoolProfile(5, 10, 60, 7200, False, False)),
        ("medium", PoolProfile(10, 20, 30, 3600, True, False)),
        ("high", PoolProfile(20, 40, 15, 1800, True, True)),
    ],
)
def test_the_pool_profiles_are_those_of_the_design(name: PoolName, profile: PoolProfile) -> None:
    assert pool_profile(name) == POOL_PROFILES[name] == profile


def test_the_medium_profile_is_the_default() -> None:
    assert PoolProfile() == pool_profile("medium")
    assert list(POOL_PROFILES) == ["low", "medium", "high"]


def test_sqlalchemy_accepts_the_options_of_a_profile_as_they_are() -> None:
    profile = dataclasses.replace(pool_profile("high"), pool_size=3, max_overflow=4)
    engine = create_async_engine("postgresql+asyncpg://db/shop", **profile.engine_options())
    assert "Pool size: 3" in engine.pool.status()


def test_an_unknown_pool_profile_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match='^`pool` must be one of "low", "medium", "high"'):
        pool_profile(cast("PoolName", "huge"))


def test_uuid4_str_gives_a_new_random_uuid_each_time() -> None:
    first, second = uuid4_str(), uuid4_str()
    assert first != second
    assert str(uuid.UUID(first)) == first and uuid.UUID(first).version == 4
