"""The dashboard for Grafana and the rules for Prometheus, beside the metrics that there are."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text

from asgi_db import Database
from asgi_db.prometheus import DatabaseCollector
from asgi_db.statistics import DatabaseStats, PoolStats, ReplicaStats

DOCS = Path(__file__).parents[1] / "docs"
PROGRAM = runpy.run_path(str(DOCS / "monitoring.py"))
SELECTOR = re.compile(r"\b(asgi_db_\w+)(?:\{([^}]*)\})?")


@pytest.mark.parametrize("name", PROGRAM["FILES"])
def test_the_files_are_what_the_program_makes(name: str) -> None:
    made = PROGRAM["FILES"][name]()
    assert (DOCS / "grafana" / name).read_text("utf-8") == made, "run `python docs/monitoring.py`"


def expressions() -> Iterator[str]:
    board: dict[str, Any] = json.loads((DOCS / "grafana" / "asgi-db.json").read_text())
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]
    for variable in board["templating"]["list"][1:]:
        yield variable["query"]["query"]
    for expression in re.findall(r"expr: (.*)", (DOCS / "grafana" / "alerts.yml").read_text()):
        yield json.loads(expression)


class Replicated(Database):
    """A database that has been read from a replica, as far as its statistics go."""

    def stats(self) -> DatabaseStats:
        return replace(super().stats(), replicas=(ReplicaStats("db2", PoolStats(), lag=0.1),))


async def test_each_metric_and_label_that_is_asked_for_is_scraped(sqlite_url: str) -> None:
    async with Replicated(sqlite_url) as database:
        async with database.transaction() as session:
            await session.execute(text("SELECT 1"))
        registry = CollectorRegistry()
        registry.register(DatabaseCollector(database))
        scrape = generate_latest(registry).decode()
    scraped: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(scrape):
        for sample in family.samples:
            scraped.setdefault(sample.name, set()).update(sample.labels)
    asked = {
        (metric, label)
        for expression in expressions()
        for metric, labels in SELECTOR.findall(expression)
        for label in [*re.findall(r"(\w+)=", labels), "database"]
    }
    assert len(asked) > 20
    assert {
        (metric, label) for metric, label in asked if label not in scraped.get(metric, ())
    } == set()
    used = {metric for metric, _ in asked}
    unused = {name.removesuffix("_created") for name in scraped} - used
    shown_in_another_way = ("asgi_db_pool_size", "_sum", "_count")
    for name in unused:
        if not name.endswith(shown_in_another_way):
            assert {f"{name}_total", f"{name}_bucket"} & used, f"no panel shows {name}"


def test_each_expression_is_balanced() -> None:
    for expression in expressions():
        for opening, closing in ("()", "{}", "[]"):
            assert expression.count(opening) == expression.count(closing), expression


def test_panels_do_not_overlap_and_have_numbers_of_their_own() -> None:
    board: dict[str, Any] = json.loads((DOCS / "grafana" / "asgi-db.json").read_text())
    taken = set[tuple[int, int]]()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_a_metric_that_does_not_exist_is_an_error() -> None:
    for make in PROGRAM["counter"], PROGRAM["gauge"], PROGRAM["of_replicas"]:
        with pytest.raises(LookupError):
            make("renamed")
    with pytest.raises(LookupError):
        PROGRAM["histogram"]("renamed", "sum")
