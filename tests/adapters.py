"""Adapters for tests: small random ones, as files that a learner would have published."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from protocol.versions import Version
from protocol.weights.adapters import AdapterSpec, factor_names
from protocol.weights.base_model import base_digest
from rollout_server.engines.base import StagedWeights

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_adapter(
    model: Path,
    directory: Path,
    version: Version,
    *,
    r: int = 2,
    lora_alpha: int = 4,
    targets: tuple[str, ...] = TARGETS,
) -> StagedWeights:
    """A random adapter of the model in `model`, drawn by the version."""
    generator = torch.Generator().manual_seed(hash(version) % 2**31)
    tensors = {}
    for name, weight in sorted(load_file(model / "model.safetensors").items()):
        if name.split(".")[-2] in targets:
            a, b = factor_names(name)
            tensors[a] = torch.randn(r, weight.shape[1], generator=generator) * 0.3
            tensors[b] = torch.randn(weight.shape[0], r, generator=generator) * 0.3
    file = directory / f"adapter-{version}.safetensors"
    save_file(tensors, file)
    return StagedWeights(
        version=version,
        path=file,
        digest=hashlib.sha256(file.read_bytes()).hexdigest(),
        adapter=AdapterSpec(r=r, lora_alpha=lora_alpha, base_digest=base_digest(model)),
    )


def merged_model(model: Path, weights: StagedWeights) -> Any:
    """The base model with the adapter added in, as a Hugging Face model in float32."""
    from transformers import AutoModelForCausalLM

    assert weights.adapter is not None
    merged = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False)
    tensors = load_file(weights.path)
    for name, parameter in merged.named_parameters():
        a, b = factor_names(name)
        if a in tensors:
            parameter += weights.adapter.scale * tensors[b] @ tensors[a]
    return merged
