"""Adapters in the learner: they compute what peft does, alone they train, and what is kept of them loads in peft."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from learner.batch import Batch
from learner.config import LearnerConfig
from learner.model.packing import collect, whole_sequences
from learner.trainer import Trainer
from protocol.errors import ConfigError
from protocol.weights.adapters import changed_weights, factor_names
from protocol.weights.base_model import base_digest
from protocol.weights.layout import Layout, MappedWeights
from tests.factories import make_batch, make_train_group
from tests.models import VOCAB_SIZE, build_tiny_model

# peft asks transformers 5 for what it has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
TOKENS = (np.arange(24).reshape(2, 12) * 5 + 3).astype(np.int32) % VOCAB_SIZE


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def make(tiny: Path):
    def make_trainer(*, checkpoint: Path | None = None, **options: Any) -> Trainer:
        config = LearnerConfig(**{"model": str(tiny), "use_peft": True, "lora_r": 4, "learning_rate": 0.05, **options})
        return Trainer(config, checkpoint=checkpoint)

    return make_trainer


def batch_of(step: int = 1, seed: int = 0) -> Batch:
    groups = [make_train_group(ordinal=i, lengths=[3, 6, 1, 4], seed=seed, prompt_tokens=[5, 6 + i]) for i in range(2)]
    return make_batch(step=step, groups=groups)


def train(trainer: Trainer, steps: int = 2) -> Trainer:
    for step in range(1, steps + 1):
        assert trainer.forward_backward(batch_of(step, seed=step)).finite
        trainer.optimizer_step()
    return trainer


def saved(trainer: Trainer, directory: Path) -> Path:
    trainer.save(directory)
    return directory


def published(trainer: Trainer, directory: Path) -> Path:
    with MappedWeights.create(directory / "weights.safetensors", Layout(trainer.specs())) as mapped:
        trainer.write_weights(mapped)
    return directory / "weights.safetensors"


def logprobs(model: Any, tokens: np.ndarray) -> np.ndarray:
    rows = torch.from_numpy(tokens).long()
    with torch.no_grad():
        values = torch.log_softmax(model(rows).logits[:, :-1].float(), -1)
    return values.gather(-1, rows[:, 1:, None])[..., 0].numpy()


def test_what_is_saved_is_what_peft_loads(make, tiny: Path, tmp_path: Path) -> None:
    trainer = train(make())
    directory = saved(trainer, tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), directory).eval()
    np.testing.assert_allclose(logprobs(model, TOKENS), trainer.canary_logprobs(TOKENS), atol=1e-5)
    base = logprobs(AutoModelForCausalLM.from_pretrained(tiny), TOKENS)
    assert np.abs(base - trainer.canary_logprobs(TOKENS)).max() > 1e-2, "the adapter does something"
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny.resolve())
    assert "lm_head" not in config["target_modules"]


def test_an_adapter_begins_as_the_base_model(make, tiny: Path) -> None:
    expected = logprobs(AutoModelForCausalLM.from_pretrained(tiny), TOKENS)
    np.testing.assert_allclose(make().canary_logprobs(TOKENS), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_adapter_trains_and_it_does_so_in_float32(make, dtype: str) -> None:
    trainer = make(dtype=dtype)
    before = {name: p.detach().clone() for name, p in trainer._model.named_parameters()}
    train(trainer)
    changed = {name for name, p in trainer._model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(trainer._parameters)
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in trainer._parameters.items())
    assert all(p.dtype == getattr(torch, dtype) for name, p in before.items() if ".lora_" not in name)
    assert len(trainer._optimizer.state) == len(trainer._parameters)
    assert trainer._model.get_input_embeddings().weight.grad is None


def naive_gradients(trainer: Trainer, tiny: Path, directory: Path, batch: Batch) -> dict[str, torch.Tensor]:
    """Of the step's loss by plain peft: every completion with its own prompt, unpadded, full logits."""
    trainer.save(directory)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), directory, is_trainable=True).eval()
    step = collect(batch.groups, mask_truncated_completions=False)
    tensors = trainer._plan(step)[0].tensors
    start = 0
    for n, length in enumerate(step.lengths_N):
        completion = step.tokens_C[start : start + length]
        tokens = torch.from_numpy(np.concatenate([step.prompts[step.group_N[n]], completion]).astype(np.int64))
        logits = model(tokens[None]).logits[0, -length - 1 : -1]
        index = torch.arange(start, start + length)
        policy = torch.log_softmax(logits / tensors.temperature_T[index, None], -1)
        policy = policy.gather(1, tokens[-length:, None])[:, 0]
        trainer._objective.loss(policy, torch.zeros_like(policy), index, tensors).loss.backward()
        start += length
    return {name.removeprefix("base_model.model."): p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("targets", [[], ["v_proj"], ["down_proj"], ["q_proj", "up_proj"]])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_gradients_are_those_of_plain_peft(
    make, tiny: Path, tmp_path: Path, targets: list[str], share_prefix: bool
) -> None:
    trainer = train(make(lora_target_modules=targets, share_prefix=share_prefix, beta=0.1, token_budget=16))
    batch = batch_of(seed=9)
    expected = naive_gradients(trainer, tiny, tmp_path, batch)
    assert trainer._policy.shares_prefix == share_prefix
    assert trainer.forward_backward(batch).finite
    assert expected.keys() == trainer._parameters.keys()
    for name, parameter in trainer._parameters.items():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)


