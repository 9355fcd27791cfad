"""Tokens per second through the engine, against the same requests sent to the same SGLang over plain HTTP."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from protocol.versions import Version
from rollout_server.engines.sglang.answers import sample_body
from tests.gpu.figures import Figures
from tests.gpu.rig import Rig, Running

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]
LEAST_RATIO = {"cuda": 0.9, "cpu": 0.5}
"""On a shared CPU the engine and SGLang take cycles from each other."""


async def through_the_engine(rig: Rig, engine: Any, label: str) -> float:
    groups = [rig.request(f"{label}-{i}") for i in range(2 * rig.size.room // rig.size.generations)]
    begun = time.monotonic()
    done = await asyncio.gather(*map(engine.generate, groups))
    return sum(len(c.completion_tokens) for group in done for c in group) / (time.monotonic() - begun)


async def plain_http(rig: Rig, engine: Any, label: str) -> float:
    """Every sample is one request, as many at once as the engine lets in; answers are parsed."""
    life = engine._life
    seats = asyncio.Semaphore(rig.size.room)

    async def one(group: str, number: int) -> int:
        request = rig.request(group)
        body = sample_body(
            request.prompt_tokens,
            request.sampling,
            limit=rig.size.length,
            rid=f"{group}-{number:04d}",
            cache_key=label,
            seed=None,
        )
        async with seats:
            answer = await life.client.generate(body)
        return len(answer.output_ids)

    groups = [f"{label}-{i}" for i in range(2 * rig.size.room // rig.size.generations)]
    begun = time.monotonic()
    counts = await asyncio.gather(*(one(group, n) for group in groups for n in range(rig.size.generations)))
    return sum(counts) / (time.monotonic() - begun)


def test_the_engine_keeps_sglang_as_busy_as_plain_http_does(rig: Rig, running: Running, figures: Figures) -> None:
    async def rounds() -> list[tuple[float, float]]:
        await running.engine.load_weights(rig.weights(Version(20, 0), content="own"))
        await plain_http(rig, running.engine, "warm")
        measured = []
        for number in range(rig.size.rounds):
            direct = await plain_http(rig, running.engine, f"http{number}")
            measured.append((await through_the_engine(rig, running.engine, f"engine{number}"), direct))
        return measured

    measured = running.run(rounds(), 1200.0)
    ratios = [ours / direct for ours, direct in measured]
    ours, direct = zip(*measured, strict=True)
    figures.record_median("through the engine", ours, "tokens/s", worst=min(ours))
    figures.record_median("plain HTTP", direct, "tokens/s", worst=min(direct))
    figures.record_median("engine / HTTP", ratios, "", worst=min(ratios))
    assert sorted(ratios)[len(ratios) // 2] >= LEAST_RATIO[rig.device]
