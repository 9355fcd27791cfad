"""Few changed elements in the real SGLang: what it then holds is what the whole file would have given."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocol.messages import FinishReason
from protocol.versions import Version
from rollout_server.engines.base import EngineFailure
from rollout_server.engines.sglang import SGLangEngine
from tests.sglang.driving import PROMPT, Versions, attach, logprobs, request, run
from tests.sglang_cpu.launch import ENVIRONMENT, PYTHON, ROOT, RunningSGLang

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(180)]
TOLERANCE = 1e-5


@pytest.fixture
def versions(tmp_path: Path) -> Versions:
    return Versions(tmp_path)


class Calls:
    """How often SGLang was given all weights."""

    def __init__(self, engine: SGLangEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        assert engine._life is not None
        client = engine._life.client
        self.full = 0
        update_weights = client.update_weights

        async def counted(*arguments: Any, **named: Any) -> None:
            self.full += 1
            await update_weights(*arguments, **named)

        monkeypatch.setattr(client, "update_weights", counted)


@pytest.mark.parametrize("mode", ["retract", "in_place", "drain"])
def test_one_percent_is_the_whole_file_to_the_bit(
    sglang: RunningSGLang, versions: Versions, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    async def case() -> None:
        async with attach(sglang, mode=mode) as engine:
            first = versions.make(0)
            await engine.load_weights(first)
            calls = Calls(engine, monkeypatch)
            second = versions.change(1, first)
            third = versions.change(2, second)
            few = [await engine.load_weights(weights) for weights in (second, third)]
            assert calls.full == 0, "only what differs was set"
            assert all(report.mismatch < 1e-6 for report in few)
            for completion in await engine.generate(request("g")):
                assert completion.spans == ((Version(1, 2), 40),)
                expected = logprobs(versions.models[Version(1, 2)], PROMPT, completion.completion_tokens)
                np.testing.assert_allclose(completion.behavior_logprobs, expected, atol=TOLERANCE)
            for number, (weights, report) in enumerate(zip((second, third), few, strict=True), 7):
                whole = dataclasses.replace(weights, version=Version(1, number), base=None, changes=None)
                assert (await engine.load_weights(whole)).checksum == report.checksum
            assert calls.full == 2

    run(case(), limit_s=120)


def test_samples_under_way_go_on(sglang: RunningSGLang, versions: Versions, monkeypatch: pytest.MonkeyPatch) -> None:
    async def case() -> None:
        async with attach(sglang, mode="retract") as engine:
            await engine.load_weights(staged := versions.make(0))
            calls = Calls(engine, monkeypatch)
            group = asyncio.create_task(engine.generate(request("g", generations=8, length=300)))
            for number in range(1, 4):
                before = engine.status().tokens_generated
                while engine.status().tokens_generated < before + 100:
                    await asyncio.sleep(0.001)
                staged = versions.change(number, staged)
                await engine.load_weights(staged)
            assert calls.full == 0
            for completion in await group:
                assert completion.finish_reason is FinishReason.LENGTH
                assert [version for version, _ in completion.spans] == [Version(1, number) for number in range(4)]
                end = 0
                for version, count in completion.spans:
                    begin, end = end, end + count
                    by = logprobs(versions.models[version], PROMPT, completion.completion_tokens)[begin:end]
                    np.testing.assert_allclose(completion.behavior_logprobs[begin:end], by, atol=TOLERANCE)

    run(case(), limit_s=120)


def test_changes_to_another_version_are_loaded_whole(
    sglang: RunningSGLang, versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def case() -> None:
        async with attach(sglang) as engine:
            first = versions.make(0, canaries=True)
            await engine.load_weights(first)
            await engine.load_weights(versions.make(5, canaries=True))
            calls = Calls(engine, monkeypatch)
            report = await engine.load_weights(versions.change(6, first))
            assert (calls.full, engine.live) == (1, Version(1, 6))
            assert report.mismatch < 1e-6
            much = versions.change(7, versions.change(8, first), share=0.5)
            await engine.load_weights(dataclasses.replace(much, base=Version(1, 6)))
            assert calls.full == 2, "so many are loaded faster whole"

    run(case())


def test_positions_that_are_none_are_refused_before_sglang_hears_of_them(
    sglang: RunningSGLang, versions: Versions
) -> None:
    async def case() -> None:
        async with attach(sglang) as engine:
            first = versions.make(0)
            await engine.load_weights(first)
            before = await engine._life.client.checksum()
            good = versions.change(1, first)
            name = "model.norm.weight"
            for positions, told in (
                (np.array([3, 32]), r"positions 3 to 32, allowed are 0 to 31"),
                (np.array([-1, 3]), r"positions -1 to 3, allowed are 0 to 31"),
                (np.array([3, 3]), "positions that do not ascend"),
            ):
                with pytest.raises(EngineFailure, match=rf"changes of 1.safetensors do not fit .*: {name} has {told}"):
                    await engine.load_weights(dataclasses.replace(good, changes=good.changes | {name: positions}))
            assert await engine._life.client.checksum() == before
            assert (engine.live, engine.status().restarts) == (first.version, 0)

    run(case())


def test_shards_of_two_ranks_get_what_is_theirs() -> None:
    """SGLang's own attention and MLP layers: rows and columns in halves, keys and values shared out or repeated."""
    done = subprocess.run(
        [PYTHON, "-m", "tests.sglang.shards"], capture_output=True, text=True, cwd=ROOT, env=os.environ | ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    ranks = json.loads(done.stdout.splitlines()[-1])
    assert [(rank["rank"], rank["kv_heads"], rank["equal"]) for rank in ranks] == [
        (0, 2, True), (1, 2, True), (0, 1, True), (1, 1, True),
    ]  # fmt: skip
    for rank in ranks:
        assert rank["compared"] == {"compared": 10}
        assert 0 < rank["applied"]["elements"] < rank["all"], "a rank is given its own part"
    boxes = {box[0]: box for box in ranks[1]["boxes"]}
    assert boxes["o_proj.weight"] == ["o_proj.weight", "o_proj.weight", 16, 0, [32, 16], [32, 1], [16, 1]]
    assert boxes["k_proj.weight"] == ["k_proj.weight", "qkv_proj.weight", 256, 512, [256], [1], [1]]
