"""The servers of a database, as one session uses them."""

from __future__ import annotations

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from asgi_db.drivers import driver_of
from asgi_db.drivers.outages import WrongSettingsError
from asgi_db.drivers.replication import Position
from asgi_db.errors import DatabaseConflictError, DatabaseDownError
from asgi_db.modes import Mode
from asgi_db.replicas.own_writes import OwnWrites
from asgi_db.replicas.replica import Replica
from asgi_db.replicas.servers import Servers


class Choice:
    """Chooses the server for each unit of work of one session.

    A unit that only reads runs on a replica that has everything which its client was told is
    committed, all others on the primary. After a write, everything in a request runs on the
    primary.

    Attributes:
        engine: the engine of the primary.
        statistics: where the units are counted.
        own_writes: what was committed for the client of the session, or for its script.
        is_of_request: whether the session serves one request, all whose reads go to one server.
        has_read: whether it has read from the replica.
    """

    is_of_request = False
    _replica: Replica | None = None
    _is_chosen = False
    _commits = 0
    has_read = False

    def __init__(self, servers: Servers, own_writes: OwnWrites) -> None:
        self.own_writes = own_writes
        self.engine = servers.primary.engine
        self.statistics = servers.primary.statistics
        self._servers = servers

    def bind_for(self, bind: Engine | Connection, mode: Mode) -> Engine | Connection:
        """Return the variant of an engine on which transactions begin as the mode says."""
        primary, replica = self._servers.primary, self._replica
        if replica is not None and mode.autocommit and self._commits != self.own_writes.commits:
            # Another session has committed since; each statement sees what there is by then.
            self._replica = replica = None
        if replica is not None and bind is self.engine.sync_engine:
            return replica.life.bind_for(replica.life.engine.sync_engine, mode)
        return primary.bind_for(bind, mode)

    def holders(self) -> list[str]:
        """Return the routes that have a connection of the server checked out."""
        life = self._servers.primary if self._replica is None else self._replica.life
        return life.holders()

    async def choose(self, mode: Mode) -> None:
        """Choose the server for a unit that is about to begin.

        Args:
            mode: the mode in which it begins.
        """
        may_use_replica = mode.may_use_replica and not self.own_writes.needs_primary
        if not may_use_replica:
            self._replica = None
        elif not (self._is_chosen and self.is_of_request):
            self.has_read = False
            self._replica = await self._servers.replica_for(self.own_writes.needed)
        self._is_chosen = True
        self._commits = self.own_writes.commits
        if self._replica is not None:
            self._replica.begins()
        elif may_use_replica:
            self._servers.on_primary += 1

    async def move(self, error: Exception) -> bool:
        """Choose another server after an operation has failed; return whether to run it again.

        Nothing is lost by that if the server itself has failed: a replica only reads. What has
        read from one replica goes on at the primary, which is never behind it.
        """
        replica = self._replica
        if replica is None:
            return False
        if isinstance(error, DatabaseConflictError):  # with what it replicates
            self._replica = None
        elif isinstance(error, (DatabaseDownError, WrongSettingsError)):
            replica.failed(error)
            self._replica = None
            if not self.has_read:
                self._replica = await self._servers.replica_for(self.own_writes.needed)
        elif _only_reads(replica, error):  # A function in a SELECT has written.
            self._replica = None
        else:
            return False
        return True

    def has_answered(self) -> None:
        """Note that an operation of the session has succeeded."""
        if self._replica is not None:
            self.has_read = True
            self._replica.answered()

    def has_not_answered(self) -> None:
        """Note that an operation was interrupted, be it by its time or a cancellation."""
        if self._replica is not None:
            self._replica.doubt()

    def has_committed(self, position: Position) -> None:
        """Note the position of a COMMIT of the session."""
        self.own_writes.has_committed(position)
        if position.system:
            self._servers.history.add(position)


def _only_reads(replica: Replica, error: Exception) -> bool:
    """Whether a statement was refused because its server only reads."""
    if not isinstance(error, DBAPIError) or error.orig is None:
        return False
    return driver_of(replica.life.engine.dialect).only_reads(error.orig)
