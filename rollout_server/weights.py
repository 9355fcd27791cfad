"""New weights: fetch what was announced, verify it, wait for the turn to swap, swap it in, say so.

    announce --> fetch, verify --> WeightsStaged --> swap (the turn) --> load_weights --> WeightsLive
                       '------------- WeightsFailed, a pause, again <---------'

Generation goes on until the swap itself. A newer announcement supersedes the one being fetched or waiting; versions are
never mixed, and a version that fails leaves the old one serving, whole (I5). An engine that has lost its weights is
brought back to the newest version by the same steps, without a fetch where the staged file still holds it. The bulk
plane's socket and its thread belong to this file alone.
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
from protocol.messages import WeightsFailed, WeightsLive, WeightsLost, WeightsReady, WeightsStaged, WeightsSwap
from protocol.security import PLAIN, Security
from protocol.signals import Signal
from protocol.versions import Version
from protocol.waits import Waits, WaitTimeout
from protocol.weights.delta_manifest import read_deltas
from protocol.weights.fetching import WeightsFetcher
from protocol.weights.manifest import Manifest
from rollout_server.engines.base import Canaries, Engine, EngineFailure, StagedWeights
from rollout_server.relay import Relay
from rollout_server.stage import Delivery, Stage, Wanted

log = logging.getLogger(__name__)

SWAP_S = 1200.0
"""A load that takes longer is given up, and tried again: an engine may have to start before it. The learner gives the
turn to the next server before that (learner/rollover.py), and still takes the answer."""
TURN_AGAIN_S = 120.0
"""Without a turn for so long, a waiting server says again that it waits."""
RETRY_S = (0.5, 1.0, 2.0, 5.0)
"""Pauses between attempts at one version."""

Report = WeightsStaged | WeightsLive | WeightsFailed | WeightsLost


class WeightsReceiver:
    """Makes the newest announced version live."""

    def __init__(
        self,
        engine: Engine,
        waits: Waits,
        *,
        learner: str,
        directory: Path,
        security: Security = PLAIN,
        relay: Relay | None = None,
    ) -> None:
        self._engine = engine
        self._waits = waits
        self._learner = learner
        self._stage = Stage(directory, WeightsFetcher(security), relay)
        self.relay_address = relay.address if relay is not None else ""
        """Where this server passes versions on to others."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._wanted: Wanted | None = None
        self._waiting: Version | None = None
        """Staged, and its turn has not come."""
        self._turn: WeightsSwap | None = None
        self._swapping: Version | None = None
        self._serving = engine.live is not None
        """Whether the learner has reason to believe that a version is live."""
        self._foreign = False
        """Whether what is live belongs to a run that this server has left."""
        self._runs = 0
        """Runs this server has left."""
        self._loaded: tuple[Version | None, str] = (None, "")
        """What the engine was last given, and its `content_digest`: runs name other weights alike."""
        self._changed = Signal()
        self._stop = threading.Event()
        self.reports: asyncio.Queue[Report] = asyncio.Queue()
        """What to tell the learner: a few per attempt at a version."""

    @property
    def live(self) -> Version | None:
        """The version of this run that samples the next token."""
        return None if self._foreign else self._engine.live

    def announce(self, ready: WeightsReady) -> None:
        """Take note of a version that may be fetched.

        Raises:
            MalformedMessage: its manifest is none, nor are its deltas, or its canaries are of another vocabulary.
        """
        manifest = Manifest.from_json(ready.manifest.tobytes())
        if manifest.version != ready.version:
            raise MalformedMessage(f"version {ready.version} announced with the manifest of {manifest.version}")
        if self._wanted is not None and manifest.version <= self._wanted.version:
            return
        addresses = tuple(resolve_address(address, self._learner) for address in ready.addresses)
        deltas = () if ready.deltas is None else read_deltas(ready.deltas.tobytes())
        keys = {address: key for address, key in zip(addresses, ready.address_keys, strict=False) if key}
        self._wanted = Wanted(manifest, addresses, self._canaries(ready), deltas, keys, ready.shared)
        self._stop.set()  # whatever is being fetched is superseded
        self._changed.notify()

    def swap(self, turn: WeightsSwap) -> None:
        """Take the turn, or give it on at once: the next server waits for it."""
        if turn.version == self._waiting:
            self._turn = turn
            self._changed.notify()
        elif turn.version not in (self._swapping, self.live):  # else it has come twice, and is answered anyway
            self._report(WeightsFailed(version=turn.version, reason=f"superseded: {self._describe()}"))

    def welcomed(self) -> None:
        """Say again what this server waits for: the turn may have been lost with the connection before."""
        if self._waiting is not None:
            self._report(WeightsStaged(version=self._waiting))

    def still_live(self) -> None:
        """Say which version is live: a lease was given back that the learner may take for a sign of none."""
        if self.live is not None:
            self._report(WeightsLive(version=self.live))

    def new_run(self) -> None:
        """Forget the versions of another run: those of this one begin anew."""
        self._runs += 1
        self._foreign = True
        self._wanted = self._waiting = self._turn = None
        self._stop.set()
        self._changed.notify()

    async def loop(self) -> None:
        """Fetch and load for ever.

        consumes: announcements    waits for: the learner's WeightsReady    unblocked by: announce, a loss
        produces: live versions    and what became of each in `reports`
        """
        failures = 0
        while True:
            wanted, run = self._wanted, self._runs
            if wanted is None or (self.live is not None and wanted.version <= self.live):
                failures = 0
                await self._waits.wait(self._changed.wait(), name="weights", owner="learner", deadline_s=None)
                continue
            try:
                await self._make_live(wanted)
                failures = 0
            except (WeightsError, EngineFailure, WaitTimeout) as error:
                if run != self._runs or (isinstance(error, WeightsError) and self._wanted is not wanted):
                    continue  # superseded: on to the newer one
                event(log, "weights_failed", level=logging.WARNING, version=wanted.version, reason=error)
                self._report(WeightsFailed(version=wanted.version, reason=str(error)))
                await self._pause(wanted, RETRY_S[min(failures, len(RETRY_S) - 1)])
                failures += 1

    async def engine_loop(self) -> None:
        """Notice that the engine has lost its weights.

        consumes: nothing          waits for: the engine           unblocked by: its `lost`
        produces: WeightsLost, and work for `loop`
        """
        while True:
            await self._waits.wait(self._engine.lost.wait(), name="engine loss", owner="engine", deadline_s=None)
            self._note_loss()
            self._changed.notify()

    async def close(self) -> None:
        """Call off what is being fetched and end the thread."""
        self._stop.set()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)
        self._stage.close()

    async def _make_live(self, wanted: Wanted) -> None:
        """Fetch, wait for the turn, swap. Returns early when a newer version has superseded this one."""
        self._stop = threading.Event()
        bring = asyncio.get_running_loop().run_in_executor(self._thread, self._stage.bring, wanted, self._stop)
        try:
            delivery = await self._waits.wait(
                bring, name=f"weights {wanted.version}", owner="bulk plane", deadline_s=None
            )
            turn = await self._wait_turn(wanted)
            if turn is None:
                return
            live = self._engine.live
            relative = delivery.changes is not None and self._loaded == (live, delivery.base)
            staged = StagedWeights(
                version=wanted.version, path=delivery.file, mapped=delivery.mapped, digest=delivery.digest,
                canaries=wanted.canaries, checksums=turn.checksums, adapter=wanted.manifest.adapter,
                base=live if relative else None, changes=delivery.changes if relative else None,
            )  # fmt: skip
            await self._load(staged, delivery)
        finally:
            self._stage.release()

    async def _wait_turn(self, wanted: Wanted) -> WeightsSwap | None:
        """Say that the version is here, and wait for the turn to swap. None: it is superseded."""
        if self._wanted is not wanted:
            return None
        self._waiting, self._turn = wanted.version, None
        try:
            while True:
                self._report(WeightsStaged(version=wanted.version))
                try:
                    answered = self._turn_or_newer(wanted)
                    await self._waits.wait(answered, name="turn to swap", owner="learner", deadline_s=TURN_AGAIN_S)
                    return self._turn
                except WaitTimeout:
                    continue
        finally:
            self._waiting = None

    async def _turn_or_newer(self, wanted: Wanted) -> None:
        while self._turn is None and self._wanted is wanted:
            await self._changed.wait()

    async def _load(self, staged: StagedWeights, delivery: Delivery) -> None:
        run, self._swapping = self._runs, staged.version
        try:
            load = self._engine.load_weights(staged)
            loaded = await self._waits.wait(load, name="swap", owner="engine", deadline_s=SWAP_S)
        except WaitTimeout:
            self._stage.discard()  # perhaps it is still being read: the next fetch must not write into it
            raise
        finally:
            self._swapping = None
        self._stage.loaded()
        if self._engine.live is None:
            raise EngineFailure("the engine lost the version as soon as it had it")
        self._loaded = staged.version, staged.digest
        if run != self._runs:
            return  # it is of a run that this server has left
        self._foreign = False
        event(
            log, "weights_live", version=staged.version, path=delivery.path, bytes=delivery.bytes,
            transfer_s=delivery.transfer_s, verify_s=delivery.verify_s, pause_s=loaded.pause_s, check_s=loaded.check_s,
            refetched_blocks=delivery.refetched_blocks, mismatch_kl=loaded.mismatch_kl,
        )  # fmt: skip
        self._report(
            WeightsLive(
                version=staged.version, path=delivery.path, bytes=delivery.bytes, transfer_s=delivery.transfer_s,
                verify_s=delivery.verify_s, pause_s=loaded.pause_s, check_s=loaded.check_s, checksum=loaded.checksum,
                mismatch_kl=loaded.mismatch_kl, mismatch=loaded.mismatch,
            )
        )  # fmt: skip
        self._serving = True

    def _report(self, report: Report) -> None:
        """Queue a report, behind the news that nothing is live if that is so."""
        self._note_loss()
        self.reports.put_nowait(report)

    def _note_loss(self) -> None:
        if self._serving and self._engine.live is None:
            self._serving = False
            reason = "the engine has lost its weights and restarts"
            event(log, "weights_lost", level=logging.WARNING, reason=reason)
            self.reports.put_nowait(WeightsLost(reason=reason))

    def _canaries(self, ready: WeightsReady) -> Canaries | None:
        """What this engine is to try the version on: nothing, where it does not check."""
        tokens, logprobs, info = ready.canary_tokens, ready.canary_logprobs, self._engine.info
        if tokens is None or logprobs is None or not info.canaries:
            return None
        if tokens.min() < 0 or tokens.max() >= info.vocab_size:  # some engines die of such a token
            raise MalformedMessage(
                f"canaries of version {ready.version} with tokens {tokens.min()} to {tokens.max()}, allowed are 0 to"
                f" {info.vocab_size - 1}"
            )
        return Canaries(tokens=tokens, logprobs=logprobs)

    def _describe(self) -> str:
        if self._waiting is not None:
            return f"version {self._waiting} waits for its turn"
        if self._wanted is not None and self._wanted.version != self.live:
            return f"version {self._wanted.version} is on its way"
        return f"live at {self.live}"

    async def _pause(self, wanted: Wanted, seconds: float) -> None:
        try:
            newer = self._newer(wanted)
            await self._waits.wait(newer, name="retry weights", owner="timer", deadline_s=seconds)
        except WaitTimeout:
            return

    async def _newer(self, wanted: Wanted) -> None:
        while self._wanted is wanted:
            await self._changed.wait()
