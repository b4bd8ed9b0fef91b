"""The class of a database's sessions: `DBSession` itself, or a class of the user's joined with it.

`session_options=` takes `class_` and `sync_session_class`, as SQLAlchemy's `async_sessionmaker`
does. The joined classes look for an attribute in this order:

    asynchronous  DBSession, the user's class, AsyncSession
    synchronous   the choice of the engine, the user's class, UnitSession, Session

What the user overrides thus runs inside the unit of work, and whatever it sends passes through
`UnitSession`. The engine that the user's own `get_bind` returns is exchanged for its variant for
the mode, as any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from sqlalchemy import event
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from asgi_db.engine.variants import refuse_autocommit
from asgi_db.errors import ConfigurationError
from asgi_db.unit.rerouting import rerouting
from asgi_db.unit.session import DBSession
from asgi_db.unit.sync_session import (
    OPERATIONS,
    EngineChoice,
    PlainUnitSession,
    UnitSession,
    inside_the_unit,
)

_DEFAULTS: Mapping[str, Any] = {"autoflush": False, "expire_on_commit": False}
"""The options that differ from SQLAlchemy's own defaults."""

_OURS = {"bind": "engine= of Database", "unit_of_work": "nothing"}
"""The options that a `DBSession` sets itself, and what to use instead."""

_INTERNAL = {"origin", "unit", "unit_of_work", "commit_in_unit", "rollback_in_unit", "_add_hook"}
"""Names that no class may define, not even one that derives from `DBSession`."""

_NOT_PASSED_ON = {"__getattr__", "begin", "begin_nested"}
"""Methods of `DBSession` that do not call those of the class below it."""


class SessionChoice(NamedTuple):
    """What the sessions of a database are made of.

    Attributes:
        class_: their class.
        options: the arguments for the constructor of SQLAlchemy's session.
    """

    class_: type[DBSession]
    options: dict[str, Any]


def choose_session(
    options: Mapping[str, Any] | None, dialect: type[Dialect], *, has_replicas: bool = False
) -> SessionChoice:
    """Return the class of the sessions, and the options with which they are made.

    Args:
        options: the arguments for SQLAlchemy's `async_sessionmaker`; they override the defaults.
        dialect: the one of the database.
        has_replicas: whether the sessions choose between servers.

    Raises:
        ConfigurationError: an option cannot work; the message names it, and the remedy.
    """
    rest = {**_DEFAULTS, **(options or {})}
    class_: type[AsyncSession] = rest.pop("class_", None) or DBSession
    _check_base("class_", class_, AsyncSession)
    sync_class: type[Session] = rest.pop("sync_session_class", None) or _sync_class_of(class_)
    _check_base("sync_session_class", sync_class, Session)
    choice = SessionChoice(_joined(class_, sync_class, has_replicas), rest)
    check_session_options(choice, dialect)
    return choice


def check_session_options(choice: SessionChoice, dialect: type[Dialect]) -> None:
    """Refuse options with which no session could be made, or could not work.

    Raises:
        ConfigurationError: an option cannot work; the message names it, and the remedy.
    """
    options = choice.options
    for name, instead in _OURS.items():
        if name in options:
            raise ConfigurationError(
                f"session_options= has {name}, which asgi-db sets itself: leave it out, and use"
                f" {instead}."
            )
    refuse_autocommit("session_options=", options)
    if problem := _problem_with(choice):
        raise ConfigurationError(f"session_options= cannot work: {problem}. Correct it.")
    binds: Mapping[Any, AsyncEngine | AsyncConnection] = options.get("binds") or {}
    dialects = {dialect, *(bind.dialect.__class__ for bind in binds.values())}
    if options.get("twophase") and not all(map(_has_two_phases, dialects)):
        raise ConfigurationError(
            "session_options= has twophase, and the database has no two-phase commit: leave it out."
        )


def _problem_with(choice: SessionChoice) -> str:
    """Make a session, to see whether that is possible; name what is wrong, if anything is."""
    class_ = choice.class_
    session = class_.__new__(class_)
    try:
        super(DBSession, session).__init__(unit_of_work=SimpleNamespace(), **choice.options)
    except (TypeError, ValueError, AttributeError, SQLAlchemyError) as error:
        problem = str(error).partition("\n")[0].rstrip(".")
        if "unit_of_work" in problem:
            problem = (
                f"the __init__ of {class_.__name__}, or of its sync_session_class, does not take"
                " all arguments of SQLAlchemy's session; it has to take **options too, and to pass"
                " them on to super().__init__(**options)"
            )
        return problem
    except Exception:  # Its own constructor may need a request, for example a context variable.
        return ""
    if not isinstance(vars(session).get("sync_session"), UnitSession):
        return (
            f"the __init__ of {class_.__name__} chooses another synchronous session, or makes none;"
            " it has to call super().__init__(...) with all the arguments that it gets, and"
            " sync_session_class is an option or an attribute of the class"
        )
    return ""


def _has_two_phases(dialect: type[Dialect]) -> bool:
    return dialect.do_begin_twophase is not DefaultDialect.do_begin_twophase


def _check_base(option: str, value: Any, base: type[object]) -> None:
    """Refuse what is no class of sessions.

    Raises:
        ConfigurationError: it does not derive from SQLAlchemy's class.
    """
    if not (isinstance(value, type) and issubclass(value, base)):
        raise _refused(option, value, f"is no class that derives from SQLAlchemy's {base.__name__}")


def _refused(option: str, value: Any, problem: str) -> ConfigurationError:
    name = value.__name__ if isinstance(value, type) else f"a {type(value).__name__}"
    return ConfigurationError(f"session_options= has {option}, and {name} {problem}. Correct it.")


