"""What sharding needs to know of a model. Sharding itself takes two processes: tests/system/test_ranks.py."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner.model.export import save_gathered, unique_tensors
from learner.model.parallel import layers_of, token_cost, weights_digest, whole
from protocol.errors import ConfigError
from tests.models import build_tiny_model


@pytest.fixture
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_the_layers_are_found(tmp_path, architecture):
    model = AutoModelForCausalLM.from_pretrained(build_tiny_model(tmp_path, architecture=architecture))
    assert layers_of(model) is model.model.layers


def test_a_model_without_a_list_of_layers_is_refused(model):
    model.config.num_hidden_layers = 3
    with pytest.raises(ConfigError, match="Qwen3ForCausalLM has no list of 3 layers to shard: train it on one rank"):
        layers_of(model)


def test_a_token_costs_two_operations_per_weight(model):
    config, cost = model.config, token_cost(model)
    layer = model.model.layers[0]
    assert cost.layers == 2 * 2 * sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    assert cost.head == 2 * config.vocab_size * config.hidden_size
    assert cost.attention == 4 * 2 * config.num_attention_heads * config.head_dim


def test_the_digest_is_of_names_shapes_and_bytes(model):
    before = weights_digest(model)
    assert weights_digest(model) == before
    with torch.no_grad():
        model.model.norm.weight[0] += 2**-20
    assert weights_digest(model) != before


def test_a_tensor_that_is_no_shard_is_whole():
    tensor = torch.ones(3)
    assert whole(tensor) is tensor


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_weights_that_come_one_by_one_make_a_plain_model_directory(model, tiny_model_dir, tmp_path, dtype, torch_dtype):
    model = model.to(torch_dtype)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tensors = {name: tensor + 1 for name, tensor in unique_tensors(model).items()}
    save_gathered(model, tokenizer, dtype, ((name, tensor) for name, tensor in tensors.items()), tmp_path)
    loaded = unique_tensors(AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto"))
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) and tensor.dtype == torch_dtype for name, tensor in tensors.items())
    assert load_file(tmp_path / "model.safetensors").keys() == tensors.keys()
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
