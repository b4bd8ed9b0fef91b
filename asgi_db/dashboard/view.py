"""What a client asks to see: the query of the address of the page."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl, urlencode

from asgi_db.dashboard.recorder import KINDS


@dataclass(frozen=True, slots=True)
class View:
    """What is shown, and in which order; what the query has that cannot be shown is left out.

    Attributes:
        database: the number of the database among those of the dashboard.
        sort: the column by which the routes are sorted.
        ascending: whether the least comes first.
        kind: the kind of units of interest that is shown; "" for all kinds.
        full: whether the tables are shown in full length.
        process: the process that is meant; "" for any.
    """

    database: int = 0
    sort: str = "share"
    ascending: bool = False
    kind: str = ""
    full: bool = False
    process: str = ""

    @classmethod
    def of(cls, query: bytes, databases: int, columns: frozenset[str]) -> View:
        """Read a query.

        Args:
            query: as in the scope.
            databases: how many there are.
            columns: the columns by which routes can be sorted.
        """
        given = dict(parse_qsl(query.decode("latin-1"), max_num_fields=20))
        number = given.get("database", "")
        sort, kind = given.get("sort", ""), given.get("kind", "")
        return cls(
            database=int(number) if number in map(str, range(databases)) else 0,
            sort=sort if sort in columns else cls().sort,
            ascending=given.get("order") == "ascending",
            kind=kind if kind in KINDS else "",
            full=given.get("rows") == "all",
            process=given.get("process", ""),
        )

    def link(self, **changes: Any) -> str:
        """Return the address of the same page with these changes; it begins with the `?`."""
        view, default = replace(self, **changes), View()
        query: dict[str, str] = {}
        if view.database:
            query["database"] = str(view.database)
        if (view.sort, view.ascending) != (default.sort, default.ascending):
            query["sort"] = view.sort
            query["order"] = "ascending" if view.ascending else "descending"
        if view.kind:
            query["kind"] = view.kind
        if view.full:
            query["rows"] = "all"
        return f"?{urlencode(query)}"
