"""Loading: what a user gets wrong is one clear line."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from learner.model.load import head_of, load_model, load_tokenizer, resolve_device
from protocol.errors import ConfigError

CPU = torch.device("cpu")


def load(path):
    return load_model(path, dtype="float32", device=CPU)


def test_a_model_and_its_tokenizer(tiny_model_dir):
    model = load(tiny_model_dir)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    weight, bias = head_of(model)
    assert weight.shape == (model.config.vocab_size, model.config.hidden_size)
    assert bias is None
    assert load_tokenizer(tiny_model_dir).decode([2 + 12]) == "a"


def test_the_master_dtype(tiny_model_dir):
    model = load_model(tiny_model_dir, dtype="bfloat16", device=CPU)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("path", ["/no/such/model", "./missing", "~/missing-model", "runs/a/model"])
def test_a_missing_directory(path):
    with pytest.raises(ConfigError, match=r"no such directory; give one with config.json, or a hub name$"):
        load(path)


def test_an_empty_directory(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.json; it must be a Hugging Face model$"):
        load(tmp_path)


def test_no_model_at_all():
    with pytest.raises(ConfigError, match=r"^model is not set: give the directory"):
        load("")


def test_a_directory_without_weights(tmp_path, tiny_model_dir):
    (tmp_path / "config.json").write_bytes((tiny_model_dir / "config.json").read_bytes())
    with pytest.raises(ConfigError, match="cannot be loaded: ") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_and_a_broken_tokenizer(tmp_path, tiny_model_dir):
    (tmp_path / "config.json").write_bytes((tiny_model_dir / "config.json").read_bytes())
    with pytest.raises(ConfigError, match=r"has no tokenizer: none of tokenizer\.json, "):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="has a tokenizer that cannot be loaded: "):
        load_tokenizer(tmp_path)


def test_an_unknown_architecture(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-thing"}))
    with pytest.raises(ConfigError, match="no-such-thing"):
        load(tmp_path)


@pytest.mark.parametrize("known", [True, False])
def test_scaled_logits_are_refused(tmp_path, monkeypatch, known):
    """By the setting's name, or else by what the logits are."""
    if not known:
        monkeypatch.setattr("learner.model.load.LOGIT_SETTINGS", ())
    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        logit_scale=0.25, initializer_range=0.5,
    )  # fmt: skip
    CohereForCausalLM(config).save_pretrained(tmp_path)
    reason = "logit_scale" if known else "seen in its logits"
    with pytest.raises(ConfigError, match=rf"scales or caps its logits after the output head \({reason}\)"):
        load(tmp_path)


def test_a_cap_that_small_logits_do_not_show_is_refused(tmp_path):
    config = Gemma2Config(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=30.0,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="final_logit_softcapping"):
        load(tmp_path)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU
    assert resolve_device("cpu") == CPU
    with pytest.raises(ConfigError, match="sees no CUDA device; use cpu or auto"):
        resolve_device("cuda:1")
    with pytest.raises(ConfigError, match="device 'gpu' is unknown to torch: use auto, cpu, cuda"):
        resolve_device("gpu")
