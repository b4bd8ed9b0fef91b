"""Which statements leave nothing behind in their transaction, so that it may end early.

A row lock, a setting and what a function may have written last until the end of a transaction.
Whether they are there is judged by the text of a statement; in doubt the transaction is kept.
"""

from __future__ import annotations

import re

_READ = re.compile(r"[\s(]*(?:SELECT|WITH|VALUES|TABLE|SHOW)\b", re.IGNORECASE)

_LASTS = re.compile(
    r"\bFOR\s+(?:NO\s+KEY\s+|KEY\s+)?(?:UPDATE|SHARE)\b|\bLOCK\s+IN\s+SHARE\b|\bINTO\b|:=",
    re.IGNORECASE,
)
"""Row locks, and SELECT … INTO a table or a variable."""

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
    abs age array array_agg array_length avg bit_length btrim cast ceil ceiling char_length
    character_length coalesce concat concat_ws convert count cume_dist curdate current_date
    current_time current_timestamp curtime date date_add date_format date_part date_sub date_trunc
    datediff datetime day dense_rank every exp extract first_value floor format greatest
    group_concat grouping hex hour if ifnull iif instr interval json json_agg json_array
    json_array_length json_build_array json_build_object json_contains json_extract
    json_group_array json_group_object json_object json_object_agg json_type json_unquote
    json_valid jsonb jsonb_agg jsonb_array_length jsonb_build_array jsonb_build_object
    jsonb_object_agg julianday lag last_value lcase lead least left length ln locate log lower lpad
    ltrim make_date make_interval max md5 min minute mod month now nth_value ntile nullif
    octet_length percent_rank phraseto_tsquery plainto_tsquery position pow power printf quarter
    rank regexp_replace repeat replace reverse right round row row_number row_to_json rpad rtrim
    second sign similarity split_part sqrt stddev strftime string_agg strpos substr substring sum
    timestampdiff to_char to_date to_json to_jsonb to_number to_timestamp to_tsquery to_tsvector
    total translate trim trunc truncate ts_rank typeof ucase unicode unixepoch unnest upper
    variance week websearch_to_tsquery year
"""
_HARMLESS = frozenset(f"{_KEYWORDS} {_TYPES} {_FUNCTIONS}".split())
"""What may stand before a parenthesis. Any other name may be a function that writes, or locks."""


def leaves_nothing(statement: str) -> bool:
    """Return whether a statement leaves nothing behind that lasts until its transaction ends.

    Args:
        statement: the SQL without its comments, literals and quoted names.
    """
    return (
        _READ.match(statement) is not None
        and _LASTS.search(statement) is None
        and all(name.lower() in _HARMLESS for name in _CALL.findall(statement))
    )
