"""`Database.sessionmaker`: what libraries mean by an `async_sessionmaker`.

Its sessions are those of the database, with units of work of their own: guarded, counted, in a
sandbox too. As with SQLAlchemy, one may be made before there is an event loop, may be used without
`async with`, and may be used again after `close()`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, ClassVar, Self, cast

from sqlalchemy.engine import Dialect
from sqlalchemy.ext.asyncio import async_sessionmaker
from typing_extensions import TypeVar

from asgi_db.errors import ConfigurationError
from asgi_db.modes import Mode, plain, transactional
from asgi_db.tasks import running_loop
from asgi_db.unit.block import Opener
from asgi_db.unit.origin import Origin, UnitLife
from asgi_db.unit.session import DBSession
from asgi_db.unit.session_class import SessionChoice, check_session_options, class_like

SessionT = TypeVar("SessionT", bound=DBSession)


class _Use(Origin):
    """What a session of a sessionmaker is for, from its first use on."""

    loop: asyncio.AbstractEventLoop

    def __init__(self, database: Opener[DBSession], options: Mapping[str, Any]) -> None:
        self._database = database
        self._options = options
        self._mode: Mode = plain

    @property
    def session_options(self) -> Mapping[str, Any]:
        return self._options

    def life(self) -> UnitLife:
        if (loop := running_loop()) is None:
            raise ConfigurationError.without_asyncio()
        self.loop = loop
        return self._database.life_on(loop)

    def commit_at_end(self) -> None:
        """Have what is done in the block committed at its end."""
        self._mode = transactional

    def default_mode(self) -> Mode:
        return self._mode

    def describe(self) -> str:
        return "`database.sessionmaker" + (".begin()`" if self._mode.commits else "()`")


class MadeSession(DBSession):
    """A session that its user closes, instead of a request or a block of the library."""

    _database: ClassVar[Opener[DBSession]]

    def __init__(self, bind: object = None, **options: Any) -> None:
        """Make an empty session, which is completed at its first use.

        Raises:
            ConfigurationError: it shall be bound to something else than the database.
        """
        _refuse_bind(bind)
        super().__init__(_Use(self._database, options))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        _: type[BaseException] | None,
        error: BaseException | None,
        __: TracebackType | None,
    ) -> None:
        await self._end(success=error is None)

    async def close(self) -> None:
        """Roll back, give the connection back, and let the objects go; a cancellation waits."""
        if self.unit is not None:
            self.unit.check_free("close")
        await self._end(success=False)

    async def _end(self, *, success: bool) -> None:
        unit = self.unit
        if unit is None:
            return
        try:
            try:
                await unit.end(success=success)
            finally:
                await unit.run_late_hooks()
        finally:
            await super().close()  # Nothing is awaited any more, so this cannot be cancelled.


class SessionMaker(async_sessionmaker[SessionT]):
    """Makes sessions of a database; see the top of this file."""

    def __init__(self, database: Opener[SessionT], dialect: type[Dialect]) -> None:
        """Prepare it; nothing is opened.

        Args:
            database: what the sessions are for.
            dialect: its dialect.
        """
        like = database.session_class
        made = class_like("class_", like, (MadeSession, like), {"_database": database})
        self._choice = SessionChoice(like, database.session_options)
        self._dialect = dialect
        super().__init__(class_=made, **database.session_options)

    def begin(self) -> AbstractAsyncContextManager[SessionT]:  # type: ignore[override] # pyright: ignore[reportIncompatibleMethodOverride]
        """Make a session which commits at the end of its block, or rolls back if it raises."""
        session: Any = self()
        session.origin.commit_at_end()
        return cast(AbstractAsyncContextManager[SessionT], session)

    def configure(self, **new_kw: Any) -> None:
        """Change the options of the sessions that it makes from now on.

        Raises:
            ConfigurationError: an option cannot work; the message names it, and the remedy.
        """
        _refuse_bind(new_kw.get("bind"))
        options = {**self.kw, **new_kw}
        options.pop("bind")
        check_session_options(self._choice._replace(options=options), self._dialect)
        super().configure(**new_kw)


def _refuse_bind(bind: object) -> None:
    if bind is not None:
        raise ConfigurationError(
            "The sessions of database.sessionmaker belong to its database: leave out bind=, or use"
            " SQLAlchemy's own async_sessionmaker for another engine or connection."
        )
