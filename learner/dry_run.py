"""What `train --dry-run` prints: the resolved configuration, what follows from it, and the memory it needs.

Reads the headers of the model's files, never its weights; imports no torch, so it also runs where none is installed.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

from learner.config import LearnerConfig
from protocol.errors import ConfigError

BYTES = {"float32": 4, "bfloat16": 2}
HEADER_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its JSON header: unsigned 64-bit, little-endian."""
MAX_HEADER_BYTES = 100 << 20
"""The format's own limit."""


def describe(config: LearnerConfig) -> str:
    """Return the text of a dry run.

    Raises:
        ConfigError: The model's directory is missing or holds no readable safetensors file.
    """
    sections = [
        ("configuration", [config.model_dump_json(indent=2)]),
        ("asynchrony", list(_asynchrony(config))),
        ("memory of the learner, activations apart", list(_memory(config))),
    ]
    return "\n\n".join("\n".join([f"{title}:", *lines]) for title, lines in sections)


def _asynchrony(config: LearnerConfig) -> Iterator[str]:
    wanted, bounds = config.bounds, config.granted_bounds
    yield _line("max_staleness", str(bounds.max_staleness), "hard bound, in steps, of a group's oldest token")
    yield _line("S", str(bounds.steps_ahead), "steps that rollouts may run ahead")
    if bounds.steps_ahead < wanted.steps_ahead:
        yield _line("", "", f"lowered from {wanted.steps_ahead}: buffer_bytes holds no more worst-case groups")
    yield _line("W", str(bounds.reorder_window), "reorder window, in groups")
    yield _line("bound", str(bounds.steps_ahead + bounds.window_steps), "staleness that S and W allow")
    yield _line("slots_total", str(bounds.slots_total), "groups between lease and live weights")
    reserved = bounds.slots_total * config.group_bytes
    yield _line("reserved", _bytes(reserved), f"{_bytes(config.group_bytes)} a group, of buffer_bytes")
    samples = config.prompts_per_step * config.num_generations
    yield _line("samples", str(samples), "a step: prompts_per_step x num_generations")


def _memory(config: LearnerConfig) -> Iterator[str]:
    model = Path(config.model).expanduser()
    if not model.is_dir():
        if model.is_absolute() or config.model.startswith("."):
            raise ConfigError(f"model {config.model!r}: no such directory")
        yield _line("parameters", "unknown", f"{config.model} is no directory here; a hub name is resolved later")
        return
    count = count_parameters(model)
    master, published = BYTES[config.dtype], BYTES[config.published_dtype]
    parts = {
        "weights": count * master,
        "gradients": count * master,
        "AdamW states": 2 * count * master,
        "autocast": count * BYTES["bfloat16"] if config.autocast == "bfloat16" and master > 2 else 0,
        "reference": count * master if config.beta > 0 else 0,
        "publishing": count * published,
    }
    reasons = {
        "autocast": "bfloat16 copies of the weights during a step",
        "reference": "the frozen policy of beta",
        "publishing": "the snapshot that servers fetch",
    }
    yield _line("parameters", f"{count:,}", str(model))
    for name, size in parts.items():
        if size:
            yield _line(name, _bytes(size), reasons.get(name, config.dtype))
    yield _line("sum", _bytes(sum(parts.values())))


def count_parameters(model: Path) -> int:
    """Add up the tensors named in the headers of a directory's safetensors files (tied weights are stored once).

    Raises:
        ConfigError: There is no such file, or one is damaged.
    """
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"model {str(model)!r}: the directory has no .safetensors file")
    return sum(math.prod(shape) for file in files for shape in _shapes(file))


def _shapes(file: Path) -> Iterator[list[int]]:
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(HEADER_LENGTH_BYTES))
            header = json.loads(opened.read(min(length, MAX_HEADER_BYTES)))
            yield from (tensor["shape"] for name, tensor in header.items() if name != "__metadata__")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: damaged header of a safetensors file") from error


def _line(name: str, value: str, reason: str = "") -> str:
    return f"  {name:<14} {value:>14}  {reason}".rstrip()


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e10 else f"{count / 1e9:,.1f} GB"
