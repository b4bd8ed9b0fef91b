"""The statements that are sent in a block of a test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, overload

from sqlalchemy import Engine, event
from sqlalchemy.engine import ExecutionContext

from asgi_db.drivers import driver_of
from asgi_db.pool.engines import Engines
from asgi_db.pool.life import EngineLife
from asgi_db.trace import without_literals

_EVENTS = ("do_execute", "do_executemany", "do_execute_no_params")
_SAVEPOINTS = ("SAVEPOINT ", "RELEASE SAVEPOINT ", "ROLLBACK TO SAVEPOINT ")


class CapturedStatements(Sequence[str]):
    """The statements that were sent, in their order: `len(statements)`, `statements[0]`.

    A statement is one line without comments and values: a literal is a `?`, and of a long list of
    placeholders only the first is left. BEGIN, COMMIT, ROLLBACK and savepoints are left out. Those
    of all tasks and threads are there.
    """

    def __init__(self) -> None:
        self._sent: list[str] = []

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._sent[index]

    def __len__(self) -> int:
        return len(self._sent)

    @property
    def repeated(self) -> dict[str, int]:
        """The statements that were sent more than once, and how often: of an N+1, the second."""
        return {statement: times for statement, times in self._counts() if times > 1}

    def clear(self) -> None:
        """Forget what was sent until now, such as what a test has written first."""
        self._sent.clear()

    def __repr__(self) -> str:
        # pytest shows the beginning and the end of a long one: what is repeated comes first.
        counts = sorted(self._counts(), key=lambda found: -found[1])
        shown = [f"{times} × {text}" if times > 1 else text for text, times in counts]
        return f"<{self._number}: {'; '.join(shown) or 'none'}>"

    def __str__(self) -> str:
        lines = [f"{f'{times} ×' if times > 1 else '':>5} {text}" for text, times in self._counts()]
        return "\n".join([self._number, *lines])

    @property
    def _number(self) -> str:
        return "1 statement" if len(self) == 1 else f"{len(self)} statements"

    def _counts(self) -> list[tuple[str, int]]:
        return list(Counter(list(self._sent)).items())

    # -- how they come here --------------------------------------------------------------------

    def attach(self, engine: Engine) -> None:
        """Note what is sent through an engine, and through its variants."""
        for name in _EVENTS:
            event.listen(engine, name, self._note)

    def detach(self, engine: Engine) -> None:
        """Note nothing more of an engine."""
        for name in _EVENTS:
            if event.contains(engine, name, self._note):
                event.remove(engine, name, self._note)

    def _note(self, _cursor: Any, statement: str, *rest: Any) -> None:
        context: ExecutionContext = rest[-1]
        # SQLAlchemy's own questions over a first connection are asked outside of any transaction.
        if context.root_connection.in_transaction() and not statement.startswith(_SAVEPOINTS):
            quotes = driver_of(context.dialect).has_double_quoted_strings
            self._sent.append(without_literals(statement, has_double_quoted_strings=quotes))


@contextmanager
def capture(
    all_lives: Callable[[], Iterable[EngineLife]], engines: Engines
) -> Generator[CapturedStatements]:
    """Capture what is sent through engines, and through those that are made meanwhile.

    Args:
        all_lives: returns those that are there, the replicas' too.
        engines: those of the primary.
    """
    captured, statistics = CapturedStatements(), engines.statistics
    for life in (*all_lives(), *engines.others.all()):
        captured.attach(life.engine.sync_engine)
    statistics.new_engine += (captured.attach,)
    try:
        yield captured
    finally:
        kept = (each for each in statistics.new_engine if each != captured.attach)
        statistics.new_engine = tuple(kept)
        for life in (*all_lives(), *engines.others.all()):
            captured.detach(life.engine.sync_engine)
