"""A staged version brought up to a newer one by what differs: decoded whole, then applied in place.

Nothing of the staged file changes before every part of the whole chain makes sense; then all of it does, block by
block, each hashed while it is in the cache and compared with the manifest (I5). Runs on the thread that fetches, and on
others that help it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from protocol.errors import MalformedMessage
from protocol.parallel import in_threads
from protocol.weights.delta import TensorDelta, apply_tensor, decode_tensor
from protocol.weights.delta_manifest import DeltaManifest
from protocol.weights.layout import MappedWeights
from protocol.weights.manifest import Block, Manifest, digest
from protocol.weights.specs import ITEM_BYTES, Layout, TensorSpec

Changes = Mapping[str, npt.NDArray[np.int64]]
"""Tensor -> ascending positions, in C order, of the elements that differ; a tensor that is not there has none."""
Decoded = Mapping[str, TensorDelta]
"""Tensor -> what one delta changes of it."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What a chain has changed in the staged file."""

    changes: Changes
    wrong: Sequence[int]
    """Indices of the blocks of the manifest's shipment that do not hash to its digests now."""
    apply_s: float
    """Decoding included; not the union of changes, which is for the engine."""
    verify_s: float


class _Piece(NamedTuple):
    """A block, and what of it changes."""

    block: Block
    first: int
    """Element of the tensor that it begins with."""
    deltas: Sequence[TensorDelta]
    """Of its tensor, in the order of the chain."""


class _Done(NamedTuple):
    """A piece that was applied."""

    right: bool
    apply_s: float
    verify_s: float


def apply_chain(
    chain: Sequence[DeltaManifest],
    blobs: Sequence[memoryview],
    staged: MappedWeights,
    manifest: Manifest,
    *,
    about_to_write: Callable[[], None],
    on_block: Callable[[int], None] | None,
) -> Applied:
    """Change the staged file from the first delta's base to the last one's version; see the module's text.

    Args:
        chain: Each one's base is the version of the one before.
        blobs: Their bytes.
        staged: Holds the first one's base, whole.
        manifest: Of the last one's version.
        about_to_write: Told before the file's first byte changes: from then on it holds no version.
        on_block: Told, by its index, of every block that is the version's.

    Raises:
        MalformedMessage: a part is none of its tensor, or of no tensor. The file is as it was.
    """
    begun_s = time.monotonic()
    decoded = [_decode(delta, blob, staged.layout) for delta, blob in zip(chain, blobs, strict=True)]
    decode_s = time.monotonic() - begun_s
    about_to_write()
    begun_s = time.monotonic()
    pieces, done = _cut(manifest, decoded), dict[int, _Done]()
    for index, piece in in_threads(lambda piece: _apply(piece, staged, manifest), pieces, nbytes=manifest.file_bytes):
        done[index] = piece
        if piece.right and on_block is not None:
            on_block(index)
    wall_s = time.monotonic() - begun_s
    applying_s, verifying_s = (sum(piece[number] for piece in done.values()) for number in (1, 2))
    verify_s = wall_s * verifying_s / max(applying_s + verifying_s, 1e-9)
    changes = {
        name: _union([tensors[name].indices for tensors in decoded if name in tensors])
        for name in dict.fromkeys(name for tensors in decoded for name in tensors)
    }
    wrong = sorted(index for index, piece in done.items() if not piece.right)
    return Applied(changes, wrong, decode_s + wall_s - verify_s, verify_s)


def _decode(delta: DeltaManifest, blob: memoryview, layout: Layout) -> Decoded:
    parts, offset = [], 0
    for part in delta.parts:
        try:
            spec = layout.spec(part.name)
        except KeyError:
            raise MalformedMessage(f"delta to version {delta.version}: the model has no tensor {part.name}") from None
        parts.append((spec, blob[offset : offset + part.nbytes]))
        offset += part.nbytes

    def decode(part: tuple[TensorSpec, memoryview]) -> TensorDelta:
        spec, octets = part
        item_bytes = ITEM_BYTES[spec.dtype]
        return decode_tensor(octets, num_elements=spec.nbytes // item_bytes, item_bytes=item_bytes)

    return {parts[number][0].name: tensor for number, tensor in in_threads(decode, parts, nbytes=delta.nbytes)}


def _cut(manifest: Manifest, decoded: Sequence[Decoded]) -> list[_Piece]:
    """Return the blocks of the version's file, in order."""
    blocks, pieces = iter(manifest.shipment.blocks), list[_Piece]()
    for entry in manifest.tensors:
        deltas = [tensors[entry.spec.name] for tensors in decoded if entry.spec.name in tensors]
        for block in itertools.islice(blocks, len(entry.digests)):
            pieces.append(_Piece(block, (block.offset - entry.offset) // ITEM_BYTES[entry.spec.dtype], deltas))
    return pieces


def _apply(piece: _Piece, staged: MappedWeights, manifest: Manifest) -> _Done:
    begun_s = time.monotonic()
    octets = staged.writable_bytes(piece.block.offset, piece.block.nbytes)
    for delta in piece.deltas:
        apply_tensor(delta, octets, first=piece.first)
    applied_s = time.monotonic()
    right = digest(manifest.algorithm, octets) == piece.block.digest
    return _Done(right, applied_s - begun_s, time.monotonic() - applied_s)


def _union(positions: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    if len(positions) == 1:
        return positions[0]
    together = np.sort(np.concatenate(positions))  # numpy's own unique takes many times as long
    keep = np.ones(together.size, np.bool_)
    np.not_equal(together[1:], together[:-1], out=keep[1:])
    return together[keep]
