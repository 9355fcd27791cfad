"""Publishing: bytes are those of one step, no mapping is written while anyone reads it, a pinned evaluation holds."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

import learner.publish as publish_module
from learner.canaries import Canaries
from learner.deltas import DeltaChain, MadeDelta
from learner.links import Links
from learner.publish import BUFFERS, Publisher
from learner.weights_archive.archive import PublishedRow
from protocol.errors import WeightsError
from protocol.messages import WeightsReady
from protocol.versions import Version
from protocol.waits import Waits
from protocol.weights.adapters import AdapterSpec, factor_names
from protocol.weights.delta_manifest import read_deltas
from protocol.weights.layout import Layout, MappedWeights, build_manifest
from protocol.weights.manifest import Algorithm, Manifest, TensorSpec, block_digests
from protocol.weights.serving import ServeCounters
from protocol.weights.shared import SharedReader

SPECS = [TensorSpec("a", "F32", (64, 4)), TensorSpec("b", "BF16", (100,))]


class FakeServer:
    """Serves the two newest, as the real one does; `readers` hold on to a mapping that is no longer served."""

    def __init__(self) -> None:
        self.served: dict[Version, tuple[Manifest, MappedWeights]] = {}
        self.readers: list[MappedWeights] = []
        self.deltas: dict[tuple[Version, Version], bytes] = {}
        self.counters = ServeCounters()

    def serve(self, manifest: Manifest, mapped: MappedWeights) -> None:
        assert all(mapped is not other for _, other in self.served.values()), "one mapping, two versions"
        self.served[manifest.version] = (manifest, mapped)
        for version in sorted(self.served)[:-2]:
            del self.served[version]

    def serve_delta(self, version: Version, base: Version, delta: bytes) -> None:
        self.deltas[version, base] = delta

    def withdraw_delta(self, version: Version, base: Version) -> None:
        del self.deltas[version, base]

    def is_free(self, mapped: MappedWeights) -> bool:
        return all(mapped is not busy for busy in [*(m for _, m in self.served.values()), *self.readers])

    def check_bytes(self) -> None:
        """I5: what is served under a version hashes to its manifest."""
        for version, (manifest, mapped) in self.served.items():
            assert build_manifest(version, mapped, manifest.algorithm) == manifest, f"version {version}"


class FakeSource:
    """Weights that are all the number `value`. Writing can be held back with `gate`."""

    def __init__(self) -> None:
        self.value = 0
        self.gate = threading.Event()
        self.gate.set()
        self.writing = threading.Event()
        self.error: Exception | None = None

    adapter: AdapterSpec | None = None

    def specs(self) -> list[TensorSpec]:
        return SPECS

    def write_weights(self, mapped: MappedWeights, algorithm: Algorithm | None) -> dict[str, tuple[str, ...]]:
        self.writing.set()
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        for spec in SPECS:
            np.frombuffer(mapped.view(spec.name), np.uint8)[:] = self.value
        if algorithm is None:
            return {}
        return {spec.name: block_digests(algorithm, mapped.view(spec.name)) for spec in SPECS}


class FakeArchive:
    """Keeps rows."""

    def __init__(self) -> None:
        self.rows: list[PublishedRow] = []

    def published(self, row: PublishedRow, manifest: Manifest, made: MadeDelta | None) -> None:
        assert row.version == manifest.version
        assert row.delta_bytes == (None if made is None else len(made.data))
        self.rows.append(row)


class Bench:
    """A publisher with everything around it."""

    def __init__(self, directory: Path, tasks: asyncio.TaskGroup, algorithm: Algorithm = "xxh3_128") -> None:
        self.server, self.source, self.waits = FakeServer(), FakeSource(), Waits()
        self.announced: list[WeightsReady] = []
        self.archive = FakeArchive()
        self.publisher = Publisher(
            self.source,
            self.server,  # type: ignore[arg-type]
            DeltaChain(self.server, Links(local=True), "always"),
            self.archive,
            directory=directory,
            algorithm=algorithm,
            bulk_address="tcp://127.0.0.1:5556",
            announce=self.announced.append,
            tasks=tasks,
            waits=self.waits,
        )

    def versions(self) -> list[int]:
        """Announced, in order."""
        return [ready.version.policy_version for ready in self.announced]

    def start(self, policy_version: int) -> None:
        self.source.value = policy_version
        self.publisher.start(Version(1, policy_version))

    async def publish(self, policy_version: int) -> None:
        """Publish, and wait until it is announced or held back."""
        published = self.publisher.published
        self.start(policy_version)
        await self.publisher.wait_previous()
        await self.until(lambda: self.publisher.published > published)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the publisher's thread work until it has brought something about."""
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.001)


