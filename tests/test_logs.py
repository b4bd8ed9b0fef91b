"""The library's log: what it writes, and that no handler of it harms anybody."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.internals import logger


class Faulty(logging.Handler):
    """Fails at each line, without Python's own safety net, `Handler.handleError`."""

    def emit(self, record: logging.LogRecord) -> None:
        raise LookupError("a handler's own fault")


@pytest.fixture
def faulty_handler() -> Iterator[None]:
    handler = Faulty()
    logging.getLogger("asgi_db").addHandler(handler)
    yield
    logging.getLogger("asgi_db").removeHandler(handler)


def test_a_line_names_the_place_that_wrote_it(caplog: pytest.LogCaptureFixture) -> None:
    logger.warning("%s is slow", "it")
    try:
        raise LookupError
    except LookupError:
        logger.exception("it has failed")
    assert [record.getMessage() for record in caplog.records] == ["it is slow", "it has failed"]
    for record in caplog.records:
        assert (record.name, record.filename) == ("asgi_db", "test_logs.py")
        assert record.funcName == "test_a_line_names_the_place_that_wrote_it"
    assert caplog.records[1].exc_info is not None


@pytest.mark.usefixtures("faulty_handler")
def test_a_handler_that_raises_is_named_on_stderr_and_raises_nowhere(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger.warning("a line")
    assert "a handler's own fault" in capsys.readouterr().err


@pytest.mark.usefixtures("faulty_handler")
def test_where_logging_is_to_be_silent_about_itself_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    logger.warning("a line")
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("faulty_handler")
def test_a_closed_stderr_raises_nowhere_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    logger.warning("a line")
