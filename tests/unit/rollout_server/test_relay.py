"""What a server passes on, and that it never writes what others still read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocol.channel import bulk_client_socket
from protocol.codec import decode, encode
from protocol.errors import Superseded
from protocol.messages import WeightsChunk, WeightsRequest
from protocol.versions import Version
from protocol.weights.fetching import FetchReport, WeightsFetcher
from protocol.weights.layout import MappedWeights
from protocol.weights.manifest import BLOCK_BYTES, Manifest, Shipment, TensorSpec
from protocol.weights.serving import WeightsServer
from rollout_server import relay as relay_module
from rollout_server.relay import FILES_LEFT, Relay
from rollout_server.stage import Delivery, Stage, Wanted
from tests.unit.protocol.test_transfer import peer_that_does_not_read
from tests.weights import make_weights, manifest_of, tensors, wait_until

LOOPBACK = "tcp://127.0.0.1:*"
SPECS = (TensorSpec("w", "U8", (8 * BLOCK_BYTES,)),)
"""32 MiB: more than the kernel buffers between two processes."""


@pytest.fixture
def learner() -> Iterator[WeightsServer]:
    with WeightsServer(LOOPBACK) as server:
        yield server


@pytest.fixture
def relay() -> Iterator[Relay]:
    with Relay(LOOPBACK) as relay:
        yield relay


def publish(learner: WeightsServer, directory: Path, policy_version: int, seed: int) -> Manifest:
    weights = make_weights(directory / f"published-{policy_version}.safetensors", seed, SPECS)
    manifest = manifest_of(weights, policy_version)
    learner.serve(manifest, weights)
    return manifest


def bring(stage: Stage, manifest: Manifest, address: str) -> Delivery:
    return stage.bring(Wanted(manifest, (address,), None), threading.Event())


def fetch(manifest: Manifest, address: str, path: Path) -> MappedWeights:
    weights = make_weights(path, 99, SPECS)
    memory = weights.writable_bytes(0, manifest.file_bytes)
    WeightsFetcher().fetch(manifest.shipment, [address], memory, stop=threading.Event(), deadline_s=20, stall_s=5)
    return weights


def asks_and_does_not_read(send: Callable[[list[Any]], None], manifest: Manifest, times: int = 8) -> None:
    begin = manifest.tensors[0].offset
    for number in range(times):
        offset = begin + number % 8 * BLOCK_BYTES
        send(encode(WeightsRequest(version=manifest.version, offset=offset, length=BLOCK_BYTES)))


def test_what_was_brought_is_passed_on_and_the_next_version_takes_its_place(
    learner: WeightsServer, relay: Relay, tmp_path: Path
) -> None:
    stage = Stage(tmp_path / "staging", WeightsFetcher(), relay)
    for policy_version in (1, 2):
        manifest = publish(learner, tmp_path, policy_version, seed=policy_version)
        bring(stage, manifest, learner.address)
        sent = learner.counters.bytes
        got = fetch(manifest, relay.address, tmp_path / f"got-{policy_version}.safetensors")
        assert np.array_equal(tensors(got), np.frombuffer(stage_file(stage).read_bytes(), np.uint8)[-8 * BLOCK_BYTES :])
        assert learner.counters.bytes == sent
    with pytest.raises(Superseded, match="no longer served"):
        fetch(manifest_of(got, 1), relay.address, tmp_path / "too-late.safetensors")
    stage.discard()
    with pytest.raises(Superseded, match="no longer served"):
        fetch(manifest, relay.address, tmp_path / "gone.safetensors")


def stage_file(stage: Stage) -> Path:
    assert stage._file is not None
    return stage._file.path


def test_a_version_with_the_same_bytes_is_passed_on_under_its_own_name(
    learner: WeightsServer, relay: Relay, tmp_path: Path
) -> None:
    stage = Stage(tmp_path / "staging", WeightsFetcher(), relay)
    bring(stage, publish(learner, tmp_path, 1, seed=7), learner.address)
    again = publish(learner, tmp_path, 2, seed=7)
    assert bring(stage, again, learner.address).bytes == 0
    fetch(again, relay.address, tmp_path / "got.safetensors")


class Watching(WeightsFetcher):
    """Looks whether the file is free when a fetch begins."""

    def __init__(self, relay: Relay, stage: Callable[[], Stage]) -> None:
        super().__init__()
        self.free: list[bool] = []
        self._relay, self._stage = relay, stage

    def fetch(self, shipment: Shipment, *args: Any, **kwargs: Any) -> FetchReport:
        others = [mapped for mapped, array in self._relay._server._withdrawn if array() is not None]
        self.free.append(all(mapped is not self._stage()._file for mapped in others))
        return super().fetch(shipment, *args, **kwargs)


def test_a_file_that_a_child_still_reads_is_never_written(
    learner: WeightsServer, relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a child that never reads can hold is one old file more, however many versions there are."""
    monkeypatch.setattr(relay_module, "FREE_S", 0.1)
    staging = tmp_path / "staging"
    fetcher = Watching(relay, lambda: stage)
    stage = Stage(staging, fetcher, relay)
    peers = [peer_that_does_not_read(relay.address) for _ in range(4)]
    with peers[0] as first, peers[1] as second, peers[2] as third, peers[3] as fourth:
        for policy_version, send in enumerate((first, second, third, fourth), 1):
            manifest = publish(learner, tmp_path, policy_version, seed=policy_version)
            bring(stage, manifest, learner.address)
            chunks = relay.counters.chunks
            asks_and_does_not_read(send, manifest)
            served = policy_version <= FILES_LEFT
            wait_until(lambda: relay.counters.chunks + relay.counters.unknown_version > chunks)  # noqa: B023
            assert (relay.counters.unknown_version == 0) == served
            assert len(list(staging.glob("*.safetensors"))) == 1
        assert fetcher.free == [True] * 4
        assert len(relay._left) == FILES_LEFT
    wait_until(lambda: all(relay._server.is_free(left) for left in relay._left))
    manifest = publish(learner, tmp_path, 9, seed=9)
    bring(stage, manifest, learner.address)
    fetch(manifest, relay.address, tmp_path / "again.safetensors")


