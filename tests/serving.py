"""Real servers, most in a process of their own, and a client which sees every byte they send."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import uvicorn

from asgi_db import Database
from asgi_db.types import ASGIApp
from tests.servers import DatabaseServer, Row, outside, run, server_connections
from tests.tables import Base, Deferred

PAIRS = 500_000
"""Where the numbers begin which are written together with their negatives, or not at all."""

_ROOT = Path(__file__).parents[1]

# The folder of the tests comes last, so that an installed asgi_db is not shadowed by the sources.
_RUN = "import sys; sys.path.append(sys.argv.pop(1)); sys.argv[0] = 'server'\n"


@dataclass(frozen=True)
class Program:
    """An ASGI server.

    Attributes:
        options: where it listens; `{port}` is a free port, where it cannot choose one itself.
        serving: the line with which it says that it serves, and where.
        graceful: the option for the seconds which requests get to end in at shutdown.
        workers: the option for the number of its processes.
        ends: the exit codes after a SIGTERM.
        cancels: whether a request is cancelled when its client goes; a stream always is.
    """

    name: str
    run: str
    options: tuple[str, ...]
    serving: str
    graceful: str
    workers: str = "--workers"
    ends: tuple[int, ...] = (0,)
    cancels: bool = False

    def graceful_limit(self, seconds: int) -> str:
        """The option with which requests get so many seconds at shutdown."""
        return f"{self.graceful}={seconds}"

    def command(self, app: str) -> list[str | Path]:
        """The command line for an application, `module:attribute`."""
        options = [option.format(port=_free_port()) for option in self.options]
        return [sys.executable, "-P", "-c", _RUN + self.run, _ROOT, app, *options]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


UVICORN = Program(
    name="uvicorn",
    run="from uvicorn.main import main; main()",
    options=("--host=127.0.0.1", "--port=0"),
    serving=r"Uvicorn running on http://127\.0\.0\.1:(\d+)",
    graceful="--timeout-graceful-shutdown",
    ends=(0, -signal.SIGTERM),  # it raises the signal again when it is done
)
HYPERCORN = Program(
    name="hypercorn",
    run="from hypercorn.__main__ import main; sys.exit(main())",
    options=("--bind=127.0.0.1:0",),
    serving=r"Running on http://127\.0\.0\.1:(\d+)",
    graceful="--graceful-timeout",
)
GRANIAN = Program(
    name="granian",
    run="from granian.cli import entrypoint; entrypoint()",
    options=("--interface=asgi", "--host=127.0.0.1", "--port={port}"),
    serving=r"Listening at: http://127\.0\.0\.1:(\d+)",
    graceful="--workers-kill-timeout",
)
GUNICORN = Program(
    name="gunicorn",
    run="from gunicorn.app.wsgiapp import run; run()",
    options=(
        "--worker-class=asgi",
        "--bind=127.0.0.1:0",
        "--no-control-socket",
        "--keep-alive=30",
        "--asgi-disconnect-grace-period=0",
    ),
    serving=r"Listening at: http://127\.0\.0\.1:(\d+)",
    graceful="--graceful-timeout",
    cancels=True,
)
GUNICORN_UVICORN = Program(
    name="gunicorn-uvicorn",
    run=GUNICORN.run,
    options=(
        "--worker-class=uvicorn_worker.UvicornWorker",
        "--bind=127.0.0.1:0",
        "--no-control-socket",
        "--keep-alive=30",
    ),
    serving=GUNICORN.serving,
    graceful=GUNICORN.graceful,
)
UVICORN_WITHOUT_LIFESPAN = replace(
    UVICORN, name="uvicorn-without-lifespan", options=(*UVICORN.options, "--lifespan=off")
)
GRANIAN_WITHOUT_LIFESPAN = replace(
    GRANIAN,
    name="granian-without-lifespan",
    options=("--interface=asginl", *GRANIAN.options[1:]),
)


@dataclass
class Server:
    """A running server.

    Attributes:
        port: where it serves; 0 if it has ended before it did.
    """

    program: Program
    process: "subprocess.Popen[bytes]"
    output: Path
    port: int = 0

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self.output.read_text()

    def client(self) -> "Client":
        """A connection to it."""
        return Client(self.port)

    def state(self) -> dict[str, int]:
        """How the application says that things stand."""
        with self.client() as client:
            found: dict[str, int] = json.loads(client.request("GET", "/state").body)
            return found

    def wait_until(self, holds: Callable[[], bool], within: float = 20) -> None:
        """Wait for something which is to come."""
        deadline = time.monotonic() + within
        while not holds():
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)

    def wait_until_it_serves(self, within: float = 30) -> None:
        """Wait until it takes connections, or has ended."""

        def serves_or_has_ended() -> bool:
            if (line := re.search(self.program.serving, self.log)) is not None:
                with suppress(OSError), socket.create_connection(("127.0.0.1", int(line[1]))):
                    self.port = int(line[1])
            return self.port != 0 or self.process.poll() is not None

        self.wait_until(serves_or_has_ended, within)

    def terminate(self) -> None:
        """Ask it to end."""
        self.process.terminate()

    def stop(self, within: float = 15) -> int:
        """Ask it to end, wait until it has, and return its exit code."""
        self.terminate()
        return self.process.wait(within)


@contextmanager
def start(
    program: Program, folder: Path, *options: str, **environment: str
) -> Generator[Server, None, None]:
    """Start a server with `tests.served_app` in a process of its own; it ends with the block.

    Args:
        program: the server.
        folder: where it runs, and its output goes.
        options: for the server's command line.
        environment: variables for the process.
    """
    output = folder / "server.log"
    with output.open("wb") as log:
        process = subprocess.Popen(
            [*program.command("tests.served_app:app"), *options],
            cwd=folder,
            env={**os.environ, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # its workers are of its group, and end with it
        )
    try:
        yield Server(program, process, output)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def serve(
    program: Program, folder: Path, *options: str, **environment: str
) -> Generator[Server, None, None]:
    """The same, and wait until it serves."""
    with start(program, folder, *options, **environment) as server:
        server.wait_until_it_serves()
        assert server.port, server.log
        yield server


@asynccontextmanager
async def served_here(app: ASGIApp) -> AsyncGenerator[tuple[uvicorn.Server, int]]:
    """uvicorn in this process and event loop, and its port."""
    config = uvicorn.Config(
        app,
        port=0,
        log_config=None,
        access_log=False,
        ws="websockets-sansio",
        timeout_keep_alive=60,  # a busy machine lets a client wait
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    async with asyncio.timeout(10):
        while not server.started:  # noqa: ASYNC110 - it gives no event for it
            await asyncio.sleep(0.01)
    try:
        yield server, server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await serving


def run_program(
    program: str, *arguments: str, folder: Path, within: float = 60
) -> "subprocess.CompletedProcess[str]":
    """Run a Python program in a process of its own, and wait for its end."""
    return subprocess.run(
        [sys.executable, "-P", "-c", _RUN + program, _ROOT, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=within,
    )


@dataclass(frozen=True)
class Answer:
    """The response to one request."""

    status: int
    body: bytes = b""


class Client:
    """One keep-alive connection. A byte too many from the server breaks the next answer.

    Attributes:
        headers: those of the last answer.
    """

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._stream = self._socket.makefile("rb")
        self.headers: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Close the connection, whatever is under way."""
        self._stream.close()
        self._socket.close()

    def request(self, method: str, path: str, *headers: str) -> Answer:
        """Send a request, and return the whole answer."""
        self.send(method, path, *headers)
        status = self.status()
        return Answer(status, self.body())

    def send(self, method: str, path: str, *headers: str) -> None:
        """Send a request."""
        if not any(header.startswith("Content-Length") for header in headers):
            headers = ("Content-Length: 0", *headers)
        lines = [f"{method} {path} HTTP/1.1", "Host: testserver", *headers]
        self._socket.sendall("\r\n".join([*lines, "", ""]).encode())

    def send_body(self, piece: bytes) -> None:
        """Send a piece of the body of the request."""
        self._socket.sendall(piece)

    def status(self) -> int:
        """The status line of the next answer, as soon as it is there."""
        line = self._stream.readline().decode()
        version, _, status = line.partition(" ")
        assert version == "HTTP/1.1", f"no status line: {line!r}"
        return int(status[:3])

    def body(self) -> bytes:
        """The body after a status line."""
        self._read_headers()
        if self.headers.get("transfer-encoding") != "chunked":
            return self._stream.read(int(self.headers.get("content-length", 0)))
        chunks: list[bytes] = []
        while chunk := self.next_chunk():
            chunks.append(chunk)
        return b"".join(chunks)

    def first_chunk(self) -> bytes:
        """The first piece of a streamed body, after a status line."""
        self._read_headers()
        return self.next_chunk()

    def next_chunk(self) -> bytes:
        """The next piece of a streamed body; nothing at its end."""
        length = int(self._stream.readline(), 16)
        chunk = self._stream.read(length)
        assert self._stream.readline() == b"\r\n"
        return chunk

    def rest(self) -> bytes:
        """What else comes until the server closes the connection."""
        return self._stream.read()

    def _read_headers(self) -> None:
        self.headers = {}
        while (line := self._stream.readline()) != b"\r\n":
            name, _, value = line.decode().partition(":")
            self.headers[name.lower()] = value.strip()


