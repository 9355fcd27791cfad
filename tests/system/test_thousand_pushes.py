"""A thousand versions through a network that damages what it carries: no wrong byte is loaded, nobody is left behind.

The shipped ends: publisher, deltas and bulk plane on one side, receivers and their stages on the other, one of them
beside the learner, where it reads the versions out of the learner's memory. Engines check
what they load, block by block, against what was published under that name; versions are published sooner than they are
live, so that many are superseded on their way.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import rollout_server.stage
from learner.deltas import DeltaChain
from learner.links import Links
from learner.publish import Publisher
from learner.weights_archive.archive import WeightsArchive
from protocol.codec import decode, encode
from protocol.errors import MalformedMessage
from protocol.messages import WeightsChunk, WeightsLive, WeightsReady, WeightsStaged, WeightsSwap
from protocol.signals import Signal
from protocol.versions import Version
from protocol.waits import Waits
from protocol.weights.layout import MappedWeights
from protocol.weights.manifest import Algorithm, Manifest, TensorSpec, block_digests, digest
from protocol.weights.serving import WeightsServer
from rollout_server.engines.base import EngineFailure, EngineInfo, LoadReport, StagedWeights
from rollout_server.weights import WeightsReceiver
from tests.weights import FaultyNetwork, Frames

PUSHES = 1000
SERVERS = 3
SPECS = (
    TensorSpec("embed", "BF16", (512, 256)),
    TensorSpec("mlp", "BF16", (256, 256)),
    TensorSpec("norm", "F32", (256,)),
    TensorSpec("none", "F32", (0,)),
)
FAULT_SHARE = 0.15
"""Of the answers on the bulk plane."""


class Weights:
    """What is trained: a share of the elements changes with every version."""

    adapter = None

    def __init__(self) -> None:
        self.dice = np.random.default_rng(0)
        self.tensors = {spec.name: self.dice.integers(0, 256, spec.nbytes, np.uint8) for spec in SPECS}

    def specs(self) -> list[TensorSpec]:
        return list(SPECS)

    def step(self) -> None:
        share = self.dice.choice([0.001, 0.01, 0.5])
        for tensor in self.tensors.values():
            where = self.dice.random(tensor.size) < share
            tensor[where] ^= self.dice.integers(1, 256, int(where.sum()), np.uint8)

    def write_weights(self, mapped: MappedWeights, algorithm: Algorithm | None) -> dict[str, tuple[str, ...]]:
        for name, tensor in self.tensors.items():
            mapped.view(name)[:] = tensor.data
        assert algorithm is not None
        return {name: block_digests(algorithm, mapped.view(name)) for name in self.tensors}


class CheckingEngine:
    """Loads nothing that is not, to the last block, what was published under its name."""

    def __init__(self, truth: dict[Version, Manifest], dice: random.Random, witness: Counter[str]) -> None:
        self.info = EngineInfo(engine="checking", room=1, vocab_size=9, model_digest="", tokenizer_digest="")
        self.live: Version | None = None
        self.lost = Signal()
        self._truth, self._dice, self._witness = truth, dice, witness

    async def load_weights(self, weights: StagedWeights) -> LoadReport:
        manifest = self._truth[weights.version]
        with MappedWeights.open(weights.path) as mapped:
            for block in manifest.shipment.blocks:
                found = digest(manifest.algorithm, mapped.bytes(block.offset, block.nbytes))
                assert found == block.digest, f"wrong bytes as {weights.version}: {block.what}"
        assert self.live is None or self.live < weights.version
        if self._dice.random() < 0.05:
            self._witness["engine failed"] += 1
            raise EngineFailure("it did not fit today")
        self._witness["loaded"] += 1
        self.live = weights.version
        return LoadReport(pause_s=0.0)


class Mischief:
    """What the network does to an answer, by the dice."""

    def __init__(self, dice: random.Random, witness: Counter[str]) -> None:
        self._dice, self._witness = dice, witness
        self._late: list[Frames] = []
        self._cut = 0

    def __call__(self, number: int, frames: Frames) -> list[Frames]:
        if self._cut:
            self._cut -= 1
            return []
        if self._dice.random() > FAULT_SHARE:
            late, self._late = self._late, []
            return [frames, *late]
        deed = self._dice.choice(["flip", "truncate", "repeat", "lose", "cut", "delay", "other version", "garble"])
        chunk = decode(frames)
        assert isinstance(chunk, WeightsChunk)
        if chunk.data is None or not chunk.data.size:
            return [frames]
        self._witness[deed] += 1
        if deed in ("flip", "truncate"):
            data = chunk.data.copy()
            data[self._dice.randrange(data.size)] ^= 1 << self._dice.randrange(8)
            return [as_frames(chunk, data[: -1 if deed == "truncate" else None])]
        if deed == "repeat":
            return [frames, frames]
        if deed == "lose":
            return []
        if deed == "cut":
            self._cut = 10
            return []
        if deed == "delay":
            self._late.append(frames)
            return []
        if deed == "other version":
            return [as_frames(chunk, chunk.data, version=Version(chunk.version[0], chunk.version[1] + 1)), frames]
        return [[frames[0][:-2], *frames[1:]], frames]


def as_frames(chunk: WeightsChunk, data: Any, version: Version | None = None) -> Frames:
    forged = WeightsChunk(version=version or chunk.version, offset=chunk.offset, base=chunk.base, data=data)
    return [bytes(frame) for frame in encode(forged)]


def lies(ready: WeightsReady, dice: random.Random) -> WeightsReady:
    """Announce the version with a manifest that cannot be."""
    text = ready.manifest.tobytes()
    lie = dice.choice([
        (b'"file_bytes":', b'"file_bytes":1'), (b'"shape":[256]', b'"shape":[257]'),
        (b'"dtype":"F32"', b'"dtype":"F64"'), (b'"nbytes":', b'"nbytes":9'), (b'"offset":', b'"offset":-'),
    ])  # fmt: skip
    forged = text.replace(*lie)
    assert forged != text
    return WeightsReady(
        version=ready.version, manifest=np.frombuffer(forged, np.uint8), addresses=ready.addresses, deltas=ready.deltas
    )


class Play:
    """One publisher, several receivers, and between them a network that cannot be trusted."""

    def __init__(self, directory: Path, tasks: asyncio.TaskGroup, address: str, server: WeightsServer) -> None:
        self.dice = random.Random(7)
        self.witness: Counter[str] = Counter()
        self.truth: dict[Version, Manifest] = {}
        self.weights, self.waits = Weights(), Waits()
        links = Links(local=False)
        links.joined("any")
        (directory / "learner").mkdir(mode=0o700)
        self.publisher = Publisher(
            self.weights, server, DeltaChain(server, links, "always"), WeightsArchive(directory / "archive", 0),
            directory=directory / "learner", algorithm="xxh3_128", bulk_address=address, announce=self.announce,
            tasks=tasks, waits=self.waits,
        )  # fmt: skip
        homes = ["learner", *(f"server-{number}" for number in range(1, SERVERS))]
        self.receivers = [self._receiver(directory / home) for home in homes]
        self.reports: list[Counter[str]] = [Counter() for _ in self.receivers]

    def _receiver(self, directory: Path) -> WeightsReceiver:
        engine = CheckingEngine(self.truth, self.dice, self.witness)
        return WeightsReceiver(
            engine,  # type: ignore[arg-type]
            self.waits,
            learner="tcp://127.0.0.1:1",
            directory=directory,
        )

    def announce(self, ready: WeightsReady) -> None:
        self.truth[ready.version] = Manifest.from_json(ready.manifest.tobytes())
        for receiver in self.receivers:
            if self.dice.random() < 0.05:
                self.witness["lying manifest"] += 1
                with pytest.raises(MalformedMessage):
                    receiver.announce(lies(ready, self.dice))
            if self.dice.random() < 0.05:
                self.witness["not told"] += 1  # it is told of the next one
            else:
                receiver.announce(ready)

    async def converse(self, number: int) -> None:
        """What the learner's desk does: every staged version may be swapped in at once."""
        receiver, counts = self.receivers[number], self.reports[number]
        while True:
            report = await receiver.reports.get()
            counts[type(report).__name__] += 1
            if isinstance(report, WeightsLive):
                counts[f"by {report.path}"] += 1
            if isinstance(report, WeightsStaged):
                receiver.swap(WeightsSwap(version=report.version))

    def damage(self, directory: Path) -> None:
        """Flip a bit of a staged file that nobody reads now, and that the next delta will be applied to."""
        number = self.dice.randrange(1, SERVERS)
        counts = self.reports[number]
        if self.publisher.current is None or self.receivers[number].live != self.publisher.current.version:
            return
        if counts["by delta"] < counts["damaged"] + 3:  # three wrong ones in a row, and none would be taken any more
            return
        counts["damaged"] = counts["by delta"]
        for file in directory.glob(f"server-{number}/weights-*.safetensors"):
            self.witness["staged file damaged"] += 1
            with MappedWeights.open(file, writable=True) as mapped:
                mapped.view("mlp")[self.dice.randrange(1000)] ^= 1