# -- the asynchronous class --------------------------------------------------------------------


def _joined(
    class_: type[AsyncSession], sync_class: type[Session], has_replicas: bool
) -> type[DBSession]:
    """Return the class of the sessions."""
    if sync_class is Session:
        sync_class = PlainUnitSession
    elif not issubclass(sync_class, UnitSession):
        sync_class = _joined_sync(sync_class)
    if has_replicas:
        sync_class = rerouting(sync_class)
    if class_ in (AsyncSession, DBSession) and sync_class is PlainUnitSession:
        return DBSession
    _check_names(class_)
    namespace = {
        "__getattr__": _complete,
        "commit_in_unit": _commit_in_unit,
        "rollback_in_unit": _rollback_in_unit,
        "sync_session_class": sync_class,
    }
    bases = (class_,) if issubclass(class_, DBSession) else (DBSession, class_)
    joined: type[DBSession] = class_like("class_", class_, bases, namespace)
    return joined


def class_like(
    option: str, like: type[Any], bases: tuple[type[Any], ...], namespace: Mapping[str, Any]
) -> Any:
    """Make a class that is shown under the name of another one.

    Raises:
        ConfigurationError: there can be no such class, of which one base may be the reason.
    """
    shown = {name: getattr(like, name) for name in ("__doc__", "__module__", "__qualname__")}
    try:
        return type(like.__name__, bases, {**shown, **namespace})
    except TypeError as error:
        problem = f"no class can derive from it and from asgi-db's own ({error})"
        raise _refused(option, like, problem) from error


def _check_names(class_: type[AsyncSession]) -> None:
    """Refuse a class whose own attributes would be hidden by ours, or hide them.

    Raises:
        ConfigurationError: it has such an attribute.
    """
    ours = DBSession.__mro__
    above = class_.__mro__[: class_.__mro__.index(DBSession)] if DBSession in class_.__mro__ else ()
    public = {name for name in vars(DBSession) if not name.startswith("__")}
    for part in class_.__mro__:
        if part in ours:
            continue
        names = _INTERNAL | _NOT_PASSED_ON
        if part in above:
            names |= {"commit", "rollback"}
        else:
            names |= public - {"commit", "rollback", "sync_session_class"}
        if hidden := sorted(names & vars(part).keys()):
            name = hidden[0]
            if part in above and name in ("commit", "rollback"):
                remedy = "override it in a class that derives from AsyncSession instead"
            elif name in _NOT_PASSED_ON:
                remedy = "leave it out, and use SQLAlchemy's events or a method of another name"
            else:
                remedy = "give it another name"
            problem = f"defines {name}, which the sessions of asgi-db define themselves: {remedy}"
            raise _refused("class_", class_, problem)


def _complete(session: DBSession, name: str) -> Any:
    """Complete the session; what was set on it before wins over what its constructor sets."""
    before = dict(vars(session))
    try:
        return DBSession.__getattr__(session, name)  # type: ignore[attr-defined] # pyright: ignore
    finally:
        vars(session).update(before)


async def _commit_in_unit(session: DBSession) -> None:
    await super(DBSession, session).commit()
    if session.unit_of_work.transaction.is_open:
        raise _left_open(session, "commit")


async def _rollback_in_unit(session: DBSession) -> None:
    await super(DBSession, session).rollback()
    if session.sync_session.in_transaction():
        raise _left_open(session, "rollback")


def _left_open(session: DBSession, name: str) -> ConfigurationError:
    return ConfigurationError(
        f"{name}() of the session class {type(session).__name__} has left a transaction open: it"
        f" has to end with `super().{name}()`."
    )


# -- the synchronous class ---------------------------------------------------------------------


def _sync_class_of(class_: type[AsyncSession]) -> Any:
    """Return the `sync_session_class` of the user's class, before which ours may stand."""
    parts = (vars(part) for part in class_.__mro__ if part is not DBSession)
    return next(part["sync_session_class"] for part in parts if "sync_session_class" in part)


def _joined_sync(class_: type[Session]) -> type[UnitSession]:
    """Return the class of the synchronous halves.

    Raises:
        ConfigurationError: the user's class cannot be joined with ours.
    """
    own = {name for name in vars(UnitSession) if not name.startswith("__")} - {*OPERATIONS}
    own.add("unit_of_work")
    if hidden := sorted(name for name in own if hasattr(class_, name)):
        problem = f"defines {hidden[0]}, which asgi-db's own session defines: give it another name"
        raise _refused("sync_session_class", class_, problem)
    # An operation that is overridden is one operation, with all the statements that it sends.
    overridden = {
        name: inside_the_unit(name, getattr(class_, name))
        for name in OPERATIONS
        if getattr(class_, name) is not getattr(Session, name)
    }
    bases = (EngineChoice, class_, UnitSession)
    joined: type[UnitSession] = class_like("sync_session_class", class_, bases, overridden)
    event.listen(joined, "after_begin", _refuse_what_is_no_operation)
    return joined


def _refuse_what_is_no_operation(session: UnitSession, *_: object) -> None:
    """Refuse a statement that was sent past `UnitSession`, and so past the mode.

    Raises:
        ConfigurationError: no operation is running.
    """
    if session.unit_of_work.operation is None:
        raise ConfigurationError(
            f"{session.unit_of_work.describe()}: a method of the session class"
            f" {type(session).__name__} calls a method of SQLAlchemy's Session by the name of that"
            " class, and so goes past asgi-db: call self.execute(...) or super().execute(...)"
            " instead of Session.execute(self, ...)."
        )
