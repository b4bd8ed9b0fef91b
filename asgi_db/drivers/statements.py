"""What a statement does, judged by its keywords.

Each database's file has a `Grammar`: a table of its commands, with the page that lists them. What
the table does not name counts as a write, so that a new command of the database is refused where
nothing may be written, until its place has been decided.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Callable

from sqlalchemy.engine import Compiled
from sqlalchemy.sql import visitors
from sqlalchemy.sql.selectable import ForUpdateArg


class Effect(enum.IntEnum):
    """What a statement does to the database; the greatest effect of its parts counts.

    Attributes:
        writes: whether it writes, or may do so.
    """

    READS = enum.auto()
    """It leaves nothing behind, so that its transaction may end early."""
    UNSURE = enum.auto()
    """It reads, but may leave something behind: a savepoint, or what a function that is not known
    has done."""
    HOLDS = enum.auto()
    """It reads, and takes something that lasts as long as its transaction: a cursor, an advisory
    lock. Where each statement stands alone, that is lost at once."""
    SETS = enum.auto()
    """It changes something of its connection, which others will use after the transaction."""
    LOCKS = enum.auto()
    """It locks rows, which are to be changed afterwards."""
    CALLS = enum.auto()
    """It runs code that may write; in a read-only transaction the server checks that itself."""
    WRITES = enum.auto()

    writes: bool


for _effect in Effect:
    _effect.writes = _effect >= Effect.CALLS


_STATEMENTS = (
    "SELECT|INSERT|UPDATE|DELETE|MERGE|REPLACE|WITH|VALUES|TABLE|CREATE|REFRESH|DECLARE|EXECUTE"
)
_PREFIX = re.compile(
    # EXPLAIN ANALYZE executes its statement, and so do MariaDB's ANALYZE and SET STATEMENT.
    rf"(?:(?P<explain>EXPLAIN|DESCRIBE|DESC)\b(?P<options>.*?)"
    rf"|ANALYZE\s+(?:FORMAT\s*=\s*\w+\s+)?(?!TABLE\b)|SET\s+STATEMENT\b.*?\bFOR\s+)"
    rf"\b(?P<statement>(?:{_STATEMENTS})\b.*)",
    re.IGNORECASE | re.DOTALL,
)
_ANALYZE = re.compile(r"\bANALY[SZ]E\b", re.IGNORECASE)

WRITING_WITH = (
    r"\AWITH\b.*?(?:\bAS\s*(?:NOT\s+)?(?:MATERIALIZED\s*)?\(|\))"
    r"\s*(?:INSERT|UPDATE|DELETE|MERGE|REPLACE)\b"
)
"""A statement whose WITH clause, or what follows it, writes."""

NOT_CODE = r"""'[^']*'|"[^"]*"|/\*.*?\*/|--[^\n]*"""
"""Literals, quoted names and comments in standard SQL."""


_LEAVES_NOTHING = re.compile(
    r"(?:SELECT|WITH|VALUES|TABLE|SHOW|EXPLAIN|DESCRIBE|DESC|HELP)\b", re.IGNORECASE
)
"""The reading commands that change nothing about their transaction."""

_CALL = re.compile(r"\b(\w+)\s*\(")

