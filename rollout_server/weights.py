"""New weights: fetch what was announced, verify it, swap it in, say so. Generation goes on until the swap itself.

A newer announcement supersedes the one being fetched; versions are never mixed, and a version that fails leaves the
old one serving, whole (I5). The bulk plane's socket and its thread belong to this file alone.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from protocol.channel import resolve_address
from protocol.errors import MalformedMessage, WeightsError
from protocol.logs import event
from protocol.messages import WeightsFailed, WeightsLive, WeightsReady
from protocol.signals import Signal
from protocol.versions import Version
from protocol.waits import Waits, WaitTimeout
from protocol.weights.layout import MappedWeights
from protocol.weights.manifest import Manifest
from protocol.weights.staging import clean_staging, staging_path
from protocol.weights.transfer import FetchReport, WeightsFetcher
from rollout_server.engines.base import Engine, EngineFailure, StagedWeights

log = logging.getLogger(__name__)

FETCH_S = 600.0
"""A version that takes longer is given up (and asked for again while it is the newest)."""
STALL_S = 3.0
RETRY_S = (0.5, 1.0, 2.0, 5.0)
"""Pauses between attempts at one version."""


class WeightsReceiver:
    """Makes the newest announced version live."""

    def __init__(
        self, engine: Engine, waits: Waits, *, learner: str, directory: Path, insecure_plaintext: bool
    ) -> None:
        self._engine = engine
        self._waits = waits
        self._learner = learner
        self._directory = directory
        self._fetcher = WeightsFetcher(insecure_plaintext=insecure_plaintext)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._staged: MappedWeights | None = None
        self._wanted: tuple[Manifest, tuple[str, ...]] | None = None
        self._live: Version | None = None
        self._runs = 0
        """Runs this server has left."""
        self._announced = Signal()
        self._stop = threading.Event()
        self.reports: asyncio.Queue[WeightsLive | WeightsFailed] = asyncio.Queue()
        """What to tell the learner; at most one per attempt at a version."""
        clean_staging(directory)

    def announce(self, ready: WeightsReady) -> None:
        """Take note of a version that may be fetched.

        Raises:
            MalformedMessage: its manifest is none.
        """
        manifest = Manifest.from_json(ready.manifest.tobytes())
        if manifest.version != ready.version:
            raise MalformedMessage(f"version {ready.version} announced with the manifest of {manifest.version}")
        if self._wanted is not None and manifest.version <= self._wanted[0].version:
            return
        self._wanted = (manifest, tuple(resolve_address(address, self._learner) for address in ready.addresses))
        self._stop.set()  # whatever is being fetched is superseded
        self._announced.notify()

    def new_run(self) -> None:
        """Forget the versions of another run: those of this one begin anew."""
        self._runs += 1
        self._wanted = self._live = None
        self._stop.set()

    async def loop(self) -> None:
        """Fetch and load for ever.

        consumes: announcements    waits for: the learner's WeightsReady    unblocked by: announce
        produces: live versions    and WeightsLive or WeightsFailed in `reports`
        """
        failures = 0
        while True:
            wanted = self._wanted
            if wanted is None or (self._live is not None and wanted[0].version <= self._live):
                failures = 0
                await self._waits.wait(self._announced.wait(), name="weights", owner="learner", deadline_s=None)
                continue
            run, (manifest, addresses) = self._runs, wanted
            try:
                report = await self._make_live(manifest, addresses)
                if run == self._runs:  # else it is of a run that this server has left
                    self._live = manifest.version
                    self.reports.put_nowait(report)
                failures = 0
            except (WeightsError, EngineFailure) as error:
                if self._wanted is not wanted:
                    continue  # superseded: on to the newer one
                event(log, "weights_failed", level=logging.WARNING, version=manifest.version, reason=error)
                self.reports.put_nowait(WeightsFailed(version=manifest.version, reason=str(error)))
                await self._pause(RETRY_S[min(failures, len(RETRY_S) - 1)])
                failures += 1

    async def close(self) -> None:
        """Call off what is being fetched and end the thread."""
        self._stop.set()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)
        if self._staged is not None:
            self._staged.remove()

    async def _make_live(self, manifest: Manifest, addresses: tuple[str, ...]) -> WeightsLive:
        self._stop = threading.Event()
        fetch = asyncio.get_running_loop().run_in_executor(self._thread, self._fetch, manifest, addresses, self._stop)
        report = await self._waits.wait(fetch, name=f"weights {manifest.version}", owner="bulk plane", deadline_s=None)
        assert self._staged is not None
        staged = StagedWeights(version=manifest.version, path=self._staged.path)
        pause_s = await self._waits.wait(
            self._engine.load_weights(staged), name="swap", owner="engine", deadline_s=FETCH_S
        )
        event(
            log, "weights_live", version=manifest.version, bytes=report.bytes, transfer_s=report.transfer_s,
            verify_s=report.verify_s, pause_s=pause_s, refetched_tensors=report.refetched_tensors,
        )  # fmt: skip
        return WeightsLive(
            version=manifest.version, transfer_s=report.transfer_s, verify_s=report.verify_s, pause_s=pause_s
        )

    def _fetch(self, manifest: Manifest, addresses: tuple[str, ...], stop: threading.Event) -> FetchReport:
        if self._staged is None or self._staged.layout != manifest.layout:
            if self._staged is not None:
                self._staged.remove()
            self._staged = MappedWeights.create(staging_path(self._directory), manifest.layout)
        return self._fetcher.fetch(manifest, addresses, self._staged, stop=stop, deadline_s=FETCH_S, stall_s=STALL_S)

    async def _pause(self, seconds: float) -> None:
        try:
            await self._waits.wait(self._announced.wait(), name="retry weights", owner="timer", deadline_s=seconds)
        except WaitTimeout:
            return
