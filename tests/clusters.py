"""Servers that replicate: a primary with its replicas, and what a test does to them.

PostgreSQL has a prompt standby and a late one, MariaDB one replica which is late:

    with clusters.postgresql() as cluster, cluster.fresh_database() as urls:
        cluster.late.pause()
        ...

Each process of a test run has clusters of its own (the fixtures `postgresql_cluster` and
`mysql_cluster`), so that a test may hold a replica back. `heal` puts that right afterwards. A test
that promotes, ends or freezes a server starts a cluster for itself.
"""

import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Protocol
from uuid import uuid4

from sqlalchemy.engine import make_url

from tests import servers
from tests.servers import DatabaseServer, sql

LAG = 0.2
"""Seconds by which a late replica is late."""

_APP = "app"
"""The user of the applications, who owns their databases and has no other rights."""


@dataclass(frozen=True)
class Urls:
    """One database, on each server of a cluster."""

    primary: str
    replicas: list[str]

    @property
    def late(self) -> str:
        """The database on the late replica, which is the last one."""
        return self.replicas[-1]

    @property
    def prompt(self) -> str:
        """The database on the replica that is not late."""
        return self.replicas[0]


class Replica(Protocol):
    """A server that follows another one."""

    server: DatabaseServer

    def set_lag(self, seconds: float) -> None:
        """Change by how much it is late."""
        ...

    def pause(self) -> None:
        """Let it receive what is committed, and not show it."""
        ...

    def resume(self) -> None:
        """Let it show what it has received meanwhile."""
        ...

    def detach(self) -> None:
        """Cut it from its primary, for good."""
        ...

    def follow(self, primary: DatabaseServer) -> None:
        """Let it follow another primary from now on."""
        ...

    def promote(self) -> None:
        """Make it a primary, and wait until it takes writes."""
        ...

    def shows(self, position: str) -> bool:
        """Whether it shows everything up to a position."""
        ...


@dataclass
class Cluster:
    """A primary and its replicas.

    Attributes:
        primary: the server that takes the writes.
        replicas: the servers that follow it, the late one last.
    """

    primary: DatabaseServer
    replicas: list[Replica]

    @property
    def late(self) -> Replica:
        """The late replica."""
        return self.replicas[-1]

    @property
    def prompt(self) -> Replica:
        """The replica that is not late; PostgreSQL has one."""
        return self.replicas[0]

    def create_database(self) -> Urls:
        """Create a database, and wait until every replica has it."""
        name = f"test_{uuid4().hex[:12]}"
        owner = f" OWNER {_APP}" if self.primary.url.startswith("postgresql") else ""
        sql(self.primary.url, f"CREATE DATABASE {name}{owner}")
        self.wait_until_caught_up()
        return self.urls(name)

    def urls(self, name: str) -> Urls:
        """A database on each server."""
        followers = [_database(replica.server, name) for replica in self.replicas]
        return Urls(_database(self.primary, name), followers)

    @contextmanager
    def fresh_database(self) -> Generator[Urls, None, None]:
        """A database of its own for a test; afterwards the replicas are as they were."""
        urls = self.create_database()
        try:
            yield urls
        finally:
            self.heal()
            name = make_url(urls.primary).database
            if make_url(urls.primary).get_backend_name() == "postgresql":
                sql(self.primary.url, f"DROP DATABASE {name} WITH (FORCE)")
            else:
                sql(self.primary.url, f"DROP DATABASE {name}")

    def heal(self) -> None:
        """Let every replica follow as it did at the beginning."""
        self.read_only(False)
        for replica in self.replicas:
            replica.resume()
            replica.set_lag(LAG if replica is self.late else 0)

    def wait_until_caught_up(self, *replicas: Replica, within: float = 60) -> None:
        """Wait until replicas (or all of them) show everything that is committed now."""
        waiting = list(replicas or self.replicas)
        position = self.position()
        deadline = time.monotonic() + within
        while waiting := [replica for replica in waiting if not replica.shows(position)]:
            assert time.monotonic() < deadline, f"a replica lacks {position} after {within} s"
            time.sleep(0.01)

    def position(self) -> str:
        """How far the primary has come."""
        asked = (
            # Not that of the next record: at the end of a page no replica has come as far yet.
            "SELECT pg_current_wal_flush_lsn()::text"
            if self.primary.url.startswith("postgresql")
            else "SELECT @@gtid_binlog_pos"
        )
        return str(sql(self.primary.url, asked)[0][0])

    def read_only(self, only: bool = True) -> None:
        """Let the primary refuse every write, or take writes again; its clients stay connected."""
        if self.primary.url.startswith("postgresql"):
            state = "on" if only else "off"
            change(self.primary, "default_transaction_read_only", state)
        else:
            sql(self.primary.url, f"SET GLOBAL read_only = {int(only)}")


