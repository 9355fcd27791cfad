"""A staged version brought up to a newer one by what differs: decoded whole, then applied in place.

Nothing of the staged file changes before every part of the whole chain makes sense; then all of it does,
and the caller verifies the result block by block (I5). Runs on the thread that fetches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.errors import MalformedMessage
from protocol.weights.delta import TensorDelta, apply_tensor, decode_tensor
from protocol.weights.delta_manifest import DeltaManifest
from protocol.weights.layout import MappedWeights
from protocol.weights.specs import ITEM_BYTES, Layout

Changes = Mapping[str, npt.NDArray[np.int64]]
"""Tensor -> ascending positions, in C order, of the elements that differ; a tensor that is not there has none."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What a chain has changed in the staged file."""

    changes: Changes
    apply_s: float
    """Decoding included; not the union of changes, which is for the engine."""


def apply_chain(
    chain: Sequence[DeltaManifest],
    blobs: Sequence[memoryview],
    staged: MappedWeights,
    about_to_write: Callable[[], None],
) -> Applied:
    """Change the staged file from the first delta's base to the last one's version; see the module's text.

    Args:
        chain: Each one's base is the version of the one before.
        blobs: Their bytes.
        staged: Holds the first one's base, whole.
        about_to_write: Told before the file's first byte changes: from then on it holds no version.

    Raises:
        MalformedMessage: a part is none of its tensor, or of no tensor. The file is as it was.
    """
    begun_s = time.monotonic()
    decoded = [_decode(delta, blob, staged.layout) for delta, blob in zip(chain, blobs, strict=True)]
    about_to_write()
    for tensors in decoded:
        for name, tensor in tensors.items():
            apply_tensor(tensor, staged.view(name))
    apply_s = time.monotonic() - begun_s
    changes = {
        name: _union([tensors[name].indices for tensors in decoded if name in tensors]) for name in _names(decoded)
    }
    return Applied(changes, apply_s)


def _decode(delta: DeltaManifest, blob: memoryview, layout: Layout) -> dict[str, TensorDelta]:
    tensors, offset = {}, 0
    for part in delta.parts:
        try:
            spec = layout.spec(part.name)
        except KeyError:
            raise MalformedMessage(f"delta to version {delta.version}: the model has no tensor {part.name}") from None
        item_bytes = ITEM_BYTES[spec.dtype]
        octets, offset = blob[offset : offset + part.nbytes], offset + part.nbytes
        tensors[part.name] = decode_tensor(octets, num_elements=spec.nbytes // item_bytes, item_bytes=item_bytes)
    return tensors


def _names(decoded: Sequence[Mapping[str, TensorDelta]]) -> list[str]:
    return list(dict.fromkeys(name for tensors in decoded for name in tensors))


def _union(positions: Sequence[npt.NDArray[np.unsignedinteger[Any] | np.int64]]) -> npt.NDArray[np.int64]:
    if len(positions) == 1:
        return positions[0].astype(np.int64, copy=False)
    together = np.sort(np.concatenate(positions))  # numpy's own unique takes many times as long
    keep = np.ones(together.size, np.bool_)
    np.not_equal(together[1:], together[:-1], out=keep[1:])
    return together[keep].astype(np.int64, copy=False)
