"""What is looked at once a second, for as long as a database is being used."""

from __future__ import annotations

import asyncio
import threading

import pytest

from tests.internals import Sampler


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been sampled, at a hundred times the speed."""
    for name, seconds in {"INTERVAL": 0.01, "REST_AFTER": 0.1, "_STALE_AFTER": 0.05}.items():
        monkeypatch.setattr(f"asgi_db.sampling.{name}", seconds)
    return []


@pytest.mark.timing
async def test_it_begins_with_the_first_use_and_rests_after_the_last(taken: list[str]) -> None:
    sampler = Sampler(lambda: taken.append("sample"))
    await asyncio.sleep(0.05)
    assert taken == []
    for _ in range(3):
        sampler.used()
    await asyncio.sleep(0.5)
    assert 3 <= len(taken) <= 12
    count = len(taken)
    await asyncio.sleep(0.1)
    assert len(taken) == count
    sampler.used()
    await asyncio.sleep(0.1)
    assert len(taken) > count


@pytest.mark.timing
def test_it_goes_on_in_another_loop_when_the_first_has_ended(taken: list[str]) -> None:
    sampler = Sampler(lambda: taken.append("sample"))

    async def use(seconds: float) -> None:
        sampler.used()
        await asyncio.sleep(seconds)

    asyncio.run(use(0.0))
    count = len(taken)
    asyncio.run(asyncio.sleep(0.1))
    assert len(taken) == count
    asyncio.run(use(0.1))
    assert len(taken) > count


def test_without_a_loop_nothing_is_sampled(taken: list[str]) -> None:
    thread = threading.Thread(target=Sampler(lambda: taken.append("sample")).used)
    thread.start()
    thread.join()
    assert taken == []
