"""The transformers engine around its decoder: weights, refusals, failures, and the pieces beside it."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import rollout_server.engines.decode
from protocol.errors import ConfigError
from protocol.identity import tokenizer_digest
from protocol.waits import Waits
from rollout_server.config import ScriptedOptions, ServerConfig
from rollout_server.engines import create_engine
from rollout_server.engines import transformers as engine_module
from rollout_server.engines.base import EngineFailure, GenerationRequest, StagedWeights
from rollout_server.engines.decode import Decoder
from rollout_server.engines.live_weights import digest_of, unique_tensors
from rollout_server.engines.text import load_decoder
from rollout_server.engines.transformers import TransformersEngine, load_model
from tests.models import ALPHABET, EOS, EOS_ID, PAD, VOCAB_SIZE, build_tiny_model, encode
from tests.unit.rollout_server.plain import V0, V1, check_against_plain, plain_logprobs, plain_model, request


def run(case: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await case

    asyncio.run(limited())


def broken_by(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path, Path], Path]:
    def write(model_dir: Path, target: Path) -> Path:
        tensors = load_file(model_dir / "model.safetensors")
        change(tensors)
        save_file(tensors, target / "broken.safetensors")
        return target / "broken.safetensors"

    return write


NORM, GATE = "model.norm.weight", "model.layers.0.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (broken_by(lambda t: t.pop(NORM)), r"broken.safetensors do not fit the model: model.norm.weight is missing"),
        (broken_by(lambda t: t.update({"extra": torch.zeros(1)})), r"extra is not in the model"),
        (
            broken_by(lambda t: t.update({NORM: torch.zeros(31)})),
            r"model.norm.weight is float32 \[31\], .* float32 \[32\]",
        ),
        (broken_by(lambda t: t.update({GATE: t[GATE].T.contiguous()})), r"gate_proj.weight is float32 \[32, 64\]"),
        (broken_by(lambda t: t.update({NORM: torch.zeros(32, dtype=torch.int32)})), r"model.norm.weight is int32"),
        (
            broken_by(lambda t: [t.pop(name) for name in list(t)[:5]] and t.update(x=torch.zeros(1))),
            r"; .* and 3 more$",
        ),
        (lambda _model, target: target / "none.safetensors", r"none.safetensors cannot be read"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(
    tiny_model_dir: Path, tmp_path: Path, write: Callable[[Path, Path], Path], message: str
) -> None:
    async def case() -> None:
        async with TransformersEngine(
            tiny_model_dir, room=2, max_model_length=64, dtype="float32", device="cpu"
        ) as engine:
            good = StagedWeights(version=V0, path=tiny_model_dir / "model.safetensors")
            await engine.load_weights(good)
            with pytest.raises(EngineFailure, match=message):
                await engine.load_weights(StagedWeights(version=V1, path=write(tiny_model_dir, tmp_path)))
            assert engine.live == V0
            check_against_plain(plain_model(tiny_model_dir), request(), await engine.generate(request()))

    run(case())


def test_a_copy_that_fails_half_way_is_a_loss(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def case() -> None:
        async with TransformersEngine(
            tiny_model_dir, room=2, max_model_length=64, dtype="float32", device="cpu"
        ) as engine:
            weights = StagedWeights(version=V0, path=tiny_model_dir / "model.safetensors")
            await engine.load_weights(weights)
            lost = asyncio.ensure_future(engine.lost.wait())
            await asyncio.sleep(0)

            def fail(*tensors: object) -> None:
                raise RuntimeError("out of memory")

            monkeypatch.setattr(rollout_server.engines.decode, "copy_weights", fail)
            with pytest.raises(EngineFailure, match=r"weights 1\.\d could not be copied: out of memory"):
                await engine.load_weights(weights)
            assert engine.live is None
            await asyncio.wait_for(lost, 10)
            monkeypatch.undo()
            await engine.load_weights(weights)
            assert engine.live == V0

    run(case())


def test_info_describes_model_and_tokenizer(tiny_model_dir: Path) -> None:
    async def case() -> None:
        async with TransformersEngine(
            tiny_model_dir, room=3, max_model_length=64, dtype="float32", device="cpu"
        ) as engine:
            assert (engine.info.engine, engine.info.room, engine.info.vocab_size) == ("transformers", 3, VOCAB_SIZE)
            assert engine.info.model_digest == digest_of(unique_tensors(plain_model(tiny_model_dir)))
            vocabulary = {token: index for index, token in enumerate([PAD, EOS, *ALPHABET])}
            assert engine.info.tokenizer_digest == tokenizer_digest(vocabulary)

    run(case())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.ones(64, np.int32), r"group g: a prompt of 64 tokens leaves no room for a completion: .* 64 tokens in all"),
        (np.array([2, VOCAB_SIZE], np.int32), rf"prompt tokens 2 to {VOCAB_SIZE}: allowed is 0 to {VOCAB_SIZE - 1}"),
        (np.array([-1, 3], np.int32), r"prompt tokens -1 to 3"),
    ],
)
def test_a_bad_request_is_refused_alone(tiny_model_dir: Path, tokens: np.ndarray, message: str) -> None:
    async def case() -> None:
        async with TransformersEngine(
            tiny_model_dir, room=4, max_model_length=64, dtype="float32", device="cpu"
        ) as engine:
            await engine.load_weights(StagedWeights(version=V0, path=tiny_model_dir / "model.safetensors"))
            good = asyncio.create_task(engine.generate(request("good")))
            bad = GenerationRequest(
                group_id="g", prompt_tokens=tokens, num_generations=2, sampling=request().sampling, seed=0
            )
            with pytest.raises(EngineFailure, match=message):
                await engine.generate(bad)
            assert len(await good) == 3

    run(case())


def test_the_models_own_limit_counts(tmp_path: Path) -> None:
    model_dir = build_tiny_model(tmp_path, max_position_embeddings=12)

    async def case() -> None:
        async with TransformersEngine(model_dir, room=4, max_model_length=64, dtype="float32", device="cpu") as engine:
            await engine.load_weights(StagedWeights(version=V0, path=model_dir / "model.safetensors"))
            assert {len(c.completion_tokens) for c in await engine.generate(request(stops=()))} == {6}

    run(case())


def test_an_error_in_the_model_fails_its_requests_and_not_the_engine(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faults = iter([False, False, False, True])

    def load_faulty(*args: Any, **kwargs: Any) -> Any:
        model = load_model(*args, **kwargs)

        def maybe_fail(_module: Any, _args: Any) -> None:
            if next(faults, False):
                raise RuntimeError("the fourth forward fails")

        model.register_forward_pre_hook(maybe_fail)
        return model

    monkeypatch.setattr(engine_module, "load_model", load_faulty)

    async def case() -> None:
        async with TransformersEngine(
            tiny_model_dir, room=4, max_model_length=64, dtype="float32", device="cpu"
        ) as engine:
            await engine.load_weights(StagedWeights(version=V0, path=tiny_model_dir / "model.safetensors"))
            tasks = [asyncio.create_task(engine.generate(request(f"g{i}", stops=()))) for i in range(3)]
            for task in tasks:
                with pytest.raises(EngineFailure, match="decoding failed: RuntimeError: the fourth forward fails"):
                    await task
            assert engine.status().samples_running == engine.status().samples_waiting == 0
            check_against_plain(plain_model(tiny_model_dir), request(), await engine.generate(request()))

    with caplog.at_level(logging.ERROR):
        run(case())
    assert [record.getMessage() for record in caplog.records] == [
        "decoding failed; every request under way fails with it"
    ]


def test_samples_wait_from_the_moment_they_are_asked_for(tiny_model_dir: Path) -> None:
    """The decoder's thread takes them between two steps; a server that said nothing of them would be sent more."""
    held, let_go = threading.Event(), threading.Event()

    def hold(decoder: Decoder) -> None:
        held.set()
        let_go.wait(20)

    async def case() -> None:
        async with TransformersEngine(
            tiny_model_dir, room=4, max_model_length=64, dtype="float32", device="cpu"
        ) as engine:
            await engine.load_weights(StagedWeights(version=V0, path=tiny_model_dir / "model.safetensors"))
            engine._put(hold)
            await asyncio.to_thread(held.wait, 20)
            task = asyncio.create_task(engine.generate(request()))
            await asyncio.sleep(0)
            asked = engine.status().samples_waiting
            let_go.set()
            await task
            assert asked == request().num_generations > 0
            assert engine.status().samples_waiting == 0

    run(case())