def on_bench(directory: Path, scenario: Callable[[Bench], Awaitable[None]], algorithm: Algorithm = "xxh3_128") -> None:
    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            bench = Bench(directory, tasks, algorithm)
            await scenario(bench)
        bench.server.check_bytes()
        await bench.publisher.close()
        assert list(directory.iterdir()) == []

    asyncio.run(main())


def test_a_version_that_is_an_adapter_is_announced_as_one(tmp_path, monkeypatch):
    factors = [TensorSpec(name, "F32", (4, 4)) for name in factor_names("model.x.weight")]
    monkeypatch.setitem(FakeSource.specs.__globals__, "SPECS", factors)

    async def scenario(bench):
        bench.source.adapter = AdapterSpec(r=4, lora_alpha=8, base_digest="ab" * 16)
        await bench.publish(0)
        manifest = Manifest.from_json(bench.announced[0].manifest.tobytes())
        assert manifest.adapter == bench.source.adapter
        bench.server.served.clear()  # they are compared with manifests of whole weights

    on_bench(tmp_path, scenario)


def test_a_version_is_written_hashed_served_and_announced(tmp_path):
    async def scenario(bench):
        await bench.publish(0)
        (ready,) = bench.announced
        assert (ready.version, ready.addresses) == (Version(1, 0), ("tcp://127.0.0.1:5556",))
        manifest = Manifest.from_json(ready.manifest.tobytes())
        assert (manifest.version, manifest.algorithm) == (Version(1, 0), "xxh3_128")
        assert bench.server.served[Version(1, 0)][0] == manifest
        assert bench.publisher.current is ready
        await bench.publish(1)
        assert bench.versions() == [0, 1]
        assert bench.publisher.published == 2

    on_bench(tmp_path, scenario)


def test_the_weights_may_change_only_when_the_snapshot_is_complete(tmp_path):
    async def scenario(bench):
        await bench.publisher.wait_previous()  # nothing before: at once
        bench.source.gate.clear()
        bench.start(1)
        waiting = asyncio.create_task(bench.publisher.wait_previous())
        await bench.until(lambda: any(wait.name == "publish" for wait in bench.waits.current()))
        assert not waiting.done()
        bench.source.gate.set()
        await waiting
        await bench.publisher.wait_previous()

    on_bench(tmp_path, scenario)


def test_two_at_once_are_a_bug(tmp_path):
    async def scenario(bench):
        bench.start(1)
        with pytest.raises(AssertionError, match="wait_previous first"):
            bench.publisher.start(Version(1, 2))
        await bench.publisher.wait_previous()

    on_bench(tmp_path, scenario)


def test_i5_a_version_still_being_hashed_is_not_overwritten_by_the_next(tmp_path, monkeypatch):
    hashing, go_on = threading.Event(), threading.Event()

    def slow_build_manifest(*arguments):
        hashing.set()
        assert go_on.wait(10)
        return build_manifest(*arguments)

    monkeypatch.setattr(publish_module, "build_manifest", slow_build_manifest)

    async def scenario(bench):
        bench.start(1)
        await bench.publisher.wait_previous()
        await bench.until(hashing.is_set)
        bench.start(2)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        go_on.set()
        await bench.publisher.wait_previous()
        await bench.until(lambda: bench.publisher.published == 2)
        bench.server.check_bytes()
        assert bench.versions() == [1, 2]

    on_bench(tmp_path, scenario, "blake3")  # of which the weights may change while it is computed


def test_i5_many_versions_in_a_row_never_touch_what_is_served_or_read(tmp_path):
    async def scenario(bench):
        for version in range(12):
            if version % 3 == 0 and bench.server.served:
                bench.server.readers = [mapped for _, mapped in bench.server.served.values()][:1]  # a slow reader
                held = [(mapped, bytes(mapped.bytes(0, 100))) for mapped in bench.server.readers]
            await bench.publish(version)
            bench.server.check_bytes()
            if bench.server.readers:
                assert all(bytes(mapped.bytes(0, 100)) == before for mapped, before in held)
        assert len(list(tmp_path.iterdir())) <= BUFFERS

    on_bench(tmp_path, scenario)