async def push_all(directory: Path, play: Play, tasks: asyncio.TaskGroup) -> None:
    loops = [
        tasks.create_task(loop)
        for number, receiver in enumerate(play.receivers)
        for loop in (receiver.loop(), play.converse(number))
    ]
    for number in range(PUSHES):
        if play.dice.random() < 0.3:
            play.damage(directory)
        play.weights.step()
        play.publisher.start(Version(1, number))
        await play.publisher.wait_previous()
        await until(lambda number=number: play.publisher.published > number)
        if play.dice.random() < 0.7:
            await until(lambda: play.receivers[play.dice.randrange(SERVERS)].live == play.publisher.current.version)
    while any(receiver.live != Version(1, PUSHES - 1) for receiver in play.receivers):
        for receiver in play.receivers:
            receiver.announce(play.publisher.current)  # as it is told at every Welcome
        await asyncio.sleep(0.01)
    for loop in loops:
        loop.cancel()
    for receiver in play.receivers:
        await receiver.close()
    await play.publisher.close()


async def until(condition: Callable[[], bool], patience_s: float = 0.1) -> None:
    """Wait, not for ever: what was not told to anybody is waited for in vain."""
    ends_s = asyncio.get_running_loop().time() + patience_s
    while not condition() and asyncio.get_running_loop().time() < ends_s:
        await asyncio.sleep(0.001)


@pytest.mark.timeout(600)
def test_a_thousand_pushes_through_a_network_that_damages_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_server.stage, "STALL_S", 0.05)
    found = SimpleNamespace()
    server = WeightsServer(f"ipc://{tmp_path}/bulk")
    dice = random.Random(3)
    network_witness: Counter[str] = Counter()

    async def main(address: str) -> None:
        async with asyncio.TaskGroup() as tasks:
            found.play = Play(tmp_path, tasks, address, server)
            await push_all(tmp_path, found.play, tasks)

    with FaultyNetwork(server.address, Mischief(dice, network_witness)) as network:
        asyncio.run(main(network.address))
    server.close()
    assert all(network_witness[deed] > 10 for deed in network_witness), network_witness
    assert len(network_witness) == 8
    witness, reports = found.play.witness, found.play.reports
    assert witness["loaded"] > PUSHES / 2, witness
    assert min(witness["lying manifest"], witness["not told"], witness["engine failed"]) > 10, witness
    assert witness["staged file damaged"] > 5, witness
    assert reports[0]["by shared"] > PUSHES / 10, reports[0]
    for counts in reports[1:]:
        assert counts["by delta"] > 50, counts
        assert counts["by dense"] > 5, counts
