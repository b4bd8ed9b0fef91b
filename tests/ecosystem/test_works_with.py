"""The page `docs/works-with.md` tells of what is installed here, and of nothing else."""

from __future__ import annotations

import datetime

import pytest

from tests.ecosystem.page import DATE, GROUPS, Section, file_of, release

HERE = Section(release())


def test_the_page_has_the_versions_that_are_installed(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--write-page"):
        pytest.skip("the page is written at the end of this run")
    shown = HERE.shown()
    [date] = DATE.findall(shown)
    assert datetime.date.fromisoformat(date) <= datetime.datetime.now(datetime.UTC).date()
    assert shown.strip() == HERE.written(date).strip(), "`make ecosystem ARGS=--write-page`"


def test_each_library_has_a_test_and_each_test_a_library() -> None:
    named = {file_of(name) for each in GROUPS for name in Section(each).libraries}
    here = set(file_of("x").parent.glob("test_*.py")) - {file_of("works-with")}
    assert named == here
