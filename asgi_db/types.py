"""ASGI's types, in a form that every framework's own types accept.

Starlette types scopes and messages as mutable mappings, Litestar and asgiref as unions of
TypedDicts, and neither takes the other's: hence `Any` for the two.
Source: https://asgi.readthedocs.io/en/latest/specs/main.html
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

Scope: TypeAlias = Any
Message: TypeAlias = Any
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
