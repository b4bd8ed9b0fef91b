"""A private PgBouncer in transaction pooling, before the PostgreSQL server of the tests.

Nothing here uses the library. Any user name is taken, and each database of the server is there
under its own name.
"""

import signal
from collections.abc import Generator
from contextlib import contextmanager

from sqlalchemy.engine import make_url

from tests import servers
from tests.programs import PGBOUNCER, find

_CONFIGURATION = """
[databases]
* = host={server.host} port={server.port} user={server.username} password={server.password}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 200
query_wait_timeout = {query_wait_timeout}
"""


@contextmanager
def pgbouncer(
    server_url: str, *, pool_size: int, query_wait_timeout: int = 120
) -> Generator[int, None, None]:
    """Start a PgBouncer; the result is its port.

    Args:
        server_url: of the PostgreSQL server.
        pool_size: how many connections to the server all clients of a database share.
        query_wait_timeout: seconds in which a client gets one of these, or is sent away.
    """
    if PGBOUNCER.missing:
        raise RuntimeError(PGBOUNCER.advice)
    server = make_url(server_url)
    with servers.temporary_folder() as folder:

        def command(port: int) -> list[str]:
            file = folder / "pgbouncer.ini"
            file.write_text(
                _CONFIGURATION.format(
                    server=server,
                    port=port,
                    pool_size=pool_size,
                    query_wait_timeout=query_wait_timeout,
                )
            )
            return [find("pgbouncer") or "pgbouncer", str(file)]

        with servers.running(
            command,
            lambda port: through(port, server_url),
            folder,
            {"fast": signal.SIGKILL, "immediate": signal.SIGKILL},  # it keeps nothing
        ) as process:
            yield int(make_url(process.url).port or 0)


def through(port: int, url: str) -> str:
    """The same database, through the PgBouncer on this port."""
    return make_url(url).set(host="127.0.0.1", port=port).render_as_string(hide_password=False)
