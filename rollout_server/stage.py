"""Where a version lies between the learner and the engine: brought here by one of several paths, whole and verified.

The staged file is a safetensors file that is written again for every version. It holds one version whole, or nothing:
whatever happens on the way, the engine is only ever pointed at bytes that hash to the learner's manifest (I5). One
thread calls `bring`; this file must not know the event loop, nor what is said of versions to whom.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from protocol.kinds import WeightsPath
from protocol.versions import Version
from protocol.weights.fetching import WeightsFetcher
from protocol.weights.layout import MappedWeights
from protocol.weights.manifest import Manifest, content_digest
from protocol.weights.staging import clean_staging, staging_path
from rollout_server.engines.base import Canaries
from rollout_server.relay import Relay

FETCH_S = 600.0
"""A version that takes longer is given up (and asked for again while it is the newest)."""
STALL_S = 3.0


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """A version that was announced."""

    manifest: Manifest
    addresses: tuple[str, ...]
    canaries: Canaries | None

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
    path: WeightsPath = WeightsPath.NONE
    bytes: int = 0
    """Fetched for it, repetitions included."""
    transfer_s: float = 0.0
    verify_s: float = 0.0
    refetched_blocks: int = 0


class Stage:
    """Owns the staged file."""

    def __init__(self, directory: Path, fetcher: WeightsFetcher, relay: Relay | None = None) -> None:
        self._directory = directory
        self._fetcher = fetcher
        self._relay = relay
        self._file: MappedWeights | None = None
        self._content = ""
        """`content_digest` of what the file holds whole; empty while it holds nothing whole."""
        clean_staging(directory)

    def bring(self, wanted: Wanted, stop: threading.Event) -> Delivery:
        """Have the version in the staged file; nothing is fetched where it holds that very content already.

        Args:
            wanted: What was announced.
            stop: Set by anyone to call it off.

        Raises:
            Superseded: `stop` was set, or nobody serves it any more.
            WeightsError: no room for it, it did not come in time, or its bytes are wrong wherever they come from.
        """
        manifest, content = wanted.manifest, content_digest(wanted.manifest)
        if self._file is not None and not (self._file.layout == manifest.layout and self._file.path.exists()):
            self.discard()
        if self._file is None:
            self._file = MappedWeights.create(staging_path(self._directory), manifest.layout)
        elif self._content == content:
            if self._relay is not None:
                self._relay.whole(manifest.shipment, self._file)
            return Delivery(file=self._file.path, digest=content)
        file, on_block = self._make_room(manifest, stop)
        report = self._fetcher.fetch(
            manifest.shipment, wanted.addresses, file.writable_bytes(0, manifest.file_bytes),
            stop=stop, deadline_s=FETCH_S, stall_s=STALL_S, on_block=on_block,
        )  # fmt: skip
        self._content = content
        return Delivery(
            file=file.path, digest=content, path=WeightsPath.DENSE, bytes=report.bytes,
            transfer_s=report.transfer_s, verify_s=report.verify_s, refetched_blocks=report.refetched_blocks,
        )  # fmt: skip

    def _make_room(
        self, manifest: Manifest, stop: threading.Event
    ) -> tuple[MappedWeights, Callable[[int], None] | None]:
        """Return the file that may be written now, and whom to tell of every block that is in it."""
        assert self._file is not None
        self._content = ""
        if self._relay is None:
            return self._file, None
        if not self._relay.vacate(self._file, stop):
            self.discard()
            self._file = MappedWeights.create(staging_path(self._directory), manifest.layout)
        memory = self._file.bytes(0, manifest.file_bytes)
        (on_block,) = self._relay.offer((manifest.shipment, memory), file=self._file)
        return self._file, on_block

    def discard(self) -> None:
        """Delete the staged file. Whoever has it open still reads what it held."""
        if self._relay is not None:
            self._relay.withdraw()
        if self._file is not None:
            self._file.remove()
        self._file, self._content = None, ""
