"""How long an engine stands still for a version that changes 1 % of its elements, against stopping for all of them.

All sides have every seat taken by samples under way, and the same weights to load: two versions by turns. `few` sets
what differs, in flight. `stopped` ends all requests and loads everything before others begin: from the first abort to
the end of the load, which is the least that an engine without updates in flight can do. `whole` loads everything in
flight. The large model is one whose bytes matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.bench.harness import Row, Skip

UPDATES, QUICK_UPDATES = 12, 4
SHARE = 0.01
GROUPS, ROOM, LENGTH = 6, 16, 100
LARGE = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "head_dim": 64, "num_attention_heads": 12,
}  # fmt: skip
"""155 MB in float32."""


@dataclass(frozen=True, eq=False)
class Side:
    """What updates take, in seconds: {control: figure}. `few` gives its one figure for either."""

    engine: Literal["sglang", "transformers"]
    large: bool
    few: bool

    def __call__(self, quick: bool) -> dict[str, float]:
        return asyncio.run(self._run(QUICK_UPDATES if quick else UPDATES))

    async def _run(self, updates: int) -> dict[str, float]:
        from tests.models import build_tiny_model

        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            model = build_tiny_model(Path(folder) / "model", **(LARGE if self.large else {}))
            pair = make_pair(model, Path(folder))
            async with (sglang if self.engine == "sglang" else transformers)(model) as engine:
                busy = Busy(engine, pair)
                await engine.load_weights(next(busy.whole))
                if self.few:
                    pause_s = await busy.median(in_flight, busy.few, updates)
                    return {"stopped": pause_s, "whole": pause_s}
                return {
                    "stopped": await busy.median(stopped, busy.whole, updates),
                    "whole": await busy.median(in_flight, busy.whole, updates),
                }


@contextlib.asynccontextmanager
async def sglang(model: Path) -> AsyncIterator[Any]:
    from tests.sglang.driving import attach
    from tests.sglang_cpu.launch import PYTHON, RunningSGLang

    if not PYTHON.exists():
        raise Skip("the environment that has SGLang is not built: make sglang")
    running = RunningSGLang.start(model, room=ROOM)
    try:
        async with attach(running, room=ROOM) as engine:
            yield engine
    finally:
        running.stop()


@contextlib.asynccontextmanager
async def transformers(model: Path) -> AsyncIterator[Any]:
    from rollout_server.engines.transformers import TransformersEngine

    async with TransformersEngine(model, room=ROOM, max_model_length=512, dtype="float32", device="cpu") as engine:
        yield engine


class Busy:
    """An engine with every seat taken, and versions of two contents by turns to load."""

    def __init__(self, engine: Any, pair: tuple[Any, Any]) -> None:
        from protocol.versions import Version

        self.engine = engine
        self.groups: set[str] = set()
        self.aborts = False
        self._names = itertools.count()
        self._last: Any = None
        self._contents, self._versions = itertools.cycle(pair), (Version(1, number) for number in itertools.count())
        self.whole, self.few = self._make(few=False), self._make(few=True)

    def _make(self, *, few: bool) -> Any:
        while True:
            content, version = next(self._contents), next(self._versions)
            known = {} if few else {"changes": None}
            yield dataclasses.replace(content, version=version, base=self._last, **known)
            self._last = version

    async def median(self, update: Callable[[Busy, Any], Awaitable[float]], versions: Any, updates: int) -> float:
        """Seconds of an update while samples run; no request may end before its length unless it is aborted."""
        ends = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()
        workers = [asyncio.create_task(self._work(ends)) for _ in range(GROUPS)]
        seconds = []
        for _ in range(updates):
            while self.engine.status().samples_running < ROOM:
                await asyncio.sleep(0.001)
            self._last = self.engine.live
            seconds.append(await update(self, next(versions)))
        ends.set()
        await asyncio.gather(*workers)
        return statistics.median(seconds)

    async def _work(self, ends: asyncio.Event) -> None:
        from protocol.messages import FinishReason
        from tests.sglang.driving import request

        while not ends.is_set():
            await self.open.wait()
            name = f"g{next(self._names)}"
            self.groups.add(name)
            completions = await self.engine.generate(request(name, length=LENGTH))
            self.groups.discard(name)
            ended = {completion.finish_reason for completion in completions}
            assert ended == {FinishReason.LENGTH} or self.aborts, ended


async def in_flight(busy: Busy, weights: Any) -> float:
    report = await busy.engine.load_weights(weights)
    return float(report.pause_s)


async def stopped(busy: Busy, weights: Any) -> float:
    busy.aborts = True
    begun_s = time.perf_counter()
    busy.open.clear()
    for group in tuple(busy.groups):
        busy.engine.abort(group)
    while busy.groups:
        await asyncio.sleep(0.0005)
    report = await busy.engine.load_weights(weights)
    seconds = time.perf_counter() - begun_s - report.check_s
    busy.open.set()
    busy.aborts = False
    return seconds


def make_pair(model: Path, folder: Path) -> tuple[Any, Any]:
    """Two versions, each with what it changes of the other."""
    from safetensors.torch import load_file, save_file

    from protocol.versions import Version
    from rollout_server.engines.base import StagedWeights
    from tests.changes import change_some

    old = load_file(model / "model.safetensors")
    new, changes = change_some(old, share=SHARE)
    made = []
    for number, tensors in enumerate((old, new)):
        path = folder / f"{number}.safetensors"
        save_file(tensors, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        made.append(StagedWeights(version=Version(0, number), path=path, digest=digest, changes=changes))
    return made[0], made[1]


def rows(engine: Literal["sglang", "transformers"], *, large: bool) -> list[Row]:
    few, all_of_it = Side(engine, large, few=True), Side(engine, large, few=False)
    size = "large" if large else "tiny"

    def row(control: str, figure: str, target: float) -> Row:
        return Row(
            name=f"{engine}_few_{figure}_{size}", control=control, ours=few, baseline=all_of_it, ratio="ours/baseline",
            target=target, sense="lower", unit="s", figure=figure, contest=f"{engine}_few_{size}", rounds=3,
        )  # fmt: skip

    rows = [row("all requests ended, everything loaded", "stopped", 0.1)]
    return [*rows, row("everything loaded in flight", "whole", 1.0)] if large else rows


ROWS = [row for large in (False, True) for name in ("transformers", "sglang") for row in rows(name, large=large)]
