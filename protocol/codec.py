"""Messages to frames and back: a msgpack header, a raw frame per large array, one for all small ones together.

Frame 0 is the message without its bulk: a msgpack map of named fields in which every array stands as
`[dtype, length]` or `[dtype, rows, columns]`. Then each array of SMALL_BYTES or more is a frame, and all smaller ones
share the last frame, each at the next multiple of ALIGNMENT, with zeros in between. Both in the order of the fields,
raw, little-endian. An array that is None lies nowhere. So the header alone says how many frames there are, how long
each is and what lies where. Why so: a frame costs both ends microseconds, and a Group has a dozen small arrays;
numbers in msgpack lists would cost hundreds of times more.

No array is copied but the small ones, once, when encoded: frames of large arrays are views of them (do not write to
those before they are sent), decoded arrays are read-only views of the received frames. All limits hold before anything
is allocated on the sender's word. Whatever a peer sends, `decode` returns a message or raises ProtocolError, and its
text never repeats what was sent. No state, so any thread may use it. Knows nothing of sockets and of what messages
are for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final, NamedTuple, TypeAlias, Union, get_args

import msgspec
import numpy as np
import numpy.typing as npt

from protocol.errors import MalformedMessage, VersionMismatch
from protocol.messages import AnyMessage, Float32, Int32, UInt8, UInt16
from protocol.versions import PROTOCOL_VERSION

MAX_HEADER_BYTES: Final = 64 << 10
MAX_FRAME_BYTES: Final = 64 << 20
"""Of one array; the sockets enforce it too, before they allocate."""
SMALL_BYTES: Final = 16 << 10
"""An array of fewer bytes travels in the shared frame: up to there a copy is cheaper than a frame."""
ALIGNMENT: Final = 8
"""Of the arrays in the shared frame, in bytes."""

Array: TypeAlias = npt.NDArray[Any]
Buffer: TypeAlias = Any
"""bytes, memoryview, zmq.Frame: whatever has the buffer protocol (a type for it exists from Python 3.12 on)."""

_CODES: Final[dict[Any, str]] = {Int32: "<i4", Float32: "<f4", UInt8: "|u1", UInt16: "<u2"}
"""Declared type of an array field -> its dtype on the wire."""
_CODE_OF_DTYPE: Final = {np.dtype(code): code for code in _CODES.values()}
_DECODER_ERRORS: Final = (msgspec.MsgspecError, ValueError, RecursionError)
"""What typed decoding raises on bad bytes: bad UTF-8 is a UnicodeDecodeError, deep nesting a RecursionError."""
_SAFE_REASON: Final = re.compile(r"Expected `|Object missing required field")
"""msgspec's texts that hold names of types and fields of ours only, nothing that was sent."""


def encode(message: AnyMessage) -> list[bytes | memoryview]:
    """Return the frames of a message; those of large arrays are views of them.

    Raises:
        TypeError: an array has a dtype that no field has.
        ValueError: the header or an array is larger than any peer accepts.
    """
    small: list[bytes] = []
    large: list[memoryview] = []
    shared_size = 0

    def describe(array: Array) -> list[str | int]:
        nonlocal shared_size
        code = _CODE_OF_DTYPE.get(array.dtype)
        if code is None:
            raise TypeError(f"array of {array.dtype}, the wire has {', '.join(map(str, _CODE_OF_DTYPE))}")
        size = array.nbytes
        if size < SMALL_BYTES:
            padding = -shared_size % ALIGNMENT
            small.append(bytes(padding) + array.tobytes())
            shared_size += padding + size
        elif size <= MAX_FRAME_BYTES:
            large.append(np.ascontiguousarray(array).data)
        else:
            raise ValueError(f"array of {size} bytes, allowed are {MAX_FRAME_BYTES}: send it in parts")
        return [code, *array.shape]

    header = msgspec.msgpack.encode(message, enc_hook=describe)
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(f"{type(message).__name__}: header of {len(header)} bytes, allowed are {MAX_HEADER_BYTES}")
    return [header, *large, b"".join(small)] if small else [header, *large]


def decode(frames: Sequence[Buffer]) -> AnyMessage:
    """Return the message in `frames`. Its arrays are read-only views that keep their frames alive.

    Raises:
        MalformedMessage: the frames are no message of this protocol.
        VersionMismatch: they are, or may be, a message of another PROTOCOL_VERSION.
    """
    if not 0 < len(frames) <= MAX_FRAMES:
        raise MalformedMessage(f"{len(frames)} frames, allowed are 1 to {MAX_FRAMES}")
    if len(frames[0]) > MAX_HEADER_BYTES:
        raise MalformedMessage(f"header of {len(frames[0])} bytes, allowed are {MAX_HEADER_BYTES}")
    try:
        header = _decoder.decode(frames[0])
    except _DECODER_ERRORS as error:
        raise _refusal(frames[0], error) from None
    if header.protocol_version != PROTOCOL_VERSION:
        raise _version_mismatch(header.protocol_version)
    layout = _LAYOUTS.get(type(header))
    if layout is not None:
        return _fill_in(header, layout, frames)
    if len(frames) > 1:
        raise MalformedMessage(f"{len(frames)} frames: {type(header).__name__} has no arrays")
    message: AnyMessage = header
    return message


