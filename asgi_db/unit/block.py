"""A block of code outside requests that has a session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Generic, Protocol

from typing_extensions import TypeVar

from asgi_db.errors import ConfigurationError
from asgi_db.modes import Mode
from asgi_db.tasks import running_loop
from asgi_db.unit.origin import Origin, UnitLife
from asgi_db.unit.session import DBSession

SessionT_co = TypeVar("SessionT_co", bound=DBSession, default=DBSession, covariant=True)


class Opener(Protocol[SessionT_co]):
    """The database as a block sees it."""

    session_options: dict[str, Any]

    @property
    def session_class(self) -> type[SessionT_co]:
        """The class of its sessions."""
        ...

    def life_on(self, loop: asyncio.AbstractEventLoop, /) -> UnitLife:
        """Return the engine of an event loop."""
        ...


class Block(Origin, Generic[SessionT_co]):
    """An `async with` block that has a session."""

    def __init__(self, database: Opener[SessionT_co], mode: Mode, name: str) -> None:
        """Prepare it; nothing is opened.

        Raises:
            ConfigurationError: the mode has `retries=`, or this is not run by asyncio.
        """
        if mode.retries:
            raise ConfigurationError(
                f"A block cannot be run again: leave out retries={mode.retries}, and put the block"
                " into a loop of your own."
            )
        if (loop := running_loop()) is None:
            raise ConfigurationError.without_asyncio()
        self.loop = loop
        self._database = database
        self._mode = mode
        self._name = name

    @property
    def session_options(self) -> Mapping[str, Any]:
        return self._database.session_options

    def life(self) -> UnitLife:
        return self._database.life_on(self.loop)

    def default_mode(self) -> Mode:
        return self._mode

    def describe(self) -> str:
        return self._name

    @asynccontextmanager
    async def session(self) -> AsyncGenerator[SessionT_co]:
        """Open the session of the block, and end its unit of work with the block."""
        session = self._database.session_class(self)
        unit = session.unit_of_work
        try:
            yield session
        except BaseException:
            await unit.end(success=False)
            raise
        else:
            await unit.end(success=True)
        finally:
            try:
                await unit.run_late_hooks()
            finally:
                self.is_over = True
                unit.close()
