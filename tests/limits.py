"""How long the library waits for something, which a test shortens or lengthens for itself.

The only file of the tests that knows in which modules these constants stand.
"""

from __future__ import annotations

from importlib import import_module
from typing import Literal, TypedDict, Unpack, cast

import pytest

Limit = Literal[
    "answer",
    "ask_again_after",
    "attempt",
    "cleanup",
    "commit",
    "connect",
    "connect_grace",
    "delivery",
    "dispose",
    "first_delay",
    "give_up",
    "hooks",
    "longest_delay",
    "longest_turn",
    "most_lag",
    "ping",
    "position",
    "sandbox_close",
    "sandbox_wait",
    "silent_for",
    "slow",
    "sqlite_busy",
    "verify_after_idle",
]

_CONSTANTS: dict[Limit, tuple[str, ...]] = {
    "answer": ("asgi_db.replicas.replica.ANSWER_TIMEOUT",),
    "ask_again_after": ("asgi_db.replicas.replica.ASK_AGAIN_AFTER",),
    "attempt": ("asgi_db.pool.abandoned.ATTEMPT_TIMEOUT",),
    "cleanup": (
        "asgi_db.unit.standing.CLEANUP_TIMEOUT",
        "asgi_db.unit.ending.CLEANUP_TIMEOUT",
    ),
    "commit": ("asgi_db.unit.ending.COMMIT_TIMEOUT",),
    "connect": ("asgi_db.drivers.hosts.CONNECT_TIMEOUT",),
    "connect_grace": ("asgi_db.drivers.connecting.CONNECT_GRACE",),
    "delivery": ("asgi_db.asgi.late_cancellation.DELIVERY_TIMEOUT",),
    "dispose": ("asgi_db.pool.life.DISPOSE_TIMEOUT",),
    "first_delay": ("asgi_db.asgi.retry.FIRST_DELAY",),
    "give_up": ("asgi_db.pool.abandoned.GIVE_UP_AFTER",),
    "hooks": ("asgi_db.unit.hooks.HOOKS_TIMEOUT",),
    "longest_delay": ("asgi_db.asgi.retry.LONGEST_DELAY",),
    "longest_turn": ("asgi_db.asgi.turns.LONGEST_TURN",),
    "most_lag": ("asgi_db.cli.replicas.MOST_LAG", "asgi_db.replicas.history.MOST_LAG"),
    "ping": ("asgi_db.pool.ping.PING_TIMEOUT",),
    "position": ("asgi_db.replicas.commits.POSITION_TIMEOUT",),
    "sandbox_close": ("asgi_db.testing.shared.CLOSE_TIMEOUT",),
    "sandbox_wait": ("asgi_db.testing.shared.WAIT_TIMEOUT",),
    "silent_for": ("asgi_db.drivers.hosts.SILENT_FOR",),
    "slow": ("asgi_db.dashboard.recorder.SLOW",),
    "sqlite_busy": ("asgi_db.drivers.sqlite.SQLITE_BUSY_TIMEOUT",),
    "verify_after_idle": ("asgi_db.pool.connections.VERIFY_AFTER_IDLE",),
}
"""Where each one stands: more than one place if a module imports it from another."""


class Limits(TypedDict, total=False):
    """The limits that a test sets, in seconds."""

    answer: float
    ask_again_after: float
    attempt: float
    cleanup: float
    commit: float
    connect: float
    connect_grace: float
    delivery: float
    dispose: float
    first_delay: float
    give_up: float
    hooks: float
    longest_delay: float
    longest_turn: float
    most_lag: float
    ping: float
    position: float
    sandbox_close: float
    sandbox_wait: float
    silent_for: float
    slow: float
    sqlite_busy: float
    verify_after_idle: float


def set_limits(monkeypatch: pytest.MonkeyPatch, **limits: Unpack[Limits]) -> None:
    """Let the library wait this long, until the end of the test."""
    for name, seconds in cast("dict[Limit, float]", limits).items():
        for constant in _CONSTANTS[name]:
            monkeypatch.setattr(constant, seconds)


def limit(name: Limit) -> float:
    """How long the library waits when no test has changed it."""
    module, _, constant = _CONSTANTS[name][0].rpartition(".")
    seconds: float = getattr(import_module(module), constant)
    return seconds
