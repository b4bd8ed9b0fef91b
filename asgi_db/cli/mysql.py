"""What `asgi-db check` looks at on MySQL and MariaDB."""

from __future__ import annotations

from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection

from asgi_db.cli.report import Plan, Report, Server
from asgi_db.hosts import Host

_ISOLATION = ("transaction_isolation", "tx_isolation")  # MySQL; MariaDB before 11.1
_SHOWN = (
    "character_set_database",
    "character_set_connection",
    "max_connections",
    "max_user_connections",
    "wait_timeout",
    "innodb_lock_wait_timeout",
    "innodb_flush_log_at_trx_commit",
    *_ISOLATION,
    "sql_mode",
    "default_storage_engine",
    "read_only",
)
_ASKED = ("version", "wsrep_on", "wsrep_sync_wait", "hostname", "port", "server_id")
_SETTINGS = text(f"SHOW VARIABLES WHERE Variable_name IN {(*_ASKED, *_SHOWN)}")
_STATUS = text("""
    SHOW GLOBAL STATUS WHERE Variable_name IN ('Slaves_connected', 'Slaves_running',
    'Rpl_semi_sync_master_status', 'Rpl_semi_sync_source_status', 'wsrep_cluster_size',
    'wsrep_local_state_comment')
""")
_OLDEST = {"MySQL": (8, 0), "MariaDB": (10, 6)}


async def _shown(connection: AsyncConnection, question: TextClause) -> dict[str, str]:
    return {name.lower(): value for name, value in (await connection.execute(question)).all()}


async def identify(connection: AsyncConnection) -> Server:
    """Say which server that is."""
    values, status = await _shown(connection, _SETTINGS), await _shown(connection, _STATUS)
    database = await connection.scalar(text("SELECT DATABASE()"))
    follows = int(status.get("slaves_running", 0)) > 0
    only_reads = values["read_only"] != "OFF"
    return Server(
        identity=" ".join(values[name] for name in ("hostname", "port", "server_id")),
        database=str(database),
        is_replica=follows or only_reads,
        receives=follows,
        takes_writes=not only_reads,
        connections=int(values["max_connections"]),
    )


async def check(report: Report, plan: Plan, connection: AsyncConnection, host: Host) -> None:
    """Look at a MySQL or MariaDB server through a connection in autocommit."""
    values = await _shown(connection, _SETTINGS)
    kind = "MariaDB" if getattr(connection.dialect, "is_mariadb", False) else "MySQL"
    report.facts["server"] = f"{kind} {values['version']}"
    report.settings.update({name: values[name] for name in _SHOWN if name in values})
    autocommit = await connection.scalar(text("SELECT @@GLOBAL.autocommit"))
    report.settings["autocommit"] = f"{'ON' if autocommit else 'OFF'} (asgi-db sets its own)"

    limits = {name: int(values[name]) for name in ("max_connections", "max_user_connections")}
    plan.check_connections(report, {name: n for name, n in limits.items() if n > 0})
    cipher = (await connection.execute(text("SHOW STATUS LIKE 'Ssl_cipher'"))).one()[1]
    ca = "Add ?ssl_ca=/path/of/the/ca.pem to the URL."
    plan.check_encryption(report, bool(cipher), ca, host)
    _check_role(report, values, await _shown(connection, _STATUS))
    _check_version(report, kind, connection)
    _check_characters(report, values)
    _check_time(report, plan, values)
    _check_durability(report, values)
    _check_transactions(report, values)


def _check_role(report: Report, values: dict[str, str], status: dict[str, str]) -> None:
    """Say what the server is to others, and what a failover costs."""
    if values.get("wsrep_on") == "ON":
        return _check_galera(report, values, status)
    replicas = int(status.get("slaves_connected", 0))
    number = "1 replica" if replicas == 1 else f"{replicas} replicas"
    role = "replica" if int(status.get("slaves_running", 0)) else "primary"
    report.facts["role"] = f"{role}, followed by {number}" if replicas else role
    waits = "ON" in (status.get(f"rpl_semi_sync_{name}_status") for name in ("master", "source"))
    if replicas and not waits:
        report.note(
            f"{number} may take over from this server, and its commits wait for none: a failover"
            " loses the last writes of which clients were told.",
            "Switch semi-synchronous replication on: SET GLOBAL rpl_semi_sync_master_enabled = 1"
            " here, rpl_semi_sync_slave_enabled = 1 on the replicas, and start these anew.",
        )


