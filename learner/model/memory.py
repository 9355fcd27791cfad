"""What a run will hold in memory, from the model's files alone: for --dry-run, which loads no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from learner.config import LearnerConfig
from protocol.errors import ConfigError

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
STATE_BYTES = {"adamw_8bit": 1, "paged_adamw_8bit": 1, "paged_adamw_32bit": 4}
"""Of each of AdamW's two moments, where it is not the weights' own."""
CHUNK_BYTES = 32 << 20
MIN_CHUNK_TOKENS = 256
"""As in logprobs.py, which needs torch."""
TENSORS_PER_LAYER = 12
"""Hidden-size tensors kept per token and layer for the backward pass (norms, projections, rotary, attention)."""


def memory_estimate(config: LearnerConfig) -> dict[str, int]:
    """Estimate the learner's memory in bytes, by what it is for; `total_bytes` is their sum.

    Weights, gradients and optimizer are exact for a model on disk (an adapter's, where its layers are matrices of a
    transformer's layers; a critic, which has all three, is taken to be as large as the model); activations are a rule
    of thumb for one micro-batch of `token_budget` tokens.

    Raises:
        ConfigError: the model is no local directory with config.json and safetensors files.
    """
    directory = Path(config.model).expanduser()
    settings = _read_config(directory)
    parameters = _count_parameters(directory)
    master = ITEM_BYTES[config.dtype]
    compute = 2 if "bfloat16" in (config.dtype, config.autocast) else 4
    layers, hidden = settings["num_hidden_layers"], settings["hidden_size"]
    width = TENSORS_PER_LAYER * hidden + 4 * settings["intermediate_size"]  # what one layer keeps of a token
    kept = layers * hidden + width if config.gradient_checkpointing else layers * width
    if config.activation_offloading:
        kept = width  # of the layer under way
    trained, trained_item = parameters, master
    adapter = 0
    if config.use_peft:
        trained, trained_item = _count_parameters(directory, lambda *weight: _adapter_size(config, *weight)), 4
        adapter = trained * trained_item
    moments = 2 * trained * STATE_BYTES.get(config.optim, trained_item)
    estimate = {
        "parameters": parameters,
        "weights_bytes": parameters * master,
        "adapter_bytes": adapter,
        "gradients_bytes": trained * trained_item,
        "optimizer_bytes": moments,
        "reference_bytes": parameters * master if config.beta and not config.use_peft else 0,
        "critic_bytes": 2 * parameters * master + moments if config.has_critic else 0,
        "autocast_bytes": parameters * 2 if config.autocast == "bfloat16" else 0,
        "activations_bytes": config.token_budget * kept * compute,
        "logits_bytes": max(CHUNK_BYTES, MIN_CHUNK_TOKENS * settings["vocab_size"] * compute),
    }
    total = sum(value for name, value in estimate.items() if name.endswith("_bytes"))
    return {**estimate, "total_bytes": total}


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {str(directory)!r} has no readable config.json: {error}") from error
    settings = settings.get("text_config", settings)
    missing = {"hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"} - settings.keys()
    if missing:
        raise ConfigError(f"model {str(directory)!r}: config.json does not say {', '.join(sorted(missing))}")
    return settings


def _adapter_size(config: LearnerConfig, name: str, shape: list[int]) -> int:
    """Numbers in A and B of a weight: all layers but the embedding and the head have them, or those that are named."""
    layer = name.split(".")[-2] if "." in name else ""
    wanted = layer in config.lora_target_modules if config.lora_target_modules else ".layers." in name
    return config.lora_r * sum(shape) if wanted and len(shape) == 2 else 0


def _count_parameters(
    directory: Path, size: Callable[[str, list[int]], int] = lambda name, shape: math.prod(shape)
) -> int:
    """Sum the sizes of the tensors in the headers of all safetensors files; the tensors themselves are not read."""
    files = sorted(directory.glob("*.safetensors"))
    files = [file for file in files if file.name not in ("optimizer.safetensors", "reference.safetensors")]
    if not files:
        raise ConfigError(f"model {str(directory)!r} has no *.safetensors file")
    return sum(_count_in_header(file, size) for file in files)


def _count_in_header(path: Path, size: Callable[[str, list[int]], int]) -> int:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError(f"its header claims {length} bytes")
            header = json.loads(file.read(length))
            return sum(size(name, entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path} is not a safetensors file: {error}") from error
