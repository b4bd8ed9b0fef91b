"""The Python blocks of the README and of `docs/`: where they stand, and their files."""

import re
from pathlib import Path

PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SQL_BLOCK = re.compile(r"^```sql\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE_NAME = re.compile(r"# (\S+\.py)\n")


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