_Extent: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=MAX_FRAME_BYTES)]
"""Bounded also where the other extent is 0, which no size in bytes would show."""


class _Described(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False):
    """What stands in a header for an array."""

    dtype: str
    length: _Extent
    """Rows, if there are columns."""
    columns: _Extent | None = None


class _Layout(NamedTuple):
    """How a header becomes a message."""

    make_message: Callable[..., AnyMessage]
    arrays: tuple[tuple[str, str, np.dtype[Any], int], ...]
    """(field, dtype on the wire, dtype, bytes of a number), in the order of the fields."""


_Place: TypeAlias = tuple[str, np.dtype[Any], int, int | None, int, int]
"""(field, dtype, rows, columns, which frame after the header, byte in it) of one array; frame -1 is the shared one."""


def _fill_in(header: msgspec.Struct, layout: _Layout, frames: Sequence[Buffer]) -> AnyMessage:
    """Make the message of a header, with views of the frames where it describes arrays."""
    fields = msgspec.structs.asdict(header)
    places, expected = _find_places(fields, layout)
    views = [memoryview(frame).toreadonly() for frame in frames[1:]]
    sizes = [view.nbytes for view in views]
    if sizes != expected:
        raise MalformedMessage(f"frames of {sizes} bytes after a header that describes {expected}")
    for name, dtype, rows, columns, frame, start in places:
        if columns is None:
            fields[name] = np.frombuffer(views[frame], dtype, rows, start)
        else:
            fields[name] = np.frombuffer(views[frame], dtype, rows * columns, start).reshape(rows, columns)
    try:
        return layout.make_message(**fields)
    except ValueError as error:  # of the message's own checks, which speak of sizes and ranges only
        raise MalformedMessage(str(error)) from None


def _find_places(fields: dict[str, Any], layout: _Layout) -> tuple[list[_Place], list[int]]:
    """Return where the described arrays lie, and the bytes of each frame that this takes."""
    places: list[_Place] = []
    sizes: list[int] = []
    shared_size, is_shared = 0, False
    for name, code, dtype, itemsize in layout.arrays:
        described = fields[name]
        if described is None:
            continue
        rows, columns = described.length, described.columns
        size = itemsize * (rows if columns is None else rows * columns)
        if described.dtype != code or size > MAX_FRAME_BYTES:
            raise MalformedMessage(f"{name}: expected {code}, at most {MAX_FRAME_BYTES} bytes")
        if size < SMALL_BYTES:
            start = shared_size + -shared_size % ALIGNMENT
            places.append((name, dtype, rows, columns, -1, start))
            shared_size = start + size
            is_shared = True
        else:
            places.append((name, dtype, rows, columns, len(sizes), 0))
            sizes.append(size)
    return places, [*sizes, shared_size] if is_shared else sizes


def _header_type(message_type: type[AnyMessage]) -> tuple[type[msgspec.Struct], _Layout | None]:
    """Derive the type of a message's header; one without arrays is its own header."""
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    arrays = []
    for field in msgspec.structs.fields(message_type):
        declared = field.type
        code = next((_CODES[kind] for kind in (declared, *get_args(declared)) if kind in _CODES), None)
        if code is not None:
            arrays.append((field.name, code, np.dtype(code), np.dtype(code).itemsize))
            declared = _Described if field.required else _Described | None
        fields.append((field.name, declared) if field.required else (field.name, declared, field.default))
    if not arrays:
        return message_type, None
    config = message_type.__struct_config__
    header_type = msgspec.defstruct(
        message_type.__name__,
        fields,
        tag_field=config.tag_field,
        tag=config.tag,
        frozen=True,
        kw_only=True,
        forbid_unknown_fields=True,
    )
    return header_type, _Layout(message_type, tuple(arrays))


_HEADERS: Final = [_header_type(message_type) for message_type in get_args(AnyMessage)]
_LAYOUTS: Final = {header_type: layout for header_type, layout in _HEADERS if layout is not None}
MAX_FRAMES: Final = 1 + max(len(layout.arrays) for layout in _LAYOUTS.values())
"""Of one message: a Group of which every array is large."""
_decoder: Final[msgspec.msgpack.Decoder[Any]] = msgspec.msgpack.Decoder(
    Union[tuple(header_type for header_type, _ in _HEADERS)]  # noqa: UP007 - of a computed list
)


class _AnyVersion(msgspec.Struct):
    """What every version's header has: unknown fields are skipped, not read."""

    protocol_version: int


_peek: Final = msgspec.msgpack.Decoder(_AnyVersion)


def _refusal(header: Buffer, error: Exception) -> MalformedMessage | VersionMismatch:
    """Say why a header is refused: another version if it can be told, else the place, never the content."""
    try:
        version = _peek.decode(header).protocol_version
    except _DECODER_ERRORS:
        version = PROTOCOL_VERSION
    if version != PROTOCOL_VERSION:
        return _version_mismatch(version)
    text, _, path = str(error).partition(" - at ")
    if error.__cause__ is None and not _SAFE_REASON.match(text):
        text = "not a message"
    return MalformedMessage(f"{text} at {path}" if path else text)


def _version_mismatch(version: int) -> VersionMismatch:
    return VersionMismatch(f"message of protocol version {version}, this process speaks {PROTOCOL_VERSION}")
