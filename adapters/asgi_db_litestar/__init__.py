"""asgi-db for Litestar: one plugin.

app = Litestar([create_order], plugins=[DatabasePlugin(database)])
"""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from litestar import Litestar
from litestar.config.app import AppConfig
from litestar.di import Provide
from litestar.middleware import DefineMiddleware
from litestar.plugins import InitPlugin
from litestar.types import Scope
from litestar.utils.scope.state import CONNECTION_STATE_KEY, ScopeState
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from asgi_db import (
    Database,
    DBSession,
    DBSessionMiddleware,
    plain,
    read_only,
    session_of,
    transactional,
)
from asgi_db.asgi.frameworks import check_routes
from asgi_db.asgi.middleware import checked_key
from asgi_db.configured import as_database
from asgi_db.modes import ModeDefault, as_mode_default

__all__ = ["DatabasePlugin"]


class DatabasePlugin(InitPlugin):
    """Installs the engine in the app's lifespan, the middleware, and the providers.

    Handlers take `db_session`, `db_session_transaction` or `db_session_read_only`, and
    `db_engine`; `request.state.db` works too. With another `key=` they begin with that
    instead of `db`. Modules of handlers may import `AsyncSession`, `AsyncEngine` and `DBSession`
    for type checkers alone (`if TYPE_CHECKING:`).
    """

    def __init__(
        self,
        database: Database | None = None,
        *,
        mode: ModeDefault = plain,
        key: str = "db",
        server_timing: bool = False,
    ) -> None:
        """Prepare the plugin.

        Args:
            database: where the sessions come from; `Database()` if None.
            mode: the mode of handlers that set none.
            key: the name in `request.state` and the beginning of the providers' names.
            server_timing: see `DBSessionMiddleware`.

        Raises:
            ConfigurationError: an argument cannot work.
        """
        self.database = as_database(database)
        self._mode: ModeDefault = as_mode_default(mode)
        self._key = checked_key(key)
        self._server_timing = server_timing

    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        """Add to the application's configuration; Litestar calls this."""
        key = self._key

        async def provide_session(scope: Scope) -> DBSession:
            return session_of(scope, plain, key=key)

        async def provide_transaction(scope: Scope) -> DBSession:
            return session_of(scope, transactional, key=key)

        async def provide_read_only(scope: Scope) -> DBSession:
            return session_of(scope, read_only, key=key)

        async def provide_engine() -> AsyncEngine:
            return self.database.engine

        app_config.dependencies = {
            f"{key}_session": Provide(provide_session),
            f"{key}_session_transaction": Provide(provide_transaction),
            f"{key}_session_read_only": Provide(provide_read_only),
            f"{key}_engine": Provide(provide_engine),
            **app_config.dependencies,
        }
        app_config.signature_namespace = {
            "AsyncEngine": AsyncEngine,
            "AsyncSession": AsyncSession,
            "DBSession": DBSession,
            **app_config.signature_namespace,
        }
        app_config.middleware.insert(
            0,
            DefineMiddleware(
                DBSessionMiddleware,
                database=self.database,
                mode=self._mode,
                key=key,
                server_timing=self._server_timing,
            ),
        )
        app_config.lifespan = [self._lifespan, *app_config.lifespan]  # pyright: ignore[reportUnknownMemberType]
        return app_config

    @asynccontextmanager
    async def _lifespan(self, app: Litestar) -> AsyncGenerator[None]:
        check_routes({"litestar_app": app}, self._key)
        async with self.database:
            yield


def copy_connection_state(scope: Scope) -> None:
    """Give a copied scope its own copy of what Litestar records about the request.

    This uses a private part of Litestar, like `reopen_response`; `test_retries.py` breaks when it
    changes.
    """
    scope["state"][CONNECTION_STATE_KEY] = copy.copy(ScopeState.from_scope(scope))


def reopen_response(scope: Scope) -> None:
    """Tell Litestar that the response that it marked as begun was not sent.

    The mark is private (`ScopeState` calls itself internal), and there is no public API for it;
    `test_litestar.py` breaks when it changes.
    """
    state = ScopeState.from_scope(scope)
    state.response_started = False
    # Otherwise the response cache would store the part of the response that it has seen.
    state.is_cached = True
