"""The estimate of --dry-run, from files alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM

from learner.config import LearnerConfig
from learner.model import logprobs, memory
from learner.model.memory import memory_estimate
from learner.trainer import Trainer
from protocol.errors import ConfigError


def test_parameters_are_counted_exactly(tiny_model_dir):
    parameters = AutoModelForCausalLM.from_pretrained(tiny_model_dir).num_parameters()
    estimate = memory_estimate(LearnerConfig(model=str(tiny_model_dir)))
    assert estimate["parameters"] == parameters
    assert estimate["weights_bytes"] == estimate["gradients_bytes"] == 4 * parameters
    assert estimate["optimizer_bytes"] == 8 * parameters
    assert estimate["reference_bytes"] == estimate["autocast_bytes"] == estimate["adapter_bytes"] == 0
    assert estimate["total_bytes"] == sum(v for k, v in estimate.items() if k not in ("parameters", "total_bytes"))


def test_what_the_configuration_adds(tiny_model_dir):
    plain = memory_estimate(LearnerConfig(model=str(tiny_model_dir)))
    more = memory_estimate(LearnerConfig(model=str(tiny_model_dir), beta=0.1, autocast="bfloat16", token_budget=16384))
    assert more["reference_bytes"] == plain["weights_bytes"]
    assert more["autocast_bytes"] == 2 * plain["parameters"]
    assert more["activations_bytes"] == plain["activations_bytes"]  # twice the tokens in half the width


def test_a_critic_is_another_policy(tiny_model_dir):
    ppo = {"advantage_estimator": "gae", "filter_zero_std": False}
    estimate = memory_estimate(LearnerConfig(model=str(tiny_model_dir), **ppo))
    policys = ("weights_bytes", "gradients_bytes", "optimizer_bytes")
    assert estimate["critic_bytes"] == sum(estimate[key] for key in policys)
    assert memory_estimate(LearnerConfig(model=str(tiny_model_dir)))["critic_bytes"] == 0


def test_states_of_one_byte(tiny_model_dir):
    estimate = memory_estimate(LearnerConfig(model=str(tiny_model_dir), optim="adamw_8bit"))
    assert estimate["optimizer_bytes"] == 2 * estimate["parameters"]


def test_checkpointing_keeps_one_tensor_per_layer_and_all_of_one_layer_offloading_only_that_layer(tiny_model_dir):
    settings = {"model": str(tiny_model_dir), "token_budget": 100}
    plain, checkpointed = (
        memory_estimate(LearnerConfig(**settings, gradient_checkpointing=on)) for on in (False, True)
    )
    offloaded = memory_estimate(LearnerConfig(**settings, activation_offloading=True))
    layer = 12 * 32 + 4 * 64
    assert offloaded["activations_bytes"] == 100 * layer * 4
    assert plain["activations_bytes"] == 100 * 2 * layer * 4
    assert checkpointed["activations_bytes"] == 100 * (2 * 32 + layer) * 4


@pytest.mark.parametrize("targets", [[], ["q_proj", "down_proj"]])
def test_an_adapter_is_counted_exactly(tiny_model_dir, targets):
    config = LearnerConfig(
        model=str(tiny_model_dir), use_peft=True, lora_r=4, lora_target_modules=targets, beta=0.1, dtype="bfloat16"
    )
    trained = 4 * sum(parameter.numel() for parameter in Trainer(config)._parameters.values())
    estimate = memory_estimate(config)
    assert estimate["adapter_bytes"] == estimate["gradients_bytes"] == trained
    assert estimate["optimizer_bytes"] == 2 * trained
    assert estimate["reference_bytes"] == 0, "it is the policy without its adapter"
    assert estimate["weights_bytes"] == 2 * estimate["parameters"]
    assert estimate["total_bytes"] == sum(v for k, v in estimate.items() if k.endswith("_bytes") and k != "total_bytes")


def test_the_optimizer_file_of_a_checkpoint_is_no_part_of_the_model(tiny_model_dir, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_model_dir / name).read_bytes())
    before = memory_estimate(LearnerConfig(model=str(tmp_path)))
    (tmp_path / "optimizer.safetensors").write_bytes((tiny_model_dir / "model.safetensors").read_bytes())
    assert memory_estimate(LearnerConfig(model=str(tmp_path))) == before


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({}, "has no readable config.json"),
        ({"config.json": b"{"}, "has no readable config.json"),
        ({"config.json": b"{}"}, "config.json does not say hidden_size, intermediate_size"),
        ({"config.json": None}, "has no \\*.safetensors file"),
        ({"config.json": None, "model.safetensors": b"\xff" * 16}, "is not a safetensors file: its header claims"),
        ({"config.json": None, "model.safetensors": bytes([2, *[0] * 7]) + b"[]"}, "is not a safetensors file"),
    ],
)
def test_unusable_models(tmp_path, files, match):
    good = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 9}
    for name, content in files.items():
        (tmp_path / name).write_bytes(json.dumps(good).encode() if content is None else content)
    with pytest.raises(ConfigError, match=match):
        memory_estimate(LearnerConfig(model=str(tmp_path)))


def test_it_needs_no_torch():
    code = "import sys, learner.model.memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_chunk_is_that_of_the_head():
    assert memory.CHUNK_BYTES == logprobs.CHUNK_BYTES
    assert memory.MIN_CHUNK_TOKENS == logprobs.MIN_CHUNK_TOKENS
