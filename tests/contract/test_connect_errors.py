"""Only what the driver or the network says is an outage; a bug in the user's own code is a bug."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Any

import pytest
from psycopg import AsyncConnection
from sqlalchemy import event, text

from asgi_db import ConfigurationError, Database, DBSession, Mode, plain, read_only, transactional
from tests.contract.client import assert_refused
from tests.contract.endpoints import Answer, Framework
from tests.contract.site import Site, write
from tests.drivers import is_psycopg

modes = pytest.mark.parametrize(
    "mode", [plain, transactional, read_only], ids=["plain", "transactional", "read_only"]
)


async def read(session: DBSession) -> Answer:
    await session.execute(text("SELECT 1"))
    return Answer()


@asynccontextmanager
async def set_up_by(
    framework: Framework, url: str, listener: Callable[[Any, Any], None]
) -> AsyncGenerator[Site]:
    """A site whose application sets up each connection in its own way."""
    async with Site.on(framework, url), Database(url) as database:
        event.listen(database.engine.sync_engine, "connect", listener)
        yield Site(framework, url, database)


def assert_is_a_bug(site: Site, exchange: Any, kind: type[Exception]) -> None:
    assert exchange.status == 500
    if site.framework.reraises:
        assert exchange.was_caused_by(kind), exchange.error


class Flawed:
    """A `connect` listener that fails at first."""

    def __init__(self, fail: Callable[[Any], None]) -> None:
        self._fail = fail
        self.is_mended = False

    def __call__(self, connection: Any, _: object) -> None:
        if not self.is_mended:
            self._fail(connection)


def misspell(connection: Any) -> None:
    connection.set_typ_codec("json")


def raise_value_error(_: Any) -> None:
    raise ValueError("nothing of the database")


def send_nonsense(connection: Any) -> None:
    cursor = connection.cursor()
    try:
        cursor.execute("SET no_such_thing TO 'nonsense'")
    finally:
        cursor.close()


@modes
@pytest.mark.parametrize("fail", [misspell, raise_value_error, send_nonsense])
async def test_a_bug_in_a_connect_listener_is_an_error_and_no_outage(
    framework: Framework, database_url: str, fail: Callable[[Any], None], mode: Mode
) -> None:
    listener = Flawed(fail)
    async with set_up_by(framework, database_url, listener) as site:
        exchange = await site.answer(read, mode)
        kinds: dict[Any, type[Exception]] = {
            misspell: AttributeError,
            raise_value_error: ValueError,
            send_nonsense: Exception,
        }
        assert_is_a_bug(site, exchange, kinds[fail])
        listener.is_mended = True
        assert (await site.answer(read, mode)).status == 200


async def test_a_connection_that_is_closed_in_a_listener_is_an_outage(
    framework: Framework, server_url: str
) -> None:
    def lose(connection: Any, _: object) -> None:
        name = type(connection).__name__
        cursor = connection.cursor()
        own = "pg_terminate_backend(pg_backend_pid())"
        cursor.execute("KILL CONNECTION_ID()" if "asyncmy" in name else f"SELECT {own}")

    async with set_up_by(framework, server_url, lose) as site:
        assert_refused(await site.answer(read, transactional), "down")


async def test_a_readiness_endpoint_does_not_call_a_bug_an_outage(database_url: str) -> None:
    database = Database(database_url)
    async with database:
        event.listen(database.engine.sync_engine, "connect", Flawed(misspell))
        with pytest.raises(AttributeError, match="set_typ_codec"):
            await database.ping()


def creator(url: str, error: Exception) -> Callable[..., Awaitable[Any]]:
    async def connect(*_: Any, **__: Any) -> Any:
        raise error

    return connect


@modes
@pytest.mark.parametrize(
    "error", [ValueError("no token"), TypeError("no token"), KeyError("token")], ids=repr
)
async def test_an_error_of_a_creator_of_the_users_own_goes_out_as_it_is(
    framework: Framework, database_url: str, error: Exception, mode: Mode
) -> None:
    options = {"async_creator": creator(database_url, error)}
    async with Site.on(framework, database_url):
        async with Database(database_url, engine_options=options) as database:
            site = Site(framework, database_url, database)
            exchange = await site.answer(read, mode)
            assert_is_a_bug(site, exchange, type(error))
            if site.framework.reraises:
                assert not exchange.was_caused_by(ConfigurationError)


async def test_a_network_error_of_a_creator_is_an_outage(
    framework: Framework, database_url: str
) -> None:
    options = {"async_creator": creator(database_url, ConnectionResetError("the token service"))}
    async with Site.on(framework, database_url):
        async with Database(database_url, engine_options=options) as database:
            exchange = await Site(framework, database_url, database).answer(read)
    assert_refused(exchange, "down")


async def test_what_the_driver_refuses_for_a_creator_is_a_setting(postgresql_url: str) -> None:
    async def connect(*_: Any, **__: Any) -> Any:
        if is_psycopg(postgresql_url):
            return await AsyncConnection.connect(host="127.0.0.1", port=1, sslmode="nonsense")
        return await import_module("asyncpg").connect(host="127.0.0.1", port=1, ssl="nonsense")

    async with Database(postgresql_url, engine_options={"async_creator": connect}) as database:
        with pytest.raises(ConfigurationError, match="ssl"):
            await database.ping()


async def test_a_pool_is_whole_after_many_such_errors(
    framework: Framework, database_url: str
) -> None:
    listener = Flawed(misspell)
    async with Site.on(framework, database_url):
        options: Any = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.1}
        async with Database(database_url, engine_options=options) as database:
            event.listen(database.engine.sync_engine, "connect", listener)
            site = Site(framework, database_url, database)
            for _ in range(3):
                assert (await site.answer(read)).status == 500
            listener.is_mended = True
            assert (await site.answer(write(Answer(201)), transactional)).status == 201
