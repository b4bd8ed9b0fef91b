"""The contests: the same load on each contender by turns, and who serves how much."""

from collections.abc import Sequence

from tests.bench.course import Course
from tests.bench.field import Entrant, distance, field, round_trip
from tests.bench.load import Load, drive
from tests.bench.samples import Case, Measured, Sample
from tests.contenders import LIMIT, OURS, SEED

DELAY = 0.001
"""Seconds to the database, each way, where hold time is measured."""

CLIENTS = [1, 8, 64, 512]
POOLS = [5, 10, 20]
WORKERS = [1, 2]
NOTHING, READ, WRITE = (Case(route, 64, 10) for route in ("nothing", "read", "write"))
FAR_READ = Case("read", 64, 5)
READS = [Case("read", clients, 10) for clients in CLIENTS]

_PATHS = {"nothing": "/nothing", "read": "/items/1"}


def throughput(course: Course) -> Measured:
    """A route without database, a read, a write; pool of 10, 64 clients; reads by 1, 8, 512 too."""
    measured = course.measured("throughput")
    with field(course.contenders, course.database, course.folder, POOL_SIZE="10") as entrants:
        warm_up(course, entrants)
        contest(course, measured, entrants, [READ, WRITE], course.rounds)
        if course.backend == "postgresql":
            contest(course, measured, entrants, [NOTHING], course.rounds)
            others = [case for case in READS if case != READ]
            contest(course, measured, entrants, others, course.few_rounds)
    return measured


def hold_time(course: Course) -> Measured:
    """A read with the database 1 ms away; pool of 5, 64 clients."""
    measured = course.measured("hold_time")
    with distance(course.database, DELAY) as port:
        measured.facts["round trip"] = round_trip(course.database.url, port)
        with field(
            course.contenders, course.database, course.folder, proxy_port=port, POOL_SIZE="5"
        ) as entrants:
            warm_up(course, entrants)
            contest(course, measured, entrants, [FAR_READ], course.rounds)
    return measured


def growth(course: Course) -> Measured:
    """A read, by the number of clients, the size of the pool, and the number of workers."""
    measured = course.measured("growth")
    contenders = course.only(OURS, SEED, LIMIT)
    for workers in WORKERS:
        for pool in POOLS:
            options = [f"--workers={workers}"] if workers > 1 else []
            with field(
                contenders, course.database, course.folder, *options, POOL_SIZE=str(pool)
            ) as entrants:
                for entrant in entrants:
                    entrant.wait_for(workers)
                warm_up(course, entrants)
                cases = [Case("read", clients, pool, workers) for clients in CLIENTS]
                contest(course, measured, entrants, cases, course.few_rounds)
    return measured


def warm_up(course: Course, entrants: Sequence[Entrant]) -> None:
    """Let each make its connections, and see its routes for the first time."""
    for entrant in entrants:
        drive(entrant.server.port, _PATHS["read"], 64, 1)
        drive(entrant.server.port, "", 8, 1, first_id=next(course.ids))
        entrant.settle()


def contest(
    course: Course,
    measured: Measured,
    entrants: Sequence[Entrant],
    cases: Sequence[Case],
    rounds: int,
) -> None:
    """Drive each entrant in each case in short slices, by turns, in an order left to chance."""
    for number in range(rounds):
        for case in course.random.sample(cases, len(cases)):
            for entrant in course.random.sample(entrants, len(entrants)):
                load, missing = _slice(course, entrant, case)
                measured.samples.append(
                    Sample(
                        measured.name,
                        measured.backend,
                        entrant.name,
                        case,
                        number,
                        load,
                        missing,
                    )
                )


def _slice(course: Course, entrant: Entrant, case: Case) -> tuple[Load, int]:
    """One slice of load; and how many of its writes are not in the table."""
    first_id = next(course.ids) if case.route == "write" else None
    path = _PATHS.get(case.route, "")
    load = drive(entrant.server.port, path, case.clients, course.seconds, first_id=first_id)
    entrant.settle()
    missing = 0 if first_id is None else load.issued - entrant.rows(first_id, load.issued)
    return load, missing
