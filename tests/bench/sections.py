"""The tables, each of one measurement or two."""

from collections.abc import Sequence
from statistics import mean, median

from tests import documents
from tests.bench.cells import between, clients_head, is_early, latency_cell, title
from tests.bench.contests import CLIENTS, FAR_READ, NOTHING, POOLS, READ, READS, WORKERS, WRITE
from tests.bench.memory import STEPS
from tests.bench.samples import Case, Measured, Results
from tests.bench.targets import added, by_hand
from tests.contenders import BARE, DATABASES, FIELD, OURS, Backend, Contender

_ROUTES = {"nothing": "no database", "read": "a read", "write": "a write"}


def hold_time(results: Results) -> str:
    """Reads from afar."""
    text = _contest(results, "hold_time", [FAR_READ])
    trips = [
        f"{measured.facts['round trip']:.2f} ms on {DATABASES[backend]}"
        for backend in DATABASES
        if (measured := results.get(f"hold_time {backend}")) is not None
    ]
    return text and f"{text}\n\nA round trip, as measured: {', '.join(trips)}."


def throughput(results: Results) -> str:
    """Requests with the database at hand."""
    return _contest(results, "throughput", [NOTHING, READ, WRITE])


def _contest(results: Results, name: str, cases: Sequence[Case]) -> str:
    """A table for each database: what each serves, and how many times as much asgi-db does."""
    found = [results[key] for backend in DATABASES if (key := f"{name} {backend}") in results]
    return "\n\n".join(
        _contest_table(results, measured, [case for case in cases if case in measured.cases()])
        for measured in found
    )


def _contest_table(results: Results, measured: Measured, cases: Sequence[Case]) -> str:
    head = [DATABASES[measured.backend]]
    for case in cases:
        head += [_ROUTES[case.route], "asgi-db serves"]
    lines = list[list[str]]()
    for contender in FIELD:
        line = [title(results, contender)]
        for case in cases:
            rate, ratio = measured.rate(contender.name, case), measured.ratio(contender.name, case)
            line.append(f"{rate.median:,.0f}/s" if rate else "")
            is_other = ratio is not None and contender != OURS
            line.append(f"{ratio.median:.2f} × {between(ratio)}" if ratio and is_other else "")
        if any(line[1:]):
            lines.append([*line, _besides(measured, cases, contender)])
    return documents.table([*head, "besides"], lines, range(1, len(head)))


def _besides(measured: Measured, cases: Sequence[Case], contender: Contender) -> str:
    failed = sum(measured.failures(contender.name, case) for case in cases)
    missing = measured.missing(contender.name)
    words = [f"failed: {failed}"] if failed else []
    return "; ".join([*words, *([f"writes sent, but not there: {missing}"] if missing else [])])


def latency(results: Results) -> str:
    """How long a read takes, by clients."""
    measured = results.get("throughput postgresql")
    if measured is None:
        return ""
    lines = list[list[str]]()
    for contender in FIELD:
        cells = [latency_cell(measured.latency(contender.name, case)) for case in READS]
        if any(cells):
            lines.append([title(results, contender), *cells])
    head = ["contender", *map(clients_head, CLIENTS)]
    return documents.table(head, lines, range(1, len(head))) if lines else ""


def round_trips(results: Results) -> str:
    """How often a route waits for the database."""
    backends: list[Backend] = [b for b in DATABASES if f"round_trips {b}" in results]
    routes = ("nothing", "read", "write")
    head = ["contender"]
    head += [f"{DATABASES[backend]}: {_ROUTES[r]}" for backend in backends for r in routes]
    lines = list[list[str]]()
    for contender in FIELD:
        cells = list[str]()
        for backend in backends:
            found = results[f"round_trips {backend}"].facts.get(contender.name, {})
            cells += [f"{found[route]:g}" if found else "" for route in routes]
        if any(cells):
            early = "before the COMMIT" if is_early(results, contender) else "after it"
            lines.append([title(results, contender), *cells, early])
    if not lines:
        return ""
    return documents.table([*head, "a write is answered"], lines, range(1, len(head)))


def held(results: Results) -> str:
    """Connections out of the pool while clients read slowly."""
    measured = results.get("held postgresql")
    if measured is None:
        return ""
    lines = list[list[str]]()
    for contender in FIELD:
        if points := measured.facts.get(contender.name):
            later = [number for seconds, number in points if seconds > 1]
            cells = [f"{mean(later):.2f}", str(max(later))]
            lines.append([title(results, contender), *cells])
    return documents.table(["contender", "on average", "at most"], lines, {1, 2})


def growth(results: Results) -> str:
    """Reads by clients, pools and workers."""
    measured = results.get("growth postgresql")
    if measured is None:
        return ""
    head = ["contender", "workers", "pool", *map(clients_head, CLIENTS), "512 : 64"]
    lines = list[list[str]]()
    for contender in FIELD:
        for workers in WORKERS:
            for pool in POOLS:
                cases = [Case("read", clients, pool, workers) for clients in CLIENTS]
                rates = [measured.rate(contender.name, case) for case in cases]
                cells = list[str]()
                for case, rate in zip(cases, rates, strict=True):
                    latency = latency_cell(measured.latency(contender.name, case))
                    cells.append(f"{rate.median:,.0f}/s; {latency}" if rate else "")
                if rates[-1] is not None and rates[-2] is not None:
                    share = f"{rates[-1].median / (rates[-2].median or 1):.2f}"
                    lines.append([contender.title, str(workers), str(pool), *cells, share])
    return documents.table(head, lines, range(1, len(head)))


def memory(results: Results) -> str:
    """What an open connection costs."""
    measured = results.get("memory postgresql")
    if measured is None:
        return ""
    head = ["kB for each of", *(f"{step:,}" for step in STEPS)]
    lines = list[list[str]]()
    for kind, words in {"socket": "WebSockets", "stream": "streams"}.items():
        for contender in (OURS, BARE):
            found = measured.facts[kind][contender.name]
            cells = [f"{found[str(step)] / 1000:.1f}" for step in STEPS]
            lines.append([f"{words}: {contender.title}", *cells])
    return documents.table(head, lines, range(1, len(head)))


def cpu(results: Results) -> str:
    """What a request costs."""
    measured = results.get("cpu postgresql")
    if measured is None:
        return ""
    head = ["microseconds of CPU", "the bare route", "by hand", "asgi-db", "ratio", "on the clock"]
    lines = list[list[str]]()
    for route, found in measured.facts.items():
        cells = [
            f"{median(s[0] for s in found[name]):.1f}" if name in found else ""
            for name in ("bare", "hand", "asgi_db")
        ]
        if route == "nothing":
            ratios = [f"{added(measured).median:.3f} of what is added", ""]
        else:
            ratios = [f"{by_hand(measured, route, clock).median:.3f}" for clock in (0, 1)]
        lines.append([_ROUTES[route], *cells, *ratios])
    return documents.table(head, lines, range(1, len(head)))


def imports(results: Results) -> str:
    """What the import costs."""
    measured = results.get("imports postgresql")
    if measured is None:
        return ""
    tries = measured.facts["seconds"]
    sqlalchemy, anyio, ours = (median(x) * 1000 for x in zip(*tries, strict=True))
    ratio = median((second + third) / first for first, second, third in tries)
    return (
        f"`import asgi_db` takes {ratio:.2f} of what `import sqlalchemy.ext.asyncio` takes before"
        f" it: {sqlalchemy:.0f} ms, then {anyio:.0f} ms for anyio and {ours:.0f} ms for the rest"
        f" (medians of {len(tries)} runs)."
    )
