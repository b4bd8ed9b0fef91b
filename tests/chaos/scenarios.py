"""The scenarios: what goes wrong, and what is counted.

Each is a function of a `World`; its docstring says what is a try, and when it is survived.
"""

import asyncio
import json
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import TypeAlias

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from tests.chaos.client import Connection, request
from tests.chaos.world import Ledger, Outcome, World, repeat
from tests.contenders import OURS
from tests.relay import Fate, Relay, nth
from tests.servers import HowToStop, outside, server_connections
from tests.serving import Server, slow_reader

Scenario: TypeAlias = Callable[[World], Awaitable[Outcome]]

WRITERS = 50


async def overload(world: World) -> Outcome:
    """200 writers at once on a pool of 5.

    A try is a request; it is survived if it was served, or told to try again later (503 with
    `Retry-After`). Routes without database, and the next request afterwards, are tries too.
    """
    outcome, ledger = Outcome(), Ledger()
    async with world.serving() as server:
        writers = [
            asyncio.create_task(
                world.write(
                    server.port, ledger, "slow", f"?seconds={world.random.uniform(0.05, 0.2)}"
                )
            )
            for _ in range(world.times(200))
        ]
        answers = list[bool]()
        while not all(writer.done() for writer in writers):
            answer = await request(server.port, "GET", "/nothing")
            answers.append(answer.is_success)
            await asyncio.sleep(0.05)
        outcome.remark(answers.count(False), "failed without database")
        told = await asyncio.gather(*writers)
        for answer in told:
            outcome.note(answer)
            answers.append(answer.is_success or answer.is_unavailable)
        outcome.remark(sum(answer.is_unavailable for answer in told), "told to try again")
        after = await world.write(server.port, ledger)
        outcome.note(after)
        answers.append(after.is_success)
        outcome.tries, outcome.survived = len(answers), sum(answers)
        await world.settle(server, ledger, outcome)
    return outcome


async def restart(world: World) -> Outcome:
    """The database is restarted ten times under 50 writers, and twice between requests.

    By turns it is a crash and an orderly restart. A try is a restart; it is survived if the first
    request after it is served.
    """
    outcome, ledger = Outcome(), Ledger()
    ways: cycle[HowToStop] = cycle(("immediate", "fast"))

    async def restart_and_ask(server: Server) -> None:
        await asyncio.to_thread(world.server.restart, next(ways))
        answer = await world.write(server.port, ledger)
        outcome.note(answer)
        outcome.tries += 1
        outcome.survived += answer.is_success

    async with world.serving() as server:
        async with world.writers(server.port, ledger, outcome, WRITERS):
            for _ in range(world.times(10)):
                await asyncio.sleep(world.random.uniform(0.3, 0.8))
                await restart_and_ask(server)
        for _ in range(world.times(2)):
            await world.missing_from_pool(server.port, ledger)  # all connections are made
            await restart_and_ask(server)
        await world.settle(server, ledger, outcome)
    return outcome


async def frozen(world: World) -> Outcome:
    """The database stands still for 3 s (SIGSTOP), five times, under 50 writers.

    A try is a freeze; it is survived if the first request after it is served.
    """
    outcome, ledger = Outcome(), Ledger()
    async with world.serving() as server:
        async with world.writers(server.port, ledger, outcome, WRITERS):
            for _ in range(world.times(5)):
                await asyncio.sleep(world.random.uniform(0.3, 0.8))
                with world.server.frozen():
                    await asyncio.sleep(3)
                answer = await world.write(server.port, ledger)
                outcome.note(answer)
                outcome.tries += 1
                outcome.survived += answer.is_success
        await world.settle(server, ledger, outcome)
    return outcome


