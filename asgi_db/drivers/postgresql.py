"""PostgreSQL, with any driver."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.interfaces import ExecutionContext
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from asgi_db.drivers.base import AnyDriver
from asgi_db.drivers.outages import REMEDIES
from asgi_db.drivers.postgresql_replication import PostgreSQLReplication
from asgi_db.drivers.protocol import StandIn
from asgi_db.drivers.replication import Replication
from asgi_db.drivers.statements import WRITING_WITH, Grammar
from asgi_db.drivers.whereabouts import Server, note_server, server_of
from asgi_db.logs import logger
from asgi_db.modes import Mode


def sqlstate(error: BaseException) -> str | None:
    """Return the code of an error of the server, if it is one."""
    return getattr(error, "sqlstate", None)


def _raised_in(error: BaseException | None) -> str | None:
    """Name the function of the server that has raised an error, if the driver tells."""
    if error is None:
        return None
    in_psycopg = getattr(getattr(error, "diag", None), "source_function", None)
    in_asyncpg = getattr(error, "server_source_function", None)
    # SQLAlchemy wraps the errors of asyncpg.
    return in_psycopg or in_asyncpg or _raised_in(error.__cause__)


_GRAMMAR = Grammar(
    reads="SELECT|WITH|VALUES|TABLE|SHOW|EXPLAIN|FETCH|MOVE|CLOSE|COMMIT|END|ABORT|ROLLBACK"
    "|SAVEPOINT|RELEASE|UNLISTEN",
    holds="SET LOCAL|SET TRANSACTION|SET CONSTRAINTS|LOCK|DECLARE|BEGIN|START TRANSACTION",
    sets="SET|RESET|DISCARD|PREPARE|DEALLOCATE|LISTEN|LOAD",
    calls="CALL|DO|EXECUTE",
    writes="(?:COMMIT|ROLLBACK) PREPARED|PREPARE TRANSACTION",
    holding=r"\bpg_(?:try_)?advisory_\w+\s*\(|\bset_config\s*\(",
    setting=r"\bset_config\s*\([^)]*,\s*false\s*\)",
    locking=r"\bFOR\s+(?:NO\s+KEY\s+UPDATE|KEY\s+SHARE|UPDATE|SHARE)\b",
    writing=rf"{WRITING_WITH}|\bINTO\b|\b(?:nextval|setval|pg_notify"
    r"|lo_(?:creat|create|import|from_bytea|put|truncate|truncate64|unlink)|lowrite)\s*\(",
    not_code=r"\$((?:[^\W\d]\w*)?)\$.*?\$\1\$|\bE'(?:[^'\\]|\\.|'')*'"
    r"""|'[^']*'|"[^"]*"|/\*.*?\*/|--[^\n]*"""
    r"|%\(\w+\)s",  # A parameter for psycopg, whose parenthesis would end a call.
)
"""The commands of PostgreSQL; those that `SET TRANSACTION` calls read-only may write elsewhere.

Sources: https://www.postgresql.org/docs/current/sql-commands.html,
https://www.postgresql.org/docs/current/sql-set-transaction.html, and for the functions
https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-ADVISORY-LOCKS,
https://www.postgresql.org/docs/current/functions-sequence.html and
https://www.postgresql.org/docs/current/lo-funcs.html
"""


