"""The hosts in a database URL, in each of the forms in which they are written.

libpq and its users write `postgresql://a:1,b:2/db`, or `?host=a,b&port=1,2`; SQLAlchemy writes
`?host=a:1&host=b:2`. What is read here is written as `?host=a,b&port=1,2`, which SQLAlchemy
understands with both drivers of PostgreSQL, IPv6 addresses and folders of sockets included.

Sources: https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-MULTIPLE-HOSTS,
https://docs.sqlalchemy.org/en/21/dialects/postgresql.html#specifying-multiple-fallback-hosts
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import IPv6Address
from typing import NamedTuple
from urllib.parse import unquote

from sqlalchemy import URL, make_url


class Host(NamedTuple):
    """A server: its name, its address or the folder of its socket, and its port if it has one."""

    name: str
    port: int | None

    @property
    def is_socket(self) -> bool:
        """Whether it is the folder of a socket, or an abstract one."""
        return self.name.startswith(("/", "@"))

    def __str__(self) -> str:
        name = f"[{self.name}]" if ":" in self.name and not self.is_socket else self.name
        return name if self.port is None else f"{name}:{self.port}"


def is_host_name(host: str) -> bool:
    """Whether that is a host name or an IP address, and nothing else."""
    # SQLAlchemy renders the host unescaped, so "/" or "@" in it would change the URL's meaning.
    if ":" not in host:
        return re.fullmatch(r"[\w.-]+", host) is not None
    try:
        return re.fullmatch(r"[\w.:%-]+", host) is not None and bool(IPv6Address(host))
    except ValueError:
        return False


def is_port(port: object) -> bool:
    """Whether that is the number of a port."""
    return isinstance(port, int) and not isinstance(port, bool) and 1 <= port <= 65535


_AUTHORITY = re.compile(r"(\w[\w+]*://(?:[^:/]*(?::[^@]*)?@)?)([^/?]*)(.*)", re.DOTALL)
"""What stands before the hosts, the hosts, and the rest, where SQLAlchemy would divide a URL."""


def make_url_of_hosts(url: str) -> URL:
    """Parse a URL, also one of several hosts, or whose host is an escaped folder.

    SQLAlchemy cannot parse `a:1,b:2`, and takes the port of `a,b:2` for that of both.
    """
    parts = _AUTHORITY.fullmatch(url)
    if parts is None or not ("," in parts[2] or parts[2][:3].upper() == "%2F"):
        return make_url(url)
    return make_url(parts[1] + parts[3]).set(host=unquote(parts[2]))


def hosts_of(url: URL) -> tuple[Host, ...]:
    """Return the hosts of a URL; none if it leaves them to the driver.

    Raises:
        ValueError: they cannot be read; the message says why, and repeats nothing of them.
    """
    query = url.normalized_query
    named = _listed(query.get("host", ()))
    if not any(named):
        named = [url.host or ""] if is_host_name(url.host or "") else _listed((url.host or "",))
    if url.port is not None and not is_port(url.port):
        raise ValueError(_NO_PORT)
    ports = _listed(query.get("port", ())) or [str(url.port or "")]
    for_each = [_port(port) for port in ports]
    if not any(named):
        return ()
    hosts = [_host(name.strip()) for name in named]
    if len(ports) > 1 and any(host.port is not None for host in hosts):
        raise ValueError("has ports both beside its hosts and in port=: write them in one place")
    if len(ports) not in (1, len(hosts)):
        raise ValueError("has not as many ports as hosts: write one for each, or one for all")
    if len(ports) == 1:
        for_each *= len(hosts)
    return tuple(
        host if host.port is not None else Host(host.name, port)
        for host, port in zip(hosts, for_each, strict=True)
    )


def _listed(values: Sequence[str]) -> list[str]:
    return [each for value in values for each in value.split(",")]


def _host(written: str) -> Host:
    name, port = written, ""
    if written.startswith(("/", "@")):
        if found := re.fullmatch(r"(.+):(\d+)", written):
            name, port = found[1], found[2]
    elif found := re.fullmatch(r"\[([^\]]*)\](?::(.+))?", written):
        name, port = found[1], found[2] or ""
    elif found := re.fullmatch(r"([^:]*):([^:]+)", written):
        name, port = found[1], found[2]
    host = Host(name, _port(port))
    if not host.is_socket and not is_host_name(name):
        raise ValueError("has a host that is no name and no address: correct it")
    return host


def _port(written: str) -> int | None:
    if not written.strip():
        return None
    port = int(written) if re.fullmatch(r"\s*[0-9]{1,5}\s*", written) else 0
    if not is_port(port):
        raise ValueError(_NO_PORT)
    return port


_NO_PORT = "has a port that is not from 1 to 65535: correct it"


def with_hosts(url: URL, hosts: Sequence[Host], default_port: int) -> URL:
    """Return the URL with these hosts, in the form that SQLAlchemy understands.

    Args:
        url: the URL; the hosts that it has are replaced.
        hosts: one or more.
        default_port: that of a host among several that names none.
    """
    place: dict[str, str] = {}
    host, port = None, None
    if len(hosts) > 1:
        place["host"] = ",".join(each.name for each in hosts)
        place["port"] = ",".join(str(each.port or default_port) for each in hosts)
    elif hosts[0].is_socket:
        place["host"] = hosts[0].name
        if hosts[0].port is not None:
            place["port"] = str(hosts[0].port)
    else:
        host, port = hosts[0]
    query = {name: value for name, value in url.query.items() if name not in ("host", "port")}
    return URL.create(
        url.drivername, url.username, url.password, host, port, url.database, {**place, **query}
    )


def describe_hosts(url: URL) -> str:
    """Name the hosts of any URL for a person, as in `a:5432,b:5433`; "" for that of a socket."""
    try:
        return ",".join(str(host) for host in hosts_of(url) if not host.is_socket)
    except ValueError:
        return ""