async def network(world: World) -> Outcome:
    """A network between application and database which fails in 40 ways under 50 writers.

    It cuts connections, refuses them, holds everything up, stands still, loses what is sent, or
    loses the answer to it. A try is a fault; it is survived if requests are served again within a
    second after it.
    """
    outcome, ledger = Outcome(), Ledger()
    chance = world.random

    async def cut(relay: Relay) -> None:
        relay.cut()

    async def refuse(relay: Relay) -> None:
        relay.refuse()
        relay.cut()
        await asyncio.sleep(chance.uniform(0.1, 0.5))
        await relay.start()

    async def delay(relay: Relay) -> None:
        relay.delay = chance.uniform(0.02, 0.2)
        await asyncio.sleep(0.5)
        relay.delay = 0

    async def freeze(relay: Relay) -> None:
        relay.freeze()
        await asyncio.sleep(chance.uniform(0.1, 1))
        relay.thaw()

    async def lose(relay: Relay) -> None:
        relay.fate_of = nth(chance.randrange(1, 20), Fate.LOST)
        await asyncio.sleep(0.2)

    async def lose_answer(relay: Relay) -> None:
        relay.fate_of = nth(chance.randrange(1, 20), Fate.ANSWER_LOST)
        await asyncio.sleep(0.2)

    async def lose_answer_to_commit(relay: Relay) -> None:
        relay.fate_of = nth(chance.randrange(1, 5), Fate.ANSWER_LOST, b"COMMIT")
        await asyncio.sleep(0.2)

    faults = [cut, refuse, delay, freeze, lose, lose_answer, lose_answer_to_commit]
    async with Relay(world.url) as relay, world.serving(url=relay.url) as server:
        async with world.writers(server.port, ledger, outcome, WRITERS):
            for _ in range(world.times(40)):
                await chance.choice(faults)(relay)
                outcome.tries += 1
                outcome.survived += await world.is_served_again(server.port, ledger)
        await world.settle(server, ledger, outcome)
    return outcome


async def shutdown(world: World) -> Outcome:
    """SIGTERM under load, ten times; and twice while a query hangs.

    A try is a shutdown. It is survived if the process ends by itself within 10 s (of which a
    hanging query gets 2 s, by uvicorn's `--timeout-graceful-shutdown`), and every other request in
    flight is answered. Connections that are left on the server afterwards are leaks.
    """
    outcome, ledger = Outcome(), Ledger()
    left, killed = 0, list[Server]()

    async def end(server: Server) -> bool:
        server.terminate()
        try:
            await asyncio.to_thread(server.process.wait, 10)
        except subprocess.TimeoutExpired:
            killed.append(server)
            return False
        return server.process.returncode in server.program.ends

    async def count_leaks() -> None:
        nonlocal left
        await asyncio.sleep(0.2)  # the server has to notice it
        clients = await server_connections(world.url)
        left += len(clients)
        async with outside(world.url) as connection:
            for client in clients:
                kill = "SELECT pg_terminate_backend({})" if _is_postgresql(world) else "KILL {}"
                await connection.execute(kill.format(client.id))

    for _ in range(world.times(10)):
        async with world.serving() as server:
            requests = [
                asyncio.create_task(world.write_somehow(server.port, ledger)) for _ in range(20)
            ] + [
                asyncio.create_task(world.write(server.port, ledger, "slow", "?seconds=0.5"))
                for _ in range(5)
            ]
            await asyncio.sleep(world.random.uniform(0.2, 0.5))
            ended = await end(server)
            answers = [await task for task in requests]
            for answer in answers:
                outcome.note(answer)
            outcome.tries += 1
            outcome.survived += ended and all(answer.status > 0 for answer in answers)
            await count_leaks()
    for _ in range(world.times(2)):
        async with world.serving("--timeout-graceful-shutdown=2") as server:
            hanging = asyncio.create_task(
                world.write(server.port, ledger, "slow", "?seconds=60"),
            )
            await asyncio.sleep(0.5)
            outcome.tries += 1
            outcome.survived += await end(server)
            await count_leaks()
            server.process.kill()
            await hanging
    outcome.leaked = left
    outcome.remark(len(killed), "had to be killed")
    outcome.remark(left, "connections left after the end")
    await ledger.settle(world.url, outcome)
    return outcome