class PostgreSQL(AnyDriver):
    """PostgreSQL with any driver."""

    has_deferrable = True
    settings_are_transactional = True
    # The key is arbitrary, and the lock is one of this database alone.
    ping = "SELECT current_setting('transaction_read_only') = 'off'"
    lock_definitions = "SELECT pg_advisory_xact_lock(6021023, 1)"
    grammar = _GRAMMAR

    def begin_options(self, mode: Mode, *, is_prepared: bool) -> dict[str, Any]:
        options = super().begin_options(mode, is_prepared=is_prepared)
        if mode.isolation == "READ UNCOMMITTED":
            # PostgreSQL treats the two alike.
            options["isolation_level"] = "READ COMMITTED"
        if mode.read_only and not mode.autocommit:
            options["postgresql_readonly"] = True
        if mode.deferrable:
            options["postgresql_deferrable"] = True
        return options

    def is_own_error(self, error: BaseException) -> bool:
        # SQLAlchemy does not wrap the errors of a server-side cursor.
        return hasattr(error, "sqlstate")

    def is_conflict(self, error: BaseException) -> bool:
        return self.code(error) in _CONFLICTS or self.has_invalid_plan(error)

    def has_invalid_plan(self, error: BaseException) -> bool:
        """Say whether DDL has changed what a prepared statement returns; it was not executed."""
        return False

    def is_outage(self, error: BaseException) -> bool:
        return self.code(error) in _OUTAGES

    def is_in_doubt(self, error: BaseException) -> bool:
        return self.code(error) in _IN_DOUBT

    def is_recovery_conflict(self, error: BaseException) -> bool:
        state = self.code(error)
        if state in _CANCELED_BY_RECOVERY and "conflict with recovery" in str(error):
            return True
        # In another language it is told by where it was raised, as far as its code is its own.
        return state in ("40001", "40P01") and _raised_in(error) in _RECOVERY_CONFLICT

    def only_reads(self, error: BaseException) -> bool:
        state = self.code(error)
        # A standby has no SERIALIZABLE, and says so when such a transaction begins.
        return state == _ONLY_READS or (state == NOT_SUPPORTED and "hot standby" in str(error))

    def is_full(self, error: BaseException) -> bool:
        return self.code(error) == _TOO_MANY

    def time_limit(self, error: BaseException) -> str | None:
        if self.code(error) != _QUERY_CANCELED:
            return None
        return "statement_timeout, unless somebody has cancelled it"

    def remedy(self, error: BaseException) -> str | None:
        kind = _WRONG_SETTINGS.get(self.code(error) or "")
        return super().remedy(error) if kind is None else REMEDIES[kind]

    def code(self, error: BaseException) -> str | None:
        return sqlstate(error)

    def advice(self, error: BaseException) -> str | None:
        state = self.code(error)
        if state in _NO_STATEMENT or (state == "08P01" and "prepared stat" in str(error)):
            return (
                "If there is a PgBouncer in between, in transaction pooling, say so:"
                ' Database(..., pooler="transaction").'
            )
        return None

    async def end_statement(self, connection: AsyncConnection, id: int, age: float) -> None:
        await connection.execute(text(_TERMINATE), {"id": id, "age": age})


_CONFLICTS = frozenset({"40001", "40P01", "55P03"})
"""A serialization failure, a deadlock, and a lock that was not available in time."""

_CANCELED_BY_RECOVERY = frozenset({"40001", "40P01", "57014"})
_RECOVERY_CONFLICT = frozenset({"ProcessInterrupts", "ProcessRecoveryConflictInterrupt"})
"""Where PostgreSQL raises it, until version 15 and since then."""

_IN_DOUBT = frozenset({"40003", "08007"})
"""Statement completion unknown, and transaction resolution unknown; CockroachDB says the first."""

_ONLY_READS = "25006"
NOT_SUPPORTED = "0A000"
_TOO_MANY = "53300"
_QUERY_CANCELED = "57014"

_OUTAGES = frozenset(
    {"08000", "08001", "08003", "08004", "08006", "57P01", "57P02", "57P03", "53300"}
)
"""The connection failed, or the server is starting, shutting down or refusing connections."""

_WRONG_SETTINGS = {
    "3D000": "database",
    "28000": "login",
    "28P01": "login",
    "42501": "login",
    "22023": "option",
    "42704": "option",
}
"""What a server answers to a new connection that cannot be made with these settings.

Source: https://www.postgresql.org/docs/current/errcodes-appendix.html
"""

_NO_STATEMENT = frozenset({"26000", "42P05"})
"""A prepared statement does not exist, or its name is in use already."""

