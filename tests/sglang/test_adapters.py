"""Adapters in the real SGLang: what they say is what the merged model says, also while the next one comes."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from protocol.versions import Version
from rollout_server.engines.base import SamplesWithheld
from tests.adapters import make_adapter, merged_model
from tests.sglang.driving import PROMPT, attach, logprobs, make_canaries, request, run
from tests.sglang_cpu.launch import RunningSGLang

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(240)]
RANK = 4


@pytest.fixture(scope="module")
def with_adapters(tiny_model_dir: Path) -> Iterator[RunningSGLang]:
    """One that serves adapters."""
    sglang = RunningSGLang.start(tiny_model_dir, max_lora_rank=RANK)
    yield sglang
    sglang.stop()


def test_a_completion_is_wholly_of_the_adapter_it_began_with(with_adapters: RunningSGLang, tmp_path: Path) -> None:
    adapters, models = [], []
    for number in range(3):
        weights = make_adapter(with_adapters.model, tmp_path, Version(1, number), r=RANK)
        models.append(merged_model(with_adapters.model, weights))
        adapters.append(dataclasses.replace(weights, canaries=make_canaries(models[-1])))
    differs = logprobs(models[0], PROMPT, PROMPT) - logprobs(models[1], PROMPT, PROMPT)
    assert np.abs(differs).mean() > 0.1, "a wrong adapter would show"

    async def case() -> None:
        async with attach(with_adapters, max_lora_rank=RANK) as engine:
            groups = []
            for number, weights in enumerate(adapters):
                report = await engine.load_weights(weights)
                assert report.pause_s == 0
                assert report.mismatch is not None
                assert report.mismatch < 1e-5
                groups.append(asyncio.create_task(engine.generate(request(f"g{number}", length=150))))
                while not engine.status().samples_running:
                    await asyncio.sleep(0.001)
            for weights, model, group in zip(adapters, models, groups, strict=True):
                for completion in await group:
                    assert completion.spans == ((weights.version, 150),)
                    expected = logprobs(model, PROMPT, completion.completion_tokens)
                    np.testing.assert_allclose(completion.behavior_logprobs, expected, atol=1e-4)
            with pytest.raises(SamplesWithheld, match="nats a token"):
                await engine.load_weights(
                    dataclasses.replace(adapters[0], version=Version(1, 9), canaries=make_canaries(models[1]))
                )

    run(case(), limit_s=120)
