"""The decoder against plain forwards of the same model: logprobs, prefills, compaction, swaps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from protocol.completions import Completion
from protocol.messages import FinishReason
from protocol.versions import Version
from rollout_server.engines.base import EngineFailure, GenerationRequest
from rollout_server.engines.decode import Decoder
from rollout_server.engines.live_weights import digest_of, read_weights, unique_tensors
from rollout_server.engines.rows import Job
from rollout_server.engines.transformers import load_model
from tests.models import build_tiny_model, encode
from tests.unit.rollout_server.plain import V0, V1, check_against_plain, plain_model, request


class Rig:
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


@pytest.mark.parametrize("which", ["tiny_model_dir", "untied_llama_dir"])
def test_logprobs_equal_a_plain_forward(which: str, fixtures: pytest.FixtureRequest) -> None:
    model_dir = fixtures.getfixturevalue(which)
    rig = Rig(model_dir, room=5)
    wanted = [
        request(f"g{i}", prompt="1" * length, seed=i, generations=3, length=24 + i, temperature=temperature)
        for i, (length, temperature) in enumerate([(1, 1.0), (7, 1.0), (3, 0.6), (40, 1.7), (2, 0.0), (9, 1.0)])
    ]
    for each in wanted:
        rig.submit(each)
    rig.finish()
    plain = plain_model(model_dir)
    ends = set()
    for each in wanted:
        check_against_plain(plain, each, rig.completions(each.group_id))
        ends |= {len(c.completion_tokens) for c in rig.completions(each.group_id)}
    assert len(ends) > 5  # rows did end at different times, so the batch was compacted


def test_greedy_equals_generate(tiny_model_dir: Path) -> None:
    rig = Rig(tiny_model_dir)
    rig.submit(request(temperature=0.0, generations=2, length=12, stops=()))
    rig.finish()
    plain = plain_model(tiny_model_dir)
    prompt = torch.tensor([encode("12+34=")])
    expected = plain.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12, eos_token_id=-1
    )[0, prompt.shape[1] :].tolist()
    assert [c.completion_tokens.tolist() for c in rig.completions("g")] == [expected, expected]


def test_a_prompt_is_prefilled_once_per_group(tiny_model_dir: Path) -> None:
    rig = Rig(tiny_model_dir, room=4)
    rig.submit(request("g0", generations=10, length=6))  # needs the four rows several times over
    rig.submit(request("g1", prompt="7*8=", generations=3, length=6))
    rig.finish()
    prefills = [shape for shape in rig.forwards if shape[1] > 1]
    assert prefills == [(2, 6)]  # both prompts in one padded forward
    assert rig.decoder.prompts_prefilled == 2


def test_long_prompts_are_prefilled_apart(tiny_model_dir: Path) -> None:
    rig = Rig(tiny_model_dir, room=8, max_length=512)
    for i, length in enumerate([200, 10, 300, 290]):
        rig.submit(request(f"g{i}", prompt="3" * length, generations=2, length=2, stops=()))
    rig.finish()
    assert [shape for shape in rig.forwards if shape[1] > 1] == [(2, 200), (1, 300), (1, 290)]


def test_steps_run_on_exactly_the_rows_in_use(tiny_model_dir: Path) -> None:
    rig = Rig(tiny_model_dir, room=4)
    rig.submit(request("short", generations=2, length=3, stops=()))
    rig.submit(request("long", generations=1, length=6, stops=()))
    rig.finish()
    assert [shape for shape in rig.forwards if shape[1] == 1] == [(3, 1), (3, 1), (1, 1), (1, 1), (1, 1)]


def test_samples_join_as_rows_get_free(tiny_model_dir: Path) -> None:
    rig = Rig(tiny_model_dir, room=2)
    rig.submit(request("g0", generations=3, length=4, stops=()))
    rig.submit(request("g1", generations=1, length=4, stops=()))
    rig.step(4)
    assert (rig.decoder.status().samples_running, rig.decoder.status().samples_waiting) == (0, 2)
    rig.step()
    assert (rig.decoder.status().samples_running, rig.decoder.status().samples_waiting) == (2, 0)
    rig.finish()
    assert rig.decoder.status().tokens_generated == 16


def test_fresh_requests_after_a_swap_are_the_new_models(tiny_model_dir: Path, other_model_dir: Path) -> None:
    rig = Rig(tiny_model_dir, room=3)
    rig.submit(request("old", generations=5, stops=()))  # two samples are still waiting when the weights change
    rig.step(4)
    rig.load(other_model_dir, V1)
    rig.submit(request("new"))
    rig.finish()
    plain = plain_model(other_model_dir)
    check_against_plain(plain, request(), rig.completions("new"))
    late = [c for c in rig.completions("old") if c.oldest == V1]
    assert len(late) == 2
    check_against_plain(plain, request(), late)


def test_requests_under_way_go_on_over_the_old_keys(tiny_model_dir: Path, other_model_dir: Path) -> None:
    rig = Rig(tiny_model_dir)
    rig.submit(request(generations=1, length=12, stops=()))
    rig.step(5)
    rig.load(other_model_dir, V1)
    rig.finish()
    (completion,) = rig.completions("g")
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
    rig = Rig(tiny_model_dir, room=4)
    for name in ("a", "b"):
        rig.submit(request(name, generations=2, length=20, stops=()))
    rig.step(5)
    rig.decoder.abort("a")
    assert [c.finish_reason for c in rig.completions("a")] == [FinishReason.ABORT] * 2
    rig.finish()
    check_against_plain(plain_model(tiny_model_dir), request(), rig.completions("b"))
    assert [len(c.completion_tokens) for c in rig.completions("b")] == [20, 20]


def test_max_model_length_cuts_a_completion(tiny_model_dir: Path) -> None:
    rig = Rig(tiny_model_dir, max_length=10)
    rig.submit(request(stops=()))
    rig.finish()
    assert [(len(c.completion_tokens), c.finish_reason) for c in rig.completions("g")] == [(4, FinishReason.LENGTH)] * 3


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
    rig = Rig(tiny_model_dir)
    rig.load(other_model_dir, V1)
    other = plain_model(other_model_dir)
    torch.testing.assert_close(rig.model.lm_head.weight, other.lm_head.weight.detach())
    assert rig.model.lm_head.weight.data_ptr() == rig.model.model.embed_tokens.weight.data_ptr()


def test_weights_are_cast_to_the_served_dtype(tiny_model_dir: Path, tmp_path: Path) -> None:
    rig = Rig(tiny_model_dir)
    halves = {name: tensor.bfloat16() for name, tensor in load_file(tiny_model_dir / "model.safetensors").items()}
    save_file(halves, tmp_path / "model.safetensors")
    rig.load(tmp_path, V1)
    assert rig.model.dtype == torch.float32
    embedding = rig.model.model.embed_tokens.weight
    torch.testing.assert_close(embedding, halves["model.embed_tokens.weight"].float())
