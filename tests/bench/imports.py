"""What it costs to import the library, over what SQLAlchemy costs already."""

import json
import subprocess
import sys
from typing import Any

from tests.bench.course import Course
from tests.bench.samples import Measured

TIMES = 15

_PROGRAM = """
import asyncio, json, time
began = time.perf_counter()
import sqlalchemy.ext.asyncio
first = time.perf_counter()
import anyio
second = time.perf_counter()
import asgi_db
third = time.perf_counter()
print(json.dumps([first - began, second - first, third - second]))
"""


def imports(course: Course) -> Measured:
    """Seconds for `sqlalchemy.ext.asyncio`, for anyio then, and for `asgi_db` then."""
    measured = course.measured("imports")
    tries: list[Any] = []
    for _ in range(TIMES + 1):
        command = [sys.executable, "-P", "-c", _PROGRAM]
        answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        tries.append(json.loads(answer.stdout))
    measured.facts["seconds"] = tries[1:]  # the first may have had to compile
    return measured
