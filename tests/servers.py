"""Private database servers for one test session, and what they themselves say about their clients.

Nothing here uses the library: these are the independent witnesses of the tests. A server is
started in a temporary folder on a free port, or replaced by the one that the environment variable
`ASGI_DB_TEST_POSTGRESQL_URL` or `ASGI_DB_TEST_MYSQL_URL` names, where the tests may then create
and drop databases. A test that stops, restarts or freezes a server starts one for itself:

    with servers.postgresql(own=True) as server, server.fresh_database() as url:
        server.restart("immediate")
"""

import asyncio
import os
import pwd
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar
from uuid import uuid4

import asyncpg
from sqlalchemy.engine import URL, make_url

from tests.programs import MARIADB, POSTGRESQL, Server, find

T = TypeVar("T")
Row = tuple[Any, ...]
HowToStop: TypeAlias = Literal["fast", "immediate"]

DRIVERS = {
    "postgresql": "postgresql+asyncpg",
    "mysql": "mysql+asyncmy",
    "mariadb": "mysql+asyncmy",
}
"""The driver in the URLs of the databases; the fixture `postgresql_driver` changes PostgreSQL's."""

# Started beside each server: it ends the server and removes its folder if the test session dies.
_KEEPER = """
read -r _ && exit
if pid=$(cat "$2/server"); then
    kill -s CONT "$pid" $(cat "/proc/$pid/task/$pid/children")
    kill -s "$1" "$pid"
    for _ in 1 2 3 4 5 6 7 8 9 10; do kill -0 "$pid" || break; sleep 0.3; done
fi 2>/dev/null
rm -rf "$2"
"""

# A transaction that InnoDB has begun, in its own report. (information_schema.innodb_trx is a cache
# that shows nothing new for as long as it is read more often than every 0.1 s.)
_INNODB_TRANSACTION = re.compile(r"---TRANSACTION \S+, ACTIVE.*?thread id (\d+)", re.DOTALL)

# What was made in a database, and its own settings. Two databases for which this is the same differ
# in nothing that a test could meet.
_MADE_IN_POSTGRESQL = """
    SELECT (SELECT string_agg(concat_ws(' ', nspname, nspowner::regrole, nspacl), ', '
            ORDER BY nspname) FROM pg_namespace WHERE nspname !~ '^pg_(toast_)?temp_'),
        (SELECT (datacl, datconnlimit, datallowconn, datistemplate)::text
            FROM pg_database WHERE datname = current_database()),
        (SELECT count(*) FROM pg_db_role_setting JOIN pg_database d ON d.oid = setdatabase
            WHERE datname = current_database()),
        (SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database())
""" + "".join(
    f", (SELECT count(*) FROM pg_{kind} WHERE oid >= 16384)"  # the first number that is not its own
    for kind in (
        "cast",
        "class",
        "collation",
        "conversion",
        "default_acl",
        "event_trigger",
        "extension",
        "foreign_data_wrapper",
        "foreign_server",
        "language",
        "largeobject_metadata",
        "opclass",
        "operator",
        "proc",
        "publication",
        "statistic_ext",
        "trigger",
        "ts_config",
        "ts_dict",
        "type",
    )
)
_EMPTY_POSTGRESQL = (
    "SET lock_timeout = '1s'",
    "DROP SCHEMA public CASCADE",
    "CREATE SCHEMA public AUTHORIZATION pg_database_owner",
    "GRANT USAGE ON SCHEMA public TO PUBLIC",
)


_THREADS = ThreadPoolExecutor(max_workers=8, thread_name_prefix="run")
"""They do not end before the process. Python 3.11 may loop for ever while coverage traces it, if
another thread which has used greenlets ends in the moment in which greenlet takes one apart."""


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end on another thread, whatever loop the caller is in."""
    return _THREADS.submit(asyncio.run, coroutine).result()


class Outside(Protocol):
    """A connection of the test's own, in autocommit."""

    async def execute(self, sql: str) -> list[Row]:
        """Runs one statement and returns its rows."""
        ...


