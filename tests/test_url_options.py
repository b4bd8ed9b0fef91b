"""The options in a URL: translated into the driver's terms, or refused before anything connects."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import certifi
import pytest
from click.testing import CliRunner
from sqlalchemy import make_url, text

from asgi_db import ConfigurationError, Database
from tests.internals import cli, driver_of_url

POSTGRESQL = "postgresql://app@db/shop"
PSYCOPG = "postgresql+psycopg://app@db/shop"
MYSQL = "mysql://app@db/shop"
SQLITE = "sqlite:///shop.db"
CA = certifi.where()


def arguments_of(url: str) -> dict[str, Any]:
    parsed = Database(url).url
    translated, arguments = driver_of_url(parsed).translate(parsed)
    assert not translated.query or set(translated.query) <= {
        "charset",
        "host",
        "port",
        "uri",
        "mode",
    }
    return arguments


@pytest.mark.parametrize(
    ("url", "arguments"),
    [
        (f"{POSTGRESQL}?sslmode=require", {"ssl": "require"}),
        (f"{POSTGRESQL}?ssl=verify-full", {"ssl": "verify-full"}),
        (f"{POSTGRESQL}?sslmode=disable&channel_binding=prefer", {"ssl": "disable"}),
        (f"{POSTGRESQL}?connect_timeout=3", {"timeout": 3.0}),
        (f"{POSTGRESQL}?connect_timeout=0", {"timeout": None}),
        (f"{POSTGRESQL}?timeout=3", {"timeout": 3.0}),
        (f"{POSTGRESQL}?command_timeout=2.5", {"command_timeout": 2.5}),
        (f"{POSTGRESQL}?statement_cache_size=0", {"statement_cache_size": 0}),
        (
            f"{POSTGRESQL}?application_name=shop&options=-c%20geqo%3Doff",
            {"server_settings": {"application_name": "shop", "options": "-c geqo=off"}},
        ),
        (f"{POSTGRESQL}?target_session_attrs=read-write", {"target_session_attrs": "read-write"}),
        (f"{POSTGRESQL}?sslnegotiation=direct&sslmode=allow", {"ssl": "allow", "direct_tls": True}),
        (f"{POSTGRESQL}?client_encoding=utf8&gssencmode=prefer&sslsni=1", {}),
        ("postgresql:///shop?host=/run/pg", {}),
        (
            f"{PSYCOPG}?connect_timeout=3&sslmode=require",
            {"connect_timeout": 3, "sslmode": "require"},
        ),
        (f"{PSYCOPG}?channel_binding=require", {"channel_binding": "require"}),
        (
            f"{PSYCOPG}?target_session_attrs=prefer-standby&load_balance_hosts=random",
            {"target_session_attrs": "prefer-standby", "load_balance_hosts": "random"},
        ),
        (
            f"{PSYCOPG}?options=-c%20geqo%3Doff&application_name=shop",
            {"options": "-c geqo=off", "application_name": "shop"},
        ),
        (
            f"{PSYCOPG}?client_encoding=latin1&krbsrvname=pg",
            {"client_encoding": "latin1", "krbsrvname": "pg"},
        ),
        (
            f"{PSYCOPG}?sslmode=verify-full&sslrootcert={CA}",
            {"sslmode": "verify-full", "sslrootcert": CA},
        ),
        (
            f"{PSYCOPG}?sslmode=verify-full&sslrootcert=system",
            {"sslmode": "verify-full", "sslrootcert": "system"},
        ),
        (f"{PSYCOPG}?keepalives=1&keepalives_idle=30", {"keepalives": "1", "keepalives_idle": 30}),
        (f"{PSYCOPG}?prepare_threshold=0", {"prepare_threshold": 0}),
        (f"{PSYCOPG}?prepare_threshold=None", {"prepare_threshold": None}),
        ("postgresql+psycopg:///shop?host=/run/pg", {}),
        ("postgresql+psycopg://app@/shop?host=a:5432&host=b:5433", {}),
        (f"{MYSQL}?connect_timeout=3", {"connect_timeout": 3}),
        (f"{MYSQL}?connect-timeout=3&ssl-mode=DISABLED", {"connect_timeout": 3}),
        (f"{MYSQL}?program_name=a&local_infile=true", {"program_name": "a", "local_infile": True}),
        (f"{SQLITE}?timeout=3", {"timeout": 3.0}),
        ("sqlite:///file:shop.db?mode=ro&uri=true", {}),
    ],
)
def test_what_the_clients_of_a_database_mean_is_said_in_the_drivers_terms(
    url: str, arguments: dict[str, Any]
) -> None:
    assert arguments_of(url) == arguments


@pytest.mark.parametrize(
    ("url", "verifies", "names"),
    [
        (f"{POSTGRESQL}?sslmode=verify-full&sslrootcert={CA}", True, True),
        (f"{POSTGRESQL}?sslmode=verify-full&sslrootcert=system", True, True),
        (f"{POSTGRESQL}?sslmode=verify-ca&sslrootcert={CA}", True, False),
        (f"{POSTGRESQL}?sslmode=require&sslrootcert={CA}", True, False),
        (f"{MYSQL}?ssl-mode=REQUIRED", False, False),
        (f"{MYSQL}?ssl-mode=required", False, False),
        (f"{MYSQL}?ssl_mode=VERIFY_CA&ssl_ca={CA}", True, False),
        (f"{MYSQL}?ssl-mode=VERIFY_IDENTITY&ssl-ca={CA}", True, True),
        (f"{MYSQL}?ssl-mode=VERIFY_IDENTITY", True, True),
        (f"{MYSQL}?ssl_ca={CA}", True, True),
        (f"{MYSQL}?ssl_ca={CA}&ssl_check_hostname=false", True, False),
    ],
)
def test_encryption_verifies_as_much_as_the_database_means_by_it(
    url: str, verifies: bool, names: bool
) -> None:
    context = arguments_of(url)["ssl"]
    assert isinstance(context, ssl.SSLContext)
    assert (context.verify_mode is ssl.CERT_REQUIRED, context.check_hostname) == (verifies, names)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"{POSTGRESQL}?sslmode=no-verify", "sslmode=.* one of .*require.* encrypted"),
        (f"{POSTGRESQL}?ssl=true", "ssl=.* must be one of"),
        (f"{POSTGRESQL}?channel_binding=require", "channel_binding=.*sslmode=verify-full"),
        (f"{POSTGRESQL}?target_session_attrs=master", "target_session_attrs=.*read-write"),
        (f"{POSTGRESQL}?connect_timeout=soon", "connect_timeout=.*number"),
        (f"{POSTGRESQL}?timeout=-1", "timeout=.*number"),
        (f"{POSTGRESQL}?sslrootcert={CA}", "sslrootcert=.*sslmode=require or more"),
        (f"{POSTGRESQL}?sslmode=verify-full&sslrootcert=/no/such.pem", "sslrootcert=.*path"),
        (f"{POSTGRESQL}?client_encoding=latin1", "client_encoding=.*leave it out"),
        (f"{POSTGRESQL}?keepalives_idle=30", "keepalives_idle=.*leave it out"),
        (f"{POSTGRESQL}?pgbouncer=true", r'pgbouncer=.*pooler="transaction"'),
        (f"{POSTGRESQL}?nonsense=1", "nonsense=.*no option of asyncpg or libpq: leave it out"),
        (f"{PSYCOPG}?sslmode=no-verify", "sslmode=.* one of .*require"),
        (f"{PSYCOPG}?channel_binding=maybe", "channel_binding=.* one of .*require"),
        (f"{PSYCOPG}?target_session_attrs=master", "target_session_attrs=.*read-write"),
        (f"{PSYCOPG}?connect_timeout=soon", "connect_timeout=.*number"),
        (f"{PSYCOPG}?sslrootcert={CA}", "sslrootcert=.*sslmode=require or more"),
        (f"{PSYCOPG}?sslmode=verify-full&sslrootcert=/no/such.pem", "sslrootcert=.*path"),
        (f"{PSYCOPG}?prepare_threshold=never", "prepare_threshold=.*number"),
        (f"{PSYCOPG}?ssl=require", "ssl=.*write sslmode="),
        (f"{PSYCOPG}?timeout=3", "timeout=.*connect_timeout="),
        (f"{PSYCOPG}?command_timeout=3", "command_timeout=.*statement_timeout"),
        (f"{PSYCOPG}?statement_cache_size=0", "statement_cache_size=.*prepare_threshold="),
        (f"{PSYCOPG}?pgbouncer=true", r'pgbouncer=.*pooler="transaction"'),
        (f"{PSYCOPG}?dbname=other", "dbname=.*leave it out"),
        (f"{PSYCOPG}?nonsense=1", "nonsense=.*no option of psycopg or libpq: leave it out"),
        (f"{MYSQL}?ssl-mode=no-verify", "ssl-mode=.*VERIFY_CA"),
        (f"{MYSQL}?ssl-mode=PREFERRED", "ssl-mode=.*REQUIRED"),
        (f"{MYSQL}?ssl=true", "ssl=.*ssl-mode=REQUIRED"),
        (f"{MYSQL}?timeout=3", "timeout=.*connect_timeout="),
        (f"{MYSQL}?connect_timeout=soon", "connect_timeout=.*number"),
        (f"{MYSQL}?ssl_ca=/no/such.pem", "ssl_ca=.*path"),
        (f"{MYSQL}?nonsense=1", "nonsense=.*no option of asyncmy"),
        (f"{SQLITE}?timeout=soon", "timeout=.*number"),
        (f"{SQLITE}?mode=ro", "mode=.*uri=true"),
    ],
)
def test_what_cannot_be_translated_is_refused_at_construction_with_the_remedy(
    url: str, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"^The database URL has {message}"):
        Database(url)
    result = CliRunner().invoke(cli, ["check", "--url", url])
    assert result.exit_code == 1
    assert "The database URL has" in result.output


def test_a_refused_value_is_not_repeated() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Database(f"{POSTGRESQL}?sslpassword=s3cret&sslmode=s3cret")
    assert "s3cret" not in str(caught.value)


async def test_the_options_arrive_at_postgresql(postgresql_url: str) -> None:
    query = {
        "sslmode": "disable",
        "application_name": "shop",
        "options": "-c geqo=off",
        "connect_timeout": "5",
        "target_session_attrs": "any",
        "channel_binding": "prefer",
    }
    settings = {"connect_args": {"server_settings": {"work_mem": "5MB"}}}
    url = make_url(postgresql_url).update_query_dict(query)
    async with Database(url, engine_options=settings) as database, database.session() as session:
        for name, value in {"application_name": "shop", "geqo": "off", "work_mem": "5MB"}.items():
            assert await session.scalar(text(f"SHOW {name}")) == value


async def test_the_options_arrive_at_postgresql_through_psycopg(postgresql_url: str) -> None:
    url = make_url(postgresql_url).set(drivername="postgresql+psycopg")
    query = {
        "host": [f"{url.host}:1", f"{url.host}:{url.port}"],  # nobody listens at the first
        "application_name": "shop",
        "options": "-c geqo=off",
        "target_session_attrs": "primary",
        "channel_binding": "prefer",
    }
    anywhere = url.set(host=None, port=None).update_query_dict(query)
    async with Database(anywhere) as database, database.session() as session:
        for name, value in {"application_name": "shop", "geqo": "off"}.items():
            assert await session.scalar(text(f"SHOW {name}")) == value


async def test_the_options_arrive_at_mariadb(mysql_url: str) -> None:
    query = {"ssl-mode": "DISABLED", "sql_mode": "ANSI", "connect-timeout": "5"}
    url = make_url(mysql_url).update_query_dict(query)
    async with Database(url) as database, database.session() as session:
        assert "ANSI" in str(await session.scalar(text("SELECT @@sql_mode")))


@pytest.mark.parametrize("url", ["postgresql_url", "mysql_url"])
async def test_a_server_without_encryption_is_not_talked_to_in_the_clear(
    url: str, request: pytest.FixtureRequest
) -> None:
    parsed = make_url(request.getfixturevalue(url))
    option = "sslmode" if url == "postgresql_url" else "ssl-mode"
    mode = "require" if url == "postgresql_url" else "REQUIRED"
    async with Database(parsed.update_query_dict({option: mode})) as database:
        with pytest.raises(Exception, match="(?i)ssl"):
            await database.ping()


async def test_the_busy_timeout_of_sqlite_is_a_number(tmp_path: Path) -> None:
    async with Database(f"sqlite:///{tmp_path}/a.db?timeout=3") as database:
        async with database.session() as session:
            assert await session.scalar(text("PRAGMA busy_timeout")) == 3000
