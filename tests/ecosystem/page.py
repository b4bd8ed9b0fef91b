"""The page `docs/works-with.md`: a section for each environment, of what is installed there."""

from __future__ import annotations

import ast
import datetime
import re
import tomllib
from dataclasses import dataclass
from importlib.metadata import metadata, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/works-with.md"
GROUPS = {"2.1": "ecosystem", "2.0": "ecosystem-sqlalchemy-2-0"}
"""The dependency groups by the version of SQLAlchemy."""
BELOW = ("sqlalchemy", "fastapi", "starlette", "litestar")
"""What the libraries stand on, which has no row of its own."""
REQUIREMENT = re.compile(r"([\w.-]+)(?:\[.*\])?==(\S+)")
DATE = re.compile(r"\d{4}-\d\d-\d\d")


def release() -> str:
    """The first two numbers of the installed SQLAlchemy."""
    return ".".join(version("sqlalchemy").split(".")[:2])


def pinned(group: str) -> list[str]:
    """The libraries that a dependency group names with their version."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    found = [REQUIREMENT.fullmatch(line) for line in groups[group] if isinstance(line, str)]
    return [match[1] for match in found if match]


def file_of(library: str) -> Path:
    """Where the application of a library is."""
    return Path(__file__).with_name(f"test_{library.replace('-', '_')}.py")


@dataclass(frozen=True)
class Section:
    """What the page says of one environment."""

    release: str

    @property
    def libraries(self) -> list[str]:
        """The libraries with a row."""
        return sorted(name for name in pinned(GROUPS[self.release]) if name not in BELOW)

    def written(self, date: str) -> str:
        """The section, of what is installed here."""
        below = [name for name in pinned(GROUPS[self.release]) if name in BELOW]
        versions = ", ".join(f"{metadata(name)['Name']} {version(name)}" for name in below)
        lines = [
            f"## With SQLAlchemy {self.release}",
            "",
            f"Run on {date} with {versions}.",
            "",
            "| library | version | what its test shows |",
            "| --- | --- | --- |",
            *(f"| {name} | {version(name)} | {_sentence(name)} |" for name in self.libraries),
            "",
        ]
        return "\n".join(lines)

    def shown(self) -> str:
        """The section as the page has it."""
        [match] = self._pattern().findall(PAGE.read_text())
        return str(match)

    def write(self) -> None:
        """Write the section into the page."""
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        PAGE.write_text(self._pattern().sub(self.written(today) + "\n", PAGE.read_text()))

    def _pattern(self) -> re.Pattern[str]:
        heading = re.escape(f"## With SQLAlchemy {self.release}\n")
        return re.compile(rf"^{heading}.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def _sentence(library: str) -> str:
    docstring = ast.get_docstring(ast.parse(file_of(library).read_text()))
    assert docstring, f"{file_of(library)} has to say what it shows"
    return " ".join(docstring.split())
