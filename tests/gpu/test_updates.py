"""Weights there and back, and what an update costs while samples are under way."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from protocol.completions import Completion
from protocol.versions import Version
from rollout_server.engines.base import LoadReport
from tests.gpu.figures import Figures
from tests.gpu.rig import Rig, Running

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]
LENGTH = 400
"""Of samples that an update interrupts: long enough to be under way when it comes."""


async def tokens_decoded(engine: Any) -> float:
    """Ask SGLang itself: the engine's counter is as of its last poll."""
    return float(sum(load.tokens_decoded for load in await engine._life.client.loads()))


def test_weights_there_and_back_are_the_same_bytes(rig: Rig, running: Running, figures: Figures) -> None:
    async def load() -> list[LoadReport]:
        contents = [(Version(2, 0), "own"), (Version(2, 1), "other"), (Version(2, 2), "own")]
        return [await running.engine.load_weights(rig.weights(v, content=content)) for v, content in contents]

    first, other, again = running.run(load())
    assert first.checksum == again.checksum != other.checksum
    assert running.engine.live == Version(2, 2)
    size = rig.weights(Version(2, 0), content="own").path.stat().st_size
    figures.record("weights", size / 1e9, "GB")
    figures.record("update of an idle engine: pause", again.pause_s, "s")
    figures.record("update of an idle engine: check", again.check_s, "s")


def test_an_update_under_load(rig: Rig, running: Running, figures: Figures) -> None:
    """Samples of every update go on with the new version, and none ends by it."""
    engine, size = running.engine, rig.size

    async def once(number: int) -> tuple[float, list[Completion]]:
        before, after = Version(3 + number, 0), Version(3 + number, 1)
        await engine.load_weights(rig.weights(before, content="own"))
        begun = await tokens_decoded(engine)
        groups = [
            asyncio.create_task(engine.generate(rig.request(f"load{number}-{i}", length=LENGTH)))
            for i in range(size.room // size.generations)
        ]
        while await tokens_decoded(engine) < begun + size.room * LENGTH // 8:
            await asyncio.sleep(0.01)
        report = await engine.load_weights(rig.weights(after, content="other"))
        return report.pause_s, [completion for group in await asyncio.gather(*groups) for completion in group]

    pauses = []
    for number in range(size.rounds):
        pause_s, completions = running.run(once(number))
        pauses.append(pause_s)
        assert len(completions) == size.room
        assert all(len(completion.completion_tokens) == LENGTH for completion in completions)
        versions = [[version.policy_version for version, _ in completion.spans] for completion in completions]
        assert [0, 1] in versions, "the update fell into the sampling"
        assert {tuple(v) for v in versions} <= {(0, 1), (0,), (1,)}
    assert engine.live == Version(2 + size.rounds, 1)
    figures.record_median(f"update under {size.room} samples: pause", pauses, "s", worst=max(pauses))
