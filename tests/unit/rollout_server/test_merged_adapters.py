"""Adapters in the embedded engine: added into the base weights, version after version, exactly."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from protocol.errors import ConfigError
from protocol.versions import Version
from rollout_server.engines.base import EngineFailure, StagedWeights
from rollout_server.engines.live_weights import unique_tensors
from rollout_server.engines.merging import AdapterMerger
from rollout_server.engines.transformers import TransformersEngine, load_model
from tests.adapters import make_adapter, merged_model
from tests.models import build_tiny_model
from tests.unit.rollout_server.plain import check_against_plain, request

V0, V1, V2, V3 = (Version(1, number) for number in range(4))


def run(case: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await case

    asyncio.run(limited())


def engine_on(model: Path) -> TransformersEngine:
    return TransformersEngine(model, room=8, max_model_length=128, dtype="float32", device="cpu")


def holds(engine: TransformersEngine, expected: Any) -> bool:
    wanted = unique_tensors(expected)
    return all(torch.allclose(tensor, wanted[name], atol=1e-6) for name, tensor in engine._tensors.items())


def test_an_adapter_samples_as_the_merged_model_does(tiny_model_dir: Path, tmp_path: Path) -> None:
    weights = make_adapter(tiny_model_dir, tmp_path, V0)

    async def case() -> None:
        async with engine_on(tiny_model_dir) as engine:
            assert engine.info.max_lora_rank >= 256
            assert engine.info.full_weights
            await engine.load_weights(weights)
            asked = request()
            group = await engine.generate(asked)
            assert {completion.spans[0][0] for completion in group} == {V0}
            check_against_plain(merged_model(tiny_model_dir, weights), asked, group)

    run(case())


def test_versions_do_not_add_up_whatever_came_between(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Adapters to all layers, to some, all weights of another run, and back."""
    other = build_tiny_model(tmp_path / "other", seed=5)
    full = StagedWeights(version=V2, path=tmp_path / "full.safetensors")
    save_file(load_file(other / "model.safetensors"), full.path)
    first, again = (make_adapter(tiny_model_dir, tmp_path, version) for version in (V0, V1))
    some = make_adapter(tiny_model_dir, tmp_path, V3, targets=("v_proj",))

    async def case() -> None:
        async with engine_on(tiny_model_dir) as engine:
            for weights in (first, again, some, first):
                await engine.load_weights(weights)
                assert holds(engine, merged_model(tiny_model_dir, weights))
            await engine.load_weights(full)
            assert holds(engine, load_model(other, dtype="float32", device="cpu"))
            await engine.load_weights(first)
            assert holds(engine, merged_model(tiny_model_dir, first))

    run(case())


def test_only_what_an_adapter_changes_is_copied_and_the_model_is_read_once(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    loads: list[dict[str, torch.Tensor]] = []

    def load_base() -> dict[str, torch.Tensor]:
        loads.append(unique_tensors(load_model(tiny_model_dir, dtype="float32", device="cpu")))
        return loads[-1]

    merger = AdapterMerger(tiny_model_dir, load_base)
    first, second = (make_adapter(tiny_model_dir, tmp_path, version) for version in (V0, V1))
    assert first.adapter is not None
    assert merger.merge(first.path, first.adapter).keys() == loads[0].keys()
    assert len(merger.merge(second.path, first.adapter)) == len(load_file(second.path)) // 2
    assert len(loads) == 1
    merger.forget()
    assert merger.merge(second.path, first.adapter).keys() == loads[1].keys()


def test_an_adapter_to_another_base_model_ends_the_server(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Of the same shape: nothing but its weights gives it away."""
    other = build_tiny_model(tmp_path / "other", seed=5)
    weights = make_adapter(other, tmp_path, V0)

    async def case() -> None:
        async with engine_on(tiny_model_dir) as engine:
            with pytest.raises(ConfigError, match=r"adapter is of a base model with other weights .* the same --model"):
                await engine.load_weights(weights)
            assert engine.live is None

    run(case())


def test_a_base_model_that_cannot_be_hashed_ends_the_server(tiny_model_dir: Path, tmp_path: Path) -> None:
    weights = make_adapter(tiny_model_dir, tmp_path, V0)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert weights.adapter is not None
    with pytest.raises(ConfigError, match=r"has no \*\.safetensors file"):
        AdapterMerger(empty, dict).merge(weights.path, weights.adapter)


def test_an_adapter_that_does_not_fit_changes_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    wide = build_tiny_model(tmp_path / "wide", intermediate_size=128)
    good, bad = make_adapter(tiny_model_dir, tmp_path, V0), make_adapter(wide, tmp_path, V1)
    bad = dataclasses.replace(bad, adapter=good.adapter)

    async def case() -> None:
        async with engine_on(tiny_model_dir) as engine:
            await engine.load_weights(good)
            with pytest.raises(EngineFailure, match=r"down_proj.weight is \[32, 128\], the model has \[32, 64\]"):
                await engine.load_weights(bad)
            with pytest.raises(EngineFailure, match=r"none\.safetensors cannot be read"):
                await engine.load_weights(dataclasses.replace(good, path=tmp_path / "none.safetensors"))
            assert engine.live == V0
            assert holds(engine, merged_model(tiny_model_dir, good))

    run(case())


def test_a_copy_that_fails_half_way_is_made_good_by_the_next_adapter(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rollout_server.engines import decode

    weights = [make_adapter(tiny_model_dir, tmp_path, version) for version in (V0, V1, V2)]
    real = decode.copy_weights

    def breaks(staged: dict[str, torch.Tensor], model: dict[str, torch.Tensor]) -> None:
        for tensor in model.values():
            tensor.zero_()
        raise RuntimeError("out of luck")

    async def case() -> None:
        async with engine_on(tiny_model_dir) as engine:
            await engine.load_weights(weights[0])
            monkeypatch.setattr(decode, "copy_weights", breaks)
            with pytest.raises(EngineFailure, match="could not be copied: out of luck"):
                await engine.load_weights(weights[1])
            assert engine.live is None
            monkeypatch.setattr(decode, "copy_weights", real)
            await engine.load_weights(weights[2])
            assert holds(engine, merged_model(tiny_model_dir, weights[2]))

    run(case())
