"""What a simulation plays instead of the real thing: the model, the bulk plane, threads, the screen.

Each keeps what the real one promises (order, what a cancellation leaves, what a hold holds), and takes its time from
dice. All of a learner's effects pass through its `Life`: when that is over they raise, as kill -9 would have it.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from learner.batch import Batch, StepResult
from learner.canaries import Canaries
from learner.journal_records import GroupRecord, Record, record_frames
from learner.journal_writer import SegmentWriter
from protocol.errors import Superseded, WeightsError
from protocol.messages import (
    Ack,
    AckStatus,
    AnyMessage,
    Float32,
    Int32,
    Lease,
    Purpose,
    WeightsReady,
)
from protocol.tasks import finish
from protocol.testing import MemoryNetwork
from protocol.versions import Version
from protocol.waits import Waits
from protocol.weights.fetching import FetchReport
from protocol.weights.manifest import Layout, Manifest, Shipment, TensorEntry, TensorSpec
from rollout_server.weights import WeightsReceiver
from tests.mortal import MortalEngine

T = TypeVar("T")
SPEC = TensorSpec("w", "F32", (1,))
LAYOUT = Layout([SPEC])
CALL_S = {"forward_backward": 0.6, "optimizer_step": 0.2, "canary_logprobs": 0.02, "save_checkpoint": 0.4}
"""Mean virtual seconds of a call."""


class Killed(Exception):
    """The process is dead: nothing that it still tries may have an effect."""


class Life:
    """Whether a learner's process is alive. Its tasks cannot be ended at once as kill -9 would; their effects can."""

    def __init__(self) -> None:
        self.over = False

    def check(self) -> None:
        if self.over:
            raise Killed


