"""Versions that are adapters, in SGLang (the fake): beside each other, without a pause, gone when nobody samples."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from protocol.completions import Completion
from protocol.errors import ConfigError
from protocol.versions import Version
from protocol.waits import Waits
from rollout_server.engines.base import EngineFailure, SamplesWithheld, StagedWeights
from rollout_server.engines.sglang import SGLangEngine
from rollout_server.engines.sglang.host import free_port
from tests.adapters import make_adapter
from tests.fake_sglang.driving import (
    ADMIN_KEY,
    API_KEY,
    V0,
    V1,
    V2,
    V3,
    child_engine,
    content_of,
    make_canaries,
    make_config,
    request,
    run,
    running_fake,
    until,
)
from tests.fake_sglang.sglang.weights import adapted, logprob
from tests.models import build_tiny_model

pytestmark = pytest.mark.usefixtures("fake_path")
MakeAdapter = Callable[..., StagedWeights]
LONG = 200


@pytest.fixture
def adapter(tiny_model_dir: Path, tmp_path: Path) -> MakeAdapter:
    def make(version: Version, *, canaries: bool = True, **options: Any) -> StagedWeights:
        weights = make_adapter(tiny_model_dir, tmp_path, version, **options)
        found = make_canaries(held(tiny_model_dir, weights)) if canaries else None
        return dataclasses.replace(weights, canaries=found)

    return make


def held(model: Path, weights: StagedWeights) -> str:
    """What the fake says its weights are, with the adapter."""
    return adapted(content_of(model / "model.safetensors"), content_of(weights.path))


def is_wholly(completion: Completion, model: Path, weights: StagedWeights) -> bool:
    content = held(model, weights)
    expected = [logprob(content, content, token) for token in completion.completion_tokens.tolist()]
    pure = np.allclose(completion.behavior_logprobs, expected, atol=1e-6)
    return bool(pure) and completion.spans == ((weights.version, len(completion.completion_tokens)),)


def test_a_sample_keeps_the_adapter_it_began_with_and_nothing_pauses(
    tiny_model_dir: Path, adapter: MakeAdapter
) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir, room=4, max_lora_rank=2) as (engine, fake):
            assert (engine.info.max_lora_rank, engine.info.full_weights) == (2, False)
            old, new = adapter(V0), adapter(V1)
            await engine.load_weights(old)
            await fake.tell(stop_at=10)
            group = asyncio.create_task(engine.generate(request("a", generations=6, length=LONG)))
            await fake.until(lambda told: told["lengths"] == [10] * 4)
            report = await engine.load_weights(new)
            assert report.pause_s == 0
            assert report.mismatch is not None
            assert report.mismatch < 1e-6
            assert len((await fake.tell(stop_at=0))["adapters"]) == 2
            completions = await group
            assert all(is_wholly(completion, tiny_model_dir, old) for completion in completions[:4])
            assert all(is_wholly(completion, tiny_model_dir, new) for completion in completions[4:])
            told = await fake.until(lambda told: len(told["adapters"]) == 1)
            assert told["adapters"][0].endswith(str(V1)), "the old one goes with its last sample"
            assert engine.status().paused_s == 0
            assert not {"/pause_generation", "/update_weights_from_disk"} & told["calls"].keys()

    run(case())


def test_the_prompt_is_computed_under_the_samples_adapter(tiny_model_dir: Path, adapter: MakeAdapter) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir, max_lora_rank=2, max_model_length=1024) as (engine, fake):
            for version in (V0, V1, V2):
                weights = adapter(version)
                await engine.load_weights(weights)
                for completion in await engine.generate(request(str(version), prompt=300)):
                    assert is_wholly(completion, tiny_model_dir, weights)
            bodies = (await fake.tell())["bodies"]
            prefills = [b for b in bodies if not b["sampling_params"]["max_new_tokens"] and "return_logprob" not in b]
            assert len({body["lora_path"] for body in prefills}) == 3

    run(case())


def test_adapters_that_nobody_samples_with_are_unloaded(
    tiny_model_dir: Path, adapter: MakeAdapter, tmp_path: Path
) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir, max_lora_rank=2) as (engine, fake):
            for version in (V0, V1, V2, V3):
                await engine.load_weights(adapter(version))
                await engine.generate(request(str(version)))
            told = await fake.until(lambda told: len(told["adapters"]) == 1)
            assert told["calls"]["/unload_lora_adapter"] == 3
            assert told["calls"]["/weights_checker"] == 1, "no adapter changes the base model"
            assert not [path for path in tmp_path.iterdir() if path.is_dir()], "SGLang's directories are gone"

    run(case())


def test_an_adapter_that_sglang_refuses_leaves_the_one_before(tiny_model_dir: Path, adapter: MakeAdapter) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir, max_lora_rank=2) as (engine, fake):
            await engine.load_weights(adapter(V0))
            await fake.tell(fail_update="not today")
            with pytest.raises(EngineFailure, match=r"adapter 1\.1: .*not today"):
                await engine.load_weights(adapter(V1))
            assert engine.live == V0
            assert all(c.spans[0][0] == V0 for c in await engine.generate(request()))
            await fake.tell(fail_update="")
            await engine.load_weights(adapter(V1))
            assert engine.live == V1
            assert engine.status().restarts == 0

    run(case())


def test_an_adapter_that_could_not_be_tried_is_unloaded_and_tried_again(
    tiny_model_dir: Path, adapter: MakeAdapter
) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir, max_lora_rank=2) as (engine, fake):
            await engine.load_weights(adapter(V0))
            await fake.tell(refuse={"/generate": 500})
            with pytest.raises(EngineFailure, match=r"adapter 1\.1: .* says 500"):
                await engine.load_weights(adapter(V1))
            assert engine.live == V0
            await fake.tell(refuse={})
            told = await fake.until(lambda told: len(told["adapters"]) == 1)
            assert told["adapters"][0].endswith(str(V0))
            await engine.load_weights(adapter(V1))
            assert engine.live == V1

    run(case())


@pytest.mark.parametrize("wrong", ["stale", "other"])
def test_an_adapter_that_says_something_else_never_samples(
    tiny_model_dir: Path, adapter: MakeAdapter, wrong: str
) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir, max_lora_rank=2) as (engine, fake):
            await engine.load_weights(adapter(V0))
            await fake.tell(wrong=wrong)
            with pytest.raises(SamplesWithheld, match=r"weights 1\.1 failed their check .* nats a token"):
                await engine.load_weights(adapter(V1))
            await until(lambda: engine.status().restarts == 1)
            assert engine.live is None
            await engine.load_weights(adapter(V2))  # waits for the next life, which knows no adapter
            assert all(is_wholly(c, tiny_model_dir, adapter(V2)) for c in await engine.generate(request()))

    run(case())


def test_what_does_not_fit_is_not_told_to_sglang(tiny_model_dir: Path, adapter: MakeAdapter, tmp_path: Path) -> None:
    async def case() -> None:
        async with child_engine(tiny_model_dir, max_lora_rank=2, lora_target_modules=["q_proj"]) as (engine, fake):
            with pytest.raises(EngineFailure, match=r"down_proj.weight is not of q_proj \(lora_target_modules\)"):
                await engine.load_weights(adapter(V0))
            good = adapter(V1, targets=("q_proj",))
            cut = tmp_path / "cut.safetensors"
            save_file({name: t[..., :2].contiguous() for name, t in load_file(good.path).items()}, cut)
            with pytest.raises(EngineFailure, match=r"q_proj.weight is \[\d+, 2\], the model has \[32, 32\]"):
                await engine.load_weights(dataclasses.replace(good, path=cut))
            other = build_tiny_model(tmp_path / "other", seed=3)
            with pytest.raises(ConfigError, match="of a base model with other weights"):
                await engine.load_weights(make_adapter(other, tmp_path, V2, targets=("q_proj",)))
            assert "/load_lora_adapter" not in (await fake.tell())["calls"]
            await engine.load_weights(good)
            assert engine.live == V1

    run(case())


def test_what_another_server_left_in_sglang_is_not_taken_for_ours(tiny_model_dir: Path, adapter: MakeAdapter) -> None:
    """Versions of every run begin with 1.0, and SGLang refuses a name that it has."""

    async def case() -> None:
        port = free_port(0)
        with running_fake(tiny_model_dir, port, max_lora_rank=2):
            config = make_config(
                tiny_model_dir, engine_url=f"http://127.0.0.1:{port}", engine_api_key=API_KEY,
                engine_admin_key=ADMIN_KEY, max_lora_rank=2,
            )  # fmt: skip
            for _ in range(2):
                async with SGLangEngine(config, Waits()) as engine:
                    await engine.load_weights(adapter(V0))
                    assert all(is_wholly(c, tiny_model_dir, adapter(V0)) for c in await engine.generate(request()))

    run(case())


@pytest.mark.parametrize(
    ("says", "rank", "match"),
    [
        ({}, 4, r"takes no adapters, and max_lora_rank is 4 here: it needs --enable-lora --max-lora-rank 4 --lora-tar"),
        (
            {"enable_lora": True, "max_lora_rank": 2},
            4,
            r"adapters of rank 2 \(its --max-lora-rank\), and max_lora_rank",
        ),
        (
            {"enable_lora": True, "max_lora_rank": 2},
            0,
            r"serves adapters \(its --enable-lora\), and max_lora_rank is 0",
        ),
    ],
)
def test_an_sglang_that_serves_something_else_is_refused(
    tiny_model_dir: Path, says: dict[str, Any], rank: int, match: str
) -> None:
    async def case() -> None:
        port = free_port(0)
        with running_fake(tiny_model_dir, port, says=says):
            config = make_config(
                tiny_model_dir, engine_url=f"http://127.0.0.1:{port}", engine_api_key=API_KEY,
                engine_admin_key=ADMIN_KEY, max_lora_rank=rank,
            )  # fmt: skip
            with pytest.raises(ConfigError, match=match):
                await SGLangEngine(config, Waits()).__aenter__()

    run(case())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"engine": "transformers"}, r"max_lora_rank 8 is for engine sglang, and engine is transformers, which takes"),
        (
            {"sglang": {"dp-size": 2}},
            r"sglang.dp-size 2 with max_lora_rank 8: SGLang loads adapters .* several servers",
        ),
        ({"sglang": {"enable-lora": True}}, r"sglang.enable-lora: enable-lora is --max-lora-rank here; leave it out"),
        ({"lora_target_modules": []}, r"at least 1 item"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_loads(
    tiny_model_dir: Path, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        make_config(tiny_model_dir, **{"max_lora_rank": 8, **options})
