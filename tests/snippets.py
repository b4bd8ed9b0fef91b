"""The Python blocks of the README and of `docs/`: where they stand, and their files."""

import re
from pathlib import Path

PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SQL_BLOCK = re.compile(r"^```sql\n(.*?)^```$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
FILE_NAME = re.compile(r"# (\S+\.py)\n")


def blocks_by_heading(page: str) -> dict[str, str]:
    """The Python blocks of a page by the heading above them, on the lines where they stand."""
    blocks = dict[str, str]()
    for block in PYTHON_BLOCK.finditer(page):
        without_code = PYTHON_BLOCK.sub("", page[: block.start()])
        heading = HEADING.findall(without_code)[-1]
        assert heading not in blocks, f"give the second block below {heading!r} a heading"
        blocks[heading] = "\n" * page.count("\n", 0, block.start(1)) + block[1]
    return blocks


def files_of(page: Path) -> dict[str, str]:
    """The Python files that a page shows, each line where it stands in the page.

    A block begins with the name of its file, as a comment; one without goes on with the file of
    the block before it.
    """
    text = page.read_text()
    files = dict[str, str]()
    name = None
    for block in PYTHON_BLOCK.finditer(text):
        named = FILE_NAME.match(block[1])
        name = named[1] if named else name
        assert name, f"{page.name}: the first block has to begin with the name of its file"
        before = files.get(name, "")
        missing = text.count("\n", 0, block.start(1)) - before.count("\n")
        files[name] = before + "\n" * missing + block[1]
    return files


def sql_of(page: Path) -> list[str]:
    """The SQL blocks of a page."""
    return SQL_BLOCK.findall(page.read_text())
