"""Takes a contender through its scenarios, in a process of its own."""

import asyncio
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests import clusters, servers
from tests.chaos.galera import Galera, galera
from tests.chaos.on_galera import ON_GALERA
from tests.chaos.on_standbys import ON_STANDBYS
from tests.chaos.report import Row
from tests.chaos.scenarios import ON_FILES, ON_ONE_SERVER, Scenario
from tests.chaos.world import Outcome, Place, World
from tests.contenders import Contender
from tests.contenders.served import allow_many_sockets, create_table

PATIENCE = 1300
"""Seconds after which a scenario is given up."""

LOGS = Path(__file__).parents[2] / ".build" / "chaos-logs"
"""What the application said where not everything went well."""


SCENARIOS: dict[Place, dict[str, Scenario]] = {
    "postgresql": ON_ONE_SERVER,
    "mysql": ON_ONE_SERVER,
    "sqlite": ON_FILES,
    "galera": ON_GALERA,
    "standbys": ON_STANDBYS,
}
"""What takes place on what."""


@dataclass(frozen=True)
class Job:
    """A contender on one kind of database, with the scenarios it has to go through."""

    contender: Contender
    place: Place
    scenarios: tuple[str, ...]
    python: str
    seed: int
    scale: float


def run(job: Job) -> list[Row]:
    """Take a contender through its scenarios, on a server of its own, or on a cluster for each."""
    allow_many_sockets()
    rows = list[Row]()
    with ExitStack() as stack:
        server = None
        if job.place in ("postgresql", "mysql"):
            start = servers.postgresql if job.place == "postgresql" else servers.mariadb
            server = stack.enter_context(start(own=True))
        for name in job.scenarios:
            began = time.monotonic()
            outcome = run_scenario(job, name, server)
            seconds = time.monotonic() - began
            row = Row(name, job.contender, job.place, outcome, seconds, job.seed)
            print(f"{seconds:5.0f} s | {' | '.join(row.cells())}", file=sys.stderr, flush=True)
            rows.append(row)
    return rows


def run_scenario(job: Job, name: str, server: servers.DatabaseServer | None) -> Outcome:
    """Take a contender through one scenario, on an empty database."""
    scenario = SCENARIOS[job.place][name]
    with tempfile.TemporaryDirectory(prefix="asgi-db-chaos-") as folder, ExitStack() as stack:
        try:
            cluster, (url, *elsewhere) = stack.enter_context(_database(job.place, server, folder))
            world = World(
                contender=job.contender,
                place=job.place,
                database=server,
                url=url,
                python=job.python,
                folder=Path(folder),
                random=random.Random(f"{job.seed} {name}"),
                scale=job.scale,
                cluster=cluster,
                elsewhere=elsewhere,
            )
            outcome = asyncio.run(_run(scenario, world))
        except Exception as error:
            traceback.print_exc()
            reason = "given up" if isinstance(error, TimeoutError) else type(error).__name__
            outcome = Outcome(1, remarks=[f"the scenario did not come to its end: {reason}"])
        if not outcome.is_clean and job.scale == 1:
            _keep_logs(Path(folder), LOGS / f"{name}-{job.contender.name}-{job.place}.log")
        return outcome


@contextmanager
def _database(
    place: Place, server: servers.DatabaseServer | None, folder: str
) -> Generator[tuple[clusters.Cluster | Galera | None, list[str]], None, None]:
    """An empty database: the cluster on which it is, if any, and its URL on each server."""
    match place:
        case "sqlite":
            yield None, [f"sqlite+aiosqlite:///{folder}/items.db"]
        case "galera":
            with galera() as nodes, nodes.fresh_database() as urls:
                yield nodes, urls
        case "standbys":  # which a scenario may promote, so that they end as they then are
            with clusters.postgresql() as cluster:
                everywhere = cluster.create_database()
                yield cluster, [everywhere.primary, *everywhere.replicas]
        case _:
            assert server is not None
            with server.fresh_database() as url:
                yield None, [url]


def _keep_logs(folder: Path, kept: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("w") as file:
        for log in sorted(folder.glob("*/server.log")):
            file.write(f"-- {log.parent.name}\n{log.read_text()}\n")


async def _run(scenario: Scenario, world: World) -> Outcome:
    await create_table(world.url)
    async with asyncio.timeout(PATIENCE):
        return await scenario(world)
