"""The page about troubleshooting has every error and every line of the log, by its own words."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import asgi_db

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "how-to" / "troubleshooting.md").read_text()
WORDS = " ".join(PAGE.replace("`", "").split())
ERRORS = {name for name in asgi_db.__all__ if name.endswith("Error")}
LEVELS = {"warning", "error", "exception", "log"}
PLACEHOLDER = re.compile(r"%[-+ #0-9.]*[a-zA-Z]")
CLAUSE_END = re.compile(r"(?<=[.:;,])\s+")
ENOUGH = 2
"""So many words in a row tell one message from another."""


def sources() -> Iterator[Path]:
    for folder in ("asgi_db", "adapters"):
        yield from sorted((ROOT / folder).glob("**/*.py"))


def messages(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The line of each message of an error or of the log in a file, and its clauses."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    variables = {
        target.id: node.value
        for node in nodes
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in nodes:
        if isinstance(node, ast.Call) and is_message(node.func, path):
            for argument in node.args:
                if found := clauses(argument, variables):
                    yield argument.lineno, found
                    break


def is_message(function: ast.expr, path: Path) -> bool:
    """Whether a call makes an error of ours, or writes a line into the log."""
    match function:
        case ast.Name(name):
            return name in ERRORS or (name == "cls" and path.name == "errors.py")
        case ast.Attribute(ast.Name("logger"), name):
            return name in LEVELS
        case ast.Attribute(ast.Name("_warnings") | ast.Attribute(_, "_warnings"), "warning"):
            return True  # an `asgi_db.logs.Seldom`
        case ast.Attribute(ast.Call(ast.Name("super")), "__init__"):
            return path.name == "errors.py"
        case ast.Attribute(ast.Name("cls"), "__new__"):
            return path.name == "errors.py"
        case _:
            return False


def clauses(argument: ast.expr, variables: dict[str, ast.expr]) -> list[str]:
    """What is the same in each message of its kind; nothing if that is not known here."""
    match argument:
        case ast.Constant(str(text)):
            parts = PLACEHOLDER.split(text)
        case ast.JoinedStr(values):
            parts = [str(part.value) for part in values if isinstance(part, ast.Constant)]
        case ast.IfExp(_, first, second):
            return clauses(first, variables) + clauses(second, variables)
        case ast.Name(name) if name in variables and not isinstance(variables[name], ast.Name):
            return clauses(variables[name], variables)
        case _:
            return []
    found = [clause for part in parts for clause in CLAUSE_END.split(part.replace("`", ""))]
    return [" ".join(clause.split()) for clause in found if len(clause.split()) >= ENOUGH]


def every_message() -> list[tuple[str, list[str]]]:
    return [
        (f"{path.relative_to(ROOT)}:{line}", parts)
        for path in sources()
        for line, parts in messages(path)
    ]


@pytest.mark.parametrize(("place", "parts"), every_message())
def test_every_message_has_its_entry(place: str, parts: list[str]) -> None:
    found = [part for part in parts if part.strip(" .:,;()") in WORDS]
    assert found, f"{place}: docs/how-to/troubleshooting.md has to say what to do about {parts}"


def test_the_messages_are_found() -> None:
    """Otherwise the test above would hold without looking at anything."""
    places = [place for place, _ in every_message()]
    assert len(places) > 80
    assert any("errors.py" in place for place in places)
    for path in sources():
        lines = len(re.findall(r"(?:logger|_warnings)\.warning\(", path.read_text()))
        if path.name == "logs.py":
            continue  # It logs what others say.
        assert sum(place.startswith(str(path.relative_to(ROOT))) for place in places) >= lines


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_every_error_has_a_heading(name: str) -> None:
    assert re.search(rf"^### {name}$", PAGE, re.MULTILINE), f"{name} needs a section"
