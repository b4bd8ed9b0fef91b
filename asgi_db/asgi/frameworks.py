"""What each framework writes into the ASGI scope, and what its adapter is for.

The core imports no framework. It reads the marks that each one leaves in the scope after routing:

| framework          | the endpoint             | the error handlers               |
| ------------------ | ------------------------ | -------------------------------- |
| Starlette, FastAPI | `scope["endpoint"]`      | `"starlette.exception_handlers"` |
| Litestar           | `scope["route_handler"]` | inside the app `"litestar_app"`  |

An adapter is imported only when a failed COMMIT has to reach the application's exception handlers,
or when a request is run again; the framework that left the marks has been imported already.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from asgi_db.asgi.marks import layers, mark_of, refuse_marked_dependencies
from asgi_db.errors import ConfigurationError
from asgi_db.modes import Mode, as_mode
from asgi_db.types import ASGIApp, Receive, Scope, Send

_ROUTES = 1024
"""For how many routes the name is cached."""


def marks_of(scope: Scope) -> Scope:
    """Return the part of a scope that identifies its route, for use after the call has ended."""
    get = scope.get
    return {
        "type": scope["type"],
        "method": get("method"),
        "path": get("path"),
        "endpoint": get("endpoint"),
        "route": get("route"),
        "route_handler": get("route_handler"),
        "path_template": get("path_template"),
    }


_ADAPTERS = {
    "litestar_app": "asgi_db_litestar",
    "starlette.exception_handlers": "asgi_db_starlette",
}
"""The adapter for each framework, by the mark that the framework leaves in the scope."""


def _adapter(mark: str) -> Any:
    return import_module(_ADAPTERS[mark])


def copy_scope(scope: Scope) -> Scope:
    """Return a copy of a scope, which an application can change without changing this one."""
    copied = dict(scope)
    if "state" in copied:
        copied["state"] = copy.copy(copied["state"])
    if "litestar_app" in copied:
        _adapter("litestar_app").copy_connection_state(copied)
    return copied


def mode_of_route(scope: Scope, key: str) -> Mode | None:
    """Return the mode that the route of this request sets, or None.

    A decorator on the function or method takes precedence over one on its class, which takes
    precedence over Litestar's `opt={key: mode}`.

    Raises:
        TypeError: `opt[key]` holds something that is not a mode.
        ConfigurationError: another decorator hides the mark from the library.
    """
    handler, endpoint = scope.get("route_handler"), scope.get("endpoint")
    if handler is not None:
        endpoint = _endpoint(scope)
    elif endpoint is None:
        return None
    try:
        mode = mark_of(endpoint, scope.get("method"))
    except TypeError:  # an endpoint that cannot be hashed
        mode = mark_of.__wrapped__(endpoint, scope.get("method"))
    return mode if mode is not None or handler is None else _litestar_option(scope, key)


def check_routes(scope: Scope, key: str) -> None:
    """Look for marks that the library cannot see, when an application starts.

    Args:
        scope: the scope of the lifespan.
        key: the key of the middleware, and of Litestar's `opt`.

    Raises:
        ConfigurationError: another decorator hides the mark of a route, or it stands on one of its
            dependencies.
        TypeError: Litestar's `opt[key]` holds something that is not a mode.
    """
    for route in _routes(scope.get("litestar_app") or scope.get("app")):
        is_class = isinstance(route.get("endpoint"), type)
        for method in _CLASS_METHODS if is_class else (None,):
            if mode_of_route({"type": "http", "method": method, **route}, key) is None:
                refuse_marked_dependencies(route.get("route"))


_CLASS_METHODS = "GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"


def _routes(holder: Any, depth: int = 0) -> Iterator[Scope]:
    """The routes of an application or router, and of all that is mounted in it.

    Each is what the framework writes into the scope of a request.
    """
    if depth > _MAX_DEPTH:
        return
    for route in getattr(holder, "routes", None) or ():
        if (endpoint := getattr(route, "endpoint", None)) is not None:
            yield {"endpoint": endpoint, "route": route}
        # Litestar has handlers, and FastAPI's routers keep what was included into them.
        for handler in getattr(route, "route_handlers", None) or ():
            yield {"route_handler": handler}
        mounted = getattr(route, "app", None) or getattr(route, "original_router", None)
        yield from _routes(route if hasattr(route, "routes") else mounted, depth + 1)


_MAX_DEPTH = 10
"""A mock has every attribute, and an application may be mounted in itself."""


def _endpoint(scope: Scope) -> Any:
    if _litestar_is_innermost(scope):
        return getattr(scope["route_handler"], "fn", None)
    return scope.get("endpoint")


def _litestar_is_innermost(scope: Scope) -> bool:
    """Whether Litestar found the endpoint: each framework may be mounted in the other."""
    if scope.get("route_handler") is None or scope.get("endpoint") is None:
        return scope.get("route_handler") is not None
    last = next(key for key in reversed(scope) if key in ("endpoint", "route_handler"))
    return bool(last == "route_handler")


def _litestar_option(scope: Scope, key: str) -> Mode | None:
    option = scope["route_handler"].opt.get(key)
    if option is None or isinstance(option, Mode):
        return option
    try:
        return as_mode(option, f"opt[{key!r}]")
    except ConfigurationError:
        raise TypeError(
            f"{describe_route(scope)}: opt[{key!r}] is {option!r}; it takes a mode: plain,"
            " transactional or read_only."
        ) from None


def describe_route(scope: Scope) -> str:
    """Name the route of this request for a log line or an error: `POST /orders (create_order)`."""
    method = scope.get("method") or scope["type"].upper()
    return _name(method, _template(scope) or scope.get("path", ""), _endpoint(scope))


def name_of_route(scope: Scope) -> str:
    """Name the route of this request among the routes of the application.

    Like `describe_route`, but without anything that a client can make up.
    """
    method = scope.get("method") or scope["type"].upper()
    method = method if method in _METHODS else "_OTHER"
    handler, endpoint = scope.get("route_handler"), scope.get("endpoint")
    if handler is not None:
        return _name(method, _template(scope), _endpoint(scope))
    path = getattr(scope.get("route"), "path", None) or ""
    try:
        return _cached_name(method, path, endpoint)
    except TypeError:  # an endpoint that cannot be hashed
        return _name(method, path, endpoint)


_METHODS = frozenset(
    {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "QUERY"}
    | {"WEBSOCKET"}
)
"""Any other method counts as `_OTHER`, as in OpenTelemetry's `http.request.method`."""