def test_bfloat16_is_served_near_float32(tiny_model_dir: Path) -> None:
    async def case() -> None:
        async with TransformersEngine(
            tiny_model_dir, room=4, max_model_length=64, dtype="bfloat16", device="cpu"
        ) as engine:
            await engine.load_weights(StagedWeights(version=V0, path=tiny_model_dir / "model.safetensors"))
            plain = plain_model(tiny_model_dir)
            for completion in await engine.generate(request()):
                expected = plain_logprobs(plain, request().prompt_tokens, completion.completion_tokens)
                difference = np.abs(completion.behavior_logprobs - expected)
                assert 1e-5 < difference.max() < 0.5

    run(case())


# What is refused at start


def test_a_sliding_window_is_refused(tmp_path: Path) -> None:
    model_dir = build_tiny_model(tmp_path, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    with pytest.raises(
        ConfigError, match=r"Qwen3ForCausalLM needs DynamicSlidingWindowLayer; engine transformers serves"
    ):
        load_model(model_dir, dtype="float32", device="cpu")


def test_a_recurrent_model_is_refused(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"engine transformers serves models whose every layer attends|cannot be loaded"
    ):
        load_model(tmp_path, dtype="float32", device="cpu")


@pytest.mark.parametrize("content", ["nothing", "empty", "no tokenizer"])
def test_a_directory_without_a_model_is_one_clear_line(content: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    model_dir = tmp_path / "model"
    message = "no such directory; give one with config.json"
    if content == "empty":
        model_dir.mkdir()
        message = "cannot be loaded: "
    if content == "no tokenizer":
        model_dir.mkdir()
        for name in ("config.json", "model.safetensors"):
            (model_dir / name).symlink_to(tiny_model_dir / name)
        message = "its tokenizer has no vocabulary; the directory needs tokenizer.json"

    async def case() -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            async with TransformersEngine(model_dir, room=1, max_model_length=64, dtype="float32", device="cpu"):
                pass
        assert "\n" not in str(caught.value)

    run(case())


# The small pieces beside it


def test_the_scripted_engine_needs_no_torch() -> None:
    code = (
        "import sys, rollout_server.engines.scripted; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_decoder_skips_special_tokens_and_keeps_spaces(tiny_model_dir: Path) -> None:
    decode = load_decoder(tiny_model_dir)
    assert decode(np.array([*encode(" 4 , 2 ".replace(",", "+")), EOS_ID], np.int32).tolist()) == " 4 + 2 "
    assert decode([]) == ""


def test_create_engine_follows_the_configuration(tiny_model_dir: Path) -> None:
    from rollout_server.engines.scripted import ScriptedEngine

    scripted = create_engine(ServerConfig(engine="scripted", room=5, scripted=ScriptedOptions(vocab_size=9)), Waits())
    assert isinstance(scripted, ScriptedEngine)
    assert (scripted.info.room, scripted.info.vocab_size) == (5, 9)
    assert isinstance(create_engine(ServerConfig(model=str(tiny_model_dir), device="cpu"), Waits()), TransformersEngine)
    with pytest.raises(ConfigError, match="model is empty: engine transformers needs"):
        create_engine(ServerConfig(device="cpu"), Waits())
