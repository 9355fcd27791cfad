"""The transformers engine against plain forwards of the same model: logprobs, prefills, swaps, refusals."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from protocol.completions import Completion
from protocol.errors import ConfigError
from protocol.messages import FinishReason, Sampling, tokenizer_digest
from protocol.versions import Version
from rollout_server.config import ScriptedOptions, ServerConfig
from rollout_server.engines import create_engine
from rollout_server.engines import transformers as engine_module
from rollout_server.engines.base import EngineFailure, GenerationRequest, StagedWeights
from rollout_server.engines.decode import Decoder
from rollout_server.engines.live_weights import digest_of, read_weights, unique_tensors
from rollout_server.engines.rows import Job
from rollout_server.engines.text import load_decoder
from rollout_server.engines.transformers import TransformersEngine, load_model
from tests.models import ALPHABET, EOS, EOS_ID, PAD, VOCAB_SIZE, build_tiny_model, encode

V0, V1 = Version(1, 0), Version(1, 1)
STOPS = (EOS_ID, *encode("xyz"))


def request(
    group: str = "g",
    *,
    prompt: str = "12+34=",
    seed: int = 1,
    generations: int = 3,
    length: int = 30,
    stops: tuple[int, ...] = STOPS,
    **sampling: float,
) -> GenerationRequest:
    return GenerationRequest(
        group_id=group,
        prompt_tokens=np.array(encode(prompt), np.int32),
        num_generations=generations,
        sampling=Sampling(max_completion_length=length, stop_token_ids=stops, **sampling),  # type: ignore[arg-type]
        seed=seed,
    )


def plain_logprobs(model: Any, prompt: np.ndarray, completion: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """[L] by one forward over prompt and completion, no cache."""
    sequence = torch.from_numpy(np.concatenate([prompt, completion])).long()[None]
    with torch.no_grad():
        logprobs = torch.log_softmax(model(sequence).logits[0].float() / temperature, -1)
    steps = torch.arange(len(prompt) - 1, sequence.shape[1] - 1)
    return logprobs[steps, sequence[0, len(prompt) :]].numpy()


class Bench:
    """A decoder driven by hand, with the prompt lengths that its model was asked to prefill."""

    def __init__(self, model_dir: Path, *, room: int = 4, max_length: int = 256) -> None:
        self.model = load_model(model_dir, dtype="float32", device="cpu")
        self.forwards: list[tuple[int, int]] = []
        self.model.register_forward_pre_hook(
            lambda _module, _args, kwargs: self.forwards.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        self.decoder = Decoder(self.model, room=room, max_length=max_length)
        self.load(model_dir, V0)
        self.results: dict[str, list[Completion] | EngineFailure] = {}

    def load(self, model_dir: Path, version: Version) -> None:
        self.decoder.load(read_weights(model_dir / "model.safetensors", unique_tensors(self.model)), version)

    def submit(self, wanted: GenerationRequest) -> None:
        self.decoder.submit(Job(request=wanted, reply=lambda result: self.results.update({wanted.group_id: result})))

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.decoder.step()

    def finish(self) -> None:
        while not self.decoder.idle:
            self.step()

    def completions(self, group: str) -> list[Completion]:
        result = self.results[group]
        assert isinstance(result, list)
        return result


def check_against_plain(model: Any, wanted: GenerationRequest, group: list[Completion]) -> None:
    for completion in group:
        expected = plain_logprobs(
            model, wanted.prompt_tokens, completion.completion_tokens, wanted.sampling.temperature or 1.0
        )
        np.testing.assert_allclose(completion.behavior_logprobs, expected, atol=1e-5)


@pytest.fixture(scope="module")
def other_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with other weights."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "other", seed=5)


@pytest.fixture(scope="module")
def untied_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "llama"
    return build_tiny_model(directory, architecture="llama", tie_word_embeddings=False)


@pytest.fixture(name="fixtures")
def pytest_request(request: pytest.FixtureRequest) -> pytest.FixtureRequest:
    """pytest's `request`, whose name the helper above has."""
    return request


