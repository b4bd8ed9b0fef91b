"""A real uvicorn process, and a client which sees every byte that it sends."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

# The folder of the tests comes last, so that an installed asgi_db is not shadowed by the sources.
_RUN = "import sys; sys.path.append(sys.argv.pop(1)); from uvicorn.main import main; main()"

_SERVING = re.compile(r"Uvicorn running on http://127\.0\.0\.1:(\d+)")


@dataclass
class Uvicorn:
    """A uvicorn process.

    Attributes:
        port: where it serves; 0 if it has ended before it did.
    """

    process: "subprocess.Popen[bytes]"
    output: Path
    port: int = 0

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self.output.read_text()

    def wait_until_it_serves(self, within: float = 30) -> None:
        """Wait for the line with which uvicorn says that it does, or for its end."""
        deadline = time.monotonic() + within
        while (line := _SERVING.search(self.log)) is None and self.process.poll() is None:
            assert time.monotonic() < deadline, f"uvicorn does not start:\n{self.log}"
            time.sleep(0.02)
        if line is not None:
            self.port = int(line[1])

    def stop(self, within: float = 15) -> int:
        """Ask it to end, wait until it has, and return its exit code."""
        self.process.terminate()
        return self.process.wait(within)


@contextmanager
def uvicorn(
    app: str, folder: Path, *options: str, **environment: str
) -> Generator[Uvicorn, None, None]:
    """Serve an application on a free port, in a process of its own; it ends with the block.

    Args:
        app: `module:attribute`.
        folder: where it runs, and its output goes.
        options: for uvicorn's command line.
        environment: variables for the process.
    """
    root = Path(__file__).parents[1]
    command: list[str | Path] = [sys.executable, "-P", "-c", _RUN, root, app]
    output = folder / "uvicorn.log"
    with output.open("wb") as log:
        process = subprocess.Popen(
            [*command, "--host=127.0.0.1", "--port=0", *options],
            cwd=folder,
            env={**os.environ, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
    server = Uvicorn(process, output)
    try:
        server.wait_until_it_serves()
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()


@dataclass(frozen=True)
class Answer:
    """The response to one request."""

    status: int
    body: bytes = b""


class Client:
    """One keep-alive connection. A byte too many from the server breaks the next answer."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._stream = self._socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._socket.close()

    def request(self, method: str, path: str, *headers: str) -> Answer:
        """Send a request, and return the whole answer."""
        self.send(method, path, *headers)
        status = self.status()
        return Answer(status, self.body())

    def send(self, method: str, path: str, *headers: str) -> None:
        """Send a request."""
        lines = [f"{method} {path} HTTP/1.1", "Host: testserver", "Content-Length: 0", *headers]
        self._socket.sendall("\r\n".join([*lines, "", ""]).encode())

    def status(self) -> int:
        """The status line of the next answer, as soon as it is there."""
        line = self._stream.readline().decode()
        version, _, status = line.partition(" ")
        assert version == "HTTP/1.1", f"no status line: {line!r}"
        return int(status[:3])

    def body(self) -> bytes:
        """The body after a status line."""
        length = 0
        while (line := self._stream.readline()) != b"\r\n":
            name, _, value = line.decode().partition(":")
            if name.lower() == "content-length":
                length = int(value)
        return self._stream.read(length)

    def rest(self) -> bytes:
        """What else comes until the server closes the connection."""
        return self._stream.read()


def slow_reader(port: int, path: str) -> socket.socket:
    """A client which asks for something and reads nothing of it, with little room on its side."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: testserver\r\n\r\n".encode())
    return client
