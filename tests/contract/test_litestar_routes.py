"""Litestar's layers: where a mode, and where an exception handler may stand."""

from collections.abc import Callable
from typing import Any

import pytest
from litestar import Controller, Litestar, Request, Router, post
from sqlalchemy.exc import DBAPIError

from asgi_db import (
    DBSession,
    DBSessionMiddleware,
    plain,
    read_only,
    transactional,
)
from asgi_db.errors import ReadOnlyError
from asgi_db.types import ASGIApp
from asgi_db_litestar import DatabasePlugin
from tests.contract.apps import InLitestar, litestar_handlers
from tests.contract.client import Exchange
from tests.contract.endpoints import Answer
from tests.contract.site import BAD_STATEMENT, Site, write
from tests.versions import NamedDependency

pytestmark = pytest.mark.parametrize("framework", [InLitestar()], ids=["litestar"])

LAYERS = ["handler", "controller", "router", "app"]


class Layers:
    """An application of four layers, each with options of its own."""

    def __init__(self, site: Site, **options: dict[str, Any]) -> None:
        self.site = site
        self.options = options
        self.decorators: dict[str, Callable[[Any], Any]] = {}
        self.fails = False

    def decorate(self, layer: str, target: Any) -> Any:
        """The handler or controller with its decorator, if it has one."""
        return self.decorators[layer](target) if layer in self.decorators else target

    def app(self) -> ASGIApp:
        """Make the application of `/order` and of `/refuse`, whose error the handler raises."""
        site, fails = self.site, self.fails

        async def order(self: Any, request: Request[Any, Any, Any]) -> str:
            session: DBSession = request.state.db
            await write()(session)
            await session.flush()
            if fails:
                await site.spoil_commit(session)
            return "ordered"

        async def refuse(self: Any, request: Request[Any, Any, Any]) -> str:
            session: DBSession = request.state.db
            await write()(session)
            await session.execute(BAD_STATEMENT)
            return "ordered"

        options = self.options
        handle = post("/order", **options.get("handler", {}))
        handle_refused = post("/refuse", **options.get("handler", {}))
        body = {
            "order": handle(self.decorate("handler", order)),
            "refuse": handle_refused(self.decorate("handler", refuse)),
        }
        controller: Any = type("Orders", (Controller,), body | options.get("controller", {}))
        router = Router(
            "/",
            route_handlers=[self.decorate("controller", controller)],
            **options.get("router", {}),
        )
        return Litestar(
            [router],
            plugins=[DatabasePlugin(site.database)],
            openapi_config=None,
            logging_config=None,
            **options.get("app", {}),
        )


def opt(mode: object) -> dict[str, Any]:
    """The options of a layer that sets this mode."""
    return {"opt": {"db": mode}}


@pytest.mark.parametrize("layer", LAYERS)
async def test_a_mode_may_stand_in_the_opt_of_each_layer(site: Site, layer: str) -> None:
    exchange = await site.call(Layers(site, **{layer: opt(transactional)}).app(), "/order")
    assert (exchange.status, exchange.body) == (201, b"ordered")
    assert await site.items() == ["a"]


@pytest.mark.parametrize("layer", LAYERS[:2])
async def test_a_mode_may_decorate_the_handler_or_the_controller(site: Site, layer: str) -> None:
    layers = Layers(site)
    layers.decorators = {layer: transactional}
    exchange = await site.call(layers.app(), "/order")
    assert (exchange.status, exchange.body) == (201, b"ordered")
    assert await site.items() == ["a"]


@pytest.mark.parametrize("inner", [1, 2, 3])
async def test_the_opt_of_the_inner_layer_wins(site: Site, inner: int) -> None:
    outer = {layer: opt(read_only) for layer in LAYERS[inner:]}
    app = Layers(site, **outer, **{LAYERS[inner - 1]: opt(transactional)}).app()
    exchange = await site.call(app, "/order")
    assert (exchange.status, exchange.body) == (201, b"ordered")
    assert await site.items() == ["a"]


async def test_a_decorator_wins_over_the_opt_and_that_of_the_handler_over_all(site: Site) -> None:
    layers = Layers(site, handler=opt(read_only))
    layers.decorators = {"handler": transactional, "controller": plain}
    exchange = await site.call(layers.app(), "/order")
    assert (exchange.status, exchange.body) == (201, b"ordered")
    assert await site.items() == ["a"]