class _PostgreSQL:
    def __init__(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        self.connection = connection

    async def execute(self, sql: str) -> list[Row]:
        return [tuple(row) for row in await self.connection.fetch(sql)]


class _MySQL:
    def __init__(self, connection: Any) -> None:
        self.connection = connection

    async def execute(self, sql: str) -> list[Row]:
        async with self.connection.cursor() as cursor:
            await cursor.execute(sql)
            return [tuple(row) for row in await cursor.fetchall()]


class _SQLite:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    async def execute(self, sql: str) -> list[Row]:
        return self.connection.execute(sql).fetchall()


@asynccontextmanager
async def outside(url: str) -> AsyncGenerator[Outside, None]:
    """Another connection to the database, straight through the driver."""
    parsed = make_url(url)
    match parsed.get_backend_name():
        case "postgresql":
            postgresql = await asyncpg.connect(_plain(parsed.set(drivername="postgresql")))
            try:
                yield _PostgreSQL(postgresql)
            finally:
                await postgresql.close()
        case "mysql":
            mysql: Any = await import_module("asyncmy").connect(
                host=parsed.host,
                port=parsed.port or 3306,
                user=parsed.username,
                password=str(parsed.password or ""),
                database=parsed.database,
                charset="utf8mb4",
                autocommit=True,
            )
            try:
                yield _MySQL(mysql)
            finally:
                await mysql.ensure_closed()
        case "sqlite":
            sqlite = sqlite3.connect(str(parsed.database), isolation_level=None)
            try:
                yield _SQLite(sqlite)
            finally:
                sqlite.close()
        case backend:
            raise ValueError(f"no tests on {backend}")


def sql(url: str, *statements: str) -> list[Row]:
    """Runs statements on another connection, and returns the rows of the last one."""

    async def execute() -> list[Row]:
        rows = list[Row]()
        async with outside(url) as connection:
            for statement in statements:
                rows = await connection.execute(statement)
        return rows

    return run(execute())


@dataclass(frozen=True)
class ServerConnection:
    """One client of a database, as its server sees it."""

    id: int
    state: str
    """`idle`, `active`, `idle in transaction` or `idle in transaction (aborted)`."""
    query: str


_CLIENTS_OF_POSTGRESQL = """
    SELECT pid, state, query FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
    AND backend_type = 'client backend' ORDER BY pid
"""
_CLIENTS_OF_MYSQL = """
    SELECT id, command, info FROM information_schema.processlist
    WHERE db = database() AND id <> connection_id() ORDER BY id
"""


async def server_connections(url: str) -> list[ServerConnection]:
    """The clients that the server itself sees on this database; SQLite has no server, so none."""
    match make_url(url).get_backend_name():
        case "postgresql":
            async with outside(url) as probe:
                rows = await probe.execute(_CLIENTS_OF_POSTGRESQL)
            return [ServerConnection(id, state or "starting", query) for id, state, query in rows]
        case "mysql":
            async with outside(url) as probe:
                rows = await probe.execute(_CLIENTS_OF_MYSQL)
                (_, _, report), *_ = await probe.execute("SHOW ENGINE INNODB STATUS")
            in_transaction = {int(id) for id in _INNODB_TRANSACTION.findall(report)}
            return [
                ServerConnection(
                    id,
                    "active"
                    if command != "Sleep"
                    else "idle in transaction"
                    if id in in_transaction
                    else "idle",
                    query or "",
                )
                for id, command, query in rows
            ]
        case _:
            return []


async def until_active(url: str, query: str) -> None:
    """Wait until the server is working at a statement that begins like this."""
    async with asyncio.timeout(20):
        while True:
            found = await server_connections(url)
            if any(each.state == "active" and each.query.startswith(query) for each in found):
                return
            await asyncio.sleep(0.01)


async def assert_idle(url: str, within: float = 15) -> None:
    """Waits until no client is in a statement or a transaction, and fails with those that stay."""
    await _assert_none(url, within, "busy", lambda client: client.state != "idle")


async def assert_disconnected(url: str, within: float = 15) -> None:
    """Waits until no client is connected to this database, and fails with those that stay."""
    await _assert_none(url, within, "connected", lambda client: True)


async def assert_no_thread_of_sqlite(within: float = 10) -> None:
    """Waits until the threads of closed SQLite connections have ended; the driver does not wait."""
    for thread in threading.enumerate():
        if "_connection_worker_thread" in thread.name:
            await asyncio.to_thread(thread.join, within)
            assert not thread.is_alive(), f"{thread.name} still runs after {within} s"


async def _assert_none(
    url: str, within: float, what: str, chosen: Callable[[ServerConnection], bool]
) -> None:
    deadline = time.monotonic() + within
    while rows := [client for client in await server_connections(url) if chosen(client)]:
        if time.monotonic() > deadline:
            raise AssertionError(f"still {what} after {within} s: {rows}")
        await asyncio.sleep(0.02)


async def running_statement(url: str, word: str) -> None:
    """Wait until the server runs a statement with this word in it."""
    while True:
        for client in await server_connections(url):
            if client.state == "active" and word in client.query.lower():
                return
        await asyncio.sleep(0.01)


class _Process:
    """The process of a private server, which can end and be started again where it was."""

    def __init__(
        self, command: list[str], url: str, folder: Path, signals: dict[HowToStop, signal.Signals]
    ) -> None:
        self._command = command
        self._url = url
        self._folder = folder
        self._signals = signals
        self._running: subprocess.Popen[bytes] | None = None
        self._keeper = subprocess.Popen(
            ["sh", "-c", _KEEPER, "keeper", signals["immediate"].name[3:], str(folder)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def start(self) -> bool:
        """Start it and wait until it answers; False if it has ended instead."""
        self._running = _start(self._command, self._folder)
        (self._folder / "server").write_text(str(self._running.pid))  # the keeper reads it
        return run(_answers(self._running, self._url))

    def stop(self, how: HowToStop) -> None:
        """End it, if it runs, and wait until it has."""
        if self._running is not None:
            self._running.send_signal(self._signals[how])
            self._running.wait()
            self._running = None
            (self._folder / "server").unlink()

    def touch(self, name: str) -> None:
        """Make an empty file of the server's, in its folder."""
        file = self._folder / name
        file.touch()
        owner = file.parent.stat()
        os.chown(file, owner.st_uid, owner.st_gid)

    def freeze(self) -> None:
        """Stop the server and its child processes where they are, and wait until all have stopped.

        A signal stops a thread a moment after it was sent, and until then the thread may answer.
        The server itself is stopped first, so that it forks no more.
        """
        if self._running is not None:
            pid = self._running.pid
            os.kill(pid, signal.SIGSTOP)
            _wait_until_stopped(pid)
            children = _children(pid)
            for child in children:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGSTOP)
            for child in children:
                _wait_until_stopped(child)

    def thaw(self) -> None:
        """Let the server and its child processes run on."""
        if self._running is not None:
            for process in (self._running.pid, *_children(self._running.pid)):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGCONT)

    def close(self) -> None:
        """End it for good."""
        self.stop("immediate")
        self._keeper.communicate(b"done\n")


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _wait_until_stopped(pid: int, within: float = 30) -> None:
    """Wait until no thread of a process runs."""
    deadline = time.monotonic() + within
    while running := set(_states(pid)) - {"T", "Z", "X"}:
        assert time.monotonic() < deadline, f"process {pid} has not stopped: {running}"
        time.sleep(0.001)


def _states(pid: int) -> Iterator[str]:
    """The states of the threads of a process, one letter each as in proc_pid_stat(5)."""
    for task in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            # The name of the command stands in parentheses, and may hold any character.
            yield task.read_text().rpartition(")")[2].split()[0]


@dataclass(frozen=True)
class DatabaseServer:
    """A running server, and databases on it which live as long as a test."""

    url: str
    process: _Process | None = None
    _emptied: list[str] = field(default_factory=list[str], compare=False)
    _in_new: list[Row] = field(default_factory=list[Row], compare=False)

    def stop(self, how: HowToStop = "fast") -> None:
        """Stop the server, and wait until it has ended.

        Args:
            how: `fast` takes leave of the clients (SIGINT, SIGTERM); `immediate` is a crash.
        """
        self._own.stop(how)

    def start(self) -> None:
        """Start a stopped server on the same port and data, and wait until it answers."""
        deadline = time.monotonic() + 10
        while not self._own.start():
            self._own.stop("immediate")
            assert time.monotonic() < deadline, "the server does not start again"

    def restart(self, how: HowToStop = "fast") -> None:
        """Stop the server and start it again; the same arguments as `stop`."""
        self.stop(how)
        self.start()

    def restart_as_standby(self) -> None:
        """Restart a PostgreSQL server as a standby, which waits for news of a primary in vain."""
        self.stop()
        self._own.touch("data/standby.signal")
        self.start()

    @contextmanager
    def stopped(self, how: HowToStop = "immediate") -> Generator[None, None, None]:
        """It does not run until the end of the block; the same arguments as `stop`."""
        self.stop(how)
        try:
            yield
        finally:
            self.start()

    @contextmanager
    def frozen(self) -> Generator[None, None, None]:
        """All its processes stand still (SIGSTOP) until the end of the block."""
        own = self._own
        try:
            own.freeze()
            yield
        finally:
            own.thaw()

    @property
    def _own(self) -> _Process:
        if self.process is None:
            raise RuntimeError(
                "this server was given by a URL, so it cannot be stopped or frozen:"
                " use servers.postgresql(own=True) or servers.mariadb(own=True)."
            )
        return self.process

    @contextmanager
    def fresh_database(self) -> Generator[str, None, None]:
        """The URL of a new database, dropped at the end even if clients are still connected."""
        url = run(self._create())
        try:
            yield with_driver(url)
        finally:
            run(self._drop(url))

    @contextmanager
    def empty_database(self) -> Generator[str, None, None]:
        """The URL of an empty database, which is emptied at the end and given to the next test.

        On PostgreSQL that takes a fraction of the time. One that has clients at the end, or in
        which something is left, is dropped instead; MariaDB makes a new one as fast.
        """
        url = self._emptied.pop() if self._emptied else run(self._create())
        try:
            yield with_driver(url)
        finally:
            if run(self._is_emptied(url)):
                self._emptied.append(url)
            else:
                run(self._drop(url))

    def drop_emptied(self) -> None:
        """Drop what the next tests would have got."""
        while self._emptied:
            run(self._drop(self._emptied.pop()))

    async def _create(self) -> str:
        url = make_url(self.url).set(database=f"test_{uuid4().hex[:12]}")
        async with outside(self.url) as connection:
            await connection.execute(f"CREATE DATABASE {url.database}")
        return _plain(url)

    async def _is_emptied(self, url: str) -> bool:
        if make_url(url).get_backend_name() != "postgresql":
            return False
        with suppress(OSError, asyncpg.PostgresError):
            async with outside(url) as connection:
                # The server may see a client a little longer than the client itself.
                for _ in range(50):
                    if not await connection.execute(_CLIENTS_OF_POSTGRESQL):
                        break
                    await asyncio.sleep(0.01)
                else:
                    return False
                for statement in _EMPTY_POSTGRESQL:
                    await connection.execute(statement)
                made = await connection.execute(_MADE_IN_POSTGRESQL)
            return made == await self._made_in_new()
        return False

    async def _made_in_new(self) -> list[Row]:
        """What such a question finds in a new database."""
        if not self._in_new:
            url = await self._create()
            async with outside(url) as connection:
                self._in_new.extend(await connection.execute(_MADE_IN_POSTGRESQL))
            await self._drop(url)
        return self._in_new

    async def _drop(self, url: str) -> None:
        name = make_url(url).database
        async with outside(self.url) as connection:
            if make_url(url).get_backend_name() == "postgresql":
                await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
                return
            clients = await connection.execute(
                f"SELECT id FROM information_schema.processlist WHERE db = '{name}'"
            )
            for (id,) in clients:
                with suppress(import_module("asyncmy").errors.OperationalError):  # it has just gone
                    await connection.execute(f"KILL {id}")
            await connection.execute(f"DROP DATABASE {name}")


@contextmanager
def same_database(url: str, other: DatabaseServer) -> Generator[str, None, None]:
    """The URL of a database on another server, which has the same name and the same user."""
    own = make_url(url)
    there = make_url(other.url)
    if own.get_backend_name() == "postgresql":
        user = f"CREATE ROLE {own.username} SUPERUSER LOGIN PASSWORD 'password'"
        grant, drop_user = "SELECT 1", f"DROP ROLE {own.username}"
        drop = f"DROP DATABASE {own.database} WITH (FORCE)"
    else:
        user = f"CREATE USER {own.username}@'%' IDENTIFIED BY 'password'"
        grant = f"GRANT ALL ON {own.database}.* TO {own.username}@'%'"
        drop, drop_user = f"DROP DATABASE {own.database}", f"DROP USER {own.username}@'%'"
        sql(other.url, user, f"GRANT PROCESS ON *.* TO {own.username}@'%'")  # for `assert_idle`
        user = "SELECT 1"
    sql(other.url, user, f"CREATE DATABASE {own.database}", grant)
    try:
        yield _plain(own.set(host=there.host, port=there.port))
    finally:
        sql(other.url, drop, drop_user)


@contextmanager
def postgresql(*, own: bool = False) -> Generator[DatabaseServer, None, None]:
    """A private PostgreSQL server, or the one of `ASGI_DB_TEST_POSTGRESQL_URL`.

    Args:
        own: a private one in any case, which can be restarted and frozen.
    """
    if POSTGRESQL.url and not own:
        given = DatabaseServer(with_driver(POSTGRESQL.url))
        try:
            yield given
        finally:
            given.drop_emptied()
        return
    with temporary_folder() as folder:
        user = unique_user()
        make_postgresql(folder, user)
        with running_postgresql(folder, user) as server:
            yield server


def make_postgresql(folder: Path, user: str) -> None:
    """Make the data of a PostgreSQL server which has not run yet."""
    (initdb,) = _programs(POSTGRESQL, "initdb")
    data = f"--pgdata={folder}/data"
    set_up(
        [initdb, data, f"--username={user}", "--encoding=UTF8", "--locale=C", "--no-sync"], folder
    )


@contextmanager
def running_postgresql(
    folder: Path, user: str, **more: str
) -> Generator[DatabaseServer, None, None]:
    """Run a PostgreSQL server on its data, with more settings if need be."""
    (postgres,) = _programs(POSTGRESQL, "postgres")
    settings = {
        "fsync": "off",
        "listen_addresses": "127.0.0.1",
        "max_connections": "300",
        "shared_buffers": "32MB",
        "unix_socket_directories": "",
        **more,
    }
    options = [f"-c{name}={value}" for name, value in settings.items()]
    with running(
        lambda port: [postgres, "-D", f"{folder}/data", f"--port={port}", *options],
        lambda port: f"postgresql+asyncpg://{user}:password@127.0.0.1:{port}/postgres",
        folder,
        {"fast": signal.SIGINT, "immediate": signal.SIGQUIT},  # child processes included
    ) as server:
        yield server


@contextmanager
def mariadb(*, own: bool = False) -> Generator[DatabaseServer, None, None]:
    """A private MariaDB server, or the one of `ASGI_DB_TEST_MYSQL_URL`; see `postgresql`."""
    if MARIADB.url and not own:
        yield DatabaseServer(with_driver(MARIADB.url))
        return
    with temporary_folder() as folder:
        user = unique_user()
        make_mariadb(folder, user)
        with running_mariadb(folder, user) as server:
            yield server


def make_mariadb(folder: Path, user: str) -> None:
    """Make the data of a MariaDB server which has not run yet."""
    (install,) = _programs(MARIADB, "mariadb-install-db")
    # The user is made when the server starts, on each server for itself.
    (folder / "init.sql").write_text(
        "SET SESSION sql_log_bin = 0;\n"
        f"CREATE USER IF NOT EXISTS {user}@'%' IDENTIFIED BY 'password';\n"
        f"GRANT ALL ON *.* TO {user}@'%' WITH GRANT OPTION;\n"
    )
    set_up(
        [
            install,
            *_data_of_mariadb(folder),
            "--skip-test-db",
            "--auth-root-authentication-method=normal",
        ],
        folder,
    )


def _data_of_mariadb(folder: Path) -> list[str]:
    return [
        "--no-defaults",
        f"--datadir={folder}/data",
        f"--tmpdir={folder}",  # in a shared one each removes what others have there
        "--innodb-log-file-size=16M",
    ]


@contextmanager
def running_mariadb(folder: Path, user: str, *more: str) -> Generator[DatabaseServer, None, None]:
    """Run a MariaDB server on its data, with more options if need be."""
    (mariadbd,) = _programs(MARIADB, "mariadbd")
    with running(
        lambda port: [
            mariadbd,
            *_data_of_mariadb(folder),
            f"--port={port}",
            "--bind-address=127.0.0.1",
            f"--socket={folder}/socket",
            f"--pid-file={folder}/pid",
            f"--init-file={folder}/init.sql",
            "--innodb-buffer-pool-size=32M",
            "--innodb-flush-log-at-trx-commit=2",  # a commit outlives SIGKILL
            "--max-connections=500",
            "--skip-name-resolve",
            *more,
        ],
        lambda port: f"mysql+asyncmy://{user}:password@127.0.0.1:{port}/mysql",
        folder,
        {"fast": signal.SIGTERM, "immediate": signal.SIGKILL},
    ) as server:
        yield server


@contextmanager
def running(
    command: Callable[[int], list[str]],
    url: Callable[[int], str],
    folder: Path,
    signals: dict[HowToStop, signal.Signals],
) -> Generator[DatabaseServer, None, None]:
    """Starts a server on a free port, waits until it answers, and stops it at the end."""
    for _ in range(3):  # another process may take the port first
        port = free_port()
        process = _Process(command(port), url(port), folder, signals)
        try:
            if process.start():
                yield DatabaseServer(url(port), process)
                return
        finally:
            process.close()
    raise RuntimeError(f"{command(0)[0]} does not start:\n{(folder / 'log').read_text()[-3000:]}")


def _start(command: list[str], folder: Path) -> "subprocess.Popen[bytes]":
    """Starts a program in the folder, with its output in a log there, as a user who is not root."""
    user = group = others = None
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        nobody = pwd.getpwnam("nobody")
        user, group, others = nobody.pw_uid, nobody.pw_gid, list[int]()
        os.chown(folder, user, group)
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the test session, which then stops the server
            user=user,
            group=group,
            extra_groups=others,
        )