def test_the_reference_is_the_policy_without_its_adapter(make, tiny: Path) -> None:
    trainer = train(make(beta=0.1))
    step = whole_sequences(TOKENS)
    reference = trainer._reference.logprobs(step, trainer._policy.pack(step, 8192)).numpy().reshape(2, -1)
    np.testing.assert_allclose(reference, logprobs(AutoModelForCausalLM.from_pretrained(tiny), TOKENS), atol=1e-5)
    assert trainer.forward_backward(batch_of(3)).metrics["kl"] > 0
    assert all(p.requires_grad and p.grad is not None for p in trainer._parameters.values())


def test_only_the_adapter_is_published(make, tiny: Path, tmp_path: Path) -> None:
    trainer = train(make(lora_target_modules=["q_proj", "down_proj"], lora_alpha=8))
    file = load_file(published(trainer, tmp_path))
    weights = changed_weights(trainer.specs(), trainer.adapter.r)
    assert len(weights) == 4
    assert file.keys() == {factor for name in weights for factor in factor_names(name)}
    assert (trainer.adapter.r, trainer.adapter.lora_alpha) == (4, 8)
    assert trainer.adapter.base_digest == base_digest(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    for name in weights:
        a, b = (file[factor] for factor in factor_names(name))
        model.get_parameter(name).data += trainer.adapter.scale * b @ a
    np.testing.assert_allclose(logprobs(model, TOKENS), trainer.canary_logprobs(TOKENS), atol=1e-5)


def test_servers_are_compared_with_the_base_model(make, tiny: Path) -> None:
    assert make().model_digest == Trainer(LearnerConfig(model=str(tiny))).model_digest


def test_a_checkpoint_goes_on_as_if_nothing_had_happened(make, tmp_path: Path) -> None:
    through = train(make(), steps=2)
    resumed = make(checkpoint=saved(through, tmp_path))
    assert resumed.policy_version == 2
    for trainer in (through, resumed):
        trainer.forward_backward(batch_of(3))
        trainer.optimizer_step()
    for name, tensor in through._adapter.tensors.items():
        assert torch.equal(tensor, resumed._adapter.tensors[name]), name
    files = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors"} <= files
    assert not files & {"model.safetensors", "adapter_model.bin"}
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < through.checkpoint_bytes + 50_000


def test_a_checkpoint_of_another_rank_is_named(make, tmp_path: Path) -> None:
    directory = saved(make(lora_r=8), tmp_path)
    with pytest.raises(ConfigError, match=r"is \(8, \d+\), this configuration makes it \(4, \d+\): lora_r and"):
        make(checkpoint=directory)


def test_a_checkpoint_without_an_adapter_is_named(make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no usable adapter_model\.safetensors"):
        make(checkpoint=tmp_path)


@pytest.mark.parametrize("targets", [["q_proj", "qproj"], ["lm_head"], ["embed_tokens"]])
def test_targets_that_the_model_does_not_have_are_named(make, targets: list[str]) -> None:
    with pytest.raises(ConfigError, match=rf"lora_target_modules: {targets[-1]}: .* are down_proj, .*, v_proj"):
        make(lora_target_modules=targets)


def test_a_missing_package_is_named(make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"the package peft is not installed here: pip install '\.\[peft\]'"):
        make()


@given(r=st.sampled_from([1, 3, 16]), alpha=st.integers(1, 64), targets=st.sets(st.sampled_from(["k_proj", "o_proj"])))
@settings(max_examples=6, deadline=None)
def test_any_adapter_changes_what_its_spec_says(tiny: Path, r: int, alpha: int, targets: set[str]) -> None:
    config = LearnerConfig(
        model=str(tiny), use_peft=True, lora_r=r, lora_alpha=alpha, lora_target_modules=sorted(targets)
    )
    trainer = Trainer(config)
    weights = changed_weights(trainer.specs(), r)
    shapes = {name: tuple(p.shape) for name, p in AutoModelForCausalLM.from_pretrained(tiny).named_parameters()}
    assert all(shapes[name] == shape for name, shape in weights.items())
    assert {name.split(".")[-2] for name in weights} >= targets
