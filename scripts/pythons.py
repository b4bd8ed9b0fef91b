"""Runs what depends on Python on every version found here, other than the running one.

On one of them it is the whole suite, with SQLAlchemy 2.0.
"""

import glob
import os
import subprocess
import sys

SUPPORTED = ["3.11", "3.12", "3.13"]
COMING = ["3.14"]  # not named in pyproject.toml before the suite has passed on it

WITH_SQLALCHEMY_2_0 = "3.12"


def main() -> None:
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    others = [version for version in SUPPORTED + COMING if version != running]
    found = {version: find(version) for version in others}
    missing = [version for version, python in found.items() if python is None]
    if missing:
        print(f"not found, so not tested: Python {', '.join(missing)}", flush=True)
    chosen = found.pop(WITH_SQLALCHEMY_2_0, None) or sys.executable
    print(f"testing with SQLAlchemy 2.0: {chosen}", flush=True)
    # `make lowest` tests psycopg with 2.0.
    without = "ARGS=-k 'not psycopg'"
    make("suite", f"PYTHON={chosen}", "VERSIONS=sqlalchemy-2.0", without)
    for version, python in found.items():
        if python is not None:
            print(f"testing with Python {version}: {python}", flush=True)
            make("python-suite", f"PYTHON={python}")


def make(*arguments: str) -> None:
    subprocess.run(["make", *arguments], check=True)


def find(version: str) -> str | None:
    """An interpreter of this version that really works (a pyenv shim on PATH may not)."""
    pyenv = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    installed = sorted(glob.glob(f"{pyenv}/versions/{version}.*/bin/python{version}"))
    for python in [f"python{version}", *reversed(installed)]:
        try:
            subprocess.run([python, "-c", "import ssl, sqlite3"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return python
    return None


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
