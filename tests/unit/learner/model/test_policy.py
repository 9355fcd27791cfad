"""Which models share prompts, and what a policy does that cannot."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from learner.model.packing import collect, pack_padded, pack_shared
from learner.model.policy import Policy
from tests.factories import make_train_group
from tests.models import build_tiny_model

NOTICE = "cannot share prompts"


def tiny_step():
    groups = [
        make_train_group(ordinal=i, prompt_tokens=[3, 4, 5, 6][: 2 + i], rewards=(1.0, 0.0, 1.0), lengths=[1, 6, 3])
        for i in range(2)
    ]
    return collect(groups, mask_truncated_completions=False)


@pytest.fixture(params=["qwen3", "llama"])
def model(request, tmp_path):
    directory = build_tiny_model(tmp_path / "model", architecture=request.param)
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def test_full_attention_models_share_in_silence(model, caplog):
    assert Policy(model, share_prefix=True, autocast=False).shares_prefix
    assert not caplog.records


def test_both_paths_agree(model):
    step = tiny_step()
    padded = Policy(model, share_prefix=False, autocast=False)
    expected = padded.step_logprobs(step, padded.pack(step, 100))
    shared = Policy(model, share_prefix=True, autocast=False)
    for token_budget in (100, 9):
        torch.testing.assert_close(shared.step_logprobs(step, shared.pack(step, token_budget)), expected)


def test_share_prefix_false_pads_without_a_notice(model, caplog):
    policy = Policy(model, share_prefix=False, autocast=False)
    step = tiny_step()
    assert not policy.shares_prefix
    assert [m.num_tokens for m in policy.pack(step, 50)] == [m.num_tokens for m in pack_padded(step, 50)]
    assert not caplog.records


def small_mistral(**changes):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, **changes,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def test_a_sliding_window_falls_back_with_one_notice(caplog):
    policy = Policy(small_mistral(sliding_window=8), share_prefix=True, autocast=False)
    assert not policy.shares_prefix
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"MistralForCausalLM {NOTICE}: its attention slides over a window of 8 tokens" in caplog.text


def test_the_same_model_without_a_window_shares():
    assert Policy(small_mistral(sliding_window=None), share_prefix=True, autocast=False).shares_prefix


def test_layers_of_another_type_fall_back(tmp_path, caplog):
    directory = build_tiny_model(tmp_path / "m", layer_types=["full_attention", "sliding_attention"], sliding_window=4)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    assert not Policy(model, share_prefix=True, autocast=False).shares_prefix
    assert "layers of type sliding_attention" in caplog.text


def test_a_model_that_computes_something_else_is_found_out(model, caplog, monkeypatch):
    """It counts positions by itself, whatever it is told: what the probe is for."""
    rotary = type(model.model.rotary_emb)
    forward = rotary.forward

    def own_positions(self, x, position_ids):
        return forward(self, x, torch.arange(x.shape[1])[None])

    monkeypatch.setattr(rotary, "forward", own_positions)
    own_attention = model.config._attn_implementation
    assert not Policy(model, share_prefix=True, autocast=False).shares_prefix
    assert "its logprobs would be off by" in caplog.text
    assert model.config._attn_implementation == own_attention


def test_a_model_that_raises_is_found_out(model, caplog, monkeypatch):
    def refuse(*_arguments, **_options):
        raise TypeError("unexpected keyword argument 'packed'")

    monkeypatch.setattr("learner.model.policy.Packed", refuse)
    assert not Policy(model, share_prefix=True, autocast=False).shares_prefix
    assert "TypeError: unexpected keyword argument 'packed'" in caplog.text


def test_autocast_stays_near_float32(model):
    step = tiny_step()
    exact = Policy(copy.deepcopy(model), share_prefix=True, autocast=False)
    expected = exact.step_logprobs(step, pack_shared(step, 100))
    rounded = Policy(model, share_prefix=True, autocast=True)
    assert rounded.shares_prefix
    got = rounded.step_logprobs(step, pack_shared(step, 100))
    assert got.dtype == torch.float32
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.15)
