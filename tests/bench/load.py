"""The load: wrk, which is small enough to share two cores with what it drives."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.programs import WRK, find

_SCRIPT = Path(__file__).with_name("wrk.lua")

PATIENCE = 10
"""Seconds after which an answer is late."""


@dataclass(frozen=True)
class Load:
    """What came of driving a server for a while.

    Attributes:
        answers: how many there were, of any status.
        refused: those with a status of 400 or more.
        broken: connections that could not be made, or broke.
        late: answers that took too long.
        issued: writes that were sent, answered or not.
        seconds: how long it took.
        p50: the median of the latencies, in milliseconds.
        p99: the latency which 1 of 100 answers exceeds.
    """

    answers: int
    refused: int
    broken: int
    late: int
    issued: int
    seconds: float
    p50: float
    p99: float

    @property
    def rate(self) -> float:
        """Good answers per second."""
        return (self.answers - self.refused) / self.seconds

    @property
    def failures(self) -> int:
        """Whatever was not a good answer in time."""
        return self.refused + self.broken + self.late


def parse(output: str) -> Load:
    """What the script of wrk has printed, after wrk's own report."""
    line = next(line for line in output.splitlines() if line.startswith("{"))
    found: dict[str, Any] = json.loads(line)
    seconds = found.pop("microseconds") / 1e6
    p50, p99 = found.pop("p50") / 1e3, found.pop("p99") / 1e3
    return Load(**found, seconds=seconds, p50=p50, p99=p99)


def drive(
    port: int, path: str, clients: int, seconds: float, *, first_id: int | None = None
) -> Load:
    """Drive a server: each client sends its next request when it has the answer to the last.

    Args:
        port: of the server.
        path: what is asked for.
        clients: how many there are, each with a connection of its own.
        seconds: how long; wrk takes whole seconds, so it is rounded.
        first_id: of the items to be written, one after the other, instead of the path.
    """
    command = [
        find("wrk") or "wrk",
        "--threads=1",
        f"--connections={clients}",
        f"--duration={max(1, round(seconds))}s",
        f"--timeout={PATIENCE}s",
        f"--script={_SCRIPT}",
        f"http://127.0.0.1:{port}{path}",
    ]
    variables = {} if first_id is None else {"FIRST_ID": str(first_id)}
    done = subprocess.run(
        command,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=seconds + 60,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return parse(done.stdout)


def require() -> None:
    """Say what to do where wrk is missing."""
    if WRK.missing:
        raise RuntimeError(WRK.advice)
