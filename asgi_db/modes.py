"""The modes: how a request's unit of work begins and ends.

A mode is a small immutable value that is also the decorator which sets it on a route:

    @app.post("/orders")
    @transactional
    async def create_order(request: Request) -> None: ...

    @app.post("/transfers")
    @transactional(isolation="SERIALIZABLE")
    async def transfer(request: Request) -> None: ...
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any, ClassVar, Literal, Self, TypeAlias, TypeVar, cast, get_args, overload

from asgi_db.errors import ConfigurationError
from asgi_db.types import Scope

Isolation: TypeAlias = Literal[
    "READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"
]
CommitRule: TypeAlias = Callable[[int], bool]
ModeDefault: TypeAlias = "Mode | Callable[[Scope], Mode]"

Target = TypeVar("Target", bound=Callable[..., Any])

MODE_ATTRIBUTE = "__asgi_db_mode__"

CLASS_MODE_ATTRIBUTE = "__asgi_db_mode_of_class__"
"""On the methods of a class that is marked: a class-based view may leave its functions alone."""

retrying: set[int] = set()
"""The `retries=` of all modes ever made; while it is empty, requests need no preparation."""


@dataclass(frozen=True, slots=True)
class Mode:
    """How a unit of work begins and ends. Use `plain`, `transactional` or `read_only`.

    Attributes:
        isolation: isolation level of the transaction; the server's default if None.
        read_only: the database refuses writes.
        deferrable: wait for a snapshot that needs no locks (PostgreSQL, with SERIALIZABLE).
        snapshot: several statements see one consistent view.
        fresh: reads from the primary, never from a replica.
        commit_on: replaces the rule "any status below 400 commits".
        timeout: seconds from the first statement to the end of the unit; no limit if None.
        retries: how often a request is run again after a conflict with another transaction.
        autocommit: whether each statement runs by itself, outside any transaction.
        characteristics: what distinguishes its transactions for the database; equal for modes
            whose transactions begin alike.
    """

    name: ClassVar[str] = "mode"
    strength: ClassVar[int] = 0
    commits: ClassVar[bool] = False
    """Whether the unit is committed when the request succeeds."""
    options: ClassVar[tuple[str, ...]] = ("timeout",)

    isolation: Isolation | None = None
    read_only: bool = False
    deferrable: bool = False
    snapshot: bool = False
    fresh: bool = False
    commit_on: CommitRule | None = None
    timeout: float | None = None
    retries: int = 0
    autocommit: bool = field(init=False, repr=False, compare=False)
    characteristics: tuple[object, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (isinstance(self.retries, int) and self.retries >= 0):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"retries={self.retries!r} must be a whole number, 0 or more.")
        if self.retries:
            retrying.add(self.retries)
        if self.timeout is not None and not (is_number(self.timeout) and self.timeout > 0):
            raise ValueError(f"timeout={self.timeout!r} must be seconds, more than 0.")
        if self.commit_on is not None and not callable(self.commit_on):
            raise ValueError(f"commit_on={self.commit_on!r} must be a function of the status.")
        if self.isolation is not None and self.isolation not in get_args(Isolation):
            levels = ", ".join(get_args(Isolation))
            raise ValueError(f"isolation={self.isolation!r} is unknown; use one of {levels}.")
        if self.deferrable and not (self.isolation == "SERIALIZABLE" and self.read_only):
            raise ValueError(
                "deferrable=True has an effect only together with isolation='SERIALIZABLE' and"
                " read_only=True (see PostgreSQL's SET TRANSACTION): add both, or leave it out."
            )
        # Every request reads these two, so they are computed once.
        like = self.name, self.isolation, self.read_only, self.deferrable, self.snapshot
        object.__setattr__(self, "characteristics", like)
        object.__setattr__(self, "autocommit", self._is_autocommit())

    def _is_autocommit(self) -> bool:
        return False

    @property
    def may_use_replica(self) -> bool:
        """Whether a unit in this mode may read from a replica; see `Database(replicas=…)`."""
        return False

    def covers(self, other: Mode) -> bool:
        """Whether this mode satisfies a request for `other`."""
        if self.strength != other.strength:
            return self.strength > other.strength
        return other in (self, type(self)())

    def _mark_or_vary(self, target: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return self._mark(*target, **options) if target else self._variant(options)

    def _mark(self, target: Target) -> Target:
        if type(target) in (staticmethod, classmethod):
            self._mark(cast(Any, target).__func__)
            return target
        # Some objects, such as a bound method, accept no attribute.
        with contextlib.suppress(AttributeError):
            if _can_be_an_endpoint(target):
                setattr(target, MODE_ATTRIBUTE, self)
                self._mark_methods(target)
                return target
        raise TypeError(
            f"@{self.name} cannot mark {target!r}: put it below the route decorator, directly on"
            " the function or class."
        )

    def _mark_methods(self, target: object) -> None:
        for method in vars(target).values() if inspect.isclass(target) else ():
            if isinstance(function := getattr(method, "__func__", method), FunctionType):
                setattr(function, CLASS_MODE_ATTRIBUTE, self)

    def _variant(self, options: dict[str, Any]) -> Self:
        unknown = ", ".join(options.keys() - self.options)
        if unknown:
            raise TypeError(
                f"{self.name}() has no option {unknown}; it takes {', '.join(self.options)}."
            )
        return replace(self, **options)


def is_number(value: object) -> bool:
    """Return whether this is a number, which True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _can_be_an_endpoint(target: object) -> bool:
    return isinstance(target, type | functools.partial) or inspect.isroutine(target)


