"""MySQL and MariaDB, with asyncmy."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable
from importlib import import_module
from typing import Any

from sqlalchemy import URL, Connection, Engine, event, text
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import MissingGreenlet, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, PoolResetState

from asgi_db.drivers import hosts
from asgi_db.drivers.base import AnyDriver, AutocommitRequests
from asgi_db.drivers.mysql_options import translate_url
from asgi_db.drivers.mysql_replication import MariaDBReplication
from asgi_db.drivers.outages import REMEDIES, connection_error
from asgi_db.drivers.protocol import BEGIN_OPTION, Beginning, StandIn
from asgi_db.drivers.replication import Replication
from asgi_db.drivers.sandbox import INTERRUPT_AGAIN, SandboxControl, SandboxRules, SandboxStandIn
from asgi_db.drivers.statements import WRITING_WITH, Grammar
from asgi_db.drivers.whereabouts import MOST_ATTEMPTS, Server, note_server, server_of
from asgi_db.errors import SandboxError
from asgi_db.modes import Mode


def _number(error: BaseException | None) -> object:
    return next(iter(error.args), None) if error is not None else None


_GRAMMAR = Grammar(
    reads="SELECT|WITH|VALUES|TABLE|SHOW|EXPLAIN|DESCRIBE|DESC|HELP|CHECKSUM|COMMIT|ROLLBACK"
    "|SAVEPOINT|RELEASE|UNLOCK|DEALLOCATE|SIGNAL|RESIGNAL|GET",
    holds="SET TRANSACTION|BEGIN|START TRANSACTION",
    sets="SET|USE|LOCK|HANDLER|PREPARE",
    calls="CALL|DO|EXECUTE",
    writes=r"SET\b.*(?:\bGLOBAL|\bPERSIST|\bPERSIST_ONLY)|SET PASSWORD|SET DEFAULT ROLE"
    "|SET RESOURCE GROUP|BEGIN NOT ATOMIC",
    setting=r"\bINTO\b|:=",
    holding=r"\b(?:GET_LOCK|RELEASE_LOCK|RELEASE_ALL_LOCKS)\s*\(",
    locking=r"\bFOR\s+(?:UPDATE|SHARE)\b|\bLOCK\s+IN\s+SHARE\s+MODE\b",
    writing=rf"{WRITING_WITH}|\bINTO\s+(?:OUTFILE|DUMPFILE)\b"
    r"|\bNEXT\s+VALUE\s+FOR\b|\b(?:NEXTVAL|SETVAL)\s*\(",
    not_code=r"""'(?:[^'\\]|\\.|'')*'|"(?:[^"\\]|\\.|"")*"|`[^`]*`|/\*(?!M?!).*?\*/"""
    r"|--(?=\s|\Z)[^\n]*|\#[^\n]*",
    is_code=r"/\*M?!\d*|\*/",
)
"""The commands of MySQL and MariaDB; SELECT … INTO sets variables, or writes a file.

Sources: https://dev.mysql.com/doc/refman/8.4/en/sql-statements.html,
https://mariadb.com/docs/server/reference/sql-statements,
https://dev.mysql.com/doc/refman/8.4/en/locking-functions.html and
https://dev.mysql.com/doc/refman/8.4/en/comments.html
"""


_LOCK_NAME = "CONCAT('asgi_db ', MD5(COALESCE(DATABASE(), '')))"


