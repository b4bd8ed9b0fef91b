"""The command line, `asgi-db`: check a database, wait for it, create and drop tables."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command line; the console script `asgi-db`."""
    if find_spec("click") is None:
        sys.exit(
            "The command line of asgi-db needs click, which is not installed: run"
            ' `pip install "asgi-db[cli]"`.'
        )
    from asgi_db.cli.commands import cli

    cli()
