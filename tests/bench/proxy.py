"""`python -m tests.bench.proxy PORT SECONDS`: a network that is as far away as you like.

Everything arrives so many seconds late, in either direction, but nothing waits for what went
before it: it is latency, not a narrow pipe. It prints the port on which it listens.

All delays are the same, so what came first is due first: a queue is enough. `epoll` waits in
whole milliseconds, `select` in microseconds, so the one waits for the other.
"""

import select
import socket
import sys
import time
from collections import deque


class Proxy:
    """Forwards each connection to a port of this machine."""

    def __init__(self, target: int, delay: float) -> None:
        self._target = target
        self._delay = delay
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._epoll = select.epoll()
        self._epoll.register(self._listening, select.EPOLLIN)
        self._sockets = dict[int, socket.socket]()
        self._other_side = dict[int, int]()
        self._due = deque[tuple[float, int, bytes]]()
        self.port: int = self._listening.getsockname()[1]

    def run(self) -> None:
        """Forward for ever."""
        while True:
            left = self._due[0][0] - time.monotonic() if self._due else None
            if left is None or left > 0:
                select.select([self._epoll], [], [], left)
            for number, _ in self._epoll.poll(0):
                if number == self._listening.fileno():
                    self._accept()
                else:
                    self._receive(number)
            self._deliver()

    def _accept(self) -> None:
        client, _ = self._listening.accept()
        server = socket.create_connection(("127.0.0.1", self._target))
        for one, other in ((client, server), (server, client)):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets[one.fileno()] = one
            self._other_side[one.fileno()] = other.fileno()
            self._epoll.register(one, select.EPOLLIN)

    def _receive(self, number: int) -> None:
        try:
            data = self._sockets[number].recv(65536)
        except OSError:
            data = b""
        if not data:
            self._epoll.unregister(number)
        self._due.append((time.monotonic() + self._delay, self._other_side[number], data))

    def _deliver(self) -> None:
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            _, number, data = self._due.popleft()
            receiver = self._sockets.get(number)
            if receiver is None:
                continue
            try:
                if data:
                    receiver.sendall(data)
                else:
                    receiver.shutdown(socket.SHUT_WR)
            except OSError:  # it has gone, which its own end will tell
                pass
            if not data:
                self._close_if_done(number)

    def _close_if_done(self, number: int) -> None:
        """Close both sides as soon as both have said that it is over."""
        other = self._other_side[number]
        try:
            self._epoll.modify(number, select.EPOLLIN)
        except FileNotFoundError:
            for ended in (number, other):
                self._sockets.pop(ended).close()
                del self._other_side[ended]


def main() -> None:
    """Serve until it is killed."""
    target, delay = sys.argv[1:]
    proxy = Proxy(int(target), float(delay))
    print(proxy.port, flush=True)
    proxy.run()


if __name__ == "__main__":
    main()