class MySQL(AnyDriver):
    """MySQL and MariaDB with any driver."""

    has_double_quoted_strings = True
    # It commits before DDL, so a lock of the transaction would be gone; the name is the server's.
    lock_definitions = f"SELECT GET_LOCK({_LOCK_NAME}, 86400)"
    ping = "SELECT @@read_only = 0"
    unlock_definitions = f"SELECT RELEASE_LOCK({_LOCK_NAME})"
    grammar = _GRAMMAR

    def begin_options(self, mode: Mode, *, is_prepared: bool) -> dict[str, Any]:
        if mode.autocommit and not is_prepared:
            return super().begin_options(mode, is_prepared=is_prepared)
        beginning = Beginning(_statements(mode), mode.autocommit if is_prepared else None)
        return {BEGIN_OPTION: beginning} if is_prepared or beginning.statements else {}

    def is_conflict(self, error: BaseException) -> bool:
        return _number(error) in _CONFLICTS

    def is_outage(self, error: BaseException) -> bool:
        return _number(error) in _OUTAGES

    def is_in_doubt(self, error: BaseException) -> bool:
        return _number(error) == _ERROR_DURING_COMMIT

    def only_reads(self, error: BaseException) -> bool:
        return _only_reads(error)

    def reads_by_choice(self, connection: Connection) -> bool:
        # The session is set, and its server is not: by `init_command`, say.
        kind = "tx" if getattr(connection.dialect, "is_mariadb", False) else "transaction"
        question = f"SELECT @@session.{kind}_read_only = 1 AND @@global.{kind}_read_only = 0"
        with contextlib.suppress(Exception):  # The connection is closed, or there is no such name.
            return bool(_answer(connection.connection, question))
        return False

    def refuses_writes(self, pooled: PoolProxiedConnection) -> bool:
        return _refuses_writes(pooled)

    def is_full(self, error: BaseException) -> bool:
        return _number(error) in _TOO_MANY

    def time_limit(self, error: BaseException) -> str | None:
        number = _number(error)
        return _TIME_LIMITS.get(number) if isinstance(number, int) else None

    def remedy(self, error: BaseException) -> str | None:
        number = _number(error)
        kind = _WRONG_SETTINGS.get(number) if isinstance(number, int) else None
        return super().remedy(error) if kind is None else REMEDIES[kind]

    def code(self, error: BaseException) -> str | None:
        number = _number(error)
        return str(number) if isinstance(number, int) else None

    def id_at_server(self, connection: Any) -> int | None:
        # These errors mean that the connection is closed already.
        with contextlib.suppress(AttributeError, TypeError):
            return int(connection.thread_id())
        return None

    def identify(self, dialect: Dialect, connection: DBAPIConnection) -> None:
        driver_connection: Any = dialect.get_driver_connection(connection)
        if isinstance(driver_connection, StandIn):
            return
        question = _WHICH_MARIADB if _is_mariadb(driver_connection) else _WHICH_MYSQL
        try:
            ((id, *place, drawn, started, uptime),) = self.ask(connection, question)
        except Exception:
            if self.is_closed(driver_connection):
                raise
            return  # It says nothing, so nothing is ended there.
        if id == self.id_at_server(driver_connection):  # else a proxy has numbers of its own
            note_server(
                driver_connection, Server(tuple(place), (drawn, int(started)), float(uptime))
            )

    async def end_statement(self, connection: AsyncConnection, id: int, age: float) -> None:
        try:
            await connection.execute(text(f"KILL {id}"))
        except SQLAlchemyError as error:
            if _number(error.__cause__) != _UNKNOWN_THREAD:
                raise


def _is_mariadb(driver_connection: Any) -> bool:
    return "mariadb" in str(driver_connection.get_server_info()).lower()


_WHICH = """
    SELECT CONNECTION_ID(), {}, @@hostname, @@port, @@server_id, RIGHT(UUID(), 12),
    SUBSTR(UUID(), 20, 4), UNIX_TIMESTAMP() - variable_value, variable_value
    FROM {}.session_status WHERE variable_name = 'Uptime'
"""
"""What tells a server from others. UUID() ends with the address of its network, or a number that
is drawn at its start. The part before is drawn at each start, which tells two starts in one second
apart. The difference does not change, because both parts are of one moment.

Sources: https://mariadb.com/docs/server/reference/sql-functions/secondary-functions/miscellaneous-functions/uuid,
https://dev.mysql.com/doc/refman/8.4/en/miscellaneous-functions.html#function_uuid
"""

_WHICH_MARIADB = _WHICH.format("@@datadir", "information_schema")
_WHICH_MYSQL = _WHICH.format("@@server_uuid", "performance_schema")


def _statements(mode: Mode) -> tuple[str, ...]:
    """`SET TRANSACTION` applies only to the next transaction, so nothing has to be reset."""
    if mode.autocommit:
        return ()
    isolation = "REPEATABLE READ" if mode.snapshot else mode.isolation
    characteristics = [f"ISOLATION LEVEL {isolation}"] if isolation is not None else []
    if mode.read_only:
        characteristics.append("READ ONLY")
    begin = [f"SET TRANSACTION {', '.join(characteristics)}"] if characteristics else []
    if mode.snapshot:
        begin.append("START TRANSACTION WITH CONSISTENT SNAPSHOT")
    return tuple(begin)


