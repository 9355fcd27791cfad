"""What changes of a model's tensors, set in place: equal to a load of everything, and checked before the first byte."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from protocol.versions import Version
from rollout_server.engines import transformers as engine_module
from rollout_server.engines.base import EngineFailure, StagedWeights
from rollout_server.engines.changes import changes_to, check_changes, share_of
from rollout_server.engines.live_weights import DENSE_ABOVE, Few, copy_weights, read_weights, unique_tensors
from rollout_server.engines.transformers import TransformersEngine
from tests.changes import change_some
from tests.unit.rollout_server.plain import V0, V1, plain_model

V2 = Version(1, 2)
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.005, 0.6])
def test_what_changes_is_the_whole_file_to_the_bit(
    tiny_model_dir: Path, tmp_path: Path, dtype: torch.dtype, share: float
) -> None:
    old = load_file(tiny_model_dir / "model.safetensors")
    new, changes = change_some(old, share=share)
    save_file(new, tmp_path / "new.safetensors")
    by_few, by_all = (plain_model(tiny_model_dir).to(dtype) for _ in range(2))
    staged = read_weights(tmp_path / "new.safetensors", unique_tensors(by_few), changes=changes)
    large = {name for name in changes if new[name].numel() * DENSE_ABOVE > 2}
    assert {name for name, tensor in staged.items() if isinstance(tensor, Few)} >= (large if share < 0.1 else set())
    copy_weights(staged, unique_tensors(by_few))
    copy_weights(read_weights(tmp_path / "new.safetensors", unique_tensors(by_all)), unique_tensors(by_all))
    assert bits(dict(by_few.named_parameters())) == bits(dict(by_all.named_parameters()))
    assert torch.equal(by_few.lm_head.weight, by_few.model.embed_tokens.weight)
    assert bits({"w": by_few.lm_head.weight}) == bits({"w": new[EMBEDDING].to(dtype)})


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_only_the_positions_named_are_written_whatever_the_strides(shape: list[int], data: st.DataObject) -> None:
    turned = torch.zeros(shape[::-1]).permute(*reversed(range(len(shape))))
    new = torch.arange(1.0, 1 + turned.numel())
    positions = torch.tensor(sorted(data.draw(st.sets(st.integers(0, turned.numel() - 1)))), dtype=torch.int64)
    copy_weights({"w": Few(positions, new[positions])}, {"w": turned})
    expected = torch.zeros(turned.numel())
    expected[positions] = new[positions]
    assert torch.equal(turned, expected.reshape(shape))


@pytest.mark.parametrize(
    ("name", "positions", "told"),
    [
        ("lm_head.weight", np.array([1]), "lm_head.weight is not in the model"),
        (NORM, np.array([31, 32]), "positions 31 to 32, allowed are 0 to 31"),
        (NORM, np.array([-1, 2]), "positions -1 to 2, allowed are 0 to 31"),
        (NORM, np.array([2, 2]), "positions that do not ascend"),
        (NORM, np.array([3, 2]), "positions that do not ascend"),
        (NORM, np.array([2], np.int32), r"positions that are int32 \[1\], expected int64 \[n\]"),
        (NORM, np.array([[2]]), r"positions that are int64 \[1, 1\]"),
    ],
)
def test_positions_that_are_none_change_nothing(
    tiny_model_dir: Path, tmp_path: Path, name: str, positions: np.ndarray, told: str
) -> None:
    new, changes = change_some(load_file(tiny_model_dir / "model.safetensors"), share=0.01)
    save_file(new, tmp_path / "new.safetensors")

    async def case() -> None:
        async with TransformersEngine(
            tiny_model_dir, room=2, max_model_length=64, dtype="float32", device="cpu"
        ) as engine:
            await engine.load_weights(StagedWeights(version=V0, path=tiny_model_dir / "model.safetensors"))
            before = bits(engine._tensors)
            wrong = StagedWeights(
                version=V1, path=tmp_path / "new.safetensors", base=V0, changes=changes | {name: positions}
            )
            with pytest.raises(EngineFailure, match=f"changes of new.safetensors do not fit the model: .*{told}"):
                await engine.load_weights(wrong)
            assert (engine.live, bits(engine._tensors)) == (V0, before)
            await engine.load_weights(dataclasses.replace(wrong, changes=changes))
            assert bits(engine._tensors) == bits({name: new[name] for name in before})

    asyncio.run(asyncio.wait_for(case(), 30))


def test_more_than_a_few_wrong_names_are_counted() -> None:
    changes = {f"w{number}": np.array([0]) for number in range(5)}
    with pytest.raises(EngineFailure, match=r"w0 is not in the model; .*w2 is not in the model and 2 more"):
        check_changes("f", changes, {})


def test_changes_count_against_what_they_were_made_from(tmp_path: Path) -> None:
    changes = {"w": np.array([0, 2])}
    weights = StagedWeights(version=V2, path=tmp_path, base=V1, changes=changes)
    assert changes_to(weights, V1) is changes
    assert changes_to(weights, V0) is None
    assert changes_to(weights, None) is None
    assert changes_to(StagedWeights(version=V2, path=tmp_path), None) is None
    assert share_of(changes, {"w": (4,), "v": (2, 2)}) == 0.25


def test_another_base_is_loaded_whole(tiny_model_dir: Path, tmp_path: Path) -> None:
    old = load_file(tiny_model_dir / "model.safetensors")
    other, _ = change_some(old, share=0.5, seed=1)
    new, changes = change_some(old, share=0.01)
    save_file(other, tmp_path / "other.safetensors")
    save_file(new, tmp_path / "new.safetensors")

    async def case() -> None:
        async with TransformersEngine(
            tiny_model_dir, room=2, max_model_length=64, dtype="float32", device="cpu"
        ) as engine:
            weights = StagedWeights(version=V2, path=tmp_path / "new.safetensors", base=V1, changes=changes)
            for before in (V0, None):
                if before is not None:
                    await engine.load_weights(StagedWeights(version=before, path=tmp_path / "other.safetensors"))
                await engine.load_weights(weights)
                assert bits(engine._tensors) == bits({name: new[name] for name in engine._tensors})

    asyncio.run(asyncio.wait_for(case(), 30))


def test_a_load_that_came_between_is_noticed(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two loads are under way: what the second changes is not what the first has put there."""
    new, changes = change_some(load_file(tiny_model_dir / "model.safetensors"), share=0.01)
    save_file(new, tmp_path / "new.safetensors")
    go_on = threading.Event()

    def slow_where_few(path: Path, model: Any, mapping: Any = None, changes: Any = None) -> Any:
        assert changes is None or go_on.wait(20)
        return read_weights(path, model, mapping, changes)

    monkeypatch.setattr(engine_module, "read_weights", slow_where_few)

    async def case() -> None:
        async with TransformersEngine(
            tiny_model_dir, room=2, max_model_length=64, dtype="float32", device="cpu"
        ) as engine:
            await engine.load_weights(first := StagedWeights(version=V0, path=tiny_model_dir / "model.safetensors"))
            few = StagedWeights(version=V2, path=tmp_path / "new.safetensors", base=V0, changes=changes)
            late = asyncio.create_task(engine.load_weights(few))
            await asyncio.sleep(0)
            await engine.load_weights(dataclasses.replace(first, version=V1))
            go_on.set()
            with pytest.raises(EngineFailure, match=r"weights 1.2 change 1.0, and by now 1.1 is live"):
                await late
            assert engine.live == V1

    asyncio.run(asyncio.wait_for(case(), 30))
