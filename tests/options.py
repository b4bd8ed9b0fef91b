"""Options of the long runs."""

import argparse
from collections.abc import Sequence


def add_choice(
    parser: argparse.ArgumentParser, option: str, names: Sequence[str], help: str
) -> None:
    """Add an option that takes one or more of these names; all, for who asks for none."""
    help = f"{help}: {', '.join(names)}"
    parser.add_argument(
        option, nargs="+", action="extend", default=[], choices=names, metavar="NAME", help=help
    )
