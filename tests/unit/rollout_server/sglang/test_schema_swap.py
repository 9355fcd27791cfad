"""Whether a version fits the model, before SGLang hears of it, and the directory that SGLang reads it from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from protocol.errors import ConfigError
from protocol.weights.staging import links_directory
from rollout_server.engines.base import EngineFailure
from rollout_server.engines.live_weights import digest_of, unique_tensors
from rollout_server.engines.sglang.schema import check_file, read_schema
from rollout_server.engines.sglang.swap import link_weights, unlink_weights
from tests.models import VOCAB_SIZE, build_tiny_model

EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_the_digest_is_that_of_the_loaded_model(
    tmp_path: Path, architecture: Literal["qwen3", "llama"], tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    directory = build_tiny_model(tmp_path / "model", architecture=architecture, tie_word_embeddings=tied)
    schema = read_schema(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert schema.digest == digest_of(unique_tensors(model))
    assert list(schema.shapes) == list(unique_tensors(model))
    assert ("lm_head.weight" in schema.shapes) == (not tied)
    assert (schema.vocab_size, schema.max_positions) == (VOCAB_SIZE, 512)


def test_a_model_that_is_none_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model .*/nowhere: no such directory; give one with config.json"):
        read_schema(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model .*: cannot be loaded: "):
        read_schema(tmp_path)


def test_the_models_own_file_fits(tiny_model_dir: Path, tmp_path: Path) -> None:
    schema = read_schema(tiny_model_dir)
    assert check_file(tiny_model_dir / "model.safetensors", schema) == {"float32"}
    tensors = load_file(tiny_model_dir / "model.safetensors")
    tensors[EMBEDDING] = tensors[EMBEDDING].bfloat16()
    save_file(tensors, tmp_path / "w.safetensors")
    assert check_file(tmp_path / "w.safetensors", schema) == {"float32", "bfloat16"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({EMBEDDING: None}, f"{EMBEDDING} is missing$"),
        ({"extra": torch.zeros(2)}, "extra is not in the model$"),
        ({EMBEDDING: torch.zeros(3, 32)}, rf"{EMBEDDING} is \[3, 32\], the model has \[{VOCAB_SIZE}, 32\]$"),
        (
            {EMBEDDING: torch.zeros(VOCAB_SIZE, 32, dtype=torch.int32)},
            f"{EMBEDDING} is I32, weights are F32, BF16, F16$",
        ),
        ({f"extra{i}": torch.zeros(1) for i in range(5)}, "extra2 is not in the model and 2 more$"),
    ],
)
def test_a_version_that_does_not_fit_is_refused_by_name(
    tiny_model_dir: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    tensors = load_file(tiny_model_dir / "model.safetensors") | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "w.safetensors")
    with pytest.raises(
        EngineFailure, match=r"weights w.safetensors (do not fit the model|cannot be read): .*" + message
    ):
        check_file(tmp_path / "w.safetensors", read_schema(tiny_model_dir))


def test_a_file_that_is_none_or_is_cut_off_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    schema = read_schema(tiny_model_dir)
    file = tmp_path / "w.safetensors"
    with pytest.raises(EngineFailure, match=r"weights w.safetensors cannot be read: .*No such file"):
        check_file(file, schema)
    file.write_bytes((tiny_model_dir / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(EngineFailure, match=r"weights w.safetensors cannot be read: "):
        check_file(file, schema)
    file.write_bytes(b"\x10\0\0\0\0\0\0\0not a header")
    with pytest.raises(EngineFailure, match=r"weights w.safetensors cannot be read: "):
        check_file(file, schema)


def test_sglang_finds_one_file_in_a_directory(tmp_path: Path) -> None:
    file = tmp_path / "v.safetensors"
    file.write_bytes(b"content")
    directory = link_weights(file)
    assert link_weights(file) == directory, "a second time is as good as once"
    assert [entry.name for entry in directory.iterdir()] == ["model.safetensors"]
    assert (directory / "model.safetensors").read_bytes() == b"content"
    assert directory.stat().st_mode & 0o777 == 0o700
    unlink_weights(file)
    unlink_weights(file)
    assert [entry.name for entry in tmp_path.iterdir()] == ["v.safetensors"]


def test_a_link_is_of_the_file_wherever_the_directory_is_moved(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "v.safetensors").write_bytes(b"content")
    directory = link_weights(tmp_path / "a" / "v.safetensors")
    (tmp_path / "a").rename(tmp_path / "b")
    assert (tmp_path / "b" / directory.name / "model.safetensors").read_bytes() == b"content"


def test_a_directory_that_cannot_be_made_is_a_failed_load(tmp_path: Path) -> None:
    links_directory(tmp_path / "v.safetensors").write_text("in the way")
    with pytest.raises(EngineFailure, match=r"weights v.safetensors cannot be given a directory for SGLang: .*exists"):
        link_weights(tmp_path / "v.safetensors")


def test_what_somebody_else_put_there_stays(tmp_path: Path) -> None:
    directory = link_weights(tmp_path / "v.safetensors")
    (directory / "other").write_text("not ours")
    unlink_weights(tmp_path / "v.safetensors")
    assert [entry.name for entry in directory.iterdir()] == ["other"]
