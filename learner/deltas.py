"""Deltas of the published weights: made where a link is slow enough for them to pay, kept as long as they lead back.

Each leads from the version published before to the new one, so that together they form a chain that a server may follow
from whichever version it has. Exactly what differs is sent, never what was thought to; the digests that a receiver
believes are those of the whole version. Runs on the publisher's thread; must not know sockets or the event loop.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol

from learner.links import Links
from protocol.versions import Version
from protocol.weights.delta import Costs, changed_fraction, choose, encode_tensor
from protocol.weights.delta_manifest import MAX_CHAIN, DeltaManifest, build_delta_manifest, write_deltas
from protocol.weights.layout import MappedWeights
from protocol.weights.manifest import Manifest
from protocol.weights.specs import ITEM_BYTES

DeltaWeights = Literal["auto", "always", "never"]

_CHAIN_SHARE = 0.5
"""The chain keeps so many bytes, as a share of a whole version's: whoever would need more fetches that."""


class Published(NamedTuple):
    """A version and the mapping that holds it."""

    manifest: Manifest
    mapped: MappedWeights


class DeltaServer(Protocol):
    """Who hands them out (protocol.weights.serving.WeightsServer)."""

    def serve_delta(self, version: Version, base: Version, delta: bytes) -> None:
        """Make a delta available."""

    def withdraw_delta(self, version: Version, base: Version) -> None:
        """Serve it no longer."""


class DeltaChain:
    """The deltas that are served.

    Args:
        server: Hands them out.
        links: What a delta must pay on.
        mode: `auto` makes a delta where it is sooner there than the whole version, over the slowest link.
    """

    def __init__(self, server: DeltaServer, links: Links, mode: DeltaWeights) -> None:
        self._server = server
        self._links = links
        self._mode = mode
        self._costs = Costs()
        self._chain: deque[DeltaManifest] = deque()
        self.density: float | None = None
        """Share of the elements that the newest version changed: counted where there is a delta, else a sample's; None
        where nobody looked."""

    def extend(self, base: Published, new: Published) -> DeltaManifest | None:
        """Make, serve and return the delta from the version before; None, and no chain any more, if it does not pay."""
        self.density = None
        if self._mode == "never" or base.mapped.layout != new.mapped.layout:
            delta = None
        elif self._mode == "always" or self._pays(base, new):
            delta = self._encode(base, new)
        else:
            delta = None
        if delta is None:
            self._drop(len(self._chain))
        return delta

    def offers(self, version: Version) -> bytes | None:
        """Return the chain to that version, as WeightsReady has it; None: there is none."""
        chain = [delta for delta in self._chain if delta.version <= version]
        return write_deltas(chain) if chain and chain[-1].version == version else None

    def _pays(self, base: Published, new: Published) -> bool:
        """Whether a delta of as many changes as a sample shows would be sooner at the end of the slowest link."""
        sizes = {"dense_bytes": new.manifest.file_bytes, "num_elements": _num_elements(new.mapped)}
        link = self._links.slowest
        if choose(num_changed=0, link=link, costs=self._costs, **sizes) == "dense":
            return False
        changed = 0.0
        for item_bytes, offset, nbytes in _regions(new.mapped):
            old, fresh = (published.mapped.bytes(offset, nbytes) for published in (base, new))
            changed += changed_fraction(old, fresh, item_bytes) * (nbytes // item_bytes)
        self.density = changed / max(1, sizes["num_elements"])
        return choose(num_changed=changed, link=link, costs=self._costs, **sizes) == "delta"

    def _encode(self, base: Published, new: Published) -> DeltaManifest | None:
        """Make the delta, learn from it, and serve it unless it has turned out too large to pay."""
        begun_s = time.monotonic()
        parts = list(_encode_parts(base, new))
        delta = build_delta_manifest(new.manifest.version, base.manifest, parts)
        num_elements = _num_elements(new.mapped)
        self._costs = self._costs.after_encoding(
            dense_bytes=new.manifest.file_bytes, num_elements=num_elements, num_changed=delta.num_changed,
            delta_bytes=delta.nbytes, s=time.monotonic() - begun_s,
        )  # fmt: skip
        self.density = delta.num_changed / max(1, num_elements)
        if self._mode == "auto":
            chosen = choose(
                dense_bytes=new.manifest.file_bytes, num_elements=num_elements, num_changed=delta.num_changed,
                link=self._links.slowest, costs=self._costs, delta_bytes=delta.nbytes,
            )  # fmt: skip
            if chosen == "dense":
                return None
        self._server.serve_delta(delta.version, delta.base, b"".join(part for _, part in parts))
        self._chain.append(delta)
        limit = new.manifest.file_bytes * _CHAIN_SHARE
        while len(self._chain) > 1 and (
            sum(link.nbytes for link in self._chain) > limit or len(self._chain) > MAX_CHAIN
        ):
            self._drop(1)
        return delta

    def _drop(self, count: int) -> None:
        for _ in range(count):
            delta = self._chain.popleft()
            self._server.withdraw_delta(delta.version, delta.base)


def _encode_parts(base: Published, new: Published) -> Iterator[tuple[str, bytes]]:
    """Encode every tensor that differs; those of equal digests do not."""
    for before, entry in zip(base.manifest.tensors, new.manifest.tensors, strict=True):
        if before.digests != entry.digests:
            name = entry.spec.name
            part = encode_tensor(base.mapped.view(name), new.mapped.view(name), ITEM_BYTES[entry.spec.dtype])
            if part is not None:
                yield name, part


def _regions(mapped: MappedWeights) -> Iterator[tuple[int, int, int]]:
    """Yield (bytes per element, offset, bytes) of the tensors of each width: they lie together."""
    layout = mapped.layout
    for item_bytes, specs in itertools.groupby(layout.specs, key=lambda spec: ITEM_BYTES[spec.dtype]):
        together = list(specs)
        yield item_bytes, layout.offset(together[0].name), sum(spec.nbytes for spec in together)


def _num_elements(mapped: MappedWeights) -> int:
    return sum(nbytes // item_bytes for item_bytes, _, nbytes in _regions(mapped))
