"""The table of the routes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from asgi_db.dashboard.chart import bar
from asgi_db.dashboard.markup import Markup, count, join, percent, rate, scrolled, seconds, tag
from asgi_db.dashboard.view import View
from asgi_db.histograms import Histogram
from asgi_db.statistics import RouteStats

MOST_ROWS = 50
"""The rows that are shown unless the client asks for all."""

Value = Callable[["Row"], float | str]


@dataclass(frozen=True, slots=True)
class Row:
    """A route, with what is computed from its counters.

    Attributes:
        route: its name.
        stats: its counters.
        share: its part of the time for which all routes held connections.
    """

    route: str
    stats: RouteStats
    share: float


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table.

    Attributes:
        key: its name in the address of the page.
        label: its heading.
        title: what it means.
        value: what rows are sorted by.
        show: what a cell shows; None if that is a number of things.
        group: the heading above it.
    """

    key: str
    label: str
    title: str
    value: Value
    show: Callable[[Row], object] | None = None
    group: str = ""

    def cell(self, row: Row) -> object:
        """Return what the cell of a row shows."""
        return count(float(self.value(row))) if self.show is None else self.show(row)


def route_name(route: str) -> Markup:
    """Return the name of a route, `GET /orders (read_orders)`, with its function set apart."""
    where, parenthesis, function = route.partition(" (")
    return tag(
        "span",
        where,
        parenthesis and tag("span", f" ({function}", class_="function"),
        class_="route",
    )


def _statements(row: Row) -> float:
    return row.stats.statements / row.stats.units if row.stats.units else 0.0


def _outcomes(row: Row) -> Markup:
    stats = row.stats
    named = [
        ("committed", "committed", stats.committed),
        ("none", "read only", stats.none),
        ("rolled_back", "rolled back", stats.rolled_back),
        ("failed", "failed", stats.failed),
    ]
    words = [
        tag("span", f"{count(number)} {name}", class_=class_)
        for class_, name, number in named
        if number
    ]
    if not words:
        return tag("span", "no units", class_="muted")
    label = ", ".join(f"{count(number)} {name}" for _, name, number in named if number)
    parts = [(class_, number / stats.units) for class_, _, number in named]
    return join(bar(parts, label), tag("span", *words, class_="outcomes"))


def _share(row: Row) -> Markup:
    return join(
        tag("span", percent(row.share)), bar([("used", row.share)], f"{percent(row.share)} of it")
    )


def _percentiles(
    name: str, group: str, meaning: str, times: Callable[[RouteStats], Histogram]
) -> Iterable[Column]:
    for number in 50, 95, 99:

        def value(row: Row, number: int = number) -> float:
            found = times(row.stats).percentile(number)
            return -1.0 if found is None else found

        def show(row: Row, number: int = number) -> str:
            return seconds(times(row.stats).percentile(number))

        title = f"{number} of 100 units of work {meaning} no longer than this"
        yield Column(f"{name}_p{number}", f"p{number}", title, value, show, group)


COLUMNS = (
    Column("route", "Route", "The route", lambda row: row.route.lower()),
    Column("units", "Units", "Units of work that have ended", lambda row: row.stats.units),
    Column("failed", "Outcomes", "How they ended", lambda row: row.stats.failed, _outcomes),
    Column(
        "statements",
        "Stmts/unit",
        "Statements for each unit of work",
        _statements,
        lambda row: rate(_statements(row)),
    ),
    Column("retries", "Retries", "Requests run again", lambda row: row.stats.retries),
    *_percentiles("hold", "Hold", "held connections", lambda stats: stats.hold_times),
    *_percentiles("wait", "Wait", "waited for a connection", lambda stats: stats.wait_times),
    *_percentiles("busy", "Busy", "were in calls of the session", lambda stats: stats.busy_times),
    Column(
        "share",
        "Pool share",
        "Part of the time for which connections were held",
        lambda row: row.share,
        _share,
    ),
)
SORTED_BY = {column.key: column for column in COLUMNS}


def table_of(routes: Mapping[str, RouteStats], view: View) -> Markup:
    """Return the table, sorted as the view says."""
    held = sum(stats.held for stats in routes.values())
    rows = [
        Row(route, stats, stats.held / held if held else 0.0) for route, stats in routes.items()
    ]
    rows.sort(key=lambda row: row.route)
    rows.sort(key=SORTED_BY[view.sort].value, reverse=not view.ascending)
    shown = rows if view.full else rows[:MOST_ROWS]
    if not rows:
        return tag("p", "No request has used the database yet.", class_="empty")
    more = len(rows) - len(shown)
    table = tag(
        "table",
        tag("thead", *_heads(view), role="rowgroup"),
        tag("tbody", *map(_row, shown), role="rowgroup"),
        class_="routes",
        role="table",
        aria_labelledby="routes-title",
    )
    return join(
        scrolled(table, "routes"),
        more > 0
        and tag(
            "p",
            tag(
                "a", f"Show all {count(len(rows))} routes", href=view.link(full=True), data_view=""
            ),
            class_="more",
        ),
    )


def _heads(view: View) -> Iterable[Markup]:
    groups = list[Markup]()
    columns = list(COLUMNS)
    while columns:
        group = columns[0].group
        size = 1
        while group and size < len(columns) and columns[size].group == group:
            size += 1
        groups.append(
            tag("th", group, colspan=size, scope="colgroup", class_="group", role="columnheader")
            if group
            else tag("td", role="cell")
        )
        del columns[:size]
    yield tag("tr", *groups, class_="groups", role="row")
    yield tag("tr", *(_head(column, view) for column in COLUMNS), role="row")


def _head(column: Column, view: View) -> Markup:
    is_sorted = column.key == view.sort
    ascending = not view.ascending if is_sorted else column.key == "route"
    order = ("ascending" if view.ascending else "descending") if is_sorted else None
    link = tag(
        "a",
        column.group and tag("span", f"{column.group} ", class_="of-group"),
        column.label,
        tag("span", class_="arrow", aria_hidden="true"),
        href=view.link(sort=column.key, ascending=ascending),
        title=f"{column.title}. Sort by it",
        data_view="",
    )
    return tag(
        "th",
        link,
        scope="col",
        role="columnheader",
        class_=f"c-{column.key}",
        aria_sort=order,
        data_key=column.key,
    )


def _row(row: Row) -> Markup:
    first, *others = COLUMNS
    cells = [
        tag(
            "td",
            column.cell(row),
            role="cell",
            class_=f"c-{column.key}",
            data_label=f"{column.group} {column.label}".strip(),
        )
        for column in others
    ]
    return tag(
        "tr",
        tag("th", route_name(row.route), scope="row", role="rowheader", class_=f"c-{first.key}"),
        *cells,
        role="row",
        data_key=row.route,
    )
