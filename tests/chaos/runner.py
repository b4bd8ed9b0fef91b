"""Takes a contender through its scenarios, in a process of its own."""

import asyncio
import random
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests import servers
from tests.chaos.report import Row
from tests.chaos.scenarios import ON_FILES, SCENARIOS, Scenario
from tests.chaos.world import Outcome, World
from tests.contenders import Backend, Contender
from tests.contenders.served import allow_many_sockets, create_table

PATIENCE = 1300
"""Seconds after which a scenario is given up."""

LOGS = Path(__file__).parents[2] / ".build" / "chaos-logs"
"""What the application said where not everything went well."""


@dataclass(frozen=True)
class Job:
    """A contender on one kind of database, with the scenarios it has to go through."""

    contender: Contender
    backend: Backend
    scenarios: tuple[str, ...]
    python: str
    seed: int
    scale: float


def run(job: Job) -> list[Row]:
    """Take a contender through its scenarios, on a server of its own."""
    allow_many_sockets()
    rows = list[Row]()
    with ExitStack() as stack:
        server = None
        if job.backend != "sqlite":
            start = servers.postgresql if job.backend == "postgresql" else servers.mariadb
            server = stack.enter_context(start(own=True))
        for name in job.scenarios:
            began = time.monotonic()
            outcome = run_scenario(job, name, server)
            seconds = time.monotonic() - began
            row = Row(name, job.contender, job.backend, outcome, seconds, job.seed)
            print(f"{seconds:5.0f} s | {' | '.join(row.cells())}", file=sys.stderr, flush=True)
            rows.append(row)
    return rows


def run_scenario(job: Job, name: str, server: servers.DatabaseServer | None) -> Outcome:
    """Take a contender through one scenario, on an empty database."""
    scenario = {**SCENARIOS, **ON_FILES}[name]
    with tempfile.TemporaryDirectory(prefix="asgi-db-chaos-") as folder, ExitStack() as stack:
        url = f"sqlite+aiosqlite:///{folder}/items.db"
        if server is not None:
            url = stack.enter_context(server.fresh_database())
        world = World(
            contender=job.contender,
            backend=job.backend,
            database=server,
            url=url,
            python=job.python,
            folder=Path(folder),
            random=random.Random(f"{job.seed} {name}"),
            scale=job.scale,
        )
        try:
            outcome = asyncio.run(_run(scenario, world))
        except Exception as error:
            traceback.print_exc()
            reason = "given up" if isinstance(error, TimeoutError) else type(error).__name__
            outcome = Outcome(1, remarks=[f"the scenario did not come to its end: {reason}"])
        if not outcome.is_clean and job.scale == 1:
            _keep_logs(Path(folder), LOGS / f"{name}-{job.contender.name}-{job.backend}.log")
        return outcome


def _keep_logs(folder: Path, kept: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("w") as file:
        for log in sorted(folder.glob("*/server.log")):
            file.write(f"-- {log.parent.name}\n{log.read_text()}\n")


async def _run(scenario: Scenario, world: World) -> Outcome:
    await create_table(world.url)
    async with asyncio.timeout(PATIENCE):
        return await scenario(world)
