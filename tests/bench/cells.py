"""What stands in the cells of the tables."""

from tests.bench.samples import Results, Spread
from tests.contenders import Contender

EARLY = "†"
"""The mark of who answers before the COMMIT."""


def is_early(results: Results, contender: Contender) -> bool:
    """Whether a contender answers a write before its COMMIT."""
    return any(
        measured.facts.get(contender.name, {}).get("early", False)
        for measured in results.values()
        if measured.name == "round_trips"
    )


def title(results: Results, contender: Contender) -> str:
    """The title of a contender, with its mark."""
    return f"{contender.title} {EARLY}" if is_early(results, contender) else contender.title


def latency_cell(latency: tuple[float, float] | None) -> str:
    """p50 and p99."""
    if latency is None:
        return ""
    return " / ".join(f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in latency)


def clients_head(number: int) -> str:
    """The head of a column for so many clients."""
    return f"{number} client{'s' * (number > 1)}"


def between(found: Spread, form: str = "{:.2f}") -> str:
    """The lowest and the highest."""
    low, high = (form.format(x).removesuffix(" ×") for x in (found.low, found.high))
    return f"({low} to {high})"
