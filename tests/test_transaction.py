"""The stages of a transaction, and what is known of a driver that nobody knows."""

from __future__ import annotations

import itertools

import pytest
from sqlalchemy import make_url

from tests.internals import STAGES, AnyDriver, Stage, Transaction


def at(stage: Stage) -> Transaction:
    transaction = Transaction()
    transaction.stage = stage
    return transaction


def test_the_table_of_stages_names_every_stage() -> None:
    assert set(STAGES) == set(Stage)


@pytest.mark.parametrize(("before", "after"), [*itertools.product(Stage, Stage)])
def test_a_transaction_moves_as_the_table_says_and_no_other_way(
    before: Stage, after: Stage
) -> None:
    transaction = at(before)
    if after in STAGES[before]:
        transaction.move(after)
        assert repr(transaction) == f"<Transaction {after.name}>"
    else:
        with pytest.raises(RuntimeError, match=f"from {before.name} to {after.name}"):
            transaction.move(after)
        assert repr(transaction) == f"<Transaction {before.name}>"


@pytest.mark.parametrize("stage", Stage)
def test_the_end_of_a_transaction_changes_nothing_that_a_commit_has_decided(stage: Stage) -> None:
    ended, failed = at(stage), at(stage)
    ended.end()
    failed.fail()
    assert ended.stage is (Stage.ROLLED_BACK if stage in (Stage.OPEN, Stage.KEPT) else stage)
    assert failed.stage is (stage if stage is Stage.COMMITTED else Stage.FAILED)
    assert not failed.is_open


@pytest.mark.parametrize("stage", Stage)
def test_only_the_commit_of_the_session_itself_is_sent(stage: Stage) -> None:
    sent = list[str]()
    transaction = at(stage)
    transaction.when_sent = lambda: sent.append("sent")
    transaction.commit_is_sent()
    is_commit = stage in (Stage.COMMITTING, Stage.SENT)
    assert transaction.commit_was_sent == is_commit
    assert sent == (["sent"] if is_commit else [])


async def test_of_an_unknown_driver_nothing_is_claimed() -> None:
    driver, url, error = AnyDriver(), make_url("sqlite://"), ValueError()
    assert driver.options(url, pooler=True) == {}
    assert driver.connect_errors == (OSError,)
    assert not driver.is_in_memory(url)
    assert not driver.is_closed(object())
    assert not (driver.is_own_error(error) or driver.is_conflict(error) or driver.is_outage(error))
    assert driver.code(error) is driver.advice(error) is None
    assert driver.id_at_server(object()) is None
    assert driver.interrupt(object()) is None
    with pytest.raises(NotImplementedError):
        driver.connect()
