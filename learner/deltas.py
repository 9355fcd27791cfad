"""Deltas of the published weights: made where a link is slow enough for them to pay, kept as long as they lead back.

Each leads from the version published before to the new one, so that together they form a chain that a server may follow
from whichever version it has. Exactly what differs is sent, never what was thought to; the digests that a receiver
believes are those of the whole version. Runs on the publisher's thread; must not know sockets or the event loop.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol

from learner.links import Links
from protocol.errors import ConfigError
from protocol.logs import event
from protocol.parallel import in_threads
from protocol.versions import Version
from protocol.weights.delta import Costs, changed_fraction, choose, encode_tensor, prepare_encoding
from protocol.weights.delta_manifest import MAX_CHAIN, DeltaManifest, build_delta_manifest, join_deltas, write_delta
from protocol.weights.layout import MappedWeights
from protocol.weights.manifest import Manifest
from protocol.weights.specs import ITEM_BYTES, TensorSpec

log = logging.getLogger(__name__)

DeltaWeights = Literal["auto", "always", "never"]

MAX_OFFER_BYTES = 2 << 20
"""Of the announcement of a chain: it is read on every server's event loop. One delta may have more."""
_CHAIN_SHARE = 0.5
"""The chain keeps so many bytes, as a share of a whole version's: whoever would need more fetches that."""


class Published(NamedTuple):
    """A version and the mapping that holds it."""

    manifest: Manifest
    mapped: MappedWeights


class MadeDelta(NamedTuple):
    """A delta and its bytes."""

    manifest: DeltaManifest
    data: bytes


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
        mode: `auto` serves a delta where it is sooner there than the whole version, over the slowest link.
        keep: Make one of every version, served or not: somebody keeps them.

    Raises:
        ConfigError: deltas are asked for, and this process cannot make any.
    """

    def __init__(self, server: DeltaServer, links: Links, mode: DeltaWeights, *, keep: bool = False) -> None:
        self._server = server
        self._links = links
        self._mode = mode
        self._keep = keep
        self._costs = Costs()
        self._chain: deque[tuple[DeltaManifest, bytes]] = deque()
        """Each with its JSON. Changed by the publisher's thread, read by the event loop."""
        self.density: float | None = None
        """Share of the elements that the newest version changed: counted where there is a delta, else a sample's; None
        where nobody looked."""
        if mode == "always" or keep:
            try:
                prepare_encoding()
            except ImportError as error:
                raise ConfigError(
                    f"delta_weights = always and keep_versions need numba, which cannot be imported ({error}):"
                    " install it, or leave both out"
                ) from error

    def extend(self, base: Published, new: Published) -> MadeDelta | None:
        """Make and return the delta from the version before, and serve it where it pays; else the chain ends."""
        self.density = None
        wanted = base.mapped.layout == new.mapped.layout and (
            self._mode == "always" or (self._may_pay(base, new) and self._can_encode())
        )
        made = self._encode(base, new) if wanted or self._keep else None
        if made is not None and wanted and (self._mode == "always" or self._pays(made.manifest, new)):
            self._serve(made, new.manifest.file_bytes)
        else:
            self._drop(len(self._chain))
        return made

    def offers(self, version: Version) -> bytes | None:
        """Return the chain to that version, as WeightsReady has it; None: there is none. From any thread."""
        chain = [link for link in tuple(self._chain) if link[0].version <= version]
        return join_deltas(text for _, text in chain) if chain and chain[-1][0].version == version else None

    def _can_encode(self) -> bool:
        """Whether this process can make one: where nobody asked for it, it does without."""
        try:
            prepare_encoding()
        except ImportError as error:
            event(log, "weights_only_whole", level=logging.WARNING, reason=f"numba cannot be imported: {error}")
            self._mode = "never"
            return False
        return True

    def _may_pay(self, base: Published, new: Published) -> bool:
        """Whether a delta of as many changes as a sample shows would be sooner at the end of the slowest link."""
        if self._mode == "never":
            return False
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

    def _pays(self, delta: DeltaManifest, new: Published) -> bool:
        """The same, now that it is made."""
        chosen = choose(
            dense_bytes=new.manifest.file_bytes, num_elements=_num_elements(new.mapped), num_changed=delta.num_changed,
            link=self._links.slowest, costs=self._costs, delta_bytes=delta.nbytes,
        )  # fmt: skip
        return chosen == "delta"

    def _encode(self, base: Published, new: Published) -> MadeDelta:
        """Make the delta, and learn from it."""
        begun_s = time.monotonic()
        parts = list(_encode_parts(base, new))
        delta = build_delta_manifest(new.manifest.version, base.manifest, parts)
        num_elements = _num_elements(new.mapped)
        self._costs = self._costs.after_encoding(
            dense_bytes=new.manifest.file_bytes, num_elements=num_elements, num_changed=delta.num_changed,
            delta_bytes=delta.nbytes, s=time.monotonic() - begun_s,
        )  # fmt: skip
        self.density = delta.num_changed / max(1, num_elements)
        return MadeDelta(delta, b"".join(part for _, part in parts))

    def _serve(self, made: MadeDelta, file_bytes: int) -> None:
        delta = made.manifest
        self._server.serve_delta(delta.version, delta.base, made.data)
        self._chain.append((delta, write_delta(delta)))
        while len(self._chain) > 1 and (
            sum(link.nbytes for link, _ in self._chain) > file_bytes * _CHAIN_SHARE
            or sum(len(text) for _, text in self._chain) > MAX_OFFER_BYTES
            or len(self._chain) > MAX_CHAIN
        ):
            self._drop(1)

    def _drop(self, count: int) -> None:
        for _ in range(count):
            delta, _ = self._chain.popleft()
            self._server.withdraw_delta(delta.version, delta.base)


def _encode_parts(base: Published, new: Published) -> Iterator[tuple[str, bytes]]:
    """Encode every tensor that differs; those of equal digests do not."""
    differing = [
        entry.spec
        for before, entry in zip(base.manifest.tensors, new.manifest.tensors, strict=True)
        if before.digests != entry.digests
    ]

    def encode(spec: TensorSpec) -> bytes | None:
        return encode_tensor(base.mapped.view(spec.name), new.mapped.view(spec.name), ITEM_BYTES[spec.dtype])

    longest_first = sorted(differing, key=lambda spec: -spec.nbytes)  # the longest last would be waited for alone
    parts = {
        longest_first[number].name: part
        for number, part in in_threads(encode, longest_first, nbytes=2 * sum(spec.nbytes for spec in differing))
    }
    for spec in differing:
        if (part := parts[spec.name]) is not None:
            yield spec.name, part


def _regions(mapped: MappedWeights) -> Iterator[tuple[int, int, int]]:
    """Yield (bytes per element, offset, bytes) of the tensors of each width: they lie together."""
    layout = mapped.layout
    for item_bytes, specs in itertools.groupby(layout.specs, key=lambda spec: ITEM_BYTES[spec.dtype]):
        together = list(specs)
        yield item_bytes, layout.offset(together[0].name), sum(spec.nbytes for spec in together)


def _num_elements(mapped: MappedWeights) -> int:
    return sum(nbytes // item_bytes for item_bytes, _, nbytes in _regions(mapped))