class Standby:
    """A hot standby of PostgreSQL."""

    def __init__(self, server: DatabaseServer) -> None:
        self.server = server

    def set_lag(self, seconds: float) -> None:
        change(self.server, "recovery_min_apply_delay", str(round(seconds * 1000)))

    def pause(self) -> None:
        sql(self.server.url, "SELECT pg_wal_replay_pause()")
        _wait_until(lambda: self._ask("SELECT pg_get_wal_replay_pause_state()") == "paused")

    def resume(self) -> None:
        sql(self.server.url, "SELECT pg_wal_replay_resume()")

    def detach(self) -> None:
        change(self.server, "primary_conninfo", "")
        _wait_until(lambda: not self._ask("SELECT count(*) FROM pg_stat_wal_receiver"))

    def follow(self, primary: DatabaseServer) -> None:
        change(self.server, "primary_conninfo", _conninfo(primary))

    def promote(self) -> None:
        assert self._ask("SELECT pg_promote()")  # which waits until it is a primary

    def shows(self, position: str) -> bool:
        return bool(self._ask(f"SELECT pg_last_wal_replay_lsn() >= '{position}'"))

    def _ask(self, question: str) -> object:
        return sql(self.server.url, question)[0][0]


class GtidReplica:
    """A replica of MariaDB, which gets what its primary has committed through a slow link."""

    def __init__(self, server: DatabaseServer, link: "SlowLink") -> None:
        self.server = server
        self._link = link

    def set_lag(self, seconds: float) -> None:
        self._link.delay = seconds

    def pause(self) -> None:
        sql(self.server.url, "STOP SLAVE SQL_THREAD")

    def resume(self) -> None:
        sql(self.server.url, "START SLAVE SQL_THREAD")

    def detach(self) -> None:
        sql(self.server.url, "STOP SLAVE")

    def follow(self, primary: DatabaseServer) -> None:
        self._link.target = port(primary.url)
        user = make_url(primary.url).username
        sql(
            self.server.url,
            "STOP SLAVE",
            f"CHANGE MASTER TO MASTER_HOST = '127.0.0.1', MASTER_PORT = {self._link.port},"
            f" MASTER_USER = '{user}', MASTER_PASSWORD = 'password', MASTER_CONNECT_RETRY = 1,"
            " MASTER_USE_GTID = slave_pos",
            "SET GLOBAL read_only = 1",
            "START SLAVE",
        )

    def promote(self) -> None:
        sql(self.server.url, "STOP SLAVE", "RESET SLAVE ALL", "SET GLOBAL read_only = 0")

    def shows(self, position: str) -> bool:
        return sql(self.server.url, f"SELECT MASTER_GTID_WAIT('{position}', 0)") == [(0,)]


class SlowLink:
    """Forwards each connection to a port of this machine; what comes back from there is late.

    Attributes:
        port: where it listens.
        target: the port to which the next connection goes.
        delay: seconds by which each piece that is read from now on is late.
    """

    def __init__(self, target: int, delay: float) -> None:
        self.target = target
        self.delay = delay
        self._listener = socket.create_server(("127.0.0.1", servers.free_port()))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = [self._listener]

    def __enter__(self) -> "SlowLink":
        _in_background(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._open:
            with suppress(OSError):  # it is not connected any more
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):  # it was closed
            while True:
                near, _ = self._listener.accept()
                self._open.append(near)
                try:
                    far = socket.create_connection(("127.0.0.1", self.target))
                except OSError:  # nobody there
                    near.close()
                    continue
                self._open.append(far)
                late = SimpleQueue[tuple[float, bytes]]()
                _in_background(_forward, near, far.sendall)
                _in_background(_forward, far, partial(self._put, late))
                _in_background(_deliver, late, near)

    def _put(self, late: "SimpleQueue[tuple[float, bytes]]", piece: bytes) -> None:
        late.put((time.monotonic() + self.delay, piece))