def slow_reader(port: int, path: str) -> socket.socket:
    """A client which asks for something and reads nothing of it, with little room on its side."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: testserver\r\n\r\n".encode())
    return client


@dataclass(frozen=True)
class Databases:
    """A database of each kind, with tables, and what their servers say of the clients."""

    urls: dict[str, str]

    @property
    def variables(self) -> dict[str, str]:
        """The environment of the application."""
        return {f"{name.upper()}_URL": url for name, url in self.urls.items()}

    def clients(self, name: str) -> list[str]:
        """The states in which the server sees its clients."""
        return [client.state for client in run(server_connections(self.urls[name]))]

    def client_ids(self, name: str) -> set[int]:
        """The numbers which the server has given its clients."""
        return {client.id for client in run(server_connections(self.urls[name]))}

    def execute(self, name: str, sql: str) -> list[Row]:
        """Run one statement on a connection of its own."""

        async def execute() -> list[Row]:
            async with outside(self.urls[name]) as connection:
                return await connection.execute(sql)

        return run(execute())

    def pairs(self, name: str) -> list[int]:
        """The numbers from `PAIRS` on which were written; never one without its negative."""
        rows = self.execute(name, f"SELECT id FROM author WHERE id < 0 OR id >= {PAIRS}")
        numbers = {int(id) for (id,) in rows}
        assert numbers == {-id for id in numbers}, "half of it is committed"
        return sorted(id for id in numbers if id > 0)


@contextmanager
def databases(*servers: DatabaseServer) -> Generator[Databases, None, None]:
    """Fresh databases with tables, which live as long as the block."""

    async def create_tables(url: str) -> None:
        async with Database(url) as database:
            await database.create_tables(Base.metadata)
            if database.url.get_backend_name() == "postgresql":
                await database.create_tables(Deferred.metadata)

    with ExitStack() as stack:
        urls = [stack.enter_context(server.fresh_database()) for server in servers]
        for url in urls:
            run(create_tables(url))
        yield Databases({url.partition("+")[0]: url for url in urls})
