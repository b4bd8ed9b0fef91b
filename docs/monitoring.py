"""Makes the dashboard for Grafana and the rules for Prometheus: `python docs/monitoring.py`.

The names of the metrics are those of `asgi_db.prometheus`, so that a metric that is renamed there
is renamed here, or is an error. A test compares the files with what this program makes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from asgi_db.prometheus import (
    CONNECTIONS,
    COUNTERS,
    GAUGES,
    HISTOGRAMS,
    READS_ON_PRIMARY,
    READS_ON_PRIMARY_TEXT,
    REPLICA_COUNTERS,
    REPLICA_GAUGES,
    UNITS,
)

FOLDER = Path(__file__).parent / "grafana"

_OF = 'database=~"$database"'
_OF_ROUTE = f'{_OF},route=~"$route"'
_RATE = "$__rate_interval"


def counter(name: str) -> str:
    """Return the name of a counter as Prometheus has it."""
    return f"asgi_db_{name}_total" if name in COUNTERS else _unknown(name)


def gauge(name: str) -> str:
    """Return the name of a gauge of the pool."""
    return f"asgi_db_pool_{name}" if name in GAUGES else _unknown(name)


def histogram(name: str, part: str) -> str:
    """Return the name of a part of a histogram: bucket, sum or count."""
    return f"asgi_db_{name}_seconds_{part}" if name in HISTOGRAMS else _unknown(name)


def of_replicas(name: str) -> str:
    """Return the name of a counter or a gauge of the replicas."""
    if name in REPLICA_COUNTERS:
        return f"asgi_db_replica_{name}_total"
    return f"asgi_db_replica_{name}" if name in REPLICA_GAUGES else _unknown(name)


def _unknown(name: str) -> str:
    raise LookupError(f"asgi_db.prometheus has no metric {name!r}")


def rate(metric: str, labels: str, by: str, window: str = _RATE) -> str:
    """Return how often something happens in a second, for each value of a label."""
    return f"sum by ({by}) (rate({metric}{{{labels}}}[{window}]))"


def percentile(name: str, part: float, by: str, labels: str, window: str = _RATE) -> str:
    """Return a percentile of a histogram, for each value of a label."""
    buckets = rate(histogram(name, "bucket"), labels, f"le, {by}", window)
    return f"histogram_quantile({part}, {buckets})"


# -- Grafana -----------------------------------------------------------------------------------


class Board:
    """The panels, placed from left to right and from top to bottom on a grid of 24 columns."""

    def __init__(self) -> None:
        self.panels = list[dict[str, Any]]()
        self._x = self._y = self._height = 0

    def _place(self, panel: dict[str, Any], width: int, height: int) -> None:
        if self._x + width > 24:
            self._x, self._y, self._height = 0, self._y + self._height, 0
        position = {"x": self._x, "y": self._y, "w": width, "h": height}
        self.panels.append({"id": len(self.panels) + 1, "gridPos": position, **panel})
        self._x, self._height = self._x + width, max(self._height, height)

    def row(self, title: str) -> None:
        """Begin a row."""
        self._place({"type": "row", "title": title, "collapsed": False, "panels": []}, 24, 1)

    def panel(
        self,
        title: str,
        description: str,
        *queries: tuple[str, str],
        kind: str = "timeseries",
        unit: str = "short",
        width: int = 12,
        limits: Sequence[float] = (),
    ) -> None:
        """Add a panel.

        Args:
            title: its title.
            description: what it shows, and what to do about it.
            queries: each with its legend.
            kind: the type of the panel.
            unit: as Grafana names units.
            width: in columns.
            limits: where its color changes, to orange and to red.
        """
        colors = zip(("green", "orange", "red"), (None, *limits), strict=False)
        instant = kind != "timeseries"
        panel: dict[str, Any] = {
            "type": kind,
            "title": title,
            "description": description,
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "targets": [
                {
                    "refId": "ABCDEFGH"[number],
                    "expr": query,
                    "legendFormat": legend,
                    "instant": instant,
                    "range": not instant,
                }
                for number, (query, legend) in enumerate(queries)
            ],
            "fieldConfig": {
                "defaults": {
                    "unit": unit,
                    "min": 0,
                    "thresholds": {
                        "mode": "absolute",
                        "steps": [{"color": color, "value": value} for color, value in colors],
                    },
                    **({} if instant else {"custom": {"fillOpacity": 12, "showPoints": "never"}}),
                },
                "overrides": [],
            },
            "options": _OPTIONS[kind],
        }
        self._place(panel, width, 4 if kind == "stat" else 8)


_OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "graphMode": "area",
        "colorMode": "value",
        "reduceOptions": {"calcs": ["lastNotNull"]},
    },
    "bargauge": {"orientation": "horizontal", "reduceOptions": {"calcs": ["lastNotNull"]}},
}


def _panels() -> list[dict[str, Any]]:
    used, idle = (f'{CONNECTIONS}{{{_OF},state="{state}"}}' for state in ("used", "idle"))
    limit = f"{gauge('limit')}{{{_OF}}}"
    waiting = f"{gauge('waiting')}{{{_OF}}}"
    failed = rate(UNITS + "_total", f'{_OF_ROUTE},outcome="failed"', "database")
    units = rate(UNITS + "_total", _OF_ROUTE, "database")
    board = Board()
    board.row("Now")
    board.panel(
        "Pool in use",
        "Connections in use, of all that there may be, in the fullest pool. At 1 requests wait.",
        (f"max(sum by (database) ({used}) / sum by (database) ({limit}))", ""),
        kind="stat",
        unit="percentunit",
        width=6,
        limits=(0.8, 1),
    )
    board.panel(
        "Waiting",
        "Tasks that wait for a connection.",
        (f"sum({waiting})", ""),
        kind="stat",
        width=6,
        limits=(1, 10),
    )
    board.panel(
        "Units of work",
        "Units of work that end in a second.",
        (f"sum({units})", ""),
        kind="stat",
        unit="ops",
        width=6,
    )
    board.panel(
        "Failed COMMITs",
        "Of all units of work, those whose COMMIT failed or was not answered.",
        (f"sum({failed}) / sum({units})", ""),
        kind="stat",
        unit="percentunit",
        width=6,
        limits=(0.001, 0.01),
    )
    board.row("The pool")
    board.panel(
        "Connections",
        "If the connections in use touch the limit and tasks wait, see which routes hold them.",
        (f"sum by (database) ({used})", "{{database}} in use"),
        (f"sum by (database) ({idle})", "{{database}} idle"),
        (f"sum by (database) ({waiting})", "{{database}} waiting"),
        (f"sum by (database) ({limit})", "{{database}} limit"),
    )
    board.panel(
        "Connections in use on average, by route",
        "The seconds for which a route holds connections, in each second.",
        (f"topk(10, {rate(histogram('held', 'sum'), _OF_ROUTE, 'route')})", "{{route}}"),
    )
    board.panel(
        "No connection in time",
        "Requests that were refused because no connection became free within pool_timeout.",
        (rate(counter("timeouts"), _OF_ROUTE, "route"), "{{route}}"),
        unit="ops",
    )
    board.panel(
        "Connections taken",
        "How often a connection was taken from the pool.",
        (rate(counter("connections"), _OF_ROUTE, "route"), "{{route}}"),
        unit="ops",
    )
    board.row("For how long")
    for part in 0.5, 0.95, 0.99:
        for name, title in (("held", "Hold"), ("waited", "Wait"), ("busy", "Busy")):
            board.panel(
                f"{title}, p{part * 100:g}",
                HISTOGRAMS[name][1],
                (percentile(name, part, "route", _OF_ROUTE), "{{route}}"),
                unit="s",
                width=8,
            )
    board.row("Units of work")
    board.panel(
        "Units by outcome",
        "none: read_only has no transaction to end.",
        (rate(UNITS + "_total", _OF_ROUTE, "outcome"), "{{outcome}}"),
        unit="ops",
    )
    board.panel(
        "Statements for each unit",
        "Many are a sign of N+1.",
        (
            f"{rate(counter('statements'), _OF_ROUTE, 'route')}"
            f" / {rate(UNITS + '_total', _OF_ROUTE, 'route')}",
            "{{route}}",
        ),
    )
    board.panel(
        "Conflicts",
        COUNTERS["conflicts"],
        (rate(counter("conflicts"), _OF_ROUTE, "route"), "{{route}}"),
        unit="ops",
    )
    board.panel(
        "Retries",
        COUNTERS["retries"],
        (rate(counter("retries"), _OF_ROUTE, "route"), "{{route}}"),
        unit="ops",
    )
    _add_replicas(board)
    return board.panels


def _add_replicas(board: Board) -> None:
    """Add what is empty for a database without replicas."""
    board.row("Replicas")
    board.panel(
        "Reads by server",
        f"Units of work on each replica, beside: {READS_ON_PRIMARY_TEXT}",
        (rate(of_replicas("units"), _OF, "replica"), "{{replica}}"),
        (rate(READS_ON_PRIMARY + "_total", _OF, "database"), "{{database}} (primary)"),
        unit="ops",
    )
    board.panel(
        "Not far enough",
        REPLICA_COUNTERS["behind"],
        (rate(of_replicas("behind"), _OF, "replica"), "{{replica}}"),
        unit="ops",
    )
    for name, title, unit in ("lag_seconds", "Lag", "s"), ("down", "Down", "short"):
        board.panel(
            title,
            REPLICA_GAUGES[name],
            (f"max by (replica) ({of_replicas(name)}{{{_OF}}})", "{{replica}}"),
            unit=unit,
        )


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def dashboard() -> str:
    """Return the dashboard, to be imported into Grafana."""
    units = UNITS + "_total"
    routes = f'label_values({units}{{database=~"$database"}}, route)'
    board = {
        "title": "asgi-db",
        "uid": "asgi-db",
        "tags": ["asgi-db", "sqlalchemy"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                _variable("database", f"label_values({CONNECTIONS}, database)"),
                _variable("route", routes),
            ]
        },
        "panels": _panels(),
    }
    return json.dumps(board, indent=1) + "\n"


# -- Prometheus --------------------------------------------------------------------------------


def _alerts() -> Iterable[tuple[str, str, str, str, str]]:
    """The rules: name, expression, duration, severity, and what to do."""
    used = f'sum by (database, instance) ({CONNECTIONS}{{state="used"}})'
    limit, waiting = (
        f"sum by (database, instance) ({gauge(name)})" for name in ("limit", "waiting")
    )
    units, failed = (
        rate(UNITS + "_total", labels, "database, route", "5m")
        for labels in ("", 'outcome="failed"')
    )
    yield (
        "AsgiDbPoolExhausted",
        f"{waiting} > 0 and {used} >= {limit}",
        "2m",
        "critical",
        "Requests wait for a connection: see which routes hold them, and for how long.",
    )
    yield (
        "AsgiDbPoolNearlyExhausted",
        f"{used} / {limit} > 0.8",
        "10m",
        "warning",
        "More than 80 % of the connections are in use.",
    )
    yield (
        "AsgiDbNoConnectionInTime",
        f"sum by (database, route) (increase({counter('timeouts')}[5m])) > 0",
        "0m",
        "critical",
        "Requests were refused with 503 because no connection became free within pool_timeout.",
    )
    yield (
        "AsgiDbCommitsFail",
        f"{failed} / {units} > 0.01",
        "5m",
        "critical",
        "The COMMIT of more than 1 % of the units of work fails: see the log of asgi_db.",
    )
    yield (
        "AsgiDbConflicts",
        f"{rate(counter('conflicts'), '', 'database, route', '5m')} / {units} > 0.1",
        "10m",
        "warning",
        "More than 10 % of the units of work lose against another transaction.",
    )
    yield (
        "AsgiDbSlowWait",
        f"{percentile('waited', 0.95, 'database, route', '', '5m')} > 0.5",
        "10m",
        "warning",
        "One request in twenty waits for more than half a second until it has a connection.",
    )
    yield (
        "AsgiDbLongHold",
        f"{percentile('held', 0.95, 'database, route', '', '5m')} > 1",
        "10m",
        "warning",
        "One request in twenty holds a connection for more than a second.",
    )
    yield (
        "AsgiDbReplicaDown",
        f"max by (database, replica) ({of_replicas('down')}) > 0",
        "5m",
        "warning",
        "A replica cannot be used, so others and the primary have its reads.",
    )
    by_replicas, by_primary = (
        f"sum by (database) (rate({metric}[5m]))"
        for metric in (of_replicas("units"), READS_ON_PRIMARY + "_total")
    )
    yield (
        "AsgiDbAllReadsOnPrimary",
        f"{by_primary} > 0 and {by_replicas} == 0",
        "5m",
        "warning",
        "The primary serves all reads: its replicas are down, or have not come far enough.",
    )


def rules() -> str:
    """Return the rules file."""
    lines = ["groups:", "  - name: asgi-db", "    rules:"]
    for name, expression, duration, severity, text in _alerts():
        whose = "replica" if "replica)" in expression else "route"
        lines += [
            f"      - alert: {name}",
            f"        expr: {json.dumps(expression)}",
            f"        for: {duration}",
            "        labels:",
            f"          severity: {severity}",
            "        annotations:",
            f'          summary: "{{{{ $labels.database }}}} {{{{ $labels.{whose} }}}}: {text}"',
        ]
    return "\n".join(lines) + "\n"


FILES = {"asgi-db.json": dashboard, "alerts.yml": rules}


def main() -> None:
    """Write both files."""
    FOLDER.mkdir(exist_ok=True)
    for name, make in FILES.items():
        (FOLDER / name).write_text(make(), "utf-8")


if __name__ == "__main__":
    main()
