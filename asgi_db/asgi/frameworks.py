"""What each framework writes into the ASGI scope, and what its adapter is needed for.

The core imports no framework. It reads the scope, where each leaves its mark after routing:

| framework          | the endpoint             | the error handlers               |
| ------------------ | ------------------------ | -------------------------------- |
| Starlette, FastAPI | `scope["endpoint"]`      | `"starlette.exception_handlers"` |
| Litestar           | `scope["route_handler"]` | inside the app `"litestar_app"`  |

An adapter is loaded only where a failed COMMIT has to reach the application's exception handlers,
or a request is run again; the framework that wrote these marks is loaded already.
"""

from __future__ import annotations

import copy
import functools
import inspect
from importlib import import_module
from typing import Any

from asgi_db.modes import MODE_ATTRIBUTE, Mode
from asgi_db.types import Receive, Scope, Send

_ROUTES = 1024
"""How many routes are remembered with what was found out about them."""


def marks_of(scope: Scope) -> Scope:
    """Return the part of a scope that says which route it was, for when the call is over."""
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
    """Return a scope which an application can write into without changing this one."""
    copied = dict(scope)
    if "state" in copied:
        copied["state"] = copy.copy(copied["state"])
    if "litestar_app" in copied:
        _adapter("litestar_app").copy_connection_state(copied)
    return copied


def mode_of_route(scope: Scope, key: str) -> Mode | None:
    """Return the mode that the route of this request sets, or None.

    The decorator on the function or method is stronger than the one on its class, and that is
    stronger than Litestar's `opt={key: mode}`.

    Raises:
        TypeError: `opt[key]` holds something that is not a mode.
    """
    handler, endpoint = scope.get("route_handler"), scope.get("endpoint")
    if handler is not None:
        endpoint = _endpoint(scope)
    elif endpoint is None:
        return None
    try:
        mode = _mark(endpoint, scope.get("method"))
    except TypeError:  # an endpoint that cannot be hashed
        mode = _mark.__wrapped__(endpoint, scope.get("method"))
    return mode if mode is not None or handler is None else _litestar_option(scope, key)


@functools.lru_cache(maxsize=_ROUTES)
def _mark(endpoint: Any, method: str | None) -> Mode | None:
    """The mode that a decorator has set, on the object that is nearest to the code."""
    places = _layers(endpoint)
    if inspect.isclass(endpoint):  # Starlette's HTTPEndpoint: one method for each HTTP method
        names = ("head", "get") if method == "HEAD" else ((method or "").lower(),)
        places = [*(getattr(endpoint, name, None) for name in names), *places]
    marks = (getattr(place, MODE_ATTRIBUTE, None) for place in places)
    return next((mark for mark in marks if mark is not None), None)


def _endpoint(scope: Scope) -> Any:
    if _litestar_is_innermost(scope):
        return getattr(scope["route_handler"], "fn", None)
    return scope.get("endpoint")


def _litestar_is_innermost(scope: Scope) -> bool:
    """Whether it was Litestar that has found the endpoint: each may be mounted in the other."""
    if scope.get("route_handler") is None or scope.get("endpoint") is None:
        return scope.get("route_handler") is not None
    last = next(key for key in reversed(scope) if key in ("endpoint", "route_handler"))
    return bool(last == "route_handler")


def _layers(endpoint: Any) -> list[Any]:
    """An endpoint, what it wraps, and last the class of which it is a method."""
    layers = list[Any]()
    layer, owner = endpoint, None
    while layer is not None and len(layers) < _MOST_LAYERS:
        layers.append(layer)
        owner = getattr(layer, "__self__", owner)  # a method of one of Litestar's controllers
        layer = (
            getattr(layer, "func", None)  # functools.partial; Litestar's `sync_to_thread=True`
            # Litestar's `websocket_listener` has no public way to its function; the test of
            # listeners in `test_litestar.py` breaks when this changes.
            or getattr(layer, "_fn", None)
        )
    if layers and not hasattr(layers[-1], "__qualname__") and callable(layers[-1]):
        layers.append(type(layers[-1]).__call__)  # an object that can be called
    return [*layers, owner]


_MOST_LAYERS = 20
"""A mock has any attribute that it is asked for, without end."""


def _litestar_option(scope: Scope, key: str) -> Mode | None:
    option = scope["route_handler"].opt.get(key)
    if option is not None and not isinstance(option, Mode):
        raise TypeError(
            f"{describe_route(scope)}: opt[{key!r}] is {option!r}; it takes a mode: plain,"
            " transactional or read_only."
        )
    return option


def describe_route(scope: Scope) -> str:
    """Name the route of this request for a log line or an error: `POST /orders (create_order)`."""
    method = scope.get("method") or scope["type"].upper()
    return _name(method, _template(scope) or scope.get("path", ""), _endpoint(scope))


def name_of_route(scope: Scope) -> str:
    """Name the route of this request among the routes of the application.

    As `describe_route` does, but without what a client is free to invent.
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
"""Any other is `_OTHER`, as in OpenTelemetry's conventions for `http.request.method`."""


def _template(scope: Scope) -> str:
    template = scope.get("path_template")  # Litestar
    return template or getattr(scope.get("route"), "path", None) or ""  # Starlette, FastAPI


def _name(method: str, path: str, endpoint: Any) -> str:
    *_, innermost, _ = (None, *_layers(endpoint))  # the innermost function has the name
    where = f"{method} {path}".rstrip()
    name = getattr(innermost, "__qualname__", None) or type(innermost).__name__
    return where if innermost is None else f"{where} ({name})"


_cached_name = functools.lru_cache(maxsize=_ROUTES)(_name)


def has_handler(scope: Scope, error: Exception) -> bool:
    """Say whether the application itself has a handler for this error, or a base of it.

    One for every `Exception` does not count: it is for what nobody has thought of.
    """
    if "route_handler" in scope:  # Litestar
        handlers = scope["route_handler"].resolve_exception_handlers()
    else:
        handlers, _ = scope.get("starlette.exception_handlers", ({}, {}))
    mine = (Exception, BaseException, object)
    return any(base in handlers for base in type(error).__mro__ if base not in mine)


def reopen_response(scope: Scope) -> None:
    """Tell the framework that the response which it has just begun was not sent.

    Litestar notes a response as begun before it calls `send`, and would then refuse to answer
    the error that `send` raises. Starlette keeps that note where nobody can reach it: there the
    error is answered afterwards, by `answer_error`.
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
    """Answer a failed COMMIT as the application answers what its endpoints raise.

    Args:
        error: what came out of the application after `send` had raised the commit error.
        commit_error: why the unit of work could not be committed.
        enclosing_app: the Starlette application that the middleware is part of, if it is.

    Raises:
        Exception: no handler of the application takes the error.
    """
    if "starlette.exception_handlers" in scope:
        adapter = _adapter("starlette.exception_handlers")
        await adapter.answer_error(error, commit_error, enclosing_app, scope, receive, send)
    else:
        raise commit_error
