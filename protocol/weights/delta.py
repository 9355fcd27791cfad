"""A tensor as the difference from its last version: lossless, of exactly the elements whose bytes differ.

Elements of 1, 2, 4 or 8 bytes are compared as bits, so NaN payloads and -0.0 arrive as they are. What an optimizer's
step changes of bf16 weights is often a few percent, by a unit or two in the last place: the part is then a fiftieth of
the tensor. It says where the changed elements are and, for each, old XOR new; so applying a part twice undoes it.
protocol/README.md specifies the bytes ("Delta parts"); digests of the result, elsewhere, decide what is believed (I5).
No sockets, files or torch here; no state, so any thread may use it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import zstandard

from protocol.codec import Buffer
from protocol.errors import MalformedMessage
from protocol.weights.push_costs import Costs, LinkSpeed, choose

__all__ = [
    "Costs", "LinkSpeed", "TensorDelta", "apply_tensor", "changed_fraction", "choose", "decode_tensor", "encode_tensor",
    "num_changed",
]  # fmt: skip

DELTA_FORMAT: Final = 1
"""First byte of a part."""
BITMAP: Final = 0
"""Positions as one bit per element; otherwise as gaps, of so many bytes."""
_HEADER: Final = struct.Struct("<BBBxQQ")
"""Format, bytes per element, bytes per gap (or BITMAP), changed elements, gaps; then a u64 per stream."""
_UNSIGNED: Final[dict[int, np.dtype[Any]]] = {size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)}
_BLOCK_BYTES: Final = 512 << 10
"""Of each version, compared at a time: what is found is still in the cache when it is gathered."""
_DENSE_WORDS: Final = 4
"""Where a block before had more than one differing word in so many, elements are compared rather than words."""
_BITMAP_SHARE: Final = 8
"""More than one changed element in so many, and a bit for each element is shorter than a byte for each gap."""
_ZSTD_LEVEL: Final = 1
_SAMPLE_BYTES: Final = 32 << 10
_WORTH: Final = 15 / 16
"""A stream whose sample does not shrink below this share goes as it is."""
_INDICES_AT_ONCE: Final = 64 << 10
_LOOK_BYTES: Final = 4 << 10
_EVERY_BYTES: Final = 256 << 10

Unsigned: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]
Octets: TypeAlias = npt.NDArray[np.uint8]
Indices: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TensorDelta:
    """What changed in one tensor: K elements."""

    indices: Indices
    """[K] int64: positions of the elements, strictly ascending."""
    xor: Unsigned
    """[K] uint8 to uint64: old bits XOR new bits of each."""


def encode_tensor(base: Buffer, new: Buffer, item_bytes: int) -> bytes | None:
    """Return the part that turns `base` into `new`, or None where no byte differs.

    Args:
        base: Bytes of the tensor as the receiver has it.
        new: As many bytes of its new version.
        item_bytes: Bytes of an element: 1, 2, 4 or 8.
    """
    old, fresh = np.frombuffer(base, np.uint8), np.frombuffer(new, np.uint8)
    assert old.size == fresh.size, (old.size, fresh.size)
    indices, xor = _find_changes(old, fresh, item_bytes)
    if not indices.size:
        return None
    gap_bytes, places = _pack_positions(indices, old.size // item_bytes)
    compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
    streams = [_shrink(plane, compressor) for plane in (*_planes(places), *_planes(xor))]
    header = _HEADER.pack(DELTA_FORMAT, item_bytes, gap_bytes, indices.size, places.size)
    sizes = struct.pack(f"<{len(streams)}Q", *(len(stream) for stream in streams))
    return b"".join((header, sizes, *streams))


def num_changed(part: Buffer) -> int:
    """Return how many elements a part of `encode_tensor` says have changed."""
    return int(_HEADER.unpack_from(part)[3])


def decode_tensor(part: Buffer, *, num_elements: int, item_bytes: int) -> TensorDelta:
    """Read a part of a tensor of `num_elements` elements.

    Nothing is allocated before what the part claims is known to be possible: at most the memory that all elements
    changed would take, whatever the part says.

    Raises:
        MalformedMessage: it is not a part of such a tensor. The text says why.
    """
    view = memoryview(part).cast("B")
    gap_bytes, num_changed, streams = _parse(view, num_elements, item_bytes)
    planes = [_inflate(stream, size) for stream, size in streams]
    num_position_planes = len(planes) - item_bytes
    places = _interleave(planes[:num_position_planes])
    if gap_bytes == BITMAP:
        indices = _unpack_bitmap(places, num_elements, num_changed)
    else:
        indices = _unpack_gaps(places, num_elements, num_changed)
    return TensorDelta(indices, _interleave(planes[num_position_planes:]))


def apply_tensor(delta: TensorDelta, target: Buffer) -> None:
    """Change the tensor's bytes in place: every element at `indices` becomes itself XOR its value.

    Args:
        delta: Decoded for a tensor of this many elements.
        target: Writable bytes of the tensor, at any alignment.
    """
    elements = np.frombuffer(target, delta.xor.dtype)
    for begin in range(0, delta.indices.size, _INDICES_AT_ONCE):
        where = delta.indices[begin : begin + _INDICES_AT_ONCE]
        elements[where] ^= delta.xor[begin : begin + _INDICES_AT_ONCE]


def changed_fraction(base: Buffer, new: Buffer, item_bytes: int) -> float:
    """Estimate which share of the elements differs, from 4 KiB in every 256.

    Args:
        base: Bytes of any number of tensors whose elements have this size, whole elements from the first byte on.
        new: As many bytes of the new version.
        item_bytes: Bytes of an element: 1, 2, 4 or 8.
    """
    old, fresh = np.frombuffer(base, np.uint8), np.frombuffer(new, np.uint8)
    assert old.size == fresh.size, (old.size, fresh.size)
    if old.size < 2 * _EVERY_BYTES:
        return _share_changed(old, fresh, item_bytes)
    rows = old.size // _EVERY_BYTES
    old, fresh = (
        version[: rows * _EVERY_BYTES].reshape(rows, _EVERY_BYTES)[:, :_LOOK_BYTES].reshape(-1)
        for version in (old, fresh)
    )
    return _share_changed(old, fresh, item_bytes)


def _share_changed(old: Octets, fresh: Octets, item_bytes: int) -> float:
    dtype = _UNSIGNED[item_bytes]
    differs = old.view(dtype) != fresh.view(dtype)
    return int(np.count_nonzero(differs)) / max(1, int(differs.size))


def _find_changes(old: Octets, fresh: Octets, item_bytes: int) -> tuple[Indices, Unsigned]:
    """Return positions and XOR of the elements that differ."""
    dtype = _UNSIGNED[item_bytes]
    positions: list[Indices] = []
    values: list[Unsigned] = []
    sparse = item_bytes < 8
    for begin in range(0, old.size, _BLOCK_BYTES):
        a, b = old[begin : begin + _BLOCK_BYTES], fresh[begin : begin + _BLOCK_BYTES]
        if sparse and a.size % 8 == 0:
            words = np.flatnonzero(a.view(np.uint64) != b.view(np.uint64))
            sparse = words.size * _DENSE_WORDS * 8 <= a.size
            if not words.size:
                continue
            found, xor = _refine(a.view(np.uint64), b.view(np.uint64), words, dtype)
        else:
            difference = a.view(dtype) ^ b.view(dtype)
            found = np.flatnonzero(difference != 0)
            xor = difference.take(found)
            sparse = item_bytes < 8 and found.size * item_bytes * _DENSE_WORDS <= a.size
        found += begin // item_bytes
        positions.append(found)
        values.append(xor)
    if not positions:
        return np.empty(0, np.int64), np.empty(0, dtype)
    return np.concatenate(positions), np.concatenate(values)


def _refine(
    a: npt.NDArray[np.uint64], b: npt.NDArray[np.uint64], words: Indices, dtype: np.dtype[Any]
) -> tuple[Indices, Unsigned]:
    """Return positions and XOR of the elements that differ, given the 8-byte words that do."""
    difference = a.take(words)
    difference ^= b.take(words)
    lanes = difference.view(dtype)
    per_word = 8 // dtype.itemsize
    found = np.flatnonzero(lanes != 0)
    words *= per_word
    xor = lanes.take(found)
    positions = words.take(found // per_word)
    found %= per_word
    positions += found
    return positions, xor


def _pack_positions(indices: Indices, num_elements: int) -> tuple[int, Unsigned]:
    """Return the form of the positions (BITMAP, or bytes of a gap) and their numbers."""
    if indices.size * _BITMAP_SHARE > num_elements:
        changed = np.zeros(num_elements, np.bool_)
        changed[indices] = True
        return BITMAP, np.packbits(changed, bitorder="little")
    gaps = np.diff(indices, prepend=-1)
    gaps -= 1
    by_bytes = gaps.size + int((gaps // 0xFF).sum())
    by_pairs = 2 * (gaps.size + int((gaps // 0xFFFF).sum()))
    gap_bytes = 1 if by_bytes <= by_pairs else 2
    return gap_bytes, _pack_gaps(gaps, _UNSIGNED[gap_bytes])


def _pack_gaps(gaps: Indices, dtype: np.dtype[Any]) -> Unsigned:
    """Write every gap as its remainder, after as many of the largest number as it takes."""
    most = int(np.iinfo(dtype).max)
    wide = np.flatnonzero(gaps >= most)
    if not wide.size:
        return gaps.astype(dtype)
    times, rest = np.divmod(gaps.take(wide), most)
    narrow = gaps.astype(dtype)
    narrow[wide] = rest
    return np.insert(narrow, np.repeat(wide, times), most)


def _unpack_gaps(places: Unsigned, num_elements: int, num_changed: int) -> Indices:
    most = int(np.iinfo(places.dtype).max)
    last = places != most
    if not last[-1] or np.count_nonzero(last) != num_changed:
        raise MalformedMessage(f"delta part: its gaps are not those of {num_changed} elements")
    steps = np.cumsum(places, dtype=np.int64)
    indices = steps if places.size == num_changed else steps[last]
    indices += np.arange(num_changed)
    if indices[-1] >= num_elements:
        raise MalformedMessage(f"delta part: an element beyond the tensor's {num_elements}")
    return indices


def _unpack_bitmap(places: Unsigned, num_elements: int, num_changed: int) -> Indices:
    indices = np.flatnonzero(np.unpackbits(places.view(np.uint8), bitorder="little"))
    if indices.size != num_changed or indices[-1] >= num_elements:
        raise MalformedMessage(f"delta part: its bitmap is not of {num_changed} out of {num_elements} elements")
    return indices


def _planes(numbers: Unsigned) -> list[Octets]:
    """Split into byte planes, lowest byte first: a plane of like bytes compresses well, mixed ones do not."""
    octets = numbers.view(np.uint8).reshape(-1, numbers.itemsize)
    return [np.ascontiguousarray(octets[:, plane]) for plane in range(numbers.itemsize)]


def _interleave(planes: list[Octets]) -> Unsigned:
    if len(planes) == 1:
        return planes[0]
    octets = np.empty((planes[0].size, len(planes)), np.uint8)
    for number, plane in enumerate(planes):
        octets[:, number] = plane
    return octets.reshape(-1).view(_UNSIGNED[len(planes)])


def _shrink(plane: Octets, compressor: zstandard.ZstdCompressor) -> bytes | memoryview:
    """Return the stream as a zstd frame where that is worth it, else as it is."""
    middle = max(0, (plane.size - _SAMPLE_BYTES) // 2)
    sample = plane[middle : middle + _SAMPLE_BYTES]
    if plane.size > 2 * _SAMPLE_BYTES and len(compressor.compress(sample.data)) > sample.size * _WORTH:
        return plane.data
    packed = compressor.compress(plane.data)
    return packed if len(packed) < plane.size else plane.data


def _parse(view: memoryview, num_elements: int, item_bytes: int) -> tuple[int, int, list[tuple[memoryview, int]]]:
    """Check all that the header says; return it, and each stream with the bytes that it must have once inflated."""
    if len(view) < _HEADER.size:
        raise MalformedMessage(f"delta part of {len(view)} bytes: at least {_HEADER.size}")
    number, item, gap_bytes, num_changed, num_places = _HEADER.unpack_from(view)
    if number != DELTA_FORMAT:
        raise MalformedMessage(f"delta part of format {number}: this side reads format {DELTA_FORMAT}")
    if item != item_bytes or gap_bytes not in (BITMAP, 1, 2) or view[3]:
        raise MalformedMessage(f"delta part of elements of {item} bytes, form {gap_bytes}: not of this tensor")
    if not 1 <= num_changed <= num_elements:
        raise MalformedMessage(f"delta part of {num_changed} changed elements: 1 to {num_elements}")
    if gap_bytes == BITMAP:
        least = most = -(-num_elements // 8)
    else:
        least, most = num_changed, num_changed + num_elements // (256**gap_bytes - 1)
    if not least <= num_places <= most:
        raise MalformedMessage(f"delta part of {num_places} places: {least} to {most}")
    lengths = [num_places] * (gap_bytes or 1) + [num_changed] * item_bytes
    at = _HEADER.size + 8 * len(lengths)
    if len(view) < at:
        raise MalformedMessage(f"delta part of {len(view)} bytes: at least {at}")
    sizes = struct.unpack_from(f"<{len(lengths)}Q", view, _HEADER.size)
    if at + sum(sizes) != len(view) or any(size > length for size, length in zip(sizes, lengths, strict=True)):
        raise MalformedMessage(f"delta part of {len(view)} bytes: not what its streams add up to")
    streams = []
    for size, length in zip(sizes, lengths, strict=True):
        streams.append((view[at : at + size], length))
        at += size
    return gap_bytes, num_changed, streams


def _inflate(stream: memoryview, size: int) -> Octets:
    """Return the stream's `size` bytes; a stream of fewer bytes is a zstd frame of them.

    The library allocates what the frame claims, whatever limit it is given: so the claim is checked first.
    """
    if len(stream) == size:
        return np.frombuffer(stream, np.uint8)
    try:
        claimed = zstandard.get_frame_parameters(stream)
        if claimed.content_size != size or claimed.dict_id:
            raise MalformedMessage(f"delta part: a stream that does not claim to be of {size} bytes")
        octets = np.frombuffer(zstandard.ZstdDecompressor().decompress(stream, allow_extra_data=False), np.uint8)
    except zstandard.ZstdError as error:
        raise MalformedMessage(f"delta part: a stream that is no zstd frame: {error}") from None
    if octets.size != size:
        raise MalformedMessage(f"delta part: a stream of {octets.size} bytes: {size}")
    return octets
