"""What leads from one version to the next: which tensors differ, and where the bytes that say how are.

A delta is fetched like a version's file, in blocks that have digests of their own, and applied to a file that holds its
base, whole. What comes of it is believed only when it hashes to the manifest of the version itself (I5): these digests
find damage on the way before it is applied, no more. Deltas form a chain, each from the version published before; a
receiver follows it from the version it has. This file must not know sockets, files or what is in a part (delta.py).
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from protocol.errors import MalformedMessage
from protocol.versions import Version
from protocol.weights.delta import num_changed
from protocol.weights.manifest import (
    Algorithm,
    Block,
    Manifest,
    Shipment,
    block_digests,
    blocks_of,
    check_digests,
    content_digest,
)
from protocol.weights.specs import Name, Size

MAX_DELTAS_BYTES = 32 << 20
MAX_CHAIN = 64
"""Deltas that a receiver looks at."""


class DeltaPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What differs in one tensor."""

    name: Name
    num_changed: Size
    """Elements that differ."""
    nbytes: Size
    """Of the encoded part (delta.py)."""
    digests: tuple[str, ...]
    """Of each BLOCK_BYTES of the part; lower-case hex."""


class DeltaManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `base` becomes `version` by. Its bytes are those of the parts, one after the other."""

    version: Version
    base: Version
    base_digest: str
    """`content_digest` of the base: what a receiver must hold, whatever it calls it."""
    algorithm: Algorithm
    parts: tuple[DeltaPart, ...]
    """Of the tensors that differ, in the order of their bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    @property
    def num_changed(self) -> int:
        """Elements that differ, of all tensors."""
        return sum(part.num_changed for part in self.parts)

    @property
    def shipment(self) -> Shipment:
        """What is fetched of it (computed anew: keep it)."""
        blocks: list[Block] = []
        offset = 0
        for part in self.parts:
            blocks += blocks_of(f"delta of tensor {part.name}", offset, part.nbytes, part.digests)
            offset += part.nbytes
        return Shipment(self.version, self.base, self.algorithm, offset, blocks)


def build_delta_manifest(version: Version, base: Manifest, parts: Iterable[tuple[str, bytes]]) -> DeltaManifest:
    """Hash the encoded parts (name, bytes), which turn `base` into `version`, and name the result."""
    algorithm = base.algorithm
    return DeltaManifest(
        version=version,
        base=base.version,
        base_digest=content_digest(base),
        algorithm=algorithm,
        parts=tuple(
            DeltaPart(name, num_changed(part), len(part), block_digests(algorithm, memoryview(part)))
            for name, part in parts
        ),
    )


def write_delta(delta: DeltaManifest) -> bytes:
    """Encode one; see `join_deltas`."""
    return msgspec.json.encode(delta)


def join_deltas(encoded: Iterable[bytes]) -> bytes:
    """Make of encoded ones what WeightsReady has."""
    return b"[" + b",".join(encoded) + b"]"


def read_deltas(data: bytes | memoryview) -> tuple[DeltaManifest, ...]:
    """Decode and check what can be checked without the manifests of the versions.

    Raises:
        MalformedMessage: no deltas, or digests that are none.
    """
    if len(data) > MAX_DELTAS_BYTES:
        raise MalformedMessage(f"deltas of {len(data)} bytes: at most {MAX_DELTAS_BYTES}")
    try:
        deltas = msgspec.json.decode(data, type=tuple[DeltaManifest, ...])
        if len(deltas) > MAX_CHAIN:
            raise ValueError(f"{len(deltas)} of them: at most {MAX_CHAIN}")
        return tuple(_checked(delta) for delta in deltas)
    except (msgspec.MsgspecError, ValueError) as error:
        raise MalformedMessage(f"deltas: {error}") from None


def find_chain(deltas: Iterable[DeltaManifest], base_digest: str, version: Version) -> tuple[DeltaManifest, ...] | None:
    """Return the deltas that lead to `version` from what has that digest, in order; None: there are none."""
    by_version = {delta.version: delta for delta in deltas}
    chain: list[DeltaManifest] = []
    while (delta := by_version.get(version)) is not None:  # bases are older: it ends
        chain.insert(0, delta)
        if delta.base_digest == base_digest:
            return tuple(chain)
        version = delta.base
    return None


def _checked(delta: DeltaManifest) -> DeltaManifest:
    if delta.base >= delta.version:
        raise ValueError(f"version {delta.version} from {delta.base}: a base is older")
    if len({part.name for part in delta.parts}) != len(delta.parts):
        raise ValueError(f"version {delta.version}: a tensor twice")
    for part in delta.parts:
        check_digests(f"delta of tensor {part.name}", delta.algorithm, part.nbytes, part.digests)
    return delta
