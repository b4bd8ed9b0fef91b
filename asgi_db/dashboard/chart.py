"""Plots of the last minutes, as SVG that stretches to its place; the labels beside it do not."""

from __future__ import annotations

from collections.abc import Sequence

from asgi_db.dashboard.markup import Markup, count, join, tag

_WIDTH, _HEIGHT = 600, 100
"""The coordinates inside a plot, whatever its size on the page."""


def steps(values: Sequence[float], top: float) -> str:
    """Return the line through values, each of which holds until the next, as the data of a path.

    Where the value is zero there is no line, so that it hides no other one.
    """
    width = _WIDTH / max(len(values), 1)
    parts = list[str]()
    last = 0.0
    for index, value in enumerate([*values, 0.0]):
        if value != last:
            x, y = _round(index * width), _round(_HEIGHT - _HEIGHT * value / top)
            parts.append(f"H{x}V{y}" if last else f"M{x} {_HEIGHT}V{y}")
        last = value
    return "".join(parts)


def _round(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def top_of(*series: Sequence[float]) -> int:
    """Return a round number that is not below any of these values."""
    most = max((max(values, default=0) for values in series), default=0)
    if most <= 4:
        return 4
    unit = 10 ** (len(str(int(most))) - 1)
    steps_up = (1, 1.2, 1.6, 2, 3, 4, 5, 6, 8, 10)
    return int(next(round(unit * step) for step in steps_up if round(unit * step) >= most))


def plot(
    *layers: tuple[str, Sequence[float]], top: int, label: str, limit: float | None = None
) -> Markup:
    """Return a plot of the last five minutes with its axes.

    Args:
        layers: a class for each series, and its values; those at the back come first.
        top: the value at the upper end.
        label: what the plot shows, for those who do not see it.
        limit: a value that is drawn as a line across.
    """
    shapes = list[Markup]()
    for quarter in 1, 2, 3:
        y = _round(_HEIGHT * quarter / 4)
        shapes.append(tag("line", class_="grid", x1=0, x2=_WIDTH, y1=y, y2=y))
    for name, values in layers:
        shapes.append(tag("path", class_=f"curve {name}", d=steps(values, top)))
    if limit is not None:
        y = _round(_HEIGHT - _HEIGHT * limit / top)
        shapes.append(tag("line", class_="limit", x1=0, x2=_WIDTH, y1=y, y2=y))
    drawing = tag(
        "svg",
        *shapes,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
    )
    heights = [count(top * part) if top * part % 1 == 0 else "" for part in (1, 0.75, 0.5, 0.25)]
    ticks = [tag("span", text) for text in (*heights, "0")]
    times = [tag("span", text) for text in ("−5 min", "−4", "−3", "−2", "−1", "now")]
    return tag(
        "div",
        tag("div", *ticks, class_="y", aria_hidden="true"),
        tag("div", drawing, class_="canvas"),
        tag("div", *times, class_="x", aria_hidden="true"),
        class_="plot",
    )


def bar(parts: Sequence[tuple[str, float]], label: str) -> Markup:
    """Return a thin bar that is divided among parts.

    Args:
        parts: a class for each part, and its share of the whole.
        label: what it shows, for those who do not see it.
    """
    shapes = list[Markup]()
    at = 0.0
    for name, share in parts:
        if share > 0:
            width = max(share * 100, 1.5)
            shapes.append(
                tag("rect", class_=name, x=_round(at), y=0, width=_round(width), height=4)
            )
            at += width
    return tag(
        "svg",
        tag("rect", class_="rest", x=0, y=0, width=100, height=4),
        join(*shapes),
        class_="bar",
        viewBox="0 0 100 4",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
    )
