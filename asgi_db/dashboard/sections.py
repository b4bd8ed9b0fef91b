"""The parts of the page, each of which follows what happens by itself."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from asgi_db.dashboard.chart import bar, plot, top_of
from asgi_db.dashboard.markup import Markup, count, join, percent, rate, seconds, tag
from asgi_db.dashboard.recorder import (
    KINDS,
    MOST_UNITS,
    REPEATED,
    SLOW,
    Recorder,
    Sample,
    SentStatement,
    UnitOfInterest,
)
from asgi_db.dashboard.replicas import table_of_replicas
from asgi_db.dashboard.routes import route_name, table_of
from asgi_db.dashboard.view import View
from asgi_db.database import Database
from asgi_db.histograms import Histogram
from asgi_db.statistics import DatabaseStats, Holder, RouteStats

MOST_UNITS_SHOWN = 50
"""The units of interest that are shown unless the client asks for all."""

_RECENT = 10
"""Seconds over which a rate is taken."""


def sections(database: Database, view: View) -> dict[str, Markup]:
    """Return the contents of all parts of the page, by their ids."""
    recorder, stats = Recorder.of(database), database.stats()
    history = recorder.history()
    of_replicas = {"replicas": table_of_replicas(stats)} if stats.replicas else {}
    return {
        **of_replicas,
        "tiles": _tiles(stats, recorder, history),
        "pool": _pool(history),
        "load": _load(history),
        "holders": _holders(stats.holders),
        "routes": table_of(stats.routes, view),
        "units": _units(recorder, view),
        "conflicts": _conflicts(stats),
    }


# -- numbers -----------------------------------------------------------------------------------


def _tiles(stats: DatabaseStats, recorder: Recorder, history: Sequence[Sample]) -> Markup:
    pool, routes = stats.pool, stats.routes.values()
    waited = sum((route.wait_times for route in routes), Histogram()).percentile(95)
    held = sum((route.hold_times for route in routes), Histogram()).percentile(95)
    units = sum(sample.units for sample in history[-_RECENT - 1 : -1]) / _RECENT
    failed = recorder.found["failed"] + recorder.found["unknown"]
    all_units = sum(route.units for route in routes)
    used = pool.checked_out / pool.limit if pool.limit else 0.0
    limit = count(pool.limit) if pool.limit else "no limit"
    oldest = stats.holders[0].age if stats.holders else None
    return join(
        _tile(
            "In use",
            count(pool.checked_out),
            f"of {limit}",
            "bad" if used >= 1 else "warn" if used >= 0.8 else "",
            bar([("used", min(used, 1.0))], f"{percent(used)} of the pool"),
        ),
        _tile(
            "Waiting",
            count(pool.waiting or 0) if pool.waiting is not None else "–",
            f"p95 of the wait {seconds(waited)}",
            "bad" if pool.waiting else "",
        ),
        _tile("Units of work", rate(units), "a second", ""),
        _tile("Hold, p95", seconds(held), "for a unit of work", ""),
        _tile(
            "Oldest hold",
            seconds(oldest) if oldest is not None else "–",
            "past leak_threshold" if any(h.is_late for h in stats.holders) else "now",
            "bad" if any(h.is_late for h in stats.holders) else "",
        ),
        _tile(
            "Failed",
            count(failed),
            f"{percent(failed / all_units if all_units else 0)} of {count(all_units)}",
            "bad" if failed else "",
        ),
    )


def _tile(label: str, value: str, note: str, state: str, graph: Markup | None = None) -> Markup:
    return tag(
        "div",
        tag("dt", label),
        tag("dd", tag("span", value, class_="value"), tag("span", note, class_="note"), graph),
        class_=f"tile {state}".strip(),
    )


# -- plots -------------------------------------------------------------------------------------


def _pool(history: Sequence[Sample]) -> Markup:
    used = [sample.used for sample in history]
    waiting = [sample.waiting for sample in history]
    opened = [sample.opened for sample in history]
    limit = history[-1].limit
    now = history[-1]
    label = (
        f"Connections of the pool in the last five minutes. In use: now {now.used}, at most"
        f" {max(used)}. Waiting: now {now.waiting}, at most {max(waiting)}."
        + (f" Limit: {limit}." if limit else "")
    )
    return join(
        _legend(
            ("used", "in use", now.used, max(used)),
            ("idle", "open", now.opened, max(opened)),
            ("waiting", "waiting", now.waiting, max(waiting)),
            ("limit", "limit", limit, None),
        ),
        plot(
            ("idle", opened),
            ("used", used),
            ("waiting", waiting),
            top=top_of(opened, waiting, [limit or 0]),
            label=label,
            limit=limit,
        ),
    )


def _load(history: Sequence[Sample]) -> Markup:
    past = history[:-1]  # the present second has only begun
    units, failed = [s.units for s in past], [s.failed for s in past]
    label = (
        f"Units of work for each second of the last five minutes: now {units[-1]}, at most"
        f" {max(units)}. Failed: {sum(failed)}."
    )
    return join(
        _legend(
            ("used", "ended", units[-1], max(units)),
            ("failed", "failed", failed[-1], max(failed)),
        ),
        plot(("used", units), ("failed", failed), top=top_of(units), label=label),
    )


def _legend(*entries: tuple[str, str, int | None, int | None]) -> Markup:
    return tag(
        "ul",
        *(
            tag(
                "li",
                tag("span", class_=f"key {class_}", aria_hidden="true"),
                f"{name} ",
                tag("b", count(now)),
                most is not None and tag("span", f" max {count(most)}", class_="muted"),
            )
            for class_, name, now, most in entries
            if now is not None
        ),
        class_="legend",
    )


# -- what has connections now ------------------------------------------------------------------


def _holders(holders: Iterable[Holder]) -> Markup:
    items = [
        tag(
            "li",
            tag(
                "span",
                route_name(holder.route),
                holder.is_late and tag("span", "past leak_threshold", class_="badge bad"),
            ),
            tag("span", seconds(holder.age), class_="age"),
            holder.statement != "" and tag("code", holder.statement),
            class_="late" if holder.is_late else None,
        )
        for holder in holders
    ]
    if not items:
        return tag("p", "No connection is out of the pool.", class_="empty")
    return tag("ol", *items, class_="holders")


# -- units of interest -------------------------------------------------------------------------


def _units(recorder: Recorder, view: View) -> Markup:
    units = [unit for unit in reversed(recorder.units) if not view.kind or view.kind in unit.kinds]
    shown = units if view.full else units[:MOST_UNITS_SHOWN]
    filters = [
        tag(
            "a",
            label,
            " ",
            tag("span", count(number), class_="number"),
            href=view.link(kind=kind),
            class_="chip",
            data_view="",
            data_key=f"chip-{kind}",
            aria_current="true" if view.kind == kind else None,
        )
        for kind, label, number in [
            ("", "All", recorder.total),
            *((kind, label, recorder.found[kind]) for kind, label in KINDS.items()),
        ]
        if number or kind in ("", view.kind)
    ]
    if not units:
        text = (
            f"Nothing of interest yet: no unit of work has failed, taken {SLOW:g} s, been retried,"
            f" or sent one statement {REPEATED} times."
            if not view.kind
            else f"None of the last {MOST_UNITS} is of this kind."
        )
        return join(_chips(filters), tag("p", text, class_="empty"))
    return join(
        _chips(filters),
        tag("ol", *map(_unit, shown), class_="units"),
        len(units) > len(shown)
        and tag(
            "p",
            tag("a", f"Show all {count(len(units))}", href=view.link(full=True), data_view=""),
            class_="more",
        ),
    )


def _chips(filters: Sequence[Markup]) -> Markup:
    return tag("nav", *filters, class_="chips", aria_label="Kinds of units of work")


def _unit(unit: UnitOfInterest) -> Markup:
    badges = [
        tag("span", KINDS[kind], class_=f"badge {kind}", data_key=kind) for kind in unit.kinds
    ]
    facts = [
        ("outcome", unit.outcome.replace("_", " ")),
        ("mode", unit.mode),
        ("status", unit.status),
        ("attempt", unit.attempt if unit.attempt > 1 else None),
        ("error", unit.error),
        ("held", seconds(unit.held)),
        ("waited", seconds(unit.waited)),
        ("busy", seconds(unit.busy)),
    ]
    summary = tag(
        "summary",
        tag("span", _clock(unit.at), class_="time"),
        tag("span", route_name(unit.route), *badges, class_="what"),
        tag("span", seconds(unit.lasted), class_="age"),
        tag("span", f"{count(unit.count)} statement{'s' * (unit.count != 1)}", class_="sent"),
    )
    details = tag(
        "dl",
        *(
            tag("div", tag("dt", name), tag("dd", value))
            for name, value in facts
            if value is not None
        ),
        class_="facts",
    )
    others = unit.others > 0 and tag("p", f"and {count(unit.others)} more", class_="muted")
    return tag(
        "li",
        tag("details", summary, details, _statements(unit.statements), others),
        data_key=unit.number,
    )


def _statements(statements: Sequence[SentStatement]) -> Markup | None:
    if not statements:
        return None
    rows = [
        tag(
            "tr",
            tag(
                "td",
                tag("code", statement.text),
                statement.is_repeated and tag("span", "N+1", class_="badge repeated"),
                statement.error is not None and tag("span", statement.error, class_="badge failed"),
                role="cell",
            ),
            tag("td", f"{count(statement.times)}×", role="cell", data_label="Sent"),
            tag("td", seconds(statement.seconds), role="cell", data_label="Together"),
            tag("td", seconds(statement.longest), role="cell", data_label="Longest"),
            role="row",
        )
        for statement in statements
    ]
    heads = [
        tag("th", name, scope="col", role="columnheader")
        for name in ("Statement", "Sent", "Together", "Longest")
    ]
    return tag(
        "table",
        tag("thead", tag("tr", *heads, role="row"), role="rowgroup"),
        tag("tbody", *rows, role="rowgroup"),
        class_="statements",
        role="table",
        aria_label="Statements",
    )


def _clock(at: float) -> Markup:
    moment = datetime.fromtimestamp(at, UTC)
    text = f"{moment:%H:%M:%S}"
    if time.time() - at > 12 * 3600:
        text = f"{moment:%Y-%m-%d %H:%M}"
    return tag("time", text, datetime=moment.isoformat(timespec="milliseconds"))


# -- conflicts ---------------------------------------------------------------------------------


def _conflicts(stats: DatabaseStats) -> Markup:
    def by_conflicts(item: tuple[str, RouteStats]) -> tuple[int, str]:
        return -item[1].conflicts, item[0]

    found = sorted(((r, s) for r, s in stats.routes.items() if s.conflicts), key=by_conflicts)
    if not found:
        text = "No transaction has lost against another one."
        return tag("p", text, class_="empty")
    most = found[0][1].conflicts
    return tag(
        "ol",
        *(
            tag(
                "li",
                route_name(route),
                tag(
                    "span", f"{count(s.conflicts)} lost, {count(s.retries)} run again", class_="age"
                ),
                bar([("waiting", s.conflicts / most)], f"{count(s.conflicts)} conflicts"),
                data_key=route,
            )
            for route, s in found[:MOST_UNITS_SHOWN]
        ),
        class_="holders conflicts",
    )
