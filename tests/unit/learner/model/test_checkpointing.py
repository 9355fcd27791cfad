"""Layers that run twice: the same gradients to the bit, on every path, in less memory."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from learner.config import LearnerConfig
from learner.model.checkpointing import checkpoint_layers
from learner.trainer import Trainer
from protocol.errors import ConfigError
from tests.factories import make_batch, make_train_group


def batch():
    groups = [make_train_group(ordinal=i, lengths=[3, 6, 1, 14], prompt_tokens=[5, 6 + i, 7, 8, 9]) for i in range(2)]
    return make_batch(groups=groups)


@pytest.mark.parametrize("loss_head", ["fused", "recompute"])
@pytest.mark.parametrize("token_budget", [9, 8192], ids=["prompt apart", "prompt in the row"])
@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_the_gradients_are_those_without_it(tiny_model_dir, autocast, share_prefix, token_budget, loss_head):
    gradients = []
    for gradient_checkpointing in (False, True):
        config = LearnerConfig(
            model=str(tiny_model_dir),
            gradient_checkpointing=gradient_checkpointing,
            autocast=autocast,
            share_prefix=share_prefix,
            token_budget=token_budget,
            loss_head=loss_head,
        )
        trainer = Trainer(config)
        assert trainer._policy.shares_prefix == share_prefix
        assert trainer.forward_backward(batch()).finite
        gradients.append({name: p.grad for name, p in trainer._parameters.items()})
    plain, checkpointed = gradients
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def kept_bytes(model) -> int:
    """What autograd holds between a forward and a backward pass."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=torch.arange(40)[None] % 20, use_cache=False).last_hidden_state.sum()
    return sum(kept.values())


def test_layers_keep_nothing_of_their_own(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    before = kept_bytes(model)
    checkpoint_layers(model)
    assert kept_bytes(model) < 0.1 * before


def test_names_and_shapes_stay(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    before = list(model.state_dict())
    checkpoint_layers(model)
    assert list(model.state_dict()) == before
    assert not any(module.training for module in model.modules())


def test_a_model_without_layers_is_refused(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(ConfigError, match=r"gradient_checkpointing: Qwen3ForCausalLM has no layers .* token_budget"):
        checkpoint_layers(model)
