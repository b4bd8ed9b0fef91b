"""The pool profiles: how many connections an engine keeps, and for how long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from asgi_db.errors import ConfigurationError

PoolName: TypeAlias = Literal["low", "medium", "high"]
"""The names of the ready-made pool profiles."""


@dataclass(frozen=True)
class PoolProfile:
    """How many connections one process keeps, how long it waits for one, how far it trusts them.

    The names are SQLAlchemy's, except `verify`. The defaults are those of the profile "medium".

    Attributes:
        pool_size: connections that are kept open. Number, default 10. Raise it when requests wait
            for a connection while the database is idle; all processes together must stay below the
            server's `max_connections`.
        max_overflow: connections opened beyond `pool_size` in a peak, and closed when they come
            back. Number, default 20; -1 for no limit. Lower it when the server runs out of
            connections; 0 makes the pool fixed in size.
        pool_timeout: how long a request waits for a connection before it fails. Seconds, default
            30. Lower it so that an overloaded service answers early; keep it below the timeout of
            the proxy.
        pool_recycle: age at which a connection is replaced, when it is taken next. Seconds, default
            3600; -1 for never. Keep it below the idle timeout of server and firewall (MySQL:
            `wait_timeout`).
        verify: ping a connection that has been idle for longer than a second before it is used.
            Default True. Switch it off where a request that meets a connection which the server has
            closed may fail.
        pool_use_lifo: take the connection which came back last, so that the others can grow idle
            and be closed by the server. Default False. Switch it on, together with `verify`, for a
            large pool whose load comes in waves.
    """

    pool_size: int = 10
    max_overflow: int = 20
    pool_timeout: float = 30
    pool_recycle: int = 3600
    verify: bool = True
    pool_use_lifo: bool = False

    def engine_options(self) -> dict[str, Any]:
        """Return the profile as keyword arguments of `create_async_engine`.

        `verify` is not one of them: `pool_pre_ping` would ping at every checkout, so `Database`
        does it.
        """
        return {
            "pool_size": self.pool_size,
            "max_overflow": self.max_overflow,
            "pool_timeout": self.pool_timeout,
            "pool_recycle": self.pool_recycle,
            "pool_use_lifo": self.pool_use_lifo,
        }


POOL_PROFILES: Mapping[PoolName, PoolProfile] = MappingProxyType(
    {
        "low": PoolProfile(5, 10, 60, 7200, verify=False),
        "medium": PoolProfile(),
        "high": PoolProfile(20, 40, 15, 1800, pool_use_lifo=True),
    }
)
"""The ready-made profiles: for a small service, for most services, and for a busy one."""


def pool_profile(name: PoolName) -> PoolProfile:
    """Return the ready-made pool profile of that name.

    Raises:
        ConfigurationError: there is none.
    """
    if name not in POOL_PROFILES:
        names = ", ".join(f'"{known}"' for known in POOL_PROFILES)
        raise ConfigurationError(f"`pool` must be one of {names}.")
    return POOL_PROFILES[name]
