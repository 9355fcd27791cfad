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
_BLOCK_BYTES: Final = 1 << 20
"""Of each version, compared at a time: what differs is still in the cache when it is gathered."""
_DENSE_WORDS: Final = 2
"""Where more than one of so many words of a block differ, the next one's elements are looked at rather than words."""
_BITMAP_SHARE: Final = 8
"""With more than one changed element in so many, a bit for each element is shorter than a byte for each gap."""
_ZSTD: Final = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6)
"""Level 1 that looks only for long matches, close by: nearly Huffman coding alone. On XOR values it is 1.8x as fast as
plain level 1 and leaves 0.86 of its bytes, on gaps and bitmaps as small and no slower."""
MAX_WINDOW_BYTES: Final = 8 << 20
"""Of a zstd frame, where its content is not larger: what every reader must allow. Ours take 512 KiB."""
_SAMPLE_BYTES: Final = 32 << 10
_WORTH: Final = 15 / 16
"""A stream whose sample does not shrink below this share goes as it is."""
_INDICES_AT_ONCE: Final = 64 << 10
_LOOK_BYTES: Final = 4 << 10
_EVERY_BYTES: Final = 256 << 10

Unsigned: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]
Positions: TypeAlias = npt.NDArray[np.int64]
Octets: TypeAlias = npt.NDArray[np.uint8]
Indices: TypeAlias = npt.NDArray[np.uint32] | npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TensorDelta:
    """What changed in one tensor: K elements."""

    indices: Indices
    """[K] uint32 (int64 in a tensor of more than 2^32 elements): positions of the elements, strictly ascending."""
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
    gaps, xor = _find_changes(old, fresh, item_bytes)
    if not gaps.size:
        return None
    gap_bytes, places = _pack_positions(gaps, old, fresh, item_bytes)
    compressor = zstandard.ZstdCompressor(compression_params=_ZSTD)
    streams = [_shrink(plane, compressor) for plane in (*_planes(places), *_planes(xor))]
    header = _HEADER.pack(DELTA_FORMAT, item_bytes, gap_bytes, gaps.size, places.size)
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
        where = delta.indices[begin : begin + _INDICES_AT_ONCE].astype(np.intp)
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


