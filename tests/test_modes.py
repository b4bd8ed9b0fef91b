"""The modes: values, decorators, and which of several is in force."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from litestar import Controller, Litestar, WebSocket, get, post, websocket
from litestar import Request as LitestarRequest
from litestar.middleware import DefineMiddleware
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route

from asgi_db import (
    Database,
    DBSession,
    DBSessionMiddleware,
    Mode,
    ModeConflictError,
    by_method,
    plain,
    read_only,
    session_of,
    transactional,
)
from asgi_db.types import ASGIApp, Receive, Scope, Send
from tests.contract.client import call
from tests.internals import ModeDefault, session_key, should_commit
from tests.units import NewUnit, new_unit

MODES: list[Any] = [plain, transactional, read_only]
STATUSES = st.integers(min_value=100, max_value=599)

each_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)


@pytest.fixture
async def database(sqlite_url: str) -> AsyncIterator[Database]:
    async with Database(sqlite_url) as database:
        yield database


# -- values ------------------------------------------------------------------------------------


@each_mode
def test_a_mode_cannot_be_changed(mode: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        mode.isolation = "SERIALIZABLE"
    with pytest.raises((AttributeError, TypeError)):
        mode.anything = 1
    assert mode.isolation is None
    assert not hasattr(mode, "anything")


def test_modes_are_equal_by_value_and_usable_as_keys() -> None:
    assert transactional(isolation="SERIALIZABLE") == transactional(isolation="SERIALIZABLE")
    assert len({plain, transactional, read_only, transactional(), read_only()}) == 3
    assert len({transactional, transactional(isolation="SERIALIZABLE")}) == 2


def test_options_make_a_variant_and_leave_the_mode_as_it_is() -> None:
    variant = transactional(isolation="SERIALIZABLE", read_only=True, deferrable=True)
    assert (variant.isolation, variant.read_only, variant.deferrable) == (
        "SERIALIZABLE",
        True,
        True,
    )
    assert (transactional.isolation, transactional.read_only) == (None, False)
    assert read_only(snapshot=True).snapshot
    assert not read_only.snapshot


def test_a_variant_can_be_varied_again() -> None:
    serializable = transactional(isolation="SERIALIZABLE")
    assert serializable(read_only=True) == transactional(isolation="SERIALIZABLE", read_only=True)


@pytest.mark.parametrize(
    ("mode", "commits", "autocommit", "reads_only"),
    [
        (plain, False, False, False),
        (transactional, True, False, False),
        (transactional(read_only=True), True, False, True),
        (read_only, False, True, True),
        (read_only(snapshot=True), False, False, True),
    ],
)
def test_each_mode_does_what_its_table_says(
    mode: Mode, commits: bool, autocommit: bool, reads_only: bool
) -> None:
    assert (mode.commits, mode.autocommit, mode.read_only) == (commits, autocommit, reads_only)


# -- wrong options -----------------------------------------------------------------------------

vary: Any = transactional
vary_read_only: Any = read_only


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "5", True])
def test_a_timeout_that_is_no_time_is_refused(timeout: Any) -> None:
    with pytest.raises(ValueError, match="must be seconds, more than 0"):
        transactional(timeout=timeout)


@pytest.mark.parametrize("rule", [400, "status", True])
def test_a_commit_rule_that_is_no_function_is_refused(rule: Any) -> None:
    with pytest.raises(ValueError, match="must be a function of the status"):
        transactional(commit_on=rule)


@pytest.mark.parametrize("isolation", ["serializable", "SNAPSHOT", "", "AUTOCOMMIT", 3])
def test_an_unknown_isolation_is_refused_with_the_known_ones(isolation: Any) -> None:
    with pytest.raises(ValueError, match="READ COMMITTED.*SERIALIZABLE") as refused:
        vary(isolation=isolation)
    assert repr(isolation) in str(refused.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"read_only": True},
        {"isolation": "SERIALIZABLE"},
        {"isolation": "REPEATABLE READ", "read_only": True},
    ],
)
def test_deferrable_is_refused_where_it_would_have_no_effect(options: Any) -> None:
    with pytest.raises(ValueError, match="isolation='SERIALIZABLE' and read_only=True"):
        vary(deferrable=True, **options)


@pytest.mark.parametrize(
    ("mode", "option", "value"),
    [
        (transactional, "isolaton", "SERIALIZABLE"),
        (transactional, "snapshot", True),
        (read_only, "isolation", "SERIALIZABLE"),
        (read_only, "read_only", False),
        (read_only, "commit_on", bool),
        (read_only, "snapshots", True),
        (plain, "isolation", "SERIALIZABLE"),
        (plain, "read_only", True),
    ],
)
def test_an_option_which_the_mode_does_not_have_is_refused(
    mode: Any, option: str, value: Any
) -> None:
    with pytest.raises(TypeError, match=option):
        mode(**{option: value})


# -- what can be marked ------------------------------------------------------------------------


@each_mode
def test_a_decorator_returns_the_very_function(mode: Any) -> None:
    async def endpoint() -> None: ...

    assert mode(endpoint) is endpoint


@each_mode
def test_what_cannot_be_marked_is_refused_with_the_right_place(mode: Any) -> None:
    class Endpoints:
        async def endpoint(self) -> None: ...

    for target in (Endpoints().endpoint, len, "SERIALIZABLE"):
        with pytest.raises(
            TypeError, match=f"@{mode.name} cannot mark .*below the route decorator"
        ):
            mode(target)


@each_mode
@pytest.mark.parametrize("route", [get, post, websocket])
def test_a_decorator_above_litestars_is_refused(mode: Any, route: Callable[..., Any]) -> None:
    async def endpoint(socket: WebSocket[Any, Any, Any]) -> None: ...

    async def handler() -> None: ...

    decorated = route("/")(endpoint if route is websocket else handler)
    with pytest.raises(TypeError, match="below the route decorator"):
        mode(decorated)


# -- should_commit and by_method ---------------------------------------------------------------


@given(STATUSES)
def test_an_answer_commits_below_400(status: int) -> None:
    assert should_commit(transactional, status, None) is (status < 400)


@given(STATUSES)
def test_an_answer_made_of_an_exception_rolls_back_unless_it_redirects(status: int) -> None:
    raised = ValueError()
    assert should_commit(transactional, status, raised) is (300 <= status < 400)


@given(STATUSES, st.frozensets(STATUSES))
def test_commit_on_replaces_the_rule_of_the_status(status: int, good: frozenset[int]) -> None:
    mode = transactional(commit_on=lambda status: status in good)
    assert should_commit(mode, status, None) is (status in good)


@given(STATUSES, st.booleans())
def test_commit_on_does_not_replace_the_rule_of_the_exception(status: int, good: bool) -> None:
    mode = transactional(commit_on=lambda _: good)
    assert should_commit(mode, status, ValueError()) is (good and 300 <= status < 400)


@pytest.mark.parametrize(
    ("method", "mode"),
    [
        *((method, read_only) for method in ("GET", "HEAD", "OPTIONS", "TRACE")),
        *((method, transactional) for method in ("POST", "PUT", "PATCH", "DELETE", "PURGE")),
    ],
)
def test_by_method_reads_on_safe_methods_alone(method: str, mode: Mode) -> None:
    assert by_method({"type": "http", "method": method}) == mode


def test_by_method_is_transactional_on_a_websocket() -> None:
    assert by_method({"type": "websocket"}) == transactional


# -- which mode is in force --------------------------------------------------------------------


def mode_in_force(scope: Scope) -> Mode:
    session: DBSession = scope[session_key("db")]
    return session.unit_of_work.mode


def bare(
    database: Database,
    endpoint: Callable[[Scope], Any] | None = None,
    default: ModeDefault = plain,
    asked: tuple[Mode, ...] = (),
) -> tuple[ASGIApp, list[Mode]]:
    """A bare application whose router has found `endpoint`, and the modes that it has seen."""
    seen: list[Mode] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if endpoint is not None:
            scope["endpoint"] = endpoint
        session = session_of(scope)
        for mode in asked:
            session_of(scope, mode)
        await session.execute(text("SELECT 1"))
        seen.append(mode_in_force(scope))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    return DBSessionMiddleware(app, database, mode=default), seen


async def test_without_any_word_the_mode_is_plain(database: Database) -> None:
    app, seen = bare(database)
    assert (await call(app)).status == 204
    assert seen == [plain]


async def test_the_middleware_gives_the_default(database: Database) -> None:
    app, seen = bare(database, default=read_only)
    await call(app)
    assert seen == [read_only]


async def test_the_middlewares_default_may_depend_on_the_scope(database: Database) -> None:
    app, seen = bare(database, default=by_method)
    for method in ("GET", "POST"):
        assert (await call(app, method=method)).status == 204
    assert seen == [read_only, transactional]


async def test_a_default_of_the_scope_sees_the_route(database: Database) -> None:
    async def reports(scope: Scope) -> None: ...

    def default(scope: Scope) -> Mode:
        return read_only if scope["endpoint"] is reports else plain

    app, seen = bare(database, reports, default)
    await call(app)
    assert seen == [read_only]


@pytest.mark.parametrize("default", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("asked", MODES, ids=lambda mode: mode.name)
async def test_a_dependency_is_stronger_than_the_default(
    database: Database, asked: Mode, default: Mode
) -> None:
    app, seen = bare(database, default=default, asked=(asked,))
    assert (await call(app)).status == 204
    assert seen == [asked]


@pytest.mark.parametrize("route", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("asked", MODES, ids=lambda mode: mode.name)
async def test_the_route_is_stronger_than_a_dependency(
    database: Database, asked: Mode, route: Any
) -> None:
    async def endpoint(scope: Scope) -> None: ...

    app, seen = bare(database, route(endpoint), default=transactional, asked=(asked,))
    assert (await call(app)).status == 204
    assert seen == [route]


@pytest.mark.parametrize(
    ("asked", "strongest"),
    [
        ((plain, read_only), plain),
        ((read_only, plain), plain),
        ((plain, transactional), transactional),
        ((transactional, plain), transactional),
        ((transactional, read_only), transactional),
        ((read_only, transactional, plain), transactional),
    ],
)
async def test_of_two_dependencies_the_stronger_wins(
    database: Database, asked: tuple[Mode, ...], strongest: Mode
) -> None:
    app, seen = bare(database, asked=asked)
    await call(app)
    assert seen == [strongest]


# -- a stronger mode too late ------------------------------------------------------------------


def unit_in(database: Database, default: Mode, *, route: Mode | None = None) -> NewUnit:
    return new_unit(database, default, "GET /late", route=route)


@pytest.mark.parametrize(
    ("begun", "asked"), [(read_only, plain), (read_only, transactional), (plain, transactional)]
)
async def test_a_stronger_mode_after_reads_begins_with_the_next_statement(
    database: Database, begun: Mode, asked: Mode
) -> None:
    unit = unit_in(database, begun)
    await unit.session.execute(text("SELECT 1"))
    unit.ask(asked)
    await unit.session.execute(text("SELECT 1"))
    assert unit.mode == asked
    await unit.end(success=False)
    unit.close()


@pytest.mark.parametrize("end", ["commit", "rollback"])
async def test_a_stronger_mode_after_writes_is_a_conflict_until_they_have_ended(
    database: Database, end: str
) -> None:
    begun: Mode = plain
    unit = unit_in(database, begun)
    await unit.session.execute(text("CREATE TABLE t (x INTEGER)"))
    with pytest.raises(ModeConflictError) as conflict:
        unit.ask(transactional)
    assert str(conflict.value).startswith(
        "GET /late: the transactional mode was asked for after work in the plain mode"
    )
    await unit.session.execute(text("SELECT 1"))
    assert unit.mode == begun
    await getattr(unit.session, end)()
    unit.ask(transactional)
    assert unit.mode == transactional
    await unit.session.execute(text("SELECT 1"))
    await unit.end(success=False)
    unit.close()


@pytest.mark.parametrize(
    ("begun", "asked"),
    [
        (plain, plain),
        (plain, read_only),
        (transactional, plain),
        (transactional, read_only),
        (transactional, transactional),
    ],
)
async def test_a_weaker_mode_after_writes_changes_nothing(
    database: Database, begun: Mode, asked: Mode
) -> None:
    unit = unit_in(database, begun)
    await unit.session.execute(text("CREATE TABLE t (x INTEGER)"))
    unit.ask(asked)
    await unit.session.execute(text("INSERT INTO t VALUES (1)"))
    assert unit.mode == begun
    await unit.end(success=False)
    unit.close()


async def test_under_the_mode_of_the_route_a_dependency_is_no_conflict(database: Database) -> None:
    unit = unit_in(database, plain, route=plain)
    await unit.session.execute(text("SELECT 1"))
    unit.ask(transactional)
    assert unit.mode == plain
    await unit.end(success=False)
    unit.close()


async def test_after_a_commit_by_hand_a_stronger_mode_may_begin(database: Database) -> None:
    unit = unit_in(database, plain)
    await unit.session.execute(text("SELECT 1"))
    await unit.session.commit()
    unit.ask(transactional)
    assert unit.mode == transactional
    unit.close()


# -- where the mark may stand ------------------------------------------------------------------


async def answer_mode(request: Request) -> Response:
    mode = mode_in_force(request.scope)
    return PlainTextResponse(f"{mode.name} {mode.isolation or ''}".strip())


def starlette_app(database: Database, *routes: Route | Mount) -> Starlette:
    app = Starlette(routes=routes)
    app.add_middleware(DBSessionMiddleware, database=database)
    return app


async def mode_answered(app: ASGIApp, method: str = "GET", path: str = "/") -> str:
    answer = await call(app, path, method=method)
    assert answer.status == 200, answer
    return answer.body.decode()


async def test_the_mark_on_a_function_counts(database: Database) -> None:
    @transactional(isolation="SERIALIZABLE")
    async def endpoint(request: Request) -> Response:
        return await answer_mode(request)

    app = starlette_app(database, Route("/", endpoint))
    assert await mode_answered(app) == "transactional SERIALIZABLE"


async def test_the_mark_is_seen_through_functools_wraps(database: Database) -> None:
    @transactional
    async def endpoint(request: Request) -> Response:
        return await answer_mode(request)

    @functools.wraps(endpoint)
    async def decorated(request: Request) -> Response:
        return await endpoint(request)

    assert await mode_answered(starlette_app(database, Route("/", decorated))) == "transactional"


async def test_the_mark_is_seen_in_a_partial_of_a_partial(database: Database) -> None:
    @transactional
    async def endpoint(prefix: str, more: str, request: Request) -> Response:
        return await answer_mode(request)

    twice = functools.partial(functools.partial(endpoint, "a"), "b")
    assert await mode_answered(starlette_app(database, Route("/", twice))) == "transactional"


async def test_the_mark_on_a_partial_counts_and_wins_over_the_function_in_it(
    database: Database,
) -> None:
    @read_only
    async def endpoint(prefix: str, request: Request) -> Response:
        return await answer_mode(request)

    marked = transactional(functools.partial(endpoint, "a"))
    assert await mode_answered(starlette_app(database, Route("/", marked))) == "transactional"


async def test_the_mark_on_an_endpoint_class_counts_for_methods_without_one(
    database: Database,
) -> None:
    @transactional
    class Endpoint(HTTPEndpoint):
        @read_only
        async def get(self, request: Request) -> Response:
            return await answer_mode(request)

        async def post(self, request: Request) -> Response:
            return await answer_mode(request)

    app = starlette_app(database, Mount("/mounted", routes=[Route("/", Endpoint)]))
    assert await mode_answered(app, "GET", "/mounted/") == "read_only"
    assert await mode_answered(app, "POST", "/mounted/") == "transactional"


async def test_the_mark_of_an_endpoint_class_is_inherited(database: Database) -> None:
    @transactional
    class Base(HTTPEndpoint):
        async def get(self, request: Request) -> Response:
            return await answer_mode(request)

    class Inherited(Base):
        pass

    assert await mode_answered(starlette_app(database, Route("/", Inherited))) == "transactional"


async def test_head_is_served_in_the_mode_of_get(database: Database) -> None:
    seen: list[Mode] = []

    class Endpoint(HTTPEndpoint):
        @transactional
        async def get(self, request: Request) -> Response:
            seen.append(mode_in_force(request.scope))
            return PlainTextResponse("")

    await call(starlette_app(database, Route("/", Endpoint)), method="HEAD")
    assert seen == [transactional]


# -- Litestar ----------------------------------------------------------------------------------


def litestar_app(database: Database, *handlers: Any, **options: Any) -> Litestar:
    return Litestar(
        list(handlers),
        middleware=[DefineMiddleware(DBSessionMiddleware, database=database)],
        openapi_config=None,
        logging_config=None,
        **options,
    )


async def litestar_mode(request: LitestarRequest[Any, Any, Any]) -> str:
    return mode_in_force(request.scope).name


async def test_the_mark_on_a_litestar_handler_counts(database: Database) -> None:
    @get("/")
    @transactional
    async def handler(request: LitestarRequest[Any, Any, Any]) -> str:
        return await litestar_mode(request)

    assert await mode_answered(litestar_app(database, handler)) == "transactional"


@pytest.mark.parametrize("sync_to_thread", [False, True])
async def test_the_mark_on_a_synchronous_litestar_handler_counts(
    database: Database, sync_to_thread: bool
) -> None:
    @get("/", sync_to_thread=sync_to_thread)
    @transactional
    def handler(request: LitestarRequest[Any, Any, Any]) -> str:
        return mode_in_force(request.scope).name

    assert await mode_answered(litestar_app(database, handler)) == "transactional"


async def test_marks_in_litestar_are_stronger_the_nearer_they_are_to_the_code(
    database: Database,
) -> None:
    @transactional
    class Marked(Controller):
        path = "/marked"
        opt = {"db": plain}

        @get("/own")
        @read_only
        async def own(self, request: LitestarRequest[Any, Any, Any]) -> str:
            return await litestar_mode(request)

        @get("/class")
        async def of_class(self, request: LitestarRequest[Any, Any, Any]) -> str:
            return await litestar_mode(request)

    class Unmarked(Controller):
        path = "/unmarked"

        @get("/opt", opt={"db": transactional})
        async def own(self, request: LitestarRequest[Any, Any, Any]) -> str:
            return await litestar_mode(request)

        @get("/app")
        async def of_app(self, request: LitestarRequest[Any, Any, Any]) -> str:
            return await litestar_mode(request)

    app = litestar_app(database, Marked, Unmarked, opt={"db": read_only})
    assert await mode_answered(app, path="/marked/own") == "read_only"
    assert await mode_answered(app, path="/marked/class") == "transactional"
    assert await mode_answered(app, path="/unmarked/opt") == "transactional"
    assert await mode_answered(app, path="/unmarked/app") == "read_only"


@pytest.mark.parametrize("option", ["transaction", True, type(transactional)])
async def test_an_opt_that_is_no_mode_is_an_error_with_the_route(
    database: Database, option: Any, caplog: pytest.LogCaptureFixture
) -> None:
    raised: list[BaseException] = []

    async def note(error: Exception, scope: Any) -> None:
        raised.append(error)

    @get("/", opt={"db": option})
    async def handler(request: LitestarRequest[Any, Any, Any]) -> str:
        await request.state.db.execute(text("SELECT 1"))
        return ""

    app = litestar_app(database, handler, after_exception=[note])
    assert (await call(app, method="GET")).status == 500
    assert isinstance(raised[0], TypeError)
    assert "opt['db'] is" in str(raised[0])
    assert "it takes a mode: plain, transactional or read_only" in str(raised[0])
    assert str(raised[0]).startswith("GET /")