_KEYWORDS = """
    all and any as asymmetric between by case check distinct else end except exists filter from
    group having in intersect is join lateral like limit materialized not offset on or order over
    partition recursive select some symmetric then union using values when where window with within
"""
_TYPES = """
    bit binary char character decimal dec float nchar numeric nvarchar time timestamp varbinary
    varbit varchar varying
"""
_FUNCTIONS = """
    abs acos adddate age any_value array array_agg array_append array_cat array_length
    array_lower array_position array_positions array_remove array_to_json array_to_string
    array_upper ascii asin atan atan2 avg bit_and bit_length bit_or bit_xor bool_and bool_or
    btrim cardinality cast cbrt ceil ceiling changes char char_length character_length chr
    clock_timestamp coalesce concat concat_ws connection_id convert corr cos count crypt
    cume_dist curdate current_database current_date current_schema current_setting current_time
    current_timestamp current_user curtime database date date_add date_bin date_format date_part
    date_sub date_trunc datediff daterange datetime day dayname dayofmonth dayofweek dayofyear
    decode degrees dense_rank digest div elt encode every exp extract family field find_in_set
    first_value floor format found_rows from_base64 from_unixtime gcd gen_random_uuid
    generate_series glob greatest group_concat grouping hex hmac host hour if ifnull iif
    inet_aton inet_ntoa initcap instr int4range int8range interval isempty isfinite json
    json_agg json_array json_array_elements json_array_length json_arrayagg json_build_array
    json_build_object json_contains json_each json_exists json_extract json_group_array
    json_group_object json_keys json_length json_object json_object_agg json_objectagg
    json_query json_quote json_search json_table json_tree json_type json_typeof json_unquote
    json_valid json_value jsonb jsonb_agg jsonb_array_elements jsonb_array_elements_text
    jsonb_array_length jsonb_build_array jsonb_build_object jsonb_each jsonb_each_text
    jsonb_extract_path_text jsonb_object_agg jsonb_object_keys jsonb_path_exists
    jsonb_path_query jsonb_path_query_array jsonb_set jsonb_strip_nulls jsonb_typeof julianday
    justify_days lag last_day last_insert_rowid last_value lcase lcm lead least left length
    levenshtein likelihood likely ln locate log log10 log2 lower lower_inc lpad ltrim make_date
    make_interval make_timestamp make_timestamptz makedate masklen max md5 min minute mod month
    monthname now nth_value ntile nullif num_nonnulls num_nulls numnode numrange octet_length
    overlay percent_rank percentile_cont percentile_disc pg_backend_pid pg_is_in_recovery
    pg_sleep pg_typeof phraseto_tsquery pi plainto_tsquery position pow power printf quarter
    querytree quote_ident quote_literal radians rand random randomblob range_merge rank
    regexp_count regexp_instr regexp_like regexp_match regexp_matches regexp_replace
    regexp_split_to_array regexp_substr regr_slope repeat replace reverse right round row
    row_count row_number row_to_json rpad rtrim schema sec_to_time second session_user setweight
    sha1 sha2 sha224 sha256 sha384 sha512 sign similarity sin sleep soundex space split_part
    sqlite_version sqrt st_area st_asgeojson st_astext st_contains st_distance st_dwithin
    st_geomfromtext st_intersects st_length st_makeenvelope st_makepoint st_point st_setsrid
    st_transform st_within st_x st_y starts_with statement_timestamp stddev stddev_pop
    stddev_samp str_to_date strcmp strftime strict_word_similarity string_agg string_to_array
    strpos subdate substr substring sum tan time_to_sec timediff timestampdiff timezone
    to_base64 to_char to_date to_hex to_json to_jsonb to_number to_timestamp to_tsquery
    to_tsvector total transaction_timestamp translate trim trunc truncate ts_headline ts_rank
    ts_rank_cd tsrange tstzrange tsvector_to_array typeof ucase unaccent unhex unicode
    unix_timestamp unixepoch unlikely unnest upper upper_inc user utc_timestamp uuid
    uuid_generate_v4 uuidv7 var_pop var_samp variance version websearch_to_tsquery week
    width_bucket word_similarity xmlagg year yearweek zeroblob
"""
_HARMLESS = frozenset(f"{_KEYWORDS} {_TYPES} {_FUNCTIONS}".split())
"""What may stand before a parenthesis. Any other name may be a function that writes, or locks."""