def _find_changes(old: Octets, fresh: Octets, item_bytes: int) -> tuple[Unsigned, Unsigned]:
    """Return how many equal elements precede each that differs, since the one before, and the XOR of its bits.

    Finding changes is most of what encoding costs. On 64 MiB of bf16 of which 1, 3 and 10 % of the elements differ,
    one thread on two busy cores was so many times as fast as XOR of the whole tensor and zstd level 1 in the same run:

        flatnonzero of all elements                         1.1  1.5  4.0
        XOR, flatnonzero of elements, blocks of 128 KiB     2.0  2.0  2.1
        XOR, then of 8-byte words, blocks of 128 KiB        1.4  2.2  2.5
        != of words, gather from both, blocks of 1 MiB      2.1  3.1  2.8
        XOR, then of words, blocks of 1 MiB                 2.0  3.8  3.3    this one
        the same, first of groups of 8 words                1.9

    Smaller blocks pay too much for the calls of numpy, larger ones leave the cache. Above a fifth most words differ,
    and looking at elements is faster (30 %: 0.52 against 0.30 GB/s). Gaps are taken while a block's positions, 8 bytes
    each, are in the cache: with np.diff of all of them, packing took as long as finding.
    """
    dtype = _UNSIGNED[item_bytes]
    gaps: list[Unsigned] = []
    values: list[Unsigned] = []
    buffer = np.empty(min(_BLOCK_BYTES, old.size), np.uint8)
    mask = np.empty(buffer.size // item_bytes, np.bool_)
    last, sparse = -1, item_bytes < 8
    for begin in range(0, old.size, _BLOCK_BYTES):
        a, b = old[begin : begin + _BLOCK_BYTES], fresh[begin : begin + _BLOCK_BYTES]
        unit = np.dtype(np.uint64) if sparse and a.size % 8 == 0 else dtype
        difference = np.bitwise_xor(a.view(unit), b.view(unit), out=buffer[: a.size].view(unit))
        differing = np.not_equal(difference, 0, out=mask[: difference.size]).nonzero()[0]
        sparse = item_bytes < 8 and differing.size * unit.itemsize * _DENSE_WORDS <= a.size
        if not differing.size:
            continue
        found, xor = _split_words(differing, difference.take(differing), dtype)
        gaps.append(_gaps(found, last - begin // item_bytes, old.size // item_bytes))
        values.append(xor)
        last = int(found[-1]) + begin // item_bytes
    if not gaps:
        return np.empty(0, np.uint32), np.empty(0, dtype)
    return np.concatenate(gaps), np.concatenate(values)


def _split_words(words: Positions, differences: Unsigned, dtype: np.dtype[Any]) -> tuple[Positions, Unsigned]:
    """Return positions and XOR of the elements that differ, given those of the words that do."""
    if differences.dtype == dtype:
        return words, differences
    bits = 3 - dtype.itemsize.bit_length() + 1  # of an element's place in its word
    lanes = differences.view(dtype)
    differing = (lanes != 0).nonzero()[0]
    words <<= bits
    found = words.take(differing >> bits)
    xor = lanes.take(differing)
    differing &= (1 << bits) - 1
    found += differing
    return found, xor


def _gaps(found: Positions, before: int, num_elements: int) -> Unsigned:
    """Return the equal elements before each of `found`, the first one counted from the position `before`."""
    gaps: Unsigned = np.empty(found.size, _index_dtype(num_elements))
    np.subtract(found[1:], found[:-1], out=gaps[1:], casting="unsafe")
    gaps[0] = found[0] - before
    gaps -= 1
    return gaps


def _index_dtype(num_elements: int) -> np.dtype[Any]:
    return np.dtype(np.uint32 if num_elements <= 1 << 32 else np.int64)


def _pack_positions(gaps: Unsigned, old: Octets, fresh: Octets, item_bytes: int) -> tuple[int, Unsigned]:
    """Return the form of the positions (BITMAP, or bytes of a gap) and their numbers: the shorter one."""
    if gaps.size * _BITMAP_SHARE > old.size // item_bytes:
        return BITMAP, _bitmap(old, fresh, _UNSIGNED[item_bytes])
    wide = (gaps >= 0xFF).nonzero()[0]
    excess = gaps.take(wide)
    by_bytes = gaps.size + int((excess // 0xFF).sum())
    by_pairs = 2 * (gaps.size + int((excess // 0xFFFF).sum()))
    if by_pairs < by_bytes:
        return 2, _pack_gaps(gaps, (gaps >= 0xFFFF).nonzero()[0], _UNSIGNED[2])
    return 1, _pack_gaps(gaps, wide, _UNSIGNED[1])


def _pack_gaps(gaps: Unsigned, wide: Positions, dtype: np.dtype[Any]) -> Unsigned:
    """Write every gap as its remainder, after as many of the largest number as it takes."""
    narrow = gaps.astype(dtype)
    if not wide.size:
        return narrow
    most = int(np.iinfo(dtype).max)
    times, narrow[wide] = np.divmod(gaps.take(wide), most)
    return np.insert(narrow, np.repeat(wide, times), most)


def _bitmap(old: Octets, fresh: Octets, dtype: np.dtype[Any]) -> Octets:
    blocks = (slice(begin, begin + _BLOCK_BYTES) for begin in range(0, old.size, _BLOCK_BYTES))
    bits = [np.packbits(old[block].view(dtype) != fresh[block].view(dtype), bitorder="little") for block in blocks]
    return np.concatenate(bits)


def _unpack_gaps(places: Unsigned, num_elements: int, num_changed: int) -> Indices:
    most = int(np.iinfo(places.dtype).max)
    ends = places != most
    if not ends[-1] or np.count_nonzero(ends) != num_changed:
        raise MalformedMessage(f"delta part: its gaps are not those of {num_changed} elements")
    if int(places.sum(dtype=np.uint64)) + num_changed > num_elements:
        raise MalformedMessage(f"delta part: an element beyond the tensor's {num_elements}")
    indices: Indices = np.add(places, ends, dtype=_index_dtype(num_elements))
    np.cumsum(indices, out=indices)
    if places.size > num_changed:
        indices = indices[ends]
    indices -= 1
    return indices


def _unpack_bitmap(places: Octets, num_elements: int, num_changed: int) -> Indices:
    indices = np.unpackbits(places, bitorder="little").view(np.bool_).nonzero()[0]
    if indices.size != num_changed or indices[-1] >= num_elements:
        raise MalformedMessage(f"delta part: its bitmap is not of {num_changed} out of {num_elements} elements")
    return indices.astype(_index_dtype(num_elements), copy=False)


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
        if claimed.content_size != size or claimed.window_size > max(size, MAX_WINDOW_BYTES) or claimed.dict_id:
            raise MalformedMessage(f"delta part: a stream that is no zstd frame of {size} bytes that would be read")
        octets = np.frombuffer(zstandard.ZstdDecompressor().decompress(stream, allow_extra_data=False), np.uint8)
    except zstandard.ZstdError as error:
        raise MalformedMessage(f"delta part: a stream that should be a zstd frame: {error}") from None
    if octets.size != size:
        raise MalformedMessage(f"delta part: a stream of {octets.size} bytes: {size}")
    return octets