@dataclass(frozen=True, slots=True)
class Plain(Mode):
    """BEGIN at the first statement; rolled back unless the handler committed."""

    name: ClassVar[str] = "plain"
    strength: ClassVar[int] = 1

    @overload
    def __call__(self, target: Target, /) -> Target: ...

    @overload
    def __call__(self, *, timeout: float | None = None) -> Plain: ...

    def __call__(self, *target: Any, **options: Any) -> Any:
        """Set this mode on a route, or make a variant of it.

        Args:
            timeout: seconds from the first statement to the end of the unit.
        """
        return self._mark_or_vary(target, options)


@dataclass(frozen=True, slots=True)
class Transactional(Mode):
    """BEGIN at the first statement; COMMIT before the status line, or ROLLBACK."""

    name: ClassVar[str] = "transactional"
    strength: ClassVar[int] = 2
    commits: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = (
        "isolation",
        "read_only",
        "deferrable",
        "commit_on",
        "timeout",
        "retries",
    )

    @overload
    def __call__(self, target: Target, /) -> Target: ...

    @overload
    def __call__(
        self,
        *,
        isolation: Isolation | None = None,
        read_only: bool = False,
        deferrable: bool = False,
        commit_on: CommitRule | None = None,
        timeout: float | None = None,
        retries: int = 0,
    ) -> Transactional: ...

    def __call__(self, *target: Any, **options: Any) -> Any:
        """Set this mode on a route, or make a variant of it.

        Args:
            isolation: isolation level of the transaction; the server's default if None.
            read_only: the database refuses writes in this transaction.
            deferrable: wait for a snapshot that needs no locks; PostgreSQL, with
                `isolation="SERIALIZABLE", read_only=True`.
            commit_on: `(status) -> bool`, replaces the rule "any status below 400 commits".
            timeout: seconds from the first statement to the end of the unit; then the running
                statement is cancelled, on the server too, and `DatabaseTimeoutError` is raised.
                All attempts together have this time.
            retries: how often a request is run again, with the same body and a new session, after
                a conflict with another transaction: a serialization failure, a deadlock or a lock
                timeout. Everything else that the endpoint does must be safe to repeat.

        Raises:
            ValueError: an option has a value that cannot work.
        """
        return self._mark_or_vary(target, options)


