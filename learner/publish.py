"""Publishing: a snapshot of the weights into a safetensors mapping, served and announced while training goes on.

`start(version)` returns at once. The snapshot is taken beside the next forward/backward; `wait_previous` must be
awaited before the optimizer changes the weights again, so that a version's bytes are always those of one step (I5).
Snapshot, hashing, what differs from the version before, and serving happen on threads; only announcing on the event
loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from learner.canaries import Canaries
from learner.deltas import DeltaChain, Published
from learner.weights_archive.archive import PublishedRow, WeightsArchive, version_digest
from protocol.errors import WeightsError
from protocol.logs import event
from protocol.messages import WeightsReady
from protocol.versions import Version
from protocol.waits import Waits
from protocol.weights.adapters import AdapterSpec
from protocol.weights.layout import MappedWeights, build_manifest, make_manifest
from protocol.weights.manifest import Algorithm, TensorSpec
from protocol.weights.serving import WeightsServer
from protocol.weights.shared import SharedBuffer
from protocol.weights.specs import Layout

log = logging.getLogger(__name__)

BUFFERS = 4
"""Two versions served, one being written, and one whose last chunks are still on their way. Those that servers on this
host have claimed come on top, as long as there is room: a slow engine costs memory, never a step."""
FREE_BUFFER_S = 60.0


class WeightsSource(Protocol):
    """What publishing needs of the trainer."""

    def specs(self) -> list[TensorSpec]:
        """Names, published dtypes and shapes."""

    @property
    def adapter(self) -> AdapterSpec | None:
        """What a version is beside them, where it is an adapter."""

    def write_weights(self, mapped: MappedWeights, algorithm: Algorithm | None) -> Mapping[str, Sequence[str]]:
        """Cast and copy every tensor into the mapping; with an algorithm, return the digests of each one's blocks.

        Raises:
            WeightsError: a tensor holds a non-finite number.
        """


class Publisher:
    """Owns the published mappings and the bulk plane's serving thread."""

    def __init__(
        self,
        source: WeightsSource,
        server: WeightsServer,
        deltas: DeltaChain,
        archive: WeightsArchive,
        *,
        directory: Path,
        algorithm: Algorithm,
        bulk_address: str,
        announce: Callable[[WeightsReady], None],
        tasks: asyncio.TaskGroup,
        waits: Waits,
    ) -> None:
        self._source = source
        self._server = server
        self._deltas = deltas
        self._archive = archive
        self._layout = Layout(source.specs())
        self._directory = directory
        self._algorithm = algorithm
        self._bulk_address = bulk_address
        self._announce = announce
        self._tasks = tasks
        self._waits = waits
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._keeper = ThreadPoolExecutor(1, thread_name_prefix="keep-versions")
        """A slow disk must not hold up the next snapshot."""
        self._buffers: list[SharedBuffer] = []
        self._snapshot: asyncio.Future[None] | None = None
        self._held_at: int | None = None
        self._held_back: tuple[Published, SharedBuffer, Canaries | None] | None = None
        self._previous: Published | None = None
        """What was published last, announced or held back: what the next version is compared with."""
        self.current: WeightsReady | None = None
        """The newest announced version: what a joining server is told."""
        self.published = 0
        self.told: Callable[[PublishedRow], None] = lambda row: None
        """Called when a version is ready to be served."""

    def start(self, version: Version, canaries: Canaries | None = None) -> None:
        """Begin to publish the weights as they are now under that version, with what engines may try them on."""
        assert self._snapshot is None, "wait_previous first"
        self._snapshot = asyncio.get_running_loop().create_future()
        self._tasks.create_task(self._publish(version, self._snapshot, canaries), name=f"publish {version}")

    async def wait_previous(self) -> None:
        """Wait until the previous snapshot is complete: from then on the weights may change."""
        if self._snapshot is not None:
            snapshot = asyncio.shield(self._snapshot)  # whoever stops waiting for it must not call it off
            await self._waits.wait(snapshot, name="publish", owner="publisher", deadline_s=FREE_BUFFER_S * 2)
            self._snapshot = None

    def hold(self, policy_version: int) -> None:
        """Announce nothing newer until `release`: a pinned evaluation samples with that version. Snapshots go on."""
        self._held_at = policy_version

    def release(self) -> None:
        """Announce again, at once what was held back (the newest of it)."""
        self._held_at = None
        if self._held_back is not None:
            held, self._held_back = self._held_back, None
            self._serve(*held)

    async def close(self) -> None:
        """End the thread and give the mappings back; say how much was sent."""
        event(log, "served", versions=self.published, bytes=self._server.counters.bytes)
        for thread in (self._thread, self._keeper):
            await asyncio.get_running_loop().run_in_executor(None, thread.shutdown)
        for buffer in self._buffers:
            buffer.remove()

    async def _publish(self, version: Version, snapshot: asyncio.Future[None], canaries: Canaries | None) -> None:
        """Snapshot, hash, serve, announce one version.

        consumes: the trainer's weights      waits for: a free mapping      unblocked by: readers
        produces: the snapshot future, a delta where it pays, WeightsReady to every server, then what the run keeps
        """
        loop = asyncio.get_running_loop()
        buffer = await self._waits.wait(
            self._free_buffer(), name="free buffer", owner="readers of weights", deadline_s=2 * FREE_BUFFER_S
        )
        begun_s, mapped = loop.time(), buffer.mapped
        # xxh3 while a piece is in the cache. BLAKE3 takes longer than the copy, and the weights may change meanwhile.
        beside = self._algorithm if self._algorithm == "xxh3_128" else None
        digests = await loop.run_in_executor(self._thread, self._source.write_weights, mapped, beside)
        snapshot_s = loop.time() - begun_s
        snapshot.set_result(None)
        adapter = self._source.adapter
        manifest = (
            make_manifest(version, self._layout, beside, digests, adapter)
            if beside
            else await loop.run_in_executor(self._thread, build_manifest, version, mapped, self._algorithm, adapter)
        )
        hash_s = loop.time() - begun_s - snapshot_s
        published, made = Published(manifest, mapped), None
        if self._previous is not None:
            made = await loop.run_in_executor(self._thread, self._deltas.extend, self._previous, published)
        self._previous = published
        row = PublishedRow(
            version=version, bytes=manifest.file_bytes, density=self._deltas.density,
            delta_bytes=None if made is None else made.manifest.nbytes, snapshot_s=snapshot_s, hash_s=hash_s,
            delta_s=loop.time() - begun_s - snapshot_s - hash_s,
            digest=version_digest(self._algorithm, {entry.spec.name: entry.digests for entry in manifest.tensors}),
        )  # fmt: skip
        event(log, "published", **msgspec.structs.asdict(row))
        self.published += 1
        self.told(row)
        buffer.finish(version)
        if self._held_at is not None and version.policy_version > self._held_at:
            self._held_back = (published, buffer, canaries)  # what was held back before is superseded
        else:
            self._serve(published, buffer, canaries)
        await loop.run_in_executor(self._keeper, self._archive.published, row, manifest, made)

    def _serve(self, published: Published, buffer: SharedBuffer, canaries: Canaries | None) -> None:
        manifest, mapped = published
        self._server.serve(manifest, mapped)
        deltas = self._deltas.offers(manifest.version)
        self.current = WeightsReady(
            version=manifest.version,
            manifest=np.frombuffer(manifest.to_json(), np.uint8),
            addresses=(self._bulk_address,),
            shared=buffer.name,
            canary_tokens=None if canaries is None else canaries.tokens,
            canary_logprobs=None if canaries is None else canaries.logprobs,
            deltas=None if deltas is None else np.frombuffer(deltas, np.uint8),
        )
        self._announce(self.current)

    async def _free_buffer(self) -> SharedBuffer:
        """A mapping that nobody reads, taken for writing; waits for slow readers where there is no room for another."""
        deadline_s = asyncio.get_running_loop().time() + FREE_BUFFER_S
        no_room: WeightsError | None = None
        while True:
            kept = self._previous.mapped if self._previous else None  # what is held back is the previous one
            # The server knows nothing of those being written: the previous version may still be hashed.
            idle = [
                buffer
                for buffer in self._buffers
                if buffer.mapped is not kept and not buffer.being_written and self._server.is_free(buffer.mapped)
            ]
            for buffer in idle:
                if buffer.begin():
                    self._shrink([other for other in idle if other is not buffer])
                    return buffer
            if len(self._buffers) - len(idle) < BUFFERS and no_room is None:
                try:
                    added = await asyncio.to_thread(SharedBuffer.create, self._directory, self._layout)
                    added.begin()
                    self._buffers.append(added)
                    return added
                except WeightsError as error:
                    if not idle:
                        raise
                    no_room = error  # but what is claimed will be free
            if asyncio.get_running_loop().time() > deadline_s:
                raise WeightsError(self._describe_readers(idle)) from no_room
            await asyncio.sleep(0.05)  # readers finish on another thread, or in another process

    def _shrink(self, idle: Sequence[SharedBuffer]) -> None:
        """Remove what more there is than BUFFERS, now that readers have let go of it."""
        for buffer in idle:
            if len(self._buffers) > BUFFERS and buffer.begin():
                self._buffers.remove(buffer)
                buffer.remove()

    def _describe_readers(self, claimed: Sequence[SharedBuffer]) -> str:
        text = f"all {len(self._buffers)} published versions are still being read after {FREE_BUFFER_S:g} s"
        if claimed:
            versions = ", ".join(str(buffer.version) for buffer in claimed)
            text += f"; servers on this host have claimed {len(claimed)} ({versions}), and there is no room for another"
        return text
