"""Groups on their way through SGLang (the fake one): every way that generation can go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from protocol.messages import FinishReason
from rollout_server.engines.base import EngineFailure, StagedWeights
from tests.fake_sglang.driving import ROOM, V0, child_engine, is_pure, request, run, until

pytestmark = pytest.mark.usefixtures("fake_path")
MakeWeights = Callable[..., StagedWeights]


def test_a_group_is_sampled_by_the_weights_that_were_loaded(tiny_model_dir: Path, weights: MakeWeights) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, _):
            with pytest.raises(EngineFailure, match="group g: no weights are live yet: load_weights first"):
                await engine.generate(request())
            report = await engine.load_weights(weights(V0))
            assert report.checksum.startswith("sglang-0.5.23-cpu-float32-plain-tp1-pp1-dp1:")
            assert report.mismatch is not None
            assert report.mismatch < 1e-6
            group = await engine.generate(request(generations=5))
            assert [completion.spans for completion in group] == [((V0, 12),)] * 5
            assert all(is_pure(completion, weights(V0)) for completion in group)
            assert {completion.finish_reason for completion in group} == {FinishReason.LENGTH}
            assert len({tuple(completion.completion_tokens) for completion in group}) == 5

    run(case())