def _forward(source: socket.socket, to: Callable[[bytes], object]) -> None:
    """Hand on what comes; at its end nothing, once."""
    with suppress(OSError):
        while piece := source.recv(65536):
            to(piece)
    with suppress(OSError):
        to(b"")


def _deliver(late: "SimpleQueue[tuple[float, bytes]]", to: socket.socket) -> None:
    with suppress(OSError):
        while True:
            due, piece = late.get()
            time.sleep(max(0, due - time.monotonic()))
            if not piece:
                break
            to.sendall(piece)
    with suppress(OSError):
        to.shutdown(socket.SHUT_RDWR)


def _in_background(work: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=work, args=arguments, daemon=True).start()


@contextmanager
def postgresql() -> Generator[Cluster, None, None]:
    """A private PostgreSQL primary with two standbys: a prompt one, and one that is late."""
    user = servers.unique_user()
    with ExitStack() as stack:
        folders = [stack.enter_context(servers.temporary_folder()) for _ in range(3)]
        servers.make_postgresql(folders[0], user)
        for folder in folders[1:]:  # data of a server which does not run is as good as a backup
            servers.set_up(["cp", "-a", f"{folders[0]}/data", "."], folder)
            servers.set_up(["touch", "data/standby.signal"], folder)
        primary = stack.enter_context(
            servers.running_postgresql(folders[0], user, wal_keep_size="256MB")
        )
        sql(primary.url, f"CREATE ROLE {_APP} LOGIN")
        standbys: list[Replica] = []
        for folder, lag in zip(folders[1:], (0, LAG), strict=True):
            with (folder / "data" / "postgresql.auto.conf").open("a") as settings:
                settings.write(
                    f"primary_conninfo = '{_conninfo(primary)}'\n"
                    f"recovery_min_apply_delay = '{lag}s'\n"
                )
            server = stack.enter_context(
                servers.running_postgresql(folder, user, wal_keep_size="256MB")
            )
            standbys.append(Standby(server))
        yield Cluster(primary, standbys)


@contextmanager
def mariadb() -> Generator[Cluster, None, None]:
    """A private MariaDB primary with a replica that is late."""
    user = servers.unique_user()
    replication = ("--log-bin=bin", "--log-slave-updates=ON", "--gtid-strict-mode=ON")
    with ExitStack() as stack:
        folders = [stack.enter_context(servers.temporary_folder()) for _ in range(2)]
        servers.make_mariadb(folders[0], user)
        with (folders[0] / "init.sql").open("a") as init:
            init.write(
                f"CREATE USER IF NOT EXISTS {_APP}@'%' IDENTIFIED BY 'password';\n"
                f"GRANT ALL ON `test\\_%`.* TO {_APP}@'%';\n"
                f"GRANT PROCESS ON *.* TO {_APP}@'%';\n"
            )
        servers.set_up(
            ["cp", "-a", f"{folders[0]}/data", f"{folders[0]}/init.sql", "."], folders[1]
        )
        primary, follower = (
            stack.enter_context(
                servers.running_mariadb(folder, user, f"--server-id={number}", *replication)
            )
            for number, folder in enumerate(folders, 1)
        )
        link = stack.enter_context(SlowLink(port(primary.url), LAG))
        replica = GtidReplica(follower, link)
        replica.follow(primary)
        yield Cluster(primary, [replica])


def _conninfo(primary: DatabaseServer) -> str:
    url = make_url(primary.url)
    return f"host=127.0.0.1 port={url.port} user={url.username}"


def port(url: str) -> int:
    """The port by which a server is recognized."""
    return make_url(url).port or 0


def _database(server: DatabaseServer, name: str) -> str:
    url = make_url(server.url).set(username=_APP, database=name)
    return servers.with_driver(url.render_as_string(hide_password=False))


def change(server: DatabaseServer, name: str, value: str) -> None:
    """Change a setting of a PostgreSQL server, and wait until new connections have it."""
    asked = f"SELECT setting FROM pg_settings WHERE name = '{name}'"
    if sql(server.url, asked) != [(value,)]:
        sql(server.url, f"ALTER SYSTEM SET {name} = '{value}'", "SELECT pg_reload_conf()")
        _wait_until(lambda: sql(server.url, asked) == [(value,)])


def _wait_until(holds: Callable[[], bool], within: float = 60) -> None:
    deadline = time.monotonic() + within
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
