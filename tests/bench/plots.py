# Not installed where types are checked.
# mypy: ignore-errors
# pyright: basic, reportMissingImports=false, reportOptionalSubscript=false
# pyright: reportOptionalMemberAccess=false, reportGeneralTypeIssues=false

"""The plots: SVG files beside the document, the same for the same measurements."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from tests.bench.contests import CLIENTS, FAR_READ, POOLS, READ, READS, WORKERS, WRITE
from tests.bench.samples import Case, Measured
from tests.contenders import DATABASES, FIELD, LIMIT, OURS, SEED, Contender

Results = Mapping[str, Measured]

OURS_COLOUR, SEED_COLOUR, LIMIT_COLOUR, OTHER_COLOUR = "#c0392b", "#2c3e50", "#7f8c8d", "#9fb8cf"
MARKS = "osD^v<>PX*h"
SHADES = ["#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf", "#ff7f0e"]


def draw(results: Results, folder: Path) -> dict[str, str]:
    """Draw what there is; the result is the paths from the folder's parent, by section."""
    folder.mkdir(parents=True, exist_ok=True)
    mpl.rcParams.update(
        {
            "svg.hashsalt": "asgi-db",
            "svg.fonttype": "none",
            "font.family": ["sans-serif"],
            "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica"],
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
        }
    )
    paths = dict[str, str]()
    for section, plot in PLOTS.items():
        figure = plot(results)
        if figure is not None:
            path = folder / f"{section}.svg"
            figure.savefig(path, metadata={"Date": None}, bbox_inches="tight", facecolor="white")
            path.write_text(re.sub(r"[ \t]+$", "", path.read_text(), flags=re.MULTILINE))
            paths[section] = f"{folder.name}/{path.name}"
    return paths


def plain(title: str) -> str:
    """A title without its Markdown."""
    return re.sub(r"[*`]", "", title)


def colour(contender: Contender) -> str:
    fixed = {OURS: OURS_COLOUR, SEED: SEED_COLOUR, LIMIT: LIMIT_COLOUR}
    others = [one for one in FIELD if one not in fixed]
    return fixed.get(contender) or SHADES[others.index(contender) % len(SHADES)]


def style(contender: Contender) -> dict:
    ours = contender == OURS
    return {
        "color": colour(contender),
        "marker": MARKS[FIELD.index(contender)],
        "markersize": 5,
        "linewidth": 2.8 if ours else 1.2,
        "linestyle": "--" if contender in (SEED, LIMIT) else "-",
        "zorder": 3 if ours else 2,
        "label": plain(contender.title),
    }


def bars(axes: Axes, numbers: dict[Contender, tuple[float, float, float]], title: str) -> None:
    """Horizontal bars with their spread, the first on top."""
    contenders = list(numbers)[::-1]
    for y, contender in enumerate(contenders):
        middle, low, high = numbers[contender]
        is_special = contender in (OURS, SEED, LIMIT)
        axes.barh(y, middle, color=colour(contender) if is_special else OTHER_COLOUR, height=0.72)
        if high > low:
            axes.plot([low, high], [y, y], color="black", linewidth=0.8)
        axes.annotate(f" {middle:,.0f}", (max(middle, high), y), va="center", fontsize=8.5)
    axes.set_yticks(range(len(contenders)), [plain(one.title) for one in contenders])
    for label, contender in zip(axes.get_yticklabels(), contenders, strict=True):
        if contender == OURS:
            label.set(fontweight="bold", color=OURS_COLOUR)
    axes.set_title(title, fontsize=10, loc="left")
    axes.margins(x=0.15)
    axes.grid(axis="x", color="#dddddd")
    axes.tick_params(axis="y", length=0)


def rates(measured: Measured, case: Case) -> dict[Contender, tuple[float, float, float]]:
    found = {contender: measured.rate(contender.name, case) for contender in FIELD}
    return {one: (rate.median, rate.low, rate.high) for one, rate in found.items() if rate}


