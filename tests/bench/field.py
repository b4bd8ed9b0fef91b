"""The field: contenders served side by side, each on a database of its own."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from sqlalchemy.engine import make_url

from tests.contenders import Contender
from tests.contenders.served import create_table, serving
from tests.servers import DatabaseServer, outside, run
from tests.serving import Server

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Entrant:
    """A contender that is served.

    Attributes:
        url: its database, without any proxy.
    """

    contender: Contender
    server: Server
    url: str

    @property
    def name(self) -> str:
        """The contender's."""
        return self.contender.name

    def wait_for(self, workers: int) -> None:
        """Wait until so many processes serve: the first takes connections before the others."""
        started = "Application startup complete"
        self.server.wait_until(lambda: self.server.log.count(started) >= workers)

    def settle(self, within: float = 5) -> None:
        """Wait until it has nothing to do: it goes on with the requests of clients that left."""
        deadline = time.monotonic() + within
        before = self._ticks()
        while time.monotonic() < deadline:
            time.sleep(0.1)
            now = self._ticks()
            if now - before <= 1:
                return
            before = now

    def _ticks(self) -> int:
        """The CPU time of its processes so far, in hundredths of a second."""
        pid = self.server.process.pid
        workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        found = 0
        for process in [str(pid), *workers]:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            found += int(fields[11]) + int(fields[12])
        return found

    def rows(self, first_id: int, number: int, within: float = 2) -> int:
        """How many items of a range there are, as soon as there are all, or after a while."""

        async def count() -> int:
            sql = f"SELECT count(*) FROM items WHERE id >= {first_id}"
            deadline = time.monotonic() + within
            async with outside(self.url) as connection:
                while True:
                    ((found,),) = await connection.execute(sql)
                    if found == number or time.monotonic() > deadline:
                        return int(found)
                    await asyncio.sleep(0.05)

        return run(count())


@contextmanager
def field(
    contenders: Sequence[Contender],
    database: DatabaseServer,
    folder: Path,
    *options: str,
    proxy_port: int | None = None,
    counted: bool = False,
    **environment: str,
) -> Generator[list[Entrant], None, None]:
    """Serve contenders side by side until the end of the block.

    Args:
        contenders: who takes part.
        database: the server.
        folder: for their logs.
        options: for uvicorn.
        proxy_port: where the database is to be reached, if not directly.
        counted: with `GET /held`, which says how many connections are out of the pool.
        environment: variables for them.
    """
    with ExitStack() as stack, ThreadPoolExecutor(2) as threads:

        def serve(contender: Contender) -> Entrant:
            url = stack.enter_context(database.fresh_database())
            run(create_table(url))
            served = make_url(url).set(port=proxy_port) if proxy_port else make_url(url)
            server = stack.enter_context(
                serving(
                    f"tests.contenders.counted:{contender.name}" if counted else contender.app,
                    sys.executable,
                    folder,
                    "--http=httptools",
                    "--log-level=info",
                    *options,
                    **{
                        "DATABASE_URL": served.render_as_string(hide_password=False),
                        "POOL_TIMEOUT": "30",
                        "TIMEOUT": "0",
                        **environment,
                    },
                )
            )
            return Entrant(contender, server, url)

        yield list(threads.map(serve, contenders))


@contextmanager
def distance(database: DatabaseServer, seconds: float) -> Generator[int, None, None]:
    """A port from which the database is so far away, in either direction."""
    command = [sys.executable, "-m", "tests.bench.proxy"]
    process = subprocess.Popen(
        [*command, str(make_url(database.url).port), str(seconds)],
        cwd=_ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def round_trip(url: str, port: int) -> float:
    """How long a statement takes from a port, in milliseconds; the median of many."""

    async def ask() -> float:
        through = make_url(url).set(port=port).render_as_string(hide_password=False)
        times = list[float]()
        async with outside(through) as connection:
            for _ in range(200):
                began = time.perf_counter()
                await connection.execute("SELECT 1")
                times.append(time.perf_counter() - began)
        return median(times) * 1000

    return run(ask())
