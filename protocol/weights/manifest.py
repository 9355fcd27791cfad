"""The manifest of a version: which tensors, where in its file, and what every one of them must hash to.

It travels on the control plane (in WeightsReady) while the bytes travel on the bulk plane, through other servers
perhaps, or as differences: its digests are of the result, and they alone decide what is accepted (invariant I5). This
file must not know sockets, files or torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, Self

import blake3
import msgspec
import xxhash

from protocol.errors import MalformedMessage
from protocol.versions import Version
from protocol.weights.adapters import AdapterSpec, changed_weights
from protocol.weights.specs import Dtype, Layout, Size, TensorSpec

__all__ = [
    "BLOCK_BYTES", "Algorithm", "Block", "Dtype", "Manifest", "Shipment", "TensorEntry", "TensorSpec", "block_digests",
    "blocks_of", "check_digests", "content_digest", "digest", "new_hasher", "schema_digest",
]  # fmt: skip

Algorithm = Literal["blake3", "xxh3_128"]
"""blake3 resists a forger and is for everything that crosses hosts; xxh3_128 only finds accidents and costs a sixth."""

DIGEST_BYTES: dict[Algorithm, int] = {"blake3": 32, "xxh3_128": 16}
BLOCK_BYTES = 4 << 20
"""What is verified, fetched again and passed on as one: small against a link's second, large against its digest."""
MAX_MANIFEST_BYTES = 32 << 20
MAX_INT32 = 2**31 - 1
"""Versions travel as int32 in every group."""


class Hasher(Protocol):
    """A digest being computed."""

    def update(self, buffer: bytes | memoryview, /) -> object:
        """Take in the next bytes; other threads run meanwhile."""

    def hexdigest(self) -> str:
        """Return the digest of all bytes so far, in lower-case hex."""


class Block(NamedTuple):
    """Consecutive bytes that have a digest of their own."""

    what: str
    """Whose they are, for messages."""
    offset: int
    nbytes: int
    digest: str