def contest(results: Results, name: str, cases: dict[str, Case]) -> Figure | None:
    panels = [
        (f"{DATABASES[backend]}: {words}", numbers)
        for backend in DATABASES
        if (measured := results.get(f"{name} {backend}")) is not None
        for words, case in cases.items()
        if (numbers := rates(measured, case))
    ]
    if not panels:
        return None
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    height = 0.6 + 0.27 * max(len(numbers) for _, numbers in panels)
    figure = Figure(figsize=(11, rows * (height + 0.5)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (title, numbers) in zip(grid, panels, strict=False):
        bars(axes, numbers, title)
        axes.set_xlabel("requests per second (median, lowest to highest)")
    for axes in list(grid)[len(panels) :]:
        axes.set_visible(False)
    return figure


def hold_time(results: Results) -> Figure | None:
    return contest(results, "hold_time", {"a read, 1 ms away, pool of 5": FAR_READ})


def throughput(results: Results) -> Figure | None:
    return contest(results, "throughput", {"a read": READ, "a write": WRITE})


def client_axis(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(CLIENTS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FixedFormatter([str(clients) for clients in CLIENTS]))
    axes.set_xlabel("clients at once")
    axes.grid(color="#dddddd")


def latency(results: Results) -> Figure | None:
    measured = results.get("throughput postgresql")
    if measured is None or not all(case in measured.cases() for case in READS):
        return None
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, number, word in zip(panels, (0, 1), ("p50", "p99"), strict=True):
        for contender in FIELD:
            found = by_clients(measured.latency(contender.name, case) for case in READS)
            if found:
                axes.plot(list(found), [one[number] for one in found.values()], **style(contender))
        client_axis(axes)
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_title(f"{word} of a read (PostgreSQL, pool of 10)", fontsize=10, loc="left")
    figure.axes[0].set_ylabel("milliseconds")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def round_trips(results: Results) -> Figure | None:
    panels = [
        (f"{DATABASES[backend]}: {words}", numbers)
        for backend in DATABASES
        if (measured := results.get(f"round_trips {backend}")) is not None
        for route, words in (("read", "a read"), ("write", "a write"))
        if (
            numbers := {
                contender: (found[route],) * 3
                for contender in FIELD
                if (found := measured.facts.get(contender.name))
            }
        )
    ]
    if not panels:
        return None
    rows = -(-len(panels) // 2)
    height = 1.1 + 0.27 * max(len(numbers) for _, numbers in panels)
    figure = Figure(figsize=(11, rows * height), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False).flat
    for axes, (title, numbers) in zip(grid, panels, strict=True):
        bars(axes, numbers, title)
        axes.set_xlabel("round trips")
        axes.xaxis.set_major_locator(FixedLocator(range(8)))
    return figure


def held(results: Results) -> Figure | None:
    measured = results.get("held postgresql")
    if measured is None:
        return None
    contenders = [contender for contender in FIELD if contender.name in measured.facts]
    rows = -(-len(contenders) // 3)
    figure = Figure(figsize=(11, 1.35 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, 3, sharex=True, sharey=True, squeeze=False).flat
    for axes, contender in zip(grid, contenders, strict=False):
        seconds, numbers = zip(*changes(measured.facts[contender.name]), strict=True)
        shade = colour(contender) if contender in (OURS, SEED, LIMIT) else "#4a7ba6"
        axes.fill_between(seconds, numbers, step="post", color=shade, alpha=0.35, linewidth=0)
        axes.step(seconds, numbers, where="post", color=shade, linewidth=1)
        weight = "bold" if contender == OURS else "normal"
        axes.set_title(plain(contender.title), fontsize=9.5, loc="left", fontweight=weight)
        axes.set_ylim(0, 5.4)
        axes.yaxis.set_major_locator(FixedLocator([0, 5]))
        axes.grid(color="#dddddd")
    for axes in list(grid)[len(contenders) :]:
        axes.set_visible(False)
    figure.supxlabel("seconds (the readers come at 0.25 s)", fontsize=10)
    figure.supylabel("connections out of the pool of 5", fontsize=10)
    return figure


def by_clients(found: Iterable[Any]) -> dict[int, Any]:
    """What there is, by the number of clients."""
    return {clients: one for clients, one in zip(CLIENTS, found, strict=True) if one}


def changes(points: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Those of the points at which something changes, and the last."""
    return [
        point
        for n, point in enumerate(points)
        if n in (0, len(points) - 1) or point[1] != points[n - 1][1]
    ]


def growth(results: Results) -> Figure | None:
    measured = results.get("growth postgresql")
    if measured is None:
        return None
    contenders = [
        one
        for one in (OURS, SEED, LIMIT)
        if any(measured.of(one.name, c) for c in measured.cases())
    ]
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    grid = figure.subplots(2, len(contenders), sharex=True, squeeze=False)
    shades = dict(zip(POOLS, ("#e59866", "#c0392b", "#641e16"), strict=True))
    for column, contender in enumerate(contenders):
        upper, lower = grid[0][column], grid[1][column]
        for workers in WORKERS:
            for pool in POOLS:
                cases = [Case("read", clients, pool, workers) for clients in CLIENTS]
                look = {
                    "color": shades[pool],
                    "linestyle": "-" if workers == 1 else "--",
                    "marker": "o" if workers == 1 else "s",
                    "markersize": 4,
                }
                words = f"pool of {pool}, {workers} worker{'s' * (workers > 1)}"
                found = by_clients(measured.rate(contender.name, case) for case in cases)
                times = by_clients(measured.latency(contender.name, case) for case in cases)
                upper.plot(list(found), [x.median for x in found.values()], label=words, **look)
                lower.plot(list(times), [p99 for _, p99 in times.values()], **look)
        for axes in (upper, lower):
            client_axis(axes)
        upper.set_xlabel("")
        upper.set_title(plain(contender.title), fontsize=10, loc="left")
        lower.set_yscale("log")
        lower.yaxis.set_minor_locator(NullLocator())
    lowest = min(axes.get_ylim()[0] for axes in grid[1])
    highest = max(axes.get_ylim()[1] for axes in grid[1])
    for upper, lower in grid.T:
        upper.set_ylim(bottom=0)
        lower.set_ylim(lowest, highest)
    grid[0][0].set_ylabel("reads per second")
    grid[1][0].set_ylabel("p99 in milliseconds")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


PLOTS: dict[str, Callable[[Results], Figure | None]] = {
    "hold_time": hold_time,
    "throughput": throughput,
    "latency": latency,
    "round_trips": round_trips,
    "held": held,
    "growth": growth,
}
"""By the sections of the document."""