def plain_model(model_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@pytest.mark.parametrize("which", ["tiny_model_dir", "untied_llama_dir"])
def test_logprobs_equal_a_plain_forward(which: str, fixtures: pytest.FixtureRequest) -> None:
    model_dir = fixtures.getfixturevalue(which)
    bench = Bench(model_dir, room=5)
    wanted = [
        request(f"g{i}", prompt="1" * length, seed=i, generations=3, length=24 + i, temperature=temperature)
        for i, (length, temperature) in enumerate([(1, 1.0), (7, 1.0), (3, 0.6), (40, 1.7), (2, 0.0), (9, 1.0)])
    ]
    for each in wanted:
        bench.submit(each)
    bench.finish()
    plain = plain_model(model_dir)
    ends = set()
    for each in wanted:
        check_against_plain(plain, each, bench.completions(each.group_id))
        ends |= {len(c.completion_tokens) for c in bench.completions(each.group_id)}
    assert len(ends) > 5  # rows did end at different times, so the batch was compacted


def test_greedy_equals_generate(tiny_model_dir: Path) -> None:
    bench = Bench(tiny_model_dir)
    bench.submit(request(temperature=0.0, generations=2, length=12, stops=()))
    bench.finish()
    plain = plain_model(tiny_model_dir)
    prompt = torch.tensor([encode("12+34=")])
    expected = plain.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12, eos_token_id=-1
    )[0, prompt.shape[1] :].tolist()
    assert [c.completion_tokens.tolist() for c in bench.completions("g")] == [expected, expected]


def test_a_prompt_is_prefilled_once_per_group(tiny_model_dir: Path) -> None:
    bench = Bench(tiny_model_dir, room=4)
    bench.submit(request("g0", generations=10, length=6))  # needs the four rows several times over
    bench.submit(request("g1", prompt="7*8=", generations=3, length=6))
    bench.finish()
    prefills = [shape for shape in bench.forwards if shape[1] > 1]
    assert prefills == [(2, 6)]  # both prompts in one padded forward
    assert bench.decoder.prompts_prefilled == 2


def test_long_prompts_are_prefilled_apart(tiny_model_dir: Path) -> None:
    bench = Bench(tiny_model_dir, room=8, max_length=512)
    for i, length in enumerate([200, 10, 300, 290]):
        bench.submit(request(f"g{i}", prompt="3" * length, generations=2, length=2, stops=()))
    bench.finish()
    assert [shape for shape in bench.forwards if shape[1] > 1] == [(2, 200), (1, 300), (1, 290)]


def test_steps_run_on_exactly_the_rows_in_use(tiny_model_dir: Path) -> None:
    bench = Bench(tiny_model_dir, room=4)
    bench.submit(request("short", generations=2, length=3, stops=()))
    bench.submit(request("long", generations=1, length=6, stops=()))
    bench.finish()
    assert [shape for shape in bench.forwards if shape[1] == 1] == [(3, 1), (3, 1), (1, 1), (1, 1), (1, 1)]


def test_samples_join_as_rows_get_free(tiny_model_dir: Path) -> None:
    bench = Bench(tiny_model_dir, room=2)
    bench.submit(request("g0", generations=3, length=4, stops=()))
    bench.submit(request("g1", generations=1, length=4, stops=()))
    bench.step(4)
    assert (bench.decoder.status().samples_running, bench.decoder.status().samples_waiting) == (0, 2)
    bench.step()
    assert (bench.decoder.status().samples_running, bench.decoder.status().samples_waiting) == (2, 0)
    bench.finish()
    assert bench.decoder.status().tokens_generated == 16


def test_fresh_requests_after_a_swap_are_the_new_models(tiny_model_dir: Path, other_model_dir: Path) -> None:
    bench = Bench(tiny_model_dir, room=3)
    bench.submit(request("old", generations=5, stops=()))  # two samples are still waiting when the weights change
    bench.step(4)
    bench.load(other_model_dir, V1)
    bench.submit(request("new"))
    bench.finish()
    plain = plain_model(other_model_dir)
    check_against_plain(plain, request(), bench.completions("new"))
    late = [c for c in bench.completions("old") if c.oldest == V1]
    assert len(late) == 2
    check_against_plain(plain, request(), late)


