"""Where a version lies between the learner and the engine: brought here by one of several paths, whole and verified.

A learner on this host lets its own file be read where it lies (shared_stage.py). Else the version is brought into ours.

The staged file is a safetensors file that is written again for every version. It holds one version whole, or nothing:
whatever happens on the way, the engine is only ever pointed at bytes that hash to the learner's manifest (I5). One
thread calls `bring`; this file must not know the event loop, nor what is said of versions to whom.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from protocol.kinds import WeightsPath
from protocol.versions import Version
from protocol.weights.fetching import WeightsFetcher
from protocol.weights.layout import MappedWeights
from protocol.weights.manifest import Manifest, content_digest
from protocol.weights.staging import clean_staging, staging_path
from rollout_server.engines.base import Canaries
from rollout_server.shared_stage import SharedStage

FETCH_S = 600.0
"""A version that takes longer is given up (and asked for again while it is the newest)."""
STALL_S = 3.0


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """A version that was announced."""

    manifest: Manifest
    addresses: tuple[str, ...]
    canaries: Canaries | None
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
    refetched_blocks: int = 0


class Stage:
    """Owns the staged file, and this server's claim on the learner's."""

    def __init__(self, directory: Path, fetcher: WeightsFetcher) -> None:
        self._directory = directory
        self._fetcher = fetcher
        self._file: MappedWeights | None = None
        self._content = ""
        """`content_digest` of what the file holds whole; empty while it holds nothing whole."""
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
        if self._content != content:
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
            return Delivery(file=self._file.path, digest=content, mapped=self._file)
        self._content = ""
        report = self._fetcher.fetch(
            manifest.shipment, wanted.addresses, self._file.writable_bytes(0, manifest.file_bytes),
            stop=stop, deadline_s=FETCH_S, stall_s=STALL_S,
        )  # fmt: skip
        self._content = content
        return Delivery(
            file=self._file.path, digest=content, mapped=self._file, path=WeightsPath.DENSE, bytes=report.bytes,
            transfer_s=report.transfer_s, verify_s=report.verify_s, refetched_blocks=report.refetched_blocks,
        )  # fmt: skip

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
        if self._file is not None:
            self._file.remove()
        self._file, self._content = None, ""