class Shipment(NamedTuple):
    """What is fetched as one: the file of a version, the delta that leads to it from `base`, or some blocks of one."""

    version: Version
    base: Version | None
    algorithm: Algorithm
    nbytes: int
    blocks: Sequence[Block]
    """In file order."""


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of a version: what it is, where it lies in the file, and the digests of its bytes."""

    spec: TensorSpec
    offset: Size
    nbytes: Size
    digests: tuple[str, ...]
    """Of each BLOCK_BYTES of it, the last ones shorter; lower-case hex."""


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Everything a receiver needs to know about a version before it asks for the first byte.

    Example:
        >>> spec = TensorSpec("w", "F32", (1,))
        >>> layout = Layout([spec])
        >>> entry = TensorEntry(spec, layout.offset("w"), spec.nbytes, (digest("xxh3_128", bytes(4)),))
        >>> manifest = Manifest(
        ...     version=Version(1, 7), algorithm="xxh3_128", tensors=(entry,), file_bytes=layout.file_bytes)
        >>> Manifest.from_json(manifest.to_json()) == manifest
        True
    """

    version: Version
    algorithm: Algorithm
    tensors: tuple[TensorEntry, ...]
    """In file order."""
    file_bytes: Size
    adapter: AdapterSpec | None = None
    """What the tensors are, where they are not the whole model."""

    @property
    def layout(self) -> Layout:
        """The layout of the version's file (computed anew: keep it)."""
        return Layout(entry.spec for entry in self.tensors)

    @property
    def shipment(self) -> Shipment:
        """All of the file but its header: every byte of every tensor once (computed anew: keep it)."""
        blocks = [
            block
            for entry in self.tensors
            for block in blocks_of(f"tensor {entry.spec.name}", entry.offset, entry.nbytes, entry.digests)
        ]
        return Shipment(self.version, None, self.algorithm, self.file_bytes, blocks)

    def to_json(self) -> bytes:
        """Encode for WeightsReady."""
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, data: bytes | memoryview) -> Self:
        """Decode and check everything a manifest can lie about.

        Raises:
            MalformedMessage: not a manifest, its offsets and sizes are not those of its tensors' layout, or its tensors
                are not those of the adapter that it says it is.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise MalformedMessage(f"manifest of {len(data)} bytes: at most {MAX_MANIFEST_BYTES}")
        try:
            manifest = msgspec.json.decode(data, type=cls)
            _check(manifest)
        except (msgspec.MsgspecError, ValueError) as error:  # ValueError: text that is no UTF-8, or a bad layout
            raise MalformedMessage(f"manifest: {error}") from None
        return manifest


def new_hasher(algorithm: Algorithm) -> Hasher:
    """Return a hasher that has seen no bytes."""
    return blake3.blake3() if algorithm == "blake3" else xxhash.xxh3_128()


def digest(algorithm: Algorithm, buffer: bytes | memoryview) -> str:
    """Digest of a contiguous buffer, in lower-case hex."""
    hasher = new_hasher(algorithm)
    hasher.update(buffer)
    return hasher.hexdigest()


def block_digests(algorithm: Algorithm, buffer: memoryview) -> tuple[str, ...]:
    """Digest of each BLOCK_BYTES of a contiguous buffer of bytes."""
    return tuple(digest(algorithm, buffer[begin : begin + BLOCK_BYTES]) for begin in range(0, len(buffer), BLOCK_BYTES))


def blocks_of(what: str, offset: int, nbytes: int, digests: Sequence[str]) -> Iterator[Block]:
    """Cut [offset, offset + nbytes) into the blocks that the digests are of."""
    for begin, expected in zip(range(0, nbytes, BLOCK_BYTES), digests, strict=True):
        yield Block(what, offset + begin, min(BLOCK_BYTES, nbytes - begin), expected)


def check_digests(what: str, algorithm: Algorithm, nbytes: int, digests: Sequence[str]) -> None:
    """Check that there is a digest for every block.

    Raises:
        ValueError: there is not, or one is none of that algorithm.
    """
    blocks, hex_digits = -(-nbytes // BLOCK_BYTES), 2 * DIGEST_BYTES[algorithm]
    if len(digests) != blocks:
        raise ValueError(f"{what}: {len(digests)} digests for {nbytes} bytes, expected {blocks}")
    if not all(len(text) == hex_digits and set(text) <= set("0123456789abcdef") for text in digests):
        raise ValueError(f"{what}: its digest is not {hex_digits} hex digits")


def schema_digest(specs: Iterable[TensorSpec]) -> str:
    """Digest of names and shapes, in any order: 32 hex digits of BLAKE2b over their sorted JSON.

    Equal on both sides means that the learner's weights fit the server's model. Dtypes are left out: a server may
    serve another one than it is sent.
    """
    pairs = sorted((spec.name, spec.shape) for spec in specs)
    return hashlib.blake2b(msgspec.json.encode(pairs), digest_size=16).hexdigest()


def content_digest(manifest: Manifest) -> str:
    """Digest of what a version's tensors are: 32 hex digits of BLAKE2b over the sorted JSON of each one's fields.

    Names, dtypes, shapes and the digests of the bytes count, the algorithm of those, and what adapter they are; the
    version does not. Equal means equal tensors, so a receiver can tell that a version brings nothing new. Different
    means nothing where the algorithms differ.
    """
    content = sorted((entry.spec.name, entry.spec.dtype, entry.spec.shape, entry.digests) for entry in manifest.tensors)
    what = (
        (manifest.algorithm, content) if manifest.adapter is None else (manifest.algorithm, content, manifest.adapter)
    )
    return hashlib.blake2b(msgspec.json.encode(what), digest_size=16).hexdigest()


def _check(manifest: Manifest) -> None:
    """Compare with the layout that the tensors themselves imply, so that no offset can point astray."""
    if not all(0 <= number <= MAX_INT32 for number in manifest.version):
        raise ValueError(f"version {tuple(manifest.version)}: both numbers must be 0 to {MAX_INT32}")
    layout = manifest.layout
    if manifest.file_bytes != layout.file_bytes:
        raise ValueError(f"file_bytes {manifest.file_bytes}, but its tensors make {layout.file_bytes}")
    for entry, spec in zip(manifest.tensors, layout.specs, strict=True):
        if entry.spec is not spec:
            raise ValueError(f"tensor {entry.spec.name} stands where the file has {spec.name}")
        if (entry.offset, entry.nbytes) != (layout.offset(spec.name), spec.nbytes):
            raise ValueError(
                f"tensor {spec.name}: bytes [{entry.offset}, +{entry.nbytes}], but the layout has it at"
                f" [{layout.offset(spec.name)}, +{spec.nbytes}]"
            )
        check_digests(f"tensor {spec.name}", manifest.algorithm, entry.nbytes, entry.digests)
    if manifest.adapter is not None:
        changed_weights(layout.specs, manifest.adapter.r)