async def test_an_opt_may_name_a_mode(site: Site) -> None:
    exchange = await site.call(Layers(site, app=opt("transactional")).app(), "/order")
    assert (exchange.status, exchange.body) == (201, b"ordered")
    assert await site.items() == ["a"]


async def test_an_opt_that_is_no_mode_is_an_error_which_says_what_it_takes(site: Site) -> None:
    app = Layers(
        site,
        app={
            **opt("transactinal"),
            "exception_handlers": litestar_handlers({TypeError: Answer(501, b"no mode")}),
        },
    ).app()
    exchange = await site.call(app, "/order")
    assert (exchange.status, exchange.body) == (501, b"no mode")
    assert await site.items() == []


@pytest.mark.parametrize("layer", [*LAYERS, None])
async def test_a_failed_commit_is_answered_on_the_layer_that_handles_it(
    site: Site, layer: str | None
) -> None:
    """Just as an error which the handler raises."""
    chosen = {"exception_handlers": litestar_handlers({DBAPIError: Answer(409, b"handled")})}
    options: dict[str, dict[str, Any]] = {"app": opt(transactional)}
    if layer is not None:
        options[layer] = {**options.get(layer, {}), **chosen}
    layers = Layers(site, **options)
    layers.fails = True
    app = layers.app()
    raised, failed = await site.call(app, "/refuse"), await site.call(app, "/order")
    if layer is not None or site.unhandled == 500:
        assert (failed.status, failed.body) == (raised.status, raised.body)
    assert failed.status == (site.unhandled if layer is None else 409)
    assert await site.items() == []


async def test_the_hooks_of_the_application_see_a_failed_commit_as_a_raised_error(
    site: Site,
) -> None:
    seen: list[type[BaseException]] = []

    async def after_exception(error: Exception, scope: Any) -> None:
        seen.append(type(error))

    options = {**opt(transactional), "after_exception": [after_exception]}
    layers = Layers(site, app=options)
    layers.fails = True
    exchange = await site.call(layers.app(), "/order")
    assert (exchange.status, exchange.error) == (site.unhandled, None)
    assert [issubclass(kind, site.commit_error) for kind in seen] == [True]


async def serve(site: Site, handler: Any) -> Exchange:
    """Serve one request with this handler."""
    app = Litestar(
        [handler],
        plugins=[DatabasePlugin(site.database)],
        openapi_config=None,
        logging_config=None,
    )
    return await site.call(app)


async def test_an_answer_that_cannot_be_serialised_rolls_back(site: Site) -> None:
    @post("/")
    async def order(db_session_transaction: NamedDependency[DBSession]) -> Any:
        await write()(db_session_transaction)
        await db_session_transaction.flush()
        return object()

    exchange = await serve(site, order)
    assert (exchange.status, exchange.complete) == (500, True)
    assert await site.items() == []


async def test_two_providers_share_the_session_and_the_stronger_mode_wins(site: Site) -> None:
    @post("/")
    async def order(
        db_session_read_only: NamedDependency[DBSession],
        db_session_transaction: NamedDependency[DBSession],
        db_session: NamedDependency[DBSession],
    ) -> bool:
        await write()(db_session)
        return db_session is db_session_read_only is db_session_transaction

    exchange = await serve(site, order)
    assert (exchange.status, exchange.body) == (201, b"true")
    assert await site.items() == ["a"]


async def test_the_provider_of_reads_refuses_writes(site: Site) -> None:
    refused: list[str] = []

    @post("/")
    async def order(db_session_read_only: NamedDependency[DBSession]) -> str:
        await write()(db_session_read_only)
        try:
            await db_session_read_only.flush()
        except ReadOnlyError as error:
            refused.append(str(error))
        return "refused"

    exchange = await serve(site, order)
    assert (exchange.status, exchange.body) == (201, b"refused")
    assert "POST / (" in refused[0]
    assert site.opened == 0


async def test_a_route_that_does_not_exist_is_a_404(site: Site) -> None:
    app = DBSessionMiddleware(Layers(site).app(), database=site.database)
    exchange = await site.call(app, "/nowhere")
    assert (exchange.status, exchange.complete, site.opened) == (404, True, 0)
