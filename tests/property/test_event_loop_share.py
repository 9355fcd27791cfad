"""I9: no callback of the learner's loops uses more than 50 ms of CPU, whatever the shape of a step.

Groups of the largest usual size (64 completions of 1024 tokens, eight to a step) pass the whole way from the wire to
the recorder's row. CPU time of the thread is what is measured, not the clock: a busy machine makes no difference.
"""

from __future__ import annotations

import asyncio
import gc
import time
from pathlib import Path

import pytest

from learner.app import make_recorder
from learner.loops import accept_loop, batch_loop, lease_loop, receive_loop, train_loop
from learner.rundir import RunDirectory
from learner.stats import RunStats
from learner.tuning.virtual_time import run_virtual
from protocol.codec import decode, encode
from protocol.loop_lag import LIMIT_MS, LoopLag
from protocol.versions import Version
from protocol.waits import Waits
from tests.learners import FakeCompute, FakePublisher, FakeTrainer, answer, make_config, make_desk

TOKENS = 1024
ONE_VERSION = [[(Version(1, 0), TOKENS)]] * 64
A_VERSION_PER_TOKEN = [[(Version(1, 0), 1)] * TOKENS] * 64
"""No honest server sends this; it is what the byte budget allows."""
SHORT = [[(Version(1, 0), 1)]] * 64


@pytest.fixture
def callbacks_ms(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, str]]:
    """(CPU milliseconds, what ran) of every callback of an event loop."""
    measured: list[tuple[float, str]] = []
    gc.collect()  # what earlier tests have left behind is not this loop's
    run_callback = asyncio.Handle._run

    def measure(handle: asyncio.Handle) -> None:
        begun_s = time.thread_time()
        run_callback(handle)
        measured.append((1000 * (time.thread_time() - begun_s), repr(handle)))

    monkeypatch.setattr(asyncio.Handle, "_run", measure)
    return measured


@pytest.mark.parametrize(
    ("spans", "prompts_per_step"),
    [(ONE_VERSION, 8), (A_VERSION_PER_TOKEN, 2), (SHORT, 64)],
    ids=["large groups", "a version per token", "many small groups"],
)
def test_no_callback_holds_the_event_loop(spans, prompts_per_step, callbacks_ms, tmp_path: Path):
    options = {
        "num_generations": 64, "max_completion_length": TOKENS, "prompts_per_step": prompts_per_step,
        "max_staleness": 1, "max_steps": 1, "num_completions_logged": 0,
    }  # fmt: skip
    desk = make_desk(**options)
    desk.join("north", room=1_000_000)
    directory = RunDirectory.open(make_config(output_dir=tmp_path, run_name="run", **options))
    directory.begin_incarnation()

    async def main() -> None:
        story: list[str] = []
        trainer, journal, waits = FakeTrainer(story), desk.journal, Waits(asyncio.get_running_loop().time)
        recorder = make_recorder(directory, trainer, desk.coordinator, journal, RunStats(), LoopLag(), None)  # type: ignore[arg-type]
        recorder.save = lambda compute: asyncio.sleep(0)
        batches = asyncio.Queue(1)
        loops = [
            asyncio.ensure_future(loop)
            for loop in (
                receive_loop(desk.coordinator, desk.arrivals),
                lease_loop(desk.coordinator, waits, tick_s=1.0),
                accept_loop(desk.arrivals, waits),
                batch_loop(desk.coordinator, desk.buffer, batches, waits),
                recorder.record_loop(waits),
            )
        ]
        desk.pump()
        for lease in desk.leases():
            desk.channel.inbox.put_nowait(
                (b"north", decode([bytes(frame) for frame in encode(answer(lease, spans=spans))]))
            )
        await asyncio.sleep(0)
        callbacks_ms.clear()  # what the test itself has done
        await train_loop(
            batches, trainer, FakeCompute(), FakePublisher(story), desk.coordinator, journal, recorder, waits
        )  # type: ignore[arg-type]  # fmt: skip
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)

    try:
        run_virtual(main())
    finally:
        directory.close()
    assert desk.ledger.policy_version == 1
    assert directory.metrics_path.exists()
    slowest_ms, what = max(callbacks_ms)
    assert slowest_ms < LIMIT_MS, what
