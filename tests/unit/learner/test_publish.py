"""Publishing: a version's bytes are those of one step, whatever overlaps with what (I5)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

import learner.publish as publish
from learner.publish import BUFFERS, Publisher
from protocol.errors import WeightsError
from protocol.messages import WeightsReady
from protocol.versions import Version
from protocol.waits import Waits
from protocol.weights.layout import MappedWeights, build_manifest
from protocol.weights.manifest import Manifest, TensorSpec

SPECS = [TensorSpec("w", "F32", (4,))]
Scene = Callable[["Stage"], Awaitable[None]]


class Source:
    """A model of one tensor, all of whose entries are `value`."""

    def __init__(self) -> None:
        self.value = 0.0

    def specs(self) -> list[TensorSpec]:
        return SPECS

    def write_weights(self, mapped: MappedWeights) -> None:
        np.frombuffer(mapped.view("w"), np.float32)[:] = self.value


class Server:
    """Serves the two newest versions; `readers` are mappings that somebody still reads."""

    def __init__(self) -> None:
        self.served: dict[Version, MappedWeights] = {}
        self.readers: list[MappedWeights] = []

    def serve(self, manifest: Manifest, mapped: MappedWeights) -> None:
        assert mapped not in self.served.values(), "one mapping, two versions"
        self.served[manifest.version] = mapped
        for version in sorted(self.served)[:-2]:
            del self.served[version]

    def is_free(self, mapped: MappedWeights) -> bool:
        return mapped not in [*self.served.values(), *self.readers]

    def value(self, version: Version) -> float:
        return float(np.frombuffer(self.served[version].view("w"), np.float32)[0])


class Stage:
    """A publisher with what it needs."""

    def __init__(self, directory: Path, tasks: asyncio.TaskGroup) -> None:
        self.source, self.server = Source(), Server()
        self.announced: list[WeightsReady] = []
        self.told = asyncio.Event()
        self.publisher = Publisher(
            self.source, self.server, directory=directory, algorithm="xxh3_128", bulk_address="ipc:///nowhere",  # type: ignore[arg-type]
            announce=self.announce, tasks=tasks, waits=Waits(),
        )  # fmt: skip

    def announce(self, ready: WeightsReady) -> None:
        self.announced.append(ready)
        self.told.set()

    async def publish(self, step: int) -> None:
        """Train a step and begin to publish it."""
        await self.publisher.wait_previous()
        self.source.value = float(step)
        self.publisher.start(Version(1, step))

    async def wait_announced(self, step: int) -> None:
        while not self.announced or self.announced[-1].version < Version(1, step):
            self.told.clear()
            await self.told.wait()


def play(directory: Path, scene: Scene) -> None:
    """Run a scene against a publisher."""

    async def main() -> None:
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            stage = Stage(directory, tasks)
            try:
                await scene(stage)
            finally:
                await stage.publisher.close()

    asyncio.run(main())


def test_each_version_is_announced_in_order_with_its_own_bytes(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        for step in range(6):
            await stage.publish(step)
            await stage.wait_announced(step)
            assert stage.server.value(Version(1, step)) == step
        assert [ready.version.policy_version for ready in stage.announced] == list(range(6))
        assert Manifest.from_json(stage.announced[-1].manifest.tobytes()).version == Version(1, 5)
        assert stage.publisher.published == 6
        assert stage.publisher.current is stage.announced[-1]

    play(tmp_path, scene)


def test_a_version_still_being_hashed_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashing, go_on = threading.Event(), threading.Event()

    def slow_manifest(version: Version, mapped: MappedWeights, algorithm: str) -> Manifest:
        hashing.set()
        assert go_on.wait(5)
        return build_manifest(version, mapped, algorithm)  # type: ignore[arg-type]

    monkeypatch.setattr(publish, "build_manifest", slow_manifest)

    async def scene(stage: Stage) -> None:
        await stage.publish(1)
        await stage.publish(2)  # the snapshot of 1 is complete, its hash is not
        assert await asyncio.to_thread(hashing.wait, 5)
        await asyncio.sleep(0)
        go_on.set()
        await stage.wait_announced(2)
        assert [ready.version.policy_version for ready in stage.announced] == [1, 2]
        assert [stage.server.value(Version(1, step)) for step in (1, 2)] == [1.0, 2.0]

    play(tmp_path, scene)


def test_while_a_version_is_held_newer_ones_wait_and_only_the_newest_follows(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        await stage.publish(1)
        await stage.wait_announced(1)
        stage.publisher.hold(1)
        for step in (2, 3, 4):
            await stage.publish(step)
        await stage.publisher.wait_previous()
        while stage.publisher.published < 4:
            await asyncio.sleep(0)
        assert [ready.version.policy_version for ready in stage.announced] == [1]
        stage.publisher.release()
        await stage.wait_announced(4)
        assert [ready.version.policy_version for ready in stage.announced] == [1, 4]
        assert stage.server.value(Version(1, 4)) == 4.0

    play(tmp_path, scene)


def test_slow_readers_are_waited_for_and_then_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "FREE_BUFFER_S", 0.0)

    async def scene(stage: Stage) -> None:
        for step in range(BUFFERS):
            await stage.publish(step)
            await stage.wait_announced(step)
            stage.server.readers.append(stage.server.served[Version(1, step)])
        await stage.publish(BUFFERS)

    with pytest.raises(ExceptionGroup) as failure:
        play(tmp_path, scene)
    assert failure.group_contains(WeightsError, match=f"all {BUFFERS} published versions are still being read")


def test_closing_removes_every_file(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        await stage.publish(1)
        await stage.wait_announced(1)
        assert len(list(tmp_path.iterdir())) == 1

    play(tmp_path, scene)
    assert list(tmp_path.iterdir()) == []
