"""What `asgi-db check` looks at on MySQL and MariaDB."""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from asgi_db.cli.report import Plan, Report

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
_SETTINGS = text(f"SHOW VARIABLES WHERE Variable_name IN {('version', *_SHOWN)}")
_OLDEST = {"MySQL": (8, 0), "MariaDB": (10, 6)}


async def check(report: Report, plan: Plan, connection: AsyncConnection) -> None:
    """Look at a MySQL or MariaDB server through a connection in autocommit."""
    values: dict[str, str] = {
        name.lower(): value for name, value in (await connection.execute(_SETTINGS)).all()
    }
    kind = "MariaDB" if getattr(connection.dialect, "is_mariadb", False) else "MySQL"
    report.facts["server"] = f"{kind} {values['version']}"
    report.settings.update({name: values[name] for name in _SHOWN if name in values})
    autocommit = await connection.scalar(text("SELECT @@GLOBAL.autocommit"))
    report.settings["autocommit"] = f"{'ON' if autocommit else 'OFF'} (asgi-db sets its own)"

    limits = {name: int(values[name]) for name in ("max_connections", "max_user_connections")}
    plan.check_connections(report, {name: n for name, n in limits.items() if n > 0})
    cipher = (await connection.execute(text("SHOW STATUS LIKE 'Ssl_cipher'"))).one()[1]
    plan.check_encryption(report, bool(cipher), "Add ?ssl_ca=/path/of/the/ca.pem to the URL.")
    _check_version(report, kind, connection)
    _check_characters(report, values)
    _check_time(report, plan, values)
    _check_durability(report, values)
    _check_transactions(report, values)


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
