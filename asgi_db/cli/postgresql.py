"""What `asgi-db check` looks at on PostgreSQL."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from asgi_db.cli.report import Plan, Report, Server
from asgi_db.drivers import driver_of
from asgi_db.hosts import Host, hosts_of

_STANDBY_NAMES = "synchronous_standby_names"
_CHECK_INTERVAL = "client_connection_check_interval"
_SHOWN = (
    "server_encoding",
    "max_connections",
    "default_transaction_isolation",
    "default_transaction_read_only",
    "statement_timeout",
    "idle_in_transaction_session_timeout",
    _CHECK_INTERVAL,
    "synchronous_commit",
    _STANDBY_NAMES,
    "fsync",
)
_RESERVED = ("superuser_reserved_connections", "reserved_connections")

# As the numbers and words that can be compared, and as people write them.
_SETTINGS = text(f"""
    SELECT name, setting, current_setting(name) FROM pg_settings
    WHERE name IN {_SHOWN + _RESERVED}
""")
_ABOUT = text("""
    SELECT current_setting('server_version') AS version,
    current_setting('server_version_num')::int AS version_number,
    pg_backend_pid() AS pid, pg_is_in_recovery() AS is_standby,
    (SELECT count(*) FROM pg_stat_replication WHERE state IS DISTINCT FROM 'backup' AND pid NOT IN
    (SELECT active_pid FROM pg_replication_slots WHERE slot_type = 'logical'
    AND active_pid IS NOT NULL)) AS standbys,
    (SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()) AS encrypted,
    CASE WHEN rolsuper THEN -1 ELSE datconnlimit END AS database_limit,
    CASE WHEN rolsuper THEN -1 ELSE rolconnlimit END AS user_limit
    FROM pg_database, pg_roles WHERE datname = current_database() AND rolname = current_user
""")
_IDENTITY = text("""
    SELECT concat_ws(' ', system_identifier, pg_postmaster_start_time(), inet_server_port()),
    (SELECT oid::text FROM pg_database WHERE datname = current_database()), pg_is_in_recovery(),
    EXISTS (SELECT FROM pg_stat_wal_receiver), false
    FROM pg_control_system()
""")
_LIMITS = text(f"""
    SELECT name, setting, pg_backend_pid() FROM pg_settings
    WHERE name IN {("max_connections", *_RESERVED)}
