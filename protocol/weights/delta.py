"""A tensor as the difference from its last version: lossless, of exactly the elements whose bytes differ.

Elements of 1, 2, 4 or 8 bytes are compared as bits, so NaN payloads and -0.0 arrive as they are. What an optimizer's
step changes of bf16 weights is often a few percent, by a unit or two in the last place: the part is then a fiftieth of
the tensor. It says where the changed elements are and, for each, old XOR new; so applying a part twice undoes it.
protocol/README.md specifies the bytes ("Delta parts"); digests of the result, elsewhere, decide what is believed (I5).
The loops are delta_loops.py's. No sockets, files or torch here; no state, so any thread may use it, several at once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import zstandard

from protocol.codec import Buffer
from protocol.errors import MalformedMessage
from protocol.weights import delta_loops as loops
from protocol.weights.push_costs import Costs, LinkSpeed, choose

__all__ = [
    "Costs", "LinkSpeed", "TensorDelta", "apply_tensor", "changed_fraction", "choose", "decode_tensor", "encode_tensor",
    "num_changed", "prepare_decoding", "prepare_encoding",
]  # fmt: skip

DELTA_FORMAT: Final = 1
"""First byte of a part."""
BITMAP: Final = 0
"""Positions as one bit per element; otherwise as gaps, of so many bytes."""
_HEADER: Final = struct.Struct("<BBBxQQ")
"""Format, bytes per element, bytes per gap (or BITMAP), changed elements, gaps; then a u64 per stream."""
_UNSIGNED: Final[dict[int, np.dtype[Any]]] = {size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)}
_BLOCK_BYTES: Final = 1 << 20
"""Of each version, compared at a time for a bitmap."""
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
_LOOK_BYTES: Final = 4 << 10
_EVERY_BYTES: Final = 256 << 10

Unsigned: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]
Positions: TypeAlias = npt.NDArray[np.int64]
Octets: TypeAlias = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class TensorDelta:
    """What changed in one tensor: K elements."""

    indices: Positions
    """[K] int64: positions of the elements, strictly ascending."""
    xor: Unsigned
    """[K] uint8 to uint64: old bits XOR new bits of each."""


def prepare_encoding() -> None:
    """Compile what it needs, once in a process: else the first delta would wait for it.

    Raises:
        ImportError: numba cannot be imported here.
    """
    loops.find()
    loops.widen()


def prepare_decoding(item_bytes: Iterable[int]) -> None:
    """The same for the other end, where elements have these widths."""
    for width in set(item_bytes):
        loops.apply(width)
    loops.unpack(1), loops.unpack(2)


def encode_tensor(base: Buffer, new: Buffer, item_bytes: int) -> bytes | None:
    """Return the part that turns `base` into `new`, or None where no byte differs.

    Args:
        base: Bytes of the tensor as the receiver has it.
        new: As many bytes of its new version.
        item_bytes: Bytes of an element: 1, 2, 4 or 8.

    Raises:
        ValueError: they are not as many, or not whole elements.
    """
    old, fresh = np.frombuffer(base, np.uint8), np.frombuffer(new, np.uint8)
    num_elements, rest = divmod(old.size, item_bytes)
    if old.size != fresh.size or rest:  # no loop looks where it reads
        raise ValueError(f"{old.size} bytes of elements of {item_bytes}, and {fresh.size} of their new version")
    most = num_elements // _BITMAP_SHARE
    gaps = np.empty(loops.gap_room(most, num_elements), np.uint8)
    planes = np.empty((item_bytes, num_elements), np.uint8)
    words = [piece for version in zip(_words(old), _words(fresh), strict=True) for piece in version]
    num_changed, num_gaps, more = loops.find()(*words, most, gaps, planes)
    if not num_changed:
        return None
    form, places = 1, gaps[:num_gaps]
    if num_changed > most:
        form, places = BITMAP, _bitmap(old, fresh, _UNSIGNED[item_bytes])
    elif num_changed + 2 * more < num_gaps - num_changed:
        form, places = 2, np.empty(num_changed + more, np.uint16)
        loops.widen()(gaps[:num_gaps], places)
    compressor = zstandard.ZstdCompressor(compression_params=_ZSTD)
    streams = [_shrink(plane, compressor) for plane in (*_planes(places), *planes[:, :num_changed])]
    header = _HEADER.pack(DELTA_FORMAT, item_bytes, form, num_changed, places.size)
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


def apply_tensor(delta: TensorDelta, target: Buffer, *, first: int = 0) -> None:
    """Change bytes of the tensor in place: every element at `indices` that they hold becomes itself XOR its value.

    Args:
        delta: Decoded for the tensor.
        target: Writable bytes of whole elements, all of the tensor's or some in a row, at any alignment.
        first: Which element they begin with.
    """
    elements = np.frombuffer(target, delta.xor.dtype)
    begin, end = delta.indices.searchsorted((first, first + elements.size))
    loops.apply(delta.xor.itemsize)(elements, first, delta.indices[begin:end], delta.xor[begin:end])


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


def _words(octets: Octets) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Return them eight at a time, and the rest with zeros behind it."""
    whole = octets.size // 8 * 8
    tail = np.zeros(8 if whole < octets.size else 0, np.uint8)
    tail[: octets.size - whole] = octets[whole:]
    return octets[:whole].view(np.uint64), tail.view(np.uint64)


def _bitmap(old: Octets, fresh: Octets, dtype: np.dtype[Any]) -> Octets:
    blocks = (slice(begin, begin + _BLOCK_BYTES) for begin in range(0, old.size, _BLOCK_BYTES))
    bits = [np.packbits(old[block].view(dtype) != fresh[block].view(dtype), bitorder="little") for block in blocks]
    return np.concatenate(bits)


def _unpack_gaps(places: Unsigned, num_elements: int, num_changed: int) -> Positions:
    positions = np.empty(num_changed, np.int64)
    found = loops.unpack(places.itemsize)(places, num_elements, positions)
    if found == loops.BEYOND:
        raise MalformedMessage(f"delta part: an element beyond the tensor's {num_elements}")
    if found != num_changed:
        raise MalformedMessage(f"delta part: its gaps are not those of {num_changed} elements")
    return positions


def _unpack_bitmap(places: Octets, num_elements: int, num_changed: int) -> Positions:
    positions = np.unpackbits(places, bitorder="little").view(np.bool_).nonzero()[0]
    if positions.size != num_changed or positions[-1] >= num_elements:
        raise MalformedMessage(f"delta part: its bitmap is not of {num_changed} out of {num_elements} elements")
    return positions


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