def _template(scope: Scope) -> str:
    # Litestar sets the first, Starlette and FastAPI the second.
    template = scope.get("path_template")
    return template or getattr(scope.get("route"), "path", None) or ""


def _name(method: str, path: str, endpoint: Any) -> str:
    # The name is that of the innermost function.
    *_, innermost, _ = (None, *layers(endpoint))
    where = f"{method} {path}".rstrip()
    name = getattr(innermost, "__qualname__", None) or type(innermost).__name__
    return where if innermost is None else f"{where} ({name})"


_cached_name = functools.lru_cache(maxsize=_ROUTES)(_name)


def supports_lifespan(app: ASGIApp, scope: Scope) -> bool:
    """Return whether an application belongs to a framework, all of which have a lifespan.

    Args:
        app: the application, which may be surrounded by middleware.
        scope: the scope of its lifespan.
    """
    if "app" in scope:  # All of them set this, before their own middleware is called.
        return True
    *_, innermost = surrounded(app)
    modules = {kind.__module__.partition(".")[0] for kind in inspect.getmro(type(innermost))}
    return bool(modules & {"starlette", "fastapi", "litestar"})


def surrounded(app: object) -> Iterator[object]:
    """Return an application and what it surrounds, from the outside to the inside.

    Middleware keeps what it surrounds in the attribute `app`, by convention.
    """
    seen = set[int]()
    while app is not None and id(app) not in seen:
        seen.add(id(app))
        yield app
        app = getattr(app, "app", None)


def is_framework_task(task: asyncio.Task[Any]) -> bool:
    """Return whether the framework itself has started this task.

    Litestar resolves independent dependencies side by side, and ends them so, in task groups of
    anyio's, which name each task after the function that it runs; `test_litestar_providers.py`
    breaks when this changes.
    """
    return task.get_name().startswith("litestar.")


def has_handler(scope: Scope, error: Exception) -> bool:
    """Return whether the application has a handler for this error, or for a base class of it.

    A handler for every `Exception` does not count: it is meant for unexpected errors.
    """
    if "route_handler" in scope:  # Only Litestar sets this.
        handlers = scope["route_handler"].resolve_exception_handlers()
    else:
        handlers, _ = scope.get("starlette.exception_handlers", ({}, {}))
    catch_all = (Exception, BaseException, object)
    return any(base in handlers for base in type(error).__mro__ if base not in catch_all)


def reopen_response(scope: Scope) -> None:
    """Tell the framework that the response it has just begun was not sent.

    Litestar marks a response as begun before it calls `send`, and would then refuse to answer
    the error that `send` raises. Starlette keeps this mark in a local variable, which cannot be
    changed from here; with Starlette, `answer_error` answers the error afterwards.
    """
    if "litestar_app" in scope and (scope.get("endpoint") is None or _litestar_is_innermost(scope)):
        _adapter("litestar_app").reopen_response(scope)


async def answer_error(
    error: BaseException,
    commit_error: Exception,
    enclosing_app: object,
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    """Answer a failed COMMIT as the application answers the errors of its endpoints.

    Args:
        error: what the application raised after `send` had raised the commit error.
        commit_error: why the unit of work could not be committed.
        enclosing_app: the Starlette application that the middleware is part of, if any.

    Raises:
        Exception: the application has no handler for the error.
    """
    if "starlette.exception_handlers" in scope:
        adapter = _adapter("starlette.exception_handlers")
        await adapter.answer_error(error, commit_error, enclosing_app, scope, receive, send)
    else:
        raise commit_error