def test_slow_readers_of_every_mapping_end_the_run_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(publish_module, "FREE_BUFFER_S", 0.1)

    async def scenario(bench):
        for version in range(BUFFERS + 2):
            await bench.publish(version)
            bench.server.readers += [mapped for _, mapped in bench.server.served.values()]

    with pytest.raises(ExceptionGroup) as raised:
        on_bench(tmp_path, scenario)
    assert raised.group_contains(WeightsError, match=r"all 4 published versions are still being read after 0\.1 s")


# --- servers on this host, which read the mappings themselves


def test_a_version_is_announced_with_the_name_of_its_file(tmp_path):
    async def scenario(bench):
        await bench.publish(3)
        (ready,) = bench.announced
        (file,) = tmp_path.iterdir()
        assert ready.shared == file.name
        assert file.name.endswith("-1.3.safetensors")
        manifest = Manifest.from_json(ready.manifest.tobytes())
        reader = SharedReader(tmp_path)
        mapped = reader.claim(ready.shared, manifest.layout)
        assert build_manifest(ready.version, mapped, manifest.algorithm) == manifest
        reader.close()

    on_bench(tmp_path, scenario)


def test_i5_what_servers_have_claimed_is_not_overwritten_and_no_step_waits_for_them(tmp_path):
    """Each claim costs one mapping more, for as long as it lasts."""

    async def scenario(bench):
        readers = []
        for version in range(6):
            await bench.publish(version)
            reader = SharedReader(tmp_path)
            readers.append((reader, bench.announced[-1]))
            reader.claim(bench.announced[-1].shared, Layout(SPECS))
        assert len(list(tmp_path.iterdir())) == 6 > BUFFERS
        for reader, ready in readers:
            manifest = Manifest.from_json(ready.manifest.tobytes())
            assert build_manifest(ready.version, reader._claimed.mapped, "xxh3_128") == manifest
            reader.close()
        await bench.publish(6)
        assert len(list(tmp_path.iterdir())) == BUFFERS, "what they had is given back"

    on_bench(tmp_path, scenario)


def test_without_room_for_another_the_step_waits_for_servers_and_the_error_names_what_they_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(publish_module, "FREE_BUFFER_S", 0.2)

    async def scenario(bench):
        readers = [SharedReader(tmp_path) for _ in range(BUFFERS)]
        for version in range(BUFFERS):
            await bench.publish(version)
            readers[version].claim(bench.announced[-1].shared, Layout(SPECS))
        monkeypatch.setattr(os, "posix_fallocate", no_room)
        bench.start(4)
        await bench.until(lambda: bench.tried)
        readers[1].release()
        await bench.publisher.wait_previous()
        await bench.until(lambda: bench.publisher.published == 5)
        bench.start(5)
        await bench.publisher.wait_previous()

    def no_room(*arguments):
        benches[0].tried = True
        raise OSError(errno.ENOSPC, "no space")

    benches = []
    monkeypatch.setattr(Bench, "tried", False, raising=False)
    real = Bench.__init__
    monkeypatch.setattr(Bench, "__init__", lambda self, *arguments: (benches.append(self), real(self, *arguments))[1])
    with pytest.raises(ExceptionGroup) as raised:
        on_bench(tmp_path, scenario)
    expected = r"after 0\.2 s; servers on this host have claimed 2 \(1\.0, 1\.2\), and there is no room for another"
    assert raised.group_contains(WeightsError, match=r"all 4 published versions are still being read " + expected)


def test_weights_that_are_not_finite_end_the_run(tmp_path):
    async def scenario(bench):
        bench.source.error = WeightsError("tensor a holds a NaN")
        bench.start(1)
        await bench.publisher.wait_previous()

    with pytest.raises(ExceptionGroup) as raised:
        on_bench(tmp_path, scenario)
    assert raised.group_contains(WeightsError, match="tensor a holds a NaN")


def test_a_pinned_evaluation_holds_newer_versions_back(tmp_path):
    async def scenario(bench):
        await bench.publish(3)
        bench.publisher.hold(3)
        await bench.publish(4)
        await bench.publish(5)
        assert bench.versions() == [3], "snapshots go on, announcements do not"
        assert bench.publisher.published == 3
        bench.publisher.release()
        assert bench.versions() == [3, 5], "4 is superseded"
        bench.server.check_bytes()
        await bench.publish(6)
        assert bench.versions() == [3, 5, 6]

    on_bench(tmp_path, scenario)


