"""A contender that is served: by uvicorn, in its environment, on a database with its table."""

import resource
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.servers import outside
from tests.serving import UVICORN, Program, Server, serve


@dataclass(frozen=True)
class _Contending(Program):
    """A server with a contender, in its environment."""

    python: str = ""
    contender: str = ""

    def command(self, app: str) -> list[str | Path]:
        return [self.python, *super().command(self.contender)[1:]]


async def create_table(url: str) -> None:
    """Make the contenders' table, with what they read."""
    async with outside(url) as connection:
        await connection.execute(
            "CREATE TABLE items (id BIGINT PRIMARY KEY, value VARCHAR(64) NOT NULL)"
        )
        await connection.execute("INSERT INTO items VALUES (0, '0'), (1, 'value-1')")


@contextmanager
def serving(
    app: str, python: str, folder: Path, *options: str, **environment: str
) -> Generator[Server, None, None]:
    """Serve a contender's application until the end of the block.

    Args:
        app: where it is, `module:attribute`.
        python: the interpreter of its environment.
        folder: where a folder for its log is made.
        options: for uvicorn.
        environment: variables for it; `DATABASE_URL` is the database.
    """
    program = _Contending(**vars(UVICORN), python=python, contender=app)
    own_folder = folder / f"served-{time.monotonic_ns()}"
    own_folder.mkdir()
    with serve(
        program,
        own_folder,
        "--loop=uvloop",
        "--no-access-log",
        "--ws-ping-interval=3600",
        *options,
        **environment,
    ) as server:
        yield server


def allow_many_sockets() -> None:
    """Let this process, and those which it starts, have as many as the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
