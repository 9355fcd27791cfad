"""A model's tensors by their published names, and swapping them for those of a version's file.

The rule of names, the same on the learner's side (protocol/README.md states it in words): names are those of
`model.state_dict()`, which are the safetensors and Hugging Face names and leave out non-persistent buffers; of tied
tensors only the name that comes first there is kept (`model.embed_tokens.weight` stays, `lm_head.weight` goes).

Everything is checked before the first byte of the model changes, so a version is applied whole or not at all (I5).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from protocol.weights.manifest import TensorSpec, schema_digest
from rollout_server.engines.base import EngineFailure

NAMES_SHOWN = 3
PAGE_BYTES = 4096


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> live tensor, in the order of `state_dict()`, each storage once."""
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in seen:
            seen.add(key)
            tensors[name] = tensor
    return tensors


def digest_of(tensors: dict[str, Tensor]) -> str:
    """The model digest of Hello: of names and shapes."""
    # A schema digest leaves dtypes out, so any one will do.
    return schema_digest(TensorSpec(name=name, dtype="F32", shape=tuple(t.shape)) for name, t in tensors.items())


def read_weights(path: Path, model: dict[str, Tensor]) -> dict[str, Tensor]:
    """Map a version's file and check it against the model's `unique_tensors`. Touches only the file.

    The pages are faulted in here, off the decode thread: what is left for the pause is the copy.

    Raises:
        EngineFailure: the file cannot be read, or names, shapes or kinds of dtype differ; names the first few.
    """
    try:
        staged: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise EngineFailure(f"weights {path.name} cannot be read: {error}") from error
    wrong = [f"{name} is missing" for name in model if name not in staged]
    wrong += [f"{name} is not in the model" for name in staged if name not in model]
    wrong += [
        f"{name} is {_describe(staged[name])}, the model has {_describe(tensor)}"
        for name, tensor in model.items()
        if name in staged and not _fits(staged[name], tensor)
    ]
    if wrong:
        more = f" and {len(wrong) - NAMES_SHOWN} more" if len(wrong) > NAMES_SHOWN else ""
        raise EngineFailure(f"weights {path.name} do not fit the model: {'; '.join(wrong[:NAMES_SHOWN])}{more}")
    for tensor in staged.values():
        _fault_in(tensor)
    return staged


def copy_weights(staged: dict[str, Tensor], model: dict[str, Tensor]) -> None:
    """Copy checked tensors into the live ones, cast to their dtype. Tied names follow, sharing the storage."""
    for name, tensor in staged.items():
        model[name].copy_(tensor)


def _fits(staged: Tensor, live: Tensor) -> bool:
    return staged.shape == live.shape and staged.is_floating_point() == live.is_floating_point()


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _fault_in(tensor: Tensor) -> None:
    """Read one byte of every page. numpy sums without the interpreter lock: the decode thread goes on."""
    content = tensor.reshape(-1).view(torch.uint8).numpy()
    content[::PAGE_BYTES].sum(dtype=np.uint64)