def test_requests_under_way_go_on_over_the_old_keys(tiny_model_dir: Path, other_model_dir: Path) -> None:
    bench = Bench(tiny_model_dir)
    bench.submit(request(generations=1, length=12, stops=()))
    bench.step(5)
    bench.load(other_model_dir, V1)
    bench.finish()
    (completion,) = bench.completions("g")
    assert completion.spans == ((V0, 5), (V1, 7))

    from transformers import DynamicCache

    sequence = torch.tensor([[*encode("12+34="), *completion.completion_tokens.tolist()]])
    old, new, cache, swap = plain_model(tiny_model_dir), plain_model(other_model_dir), DynamicCache(), 6 + 5 - 1
    with torch.no_grad():
        # The fifth token was drawn by the old weights but is fed to the new ones.
        first = old(sequence[:, :swap], past_key_values=cache, use_cache=True).logits
        second = new(sequence[:, swap:-1], past_key_values=cache, use_cache=True).logits
    logprobs = torch.log_softmax(torch.cat([first, second], 1)[0, 5:], -1)
    expected = logprobs.gather(1, sequence[0, 6:, None])[:, 0].numpy()
    np.testing.assert_allclose(completion.behavior_logprobs, expected, atol=1e-5)


def test_abort_spares_other_groups(tiny_model_dir: Path) -> None:
    bench = Bench(tiny_model_dir, room=4)
    for name in ("a", "b"):
        bench.submit(request(name, generations=2, length=20, stops=()))
    bench.step(5)
    bench.decoder.abort("a")
    assert [c.finish_reason for c in bench.completions("a")] == [FinishReason.ABORT] * 2
    bench.finish()
    check_against_plain(plain_model(tiny_model_dir), request(), bench.completions("b"))
    assert [len(c.completion_tokens) for c in bench.completions("b")] == [20, 20]


def test_max_model_length_cuts_a_completion(tiny_model_dir: Path) -> None:
    bench = Bench(tiny_model_dir, max_length=10)
    bench.submit(request(stops=()))
    bench.finish()
    assert [(len(c.completion_tokens), c.finish_reason) for c in bench.completions("g")] == [
        (4, FinishReason.LENGTH)
    ] * 3


# Weights


def test_of_tied_names_the_first_is_kept(tiny_model_dir: Path, untied_llama_dir: Path) -> None:
    tied, untied = unique_tensors(plain_model(tiny_model_dir)), unique_tensors(plain_model(untied_llama_dir))
    assert "model.embed_tokens.weight" in tied
    assert "lm_head.weight" not in tied
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(untied)
    assert set(tied) == set(load_file(tiny_model_dir / "model.safetensors"))
    assert set(untied) == set(load_file(untied_llama_dir / "model.safetensors"))
    assert digest_of(tied) != digest_of(untied)
    assert digest_of(tied) == digest_of({name: tied[name].bfloat16() for name in reversed(tied)})


def test_a_swap_reaches_the_tied_head(tiny_model_dir: Path, other_model_dir: Path) -> None:
    bench = Bench(tiny_model_dir)
    bench.load(other_model_dir, V1)
    other = plain_model(other_model_dir)
    torch.testing.assert_close(bench.model.lm_head.weight, other.lm_head.weight.detach())
    assert bench.model.lm_head.weight.data_ptr() == bench.model.model.embed_tokens.weight.data_ptr()


def test_weights_are_cast_to_the_served_dtype(tiny_model_dir: Path, tmp_path: Path) -> None:
    bench = Bench(tiny_model_dir)
    halves = {name: tensor.bfloat16() for name, tensor in load_file(tiny_model_dir / "model.safetensors").items()}
    save_file(halves, tmp_path / "model.safetensors")
    bench.load(tmp_path, V1)
    assert bench.model.dtype == torch.float32
    embedding = bench.model.model.embed_tokens.weight
    torch.testing.assert_close(embedding, halves["model.embed_tokens.weight"].float())


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


# The engine around the decoder


def run(case: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await case

    asyncio.run(limited())


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


def test_the_decoder_skips_special_tokens_and_keeps_spaces(tiny_model_dir: Path) -> None:
    decode = load_decoder(tiny_model_dir)
    assert decode(np.array([*encode(" 4 , 2 ".replace(",", "+")), EOS_ID], np.int32).tolist()) == " 4 + 2 "
    assert decode([]) == ""


def test_create_engine_follows_the_configuration(tiny_model_dir: Path) -> None:
    from rollout_server.engines.scripted import ScriptedEngine

    scripted = create_engine(ServerConfig(engine="scripted", room=5, scripted=ScriptedOptions(vocab_size=9)))
    assert isinstance(scripted, ScriptedEngine)
    assert (scripted.info.room, scripted.info.vocab_size) == (5, 9)
    assert isinstance(create_engine(ServerConfig(model=str(tiny_model_dir))), TransformersEngine)
    with pytest.raises(ConfigError, match="model is empty: engine transformers needs"):
        create_engine(ServerConfig())