@dataclass(frozen=True, slots=True)
class ReadOnly(Mode):
    """No transaction: each statement runs by itself, and who waits holds no connection."""

    name: ClassVar[str] = "read_only"
    strength: ClassVar[int] = 0
    options: ClassVar[tuple[str, ...]] = ("snapshot", "fresh", "timeout")

    read_only: bool = True

    def _is_autocommit(self) -> bool:
        return not self.snapshot

    @property
    def may_use_replica(self) -> bool:
        return not self.fresh

    @overload
    def __call__(self, target: Target, /) -> Target: ...

    @overload
    def __call__(
        self, *, snapshot: bool = False, fresh: bool = False, timeout: float | None = None
    ) -> ReadOnly: ...

    def __call__(self, *target: Any, **options: Any) -> Any:
        """Set this mode on a route, or make a variant of it.

        Args:
            snapshot: several statements see one consistent view, and server-side cursors work;
                the connection is held from the first statement to the end of the unit.
            fresh: read from the primary, also where `Database(replicas=…)` names replicas.
            timeout: seconds from the first statement to the end of the unit.
        """
        return self._mark_or_vary(target, options)


plain = Plain()
transactional = Transactional()
read_only = ReadOnly()


_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})


def by_method(scope: Scope) -> Mode:
    """A default mode for the middleware: `read_only` for safe methods, otherwise `transactional`.

    RFC 9110, section 9.2.1, defines which methods are safe. A WebSocket has no method, and is
    therefore `transactional`.
    """
    return read_only if scope.get("method") in _SAFE_METHODS else transactional


_NAMES: dict[object, Mode] = {mode.name: mode for mode in (plain, transactional, read_only)}


def as_mode(value: object, where: str) -> Mode:
    """Return a mode, also for its name.

    Args:
        value: what was given for a mode.
        where: where it was given, for the message.

    Raises:
        ConfigurationError: it is neither a mode nor the name of one.
    """
    mode = value if isinstance(value, Mode) else _mode_named(value)
    if mode is None:
        shown = repr(value) if isinstance(value, str) else f"of type {type(value).__name__}"
        raise ConfigurationError(
            f"{where} is {shown}; it takes a mode: plain, transactional or read_only."
        )
    return mode


def _mode_named(name: object) -> Mode | None:
    return _NAMES.get(name) if isinstance(name, str) else None


def as_mode_default(value: object) -> ModeDefault:
    """Return a default mode for the middleware, also for its name.

    Raises:
        ConfigurationError: it is neither a mode, nor the name of one, nor a function of the scope.
    """
    if value == by_method.__name__:
        return by_method
    if isinstance(value, Mode) or not callable(value):
        return as_mode(value, "mode=")
    if inspect.isclass(value) or inspect.iscoroutinefunction(value):
        raise ConfigurationError(
            f"mode= is {getattr(value, '__name__', value)!r}; it takes a mode, or a function of the"
            " scope that returns one, such as by_method; neither a class nor an async function."
        )
    return cast("Callable[[Scope], Mode]", value)


def should_commit(mode: Mode, status: int, error: BaseException | None) -> bool:
    """Return whether the unit of work commits, judged by the response.

    | the application                                         | outcome  |
    | ------------------------------------------------------- | -------- |
    | answers with a status below 400                         | COMMIT   |
    | answers with a status of 400 or above                   | ROLLBACK |
    | raised, and a handler made a response of it             | ROLLBACK |
    | raised a redirect (a handler made a 3xx response of it) | COMMIT   |

    `commit_on=` replaces the first two rules, not those for an exception.

    Args:
        mode: the mode of the unit of work.
        status: the status of the response.
        error: the exception from which an exception handler made the response, if any.
    """
    if error is not None and not 300 <= status < 400:
        return False
    return mode.commit_on(status) if mode.commit_on is not None else status < 400
