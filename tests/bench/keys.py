"""What keys and the journal cost the rollout path: CPU seconds a group, both processes, the whole way.

The shipped loops on both sides: a server process with the scripted engine (no delays) and a learner process that does
all it does with a group (validate, journal with fdatasync, acknowledge, buffer, batch), with training left out. Ours
has CURVE and the journal on disk; the control neither: plaintext, and a journal that keeps nothing. Large groups over
tcp on loopback. Counted from the first group after the warm-up to the last.

    python -m tests.bench.keys        prints both sides, and what CURVE alone costs a byte of weights
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

from tests.bench.harness import Row

GROUPS, QUICK_GROUPS = 600, 200
WARM_UP = 50
NUM_GENERATIONS, LENGTH = 64, 1024
LIMIT_S = 200.0


def with_keys_and_journal(quick: bool) -> dict[str, float]:
    return measure(quick, keys=True, journal=True)


def with_neither(quick: bool) -> dict[str, float]:
    return measure(quick, keys=False, journal=False)


def measure(quick: bool, *, keys: bool, journal: bool) -> dict[str, float]:
    """Run both processes and return their CPU seconds a group."""
    from tests.keyrings import Keyring

    count = QUICK_GROUPS if quick else GROUPS
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as directory:
        ring = Keyring(Path(directory))
        ring.make("server")
        ring.allow("server")
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        child = context.Process(target=serve, args=(address, Path(directory), keys, there))
        child.start()
        cpu_s = asyncio.run(asyncio.wait_for(learn(address, Path(directory), keys, journal, count, here), LIMIT_S))
        here.send("end")
        child.join(30)
        assert child.exitcode == 0, f"the server ended with {child.exitcode}"
    groups = count - WARM_UP
    return {"figure": cpu_s / groups, "cpu_s": cpu_s}


async def learn(address: str, directory: Path, keys: bool, journal: bool, count: int, server: Connection) -> float:
    """Be the learner; return the CPU seconds of both processes after the warm-up."""
    from learner.journal import Journal
    from learner.loops import accept_loop, lease_loop, receive_loop, stock_loop
    from protocol.channel import listen
    from protocol.security import PLAIN
    from protocol.waits import Waits
    from tests.keyrings import Keyring
    from tests.learners import make_desk

    desk = make_desk(
        num_generations=NUM_GENERATIONS, max_completion_length=LENGTH, prompts_per_step=count, max_staleness=0,
        buffer_bytes=1 << 40, reward_funcs=["scripted"], filter_zero_std=False, token_budget=1 << 20,
    )  # fmt: skip
    coordinator, arrivals, waits = desk.coordinator, desk.arrivals, Waits()
    coordinator.clock = time.monotonic
    (directory / "journal").mkdir()
    security = Keyring.of(directory).listening() if keys else PLAIN
    opened = Journal.open(directory / "journal") if journal else None
    if opened is not None:
        arrivals._journal = opened
    async with listen(address, security) as channel:
        coordinator.channel = channel
        loops = [
            asyncio.ensure_future(loop)
            for loop in (
                receive_loop(coordinator, arrivals),
                lease_loop(coordinator, waits, tick_s=1.0),
                stock_loop(coordinator, waits),
                accept_loop(arrivals, waits),
            )
        ]
        begun_s = await spent_after(WARM_UP, desk.buffer, server)
        ended_s = await spent_after(count, desk.buffer, server)
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        if opened is not None:
            await opened.close()
    return ended_s - begun_s


async def spent_after(count: int, buffer: object, server: Connection) -> float:
    """Wait for so many groups, and return the CPU seconds of both processes until then."""
    while len(buffer) < count:  # type: ignore[arg-type]
        await asyncio.sleep(0.005)
    server.send("cpu")
    theirs: float = await asyncio.to_thread(server.recv)
    return time.process_time() + theirs


def serve(address: str, directory: Path, keys: bool, learner: Connection) -> None:
    """Be the server, until the learner's process says that it is enough."""
    import uvloop

    uvloop.run(_serve(address, directory, keys, learner))


async def _serve(address: str, directory: Path, keys: bool, learner: Connection) -> None:
    from protocol.channel import dial
    from protocol.loop_lag import LoopLag
    from protocol.messages import Welcome
    from protocol.security import PLAIN
    from protocol.waits import Waits
    from rollout_server.config import ScriptedOptions
    from rollout_server.engines.base import StagedWeights
    from rollout_server.engines.scripted import ScriptedEngine
    from rollout_server.loops import Parts, control_loop, heartbeat_loop, report_loop
    from rollout_server.scorers import ScriptedScorer
    from rollout_server.weights import WeightsReceiver
    from tests.factories import INITIAL, RUN_ID, VOCAB_SIZE
    from tests.keyrings import Keyring

    security = Keyring.of(directory).dialing("server") if keys else PLAIN
    script = ScriptedOptions(vocab_size=min(32, VOCAB_SIZE), mean_length=LENGTH, length_sigma=0.0)
    ended = asyncio.Event()
    loop, waits = asyncio.get_running_loop(), Waits()

    def answer() -> None:
        while learner.recv() != "end":
            learner.send(time.process_time())
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=answer, daemon=True).start()
    async with ScriptedEngine(script, NUM_GENERATIONS) as engine, dial(address, security) as dialer:
        await engine.load_weights(StagedWeights(version=INITIAL, path=directory))
        async with asyncio.TaskGroup() as tasks:
            receiver = WeightsReceiver(
                engine, waits, learner=address, directory=directory / "staging", security=security
            )
            parts = Parts(
                name="server", address=address, dialer=dialer, engine=engine, scorer=ScriptedScorer(),
                reward_weights=(1.0,), decode=lambda tokens: "", weights=receiver, tasks=tasks, waits=waits,
                lag=LoopLag(), welcome=Welcome(session="", run_id=RUN_ID, incarnation=1),
            )  # fmt: skip
            running = [tasks.create_task(each(parts)) for each in (control_loop, report_loop, heartbeat_loop)]
            await ended.wait()
            for task in running:
                task.cancel()
        await receiver.close()


ROWS = [
    Row(
        name="keys_and_journal",
        control="no keys, no journal",
        ours=with_keys_and_journal,
        baseline=with_neither,
        ratio="ours/baseline",
        target=1.10,
        sense="lower",
        unit="CPU s a group",
    ),
]


def main() -> None:
    quick = "--quick" in sys.argv
    for keys in (False, True):
        for journal in (False, True):
            figure = measure(quick, keys=keys, journal=journal)["figure"]
            print(f"keys {keys!s:5}  journal {journal!s:5}  {1e3 * figure:.3f} ms of CPU a group", flush=True)


if __name__ == "__main__":
    main()