class Grammar:
    """Which statements of a database read, and which do more."""

    def __init__(
        self,
        *,
        reads: str,
        holds: str,
        sets: str = "",
        calls: str = "",
        writes: str = "",
        holding: str = "",
        locking: str = "",
        setting: str = "",
        writing: str = WRITING_WITH,
        not_code: str = NOT_CODE,
        is_code: str = "",
    ) -> None:
        """Make the table; commands and patterns are regular expressions, in upper case.

        Args:
            reads: the commands that only read, separated by `|`; a space means any whitespace.
            holds: those that take something which lasts as long as the transaction.
            sets: those that change something of the connection.
            calls: those that run code which may write.
            writes: exceptions to the three; every other command counts as a write anyway.
            holding: what makes a reading command take something which lasts.
            locking: what makes a reading command lock rows.
            setting: what makes a reading command change something of the connection.
            writing: what makes a reading command write.
            not_code: literals, quoted names and comments.
            is_code: what surrounds comments whose text the database executes.
        """
        commands = {
            Effect.WRITES: writes,
            Effect.CALLS: calls,
            Effect.HOLDS: holds,
            Effect.SETS: sets,
            Effect.READS: reads,
        }
        self._commands = [
            (effect, _compile(rf"(?:{words})(?!\w)".replace(" ", r"\s+")))
            for effect, words in commands.items()
            if words
        ]
        inside = {
            Effect.WRITES: writing,
            Effect.LOCKS: locking,
            Effect.SETS: setting,
            Effect.HOLDS: holding,
        }
        self._inside = [(effect, _compile(words)) for effect, words in inside.items() if words]
        self._not_code = _compile(not_code)
        self._is_code = _compile(is_code) if is_code else None

    def effect_of(self, sql: str) -> Effect:
        """Return the effect of this SQL."""
        code = self._not_code.sub(_without_value, sql)
        if self._is_code is not None:
            code = self._is_code.sub(" ", code)
        # Some drivers send several statements at once.
        parts = (part.lstrip("( \t\r\n\f\v") for part in code.split(";"))
        return max((self._effect_of_one(part) for part in parts if part), default=Effect.READS)

    def _effect_of_one(self, code: str) -> Effect:
        if (prefix := _PREFIX.match(code)) is not None:
            if prefix["explain"] and not _ANALYZE.search(prefix["options"]):
                return Effect.READS
            return self._effect_of_one(prefix["statement"])
        commands = (effect for effect, words in self._commands if words.match(code))
        effect = next(commands, Effect.WRITES)
        if effect is Effect.READS:
            for more, words in self._inside:
                if words.search(code):
                    return more
            if _LEAVES_NOTHING.match(code) is None or not all(
                name.lower() in _HARMLESS for name in _CALL.findall(code)
            ):
                return Effect.UNSURE
        return effect


def _without_value(found: re.Match[str]) -> str:
    """Leave a name in the place of a quoted one, which may be that of a function."""
    return " _ " if found[0][0] in '"`[' else " "


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE | re.DOTALL)


COMMON = Grammar(
    reads="SELECT|WITH|VALUES|TABLE|SHOW|EXPLAIN|DESCRIBE|DESC|HELP|PRAGMA"
    "|COMMIT|END|ABORT|ROLLBACK|SAVEPOINT|RELEASE|RESET|FETCH|CLOSE",
    holds="SET LOCAL|SET TRANSACTION|BEGIN|START TRANSACTION|LOCK|DECLARE",
    sets="SET|USE|PREPARE",
    calls="CALL|DO|EXEC|EXECUTE",
    writes="SET GLOBAL",
    locking=r"\bFOR\s+(?:NO\s+KEY\s+)?UPDATE\b",
)
"""What holds for a database of which nothing is known."""


class Judge:
    """Judges the statements of one dialect; what it has found out is kept.

    Attributes:
        effect_of: what an SQL statement does.
        drops_lock: whether a compiled statement asks for a row lock that its SQL does not mention.
    """

    def __init__(self, effect_of: Callable[[str], Effect], *, drops_row_locks: bool) -> None:
        """Prepare it for one database.

        Args:
            effect_of: what an SQL statement does there.
            drops_row_locks: whether SQLAlchemy leaves row locks out of its SQL.
        """
        self.effect_of = functools.lru_cache(maxsize=1024)(effect_of)
        self.drops_lock = functools.lru_cache(maxsize=1024)(
            _asks_for_row_lock if drops_row_locks else _asks_for_no_lock
        )


def _asks_for_row_lock(compiled: Compiled | None) -> bool:
    statement = None if compiled is None else compiled.statement
    return statement is not None and any(
        isinstance(part, ForUpdateArg) for part in visitors.iterate(statement)
    )


def _asks_for_no_lock(_: Compiled | None) -> bool:
    return False