def set_up(command: list[str], folder: Path) -> None:
    """Run a program to its end in the folder, as the user who owns it."""
    if _start(command, folder).wait() != 0:
        raise RuntimeError(f"{command[0]} failed:\n{(folder / 'log').read_text()[-3000:]}")


async def _answers(process: "subprocess.Popen[bytes]", url: str) -> bool:
    """Waits until the server accepts a connection; False if it has ended instead."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError, asyncpg.PostgresError, import_module("asyncmy").errors.Error):
            async with outside(url) as connection:
                await connection.execute("SELECT 1")
                return True
        await asyncio.sleep(0.05)
    return False


@contextmanager
def temporary_folder() -> Generator[Path, None, None]:
    """A temporary folder with a short path (sockets) which other users can enter, below /tmp."""
    folder = Path(tempfile.mkdtemp(prefix="asgi-db-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _programs(server: Server, *names: str) -> list[str]:
    if server.missing:
        raise RuntimeError(server.advice)
    return [find(name) or name for name in names]


def free_port() -> int:
    """A port which clients do not get for themselves, so that it is free for a restart too."""
    while True:
        port = random.randrange(15000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def unique_user() -> str:
    """A user which no other server knows: whoever logs in has reached the right server."""
    return f"tester_{uuid4().hex[:8]}"


def with_driver(url: str) -> str:
    """The URL with the driver with which the tests use this database now."""
    parsed = make_url(url)
    return _plain(parsed.set(drivername=DRIVERS[parsed.get_backend_name()]))


def _plain(url: URL) -> str:
    return url.render_as_string(hide_password=False)