_CONFLICTS = (1213, 1205)
"""A deadlock, and a timeout while waiting for a lock."""

_TOO_MANY = (1040, 1203, 1226)
"""The server refuses more connections, or more of this user."""

_OUTAGES = (*_TOO_MANY, 1053, 3032, 1047)
"""The same, or the server is shutting down, in offline mode, or a node that has lost its cluster.

The last number is Galera's "WSREP has not yet prepared node for application use".
"""

_ERROR_DURING_COMMIT = 1180
"""A node of Galera says so, too, if it was cut off while the others were asked."""

_OPTION_PREVENTS = 1290
_READ_ONLY_OPTION = re.compile(r"read[-_ ]only", re.IGNORECASE)

_ONLY_READS = (1836, 1874, 1792)
"""The server, InnoDB, or the transaction only reads; a demoted server of Aurora says the last."""

_WRONG_SETTINGS = {
    1049: "database",
    1044: "login",
    1045: "login",
    1130: "login",
    1251: "login",
    1698: "login",
    1115: "option",
    1193: "option",
    1231: "option",
    3159: "encryption",
}
"""What a server answers to a new connection that cannot be made with these settings.

Source: https://dev.mysql.com/doc/mysql-errors/8.4/en/server-error-reference.html
"""

_TIME_LIMITS = {1969: "max_statement_time", 3024: "max_execution_time"}
"""The limit of a statement's time in MariaDB, and in MySQL.

Sources: https://mariadb.com/kb/en/mariadb-error-code-reference/,
https://dev.mysql.com/doc/mysql-errors/8.4/en/server-error-reference.html
"""

_UNKNOWN_THREAD = 1094
"""The connection has ended already."""


class AsyncmySandbox(SandboxRules):
    """MySQL and MariaDB have no deferred constraints, but commit before DDL."""

    def control(self, stand_in: SandboxStandIn) -> SandboxControl:
        return _SandboxControl(stand_in)

    def begin_nothing(self) -> None:
        # If the server ends the transaction, statements must not be committed one by one.
        self.connection.adapted.autocommit(False)

    def is_in_transaction(self) -> bool:
        return bool(self.connection.driver.get_transaction_status())

    async def interrupt(self, running: asyncio.Future[Any], *, only_reads: bool) -> None:
        driver = self.connection.driver
        for _ in range(MOST_ATTEMPTS):
            async with self.connection.side_connection() as side:
                here = server_of((await side.get_raw_connection()).driver_connection)
                while here is not None and here == server_of(driver) and not running.done():
                    # The first KILL may precede the statement, so it is repeated.
                    await side.exec_driver_sql(f"KILL QUERY {driver.thread_id()}")
                    await asyncio.wait((running,), timeout=INTERRUPT_AGAIN)
            if running.done():
                return
        raise ConnectionError("its server was not reached")

    def check(self, sql: str) -> None:
        if found := _COMMITS.match(sql):
            raise SandboxError(
                f"MySQL and MariaDB commit by themselves at {found[1].upper()}, so a sandbox could"
                " not undo it. Create the tables before the sandbox, once for all tests."
            )


class _SandboxControl:
    """The methods through which SQLAlchemy's asyncmy dialect controls autocommit."""

    def __init__(self, stand_in: SandboxStandIn) -> None:
        self._stand_in = stand_in
        self.is_autocommit = False

    def autocommit(self, value: object) -> None:
        if value and not self.is_autocommit:
            self._stand_in.commit()  # The server does so too.
        self.is_autocommit = bool(value)

    def get_autocommit(self) -> bool:
        return self.is_autocommit


_COMMITS = re.compile(
    r"\s*((?:CREATE|ALTER|DROP|RENAME|TRUNCATE|GRANT|REVOKE|LOCK|UNLOCK|ANALYZE|OPTIMIZE|REPAIR)\b"
    r"(?!\s+TEMPORARY))",
    re.IGNORECASE,
)


