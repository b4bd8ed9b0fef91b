"""The harness of `make chaos`: that it runs, and that it sees what it is there to see."""

import sys
from pathlib import Path

import pytest

from tests.chaos import report
from tests.chaos.client import CUT_OFF, TOO_LATE, Answer
from tests.chaos.report import Row
from tests.chaos.runner import Job, run
from tests.chaos.world import Ledger, Outcome
from tests.contenders import OURS
from tests.servers import outside

UNKNOWN = Answer(503, {"retry-after": "1"}, b'{"reason": "outcome-unknown"}')


@pytest.fixture
async def items_url(sqlite_url: str) -> str:
    async with outside(sqlite_url) as connection:
        await connection.execute("CREATE TABLE items (id BIGINT PRIMARY KEY)")
    return sqlite_url


async def put(url: str, *ids: int) -> None:
    async with outside(url) as connection:
        for id in ids:
            await connection.execute(f"INSERT INTO items VALUES ({id})")


def test_a_restart_of_the_database_is_survived() -> None:
    job = Job(OURS, "postgresql", ("restart",), sys.executable, seed=1, scale=0.1)
    (row,) = run(job)
    assert row.outcome.tries == 2
    assert row.outcome.is_clean, row


@pytest.mark.parametrize(
    ("told", "is_there", "remark"),
    [
        (Answer(201), False, "acknowledged, but missing: 1"),
        (Answer(500), True, "refused, but there: 1"),
        (Answer(503, {"retry-after": "1"}, b"{}"), True, "refused, but there: 1"),
    ],
)
async def test_a_wrong_answer_is_seen(
    items_url: str, told: Answer, is_there: bool, remark: str
) -> None:
    ledger, outcome = Ledger(), Outcome()
    id = ledger.new_id()
    ledger.answers[id] = told
    await put(items_url, *[id] * is_there)
    await ledger.settle(items_url, outcome)
    assert outcome.lost == 1
    assert outcome.remarks == [remark]


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("told", [None, CUT_OFF, TOO_LATE, UNKNOWN])
async def test_no_answer_is_no_wrong_answer(
    items_url: str, told: Answer | None, is_there: bool
) -> None:
    ledger, outcome = Ledger(), Outcome()
    id = ledger.new_id()
    ledger.answers[id] = told
    await put(items_url, *[id] * is_there)
    await ledger.settle(items_url, outcome)
    assert outcome.lost == 0


async def test_half_a_pair_is_seen(items_url: str) -> None:
    ledger, outcome = Ledger(), Outcome()
    half, whole, none = (ledger.new_id(pair=True) for _ in range(3))
    await put(items_url, half, whole, -whole)
    await ledger.settle(items_url, outcome)
    assert none not in (half, whole)
    assert outcome.lost == 1
    assert outcome.remarks == ["half written: 1"]


@pytest.mark.parametrize(
    ("answer", "errors"),
    [
        (Answer(201), {}),
        (Answer(503, {"retry-after": "2"}), {}),
        (Answer(503), {"503 without Retry-After": 1}),
        (Answer(500), {"500": 1}),
        (CUT_OFF, {"no answer": 1}),
        (TOO_LATE, {"too late": 1}),
    ],
)
def test_only_success_and_try_again_are_no_errors(answer: Answer, errors: dict[str, int]) -> None:
    outcome = Outcome()
    outcome.note(answer)
    assert outcome.errors == errors
    assert outcome.is_clean is (not errors)


def test_what_the_server_loses_is_no_fault_of_the_contender() -> None:
    assert not Outcome(tries=1, survived=1, lost=3).is_clean
    assert Outcome(tries=1, survived=1, lost=3, server_loses=True).is_clean
    assert not Outcome(tries=1, survived=1, leaked=1, server_loses=True).is_clean


def test_a_client_sends_its_cookie_back() -> None:
    answer = Answer(201, {"set-cookie": "asgi-db-db=5f:17; Max-Age=30; Path=/; HttpOnly"})
    assert answer.cookies == ["Cookie: asgi-db-db=5f:17"]
    assert Answer(201).cookies == []


def test_the_table_goes_between_the_markers(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    outcome = Outcome(tries=3, survived=2, lost=1)
    text = report.table([Row("slow_readers", OURS, "mysql", outcome)])
    report.write(document, text)
    assert document.read_text().startswith(f"before\n{report.BEGIN}\n\n| scenario ")
    assert document.read_text().endswith(f"|  |\n\n{report.END}\nafter\n")
    assert "| slow readers | **asgi-db** | MariaDB  |     3 |        2 |    1 |      0 |" in text


def test_the_last_row_of_each_kind_is_kept(tmp_path: Path) -> None:
    def row(scenario: str, tries: int) -> Row:
        outcome = Outcome(tries=tries)
        outcome.note(Answer(500))
        return Row(scenario, OURS, "mysql", outcome)

    saved = tmp_path / "new" / "rows.json"
    report.merge(saved, [row("restart", 1), row("frozen", 2)])
    merged = report.merge(saved, [row("restart", 3)])
    assert merged == [row("restart", 3), row("frozen", 2)]
    assert report.merge(saved, []) == merged
    assert merged[0].cells()[-1] == "1 × 500"