async def disconnects(world: World) -> Outcome:
    """1,000 clients go away at a random moment; then come 60 reads and 20 writes.

    They leave plain writes, slow ones, pairs and streams. A try is a client that leaves, or one of
    the calm requests afterwards; those survive if they are served.
    """
    outcome, ledger = Outcome(), Ledger()
    chance = world.random

    async def leave(server: Server) -> None:
        seconds = chance.uniform(0.01, 0.1)
        kind = chance.choice(["items", "slow", "pair", "stream"])
        connection = await Connection.open(server.port)
        if kind == "stream":
            connection.send("GET", f"/stream?chunks=5&seconds={seconds / 5}")
        else:
            id = ledger.new_id(pair=kind == "pair")
            connection.send("POST", f"/{kind}/{id}?seconds={seconds}")
        await asyncio.sleep(chance.uniform(0, 0.15))
        connection.leave(abruptly=chance.random() < 0.5)

    async with world.serving() as server:
        number = world.times(1000)
        await repeat(number, 5, lambda _: leave(server))
        # Uvicorn runs all but streams to their end, and has some of them left to do.
        await world.busy_connections(10)
        answers = [await request(server.port, "GET", "/items/1") for _ in range(60)]
        answers += [await world.write(server.port, ledger) for _ in range(20)]
        for answer in answers:
            outcome.note(answer)
        failed = sum(not answer.is_success for answer in answers)
        outcome.tries = number + len(answers)
        outcome.survived = outcome.tries - failed
        await world.settle(server, ledger, outcome)
    return outcome


async def cancellation(world: World) -> Outcome:
    """Requests are cancelled at a random moment, 1,000 in each of seven ways (peers: 200).

    By `task.cancel()`, an anyio scope, a timeout, a `BaseHTTPMiddleware` above, and in streams; see
    `cancellation.py`. A try is a cancelled request.
    """
    outcome = Outcome()
    each = 1000 if world.contender == OURS else 200  # it is by far the longest
    command = [world.python, "-P", "-m", "tests.chaos.cancellation", world.contender.app]
    command += [f"--url={world.url}", f"--requests={world.times(7 * each)}"]
    command += [f"--seed={world.random.randrange(1_000_000)}"]
    # Only the tests are to be found there, so that an installed asgi_db is not shadowed.
    tests = world.folder / "tests"
    tests.symlink_to(Path(__file__).parents[1])
    path = os.pathsep.join([str(world.folder), os.environ.get("PYTHONPATH", "")])
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, "PYTHONPATH": path, "POOL_TIMEOUT": "10"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        output, log = await process.communicate()
    finally:
        tests.unlink()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise RuntimeError(log.decode()[-2000:])
    result = json.loads(output)
    totals = result["totals"]
    failed = sum(
        totals[name] or 0
        for name in ("stuck", "bystanders_failed", "calm_reads_failed", "calm_writes_failed")
    )
    unannounced = max(0, totals["applied_unanswered"] - totals["announced"])
    wrong = {
        "acknowledged, but missing": totals["lost"],
        "half written": totals["half_committed"],
        "refused, but there": totals["refused_but_applied"],
        "applied, neither answered nor logged": unannounced,
        "got another's rows": totals["wrong_rows"],
    }
    leaks = {
        "still out of the pool": totals["checked_out"] or 0,
        "idle in transaction": totals["idle_in_transaction"],
        "queries still active": totals["active"],
        "left at exit": totals["left_at_exit"] or 0,
        "complaints in the log": len(totals["complaints"]),
    }
    outcome.tries = totals["cancelled"]
    outcome.lost, outcome.leaked = sum(wrong.values()), sum(leaks.values())
    outcome.survived = max(0, outcome.tries - failed)
    for words, number in {**wrong, **leaks, "calls and calm requests that failed": failed}.items():
        outcome.remark(number, words)
    hung = [way for way, found in result["ways"].items() if found["hung"]]
    outcome.remark(len(hung), f"hung ({', '.join(hung)})")
    if not result["clean"] and not (outcome.lost or outcome.leaked or failed):
        ways = result["ways"].values()
        outcome.errors |= Counter(sentence for found in ways for sentence in found["violations"])
    return outcome


async def read_your_writes(world: World) -> Outcome:
    """2,000 × a write on one connection, and a read on another as soon as its status line is there.

    A try is a read; it is survived if it finds what was written.
    """
    outcome, ledger = Outcome(), Ledger()
    number, pairs = world.times(2000), 4
    async with world.serving() as server:

        async def write_and_read() -> None:
            writer = await Connection.open(server.port)
            reader = await Connection.open(server.port)
            while outcome.tries < number:
                outcome.tries += 1
                id = ledger.new_id()
                writer.send("POST", f"/items/{id}")
                status = await writer.status()
                read = await reader.ask("GET", f"/items/{id}")
                ledger.answers[id] = written = await writer.rest(status)
                outcome.note(written)
                if read.status != 404:
                    outcome.note(read)
                outcome.survived += read.is_success
            writer.leave()
            reader.leave()

        await asyncio.gather(*(write_and_read() for _ in range(pairs)))
        await world.settle(server, ledger, outcome)
    outcome.remark(outcome.tries - outcome.survived, "reads that came too early")
    return outcome


