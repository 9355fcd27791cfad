"""Messages to frames and back: one msgpack header, then one raw frame per array field.

Frame 0 is the message without its bulk: a msgpack map of named fields in which every array stands as
`[dtype, length]` or `[dtype, rows, columns]`. Frames 1.. are those arrays, little-endian, in the order of their
fields; an array that is None has no frame. Numbers never travel in msgpack lists: that costs hundreds of times more.

Both ways without a copy: encoded frames are views of the message's arrays (do not write to them before they are
sent), decoded arrays are read-only views of the received frames. All limits hold before anything is allocated on the
sender's word. Whatever a peer sends, `decode` returns a message or raises ProtocolError, and its text never repeats
what was sent. Knows nothing of sockets and of what messages are for.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from protocol.errors import MalformedMessage, VersionMismatch
from protocol.messages import AnyMessage, Float32, Int32, UInt8, UInt16
from protocol.versions import PROTOCOL_VERSION

MAX_HEADER_BYTES: Final = 64 << 10
MAX_FRAMES: Final = 32
"""Of one message, header included. A Group with all its arrays has 18."""
MAX_FRAME_BYTES: Final = 64 << 20
"""Of one array frame; the sockets enforce it too, before they allocate."""

Array: TypeAlias = npt.NDArray[Any]
Buffer: TypeAlias = Any
"""bytes, memoryview, zmq.Frame: whatever has the buffer protocol (a type for it exists from Python 3.12 on)."""

_CODES: Final[dict[Any, str]] = {Int32: "<i4", Float32: "<f4", UInt8: "|u1", UInt16: "<u2"}
_EXPECTED: Final = {alias: (code, np.dtype(code)) for alias, code in _CODES.items()}
"""Declared type of a field -> what its frame must be."""
_CODE_OF_DTYPE: Final = {np.dtype(code): code for code in _CODES.values()}
_SAFE_REASON: Final = re.compile(r"Expected `|Object missing required field")
"""msgspec's texts that hold names of types and fields of ours only, nothing that was sent."""


def encode(message: AnyMessage) -> list[bytes | memoryview]:
    """Return the frames of a message: the header, then views of its arrays.

    Raises:
        TypeError: an array has a dtype that no field has.
        ValueError: the header or an array is larger than any peer accepts.
    """
    return _codec.encoder.encode(message)


def decode(frames: Sequence[Buffer]) -> AnyMessage:
    """Return the message in `frames`. Its arrays are read-only views that keep their frames alive.

    Raises:
        MalformedMessage: the frames are no message of this protocol.
        VersionMismatch: they are, or may be, a message of another PROTOCOL_VERSION.
    """
    return _codec.decoder.decode(frames)


class _Encoder:
    """Collects the array frames of one message while msgspec writes its header."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder(enc_hook=self._add_array)
        self._frames: list[bytes | memoryview] = []

    def encode(self, message: AnyMessage) -> list[bytes | memoryview]:
        frames = self._frames = [b""]
        try:
            frames[0] = header = self._encoder.encode(message)
        except KeyError as error:
            raise TypeError(f"array of {error}: the wire has {', '.join(map(str, _CODE_OF_DTYPE))}") from None
        finally:
            self._frames = []  # else the arrays would live until the next message
        if len(header) > MAX_HEADER_BYTES:
            raise ValueError(f"{type(message).__name__}: header of {len(header)} bytes, allowed are {MAX_HEADER_BYTES}")
        return frames

    def _add_array(self, array: Array) -> list[str | int]:
        code = _CODE_OF_DTYPE[array.dtype]
        view = array.data
        if not view.c_contiguous:
            view = array.copy(order="C").data
        if view.nbytes > MAX_FRAME_BYTES:
            raise ValueError(f"array of {view.nbytes} bytes, allowed are {MAX_FRAME_BYTES}: send it in parts")
        self._frames.append(view)
        return [code, *array.shape]


class _Decoder:
    """Hands the array frames of one message to its fields while msgspec reads its header."""

    def __init__(self) -> None:
        self._decoder = msgspec.msgpack.Decoder(AnyMessage, dec_hook=self._take_array)
        self._frames: Iterator[Buffer] = iter(())

    def decode(self, frames: Sequence[Buffer]) -> AnyMessage:
        if not 0 < len(frames) <= MAX_FRAMES:
            raise MalformedMessage(f"{len(frames)} frames: allowed are 1 to {MAX_FRAMES}")
        self._frames = iter(frames)
        header = next(self._frames)
        if len(header) > MAX_HEADER_BYTES:
            raise MalformedMessage(f"header of {len(header)} bytes: allowed are {MAX_HEADER_BYTES}")
        try:
            message: AnyMessage = self._decoder.decode(header)
            complete = next(self._frames, None) is None
        except (msgspec.MsgspecError, RecursionError) as error:
            raise _refusal(header, error) from None
        except StopIteration:
            raise MalformedMessage(f"{len(frames)} frames: fewer than the header has arrays") from None
        finally:
            self._frames = iter(())  # else the frames would live until the next message
        if message.protocol_version != PROTOCOL_VERSION:
            raise _version_mismatch(message.protocol_version)
        if not complete:
            raise MalformedMessage(f"{len(frames)} frames: more than the header has arrays")
        return message

    def _take_array(self, declared: Any, described: Any) -> Array:
        """Make a view of the next frame. What it raises, msgspec prefixes with the field's path."""
        code, dtype = _EXPECTED[declared]
        frame = next(self._frames)
        if type(frame) is not bytes:
            frame = memoryview(frame).toreadonly()
            if frame.nbytes > MAX_FRAME_BYTES:
                raise MalformedMessage(f"a frame of {frame.nbytes} bytes: allowed are {MAX_FRAME_BYTES}")
        array: Array = np.frombuffer(frame, dtype)
        if described == [code, len(array)]:
            return array
        return _as_matrix(array, code, described)


def _as_matrix(array: Array, code: str, described: Any) -> Array:
    """Shape a two-dimensional array; whatever else is described is refused."""
    if type(described) is not list or len(described) not in (2, 3) or described[0] != code:
        raise MalformedMessage(f"expected an array [{code!r}, length] or [{code!r}, rows, columns]")
    if len(described) == 3:
        _, rows, columns = described
        if rows >= 0 and columns >= 0 and rows * columns == array.size:
            return array.reshape(rows, columns)
    raise MalformedMessage(f"a frame of {array.nbytes} bytes does not fill its shape")


class _Codec(threading.local):
    """One encoder and one decoder per thread: their hooks hold the frames of the message in work."""

    def __init__(self) -> None:
        self.encoder = _Encoder()
        self.decoder = _Decoder()


_codec = _Codec()


class _AnyVersion(msgspec.Struct):
    """What every version's header has: unknown fields are skipped, not read."""

    protocol_version: int


_peek = msgspec.msgpack.Decoder(_AnyVersion)


def _refusal(header: Buffer, error: Exception) -> MalformedMessage | VersionMismatch:
    """Say why a header is refused: another version if it can be told, else the place, never the content."""
    try:
        version = _peek.decode(header).protocol_version
    except (msgspec.MsgspecError, RecursionError):
        version = PROTOCOL_VERSION
    if version != PROTOCOL_VERSION:
        return _version_mismatch(version)
    text, _, path = str(error).partition(" - at ")
    if error.__cause__ is None and not _SAFE_REASON.match(text):
        text = "not a message"
    return MalformedMessage(f"{text} at {path}" if path else text)


def _version_mismatch(version: int) -> VersionMismatch:
    return VersionMismatch(f"message of protocol version {version}, this process speaks {PROTOCOL_VERSION}")