class SimCompute:
    """Calls that take virtual seconds. Like Compute, it waits for a call whose caller is cancelled."""

    busy_with = ""

    def __init__(self, life: Life, dice: random.Random) -> None:
        self._life, self._dice = life, dice

    async def __call__(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        async def call() -> T:
            await asyncio.sleep(CALL_S[function.__name__] * self._dice.uniform(0.2, 1.8))
            self._life.check()
            return function(*args, **kwargs)

        return await finish(asyncio.ensure_future(call()))


class SimTrainer:
    """A model whose weights are the list of what it was trained on."""

    learning_rate = 1e-3
    peak_learning_rate = 1e-3
    checkpoint_bytes = 0

    def __init__(
        self, judge: Callable[[SimTrainer, Batch], None], checkpoint: Path | None, fails: Callable[[], bool]
    ) -> None:
        self._judge, self._fails = judge, fails
        self.trained: dict[int, int] = {}
        """ordinal -> policy_version that it was trained into, in the lineage of these weights."""
        self.policy_version = 0
        self._batch: Batch | None = None
        if checkpoint is not None:
            state = json.loads((checkpoint / "trained.json").read_text())
            self.policy_version = state["policy_version"]
            self.trained = {int(ordinal): step for ordinal, step in state["trained"].items()}

    def save(self, directory: Path) -> None:
        state = {"policy_version": self.policy_version, "trained": self.trained}
        (directory / "trained.json").write_text(json.dumps(state))

    def forward_backward(self, batch: Batch) -> StepResult:
        self._judge(self, batch)
        self._batch = batch
        if self._fails():
            return StepResult(finite=False, reason="loss is nan")
        return StepResult(finite=True, loss_tokens=sum(int(g.group.completion_lengths.sum()) for g in batch.groups))

    def optimizer_step(self) -> int:
        assert self._batch is not None
        self.policy_version += 1
        for group in self._batch.groups:
            assert group.ordinal not in self.trained, f"I3: {group.ordinal} trained twice in one lineage"
            self.trained[group.ordinal] = self.policy_version
        self._batch = None
        return self.policy_version

    @property
    def step_metrics(self) -> dict[str, float]:
        return {}

    def canary_logprobs(self, tokens: Int32) -> Float32:
        return np.full((len(tokens), tokens.shape[1] - 1), -float(self.policy_version), np.float32)


class SimJournal:
    """The journal's format on a real file, without its thread."""

    def __init__(self, directory: Path, life: Life, dice: random.Random) -> None:
        self._writer = SegmentWriter(directory, segment_bytes=1 << 16)
        self._life, self._dice = life, dice
        self.group_ids: set[str] = set()
        self.drawn: dict[int, int] = {}
        """ordinal -> tokens of the group last written."""
        self.pruned = 0

    async def append(self, *records: Record) -> None:
        entries = [(record, record_frames(record)) for record in records]
        await asyncio.sleep(self._dice.uniform(0.0, 0.05))
        self._life.check()
        self._writer.write(entries)
        self.drawn |= {r.group.ordinal: r.group.completion_tokens.size for r in records if isinstance(r, GroupRecord)}
        self.group_ids |= {record.group.group_id for record in records if isinstance(record, GroupRecord)}
        await asyncio.sleep(self._dice.uniform(0.0, 0.05))
        self._life.check()  # on disk, and nobody is left to hear of it

    async def prune(self, finished: Callable[[int], bool]) -> list[Path]:
        self._life.check()
        paths = self._writer.prune(finished)
        self.pruned += len(paths)
        return paths

    def close(self) -> None:
        self._writer.close()


class SimPublisher:
    """Publishes names of versions. Holds and releases as the real one."""

    def __init__(self, announce: Callable[[WeightsReady], None], tasks: asyncio.TaskGroup, dice: random.Random) -> None:
        self._announce, self._tasks, self._dice = announce, tasks, dice
        self._thread = asyncio.Lock()  # one after another, in order, as the real one's only thread does
        self._snapshot: asyncio.Event | None = None
        self._held_at: int | None = None
        self._held_back: tuple[Version, Canaries | None] | None = None
        self.versions: list[Version] = []
        self.published = 0

    def start(self, version: Version, canaries: Canaries | None = None) -> None:
        assert self._snapshot is None, "wait_previous first"
        assert canaries is None or (canaries.logprobs == -version.policy_version).all(), "of other weights"
        self._snapshot = asyncio.Event()
        self._tasks.create_task(self._publish(version, self._snapshot, canaries), name=f"publish {version}")

    async def wait_previous(self) -> None:
        if self._snapshot is not None:
            await self._snapshot.wait()
            self._snapshot = None

    def hold(self, policy_version: int) -> None:
        self._held_at = policy_version

    def release(self) -> None:
        self._held_at = None
        if self._held_back is not None:
            held, self._held_back = self._held_back, None
            self._serve(*held)

    async def _publish(self, version: Version, snapshot: asyncio.Event, canaries: Canaries | None) -> None:
        async with self._thread:
            await asyncio.sleep(self._dice.uniform(0.0, 0.3))
            snapshot.set()
            await asyncio.sleep(self._dice.uniform(0.0, 0.2))
        self.published += 1
        if self._held_at is not None and version.policy_version > self._held_at:
            self._held_back = (version, canaries)
        else:
            self._serve(version, canaries)

    def _serve(self, version: Version, canaries: Canaries | None) -> None:
        assert not self.versions or version > self.versions[-1], "I5"
        self.versions.append(version)
        self._announce(
            WeightsReady(
                version=version, manifest=np.frombuffer(sim_manifest(version).to_json(), np.uint8),
                addresses=("ipc:///memory",), canary_tokens=None if canaries is None else canaries.tokens,
                canary_logprobs=None if canaries is None else canaries.logprobs,
            )
        )  # fmt: skip


def sim_manifest(version: Version) -> Manifest:
    """Describe a model of one number, which is another one in every version."""
    content = f"{version.policy_version:032x}"
    entry = TensorEntry(SPEC, LAYOUT.offset(SPEC.name), SPEC.nbytes, (content,))
    return Manifest(version=version, algorithm="xxh3_128", tensors=(entry,), file_bytes=LAYOUT.file_bytes)


class SimThread(Executor):
    """Does its work on the loop's own thread, after a while by the dice."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice

    def submit(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(*args, **kwargs))
            except WeightsError as error:
                future.set_exception(error)

        asyncio.get_running_loop().call_later(self._dice.uniform(0.05, 1.0), run)
        return future


class SimFetcher:
    """Brings nothing, and is called off by a newer version as the real one."""

    def fetch(self, shipment: Shipment, *args: object, stop: threading.Event, **kwargs: object) -> FetchReport:
        if stop.is_set():
            raise Superseded(f"the fetch of version {shipment.version} was called off")
        return FetchReport(transfer_s=0.1, verify_s=0.0, bytes=shipment.nbytes, refetched_blocks=0)


class SimReceiver(WeightsReceiver):
    """The real one, without its thread and its socket."""

    def __init__(self, engine: MortalEngine, waits: Waits, dice: random.Random, directory: Path) -> None:
        super().__init__(engine, waits, learner="ipc:///memory", directory=directory)
        self._thread = SimThread(dice)  # type: ignore[assignment]
        self._stage._fetcher = SimFetcher()  # type: ignore[assignment]


class SimListener:
    """The learner's end, which dies with it, and at which I7 is watched."""

    address = "memory"
    sender_host = ""

    def __init__(self, network: MemoryNetwork, life: Life) -> None:
        self._listener, self._life = network.listener(), life
        self.journal: SimJournal
        self.evaluations: set[str] = set()
        """Leases whose answers need no journal."""
        self.acks = 0

    def send(self, peer: bytes, message: AnyMessage) -> None:
        self._life.check()
        if isinstance(message, Lease) and message.purpose is Purpose.EVAL:
            self.evaluations.add(message.group_id)
        if isinstance(message, Ack) and message.status is AckStatus.OK and message.group_id not in self.evaluations:
            assert message.group_id in self.journal.group_ids, "I7: acknowledged and not on disk"
            self.acks += 1
        self._listener.send(peer, message)

    async def recv(self) -> Any:
        return await self._listener.recv()

    def key_of(self, peer: bytes) -> str:
        return ""

    def owner_of(self, peer: bytes) -> str:
        return self._listener.owner_of(peer)

    def knows(self, owner: str) -> bool:
        return self._listener.knows(owner)

    async def close(self) -> None:
        await self._listener.close()


@dataclass
class Screen:
    """Nobody looks."""

    phase: str = ""

    def show(self, view: object) -> None:
        pass

    def view(self) -> None:
        pass
