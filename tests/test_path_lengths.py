"""How far a request has to travel through our own code: see `tests/tracing.py`."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

import asgi_db
from tests.servers import run
from tests.tracing import Path, paths

BOUNDS = {
    "a read_only read": (75, 58, 34),
    "a transactional write": (95, 75, 50),
    # While a dashboard watches; without one nothing of it is called. What is slow is kept, too, and
    # on a busy machine everything is.
    "a watched read": (112, 83, 56),
    "a watched write": (136, 101, 74),
}
"""At most so many calls, hops between files, and hops back into a file already visited."""

OF_REPLICAS = "/replicas/", "replication.py", "/asgi/positions.py", "/unit/rerouting.py"


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, Path]]:
    with pytest.MonkeyPatch.context() as patch:
        # Where a mode with `retries=` exists, as in other tests, every request is prepared for it.
        patch.setattr("asgi_db.asgi.middleware.retrying", set[int]())
        yield run(paths())


def test_the_path_that_is_measured_is_whole(found: dict[str, Path]) -> None:
    """Also what SQLAlchemy calls back in its greenlet is seen, and what comes after it."""
    for path in found.values():
        functions = [function for _, _, function in path.steps]
        assert functions[0] == "DBSessionMiddleware.__call__"
        assert any(file.endswith("fair_pool.py") or "/pool/" in file for _, file, _ in path.steps)
        assert path.files > 5


def test_without_a_dashboard_nothing_of_it_is_called(found: dict[str, Path]) -> None:
    for what, path in found.items():
        files = {file for _, file, _ in path.steps}
        of_it = {file for file in files if "/dashboard/" in file or file.endswith("/trace.py")}
        assert bool(of_it) == ("watched" in what), of_it


def test_without_replicas_nothing_of_them_is_called(found: dict[str, Path]) -> None:
    folder = pathlib.Path(asgi_db.__file__).parent
    files = {str(file.relative_to(folder.parent)) for file in folder.glob("**/*.py")}
    of_them = {file for file in files if any(word in file for word in OF_REPLICAS)}
    assert len(of_them) > 10
    for path in found.values():
        assert not of_them & {file for _, file, _ in path.steps}


@pytest.mark.parametrize("what", BOUNDS)
def test_a_request_takes_no_longer_way_than_it_need(found: dict[str, Path], what: str) -> None:
    calls, hops, back = BOUNDS[what]
    path = found[what]
    assert path.calls <= calls, path.summary
    assert path.hops <= hops, path.summary
    assert path.back <= back, path.summary
