"""No version counts as live on trust: weights that SGLang did not get as they were meant are found out.

The faults are planted where nobody on our side can see them: SGLang is given another file than the one that was
checked, and says that all went well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from protocol.versions import Version
from rollout_server.engines.base import EngineFailure, SamplesWithheld, StagedWeights
from rollout_server.engines.sglang import SGLangEngine, loading, swap
from rollout_server.engines.sglang.check import FIRST_LIMIT
from tests.sglang.driving import Versions, attach, request, run
from tests.sglang_cpu.launch import RunningSGLang

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(120)]
V0, V1 = Version(1, 0), Version(1, 1)
Tensors = dict[str, torch.Tensor]
Fault = Callable[[Tensors, Tensors], Tensors]


@pytest.fixture
def versions(tmp_path: Path) -> Versions:
    return Versions(tmp_path)


def swapped_tensors(right: Tensors, before: Tensors) -> Tensors:
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]
    return right | {names[0]: right[names[1]], names[1]: right[names[0]]}


def one_layer_not_loaded(right: Tensors, before: Tensors) -> Tensors:
    return right | {name: tensor for name, tensor in before.items() if name.startswith("model.layers.1.")}


def zeros(right: Tensors, before: Tensors) -> Tensors:
    return right | {"model.layers.0.self_attn.o_proj.weight": torch.zeros(32, 32)}


def yesterdays(right: Tensors, before: Tensors) -> Tensors:
    return before


def give_another_file(
    monkeypatch: pytest.MonkeyPatch,
    directory: Path,
    right: Path,
    before: Path,
    fault: Callable[[Tensors, Tensors], Tensors],
) -> list[Path]:
    """Have SGLang load a faulty file; return the list of what it was really given."""
    faulty = directory / "faulty" / "model.safetensors"
    faulty.parent.mkdir()
    save_file(fault(load_file(right), load_file(before)), faulty)
    given: list[Path] = []

    def link(file: Path) -> Path:
        given.append(file)
        return faulty.parent

    monkeypatch.setattr(loading, "link_weights", link)
    return given


async def is_lost(engine: SGLangEngine) -> None:
    while engine.live is not None:
        await engine.lost.wait()


@pytest.mark.parametrize(
    ("fault", "told_by"),
    [
        (swapped_tensors, "its logprobs differ from the learner's by"),
        (one_layer_not_loaded, "its logprobs differ from the learner's by"),
        (zeros, "its logprobs differ from the learner's by"),
        (yesterdays, "its checksum is still [0-9a-f]{16}, though the weights differ"),
    ],
)
def test_wrong_weights_are_found_out(
    sglang: RunningSGLang, versions: Versions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault, told_by: str
) -> None:
    async def case() -> None:
        async with attach(sglang) as engine:
            first, second = versions.make(0, canaries=True), versions.make(1, canaries=True)
            report = await engine.load_weights(first)
            assert report.mismatch < 1e-6
            assert 0 <= report.mismatch_kl < 1e-9
            with monkeypatch.context() as planted:
                given = give_another_file(planted, tmp_path, second.path, first.path, fault)
                with pytest.raises(EngineFailure, match=rf"weights 1\.1 failed their check in SGLang: {told_by}"):
                    await engine.load_weights(second)
                assert given == [second.path]
            await is_lost(engine)
            report = await engine.load_weights(second)  # SGLang is back, and gets what it should have got
            assert (engine.live, engine.status().restarts) == (V1, 1)
            assert report.mismatch < 1e-6

    run(case())


def test_the_first_version_is_not_trusted_either(
    sglang: RunningSGLang, versions: Versions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def case() -> None:
        async with attach(sglang) as engine:
            first, other = versions.make(0, canaries=True), versions.make(1)
            give_another_file(monkeypatch, tmp_path, first.path, other.path, one_layer_not_loaded)
            with pytest.raises(EngineFailure, match=f"differ from the learner's by .*; allowed are {FIRST_LIMIT}"):
                await engine.load_weights(first)
            assert engine.live is None

    run(case())


def test_another_engine_s_checksum_must_be_the_same(sglang: RunningSGLang, versions: Versions) -> None:
    async def case() -> None:
        async with attach(sglang) as engine:
            staged = versions.make(0)
            kind, _, digest = (await engine.load_weights(staged)).checksum.partition(":")
            others = (f"{kind}:{digest}", "sglang-of-another-kind:0123")
            again = StagedWeights(version=V1, path=staged.path, digest=staged.digest, checksums=others)
            assert (await engine.load_weights(again)).checksum == f"{kind}:{digest}"
            wrong = StagedWeights(version=V1, path=staged.path, digest=staged.digest, checksums=(f"{kind}:0123",))
            with pytest.raises(EngineFailure, match="another engine of its kind has 0123"):
                await engine.load_weights(wrong)

    run(case())


@pytest.mark.parametrize("good", [True, False])
def test_a_group_that_ends_during_the_check_is_held_back(
    sglang: RunningSGLang, versions: Versions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: bool
) -> None:
    async def case() -> None:
        async with attach(sglang) as engine:
            first, second = versions.make(0, canaries=True), versions.make(1, canaries=True)
            await engine.load_weights(first)
            if not good:
                give_another_file(monkeypatch, tmp_path, second.path, first.path, zeros)
            swapped, judged = asyncio.Event(), asyncio.Event()
            score = swap.score

            async def late_score(*arguments: object) -> object:
                swapped.set()
                await judged.wait()
                return await score(*arguments)

            monkeypatch.setattr(swap, "score", late_score)
            group = asyncio.create_task(engine.generate(request("g", length=60)))
            while engine.status().samples_running < 4:
                await asyncio.sleep(0.001)
            load = asyncio.create_task(engine.load_weights(second))
            await swapped.wait()
            while engine.status().samples_running:  # every sample ends while the new version is still being judged
                await asyncio.sleep(0.001)
            assert engine.live == V0
            assert not group.done()
            judged.set()
            if good:
                await load
                assert {spans[-1][0] for spans in (c.spans for c in await group)} == {V1}
                return
            with pytest.raises(SamplesWithheld, match=r"weights 1\.1 failed their check"):
                await group
            with pytest.raises(SamplesWithheld):
                await load

    run(case())


def test_a_file_that_does_not_fit_is_refused_before_sglang_hears_of_it(
    sglang: RunningSGLang, versions: Versions, tmp_path: Path
) -> None:
    async def case() -> None:
        async with attach(sglang) as engine:
            staged = versions.make(0)
            await engine.load_weights(staged)
            before = await engine._life.client.checksum()
            tensors = load_file(staged.path)
            name = "model.layers.0.mlp.up_proj.weight"
            turned = tensors[name].T.contiguous()
            for number, (wrong, told) in enumerate(
                [
                    (
                        {**tensors, name: turned},
                        rf"{name} is \[32, 64\], the model has \[64, 32\]",
                    ),
                    ({k: v for k, v in tensors.items() if k != name}, f"{name} is missing"),
                    ({**tensors, "more": torch.zeros(1)}, "more is not in the model"),
                    ({**tensors, name: tensors[name].to(torch.int32)}, f"{name} is I32, weights are F32, BF16, F16"),
                ]
            ):
                save_file(wrong, path := tmp_path / f"wrong-{number}.safetensors")
                with pytest.raises(EngineFailure, match=f"do not fit the model: {told}"):
                    await engine.load_weights(StagedWeights(version=V1, path=path))
                assert engine.live == V0
            assert await engine._life.client.checksum() == before
            assert engine.status().restarts == 0

    run(case())
