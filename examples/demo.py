"""`make demo`: runs the shop under uvicorn and tries out, over real HTTP, what asgi-db promises.

Each line with a tick is a promise, followed by what the client saw and what the database holds.
The exit code is 0 only if all of them were kept.
"""

import os
import re
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import httpx

from asgi_db import create_database_url

POOL_SIZE = 2
READERS = 5
BROCHURE = 5 * 1024 * 1024


class Broken(Exception):
    """Raised when a promise was not kept."""


def check(kept: bool, otherwise: str) -> None:
    if not kept:
        raise Broken(otherwise)


class Shop:
    """The running shop: a client for it, its database file and its log."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "shop.db"
        self.log = folder / "log"
        self.say: Callable[[str], None] = print
        self.client = httpx.Client(timeout=10, trust_env=False)
        url = create_database_url("sqlite", database=str(self.file))
        settings = {
            "DATABASE_URL": url.render_as_string(),
            "DATABASE_REPLICA_URLS": "",
            "POOL_SIZE": str(POOL_SIZE),
        }
        command = [sys.executable, "-m", "uvicorn", "--port", "0", "shop:app"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--app-dir", str(Path(__file__).parent)],
                cwd=folder,
                env={**os.environ, **settings},
                stdout=log,
                stderr=log,
            )

    def wait_until_it_serves(self) -> None:
        deadline = time.monotonic() + 60
        while not (served := re.search(r"running on (http://\S+)", self.log.read_text())):
            check(self.process.poll() is None, f"the shop ended:\n{self.log.read_text()}")
            check(time.monotonic() < deadline, "the shop did not start within 60 s")
            time.sleep(0.05)
        self.client.base_url = served[1]

    def request(self, method: str, path: str) -> httpx.Response:
        response = self.client.request(method, path)
        self.say(f"{method} {path} -> {response.status_code} {response.text}")
        return response

    def orders(self) -> dict[int, int]:
        """What another connection finds: how many orders there are of each product."""
        with closing(sqlite3.connect(self.file)) as connection:
            rows = connection.execute("SELECT product_id, count(*) FROM orders GROUP BY product_id")
            orders: dict[int, int] = dict(rows.fetchall())
        found = ", ".join(f"{count} of product {product}" for product, count in orders.items())
        self.say(f"orders in the database: {found or 'none'}")
        return orders

    def stop(self) -> None:
        self.client.close()
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def read(shop: Shop) -> None:
    """A read is answered."""
    response = shop.request("GET", "/products/1")
    check(response.json() == {"id": 1, "name": "Teapot"}, "the product should have come back")


def write(shop: Shop) -> None:
    """A write is in the database before the client sees its status line."""
    check(shop.orders() == {}, "there should be no order yet")
    with shop.client.stream("POST", "/orders?product_id=1&quantity=3") as response:
        shop.say(f"POST /orders?product_id=1&quantity=3 -> {response.status_code}, and just then:")
        check(response.status_code == 201, "the order should have been accepted")
        check(shop.orders() == {1: 1}, "the order should have been there already")


def failed_commit(shop: Shop) -> None:
    """A write whose COMMIT fails is not acknowledged: the application's handler answers it."""
    response = shop.request("POST", "/orders?product_id=99&quantity=1")
    for line in shop.log.read_text().splitlines():
        if "COMMIT failed" in line:
            shop.say(f"log: {line}")
    check(99 not in shop.orders(), "the refused order should not be in the database")
    check(response.status_code == 409, "the client should have got the answer of the handler, 409")


def after_the_failure(shop: Shop) -> None:
    """The connection whose COMMIT failed does not spoil the requests that follow."""
    codes = [shop.client.post("/orders?product_id=2&quantity=1").status_code for _ in range(20)]
    shop.say(f"20 times POST /orders?product_id=2&quantity=1 -> {sorted(set(codes))}")
    check(codes == [201] * 20, "all of the orders should have been accepted")
    check(shop.orders().get(2) == 20, "all of the orders should be in the database")


def slow_downloads(shop: Shop) -> None:
    """Slow downloads hold no connection, so that other requests are answered at once."""
    with ExitStack() as stack:
        readers = [stack.enter_context(stalled_reader(shop)) for _ in range(READERS)]
        shop.say(f"{READERS} clients have the status line of 5 MB, and read no further")
        state = shop.request("GET", "/pool").json()
        check(state["downloads"] == READERS, f"{READERS} downloads should be going on")
        check(state["pool"].endswith("connections: 0"), "no connection should be out of the pool")
        begun = time.monotonic()
        codes = [shop.request("GET", "/products/1").status_code for _ in range(POOL_SIZE + 1)]
        seconds = time.monotonic() - begun
        shop.say(f"these {len(codes)} took {seconds * 1000:.0f} ms together")
        check(codes == [200] * len(codes), "the other requests should have been answered")
        sizes = [read_to_the_end(reader) for reader in readers]
    shop.say(f"then the clients read on, and got {sizes} bytes")
    check(sizes == [BROCHURE] * READERS, "each download should have been complete")


@contextmanager
def stalled_reader(shop: Shop) -> Generator[socket.socket]:
    """A client that reads the head of the brochure, and nothing of its body."""
    url = shop.client.base_url
    with socket.socket() as connection:
        connection.settimeout(10)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        connection.connect((url.host, url.port))
        connection.sendall(b"GET /brochure HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n")
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            byte = connection.recv(1)
            check(byte != b"", f"the download broke off: {head!r}")
            head += byte
        check(head.startswith(b"HTTP/1.1 200 "), f"the download should have begun: {head!r}")
        yield connection


def read_to_the_end(connection: socket.socket) -> int:
    size = 0
    while received := connection.recv(1 << 20):
        size += len(received)
    return size


def shutdown(shop: Shop) -> None:
    """At its end the application closes every connection to the database."""
    log = shop.file.with_name("shop.db-wal")
    shop.say(f"before: SQLite's write-ahead log is {'there' if log.exists() else 'gone'}")
    check(log.exists(), "the shop should have had open connections")
    shop.stop()
    shop.say(f"after:  SQLite's write-ahead log is {'there' if log.exists() else 'gone'}")
    check(not log.exists(), "SQLite removes its log when the last connection is closed")


PROMISES = [read, write, failed_commit, after_the_failure, slow_downloads, shutdown]
KEPT, BROKEN = ("✓", "✗") if sys.stdout.encoding.lower().startswith("utf") else ("+", "!")


def keeps(promise: Callable[[Shop], None], shop: Shop) -> bool:
    """Try one promise out, and print what was seen."""
    seen = list[str]()
    shop.say = seen.append
    try:
        promise(shop)
        kept = True
    except (Broken, httpx.HTTPError, OSError, ValueError, sqlite3.Error) as error:
        seen.append(f"BROKEN: {error or type(error).__name__}")
        kept = False
    print(f"\n{KEPT if kept else BROKEN} {promise.__doc__}", *seen, sep="\n    ", flush=True)
    return kept


def main() -> int:
    print("The shop of examples/shop.py, under uvicorn, on a fresh SQLite file.")
    print(f"Its pool has {POOL_SIZE} connections, and no overflow.")
    print("`make serve` leaves it running, with a live page of it at /db.", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        shop = Shop(Path(folder))
        try:
            shop.wait_until_it_serves()
            broken = [promise.__name__ for promise in PROMISES if not keeps(promise, shop)]
        except Broken as error:
            print(f"\n{BROKEN} {error}")
            return 1
        finally:
            shop.stop()
    print(f"\nBROKEN: {', '.join(broken)}." if broken else "\nAll as promised.")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