class Asyncmy(MySQL):
    """MySQL and MariaDB with asyncmy."""

    name = "asyncmy"
    is_supported = True
    sandbox: type[SandboxRules] | None = AsyncmySandbox
    replication: Replication | None = MariaDBReplication()

    def __init__(self) -> None:
        self._autocommit_requests = AutocommitRequests()

    def options(self, url: URL, *, pooler: bool) -> dict[str, Any]:
        # Changing autocommit costs a round trip, so a connection keeps its last setting and each
        # begin corrects it if necessary. SQLAlchemy's own `isolation_level="AUTOCOMMIT"` would
        # change it twice per request, and listen to an event of the engine.
        return {
            "connect_args": {"connect_timeout": hosts.CONNECT_TIMEOUT},
            "execution_options": {BEGIN_OPTION: Beginning(autocommit=False)},
            "skip_autocommit_rollback": True,
            "pool_reset_on_return": None,  # `prepare` installs its own reset.
        }

    def translate(self, url: URL) -> tuple[URL, dict[str, Any]]:
        return translate_url(url)

    def prepare(self, engine: Engine, *, pooler: bool, durable: bool) -> None:
        """Roll back only an open transaction when a connection is returned to the pool.

        SQLAlchemy would roll back after each COMMIT too. The server says in each answer whether a
        transaction is open.
        """
        dialect = engine.dialect

        def reset(
            connection: DBAPIConnection, _: ConnectionPoolEntry, state: PoolResetState
        ) -> None:
            driver_connection: Any = dialect.get_driver_connection(connection)
            if state.asyncio_safe and not state.terminate_only:
                if self.is_in_transaction(driver_connection):
                    connection.rollback()

        event.listen(engine, "reset", reset)
        self._autocommit_requests.watch(dialect)

    def takes_writes(self, dialect: Dialect, connection: DBAPIConnection) -> bool:
        if isinstance(dialect.get_driver_connection(connection), StandIn):
            return super().takes_writes(dialect, connection)
        return bool(_answer(connection, self.ping)) or not _refuses_writes(connection)

    @property
    def connect_errors(self) -> tuple[type[Exception], ...]:
        return OSError, import_module("asyncmy").errors.Error

    def connect(self, *args: Any, **kwargs: Any) -> Awaitable[Any]:
        return _connect_in_time(*args, **kwargs)

    def is_closed(self, connection: Any) -> bool:
        if isinstance(connection, StandIn):
            return connection.is_closed()
        # asyncmy has no public API to tell that the server has closed a connection; the test of
        # closed connections in `test_engine.py` breaks when this changes.
        return bool(connection._stream_broken)

    def is_in_transaction(self, connection: Any) -> bool:
        return bool(connection.get_transaction_status())

    def _terminate(self, connection: Any) -> None:
        connection.close()

    def returns_silently(self, *, is_prepared: bool) -> bool:
        return is_prepared  # else SQLAlchemy resets autocommit

    def begin(self, pooled: PoolProxiedConnection, beginning: Beginning) -> None:
        if beginning.autocommit is not None:
            connection: Any = pooled.dbapi_connection
            was_asked_for = pooled.driver_connection in self._autocommit_requests.connections
            try:
                # This costs a round trip only if autocommit changes.
                connection.autocommit(was_asked_for or beginning.autocommit)
            except MissingGreenlet:
                raise  # The application has not awaited something; the database is not down.
            except Exception as error:
                # asyncmy raises many kinds of errors, some of which are not its own.
                raise connection_error(error) from error
        super().begin(pooled, beginning)


async def _connect_in_time(*args: Any, **kwargs: Any) -> Any:
    # asyncmy's own limit ends when the socket is connected, and a frozen server says nothing then.
    async with asyncio.timeout(kwargs.get("connect_timeout")):
        return await import_module("asyncmy").connect(*args, **kwargs)


def _only_reads(error: BaseException) -> bool:
    number = _number(error)
    if number == _OPTION_PREVENTS:  # perhaps another option than `--read-only`
        return _READ_ONLY_OPTION.search(str(error)) is not None
    return number in _ONLY_READS


def _refuses_writes(connection: DBAPIConnection | PoolProxiedConnection) -> bool:
    # Some may write on a server that only reads. This is refused exactly where a write is.
    try:
        _answer(connection, "START TRANSACTION READ WRITE")
    except Exception as error:
        if not _only_reads(error):
            raise
        return True
    connection.rollback()
    return False


def _answer(connection: DBAPIConnection | PoolProxiedConnection, question: str) -> Any:
    """Return the one value with which the server answers, if it answers with one."""
    cursor = connection.cursor()
    try:
        cursor.execute(question)
        row = cursor.fetchone() if cursor.description else None
    finally:
        cursor.close()
    return None if row is None else row[0]


asyncmy = Asyncmy()
