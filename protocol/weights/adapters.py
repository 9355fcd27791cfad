"""Adapters: a version that is a low-rank addition to a base model which both sides have, instead of all weights.

    W + (lora_alpha / r) B A,   A [r, in], B [out, r]       (LoRA, arXiv 2106.09685, section 4.1)

Names of tensors and files are peft's, so that whatever loads peft's adapters loads these. Arithmetic on names and
shapes only: no files, no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import msgspec

from protocol.weights.specs import Shape, TensorSpec

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""peft's names of an adapter's two files."""
MAX_RANK = 1 << 16
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


class AdapterSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a version is beside its tensors, where it is an adapter."""

    r: Annotated[int, msgspec.Meta(ge=1, le=MAX_RANK)]
    """Rank."""
    lora_alpha: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    base_digest: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
    """Of the base model's files (`base_model.base_digest`)."""

    @property
    def scale(self) -> float:
        """What the product of the matrices is multiplied by."""
        return self.lora_alpha / self.r


def factor_names(weight: str) -> tuple[str, str]:
    """Name the matrices A and B that are added to the weight of that name.

    Example:
        >>> factor_names("model.layers.0.mlp.up_proj.weight")[0]
        'base_model.model.model.layers.0.mlp.up_proj.lora_A.weight'
    """
    module = weight.removesuffix(".weight")
    return f"{_PREFIX}{module}{_A}", f"{_PREFIX}{module}{_B}"


def changed_weights(specs: Iterable[TensorSpec], r: int) -> dict[str, Shape]:
    """Find what an adapter's tensors are added to: name of the weight -> its shape (out, in), in order of names.

    Raises:
        ValueError: a tensor is no matrix of an adapter of that rank, or has no other half.
    """
    shapes = {spec.name: spec.shape for spec in specs}
    weights: dict[str, Shape] = {}
    for name in sorted(shapes):
        module = name.removeprefix(_PREFIX).removesuffix(_A).removesuffix(_B)
        a, b = factor_names(f"{module}.weight")
        if name not in (a, b):
            raise ValueError(f"tensor {name} is neither {_PREFIX}*{_A} nor {_PREFIX}*{_B}")
        if a not in shapes or b not in shapes:
            raise ValueError(f"tensor {name} has no other half: an adapter has {a} and {b}")
        if not (len(shapes[a]) == len(shapes[b]) == 2 and shapes[a][0] == shapes[b][1] == r):
            raise ValueError(f"tensors of {module} are {shapes[a]} and {shapes[b]}: expected ({r}, in) and (out, {r})")
        weights[f"{module}.weight"] = (shapes[b][0], shapes[a][1])
    if not weights:
        raise ValueError("an adapter without tensors")
    return weights


def peft_config(adapter: AdapterSpec, weights: Iterable[str], *, base_model: str) -> dict[str, Any]:
    """Write what `adapter_config.json` says of an adapter to these weights, for whoever loads it with peft's words."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": adapter.r,
        "lora_alpha": adapter.lora_alpha,
        "target_modules": sorted({weight.split(".")[-2] for weight in weights}),
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "inference_mode": True,
    }