async def slow_readers(world: World) -> Outcome:
    """20 clients ask for 5 MB and read nothing of it, on a pool of 5; others go on.

    A try is one of 40 other requests meanwhile; it is survived if it is served.
    """
    outcome, ledger = Outcome(), Ledger()
    async with world.serving() as server:
        readers = [slow_reader(server.port, "/big") for _ in range(20)]
        try:
            await asyncio.sleep(1)
            held = len(await world.busy_connections(0))
            outcome.remark(held, "connections held by the slow readers")
            requests = [request(server.port, "GET", "/items/1") for _ in range(world.times(20))]
            requests += [world.write(server.port, ledger) for _ in range(world.times(20))]
            for answer in await asyncio.gather(*requests):
                outcome.tries += 1
                outcome.note(answer)
                outcome.survived += answer.is_success
        finally:
            for reader in readers:
                reader.close()
        await world.settle(server, ledger, outcome)
    return outcome


async def websockets(world: World) -> Outcome:
    """1,000 WebSockets send a message each and stay; 200 of them vanish in the next one.

    A try is a socket, survived if its message was answered; or one of 20 requests meanwhile,
    survived if they are served. What idle sockets hold is leaked.
    """
    outcome, ledger = Outcome(), Ledger()
    sockets = list[ClientConnection]()
    async with world.serving() as server:

        async def talk(_: int) -> None:
            outcome.tries += 1
            id = ledger.new_id()
            with suppress(OSError, TimeoutError, WebSocketException):
                async with asyncio.timeout(20):
                    url = f"ws://127.0.0.1:{server.port}/ws"
                    socket = await connect(url, ping_interval=None, close_timeout=1)
                    sockets.append(socket)
                    await socket.send(str(id))
                    assert await socket.recv() == "ok"
                    outcome.survived += 1

        async def vanish(socket: ClientConnection) -> None:
            with suppress(WebSocketException):
                await socket.send(str(ledger.new_id()))
                await asyncio.sleep(world.random.uniform(0, 0.02))
                socket.transport.abort()

        await repeat(world.times(1000), 20, talk)
        outcome.remark(outcome.tries - outcome.survived, "sockets without an answer")
        held = len(await world.busy_connections(1))
        outcome.leaked += held
        outcome.remark(held, "connections held by idle sockets")
        for _ in range(20):
            answer = await world.write(server.port, ledger)
            outcome.tries += 1
            outcome.note(answer)
            outcome.survived += answer.is_success
        number = min(len(sockets), world.times(200))
        await repeat(number, 10, lambda n: vanish(sockets[n]))
        await asyncio.gather(*(socket.close() for socket in sockets))
        await world.busy_connections(2)  # the last messages are still being written
        await world.settle(server, ledger, outcome)
    return outcome


async def sqlite(world: World) -> Outcome:
    """200 requests at once read a number from an SQLite file and write the next, on a pool of 5.

    A try is a request; it is survived if it is served. An update that was overwritten is lost.
    """
    outcome = Outcome()
    async with world.serving(POOL_TIMEOUT="30") as server:
        writers = [request(server.port, "POST", "/count", 60) for _ in range(world.times(200))]
        answers = await asyncio.gather(*writers)
        for answer in answers:
            outcome.note(answer)
        outcome.tries = len(answers)
        outcome.survived = sum(answer.is_success for answer in answers)
    async with outside(world.url) as connection:
        ((counted,),) = await connection.execute("SELECT value FROM items WHERE id = 0")
    outcome.lost = abs(outcome.survived - int(counted))
    outcome.remark(outcome.lost, "acknowledged, but overwritten")
    return outcome


def _is_postgresql(world: World) -> bool:
    return world.place == "postgresql"


ON_ONE_SERVER: dict[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (
        overload,
        restart,
        frozen,
        network,
        shutdown,
        disconnects,
        cancellation,
        read_your_writes,
        slow_readers,
        websockets,
    )
}
"""Those for database servers."""

ON_FILES: dict[str, Scenario] = {"sqlite": sqlite}
"""Those for SQLite."""