def test_a_stop_ends_the_wait_for_a_slow_child(
    learner: WeightsServer, relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "FREE_S", 60.0)
    stage = Stage(tmp_path / "staging", WeightsFetcher(), relay)
    manifest = publish(learner, tmp_path, 1, seed=1)
    bring(stage, manifest, learner.address)
    with peer_that_does_not_read(relay.address) as send:
        asks_and_does_not_read(send, manifest)
        wait_until(lambda: relay.counters.bytes == 8 * BLOCK_BYTES)
        stop = threading.Event()
        timer = threading.Timer(0.1, stop.set)
        timer.start()
        with pytest.raises(Superseded, match="neighbors still read"):
            stage.bring(Wanted(publish(learner, tmp_path, 2, seed=2), (learner.address,), None), stop)
        timer.join()


def test_blocks_are_passed_on_while_the_rest_is_still_to_come(relay: Relay, tmp_path: Path) -> None:
    file = make_weights(tmp_path / "file.safetensors", 1, SPECS)
    manifest = manifest_of(file)
    shipment, delta = manifest.shipment, manifest.shipment._replace(base=Version(1, 0))
    memory = file.bytes(0, manifest.file_bytes)
    arrived, delta_arrived = relay.offer((shipment, memory), (delta, memory), file=file)
    with bulk_client_socket(relay.address) as socket:
        for tell, base in ((arrived, None), (delta_arrived, Version(1, 0))):
            offset = manifest.tensors[0].offset
            request = WeightsRequest(version=manifest.version, offset=offset, length=4, base=base)
            socket.send_multipart(encode(request))
            sizes = []
            for _ in range(2):
                assert socket.poll(5000)
                chunk = decode(socket.recv_multipart())
                assert isinstance(chunk, WeightsChunk)
                assert chunk.data is not None
                sizes.append(chunk.data.size)
                tell(0)
            assert sizes == [0, 4]


def test_a_version_that_is_offered_twice_is_not_free_before_the_chunks_of_the_first_time_have_left(
    relay: Relay, tmp_path: Path
) -> None:
    weights = make_weights(tmp_path / "staged.safetensors", 1, SPECS)
    manifest = manifest_of(weights, 1)
    relay.whole(manifest.shipment, weights)
    ((_, served),) = relay._server._served.items()
    on_its_way = served.array[:10]  # as a chunk holds it
    del served
    relay.whole(manifest.shipment, weights)
    relay.withdraw()
    assert not relay._server.is_free(weights)
    del on_its_way
    wait_until(lambda: relay._server.is_free(weights))
