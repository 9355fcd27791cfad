"""Adapters for an engine that only knows whole weights: added into the base model's, W + (lora_alpha / r) B A.

What an adapter changes is computed from the base model's own weights for every version, never from what is live:
nothing adds up over versions, and a weight that no adapter changes is exactly itself again. The sum is taken in float32
and rounded once, to the dtype that is served: bfloat16 loses the small part of a small adapter there, which an engine
that keeps adapters apart does not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from protocol.weights.adapters import AdapterSpec, changed_weights, factor_names
from protocol.weights.specs import TensorSpec
from rollout_server.engines.base import EngineFailure
from rollout_server.engines.base_model import BaseModel
from rollout_server.engines.live_weights import Staged

NAMES_SHOWN = 3


class AdapterMerger:
    """Turns one adapter after the other into weights of one model.

    Args:
        directory: of the base model.
        load_base: loads its tensors afresh, by their published names.
    """

    def __init__(self, directory: Path, load_base: Callable[[], dict[str, Tensor]]) -> None:
        self._base = BaseModel(directory)
        self._load_base = load_base
        self._changed: dict[str, Tensor] = {}
        """Base weights of what the live adapter has changed; all else is the base model's. Empty: nothing is known."""

    def merge(self, path: Path, adapter: AdapterSpec) -> Staged:
        """Compute what must be copied in for the model to be the base model with this adapter.

        The first time that is all weights, later only those that adapters change.

        Raises:
            ConfigError: the adapter is of another base model.
            EngineFailure: the file cannot be read, or does not fit the model; names the first few tensors.
        """
        self._base.check(adapter)
        try:
            factors: dict[str, Tensor] = load_file(path)
        except (OSError, SafetensorError) as error:
            raise EngineFailure(f"adapter {path.name} cannot be read: {error}") from error
        specs = [TensorSpec(name=name, dtype="F32", shape=tuple(factor.shape)) for name, factor in factors.items()]
        weights = changed_weights(specs, adapter.r)  # the manifest has been checked: no ValueError
        base = self._changed if weights.keys() == self._changed.keys() else self._load_base()
        wrong = [
            f"{name} is {list(shape)}, the model has {list(base[name].shape) if name in base else 'none'}"
            for name, shape in weights.items()
            if name not in base or base[name].shape != shape
        ]
        if wrong:
            more = f" and {len(wrong) - NAMES_SHOWN} more" if len(wrong) > NAMES_SHOWN else ""
            raise EngineFailure(f"adapter {path.name} does not fit the model: {'; '.join(wrong[:NAMES_SHOWN])}{more}")
        merged = {}
        for name in weights:
            a, b = (factors[factor].float() for factor in factor_names(name))
            merged[name] = base[name].float().addmm(b, a, alpha=adapter.scale).to(base[name].dtype)
        self._changed = {name: base[name] for name in weights}
        return {**base, **merged}

    def forget(self) -> None:
        """Other weights than those of `merge` are live, or perhaps: the next adapter begins from the whole model."""
        self._changed = {}
