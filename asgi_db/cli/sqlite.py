"""What `asgi-db check` looks at on SQLite; it reads the file, and leaves it as it is."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from asgi_db.cli.report import Plan, Report
from asgi_db.drivers.sqlite import SQLITE_BUSY_TIMEOUT

_OVER_A_NETWORK = ("9p", "afs", "ceph", "cifs", "fuse.sshfs", "glusterfs", "nfs", "nfs4", "smb3")


def check_file(report: Report, plan: Plan) -> None:
    """Look at the file of an SQLite database, and at the place where it is."""
    report.facts["server"] = f"SQLite {sqlite3.sqlite_version}, in this process"
    set_by_us = "on every connection of asgi-db"
    report.settings["foreign_keys"] = f"ON, {set_by_us}"
    timeout = plan.url.query.get("timeout", f"{SQLITE_BUSY_TIMEOUT:g}")
    report.settings["busy_timeout"] = f"{timeout} s, {set_by_us}"
    file = _file(plan.url)
    if file is None:
        report.note(
            "The database is in memory: it is gone when the application ends, and each process"
            " has its own.",
            "Name a file: sqlite:///app.db.",
        )
    else:
        report.facts["file"] = str(file)
        _check_place(report, file)


async def check_journal(report: Report, connection: AsyncConnection) -> None:
    """Look at what the file says of its journal."""
    mode = (await connection.exec_driver_sql("PRAGMA journal_mode")).scalar_one()
    report.settings["journal_mode"] = mode
    if mode != "wal":
        report.note(
            f"journal_mode is {mode}: asgi-db changes the file to WAL when it first connects.",
            "Nothing to do, unless another program needs the file as it is.",
        )


@asynccontextmanager
async def connected(url: URL) -> AsyncGenerator[AsyncConnection | None]:
    """Open a file for reading alone; None where there is none to be opened."""
    read_only = _read_only(url)
    if read_only is None:
        yield None
        return
    engine = create_async_engine(read_only)
    try:
        async with engine.connect() as connection:
            yield connection
    finally:
        await engine.dispose()


def _file(url: URL) -> Path | None:
    """Return the file of a database; None for one in memory."""
    in_memory = url.database in (None, "", ":memory:")
    return None if in_memory else Path(str(url.database)).absolute()


def _read_only(url: URL) -> URL | None:
    file = _file(url)
    if file is None or not file.is_file():
        return None
    return url.set(database=file.as_uri(), query={"mode": "ro", "uri": "true"})


def _check_place(report: Report, file: Path) -> None:
    folder = file.parent
    if not folder.is_dir():
        report.error(f"The folder {folder} does not exist.", f"mkdir -p {folder}")
        return
    if file.exists() and not file.is_file():
        report.error(f"{file} is not a file.", "Name another file in the URL.")
        return
    if not file.exists():
        report.facts["file"] += " (does not exist yet: it is made at the first connection)"
    elif not os.access(file, os.W_OK):
        report.error(f"The file {file} cannot be written.", "chown it to this user, or chmod u+w.")
    if not os.access(folder, os.W_OK | os.X_OK):
        report.error(
            f"The folder {folder} cannot be written, and SQLite keeps its log beside the file.",
            "chown it to this user, or chmod u+wx; or name a file in another folder.",
        )
    system = file_system(folder, _mounts())
    report.facts["file"] += f", on {system}" if system else ""
    if system in _OVER_A_NETWORK:
        report.warning(
            f"The file is on a network file system ({system}), whose locks SQLite cannot trust: two"
            " machines that write destroy it.",
            "Put the file on a disk of this machine, or use PostgreSQL.",
        )


def _mounts() -> list[str]:
    try:
        return Path("/proc/mounts").read_text().splitlines()
    except OSError:  # not on every system
        return []


def file_system(folder: Path, mounts: Iterable[str]) -> str | None:
    """Return the type of the file system of a folder; None where it is not known.

    Args:
        mounts: lines as in Linux's `/proc/mounts`; the later one of two covers the earlier.
    """
    found: dict[Path, str] = {}
    for line in mounts:
        _, place, kind, *_ = line.split()
        found[Path(place.replace("\\040", " "))] = kind
    real = folder.resolve()
    return next((found[place] for place in (real, *real.parents) if place in found), None)
