"""Results in a document: tables that can be read as they are, and of what they were made."""

import json
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path

from tests import servers

_VERSIONS = """
import importlib.metadata, json, sys
print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))
"""


def table(head: Sequence[str], lines: Sequence[Sequence[str]], numbers: Collection[int]) -> str:
    """A table in Markdown, aligned but for its last column.

    Args:
        head: the names of the columns.
        lines: the cells below.
        numbers: which columns are aligned to the right.
    """
    all_lines = [head, *lines]
    widths = [max(len(line[column]) for line in all_lines) for column in range(len(head) - 1)]
    rule = ["-" * width + (":" if n in numbers else "-") for n, width in enumerate(widths)]
    last = "--:" if len(head) - 1 in numbers else "---"
    text = [
        "| "
        + " | ".join(
            cell.rjust(width) if n in numbers else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=False))
        )
        + f" | {line[-1]} |"
        for line in all_lines
    ]
    return "\n".join([text[0], f"| {' | '.join(r[1:] for r in rule)} | {last} |", *text[1:]])


def write_between(document: Path, begin: str, end: str, text: str) -> None:
    """Put a new text between two markers of a document."""
    before, _, rest = document.read_text().partition(begin)
    _, _, after = rest.partition(end)
    document.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def versions(python: str, names: Sequence[str]) -> list[str]:
    """Packages and their versions in the environment of an interpreter."""
    command = [python, "-P", "-c", _VERSIONS, *dict.fromkeys(names)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, str] = json.loads(answer)
    return [f"{name} {version}" for name, version in found.items()]


def server_versions() -> list[str]:
    """The database servers which are started here."""

    async def ask(url: str) -> str:
        async with servers.outside(url) as connection:
            ((version,),) = await connection.execute("SELECT version()")
        return str(version).removeprefix("PostgreSQL ").partition(" ")[0].partition("-")[0]

    with servers.postgresql(own=True) as postgresql, servers.mariadb(own=True) as mariadb:
        return [
            f"PostgreSQL {servers.run(ask(postgresql.url))}",
            f"MariaDB {servers.run(ask(mariadb.url))}",
        ]
