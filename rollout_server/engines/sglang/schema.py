"""The model's tensors by their published names and shapes, and whether a version fits them. No weights are loaded.

The rule of names is that of live_weights.py: those of `state_dict()`, tied tensors once. What SGLang makes of them
(fused, sharded, renamed) is its loader's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import ConfigError, WeightsError
from protocol.weights.adapters import AdapterSpec, changed_weights
from protocol.weights.layout import MappedWeights
from protocol.weights.manifest import TensorSpec, schema_digest
from rollout_server.engines.base import EngineFailure
from rollout_server.engines.text import first_line

NAMES_SHOWN = 3
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Safetensors' names of the dtypes that weights come in, and SGLang's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSchema:
    """What must be known of a model without loading it."""

    shapes: dict[str, tuple[int, ...]]
    """Published name -> shape."""
    vocab_size: int
    """Rows of the embedding."""
    model_type: str
    """Of its config.json."""
    max_positions: int | None
    """Tokens the model was made for; None where its configuration names no limit."""

    @property
    def digest(self) -> str:
        """The model digest of Hello."""
        return schema_digest(TensorSpec(name=name, dtype="F32", shape=shape) for name, shape in self.shapes.items())


def read_schema(model: Path) -> ModelSchema:
    """Build the model from its config.json without memory for its weights.

    Raises:
        ConfigError: there is no such model.
    """
    import torch
    import transformers

    if not model.is_dir():
        raise ConfigError(f"model {model}: no such directory; give one with config.json, safetensors and a tokenizer")
    try:
        config = transformers.AutoConfig.from_pretrained(model, local_files_only=True)
        with torch.device("meta"):
            built = transformers.AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {model}: cannot be loaded: {first_line(error)}") from error
    built.tie_weights()
    shapes: dict[str, tuple[int, ...]] = {}
    seen: set[int] = set()
    for name, tensor in built.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            shapes[name] = tuple(tensor.shape)
    text = config.get_text_config()
    return ModelSchema(
        shapes=shapes,
        vocab_size=built.get_input_embeddings().weight.shape[0],
        model_type=config.model_type,
        max_positions=text.max_position_embeddings if hasattr(text, "max_position_embeddings") else None,
    )


def differs(ours: ModelSchema, path: Path, model_type: str | None) -> str:
    """Say how the model that an SGLang serves is another one than ours; empty when it is not, as far as can be told.

    Args:
        ours: read from files.
        path: of its model, as it names it. It is read where it is a directory of this host.
        model_type: of its model, as it says.
    """
    if not (path.is_absolute() and path.is_dir()):
        return "" if model_type == ours.model_type else f"it serves {path}, a {model_type}; ours is a {ours.model_type}"
    try:
        theirs = read_schema(path)
    except ConfigError as error:
        return f"what it serves cannot be compared: {error}"
    if theirs.digest == ours.digest:
        return ""
    kinds = [f"a {schema.model_type} with a vocabulary of {schema.vocab_size}" for schema in (theirs, ours)]
    return f"it serves {path}, {kinds[0]}; ours is {kinds[1]}" + (", of other shapes" if kinds[0] == kinds[1] else "")


def check_adapter_file(path: Path, adapter: AdapterSpec, schema: ModelSchema, targets: Sequence[str]) -> None:
    """Check an adapter's file against the model, before anything is told to SGLang.

    Args:
        path: of the file.
        adapter: what its manifest says of it.
        schema: of the base model.
        targets: layers that SGLang has room for adapters in.

    Raises:
        EngineFailure: it cannot be read, or changes what the model or SGLang does not have; names the first few.
    """
    changed = changed_weights(_read_specs(path), adapter.r)
    wrong = [
        f"{name} is {list(shape)}, the model has {list(schema.shapes.get(name, ())) or 'none'}"
        for name, shape in changed.items()
        if schema.shapes.get(name) != shape
    ]
    wrong += [f"{name} is not of {', '.join(targets)} (lora_target_modules)" for name in changed
              if name.split(".")[-2] not in targets]  # fmt: skip
    _refuse(f"adapter {path.name} does not fit the model", wrong)


def check_file(path: Path, schema: ModelSchema) -> set[str]:
    """Check a version's file against the model, before anything is told to SGLang (it skips names it does not know).

    Returns:
        The dtypes of its tensors, in SGLang's words.

    Raises:
        EngineFailure: it cannot be read, or names, shapes or kinds of dtype differ; names the first few.
    """
    specs = _read_specs(path)
    found = {spec.name: spec for spec in specs}
    wrong = [f"{name} is missing" for name in schema.shapes if name not in found]
    wrong += [f"{name} is not in the model" for name in found if name not in schema.shapes]
    wrong += [
        f"{name} is {list(spec.shape)}, the model has {list(schema.shapes[name])}"
        for name, spec in found.items()
        if name in schema.shapes and tuple(spec.shape) != schema.shapes[name]
    ]
    wrong += [f"{name} is {spec.dtype}, weights are {', '.join(DTYPES)}" for name, spec in found.items()
              if spec.dtype not in DTYPES]  # fmt: skip
    _refuse(f"weights {path.name} do not fit the model", wrong)
    return {DTYPES[spec.dtype] for spec in specs}


def _read_specs(path: Path) -> tuple[TensorSpec, ...]:
    try:
        with MappedWeights.open(path) as mapped:
            return mapped.layout.specs
    except WeightsError as error:
        raise EngineFailure(f"weights {path.name} cannot be read: {error}") from error


def _refuse(what: str, wrong: Sequence[str]) -> None:
    if wrong:
        more = f" and {len(wrong) - NAMES_SHOWN} more" if len(wrong) > NAMES_SHOWN else ""
        raise EngineFailure(f"{what}: {'; '.join(wrong[:NAMES_SHOWN])}{more}")
