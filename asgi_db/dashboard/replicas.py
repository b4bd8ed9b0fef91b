"""The part of the page about the replicas, where there are some."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from asgi_db.dashboard.chart import bar
from asgi_db.dashboard.markup import Markup, count, join, percent, scrolled, seconds, tag
from asgi_db.statistics import DatabaseStats, PoolStats

_HEADS = (
    ("route", "Server", None),
    ("share", "Share of reads", "Part of the units of work that may read from a replica"),
    ("units", "Units", "Units of work that have run there"),
    ("behind", "Behind", "How often it did not have yet what the client was told is committed"),
    ("lag", "Lag", "How late it was when it last answered"),
    ("used", "In use", "Connections out of the pool"),
    ("idle", "Idle", "Connections that are open and free"),
)


@dataclass(frozen=True, slots=True)
class _Server:
    name: str
    units: int
    pool: PoolStats
    behind: int | None = None
    lag: float | None = None
    is_down: bool = False


def card_of(table: Markup | None) -> Markup:
    """Return the card with the table; nothing where there are no replicas."""
    if table is None:
        return Markup("")
    hint = (
        "Since the process began, beside what the primary has read in their place. Behind: a"
        " replica did not have yet what the client was told is committed. Lag: how late it was when"
        " a read last asked it."
    )
    return tag(
        "section",
        tag("h2", "Replicas", id="replicas-title"),
        tag("p", hint, class_="hint"),
        tag("div", table, id="replicas"),
        class_="card",
        aria_labelledby="replicas-title",
    )


def table_of_replicas(stats: DatabaseStats) -> Markup:
    """Return the table of the replicas, with the primary as its last row."""
    servers = [
        *(
            _Server(each.name, each.units, each.pool, each.behind, each.lag, each.is_down)
            for each in stats.replicas
        ),
        _Server("Primary", stats.reads_on_primary, stats.pool),
    ]
    reads = sum(server.units for server in servers)
    heads = (
        tag("th", label, scope="col", role="columnheader", class_=f"c-{key}", title=title)
        for key, label, title in _HEADS
    )
    table = tag(
        "table",
        tag("thead", tag("tr", *heads, role="row"), role="rowgroup"),
        tag("tbody", *_rows(servers, reads), role="rowgroup"),
        class_="routes replicas",
        role="table",
        aria_labelledby="replicas-title",
    )
    return scrolled(table, "replicas")


def _rows(servers: Iterable[_Server], reads: int) -> Iterable[Markup]:
    for number, server in enumerate(servers):
        share = server.units / reads if reads else 0.0
        values = (
            join(tag("span", percent(share)), bar([("used", share)], f"{percent(share)} of it")),
            count(server.units),
            "–" if server.behind is None else count(server.behind),
            seconds(server.lag),
            count(server.pool.checked_out),
            count(server.pool.idle),
        )
        name = join(
            tag("span", server.name, class_="route"),
            server.is_down and tag("span", "down", class_="badge bad"),
        )
        yield tag(
            "tr",
            tag("th", name, scope="row", role="rowheader", class_="c-route"),
            *(
                tag("td", value, role="cell", class_=f"c-{key}", data_label=label)
                for (key, label, _), value in zip(_HEADS[1:], values, strict=True)
            ),
            role="row",
            data_key=number,
        )
