"""The harness of `make bench`: what it reads, what it makes of it, and its network."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench import count, load, report
from tests.bench.contests import FAR_READ, READ, WRITE
from tests.bench.load import Load
from tests.bench.proxy import Proxy
from tests.bench.samples import Case, Measured, Sample, Spread, merge
from tests.bench.targets import added, best_public, by_hand, targets
from tests.contenders import CONTENDERS, FIELD, OURS, SEED, Contender

OUTPUT = """Running 1s test @ http://127.0.0.1:1/items/1
  1 threads and 64 connections
{"answers": 900, "refused": 30, "broken": 2, "late": 1, "issued": 7, \
"microseconds": 2000000, "p50": 1500, "p99": 20250}
"""

TOOLSETS = next(contender for contender in CONTENDERS if contender.name == "fastapi_toolsets")


def answers(rate: float, *, refused: int = 0) -> Load:
    return Load(int(rate * 2) + refused, refused, 0, 0, 0, 2.0, 1.0, 2.0)


def measured(
    case: Case, rates: dict[Contender, list[float]], name: str = "hold_time", refused: int = 0
) -> Measured:
    samples = [
        Sample(name, "postgresql", contender.name, case, n, answers(rate, refused=refused))
        for contender, found in rates.items()
        for n, rate in enumerate(found)
    ]
    return Measured(name, "postgresql", seed=1, samples=samples)


def test_only_good_answers_count() -> None:
    found = load.parse(OUTPUT)
    assert found == Load(900, 30, 2, 1, 7, 2.0, 1.5, 20.25)
    assert found.rate == 435
    assert found.failures == 33


def test_a_ratio_is_taken_turn_by_turn() -> None:
    """A machine that gets slower in the middle makes rates fall, but no ratio."""
    found = measured(FAR_READ, {OURS: [400, 200, 420], SEED: [100, 50, 100]})
    assert found.ratio(SEED.name, FAR_READ) == Spread(4.0, 4.0, 4.2)
    assert found.rate(SEED.name, FAR_READ) == Spread(100, 50, 100)
    assert found.ratio(TOOLSETS.name, FAR_READ) is None
    assert found.ratio(SEED.name, READ) is None


def test_a_contender_that_serves_nothing_has_no_ratio() -> None:
    found = measured(FAR_READ, {OURS: [400], SEED: [0]})
    assert found.ratio(SEED.name, FAR_READ) is None


def test_the_best_library_is_one_that_can_be_installed() -> None:
    other = CONTENDERS[2]
    found = measured(FAR_READ, {OURS: [400], FIELD[-1]: [900], TOOLSETS: [120], other: [110]})
    assert best_public(found) == TOOLSETS


def test_targets_say_whether_they_are_reached() -> None:
    found = measured(FAR_READ, {OURS: [400, 404], SEED: [100, 100], TOOLSETS: [200, 200]})
    seed, best = targets({found.key: found}).splitlines()[2:]
    assert "4.02 ×" in seed
    assert seed.endswith("| yes |")
    assert "the best library (fastapi-toolsets)" in best
    assert best.endswith("| no |")


def test_what_fails_is_shown() -> None:
    found = measured(WRITE, {OURS: [400], SEED: [100]}, "throughput", refused=3)
    found.samples.append(Sample("throughput", "postgresql", SEED.name, WRITE, 1, answers(9), 2))
    assert report.failures(found, OURS.name) == 3
    assert report.failures(found, SEED.name) == 5
    ours, seed = report.tables({found.key: found}).splitlines()[-2:]
    assert ours.endswith("| failed: 3 |")
    assert seed.endswith("| failed: 3; writes sent, but not there: 2 |")


def test_who_answers_before_the_commit_is_marked() -> None:
    traffic = Measured("round_trips", "postgresql", 1)
    traffic.facts[SEED.name] = {"nothing": 0, "read": 6, "write": 6, "early": True}
    found = measured(FAR_READ, {OURS: [400], SEED: [100]})
    found.facts["round trip"] = 2.1
    text = report.tables({traffic.key: traffic, found.key: found})
    assert f"| {SEED.title} † |" in text
    assert "before the COMMIT" in text
    assert f"{OURS.title} †" not in text


def test_the_page_goes_between_the_markers(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write(document, "new")
    assert document.read_text() == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"


def test_the_last_of_each_measurement_is_kept(tmp_path: Path) -> None:
    saved = tmp_path / "new" / "bench.json"
    old, other = measured(FAR_READ, {OURS: [1]}), measured(READ, {OURS: [2]}, "throughput")
    new = measured(FAR_READ, {OURS: [3]})
    merge(saved, [old, other])
    found = merge(saved, [new])
    assert found == {new.key: new, other.key: other}
    assert merge(saved, []) == found


def test_what_the_middleware_adds_is_measured_against_a_session_by_hand() -> None:
    found = Measured("cpu", "postgresql", 1)
    found.facts["nothing"] = {"bare": [[10, 10]], "hand": [[50, 50]], "asgi_db": [[14, 14]]}
    found.facts["read"] = {"hand": [[100, 200]], "asgi_db": [[101, 204]]}
    assert added(found).median == 0.1
    assert by_hand(found, "read", 0).median == 1.01
    assert by_hand(found, "read", 1).median == 1.02


def test_every_contender_has_a_name_of_its_own() -> None:
    assert len({contender.name for contender in FIELD}) == len(FIELD)
    assert set(CONTENDERS) < set(FIELD)


@pytest.fixture
def echo_port() -> Iterator[int]:
    """A server which sends everything back."""

    def serve(listening: socket.socket) -> None:
        client, _ = listening.accept()
        with client:
            while data := client.recv(65536):
                client.sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        yield listening.getsockname()[1]
        thread.join(10)


@pytest.mark.timing
def test_what_is_far_away_comes_late_but_in_order(echo_port: int) -> None:
    """Ten messages at once take one delay each way, not ten."""
    proxy = Proxy(echo_port, 0.05)
    threading.Thread(target=proxy.run, daemon=True).start()
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client:
        began = time.monotonic()
        for n in range(10):
            client.sendall(b"%d" % n)
            time.sleep(0.001)
        client.shutdown(socket.SHUT_WR)
        received = b""
        while data := client.recv(65536):
            received += data
        seconds = time.monotonic() - began
    assert received == b"0123456789"
    assert 0.1 <= seconds < 0.5


def test_instructions_are_compared_without_those_of_the_bare_route() -> None:
    counts = {
        "nothing": {"bare": 50_000.0, "hand": 250_000.0, "asgi_db": 70_000.0},
        "read": {"hand": 1_000_000.0, "asgi_db": 900_000.0},
    }
    cells = [line.strip("| ").split("|") for line in count.table("sqlite", counts).splitlines()]
    assert [cell.strip() for cell in cells[2]] == [
        "no statement",
        "250",
        "70",
        "0.10 of what is added",
    ]
    assert [cell.strip() for cell in cells[3]] == ["`read_only`, one read", "1,000", "900", "0.90"]


def test_a_count_without_a_total_is_no_count(tmp_path: Path) -> None:
    (tmp_path / "1").write_text("events: Ir\nsummary: 42\n")
    (tmp_path / "2").write_text("events: Ir\n")
    assert count.total_of(tmp_path / "1") == 42
    with pytest.raises(RuntimeError, match="no total into 2"):
        count.total_of(tmp_path / "2")
