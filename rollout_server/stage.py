"""Where a version lies between the learner and the engine: brought here by one of several paths, whole and verified.

A learner on this host lets its own file be read where it lies (shared_stage.py). Else the version is brought into ours.

The staged file is a safetensors file that is written again for every version. It holds one version whole, or nothing:
whatever happens on the way, the engine is only ever pointed at bytes that hash to the learner's manifest (I5). One
thread calls `bring`; this file must not know the event loop, nor what is said of versions to whom.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from protocol.errors import IntegrityError, MalformedMessage, Superseded
from protocol.kinds import WeightsPath
from protocol.logs import event
from protocol.versions import Version
from protocol.weights.delta import Costs, choose, prepare_decoding
from protocol.weights.delta_manifest import DeltaManifest, find_chain
from protocol.weights.fetching import FetchReport, WeightsFetcher
from protocol.weights.layout import MappedWeights
from protocol.weights.manifest import Manifest, Shipment, content_digest
from protocol.weights.push_costs import NETWORK, TELLING_BYTES
from protocol.weights.specs import ITEM_BYTES
from protocol.weights.staging import clean_staging, staging_path
from rollout_server.deltas import Applied, Changes, apply_chain
from rollout_server.engines.base import Canaries
from rollout_server.relay import Relay
from rollout_server.shared_stage import SharedStage
from rollout_server.strikes import Strikes

log = logging.getLogger(__name__)

OnBlock = Callable[[int], None]
"""Told of a block that is here and verified, by its index."""
FETCH_S = 600.0
"""A version that takes longer is given up (and asked for again while it is the newest)."""
STALL_S = 3.0


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """A version that was announced."""

    manifest: Manifest
    addresses: tuple[str, ...]
    canaries: Canaries | None
    deltas: tuple[DeltaManifest, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    """Public key of who serves at an address, where that is not the learner."""
    shared: str = ""
    """Name of the learner's own file, which is in the staging directory where the learner is beside this server."""

    @property
    def version(self) -> Version:
        """What it is called."""
        return self.manifest.version


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A version that is here, whole and verified."""

    file: Path
    digest: str
    """Its `content_digest`."""
    mapped: MappedWeights | None = None
    """The file, where this process has it mapped for as long as it is read."""
    path: WeightsPath = WeightsPath.NONE
    bytes: int = 0
    """Fetched for it, repetitions included."""
    transfer_s: float = 0.0
    verify_s: float = 0.0
    """Applying a delta included."""
    refetched_blocks: int = 0
    base: str = ""
    """`content_digest` of what was here before, where `changes` is known."""
    changes: Changes | None = None
    """What differs from `base`; None: it is not known."""


class Stage:
    """Owns the staged file, and this server's claim on the learner's."""

    def __init__(self, directory: Path, fetcher: WeightsFetcher, relay: Relay | None = None) -> None:
        self._directory = directory
        self._fetcher = fetcher
        self._relay = relay
        self._file: MappedWeights | None = None
        self._content = ""
        """`content_digest` of what the file holds whole; empty while it holds nothing whole."""
        self._link, self._costs = NETWORK, Costs()
        self._strikes = Strikes(WeightsPath.DELTA)
        self._reads_deltas = True
        clean_staging(directory)
        self._shared = SharedStage(directory)

    def bring(self, wanted: Wanted, stop: threading.Event) -> Delivery:
        """Have the version in the learner's file or in the staged one, which may hold that very content already.

        What was brought before is no longer to be loaded.

        Args:
            wanted: What was announced.
            stop: Set by anyone to call it off.

        Raises:
            Superseded: `stop` was set, or nobody serves it any more.
            WeightsError: no room for it, it did not come in time, or its bytes are wrong wherever they come from.
        """
        manifest, content = wanted.manifest, content_digest(wanted.manifest)
        self.release()
        if self._content != content and self._relay is None:  # neighbors read for longer than the learner waits
            shared = self._shared.bring(manifest, wanted.shared, stop)
            if shared is not None:
                mapped, verify_s = shared
                return Delivery(
                    file=mapped.path, digest=content, mapped=mapped, path=WeightsPath.SHARED, verify_s=verify_s
                )
        if self._file is not None and not (self._file.layout == manifest.layout and self._file.path.exists()):
            self.discard()
        if self._file is None:
            self._file = MappedWeights.create(staging_path(self._directory), manifest.layout)
        elif self._content == content:
            if self._relay is not None:
                self._relay.whole(manifest.shipment, self._file)
            return Delivery(file=self._file.path, digest=content, mapped=self._file)
        fetch = _Fetch(self._fetcher, wanted, stop)
        chain = self._chain(wanted)
        delivery = self._by_delta(wanted, chain, fetch) if chain else None
        delivery = delivery or self._whole(wanted, fetch)
        self._content = content
        return delivery

    def release(self) -> None:
        """Nobody will load what was brought last: the learner may have its file back."""
        self._shared.release()

    def loaded(self) -> None:
        """The engine has loaded what was brought last, and so reads nothing that was brought before."""
        self._shared.loaded()

    def close(self) -> None:
        """Give everything up."""
        self.discard()
        self._shared.close()

    def discard(self) -> None:
        """Give up what a load that was given up may still be reading: nothing is written into it."""
        self._shared.doubt()
        if self._relay is not None:
            self._relay.withdraw()
        if self._file is not None:
            self._file.remove()
        self._file, self._content = None, ""

    def _whole(self, wanted: Wanted, fetch: _Fetch) -> Delivery:
        """Fetch every byte."""
        manifest = wanted.manifest
        self._content = ""
        file = self._room(manifest, fetch.stop)
        (on_block,) = self._pass_on(file, (manifest.shipment, file.bytes(0, manifest.file_bytes)))
        report = fetch(manifest.shipment, file.writable_bytes(0, manifest.file_bytes), on_block)
        self._learn_link(report)
        return Delivery(
            file=file.path, mapped=file, digest=content_digest(manifest), path=WeightsPath.DENSE, bytes=report.bytes,
            transfer_s=report.transfer_s, verify_s=report.verify_s, refetched_blocks=report.refetched_blocks,
        )  # fmt: skip

    def _room(self, manifest: Manifest, stop: threading.Event) -> MappedWeights:
        """Return the staged file, once no neighbor reads of it; a copy of it where one goes on for long."""
        assert self._file is not None
        if self._relay is not None and not self._relay.vacate(self._file, stop):
            left, self._file = self._file, MappedWeights.create(staging_path(self._directory), manifest.layout)
            if self._content:
                self._file.writable_bytes(0, manifest.file_bytes)[:] = left.bytes(0, manifest.file_bytes)
            left.remove()
        return self._file

    def _pass_on(self, file: MappedWeights, *shipments: tuple[Shipment, memoryview]) -> list[OnBlock | None]:
        """Offer to neighbors what comes; return, for each shipment, whom to tell of every block that is verified."""
        if self._relay is None:
            return [None] * len(shipments)
        return [*self._relay.offer(*shipments, file=file)]

    def _chain(self, wanted: Wanted) -> Sequence[DeltaManifest] | None:
        """Return the deltas to go by, if there are any from what is here, and they are sooner here than everything."""
        if not self._content or self._strikes.out:
            return None
        chain = find_chain(wanted.deltas, self._content, wanted.version)
        if chain is None:
            return None
        chosen = choose(
            dense_bytes=wanted.manifest.file_bytes,
            num_elements=sum(entry.nbytes // ITEM_BYTES[entry.spec.dtype] for entry in wanted.manifest.tensors),
            num_changed=sum(delta.num_changed for delta in chain),
            link=self._link,
            costs=self._costs,
            delta_bytes=sum(delta.nbytes for delta in chain),
        )
        return chain if chosen == "delta" and self._can_read(wanted.manifest) else None

    def _can_read(self, manifest: Manifest) -> bool:
        """Whether this process can decode: a host that was given as little as possible has no numba."""
        try:
            if self._reads_deltas:
                prepare_decoding(ITEM_BYTES[entry.spec.dtype] for entry in manifest.tensors)
        except ImportError as error:
            self._reads_deltas = False
            event(log, "weights_only_whole", level=logging.WARNING, reason=f"numba cannot be imported: {error}")
        return self._reads_deltas

    def _by_delta(self, wanted: Wanted, chain: Sequence[DeltaManifest], fetch: _Fetch) -> Delivery | None:
        """Fetch and apply what differs; blocks that are wrong then come out of the version's file.

        None: it takes the whole file.
        """
        manifest, base = wanted.manifest, self._content
        file = self._room(manifest, fetch.stop)
        blobs = [(delta.shipment, memoryview(bytearray(delta.nbytes))) for delta in chain]
        last, whole = blobs[-1], (manifest.shipment, file.bytes(0, manifest.file_bytes))
        *tell, on_block = [None] * (len(chain) - 1) + self._pass_on(file, last, whole)
        try:
            reports = [fetch(shipment, blob, told) for (shipment, blob), told in zip(blobs, tell, strict=True)]
            applied = apply_chain(
                chain, [blob for _, blob in blobs], file, manifest, about_to_write=self._forget, on_block=on_block
            )
        except (IntegrityError, MalformedMessage) as error:
            self._is_wrong(wanted.version, str(error))
            return None
        except Superseded:
            if fetch.stop.is_set():
                raise
            return None  # the deltas are no longer served; the version may be
        self._learn(chain, reports, applied, manifest.file_bytes)
        wrong = applied.wrong
        if wrong:
            self._is_wrong(wanted.version, f"{len(wrong)} blocks of the result are wrong")
            blocks = manifest.shipment.blocks
            missing = manifest.shipment._replace(blocks=[blocks[index] for index in wrong])
            again = None if on_block is None else lambda number: on_block(wrong[number])
            reports.append(fetch(missing, file.writable_bytes(0, manifest.file_bytes), again))
        else:
            self._strikes.right()
        return Delivery(
            file=file.path,
            mapped=file,
            digest=content_digest(manifest),
            path=WeightsPath.DELTA,
            bytes=sum(report.bytes for report in reports),
            transfer_s=sum(report.transfer_s for report in reports),
            verify_s=sum(report.verify_s for report in reports) + applied.apply_s + applied.verify_s,
            refetched_blocks=sum(report.refetched_blocks for report in reports) + len(wrong),
            base="" if wrong else base,
            changes=None if wrong else applied.changes,
        )

    def _forget(self) -> None:
        self._content = ""

    def _is_wrong(self, version: Version, reason: str) -> None:
        event(log, "weights_wrong", level=logging.WARNING, version=version, path=WeightsPath.DELTA, reason=reason)
        self._strikes.wrong(version)

    def _learn_link(self, report: FetchReport) -> None:
        if report.bytes >= TELLING_BYTES and report.transfer_s > 0:
            self._link = self._link.after_transfer(report.bytes, report.transfer_s)

    def _learn(
        self, chain: Sequence[DeltaManifest], reports: Sequence[FetchReport], applied: Applied, num_bytes: int
    ) -> None:
        for report in reports:
            self._learn_link(report)
        changed = sum(delta.num_changed for delta in chain)
        self._costs = self._costs.after_applying(num_changed=changed, s=applied.apply_s)
        self._costs = self._costs.after_hashing(num_bytes=num_bytes, s=applied.verify_s)


@dataclass(frozen=True, slots=True)
class _Fetch:
    """A fetcher, with what all shipments of one version have in common."""

    fetcher: WeightsFetcher
    wanted: Wanted
    stop: threading.Event

    def __call__(self, shipment: Shipment, destination: memoryview, on_block: OnBlock | None) -> FetchReport:
        return self.fetcher.fetch(
            shipment, self.wanted.addresses, destination, keys=self.wanted.keys, stop=self.stop, deadline_s=FETCH_S,
            stall_s=STALL_S, on_block=on_block,
        )  # fmt: skip
