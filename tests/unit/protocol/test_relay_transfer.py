"""Weights passed on while they arrive: parents that are late, slow, silent, gone, or wrong."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from protocol.channel import bound_address, bulk_client_socket, bulk_server_socket
from protocol.codec import decode, encode
from protocol.errors import WeightsError
from protocol.messages import WeightsChunk, WeightsRequest
from protocol.versions import Version
from protocol.weights import parking
from protocol.weights.fetching import FetchReport, WeightsFetcher
from protocol.weights.filling import Filling
from protocol.weights.layout import MappedWeights
from protocol.weights.manifest import BLOCK_BYTES, Manifest, TensorSpec
from protocol.weights.parking import PARKED_PER_PEER
from protocol.weights.serving import Offer, WeightsServer
from tests.weights import CHUNK, FaultyNetwork, Frames, make_weights, manifest_of, tensors, wait_until

LOOPBACK = "tcp://127.0.0.1:*"
SPECS = (TensorSpec("a", "U8", (5 * BLOCK_BYTES,)), TensorSpec("b", "U8", (3 * CHUNK + 7,)))
"""Six blocks, 84 chunks."""


class Parent:
    """A server that passes on what a test says has arrived."""

    def __init__(self, source: MappedWeights, manifest: Manifest) -> None:
        self.server = WeightsServer(LOOPBACK, patient=True)
        self.shipment = manifest.shipment
        self.filling = Filling(self.shipment)
        self._source = source

    def begin(self) -> None:
        memory = self._source.bytes(0, self.shipment.nbytes)
        self.server.pass_on(self.shipment.version, [Offer(self.shipment, memory, self.filling)], self._source)

    def arrived(self, *blocks: int) -> None:
        for block in blocks:
            self.filling.arrived(block)
        self.server.arrived()


class Child(threading.Thread):
    """A fetch in a thread of its own."""

    def __init__(self, manifest: Manifest, addresses: Sequence[str], path: Path, **limits: Any) -> None:
        super().__init__(name="child")
        self.weights = make_weights(path, 9, SPECS)
        self.fetcher = WeightsFetcher()
        self.report: FetchReport | None = None
        self.error: Exception | None = None
        self.blocks: list[int] = []
        self._manifest, self._addresses = manifest, addresses
        self._limits = {"stop": threading.Event(), "deadline_s": 30.0, "stall_s": 3.0, **limits}
        self.start()

    def run(self) -> None:
        memory = self.weights.writable_bytes(0, self._manifest.file_bytes)
        try:
            self.report = self.fetcher.fetch(
                self._manifest.shipment, self._addresses, memory, on_block=self.blocks.append, **self._limits
            )
        except WeightsError as error:
            self.error = error

    def result(self) -> FetchReport:
        self.join(40)
        assert self.report is not None, self.error
        return self.report


@pytest.fixture
def source(tmp_path: Path) -> MappedWeights:
    return make_weights(tmp_path / "source.safetensors", 1, SPECS)


@pytest.fixture
def manifest(source: MappedWeights) -> Manifest:
    return manifest_of(source)


@pytest.fixture
def learner(source: MappedWeights, manifest: Manifest) -> Iterator[WeightsServer]:
    with WeightsServer(LOOPBACK) as server:
        server.serve(manifest, source)
        yield server


@pytest.fixture
def parent(source: MappedWeights, manifest: Manifest) -> Iterator[Parent]:
    parent = Parent(source, manifest)
    with parent.server:
        yield parent


@contextlib.contextmanager
def throttled(address: str, bytes_per_s: float) -> Iterator[FaultyNetwork]:
    """A link to that address which lets through so much."""

    def wait(number: int, frames: Frames) -> list[Frames]:
        time.sleep(sum(map(len, frames)) / bytes_per_s)
        return [frames]

    with FaultyNetwork(address, wait) as network:
        yield network


def test_child_is_fed_before_its_parent_is_complete(
    parent: Parent, learner: WeightsServer, manifest: Manifest, source: MappedWeights, tmp_path: Path
) -> None:
    parent.begin()
    child = Child(manifest, [parent.server.address, learner.address], tmp_path / "child.safetensors")
    wait_until(lambda: parent.server.counters.parked > 0)
    for block in range(6):
        assert child.blocks == list(range(block))
        parent.arrived(block)
        wait_until(lambda: len(child.blocks) == block + 1)  # noqa: B023 - it is done before block changes
    child.result()
    assert learner.counters.bytes == 0
    assert np.array_equal(tensors(child.weights), tensors(source))


def test_child_may_come_before_its_parent_has_heard_of_the_version(
    parent: Parent, learner: WeightsServer, manifest: Manifest, tmp_path: Path
) -> None:
    child = Child(manifest, [parent.server.address, learner.address], tmp_path / "child.safetensors")
    wait_until(lambda: parent.server.counters.parked > 0)
    parent.begin()
    parent.arrived(*range(6))
    child.result()
    assert learner.counters.bytes == 0


def test_withdrawn_parent_sends_its_children_on(
    parent: Parent, learner: WeightsServer, manifest: Manifest, source: MappedWeights, tmp_path: Path
) -> None:
    parent.begin()
    parent.arrived(0, 1)
    child = Child(manifest, [parent.server.address, learner.address], tmp_path / "child.safetensors")
    wait_until(lambda: child.blocks == [0, 1])
    parent.server.withdraw_all()
    child.result()
    assert parent.server.counters.unknown_version >= 1
    assert learner.counters.bytes == child.weights.layout.file_bytes - manifest.tensors[0].offset - 2 * BLOCK_BYTES
    assert np.array_equal(tensors(child.weights), tensors(source))
    assert parent.server.is_free(source)


def test_other_ways_to_a_version_than_those_offered_are_not_waited_for(parent: Parent, manifest: Manifest) -> None:
    parent.begin()
    with bulk_client_socket(parent.server.address) as socket:
        ask(socket, manifest.version, 0, base=Version(1, 0))
        assert answer(socket).data is None


def test_parent_that_dies_in_the_middle_is_left_for_the_next(
    parent: Parent, learner: WeightsServer, manifest: Manifest, source: MappedWeights, tmp_path: Path
) -> None:
    parent.begin()
    parent.arrived(0, 1)
    child = Child(manifest, [parent.server.address, learner.address], tmp_path / "child.safetensors", stall_s=0.5)
    wait_until(lambda: child.blocks == [0, 1])
    parent.server.close()
    report = child.result()
    assert child.fetcher.counters.reconnects == 1
    assert report.bytes == child.weights.layout.file_bytes - manifest.tensors[0].offset  # nothing twice
    assert np.array_equal(tensors(child.weights), tensors(source))


def test_parent_that_waits_itself_is_no_dead_one(
    parent: Parent, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.weights.serving.TELL_S", 0.1)
    parent.begin()
    child = Child(manifest, [parent.server.address], tmp_path / "child.safetensors", stall_s=0.5)
    wait_until(lambda: child.fetcher.counters.not_yet > 12)
    parent.arrived(*range(6))
    child.result()
    assert child.fetcher.counters.reconnects == 0


def test_version_nobody_announces_is_not_waited_for_without_end(
    parent: Parent, learner: WeightsServer, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.weights.serving.UNKNOWN_S", 0.2)
    monkeypatch.setattr("protocol.weights.serving.TELL_S", 0.1)
    child = Child(manifest, [parent.server.address, learner.address], tmp_path / "child.safetensors")
    child.result()
    assert parent.server.counters.parked > 0
    assert parent.server.counters.unknown_version > 0


def test_slow_parent_is_left_for_one_that_is_much_faster(
    learner: WeightsServer, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.weights.sources.TRIAL_S", 0.6)
    with throttled(learner.address, 1.5e6) as slow, throttled(learner.address, 40e6) as fast:
        begun_s = time.monotonic()
        child = Child(manifest, [slow.address, fast.address], tmp_path / "child.safetensors")
        child.result()
        took_s = time.monotonic() - begun_s
    assert child.fetcher.counters.moves == 1
    assert took_s < 7  # 15 s over the slow link alone


def test_equal_neighbors_are_tried_and_not_moved_to(
    learner: WeightsServer, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.weights.sources.TRIAL_S", 0.5)
    with throttled(learner.address, 12e6) as first, throttled(learner.address, 12e6) as second:
        child = Child(manifest, [first.address, second.address], tmp_path / "child.safetensors")
        child.result()
    assert child.fetcher.counters.trials >= 1
    assert child.fetcher.counters.moves == 0


def test_next_that_waits_for_the_bytes_itself_is_not_moved_to(
    parent: Parent, learner: WeightsServer, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.weights.sources.TRIAL_S", 0.3)
    parent.begin()
    with throttled(learner.address, 10e6) as slow:
        child = Child(manifest, [slow.address, parent.server.address], tmp_path / "child.safetensors")
        child.result()
    assert child.fetcher.counters.trials >= 1
    assert parent.server.counters.parked >= 1
    assert child.fetcher.counters.moves == 0


def flipped(number: int, frames: Frames) -> list[Frames]:
    chunk = decode(frames)
    assert isinstance(chunk, WeightsChunk)
    assert chunk.data is not None
    data = chunk.data.copy()
    data[0] ^= 1
    wrong = encode(WeightsChunk(version=chunk.version, offset=chunk.offset, data=data))
    return [[bytes(frame) for frame in wrong]]


def test_parent_that_sends_wrong_bytes_is_left_and_in_the_end_shut_out(
    learner: WeightsServer, source: MappedWeights, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fetcher = WeightsFetcher()
    destination = make_weights(tmp_path / "child.safetensors", 2, SPECS)
    manifest = manifest_of(source)
    memory = destination.writable_bytes(0, manifest.file_bytes)
    with FaultyNetwork(learner.address, flipped) as wrong:
        for times in range(1, 5):
            memory[len(destination.layout.header) :] = bytes(len(memory) - len(destination.layout.header))
            fetcher.fetch(
                manifest.shipment, [wrong.address, learner.address], memory,
                stop=threading.Event(), deadline_s=20, stall_s=5,
            )  # fmt: skip
            assert np.array_equal(tensors(destination), tensors(source))
            assert fetcher.counters.refetched_blocks == min(times, 3)
            assert fetcher.shut_out == ({wrong.address} if times >= 3 else set())
        assert wrong.faults > 0
    assert caplog.text.count("event=weights_source_shut_out") == 1


def test_address_that_is_not_allowed_is_passed_over(learner: WeightsServer, manifest: Manifest, tmp_path: Path) -> None:
    child = Child(manifest, ["tcp://192.0.2.1:5", learner.address], tmp_path / "child.safetensors")
    child.result()


def ask(
    socket: zmq.Socket[bytes], version: Version, offset: int, length: int = CHUNK, base: Version | None = None
) -> None:
    socket.send_multipart(encode(WeightsRequest(version=version, offset=offset, length=length, base=base)))


def answer(socket: zmq.Socket[bytes]) -> WeightsChunk:
    assert socket.poll(5000)
    chunk = decode(socket.recv_multipart())
    assert isinstance(chunk, WeightsChunk)
    return chunk


def test_what_waits_is_bounded_for_every_peer(parent: Parent, manifest: Manifest) -> None:
    parent.begin()
    with bulk_client_socket(parent.server.address) as socket:
        for number in range(100):
            ask(socket, manifest.version, manifest.tensors[0].offset + number * CHUNK % BLOCK_BYTES)
        wait_until(lambda: parent.server.counters.malformed == 100 - PARKED_PER_PEER)
        told = [answer(socket) for _ in range(PARKED_PER_PEER)]
        assert all(chunk.data is not None and chunk.data.size == 0 for chunk in told)
        parent.arrived(0)
        got = [answer(socket) for _ in range(PARKED_PER_PEER)]
        assert all(chunk.data is not None and chunk.data.size == CHUNK for chunk in got)


def test_what_waits_is_bounded_in_all() -> None:
    waiting = parking.Parking()
    version = Version(1, 1)
    peers = [str(number).encode() for number in range(2000)]
    kept = [waiting.add(parking.Parked(peer, version, None, 0, 1, 0.0, 0.0)) for peer in peers]
    assert kept.count(True) == len(waiting) == parking.PARKED_AT_MOST


def test_requests_of_a_child_that_has_gone_are_forgotten(
    parent: Parent, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.weights.serving.TELL_S", 0.05)
    parent.begin()
    with bulk_client_socket(parent.server.address) as socket:
        ask(socket, manifest.version, manifest.tensors[0].offset)
        answer(socket)
    wait_until(lambda: parent.server.counters.unreachable == 1)


def test_chain_of_three_ends_soon_after_its_first(
    learner: WeightsServer, manifest: Manifest, source: MappedWeights, tmp_path: Path
) -> None:
    """Every link brings 10 MB/s: one after the other they would take three times as long."""
    with contextlib.ExitStack() as stack:
        address, took_s = learner.address, list[float]()
        children: list[Child] = []
        begun_s = time.monotonic()
        for number in range(3):
            link = stack.enter_context(throttled(address, 10e6))
            parent = PassingOn(manifest, link.address, tmp_path / f"{number}.safetensors")
            stack.enter_context(parent.server)
            children.append(parent)
            address = parent.server.address
        for child in children:
            child.result()
            took_s.append(time.monotonic() - begun_s)
            assert np.array_equal(tensors(child.weights), tensors(source))
    assert learner.counters.bytes < 1.1 * manifest.file_bytes
    assert took_s[2] < 1.9 * took_s[0], took_s


class PassingOn(Child):
    """A child that is a parent, too."""

    def __init__(self, manifest: Manifest, address: str, path: Path) -> None:
        self.server = WeightsServer(LOOPBACK, patient=True)
        self._filling = Filling(manifest.shipment)
        super().__init__(manifest, [address], path)

    def run(self) -> None:
        offer = Offer(self._manifest.shipment, self.weights.bytes(0, self._manifest.file_bytes), self._filling)
        self.server.pass_on(self._manifest.version, [offer], self.weights)

        class Tell(list[int]):
            def append(told, block: int) -> None:  # noqa: N805 - self is the child
                self._filling.arrived(block)
                self.server.arrived()

        self.blocks = Tell()
        super().run()


def test_server_of_nothing_is_silent_to_nobody() -> None:
    """Who is not patient says at once that it has not got a version."""
    with WeightsServer(LOOPBACK) as server, bulk_client_socket(server.address) as socket:
        ask(socket, Version(1, 1), 0)
        assert answer(socket).data is None


def test_silent_address_is_left_by_trials_too(
    learner: WeightsServer, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.weights.sources.TRIAL_S", 0.6)
    with bulk_server_socket(LOOPBACK) as silent:
        begun_s = time.monotonic()
        child = Child(manifest, [bound_address(silent), learner.address], tmp_path / "c.safetensors", stall_s=60.0)
        child.result()
    assert time.monotonic() - begun_s < 20
    assert child.fetcher.counters.moves == 1
