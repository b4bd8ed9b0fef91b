"""Where a mode's decorator may stand, as seen from the function that the framework calls.

A framework calls what was registered as the route: often not the function that `@transactional`
has marked, but a decorator's wrapper around it. Followed are `functools.wraps`, which copies the
mark, `functools.partial`, and what the known wrappers leave. A wrapper that leaves nothing hides
the mark: the route would silently run in another mode, so that is an error.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

from asgi_db.errors import ConfigurationError
from asgi_db.modes import CLASS_MODE_ATTRIBUTE, MODE_ATTRIBUTE, Mode

_ROUTES = 1024
"""For how many routes the mode is cached."""

_MAX_LAYERS = 20
"""A mock has every attribute, so that unwrapping it would never end."""

_INNER = ("func", "_fn", "__wrapped__", "__dishka_orig_func__")
"""The attributes in which wrappers keep the function that they wrap.

`functools.partial` has the first, which Litestar uses for `sync_to_thread=True`. Litestar's
`websocket_listener` has the second, and offers no public access to its function; the test of
listeners in `test_litestar.py` breaks when this changes. The last is that of dishka's `@inject`.
"""

_EVENTS = ("on_connect", "on_receive", "on_disconnect")
"""The methods of Starlette's `WebSocketEndpoint`, which has one mode for all of them."""


@functools.lru_cache(maxsize=_ROUTES)
def mark_of(endpoint: Any, method: str | None) -> Mode | None:
    """Return the mode that a decorator has set; the one closest to the code takes precedence.

    Raises:
        ConfigurationError: a decorator has set one where the library cannot tell that it is meant
            for this route.
    """
    places = layers(endpoint)
    if inspect.isclass(endpoint):
        # Starlette's `HTTPEndpoint` has one method for each HTTP method.
        names = ("head", "get") if method == "HEAD" else ((method or "").lower(),)
        methods = (getattr(endpoint, name, None) for name in names)
        places = [*(layer for one in methods for layer in layers(one)[:-1]), *places]
    places.append(_view_class(endpoint))
    for attribute in MODE_ATTRIBUTE, CLASS_MODE_ATTRIBUTE:
        for place in places:
            mark: Mode | None = getattr(place, attribute, None)
            if mark is not None:
                return mark
    _refuse_hidden(endpoint, places)
    return None


def layers(endpoint: Any) -> list[Any]:
    """An endpoint, the functions that it wraps, and finally the class of which it is a method."""
    found = list[Any]()
    layer, owner = endpoint, None
    while layer is not None and len(found) < _MAX_LAYERS:
        found.append(layer)
        # Only a method has `__self__`, for example one of a Litestar controller.
        owner = getattr(layer, "__self__", owner)
        inner = (getattr(layer, name, None) for name in _INNER)
        layer = next((one for one in inner if one is not None), None)
    if found and not hasattr(found[-1], "__qualname__") and callable(found[-1]):
        # The endpoint is a callable object.
        found.append(type(found[-1]).__call__)
    return [*found, owner]


def _view_class(endpoint: Any) -> Any:
    """The class of a class-based view, where it is a dependency: `self=Depends(Orders)`.

    The `@cbv` of fastapi-utils makes its methods into such functions.
    """
    if not isinstance(endpoint, FunctionType):
        return None
    try:
        first = next(iter(inspect.signature(endpoint).parameters.values()), None)
    except (TypeError, ValueError):
        return None
    found = getattr(None if first is None else first.default, "dependency", None)
    return found if inspect.isclass(found) else None


# -- marks that cannot be seen -----------------------------------------------------------------


def _refuse_hidden(endpoint: Any, places: list[Any]) -> None:
    if inspect.isclass(endpoint):
        for name in _EVENTS:
            if (mark := getattr(getattr(endpoint, name, None), MODE_ATTRIBUTE, None)) is not None:
                raise ConfigurationError(
                    f"@{mark.name} stands on {endpoint.__qualname__}.{name}, and a socket has one"
                    f" mode: put @{mark.name} on the class {endpoint.__qualname__}."
                )
    for hidden in _reachable(endpoint, places):
        mark = getattr(hidden, MODE_ATTRIBUTE, None)
        if mark is not None:
            raise ConfigurationError(
                f"@{mark.name} stands on {_name(hidden)}, and another decorator hides it: the"
                f" route's own function is {_name(endpoint)}, which has no mode. Put @{mark.name}"
                " above that decorator, directly below the route, or let the decorator use"
                " functools.wraps."
            )


def refuse_marked_dependencies(route: Any) -> None:
    """Refuse a mode on a dependency of FastAPI, where it has no effect; the route has none.

    Raises:
        ConfigurationError: there is one.
    """
    waiting = [getattr(route, "dependant", None)]
    while waiting:
        dependant = waiting.pop()
        inner: Any = getattr(dependant, "dependencies", None)
        waiting.extend(inner or ())
        call = getattr(dependant, "call", None)
        mark = getattr(call, MODE_ATTRIBUTE, None)
        if isinstance(mark, Mode):
            raise ConfigurationError(
                f"@{mark.name} stands on {_name(call)}, which is a dependency, and a mode belongs"
                f" to a route: put @{mark.name} on {_name(route.dependant.call)}, or let the"
                " dependency take the session of that mode, such as CurrentSessionTransaction."
            )


def _reachable(endpoint: Any, places: list[Any]) -> Iterator[Any]:
    """The functions and classes that a wrapper has hold of, nearest first."""
    waiting = [one for place in places for one in _held_by(place)]
    if not inspect.isclass(endpoint):
        # What wraps may be a callable object.
        waiting.extend(filter(_can_hold_a_mark, getattr(endpoint, "__dict__", {}).values()))
    seen = {id(place) for place in places}
    while waiting and len(seen) < 10 * _MAX_LAYERS:
        one = waiting.pop(0)
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting.extend(_held_by(one))


def _held_by(holder: Any) -> Iterator[Any]:
    """The functions and classes that this one has hold of."""
    held: list[Any] = []
    if isinstance(holder, FunctionType):
        held = [*_closure(holder), *vars(holder).values()]
    elif isinstance(holder, MethodType):
        held = [holder.__func__]
    elif isinstance(holder, functools.partial):
        held = [holder.func, *holder.args, *holder.keywords.values()]
    return filter(_can_hold_a_mark, held)


def _can_hold_a_mark(one: Any) -> bool:
    return isinstance(one, FunctionType | MethodType | functools.partial | type)


def _closure(function: FunctionType) -> Iterator[Any]:
    """What the function has hold of from the functions around it.

    Not what is defined side by side with it: it may name that, but does not wrap it.
    """
    for cell in function.__closure__ or ():
        try:
            held = cell.cell_contents
        except ValueError:  # It is still empty.
            continue
        if _scope(held) != _scope(function):
            yield held


def _scope(target: Any) -> tuple[str | None, str]:
    """The module and the class or function in which something is defined."""
    name: str = getattr(target, "__qualname__", "")
    return getattr(target, "__module__", None), name.rpartition(".")[0]


def _name(target: Any) -> str:
    return getattr(target, "__qualname__", None) or type(target).__qualname__
