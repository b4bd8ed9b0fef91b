"""What `asgi-db check` has found, and what it compares a server with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import ip_address
from typing import NamedTuple

from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError

from asgi_db.hosts import Host
from asgi_db.profiles import PoolProfile


class Severity(Enum):
    """How much a finding matters."""

    ERROR = "error"
    """The application cannot work like this."""

    WARNING = "warning"
    """It works, but something can be lost, refused or seen by others."""

    NOTE = "note"
    """Worth knowing."""


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be, and what to do about it."""

    severity: Severity
    problem: str
    remedy: str


@dataclass
class Report:
    """The facts about a database, the settings that were looked at, and the findings."""

    facts: dict[str, str] = field(default_factory=dict[str, str])
    settings: dict[str, str] = field(default_factory=dict[str, str])
    findings: list[Finding] = field(default_factory=list[Finding])

    def error(self, problem: str, remedy: str) -> None:
        """Add a finding without whose remedy the application cannot work."""
        self.findings.append(Finding(Severity.ERROR, problem, remedy))

    def warning(self, problem: str, remedy: str) -> None:
        """Add a finding with which the application works, for a price."""
        self.findings.append(Finding(Severity.WARNING, problem, remedy))

    def note(self, problem: str, remedy: str) -> None:
        """Add a finding that is worth knowing."""
        self.findings.append(Finding(Severity.NOTE, problem, remedy))

    def count(self, severity: Severity) -> int:
        """Return how many findings of this severity there are."""
        return sum(finding.severity is severity for finding in self.findings)


class Server(NamedTuple):
    """What tells one server from another, and how it replicates.

    Attributes:
        identity: what no other server has.
        database: which of its databases it is.
        is_replica: whether it follows another server.
        receives: whether it is connected to that one.
        takes_writes: whether a replica takes writes of its own.
        connections: how many connections it allows; None if a pooler decides that.
    """

    identity: str
    database: str
    is_replica: bool
    receives: bool
    takes_writes: bool
    connections: int | None = None


def describe(error: BaseException) -> str:
    """Say what an error is, in one line and without SQLAlchemy's advice."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig else error
    what = str(cause).partition("\n")[0].rstrip(".") or "no answer in time"
    name = type(cause).__name__
    return what if name in ("Error", "ConfigurationError") else f"{name}: {what}"


@dataclass(frozen=True)
class Plan:
    """What the application is going to do to the database.

    Attributes:
        url: where it is.
        pool: the name of the pool profile.
        profile: the pool profile.
        processes: how many processes there are.
        pools: how many pools of one process may lead to this server: more than one if it is, or
            becomes, one of the replicas.
    """

    url: URL
    pool: str
    profile: PoolProfile
    processes: int
    pools: int = 1

    def check_connections(self, report: Report, limits: Mapping[str, int]) -> None:
        """Compare the connections of all processes with what the server allows.

        Args:
            limits: the numbers of connections, by the settings that they come from.
        """
        name, limit = min(limits.items(), key=lambda item: item[1])
        each = self.profile.pool_size + self.profile.max_overflow
        wanted = each * self.pools * self.processes
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes"
        pools = f" and {self.pools} pools each" if self.pools > 1 else ""
        pool = f'{processes} with pool="{self.pool}"{pools}'
        report.facts["connections"] = f"up to {wanted} for {pool}, of {limit} ({name})"
        if wanted > limit:
            report.error(
                f"{pool} may open {wanted} connections, and the server allows {limit} ({name}).",
                "Use fewer processes, a smaller PoolProfile, or a pooler such as PgBouncer; or"
                f" raise {name.partition(',')[0]}.",
            )

    def check_encryption(self, report: Report, encrypted: bool, remedy: str, host: Host) -> None:
        """Warn if rows cross a network unencrypted.

        Args:
            remedy: how to encrypt them.
            host: the server that was reached.
        """
        report.facts["encryption"] = "on" if encrypted else "off"
        if is_remote(host) and not encrypted:
            report.warning(
                f"The connection to {host.name} is not encrypted: anyone on the network path can"
                " read the rows.",
                f"{remedy} Inside a private network you may leave it.",
            )


def is_remote(host: Host) -> bool:
    """Whether a server is on another machine, judged by its name."""
    if host.is_socket or host.name == "localhost":
        return False
    try:
        return not ip_address(host.name.partition("%")[0]).is_loopback
    except ValueError:  # It is a host name.
        return True
