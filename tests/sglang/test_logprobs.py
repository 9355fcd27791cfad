"""The tokens, logprobs and versions that SGLang gives are what they are said to be, before and after updates."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from protocol.versions import Version
from rollout_server.engines.sglang import SGLangEngine, generation
from tests.sglang.driving import PROMPT, Versions, attach, logprobs, request, run
from tests.sglang_cpu.launch import RunningSGLang

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(120)]
TOLERANCE = 1e-5
V0, V1 = Version(1, 0), Version(1, 1)


@pytest.fixture
def versions(tmp_path: Path) -> Versions:
    return Versions(tmp_path)


async def under_way(engine: SGLangEngine, tokens: int) -> None:
    before = engine.status().tokens_generated
    while engine.status().tokens_generated < before + tokens:
        await asyncio.sleep(0.001)


def apart(model: object, prompt: np.ndarray, completion: np.ndarray, given: np.ndarray, temperature: float) -> float:
    return float(np.abs(logprobs(model, prompt, completion, temperature) - given).max())


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.7}, {"top_p": 0.5, "top_k": 9}, {"min_p": 0.2}, {"temperature": 0.0}], ids=str
)
def test_logprobs_are_those_of_the_whole_softmax(sglang: RunningSGLang, versions: Versions, sampling: dict) -> None:
    async def case() -> None:
        async with attach(sglang) as engine:
            for number in (0, 1):
                await engine.load_weights(versions.make(number))
                model = versions.models[Version(1, number)]
                for completion in await engine.generate(request(f"g{number}", **sampling)):
                    tokens, given = completion.completion_tokens, completion.behavior_logprobs
                    assert len(tokens) == 40
                    assert apart(model, PROMPT, tokens, given, sampling.get("temperature") or 1.0) < TOLERANCE

    run(case())


def test_retract_makes_every_later_token_the_new_version_s(sglang: RunningSGLang, versions: Versions) -> None:
    async def case() -> None:
        async with attach(sglang, mode="retract") as engine:
            await engine.load_weights(versions.make(0))
            task = asyncio.create_task(engine.generate(request("g", generations=8, length=300)))
            await under_way(engine, 100)
            await engine.load_weights(versions.make(1))
            for completion in await task:
                (first, old), (second, new) = completion.spans
                assert (first, second, old + new) == (V0, V1, 300)
                tokens, given = completion.completion_tokens, completion.behavior_logprobs
                by_old = np.abs(logprobs(versions.models[V0], PROMPT, tokens) - given)
                by_new = np.abs(logprobs(versions.models[V1], PROMPT, tokens) - given)
                assert by_old[:old].max() < TOLERANCE
                assert by_new[old:].max() < TOLERANCE
                assert by_old[old:].max() > 0.1  # else these two lines could not tell versions apart
                assert by_new[:old].max() > 0.1

    run(case())


def test_in_place_tells_exactly_which_version_sampled_which_token(sglang: RunningSGLang, versions: Versions) -> None:
    """SGLang counts one token too many to the new version: it had been sampled when the engine stood still."""

    async def case() -> None:
        async with attach(sglang, mode="in_place") as engine:
            await engine.load_weights(versions.make(0))
            task = asyncio.create_task(engine.generate(request("g", generations=8, length=300)))
            await under_way(engine, 100)
            await engine.load_weights(versions.make(1))
            for completion in await task:
                (first, old), (second, _) = completion.spans
                assert (first, second) == (V0, V1)
                tokens, given = completion.completion_tokens, completion.behavior_logprobs
                by_old = np.abs(logprobs(versions.models[V0], PROMPT, tokens) - given)
                assert by_old[:old].max() < TOLERANCE
                assert by_old[old : old + 3].max() > 1e-3  # the first token of the new version is not of the old one

    run(case())


def test_drain_mixes_no_versions(sglang: RunningSGLang, versions: Versions) -> None:
    async def case() -> None:
        async with attach(sglang, mode="drain", room=4) as engine:
            await engine.load_weights(versions.make(0))
            task = asyncio.create_task(engine.generate(request("g", generations=6, length=200)))
            await under_way(engine, 100)
            await engine.load_weights(versions.make(1))
            assert [completion.spans for completion in await task] == [((V0, 200),)] * 4 + [((V1, 200),)] * 2

    run(case())


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_no_prompt_of_older_weights_is_used_again(
    sglang: RunningSGLang, versions: Versions, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def logprobs_apart(*, namespaced: bool) -> float:
        if not namespaced:
            body = generation.sample_body
            monkeypatch.setattr(generation, "sample_body", lambda *a, **k: body(*a, **k | {"cache_key": "same"}))
        async with attach(sglang, mode=mode) as engine:
            worst = 0.0
            for number in (0, 1):
                await engine.load_weights(versions.make(number))
                group = await engine.generate(request(f"g{number}"))
                model = versions.models[Version(1, number)]
                worst = max(
                    worst, *(apart(model, PROMPT, c.completion_tokens, c.behavior_logprobs, 1.0) for c in group)
                )
            return worst

    async def case() -> None:
        assert await logprobs_apart(namespaced=True) < TOLERANCE
        if mode == "in_place":  # the fault that the namespace is there for
            assert await logprobs_apart(namespaced=False) > 1e-3

    run(case())


def test_the_prompt_is_computed_once_for_a_group(sglang: RunningSGLang, versions: Versions) -> None:
    async def case() -> None:
        async with attach(sglang) as engine:
            await engine.load_weights(versions.make(0))
            prompt = np.random.default_rng(3).integers(2, 44, 200).astype(np.int32)
            await engine.generate(request("g", generations=16, length=8, prompt=prompt))
            status = engine.status()
            assert status.prompt_tokens == 16 * 200
            assert status.cached_prompt_tokens >= 15 / 16 * status.prompt_tokens

    run(case())