def _check_galera(report: Report, values: dict[str, str], status: dict[str, str]) -> None:
    size, state = status["wsrep_cluster_size"], status["wsrep_local_state_comment"]
    report.facts["role"] = f"node of a Galera cluster of {size}, {state}"
    if values["wsrep_sync_wait"] == "0":
        report.note(
            "wsrep_sync_wait is 0: a read may miss what was committed on another node just before.",
            "Add ?init_command=SET%20SESSION%20wsrep_sync_wait%3D1 to the URL, if this application"
            " has more than one node.",
        )


def _check_version(report: Report, kind: str, connection: AsyncConnection) -> None:
    version = connection.dialect.server_version_info or ()
    if version[:2] < _OLDEST[kind]:
        oldest = ".".join(map(str, _OLDEST[kind]))
        report.warning(
            f"{report.facts['server']} is not maintained any more.",
            f"Upgrade to {kind} {oldest} or later.",
        )


def _check_characters(report: Report, values: dict[str, str]) -> None:
    if (characters := values["character_set_database"]) != "utf8mb4":
        report.warning(
            f"character_set_database is {characters}: new tables cannot hold all characters.",
            "ALTER DATABASE ... CHARACTER SET utf8mb4, and for each table that is there already"
            " ALTER TABLE ... CONVERT TO CHARACTER SET utf8mb4.",
        )
    if (characters := values["character_set_connection"]) != "utf8mb4":
        report.warning(
            f"character_set_connection is {characters}: other characters, such as emoji, fail or"
            " become question marks.",
            "Write charset=utf8mb4 in the URL (DATABASE_CHARSET), or leave it out.",
        )


def _check_time(report: Report, plan: Plan, values: dict[str, str]) -> None:
    recycle, wait = plan.profile.pool_recycle, int(values["wait_timeout"])
    if wait <= recycle:
        report.warning(
            f"wait_timeout is {wait} s: the server closes idle connections before the pool replaces"
            f' them (pool_recycle of pool="{plan.pool}" is {recycle} s).',
            f"Use a PoolProfile(pool_recycle=...) below {wait}, or raise wait_timeout.",
        )
    lock, pool = int(values["innodb_lock_wait_timeout"]), plan.profile.pool_timeout
    if lock > pool:
        report.note(
            f"innodb_lock_wait_timeout is {lock} s: a request that waits for a lock keeps its"
            f" connection longer than others wait for one (pool_timeout is {pool:g} s).",
            "SET GLOBAL innodb_lock_wait_timeout = 10, or timeout= of the modes.",
        )


def _check_durability(report: Report, values: dict[str, str]) -> None:
    if (flush := values["innodb_flush_log_at_trx_commit"]) != "1":
        report.warning(
            f"innodb_flush_log_at_trx_commit is {flush}: a crash loses about a second of commits of"
            " which clients were told.",
            "SET GLOBAL innodb_flush_log_at_trx_commit = 1, unless the data can be lost.",
        )
    if values["read_only"] in ("ON", "1"):
        report.warning(
            "read_only is on: the server is a replica, and every write of an ordinary user fails.",
            "Name the primary server in the URL, or let this application read only.",
        )


def _check_transactions(report: Report, values: dict[str, str]) -> None:
    if not {"STRICT_TRANS_TABLES", "STRICT_ALL_TABLES"} & set(values["sql_mode"].split(",")):
        report.warning(
            "sql_mode is not strict: a value that does not fit is cut off, and the write succeeds.",
            "SET GLOBAL sql_mode = CONCAT(@@GLOBAL.sql_mode, ',STRICT_TRANS_TABLES').",
        )
    if (engine := values["default_storage_engine"]) != "InnoDB":
        report.warning(
            f"default_storage_engine is {engine}: new tables may have no transactions.",
            "SET GLOBAL default_storage_engine = InnoDB.",
        )
    isolation = next(values[name] for name in _ISOLATION if name in values)
    if isolation == "READ-UNCOMMITTED":
        report.warning(
            "The transaction isolation is READ-UNCOMMITTED: requests see what is rolled back"
            " afterwards.",
            "SET GLOBAL TRANSACTION ISOLATION LEVEL REPEATABLE READ.",
        )
    elif isolation == "SERIALIZABLE":
        report.note(
            "The transaction isolation is SERIALIZABLE: every read in a transaction locks.",
            "Ask for it where it is needed, transactional(isolation=...), and SET GLOBAL"
            " TRANSACTION ISOLATION LEVEL REPEATABLE READ.",
        )
