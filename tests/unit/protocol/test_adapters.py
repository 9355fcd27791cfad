"""Adapters on the wire: whose tensors belong together, what a manifest may claim, and which base model is meant."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import MalformedMessage, WeightsError
from protocol.versions import Version
from protocol.weights.adapters import AdapterSpec, changed_weights, factor_names, peft_config
from protocol.weights.base_model import base_digest
from protocol.weights.layout import Layout, MappedWeights, build_manifest
from protocol.weights.manifest import Manifest, TensorSpec, content_digest

ADAPTER = AdapterSpec(r=2, lora_alpha=4, base_digest="0" * 32)
Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"


def factors(weights: dict[str, tuple[int, int]], r: int = 2) -> list[TensorSpec]:
    return [
        TensorSpec(name, "F32", shape)
        for weight, (rows, columns) in weights.items()
        for name, shape in zip(factor_names(weight), ((r, columns), (rows, r)), strict=True)
    ]


def manifest_of(directory: Path, specs: list[TensorSpec], adapter: AdapterSpec | None) -> Manifest:
    with MappedWeights.create(directory / "w.safetensors", Layout(specs)) as mapped:
        manifest = build_manifest(Version(1, 2), mapped, "xxh3_128", adapter)
    (directory / "w.safetensors").unlink()
    return manifest


names = st.from_regex(r"[a-z_]{1,8}(\.[a-z0-9_]{1,8}){0,3}", fullmatch=True).map(lambda name: f"{name}.weight")


@given(st.dictionaries(names, st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1), st.integers(1, 5))
def test_what_an_adapter_changes_is_read_off_its_tensors(weights: dict[str, tuple[int, int]], r: int) -> None:
    assert changed_weights(factors(weights, r), r) == weights


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda specs: specs[1:], "has no other half"),
        (lambda specs: [*specs, TensorSpec("model.norm.weight", "F32", (4,))], "is neither base_model"),
        (lambda specs: [*specs, TensorSpec("base_model.model.x.lora_A.weight", "F32", (2, 4))], "no other half"),
        (lambda specs: [TensorSpec(s.name, s.dtype, s.shape[::-1]) for s in specs], r"expected \(2, in\)"),
        (lambda specs: [TensorSpec(s.name, s.dtype, (*s.shape, 1)) for s in specs], r"expected \(2, in\)"),
        (lambda specs: [], "without tensors"),
    ],
)
def test_a_manifest_with_other_tensors_than_its_adapters_is_refused(tmp_path: Path, change, match: str) -> None:
    specs = change(factors({Q: (8, 4), UP: (6, 4)}))
    manifest = manifest_of(tmp_path, specs, ADAPTER)
    with pytest.raises(MalformedMessage, match=match):
        Manifest.from_json(manifest.to_json())
    assert Manifest.from_json(manifest_of(tmp_path, specs, None).to_json()).adapter is None


@pytest.mark.parametrize("change", [{"r": 0}, {"lora_alpha": 0}, {"base_digest": "x" * 32}, {"r": 3}, {"more": 1}])
def test_a_manifest_with_an_impossible_adapter_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    document = json.loads(manifest_of(tmp_path, factors({Q: (8, 4)}), ADAPTER).to_json())
    document["adapter"] |= change
    with pytest.raises(MalformedMessage, match=r"^manifest: "):
        Manifest.from_json(json.dumps(document).encode())


def test_a_manifest_of_all_weights_is_what_it_was(tmp_path: Path) -> None:
    assert "adapter" not in json.loads(manifest_of(tmp_path, factors({Q: (8, 4)}), None).to_json())


def test_the_same_factors_with_another_alpha_are_other_content(tmp_path: Path) -> None:
    one = manifest_of(tmp_path, factors({Q: (8, 4)}), ADAPTER)
    other = msgspec.structs.replace(one, adapter=msgspec.structs.replace(ADAPTER, lora_alpha=5))
    assert len({content_digest(m) for m in (one, other, msgspec.structs.replace(one, adapter=None))}) == 3
    assert content_digest(one) == content_digest(msgspec.structs.replace(one, version=Version(1, 3)))


def test_pefts_configuration_is_what_peft_reads(tmp_path: Path) -> None:
    from peft import LoraConfig

    (tmp_path / "adapter_config.json").write_text(json.dumps(peft_config(ADAPTER, [Q, UP], base_model="/m")))
    config = LoraConfig.from_pretrained(tmp_path)
    assert (config.r, config.lora_alpha, config.target_modules) == (2, 4, {"q_proj", "up_proj"})


def write_model(directory: Path, files: dict[str, dict[str, int]]) -> Path:
    directory.mkdir()
    for file, tensors in files.items():
        with MappedWeights.create(
            directory / f"{file}.safetensors", Layout([TensorSpec(name, "F32", (3,)) for name in tensors])
        ) as mapped:
            for name, value in tensors.items():
                np.frombuffer(mapped.view(name), np.float32)[:] = value
    return directory


def test_a_base_model_is_its_tensors_however_they_are_spread_over_files(tmp_path: Path) -> None:
    one = write_model(tmp_path / "1", {"model": {"a": 1, "b": 2}})
    two = write_model(tmp_path / "2", {"model-1": {"b": 2}, "model-2": {"a": 1}, "optimizer": {"c": 9}})
    assert base_digest(one) == base_digest(two)
    for number, other in enumerate([{"a": 1, "b": 3}, {"a": 1, "c": 2}, {"a": 2, "b": 1}, {"a": 1}]):
        assert base_digest(write_model(tmp_path / f"other-{number}", {"model": other})) != base_digest(one)


def test_a_base_model_without_safetensors_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no \*\.safetensors file: adapters need a base model"):
        base_digest(tmp_path)