""")
_FIRST_WITH_CHECK_INTERVAL = 14
_NOT_DURABLE = {
    "synchronous_commit": "a crash of the server loses commits of which clients were told",
    "fsync": "a crash of the machine can destroy the whole database",
}


async def identify(connection: AsyncConnection) -> Server:
    """Say which server that is."""
    server = Server(*(await connection.execute(_IDENTITY)).one())
    limits = (await connection.execute(_LIMITS)).all()
    if await _is_pooled(connection, limits[0][2]):
        return server
    return server._replace(connections=_free({name: value for name, value, _ in limits}))


async def _is_pooled(connection: AsyncConnection, pid: int) -> bool:
    """Whether the server has another number for this connection than the driver was told."""
    driver = (await connection.get_raw_connection()).driver_connection
    return pid != driver_of(connection.dialect).id_at_server(driver)


async def check(report: Report, plan: Plan, connection: AsyncConnection, host: Host) -> None:
    """Look at a PostgreSQL server through a connection in autocommit."""
    about = (await connection.execute(_ABOUT)).one()
    rows = (await connection.execute(_SETTINGS)).all()
    values: dict[str, str] = {name: value for name, value, _ in rows}
    shown: dict[str, str] = {name: value for name, _, value in rows}
    report.facts["server"] = f"PostgreSQL {about.version}"
    report.settings.update({name: shown[name] for name in _SHOWN if name in shown})

    if await _is_pooled(connection, about.pid):
        report.facts["pooler"] = "yes"
        _warn_of_pooler(report, values)
    else:
        if values.get(_CHECK_INTERVAL) == "0":
            report.settings[_CHECK_INTERVAL] += " (1s on every connection of asgi-db)"
        limits = {"max_connections, less the reserved": _free(values)}
        limits |= {"CONNECTION LIMIT of the database": about.database_limit}
        limits |= {"CONNECTION LIMIT of the user": about.user_limit}
        plan.check_connections(report, {name: n for name, n in limits.items() if n >= 0})
        plan.check_encryption(
            report,
            bool(about.encrypted),
            "Add ?sslmode=require, or better sslmode=verify-full, to the URL.",
            host,
        )
    _check_role(report, plan, values, about)
    _check_server(report, values, about.version_number // 10000)
    _check_transactions(report, values)


def _free(values: dict[str, str]) -> int:
    reserved = sum(int(values.get(name, 0)) for name in _RESERVED)
    return int(values["max_connections"]) - reserved


def _warn_of_pooler(report: Report, values: dict[str, str]) -> None:
    report.warning(
        "There is a pooler between here and PostgreSQL: if it pools transactions, as PgBouncer"
        " can, statements fail, or get the rows of others.",
        'Say so to the application: Database(..., pooler="transaction"). The limits on connections'
        " are those of the pooler: max_client_conn, default_pool_size.",
    )
    if values.get(_CHECK_INTERVAL) == "0":
        report.note(
            f"{_CHECK_INTERVAL} is 0, and behind a pooler asgi-db leaves it: the statement of a"
            " client that was killed runs on.",
            f"ALTER SYSTEM SET {_CHECK_INTERVAL} = '1s'; SELECT pg_reload_conf().",
        )


def _check_role(report: Report, plan: Plan, values: dict[str, str], about: Row[Any]) -> None:
    """Say whether it is a primary or a standby, and what a failover costs."""
    standbys = "1 standby" if about.standbys == 1 else f"{about.standbys} standbys"
    role = "standby" if about.is_standby else "primary"
    report.facts["role"] = f"{role}, followed by {standbys}" if about.standbys else role
    is_read_only = values["default_transaction_read_only"] == "on"
    if about.is_standby or is_read_only:
        report.warning(
            "The server is a standby: every write fails."
            if about.is_standby
            else "The server is read-only by default: every write fails.",
            "Name the primary server in the URL, or let this application read only.",
        )
    if len(hosts_of(plan.url)) > 1 and "target_session_attrs" not in plan.url.query:
        report.warning(
            "The URL names several hosts, and takes a standby as well as the primary: after a"
            " failover writes may fail.",
            "Add target_session_attrs=primary to the URL, or read-write.",
        )
    # Those that wait for no standby: https://www.postgresql.org/docs/current/
    # runtime-config-wal.html#GUC-SYNCHRONOUS-COMMIT
    waits = values["synchronous_commit"] not in ("off", "local")
    name = "synchronous_commit" if values["synchronous_standby_names"] else _STANDBY_NAMES
    if about.standbys and not (waits and values["synchronous_standby_names"]):
        report.note(
            f"{standbys} may take over from this server, and its commits wait for none"
            f" ({name} is {values[name] or 'empty'}): a failover loses the last writes of which"
            " clients were told.",
            f"ALTER SYSTEM SET {_STANDBY_NAMES} = 'ANY 1 (*)'; SELECT pg_reload_conf(). Then a"
            " COMMIT waits for one of them, and with none there for ever.",
        )


def _check_server(report: Report, values: dict[str, str], version: int) -> None:
    if version < _FIRST_WITH_CHECK_INTERVAL:
        report.warning(
            f"PostgreSQL {version} does not look whether its clients are still there: the statement"
            " of a worker that was killed runs on.",
            "Upgrade to PostgreSQL 14 or later.",
        )
    if values["server_encoding"] != "UTF8":
        report.warning(
            f"server_encoding is {values['server_encoding']}: it cannot hold all characters.",
            "Make a database with CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0, and move"
            " the tables there.",
        )
    for name, loss in _NOT_DURABLE.items():
        if values[name] == "off":
            report.warning(
                f"{name} is off: {loss}.",
                f"ALTER SYSTEM SET {name} = on; SELECT pg_reload_conf(). Leave it where all data"
                " can be lost.",
            )


def _check_transactions(report: Report, values: dict[str, str]) -> None:
    isolation = values["default_transaction_isolation"]
    if isolation in ("repeatable read", "serializable"):
        report.note(
            f"default_transaction_isolation is {isolation}: transactions side by side fail with"
            " serialization errors, and are to be tried again.",
            "Ask for it where it is needed, transactional(isolation=...), and leave the default at"
            " read committed.",
        )
    if values["idle_in_transaction_session_timeout"] == "0":
        report.note(
            "idle_in_transaction_session_timeout is off: a client that hangs in a transaction keeps"
            " its locks for ever.",
            "ALTER ROLE ... SET idle_in_transaction_session_timeout = '60s'.",
        )
    if values["statement_timeout"] == "0":
        report.note(
            "statement_timeout is off: a statement may run for ever.",
            "ALTER ROLE ... SET statement_timeout = '30s'; or timeout= of the modes, which counts"
            " for the whole unit of work.",
        )
