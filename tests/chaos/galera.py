"""A Galera cluster of three MariaDB nodes, and what can happen to it.

It needs the library of Galera besides MariaDB's server, and no other program: a node that joins
gets what it lacks by an incremental transfer, because all begin with the same data.
"""

import signal
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from sqlalchemy.engine import make_url

from tests import servers
from tests.programs import GALERA, MARIADB, find
from tests.servers import DatabaseServer, HowToStop, sql

NODES = 3

SUSPECTED_AFTER = 2
"""Seconds of silence after which the others go on without a node; it is 5 if nothing is said."""

_SIGNALS: dict[HowToStop, signal.Signals] = {
    "fast": signal.SIGTERM,
    "immediate": signal.SIGKILL,
}

# A server that was killed has its position in its tables alone, and asks for all data if nobody
# reads it there first: this is what Debian's service does too.
_START = """
position=$("$@" --wsrep-recover 2>&1 | sed -n 's/.*Recovered position: *//p' | tail -n 1)
exec "$@" ${position:+"--wsrep-start-position=$position"}
"""

# The state of a node for one on the same machine: where it stands. Whatever comes after that, the
# nodes send each other themselves; a transfer of all the data fails.
_TRANSFER = """#!/bin/sh
while [ $# -gt 0 ]; do
    case "$1" in
        --role) role=$2 ;;
        --address) address=$2 ;;
        --gtid) position=$2 ;;
        --datadir) joiner=${2%/}/../transfer ;;
        --bypass) incremental=yes ;;
        --mysqld-args) break ;;
    esac
    shift
done
case "$role$incremental" in
    joiner)
        rm -f "$joiner" && mkfifo "$joiner" && echo "ready $joiner" && cat "$joiner" ;;
    donoryes)
        echo "$position" >"$address" && echo continue && echo "done $position" ;;
    *)
        exit 38 ;;
esac
"""


@dataclass(frozen=True)
class Galera:
    """The nodes of a cluster; the first has founded it, and is never started again."""

    nodes: Sequence[DatabaseServer]

    @contextmanager
    def fresh_database(self) -> Generator[list[str], None, None]:
        """The URLs of a new database, at each node."""
        name = f"test_{uuid4().hex[:12]}"
        sql(self.nodes[0].url, f"CREATE DATABASE {name}")
        self.wait_until_synced()
        urls = [make_url(node.url).set(database=name) for node in self.nodes]
        yield [servers.with_driver(url.render_as_string(hide_password=False)) for url in urls]

    def wait_until_synced(self) -> None:
        """Wait until each node shows what was committed on any of them."""
        for node in self.nodes:
            self.wait_until(node, ready=True)
            sql(node.url, "SET SESSION wsrep_sync_wait = 1", "SELECT 1 FROM mysql.user LIMIT 1")

    def wait_until(self, node: DatabaseServer, *, ready: bool, within: float = 60) -> None:
        """Wait until a node takes part, or does not, when it answers 1047 to most statements."""
        deadline = time.monotonic() + within
        expected = [("wsrep_ready", "ON" if ready else "OFF")]
        while sql(node.url, "SHOW STATUS LIKE 'wsrep_ready'") != expected:
            assert time.monotonic() < deadline, f"not {expected} after {within} s"
            time.sleep(0.05)

    def isolate(self, node: DatabaseServer) -> None:
        """Cut a node off from the others, which go on without it."""
        self._set(node, "gmcast.isolate=1")

    def reconnect(self, node: DatabaseServer) -> None:
        """Let it find the others again."""
        self._set(node, "gmcast.isolate=0")

    def _set(self, node: DatabaseServer, option: str) -> None:
        sql(node.url, f"SET GLOBAL wsrep_provider_options = '{option}'")


@contextmanager
def galera() -> Generator[Galera, None, None]:
    """A private cluster, whose nodes give their clients the same numbers."""
    for program in (MARIADB, GALERA):
        if program.missing:
            raise RuntimeError(program.advice)
    user = servers.unique_user()
    with ExitStack() as stack:
        folders = [stack.enter_context(servers.temporary_folder()) for _ in range(NODES)]
        ports = [[servers.free_port(), servers.free_port()] for _ in range(NODES)]
        for folder in folders:
            script = folder / "wsrep_sst_position"
            script.write_text(_TRANSFER)
            script.chmod(0o755)
        servers.make_mariadb(folders[0], user)
        _found(folders[0], ports, user)
        for folder in folders[1:]:
            servers.set_up(["cp", "-a", f"{folders[0]}/data", "."], folder)
        yield Galera(
            [
                stack.enter_context(_running(number, folder, ports, user))
                for number, folder in enumerate(folders)
            ]
        )


def _found(folder: Path, ports: list[list[int]], user: str) -> None:
    """Let the first node note where it stands, and know the user of the tests."""
    with servers.running(
        lambda port: _command(0, folder, ports, port),
        lambda port: f"mysql+asyncmy://root@127.0.0.1:{port}/mysql",
        folder,
        _SIGNALS,
    ) as server:
        sql(
            server.url,
            f"CREATE USER {user}@'%' IDENTIFIED BY 'password'",
            f"GRANT ALL ON *.* TO {user}@'%' WITH GRANT OPTION",
        )
        server.stop("fast")


@contextmanager
def _running(
    number: int, folder: Path, ports: list[list[int]], user: str
) -> Generator[DatabaseServer, None, None]:
    with servers.running(
        lambda port: _command(number, folder, ports, port),
        lambda port: f"mysql+asyncmy://{user}:password@127.0.0.1:{port}/mysql",
        folder,
        _SIGNALS,
    ) as server:
        yield server


def _command(number: int, folder: Path, ports: list[list[int]], port: int) -> list[str]:
    group, transfer = ports[number]
    members = ",".join(f"127.0.0.1:{each}" for each, _ in ports)
    options = {
        "gmcast.listen_addr": f"tcp://127.0.0.1:{group}",
        "ist.recv_addr": f"127.0.0.1:{transfer}",
        "gcache.size": "32M",
        "evs.keepalive_period": "PT0.3S",  # less than a third of the next
        "evs.suspect_timeout": f"PT{SUSPECTED_AFTER}S",
        "evs.inactive_timeout": f"PT{2 * SUSPECTED_AFTER}S",
    }
    return [
        "env",
        f"PATH={folder}:/usr/sbin:/usr/bin:/sbin:/bin",
        "sh",
        "-c",
        _START,
        "sh",
        find("mariadbd") or "mariadbd",
        "--no-defaults",
        f"--datadir={folder}/data",
        f"--tmpdir={folder}",
        f"--port={port}",
        "--bind-address=127.0.0.1",
        f"--socket={folder}/socket",
        f"--pid-file={folder}/pid",
        "--innodb-log-file-size=16M",
        "--innodb-buffer-pool-size=32M",
        "--innodb-flush-log-at-trx-commit=2",
        "--innodb-autoinc-lock-mode=2",
        "--binlog-format=ROW",
        "--max-connections=500",
        "--skip-name-resolve",
        "--wsrep-on=ON",
        f"--wsrep-provider={GALERA.library}",
        "--wsrep-cluster-name=tests",
        f"--wsrep-cluster-address=gcomm://{members}",
        f"--wsrep-node-name=node{number}",
        f"--wsrep-node-address=127.0.0.1:{group}",
        "--wsrep-sst-method=position",
        f"--wsrep-provider-options={';'.join(f'{name}={text}' for name, text in options.items())}",
        *["--wsrep-new-cluster"] * (number == 0),
    ]
