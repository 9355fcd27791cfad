"""Few changed elements on their way into SGLang: where they go, and what becomes of a version that does not get there.

The fake SGLang applies them to the bytes of its file, so its answers show whether they are right.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.weights.layout import MappedWeights
from rollout_server.engines.base import EngineFailure, StagedWeights
from rollout_server.engines.sglang import SGLangEngine
from rollout_server.engines.sglang.client import ServerInfo
from rollout_server.engines.sglang.sparse import LOADER, Box, SparseLoads, pickled_order, place
from tests.fake_sglang.driving import V0, V1, V2, child_engine, is_pure, request, run

MakeWeights = Callable[..., StagedWeights]
fake = pytest.mark.usefixtures("fake_path")


@given(st.data())
def test_positions_go_where_a_copy_would_put_them(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    size = int(np.prod(shape))
    source = np.arange(size).reshape(shape)
    cut = tuple(
        slice(begin := data.draw(st.integers(0, length - 1)), data.draw(st.integers(begin + 1, length)))
        for length in shape
    )
    part = source[cut].transpose(data.draw(st.permutations(range(len(shape)))))
    room = np.full(tuple(length + 1 for length in part.shape), -1)
    target = room[tuple(slice(data.draw(st.integers(0, 1)), None) for _ in part.shape)]
    target = target[tuple(slice(length) for length in part.shape)]
    target[...] = part

    def begin_of(view: np.ndarray, whole: np.ndarray) -> int:
        return (view.__array_interface__["data"][0] - whole.__array_interface__["data"][0]) // 8

    box = Box(
        "t", "p", begin_of(part, source), begin_of(target, room), part.shape,
        tuple(stride // 8 for stride in part.strides), tuple(stride // 8 for stride in target.strides),
    )  # fmt: skip
    positions = np.array(sorted(data.draw(st.sets(st.integers(0, size - 1)))), np.int64)
    which, to = place(box, positions)
    assert (room.reshape(-1)[to] == positions[which]).all()
    assert set(positions[which].tolist()) == set(positions.tolist()) & set(part.reshape(-1).tolist())


@given(st.text(max_size=300))
def test_an_order_is_a_pickle_of_a_text_and_an_empty_tensor(text: str) -> None:
    seen = []

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            seen.append((module, name))
            return super().find_class(module, name)

    ((read, tensor),) = Unpickler(io.BytesIO(pickled_order(text))).load()
    assert (read, tensor.numel(), seen) == (text, 0, [("torch", "FloatTensor")])


INFO = {"version": "0.5.23", "model_path": "m", "dtype": "float32", "device": "cpu", "custom_weight_loader": [LOADER]}


@pytest.mark.parametrize(
    ("says", "why"),
    [
        ({}, ""),
        ({"custom_weight_loader": []}, f"SGLang was started without --custom-weight-loader {LOADER}"),
        ({"custom_weight_loader": None}, f"SGLang was started without --custom-weight-loader {LOADER}"),
        ({"quantization": "fp8"}, "SGLang quantizes, has data parallelism or a draft model"),
        ({"dp_size": 2}, "SGLang quantizes, has data parallelism or a draft model"),
        ({"speculative_algorithm": "EAGLE"}, "SGLang quantizes, has data parallelism or a draft model"),
    ],
)
def test_what_sglang_is_decides_whether_it_is_tried(says: dict[str, Any], why: str) -> None:
    info = msgspec.convert({**INFO, **says}, ServerInfo)
    assert SparseLoads(None, info).why_not == why  # type: ignore[arg-type]


def change(weights: StagedWeights, base: StagedWeights) -> StagedWeights:
    """Say of fake weights how they differ from others: in the last number of the file."""
    with MappedWeights.open(weights.path) as mapped:
        last = mapped.layout.specs[-1]
        positions = np.array([last.nbytes // 4 - 1])
    return dataclasses.replace(weights, base=base.version, changes={last.name: positions})


def loads(told: dict[str, Any]) -> tuple[int, int]:
    """(loads of everything, orders) that SGLang was given."""
    calls = told["calls"]
    return calls.get("/update_weights_from_disk", 0), calls.get("/update_weights_from_tensor", 0)


@fake
@pytest.mark.parametrize("mode", ["retract", "in_place", "drain"])
def test_what_differs_is_enough(
    tiny_model_dir: Path, weights: MakeWeights, tmp_path: Path, mode: Literal["retract", "in_place", "drain"]
) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir, weight_update_mode=mode) as (engine, told):
            await engine.load_weights(first := weights(V0))
            assert loads(await told.tell()) == (1, 2), "mapped and compared"
            second = change(weights(V1), first)
            report = await engine.load_weights(second)
            assert report.mismatch is not None
            assert report.mismatch < 1e-6
            assert loads(await told.tell()) == (1, 3)
            for completion in await engine.generate(request()):
                assert completion.spans == ((V1, 12),)
                assert is_pure(completion, second)
            assert {entry.suffix for entry in tmp_path.iterdir()} == {".safetensors"}, "nothing is left beside"

    run(case())


@fake
def test_an_update_that_somebody_has_left_open_is_closed(tiny_model_dir: Path, weights: MakeWeights) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, told):
            assert engine._life is not None
            await engine._life.client.begin_update()
            await engine.load_weights(weights(V0))
            assert loads(await told.tell()) == (1, 2), "mapped and compared"

    run(case())


async def serves_second(engine: SGLangEngine, weights: MakeWeights) -> None:
    first = weights(V0)
    await engine.load_weights(first)
    second = change(weights(V1), first)
    await engine.load_weights(second)
    assert all(is_pure(completion, second) for completion in await engine.generate(request()))
    third = change(weights(V2), second)
    await engine.load_weights(third)
    assert all(is_pure(completion, third) for completion in await engine.generate(request()))
    assert engine.status().restarts == 0


@fake
@pytest.mark.parametrize(
    ("faults", "why", "expected"),
    [
        ({"orders": {"map": "Unmapped: it adds"}}, "map: Unmapped: it adds", (3, 1)),
        ({"orders": {"map": ""}}, "0 of 1 processes answered to map: they must see ", (3, 1)),
        ({"orders": {"compare": "Unmapped: no"}}, "compare: Unmapped: no", (3, 2)),
        ({"orders": {"apply": "KeyError: x"}}, "apply: KeyError: x", (3, 3)),
        ({"refuse": {"/begin_weight_update": 400}}, "/begin_weight_update says 400", (3, 0)),
        ({"refuse": {"/update_weights_from_tensor": 400}}, "/update_weights_from_tensor says 400", (3, 0)),
    ],
)
def test_where_it_cannot_be_everything_is_loaded_and_said_once(
    tiny_model_dir: Path, weights: MakeWeights, caplog: pytest.LogCaptureFixture, faults: dict[str, Any], why: str,
    expected: tuple[int, int],
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO)

    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, told):
            await told.tell(**faults)
            await serves_second(engine, weights)
            full, orders = loads(await told.tell())
            assert (full, orders if "refuse" not in faults else 0) == expected
            (notice,) = [record.getMessage() for record in caplog.records if "engine_not_sparse" in record.getMessage()]
            assert why in notice
            assert "every version is loaded whole" in notice

    run(case())


@fake
def test_a_next_life_is_tried_anew(tiny_model_dir: Path, weights: MakeWeights) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, told):
            await engine.load_weights(first := weights(V0))
            await told.tell(wrong="other")
            with pytest.raises(EngineFailure, match="failed their check"):
                await engine.load_weights(change(weights(V1), first))
            second = change(weights(V1), first)
            await engine.load_weights(second)  # whole, into a life that holds nothing
            assert loads(await told.tell()) == (1, 2)
            await engine.load_weights(third := change(weights(V2), second))
            assert loads(await told.tell()) == (1, 3)
            assert all(is_pure(completion, third) for completion in await engine.generate(request()))

    run(case())


@fake
@pytest.mark.parametrize("path", ["/begin_weight_update", "/update_weights_from_tensor", "/end_weight_update"])
def test_a_load_of_few_that_is_called_off_half_way_ends_the_life(
    tiny_model_dir: Path, weights: MakeWeights, path: str, tmp_path: Path
) -> None:
    import asyncio

    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, told):
            await engine.load_weights(first := weights(V0))
            await told.tell(hold=[path])
            loading = asyncio.create_task(engine.load_weights(change(weights(V1), first)))
            await told.until_held(path)
            loading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await loading
            assert engine.live is None
            await engine.load_weights(weights(V2))
            assert (await engine.generate(request()))[0].spans == ((V2, 12),)
            assert engine.status().restarts == 1

    run(case())


@fake
def test_wrong_positions_are_refused_before_sglang_hears_of_them(tiny_model_dir: Path, weights: MakeWeights) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, told):
            await engine.load_weights(first := weights(V0))
            before = (await told.tell())["calls"]
            good = change(weights(V1), first)
            (name,) = good.changes
            for positions in (good.changes[name] + 1, -1 - good.changes[name], np.array([1, 1])):
                with pytest.raises(EngineFailure, match=r"changes of 1.1.safetensors do not fit the model: "):
                    await engine.load_weights(dataclasses.replace(good, changes={name: positions}))
            assert (await told.tell())["calls"] == before
            assert engine.live == V0

    run(case())


@fake
def test_what_changes_too_much_or_from_another_version_is_loaded_whole(
    tiny_model_dir: Path, weights: MakeWeights
) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir) as (engine, told):
            await engine.load_weights(first := weights(V0))
            other = change(weights(V1), first)
            await engine.load_weights(dataclasses.replace(other, base=V2))
            assert loads(await told.tell()) == (2, 2)
            with MappedWeights.open(first.path) as mapped:
                everything = {spec.name: np.arange(spec.nbytes // 4) for spec in mapped.layout.specs}
            await engine.load_weights(dataclasses.replace(weights(V2), base=V1, changes=everything))
            assert loads(await told.tell()) == (3, 2)
            assert all(is_pure(completion, weights(V2)) for completion in await engine.generate(request()))

    run(case())
