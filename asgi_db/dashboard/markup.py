"""HTML that is put together from parts; what is no part itself is escaped."""

from __future__ import annotations

import html
import math
from typing import Any


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


_VOID = frozenset({"meta", "path", "line", "rect"})


def escape(content: object) -> Markup:
    """Return a part as HTML: as it is if it is HTML already, otherwise escaped."""
    return content if isinstance(content, Markup) else Markup(html.escape(str(content)))


def join(*contents: object) -> Markup:
    """Return parts one after the other; None and False are none."""
    return Markup("".join(escape(part) for part in contents if not _is_missing(part)))


def _is_missing(value: object) -> bool:
    return value is None or value is False


def tag(name: str, *contents: object, **attributes: Any) -> Markup:
    """Return an element.

    Args:
        name: its name.
        contents: what is in it.
        attributes: `class_` is `class`, and `data_key` is `data-key`; one that is None or False is
            left out, one that is True has no value.
    """
    parts = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(key)
        elif not _is_missing(value):
            parts.append(f'{key}="{html.escape(str(value))}"')
    opening = " ".join(parts)
    if name in _VOID:
        return Markup(f"<{opening}/>")
    return Markup(f"<{opening}>{join(*contents)}</{name}>")


# -- numbers -----------------------------------------------------------------------------------


def count(number: float) -> str:
    """Format a number of things: 1,204."""
    return f"{number:,.0f}"


def scrolled(table: Markup, of_what: str) -> Markup:
    """Wrap a table that may be wider than the page, so that it scrolls, by keys too."""
    return tag(
        "div",
        table,
        class_="scroll",
        role="region",
        tabindex="0",
        aria_label=f"Table of the {of_what}, which can be scrolled",
    )


def seconds(value: float | None) -> str:
    """Format a time with two significant digits at least: 4.2 ms, 320 ms, 1.5 s, 3 min."""
    if value is None:
        return "–"
    if value < 0.00005:
        return "0 ms"
    if value < 0.9995:
        thousandths = value * 1000
        return f"{thousandths:.{_decimals(thousandths)}f} ms"
    if value < 99.5:
        return f"{value:.1f} s" if value < 9.95 else f"{value:.0f} s"
    return duration(value)


def _decimals(value: float) -> int:
    return max(0, min(2, 1 - math.floor(math.log10(value))))


def duration(value: float) -> str:
    """Format a longer time in its two greatest units: 3 min, 2 h 5 min, 4 d 1 h."""
    minutes = round(value / 60)
    if minutes < 1:
        return f"{value:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def percent(part: float) -> str:
    """Format a share: 0.4 %, 12 %."""
    value = part * 100
    return f"{value:.1f} %" if 0.05 <= value < 9.95 else f"{value:.0f} %"


def rate(value: float) -> str:
    """Format how often something happens: 0.4, 12."""
    return f"{value:.1f}" if value < 9.95 else f"{value:,.0f}"
