"""The applications which the harnesses compare: one module each, served by a real uvicorn.

Each is written as the documentation of its library says, with the same routes (`routes.py` has
those of most), on a pool of 5 without overflow, where a request waits 2 s for a connection, unless
the environment says otherwise (`POOL_SIZE`, `POOL_TIMEOUT`).

| route                        | does                                                              |
| ---------------------------- | ----------------------------------------------------------------- |
| `GET /nothing`               | uses no database                                                  |
| `GET /items/{id}`            | reads; 404 if there is none                                       |
| `POST /items/{id}`           | inserts; 201                                                      |
| `POST /slow/{id}?seconds=`   | a query that takes so long, then an insert; 201                   |
| `POST /pair/{id}?seconds=`   | inserts `id`, waits in Python, inserts `-id`; both or neither     |
| `GET /long?seconds=`         | a stream that begins with a query that takes so long              |
| `GET /stream`, `/events`     | `?chunks=&seconds=`: a query before each piece                    |
| `GET /big`                   | reads, then sends 5 MB                                            |
| `WS /ws`                     | inserts each message, which is an id, and answers "ok"            |
| `POST /count`                | SQLite only: reads item 0, a number, and writes the next          |
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Backend: TypeAlias = Literal["postgresql", "mysql", "sqlite"]

DATABASES: dict[Backend, str] = {
    "postgresql": "PostgreSQL",
    "mysql": "MariaDB",
    "sqlite": "SQLite",
}


@dataclass(frozen=True)
class Contender:
    """A library, or the lack of one.

    Attributes:
        name: of its module here.
        title: for the table.
        packages: whose versions the report names.
        backends: on which it is measured.
        is_peer: whether it lives in the peers' environment, not in that of the tests.
        is_for_postgresql_alone: whether it cannot be used on other databases.
        is_public: whether it is a library that one can install.
        reads_from_replicas: whether its application sends reads to a replica where the environment
            names some (`REPLICA_URLS`).
    """

    name: str
    title: str
    packages: tuple[str, ...]
    backends: tuple[Backend, ...] = ("postgresql",)
    is_peer: bool = True
    is_for_postgresql_alone: bool = False
    is_public: bool = True
    reads_from_replicas: bool = False

    @property
    def app(self) -> str:
        """Where its application is, `module:attribute`."""
        return f"{__name__}.{self.name}:app"


OURS = Contender(
    "asgi_db",
    "**asgi-db**",
    ("asgi-db", "fastapi"),
    ("postgresql", "mysql", "sqlite"),
    is_peer=False,
    reads_from_replicas=True,
)

CONTENDERS = [
    OURS,
    Contender(
        "plain_depends",
        "plain `Depends`",
        ("fastapi",),
        ("postgresql", "mysql", "sqlite"),
        is_peer=False,
        is_public=False,
        reads_from_replicas=True,
    ),
    Contender(
        "fastapi_async_sqlalchemy", "fastapi-async-sqlalchemy", ("fastapi-async-sqlalchemy",)
    ),
    Contender("asgi_sqlalchemy", "asgi-sqlalchemy", ("asgi-sqlalchemy",)),
    Contender(
        "advanced_alchemy_fastapi",
        "advanced-alchemy (FastAPI)",
        ("advanced-alchemy", "fastapi"),
        reads_from_replicas=True,
    ),
    Contender(
        "advanced_alchemy_litestar",
        "advanced-alchemy (Litestar)",
        ("advanced-alchemy", "litestar"),
        reads_from_replicas=True,
    ),
    Contender(
        "context_async_sqlalchemy", "context-async-sqlalchemy", ("context-async-sqlalchemy",)
    ),
    Contender("fastapi_sqla", "fastapi-sqla", ("fastapi-sqla",)),
    Contender(
        "fastapi_toolsets",
        "fastapi-toolsets",
        ("fastapi-toolsets",),
        is_for_postgresql_alone=True,
    ),
]
"""Those of `make chaos`."""

SEED = Contender("seed", "`Depends(get_db)`, pre-ping", ("fastapi",), is_public=False)
LIMIT = Contender(
    "asyncpg_by_hand",
    "asyncpg by hand",
    ("fastapi", "asyncpg"),
    is_for_postgresql_alone=True,
    is_public=False,
)
BARE = Contender("bare", "no database", ("fastapi",), is_public=False)
FIELD = [OURS, SEED, *(contender for contender in CONTENDERS if contender != OURS), LIMIT]
"""Those of `make bench`."""