def test_the_version_that_is_pinned_is_announced(tmp_path):
    async def scenario(bench):
        bench.publisher.hold(0)
        await bench.publish(0)
        assert bench.versions() == [0]
        bench.publisher.release()
        assert bench.versions() == [0]

    on_bench(tmp_path, scenario)


def test_what_is_held_back_is_not_overwritten(tmp_path):
    async def scenario(bench):
        bench.publisher.hold(0)
        await bench.publish(0)
        await bench.publish(1)
        bench.source.gate.clear()
        bench.source.writing.clear()
        bench.start(2)
        await bench.until(bench.source.writing.is_set)
        bench.publisher.release()
        assert bench.versions() == [0, 1]
        bench.server.check_bytes()
        bench.source.gate.set()
        await bench.publisher.wait_previous()
        await bench.until(lambda: bench.publisher.published == 3)
        bench.server.check_bytes()

    on_bench(tmp_path, scenario)


def test_a_train_loop_cancelled_while_it_waits_leaves_the_publishing_intact(tmp_path):
    """A signal stops the steps; what is being published must not fail because nobody waits for it any more."""

    async def scenario(bench):
        bench.source.gate.clear()
        bench.start(1)
        waiting = asyncio.create_task(bench.publisher.wait_previous())
        await bench.until(lambda: bool(bench.waits.current()))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        bench.source.gate.set()
        await bench.publisher.wait_previous()
        await bench.until(lambda: bench.versions() == [1])

    on_bench(tmp_path, scenario)


# --- canaries


def canaries(policy_version: int) -> Canaries:
    logprobs = np.full((2, 3), -policy_version, np.float32)
    return Canaries(tokens=np.arange(8, dtype=np.int32).reshape(2, 4), logprobs=logprobs)


def test_a_version_is_announced_with_its_canaries(tmp_path):
    async def scenario(bench):
        await bench.publish(0)
        bench.publisher.start(Version(1, 1), canaries(1))
        await bench.publisher.wait_previous()
        await bench.until(lambda: bench.publisher.published == 2)
        without, ready = bench.announced
        assert without.canary_tokens is without.canary_logprobs is None
        assert ready.canary_tokens.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert ready.canary_logprobs.tolist() == [[-1.0] * 3] * 2

    on_bench(tmp_path, scenario)


def test_a_version_that_is_held_back_keeps_its_own_canaries(tmp_path):
    async def scenario(bench):
        bench.publisher.hold(0)
        for version in (1, 2):
            bench.publisher.start(Version(1, version), canaries(version))
            await bench.publisher.wait_previous()
            await bench.until(lambda version=version: bench.publisher.published == version)
        assert bench.announced == []
        bench.publisher.release()
        (ready,) = bench.announced
        assert (ready.version, ready.canary_logprobs[0, 0]) == (Version(1, 2), -2.0)

    on_bench(tmp_path, scenario)


def offered(ready: WeightsReady) -> list[tuple[int, int]]:
    """What leads to an announced version: (base, version), in order."""
    deltas = () if ready.deltas is None else read_deltas(ready.deltas.tobytes())
    return [(delta.base.policy_version, delta.version.policy_version) for delta in deltas]


def test_every_version_is_announced_with_what_leads_to_it(tmp_path):
    async def scenario(bench):
        for policy_version in range(3):
            await bench.publish(policy_version)
        assert [offered(ready) for ready in bench.announced] == [[], [(0, 1)], [(0, 1), (1, 2)]]

    on_bench(tmp_path, scenario)


def test_what_was_held_back_and_superseded_is_a_link_of_the_chain(tmp_path):
    async def scenario(bench):
        await bench.publish(3)
        bench.publisher.hold(3)
        await bench.publish(4)
        await bench.publish(5)
        bench.publisher.release()
        assert bench.versions() == [3, 5]
        assert offered(bench.announced[-1]) == [(3, 4), (4, 5)]

    on_bench(tmp_path, scenario)


def test_the_version_before_is_not_overwritten_while_it_is_compared_with(tmp_path):
    """Every byte changes from one version to the next: a delta that says less was compared with itself."""

    async def scenario(bench):
        bench.publisher.hold(0)
        for policy_version in range(2 + 2 * BUFFERS):
            await bench.publish(policy_version)
        await bench.until(lambda: len(bench.archive.rows) == 2 + 2 * BUFFERS)
        assert [row.density for row in bench.archive.rows[1:]] == [1.0] * (1 + 2 * BUFFERS)

    on_bench(tmp_path, scenario)