# The server may give the number of a connection that has ended to a new one at any time.
_TERMINATE = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = :id
    AND backend_start <= clock_timestamp() - make_interval(secs => :age)
"""


PATIENCE = 2.0
"""Seconds that a cancel request may take to pass through a pooler."""


class SupportedPostgreSQL(PostgreSQL):
    """PostgreSQL with a driver with which asgi-db itself connects."""

    is_supported = True
    tells_autocommit = True
    replication: Replication | None = PostgreSQLReplication()

    def __init__(self) -> None:
        # Neither driver has the server's limits at hand when it finds a connection closed.
        self._idle_limits: WeakKeyDictionary[Any, tuple[str | None, ...]] = WeakKeyDictionary()
        self._read_by_choice = WeakSet[Any]()

    def prepare(self, engine: Engine, *, pooler: bool, durable: bool) -> None:
        if not pooler:
            self._watch_connections(engine)

    def extend(self, dialect: Dialect) -> None:
        """Send a statement again if DDL has made its plan invalid, where nothing is lost by it.

        In autocommit, and as the first statement of its transaction, it is simply sent again.
        Otherwise PostgreSQL has discarded the transaction, which counts as a conflict. So does a
        read that a standby has cancelled, and in autocommit that is sent again, too.
        """
        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            setattr(dialect, name, functools.partial(self._execute, getattr(dialect, name)))

    def _execute(self, execute: Callable[..., None], cursor: Any, *arguments: Any) -> None:
        """Execute a statement; send it again, once, where that helps and nothing is lost by it."""
        context: ExecutionContext = arguments[-1]
        adapted: Any = context.root_connection.connection.dbapi_connection
        connection = adapted.driver_connection
        # A driver begins a transaction with its first statement.
        comes_first = not (isinstance(connection, StandIn) or self.is_in_transaction(connection))
        try:
            execute(cursor, *arguments)
        except Exception as error:
            if not comes_first:
                raise
            if self.has_invalid_plan(error):
                self.forget_plans(context, error)
            elif not (_is_autocommit(context) and self.is_recovery_conflict(error)):
                raise
            execute(cursor, *arguments)

    def forget_plans(self, context: ExecutionContext, error: Exception) -> None:
        """Forget the plans of a connection, and roll back, so that its statement can be repeated.

        Args:
            error: what says that one of them is invalid.
        """
        raise NotImplementedError

    def idle_limit(self, connection: Any, *, in_transaction: bool) -> str | None:
        in_transaction_limit, limit = self._idle_limits.get(connection, ("", ""))
        value = in_transaction_limit if in_transaction else limit
        name = "idle_in_transaction_session_timeout" if in_transaction else "idle_session_timeout"
        return f"{name} is {value}" if value not in ("", "0", None) else None

    def _watch_connections(self, engine: Engine) -> None:
        """Have the server check its clients, and warn of a pooler that the settings do not name.

        When a client's process is killed, its statement continues at the server unless the server
        regularly checks whether the client is still connected (PostgreSQL 14 and later; a value
        that the user has set is kept).

        In transaction pooling a driver's prepared statements fail, or return the rows of other
        clients' statements. PgBouncer is recognized by the invented process number it reports.
        """
        warned = False

        def connect(connection: Any, _: ConnectionPoolEntry) -> None:
            nonlocal warned
            driver_connection = engine.dialect.get_driver_connection(connection)
            try:
                answer = self.ask(connection, _WATCH_CLIENT)
            except engine.dialect.loaded_dbapi.Error:
                if self.is_closed(driver_connection):
                    raise
                return  # On some systems the server cannot check its clients.
            ((*which, id, chosen_by, limit, other_limit),) = answer
            self._idle_limits[driver_connection] = limit, other_limit
            if chosen_by in _CHOSEN_BY_USER:
                self._read_by_choice.add(driver_connection)
            if id == self.id_at_server(driver_connection):
                note_server(driver_connection, _server(*which))
            elif not warned:
                warned = True
                logger.warning(
                    "There is a pooler between this application and PostgreSQL. If it pools"
                    ' transactions, as PgBouncer can, say so: Database(..., pooler="transaction");'
                    " otherwise statements fail, or get the rows of others."
                )

        event.listen(engine, "connect", connect)

    def identify(self, dialect: Dialect, connection: Any) -> None:
        driver_connection = dialect.get_driver_connection(connection)
        if isinstance(driver_connection, StandIn) or server_of(driver_connection) is not None:
            return  # It was asked already.
        try:
            ((*which, id),) = self.ask(connection, _WHICH_SERVER)
        except dialect.loaded_dbapi.Error:
            if self.is_closed(driver_connection):
                raise
            return  # It says nothing, so nothing is ended there.
        if id == self.id_at_server(driver_connection):  # else a pooler has numbers of its own
            note_server(driver_connection, _server(*which))

    def takes_writes(self, dialect: Dialect, connection: Any) -> bool:
        driver_connection = dialect.get_driver_connection(connection)
        if isinstance(driver_connection, StandIn) or driver_connection in self._read_by_choice:
            return super().takes_writes(dialect, connection)
        ((takes_writes,),) = self.ask(connection, self.ping)
        return bool(takes_writes)

    def refuses_writes(self, pooled: PoolProxiedConnection) -> bool:
        return pooled.driver_connection not in self._read_by_choice

    def reads_by_choice(self, connection: Connection) -> bool:
        return (
            connection.connection.driver_connection in self._read_by_choice
            or connection.get_execution_options().get("postgresql_readonly") is True
        )

    def begin_options(self, mode: Mode, *, is_prepared: bool) -> dict[str, Any]:
        if mode.autocommit:
            # `enter_autocommit` is free, whereas a variant of the engine has a cost.
            return {}
        return super().begin_options(mode, is_prepared=is_prepared)

    def has_written(self, pooled: PoolProxiedConnection) -> bool:
        # A transaction gets its number with its first write.
        cursor = pooled.cursor()
        try:
            cursor.execute("SELECT txid_current_if_assigned()")
            row = cursor.fetchone()
        finally:
            cursor.close()
        return row is not None and row[0] is not None


_START = """concat_ws(' ', inet_server_addr(), inet_server_port()),
    extract(epoch FROM pg_postmaster_start_time())::text,
    extract(epoch FROM clock_timestamp() - pg_postmaster_start_time())::text, pg_backend_pid()"""
"""Which server it is: two are not started in the same microsecond."""

_WATCH_CLIENT = f"""
    SELECT CASE WHEN current_setting('client_connection_check_interval', true) = '0'
    THEN set_config('client_connection_check_interval', '1s', false)
    ELSE current_setting('client_connection_check_interval', true) END, {_START},
    CASE WHEN current_setting('default_transaction_read_only') = 'on'
    THEN (SELECT source FROM pg_settings WHERE name = 'default_transaction_read_only') END,
    current_setting('idle_in_transaction_session_timeout', true),
    current_setting('idle_session_timeout', true)
"""

_WHICH_SERVER = f"SELECT current_setting('client_connection_check_interval', true), {_START}"


def _server(checks: str | None, place: str, started: str, uptime: str) -> Server:
    notices = _SOON.fullmatch(checks or "") is not None
    return Server((place,), started, float(uptime), notices_clients=notices)


_SOON = re.compile(r"[1-9]\d*(ms|s)")
"""How often a server looks whether its clients are there, if that is not in minutes or hours."""


def _is_autocommit(context: ExecutionContext) -> bool:
    adapted: Any = context.root_connection.connection.dbapi_connection
    return bool(adapted.autocommit)


_CHOSEN_BY_USER = frozenset({"client", "session", "user", "database user"})
"""Where `default_transaction_read_only` is set if it says nothing about the server, but is a matter
of these connections: in the URL, or for their role."""
