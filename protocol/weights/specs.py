"""What tensors a version has and where each lies in its file: the safetensors layout as pure arithmetic.

A version's file is 8 bytes (little-endian header length), a JSON header padded with spaces, then the tensors without
gaps. `Layout(specs)` is deterministic, so both processes compute the same file from the same names, shapes and dtypes
and only the tensors' bytes travel. `Layout.parse` reads the header of a file that somebody else wrote, and trusts
nothing in it. No I/O, no sockets, no torch here; names other than these two classes stay inside protocol/weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Annotated, Literal, Self

import msgspec

Dtype = Literal[
    "F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2",
    "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL",
]  # fmt: skip
"""Names of the safetensors format. Dtypes narrower than a byte are not served."""

ITEM_BYTES: dict[Dtype, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

ALIGNMENT = 8
MAX_HEADER_BYTES = 16 << 20
MAX_FILE_BYTES = 1 << 44
"""16 TiB. A larger claim is a lie, refused before anything is allocated for it."""
_METADATA = "__metadata__"

Name = Annotated[str, msgspec.Meta(pattern=r"^[!-~]{1,512}\Z")]
"""Printable ASCII without spaces or line breaks (which `$` would let through): safe in logs and on a terminal."""
Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_FILE_BYTES)]
Shape = Annotated[tuple[Size, ...], msgspec.Meta(max_length=8)]


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of the model: its name, safetensors dtype and shape (`()` is a scalar)."""

    name: Name
    dtype: Dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, contiguous."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class _HeaderEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor's entry in a safetensors header."""

    dtype: Dtype
    shape: Shape
    data_offsets: tuple[Size, Size]


class Layout:
    """Where every tensor of a version lies in its safetensors file. Immutable.

    Widest dtypes come first, then names in order, so every tensor is aligned to its own item size.

    Example:
        >>> layout = Layout([TensorSpec("b", "F32", (2,)), TensorSpec("a", "F32", (2, 3))])
        >>> [spec.name for spec in layout.specs], layout.offset("b") - layout.offset("a")
        (['a', 'b'], 24)
    """

    specs: tuple[TensorSpec, ...]
    """In file order."""
    header: bytes
    """The first bytes of the file, up to the first tensor; a multiple of 8."""
    file_bytes: int

    def __init__(self, specs: Iterable[TensorSpec]) -> None:
        """Lay the tensors out.

        Raises:
            ValueError: a name twice, a reserved name, or more than a header can describe.
        """
        ordered = tuple(sorted(specs, key=lambda spec: (-ITEM_BYTES[spec.dtype], spec.name)))
        self._place(ordered, _header(ordered))

    @classmethod
    def parse(cls, header: bytes, file_bytes: int) -> Self:
        """Check the header of a file that we did not write, before any tensor of it is touched.

        Stricter than the format: what is ambiguous is refused (duplicate keys, gaps, trailing bytes).

        Args:
            header: Length prefix and JSON, padding included.
            file_bytes: Size of the whole file.

        Raises:
            ValueError: the header is not one we would load; the text says why.
        """
        entries = _parse_entries(header[8:])
        by_offset = sorted(entries.items(), key=lambda item: item[1].data_offsets)
        specs = tuple(TensorSpec(name, entry.dtype, entry.shape) for name, entry in by_offset)
        layout = cls.__new__(cls)
        layout._place(specs, header)
        for spec, (name, entry) in zip(specs, by_offset, strict=True):
            begin = layout.offset(name) - len(header)
            if entry.data_offsets != (begin, begin + spec.nbytes):
                raise ValueError(
                    f"tensor {name}: data_offsets {list(entry.data_offsets)}, but its shape and place need"
                    f" [{begin}, {begin + spec.nbytes}]"
                )
        if layout.file_bytes != file_bytes:
            raise ValueError(f"the file has {file_bytes} bytes, its header describes {layout.file_bytes}")
        return layout

    def offset(self, name: str) -> int:
        """Byte offset of the tensor in the file. KeyError for a name that is not there."""
        return self._offsets[name]

    def spec(self, name: str) -> TensorSpec:
        """Spec of the tensor of that name. KeyError for a name that is not there."""
        return self._by_name[name]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.header == other.header

    def __hash__(self) -> int:
        return hash(self.header)

    def _place(self, specs: tuple[TensorSpec, ...], header: bytes) -> None:
        self.specs, self.header = specs, header
        self._by_name = {spec.name: spec for spec in specs}
        self._offsets: dict[str, int] = {}
        position = len(header)
        for spec in specs:
            self._offsets[spec.name] = position
            position += spec.nbytes
        self.file_bytes = position
        if position > MAX_FILE_BYTES:
            raise ValueError(f"{position} bytes of tensors: at most {MAX_FILE_BYTES}")


def _header(specs: tuple[TensorSpec, ...]) -> bytes:
    """Write length prefix and JSON; `"format": "pt"` is what transformers wants to see."""
    entries: dict[str, object] = {_METADATA: {"format": "pt"}}
    position = 0
    for spec in specs:
        if spec.name in entries:
            raise ValueError(f"tensor {spec.name}: the name is given twice or reserved")
        offsets = (position, position := position + spec.nbytes)
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": offsets}
    text = msgspec.json.encode(entries)
    text += b" " * (-len(text) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"{len(specs)} tensors need a header of {len(text)} bytes: at most {MAX_HEADER_BYTES}")
    return len(text).to_bytes(8, "little") + text


def _parse_entries(text: bytes) -> dict[str, _HeaderEntry]:
    if not text.startswith(b"{"):
        raise ValueError("the header does not start with {")
    try:
        raw = json.loads(text.decode(), object_pairs_hook=_no_duplicates)
        msgspec.convert(raw.pop(_METADATA, {}), dict[str, str])
        return msgspec.convert(raw, dict[Name, _HeaderEntry])
    except RecursionError:
        raise ValueError("the header is nested too deeply") from None
    except msgspec.ValidationError as error:
        raise ValueError(f"the header's entries: {error}") from None


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse duplicate keys: two parsers would see two different files."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("the header has a key twice")
    return found
