"""How long SGLang stands still for an update, against its own loading of the same file with nothing else to do.

Both sides have the same SGLang, on a CPU. Ours has every seat taken by a sample under way, and pauses for as long as
the samples could not go on; the control calls /update_weights_from_disk of an idle engine. The target allows half as
long again, and 20 ms for two more calls and the step under way.
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from tests.bench.harness import Row, Skip

UPDATES, QUICK_UPDATES = 40, 10
ALLOWANCE_S = 0.020
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "head_dim": 64,
    "num_attention_heads": 8,
}
"""78 MB: large enough for the load to be what counts."""


def ours(quick: bool) -> float:
    return with_engine(paused_under_load, quick)


def own_update(quick: bool) -> float:
    return with_engine(idle_update, quick)


def with_engine(measure: Callable[[Any, Any, int], Coroutine[Any, Any, float]], quick: bool) -> float:
    from tests.models import build_tiny_model
    from tests.sglang.driving import Versions, attach
    from tests.sglang_cpu.launch import PYTHON, RunningSGLang

    if not PYTHON.exists():
        raise Skip("the environment that has SGLang is not built: make sglang")
    with tempfile.TemporaryDirectory() as folder:
        sglang = RunningSGLang.start(build_tiny_model(Path(folder) / "model", **SHAPE))
        try:

            async def run() -> float:
                versions = Versions(Path(folder), **SHAPE)
                async with attach(sglang) as engine:
                    return await measure(
                        engine, [versions.make(0), versions.make(1)], QUICK_UPDATES if quick else UPDATES
                    )

            return asyncio.run(run())
        finally:
            sglang.stop()


async def paused_under_load(engine: Any, staged: Any, updates: int) -> float:
    from protocol.versions import Version
    from tests.sglang.driving import request

    await engine.load_weights(staged[0])
    ends = asyncio.Event()

    async def keep_busy(name: str) -> None:
        while not ends.is_set():
            await engine.generate(request(name, length=100))

    busy = [asyncio.create_task(keep_busy(f"g{i}")) for i in range(6)]
    pauses = []
    for number in range(1, updates + 1):
        while engine.status().samples_running < engine.info.room:
            await asyncio.sleep(0.001)
        weights = dataclasses.replace(staged[number % 2], version=Version(1, number))
        pauses.append((await engine.load_weights(weights)).pause_s)
    ends.set()
    await asyncio.gather(*busy)
    return statistics.median(pauses) - ALLOWANCE_S


async def idle_update(engine: Any, staged: Any, updates: int) -> float:
    from rollout_server.engines.sglang.swap import link_weights

    await engine.load_weights(staged[0])
    seconds = []
    for number in range(1, updates + 1):
        folder = link_weights(staged[number % 2].path)
        begun_s = time.perf_counter()
        await engine._life.client.update_weights(str(folder), f"1.{number}", flush_cache=True)
        seconds.append(time.perf_counter() - begun_s)
    return statistics.median(seconds)


ROWS = [
    Row(
        name="sglang_pause",
        control="its own update, idle; less 20 ms",
        ours=ours,
        baseline=own_update,
        ratio="ours/baseline",
        target=1.5,
        sense="lower",
        unit="s",
    ),
]
