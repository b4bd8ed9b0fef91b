"""Arguments that cannot work are refused at once, with a message that says what to write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from litestar import Litestar, post
from litestar import Request as LitestarRequest
from pydantic import SecretStr
from sqlalchemy import URL, NullPool, text
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route

from asgi_db import (
    ConfigurationError,
    Database,
    DBSession,
    DBSessionMiddleware,
    Mode,
    by_method,
    create_database_url,
    plain,
    read_only,
    session_of,
    transactional,
)
from asgi_db.types import ASGIApp, Receive, Scope, Send
from asgi_db_litestar import DatabasePlugin
from asgi_db_starlette import get_session
from tests.contract.client import call
from tests.tables import Author, Base, authors

PASSWORD = "s3cr&t/@"


async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
    raise NotImplementedError


def middleware(**options: Any) -> DBSessionMiddleware:
    return DBSessionMiddleware(nothing, **options)


def plugin(**options: Any) -> DatabasePlugin:
    return DatabasePlugin(**options)


each_kind = pytest.mark.parametrize("make", [middleware, plugin])


# -- the mode ----------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("mode", ["transaction", "", 1, True, None, object(), {}, ["plain"]])
def test_a_default_that_is_no_mode_is_refused(
    make: Callable[..., Any], mode: Any, sqlite_url: str
) -> None:
    with pytest.raises(ConfigurationError, match="it takes a mode: plain, transactional or read"):
        make(database=Database(sqlite_url), mode=mode)


@each_kind
def test_a_class_or_an_async_function_is_no_default(
    make: Callable[..., Any], sqlite_url: str
) -> None:
    async def choose(scope: Scope) -> Mode:
        return plain

    for mode in type(transactional), choose:
        with pytest.raises(ConfigurationError, match="neither a class nor an async function"):
            make(database=Database(sqlite_url), mode=mode)


async def mode_of(app_mode: Any, sqlite_url: str, method: str = "POST") -> Mode:
    seen: list[Mode] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session: DBSession = scope["state"]["db"]
        await session.execute(text("SELECT 1"))
        seen.append(session.unit_of_work.mode)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async with Database(sqlite_url) as database:
        exchange = await call(DBSessionMiddleware(app, database, mode=app_mode), method=method)
    if exchange.error is not None:
        raise exchange.error
    return seen[0]


def returning(value: object) -> Callable[[Scope], object]:
    def choose(scope: Scope) -> object:
        return value

    return choose


@pytest.mark.parametrize("mode", [plain, transactional, read_only], ids=lambda mode: mode.name)
async def test_the_name_of_a_mode_is_as_good_as_the_mode(mode: Mode, sqlite_url: str) -> None:
    assert await mode_of(mode.name, sqlite_url) == mode
    assert await mode_of(returning(mode.name), sqlite_url) == mode
    async with Database(sqlite_url) as database:
        async with database.session(mode.name) as session:  # type: ignore[arg-type]  # pyright: ignore
            assert session.unit_of_work.mode == mode


async def test_by_method_has_a_name_too(sqlite_url: str) -> None:
    assert await mode_of("by_method", sqlite_url, "GET") == read_only
    assert await mode_of(by_method, sqlite_url, "POST") == transactional


@pytest.mark.parametrize("returned", ["transaction", None, 5, transactional.__class__])
async def test_a_function_that_returns_no_mode_is_an_error_that_says_so(
    returned: Any, sqlite_url: str
) -> None:
    with pytest.raises(ConfigurationError, match="What mode= returned is .*; it takes a mode"):
        await mode_of(returning(returned), sqlite_url)


async def test_a_dependency_that_asks_for_no_mode_is_refused(sqlite_url: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert session_of(scope, "plain") is not None  # type: ignore[arg-type]  # pyright: ignore
        session_of(scope, "transaction")  # type: ignore[arg-type]  # pyright: ignore

    async with Database(sqlite_url) as database:
        exchange = await call(DBSessionMiddleware(app, database))
    assert isinstance(exchange.error, ConfigurationError)
    assert "The mode of session_of() is 'transaction'" in str(exchange.error)


async def test_a_block_takes_a_mode_and_a_transaction_one_that_commits(sqlite_url: str) -> None:
    async with Database(sqlite_url) as database:
        for wrong in "transaction", None, 1:
            with pytest.raises(ConfigurationError, match="database.session"):
                async with database.session(wrong):  # type: ignore[arg-type]  # pyright: ignore
                    raise AssertionError("it is not to be entered")
        for other in plain, read_only, "plain":
            with pytest.raises(ConfigurationError, match=r"database.transaction\(\) commits"):
                async with database.transaction(other):  # type: ignore[arg-type]  # pyright: ignore
                    raise AssertionError("it is not to be entered")


async def test_the_name_of_a_mode_works_in_litestars_opt_and_another_one_fails_the_startup(
    sqlite_url: str,
) -> None:
    async def create(request: LitestarRequest[Any, Any, Any]) -> str:
        request.state.db.add(Author(name="ada"))
        return "created"

    def app_with(option: Any) -> Litestar:
        return Litestar(
            [post("/", opt={"db": option})(create)],
            plugins=[DatabasePlugin(database)],
            openapi_config=None,
            logging_config=None,
        )

    async with Database(sqlite_url) as database:
        await database.create_tables(Base.metadata)
        assert (await call(app_with("transactional"))).status == 201
        assert await authors(sqlite_url) == ["ada"]
        with pytest.RaisesGroup(pytest.RaisesExc(TypeError, match="opt.'db'. is 'transaction'")):
            async with app_with("transaction").lifespan():
                raise AssertionError("it starts")


# -- the database ------------------------------------------------------------------------------


@each_kind
def test_what_is_no_database_is_refused_without_its_value(make: Callable[..., Any]) -> None:
    url = f"postgresql+asyncpg://app:{PASSWORD}@localhost/shop"
    engine = create_async_engine("sqlite+aiosqlite://")
    for wrong in url, URL.create("sqlite"), engine, Database, 5, SecretStr(url):
        with pytest.raises(ConfigurationError, match="takes a Database, not ") as refused:
            make(database=wrong)
        assert "write database=Database(...)" in str(refused.value)
        assert PASSWORD not in str(refused.value)


@each_kind
@pytest.mark.parametrize("key", ["", None, 5, b"db"])
def test_a_key_that_is_no_name_is_refused(
    make: Callable[..., Any], key: Any, sqlite_url: str
) -> None:
    with pytest.raises(ConfigurationError, match="key= is .* name of the session"):
        make(database=Database(sqlite_url), key=key)


@pytest.mark.parametrize("name", ["wait_for", "leak_threshold"])
@pytest.mark.parametrize("value", ["5", True, -1, float("nan")])
def test_a_time_that_is_none_is_refused(name: str, value: Any, sqlite_url: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}=.* must be seconds"):
        Database(sqlite_url, **{name: value})


# -- the settings ------------------------------------------------------------------------------


def test_a_secret_is_unwrapped() -> None:
    plain_url = create_database_url("postgresql", user="app", password=PASSWORD, database="shop")
    secret = SecretStr(PASSWORD)
    hidden = create_database_url(
        "postgresql", user=SecretStr("app"), password=secret, database="shop"
    )
    assert hidden == plain_url
    assert (hidden.username, hidden.password) == ("app", PASSWORD)
    url = SecretStr(plain_url.render_as_string(hide_password=False))
    assert Database(url).url.password == PASSWORD
    assert PASSWORD not in repr(Database(url))


def test_a_path_names_a_file(tmp_path: Path) -> None:
    file: Any = tmp_path / "shop.db"
    assert create_database_url("sqlite", database=file).database == str(file)


@pytest.mark.parametrize("part", ["user", "password", "host", "database"])
@pytest.mark.parametrize("value", [5, b"bytes", ["list"], SecretStr])
def test_a_part_of_a_url_that_is_no_text_is_refused_without_its_value(
    part: str, value: Any
) -> None:
    parts: dict[str, Any] = {"user": "app", "password": PASSWORD, "database": "shop"}
    parts[part] = value
    with pytest.raises(ConfigurationError, match=f"`{part}` must be a string, not ") as refused:
        create_database_url("postgresql", **parts)
    assert "bytes'" not in str(refused.value) and PASSWORD not in str(refused.value)


@pytest.mark.parametrize("port", ["5432", 5432.0, True])
def test_a_port_that_is_no_number_is_refused(port: Any) -> None:
    with pytest.raises(ConfigurationError, match="port` must be a whole number from 1 to 65535"):
        create_database_url("postgresql", user="app", database="shop", port=port)
    url = URL.create("postgresql", host="localhost", database="shop").set(port=5432)
    with pytest.raises(ConfigurationError, match="has a port that is not from 1 to 65535"):
        Database(url._replace(port=port))


# -- two databases -----------------------------------------------------------------------------


def second(tmp_path: Path) -> Database:
    return Database(f"sqlite+aiosqlite:///{tmp_path}/second.db")


async def test_two_databases_under_one_key_are_refused_when_the_application_is_put_together(
    sqlite_url: str, tmp_path: Path
) -> None:
    first, other = Database(sqlite_url), second(tmp_path)
    app = Starlette()
    app.add_middleware(DBSessionMiddleware, database=first)
    app.add_middleware(DBSessionMiddleware, database=other)
    with pytest.raises(ConfigurationError, match="Two DBSessionMiddleware with key='db'"):
        await app({"type": "lifespan", "state": {}}, *no_server())
    with pytest.raises(ConfigurationError, match="Two DBSessionMiddleware with key='db'"):
        DBSessionMiddleware(DBSessionMiddleware(nothing, first), other)
    with pytest.raises(ConfigurationError, match="Two DBSessionMiddleware with key='db'"):
        DBSessionMiddleware(Between(DBSessionMiddleware(nothing, first)), other)
    DBSessionMiddleware(DBSessionMiddleware(nothing, first), first)
    DBSessionMiddleware(DBSessionMiddleware(nothing, first), other, key="other")


class Between:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


def no_server() -> tuple[Receive, Send]:
    async def receive() -> Any:
        raise AssertionError("nothing is received")

    async def send(message: Any) -> None:
        raise AssertionError("nothing is sent")

    return receive, send


class Auditing:
    """Writes with the session of its own application, before and after the rest."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        before = session_of(scope)
        await self.app(scope, receive, send)
        assert session_of(scope) is before
        assert scope["state"]["db"] is before
        before.add(Author(name="audit"))


