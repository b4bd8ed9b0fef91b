"""What a statement does: each command of the three databases is on its side."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import make_url

from tests.internals import AnyDriver, Effect, driver_of

READS, UNSURE, HOLDS, SETS, LOCKS, CALLS, WRITES = Effect


def driver(name: str) -> AnyDriver:
    """What is known about the database of this name."""
    found = driver_of(make_url(f"{name}://").get_dialect()())
    assert isinstance(found, AnyDriver)
    return found


# Source: https://www.postgresql.org/docs/current/sql-commands.html
POSTGRESQL = {
    READS: """
        EXPLAIN SELECT 1
        EXPLAIN DELETE FROM t
        EXPLAIN (COSTS off) UPDATE t SET a = 1
        EXPLAIN ANALYZE SELECT * FROM t WHERE (a)
        EXPLAIN (ANALYZE, BUFFERS) SELECT 1
        SELECT 1
        SELECT $$ DELETE FROM t; SELECT 1 INTO u $$
        SELECT $q$ FOR UPDATE $q$, $1
        SELECT E'it\\'s FOR UPDATE'
        SELECT "for update" FROM t
        SELECT data #>> '{into}' FROM t
        SELECT 1 -- FOR UPDATE
        SHOW search_path
        TABLE t
        VALUES (1)
    """,
    UNSURE: """
        ABORT
        CLOSE c
        COMMIT
        END
        FETCH 5 FROM c
        MOVE 5 FROM c
        RELEASE SAVEPOINT s
        ROLLBACK
        SAVEPOINT s
        ROLLBACK TO SAVEPOINT s
        SELECT a_function_of_ours(1)
        SELECT shop.a_function_of_ours ()
        SELECT "count"(1)
        UNLISTEN *
    """,
    HOLDS: """
        BEGIN
        DECLARE c CURSOR FOR SELECT 1
        LOCK TABLE t IN EXCLUSIVE MODE
        SELECT pg_advisory_lock(1)
        SELECT pg_advisory_xact_lock(1)
        SELECT pg_advisory_unlock_all()
        SELECT pg_try_advisory_lock_shared ( 1, 2 )
        SELECT set_config('app.tenant', 'a', true)
        SET LOCAL search_path TO shop
        SET CONSTRAINTS ALL DEFERRED
        SET TRANSACTION READ ONLY
        START TRANSACTION
    """,
    SETS: """
        DEALLOCATE ALL
        DISCARD ALL
        RESET search_path
        LISTEN channel
        LOAD 'library'
        PREPARE p AS DELETE FROM t
        SET search_path TO shop
        SET ROLE app
        SET SESSION AUTHORIZATION app
        SELECT set_config('search_path', $1, false)
        SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY
    """,
    LOCKS: """
        SELECT * FROM t FOR UPDATE
        SELECT * FROM t WHERE id IN (1, 2) FOR UPDATE SKIP LOCKED
        SELECT * FROM t FOR NO KEY UPDATE NOWAIT
        SELECT * FROM t for  share
        SELECT * FROM t FOR KEY SHARE OF t
        WITH x AS (SELECT id FROM t FOR UPDATE) SELECT * FROM x
        SELECT E'\\\\' FROM t FOR UPDATE
        SELECT pg_advisory_xact_lock(1) FROM t FOR UPDATE
        EXPLAIN ANALYZE SELECT * FROM t FOR UPDATE
    """,
    CALLS: """
        CALL wipe()
        DO 'BEGIN DELETE FROM t; END'
        DO $$ BEGIN DELETE FROM t; END $$
        EXECUTE p
        EXPLAIN ANALYZE EXECUTE p
    """,
    WRITES: """
        ALTER TABLE t ADD a INTEGER
        ALTER SYSTEM SET work_mem = '1GB'
        ANALYZE
        ANALYZE t
        ANALYZE (VERBOSE) t
        CHECKPOINT
        CLUSTER t
        COMMENT ON TABLE t IS 'a'
        COMMIT PREPARED 'a'
        COPY t FROM '/tmp/t'
        COPY t TO PROGRAM 'tee /tmp/t'
        CREATE TABLE t (id INTEGER)
        CREATE TABLE t AS SELECT 1
        DELETE FROM t
        DROP TABLE t
        EXPLAIN ANALYZE DELETE FROM t
        EXPLAIN ANALYZE VERBOSE UPDATE t SET a = 1
        EXPLAIN (ANALYZE, BUFFERS) DELETE FROM t WHERE id IN (SELECT 1)
        EXPLAIN (ANALYZE) CREATE TABLE t AS SELECT 1
        GRANT SELECT ON t TO app
        IMPORT FOREIGN SCHEMA s FROM SERVER f INTO l
        INSERT INTO t VALUES (1)
        MERGE INTO t USING s ON t.id = s.id WHEN MATCHED THEN DELETE
        NOTIFY channel
        PREPARE TRANSACTION 'a'
        REASSIGN OWNED BY a TO b
        REFRESH MATERIALIZED VIEW v
        REINDEX TABLE t
        REPACK t
        REVOKE SELECT ON t FROM app
        ROLLBACK PREPARED 'a'
        SECURITY LABEL FOR s ON TABLE t IS 'a'
        SELECT 1 INTO u
        SELECT * INTO TEMPORARY u FROM t
        SELECT nextval('s')
        SELECT setval('s', 1)
        SELECT pg_notify('channel', 'a')
        SELECT lo_unlink(1)
        SELECT 1; DELETE FROM t
        TRUNCATE t
        UPDATE t SET a = 1
        VACUUM
        WITH x AS (INSERT INTO t VALUES (1) RETURNING id) SELECT * FROM x
        WITH x AS (SELECT id FROM t WHERE data #>> '{a}' = 'b') DELETE FROM t USING x
        WITH x AS MATERIALIZED (DELETE FROM t RETURNING *) SELECT * FROM x
        WITH x AS NOT MATERIALIZED(DELETE FROM t RETURNING *) SELECT * FROM x
        WITH x AS (MERGE INTO t USING s ON a = b WHEN MATCHED THEN DELETE) SELECT * FROM x
    """,
}

# Sources: https://dev.mysql.com/doc/refman/8.4/en/sql-statements.html and
# https://mariadb.com/docs/server/reference/sql-statements
MYSQL = {
    READS: """
        ANALYZE SELECT 1
        ANALYZE FORMAT=JSON SELECT 1
        SET STATEMENT max_statement_time = 1 FOR SELECT 1
        DESC t
        DESCRIBE t
        EXPLAIN DELETE FROM t
        EXPLAIN FOR CONNECTION 5
        EXPLAIN ANALYZE SELECT 1
        HELP 'a'
        SELECT 1
        SELECT "a FOR UPDATE"
        SELECT 'it\\'s FOR UPDATE'
        SELECT `for update` FROM t
        SELECT 1 # FOR UPDATE
        SELECT /*+ MAX_EXECUTION_TIME(1000) */ 1
        SHOW TABLES
        TABLE t
        VALUES ROW(1)
    """,
    UNSURE: """
        CHECKSUM TABLE t
        COMMIT
        DEALLOCATE PREPARE p
        GET DIAGNOSTICS CONDITION 1 @a = MESSAGE_TEXT
        RELEASE SAVEPOINT s
        RESIGNAL
        ROLLBACK
        SAVEPOINT s
        SELECT a_function_of_ours(1)
        SELECT `count` (1)
        SIGNAL SQLSTATE '45000'
        UNLOCK TABLES
    """,
    HOLDS: """
        BEGIN
        SELECT GET_LOCK('a', 10)
        SELECT release_lock('a')
        SELECT RELEASE_ALL_LOCKS()
        SET TRANSACTION READ ONLY
        START TRANSACTION
    """,
    SETS: """
        SELECT @a := 1
        HANDLER t OPEN
        HANDLER t READ FIRST
        LOCK INSTANCE FOR BACKUP
        LOCK TABLES t WRITE
        PREPARE p FROM 'SELECT 1'
        SELECT 1 INTO @a
        SET @a = 1
        SET NAMES utf8mb4
        SET SESSION sql_mode = ''
        SET ROLE app
        USE shop
        SET SESSION TRANSACTION READ ONLY
    """,
    LOCKS: """
        SELECT * FROM t FOR UPDATE
        SELECT * FROM t FOR SHARE SKIP LOCKED
        SELECT * FROM t LOCK IN SHARE MODE
        SELECT 5--1 FROM t FOR UPDATE
        SELECT * FROM t /*!80000 FOR UPDATE */
        SELECT GET_LOCK('a', 1) FROM t FOR UPDATE
        ANALYZE SELECT * FROM t FOR UPDATE
    """,
    CALLS: """
        CALL wipe()
        DO RELEASE_LOCK('a')
        EXECUTE p
        EXECUTE IMMEDIATE 'DELETE FROM t'
    """,
    WRITES: """
        /*! DELETE FROM t */
        /*M!100100 DELETE FROM t */
        /*!50100 DELETE */ FROM t
        ALTER TABLE t ADD a INTEGER
        ANALYZE DELETE FROM t
        ANALYZE TABLE t
        ANALYZE NO_WRITE_TO_BINLOG TABLE t
        BACKUP STAGE START
        BEGIN NOT ATOMIC DELETE FROM t; END
        BINLOG 'a'
        CACHE INDEX t IN c
        CHANGE REPLICATION SOURCE TO SOURCE_HOST = 'a'
        CHECK TABLE t
        CLONE LOCAL DATA DIRECTORY = '/tmp/a'
        CREATE TABLE t (id INTEGER)
        DELETE FROM t
        DROP TABLE t
        FLUSH TABLES
        GRANT SELECT ON t TO app
        IMPORT TABLE FROM 'a.sdi'
        INSERT INTO t VALUES (1)
        INSTALL PLUGIN p SONAME 'a'
        KILL 5
        LOAD DATA INFILE 'a.csv' INTO TABLE t
        LOAD INDEX INTO CACHE t
        OPTIMIZE TABLE t
        PURGE BINARY LOGS TO 'a'
        RENAME TABLE t TO u
        REPAIR TABLE t
        REPLACE INTO t VALUES (1)
        RESET REPLICA
        RESTART
        REVOKE SELECT ON t FROM app
        SELECT * INTO OUTFILE '/tmp/t' FROM t
        SELECT a FROM t INTO DUMPFILE '/tmp/t'
        SELECT NEXTVAL(s)
        SELECT NEXT VALUE FOR s
        SELECT SETVAL(s, 1)
        SELECT 1; DELETE FROM t
        SET @@GLOBAL.sql_mode = ''
        SET DEFAULT ROLE app
        SET GLOBAL sql_mode = ''
        SET PASSWORD = 'a'
        SET PERSIST sql_mode = ''
        SET SESSION a = 1, GLOBAL sql_mode = ''
        SET RESOURCE GROUP g
        SET STATEMENT max_statement_time = 1 FOR DELETE FROM t
        SHUTDOWN
        START REPLICA
        STOP REPLICA
        TRUNCATE t
        UNINSTALL PLUGIN p
        UPDATE t SET a = 1
        WITH x AS (SELECT 1) DELETE FROM t
        XA START 'a'
    """,
}

# Sources: https://www.sqlite.org/lang.html and https://www.sqlite.org/pragma.html
SQLITE = {
    READS: """
        EXPLAIN DELETE FROM t
        EXPLAIN QUERY PLAN UPDATE t SET a = 1
        SELECT 1
        SELECT replace(name, 'a', 'b') FROM t
        SELECT [for update] FROM t
        VALUES (1)
    """,
    UNSURE: """
        COMMIT
        DETACH DATABASE a
        END TRANSACTION
        PRAGMA foreign_key_check
        PRAGMA main.table_info("t")
        PRAGMA "main".index_list('t')
        PRAGMA integrity_check(1)
        PRAGMA journal_mode
        PRAGMA user_version
        RELEASE s
        ROLLBACK
        SAVEPOINT s
    """,
    HOLDS: """
        BEGIN
        BEGIN IMMEDIATE
    """,
    SETS: """
        ATTACH DATABASE 'a.db' AS a
        PRAGMA foreign_keys = OFF
        PRAGMA main.cache_size=5
        PRAGMA busy_timeout(5)
    """,
    LOCKS: "",
    CALLS: "",
    WRITES: """
        ALTER TABLE t ADD a INTEGER
        ANALYZE
        CREATE VIRTUAL TABLE t USING fts5(a)
        DELETE FROM t
        DROP TABLE t
        INSERT INTO t VALUES (1)
        PRAGMA application_id = 1
        PRAGMA incremental_vacuum
        PRAGMA incremental_vacuum(5)
        PRAGMA journal_mode = DELETE
        PRAGMA optimize
        PRAGMA main.user_version=1
        PRAGMA user_version(1)
        PRAGMA wal_checkpoint(TRUNCATE)
        REINDEX
        REPLACE INTO t VALUES (1)
        UPDATE t SET a = 1
        VACUUM
        VACUUM INTO 'a.db'
        WITH x AS (SELECT 1) INSERT INTO t SELECT * FROM x
        WITH x AS (SELECT 1) REPLACE INTO t SELECT * FROM x
    """,
}

COMMANDS = [
    (name, effect, line.strip())
    for name, table in {"postgresql": POSTGRESQL, "mysql": MYSQL, "sqlite": SQLITE}.items()
    for effect, lines in table.items()
    for line in lines.splitlines()
    if line.strip()
]


@pytest.mark.parametrize(("name", "effect", "sql"), COMMANDS)
def test_each_command_of_each_database_is_on_its_side(name: str, effect: Effect, sql: str) -> None:
    assert driver(name).effect_of(sql) is effect


READING = [
    "SELECT 'insert into t values (1)'",
    "SELECT 1 AS x -- insert into t",
    "SELECT replace(name, 'a', 'b') FROM t",
    "SELECT * FROM updates",
    "(SELECT 1) UNION (SELECT 2)",
    "WITH x AS (SELECT 1) SELECT * FROM x",
    "WITH x AS (SELECT id FROM t) SELECT * FROM t WHERE id IN (SELECT id FROM x)",
    "WITH x AS (SELECT 'insert into t' AS a) SELECT * FROM x",
    "WITH x AS (SELECT ') insert into t' AS a) SELECT * FROM x",
    "WITH x AS (SELECT 'it''s ) delete from t') SELECT * FROM x",
    'WITH x AS (SELECT 1 AS ") update t") SELECT * FROM x',
    "WITH deleted AS (SELECT 1) SELECT * FROM deleted",
    "/* insert */ SELECT 1",
    "-- delete from t\nSELECT 1",
    "/* a */ SELECT '*/ insert into t'",
    "SELECT 1;",
    " ; SELECT ';'",
    "",
]

WRITING = [
    "WITH x AS (SELECT 1) INSERT INTO t SELECT * FROM x",
    "WITH x AS (SELECT 1) UPDATE t SET a = 1",
    "WITH x(a, b) AS (SELECT 1, 2)\n  DELETE FROM t USING x",
    "WITH RECURSIVE x AS (SELECT 1) DELETE FROM t",
    "WITH x AS (SELECT 1), y AS (UPDATE t SET a = 1 RETURNING a) SELECT * FROM y",
    "with x as(insert into t values (1) returning id)select * from x",
    "WITH x AS (/* audit */ INSERT INTO t VALUES (1) RETURNING id) SELECT * FROM x",
    "WITH x AS (SELECT 1) -- the target\nINSERT INTO t SELECT * FROM x",
    "SELECT 1; DROP TABLE t",
    "(DELETE FROM t)",
    "unheard_of",
]

NAMES = ["postgresql", "mysql", "sqlite", "mssql"]


@pytest.mark.parametrize("name", NAMES)
def test_a_statement_is_judged_by_its_code_on_every_database(name: str) -> None:
    """The last one stands for a database of which nothing is known."""
    for sql in READING:
        assert driver(name).effect_of(sql) is READS, sql
    for sql in WRITING:
        assert driver(name).effect_of(sql) is WRITES, sql


def test_a_number_sign_begins_a_comment_in_mysql_alone() -> None:
    statement = "WITH x AS (SELECT 1) # the target\nINSERT INTO t SELECT * FROM x"
    assert driver("mysql").effect_of(statement) is WRITES
    assert driver("sqlite").effect_of(statement) is READS


names = st.sampled_from(NAMES)
comments = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="*/!M"), max_size=9).map(
        "/*{}*/".format
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=9).map(
        "-- {}\n".format
    ),
)
margins = st.lists(st.one_of(st.text(" \t\r\n", min_size=1, max_size=3), comments), max_size=4).map(
    "".join
)
cases = st.sampled_from([str.upper, str.lower, str.title, str.swapcase])


@given(
    name=names,
    margin=margins,
    case=cases,
    keyword=st.sampled_from("INSERT UPDATE DELETE MERGE TRUNCATE CREATE ALTER DROP GRANT".split()),
)
def test_a_writing_keyword_is_found_behind_whitespace_and_comments_in_any_case(
    name: str, margin: str, case: Callable[[str], str], keyword: str
) -> None:
    assert driver(name).effect_of(f"{margin}{case(keyword)} t") is WRITES


@given(
    name=names,
    margin=margins,
    case=cases,
    keyword=st.sampled_from(["SELECT", "WITH x AS (SELECT 1) SELECT", "VALUES"]),
    literal=st.lists(
        st.sampled_from(
            [" ", ")", "(", "a", "insert into", "for update", "''", ";", "as", "*/", "--", "\n"]
        )
    ).map("".join),
)
def test_no_text_inside_a_literal_makes_a_reading_statement_do_more(
    name: str, margin: str, case: Callable[[str], str], keyword: str, literal: str
) -> None:
    assert driver(name).effect_of(f"{margin}{case(keyword)} '{literal}'") is READS


@pytest.mark.parametrize("name", NAMES)
def test_many_comments_before_a_statement_are_read_in_no_time(name: str) -> None:
    """The statement is judged inside the event loop, which a long look would stop for everybody."""
    assert driver(name).effect_of("/* a */ " * 1000 + "SELECT 1") is READS
    assert driver(name).effect_of("/* a */ " * 1000 + "DELETE FROM t") is WRITES
    assert driver(name).effect_of("EXPLAIN " * 1000 + "SELECT " * 1000) is READS