@pytest.mark.parametrize("retries", [0, 1])
async def test_after_a_mounted_application_the_session_of_the_outer_one_is_back(
    sqlite_url: str, tmp_path: Path, retries: int
) -> None:
    async def create(request: Request) -> Response:
        get_session(request).add(Author(name="inner"))
        return PlainTextResponse("created", 201)

    mode = transactional(retries=retries)
    async with Database(sqlite_url) as outer, second(tmp_path) as inner:
        for database in outer, inner:
            await database.create_tables(Base.metadata)
        mounted = Starlette(
            routes=[Route("/", create, methods=["POST"])],
            middleware=[Middleware(DBSessionMiddleware, database=inner, mode=mode)],
        )
        app = Starlette(
            routes=[Mount("/sub", mounted)],
            middleware=[
                Middleware(DBSessionMiddleware, database=outer, mode=mode),
                Middleware(Auditing),
            ],
        )
        assert (await call(app, "/sub/")).status == 201
        assert await authors(sqlite_url) == ["audit"]
        assert await authors(inner.url.render_as_string()) == ["inner"]


# -- the options of the engine -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"pool_sise": 7}, "'pool_sise'"),
        ({"poolclass": NullPool, "pool_size": 7}, "'pool_size'"),
        ({"isolation_level": "SNAPSHOT", "future": False}, "future"),
    ],
    ids=["misspelt", "of another pool", "out of date"],
)
@pytest.mark.parametrize("scheme", ["postgresql", "mysql", "sqlite"])
def test_an_option_that_no_engine_takes_is_refused_at_construction(
    scheme: str, options: dict[str, Any], named: str
) -> None:
    url = "sqlite:///shop.db" if scheme == "sqlite" else f"{scheme}://u:hidden@localhost/shop"
    with pytest.raises(ConfigurationError, match="^engine_options= cannot work: ") as caught:
        Database(url, engine_options=options)
    assert named in str(caught.value)
    assert "hidden" not in str(caught.value)
