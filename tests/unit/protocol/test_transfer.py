from __future__ import annotations

import contextlib
import os
import resource
import socket as stdlib_socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocol.channel import bound_address, bulk_client_socket, bulk_server_socket
from protocol.codec import decode, encode
from protocol.errors import ConfigError, IntegrityError, Superseded, WeightsError
from protocol.messages import Ping, WeightsChunk, WeightsRequest
from protocol.versions import Version
from protocol.weights.fetching import FetchReport, WeightsFetcher
from protocol.weights.layout import Layout, MappedWeights, build_manifest
from protocol.weights.manifest import Manifest, TensorSpec
from protocol.weights.serving import WeightsServer
from tests.weights import (
    CHUNK,
    SMALL_SPECS,
    FaultyNetwork,
    Frames,
    data_bytes,
    fill,
    make_weights,
    manifest_of,
    tensors,
    wait_until,
)

LOOPBACK = "tcp://127.0.0.1:*"
LARGER_SPECS = (TensorSpec("a", "BF16", (20 * CHUNK,)), TensorSpec("b", "F32", (5 * CHUNK + 3,)))
"""61 chunks: more than are ever outstanding."""


@pytest.fixture
def server() -> Iterator[WeightsServer]:
    with WeightsServer(LOOPBACK) as server:
        yield server


@pytest.fixture
def source(tmp_path: Path) -> MappedWeights:
    return make_weights(tmp_path / "source.safetensors", seed=1)


@pytest.fixture
def destination(tmp_path: Path) -> MappedWeights:
    return make_weights(tmp_path / "destination.safetensors", seed=2)


def fetch(
    fetcher: WeightsFetcher, manifest: Manifest, address: str | list[str], destination: MappedWeights, **limits: Any
) -> FetchReport:
    addresses = [address] if isinstance(address, str) else address
    given = {"stop": threading.Event(), "deadline_s": 20.0, "stall_s": 5.0, **limits}
    memory = destination.writable_bytes(0, manifest.file_bytes)
    return fetcher.fetch(manifest.shipment, addresses, memory, **given)


def serve_again(address: str) -> WeightsServer:
    """Bind where a server was until now: ZeroMQ lets go of an address a little after its socket is closed."""
    bound: list[WeightsServer] = []

    def bind() -> bool:
        with contextlib.suppress(ConfigError):
            bound.append(WeightsServer(address))
        return bool(bound)

    wait_until(bind)
    return bound[0]


def serve(server: WeightsServer, weights: MappedWeights, policy_version: int = 1) -> Manifest:
    manifest = manifest_of(weights, policy_version)
    server.serve(manifest, weights)
    return manifest


# The two ends on a network that works.


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_fetched_version_is_the_served_one(
    transport: str, source: MappedWeights, destination: MappedWeights, tmp_path: Path
) -> None:
    address = LOOPBACK if transport == "tcp" else f"ipc://{tmp_path}/bulk"
    fetcher = WeightsFetcher()
    with WeightsServer(address) as server:
        manifest = serve(server, source)
        report = fetch(fetcher, manifest, server.address, destination)
        assert destination.path.read_bytes() == source.path.read_bytes()
        assert build_manifest(manifest.version, destination, manifest.algorithm) == manifest
        assert report.bytes == server.counters.bytes == data_bytes(source)
        assert report.refetched_blocks == 0
        assert report.transfer_s > 0
        assert report.verify_s > 0
    counted = asdict(fetcher.counters)
    assert (counted.pop("bytes"), counted.pop("chunks")) == (data_bytes(source), server.counters.chunks)
    assert set(counted.values()) == {0}


def test_blake3_manifest_is_verified_too(
    server: WeightsServer, source: MappedWeights, destination: MappedWeights
) -> None:
    manifest = build_manifest(Version(1, 1), source, "blake3")
    server.serve(manifest, source)
    fetch(WeightsFetcher(), manifest, server.address, destination)
    assert build_manifest(Version(1, 1), destination, "blake3") == manifest


def test_several_servers_fetch_at_once(server: WeightsServer, source: MappedWeights, tmp_path: Path) -> None:
    manifest = serve(server, source)
    destinations = [make_weights(tmp_path / f"{i}.safetensors", seed=2) for i in range(4)]
    threads = [
        threading.Thread(target=fetch, args=(WeightsFetcher(), manifest, server.address, destination))
        for destination in destinations
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert all(np.array_equal(tensors(destination), tensors(source)) for destination in destinations)


def test_model_without_bytes_needs_no_connection(server: WeightsServer, tmp_path: Path) -> None:
    specs = (TensorSpec("none", "F32", (0,)),)
    manifest = manifest_of(make_weights(tmp_path / "a.safetensors", 0, specs))
    destination = make_weights(tmp_path / "b.safetensors", 0, specs)
    assert fetch(WeightsFetcher(), manifest, "tcp://127.0.0.1:9", destination).bytes == 0


# Versions come and go.


def test_version_that_is_not_served_is_superseded(
    server: WeightsServer, source: MappedWeights, destination: MappedWeights
) -> None:
    manifest = manifest_of(source)
    with pytest.raises(Superseded, match=rf"version 1\.1 is no longer served by {server.address}"):
        fetch(WeightsFetcher(), manifest, server.address, destination)
    assert server.counters.unknown_version >= 1


def test_next_address_is_asked_when_the_first_has_withdrawn(
    server: WeightsServer, source: MappedWeights, destination: MappedWeights
) -> None:
    with WeightsServer(LOOPBACK) as empty:
        manifest = serve(server, source)
        fetch(WeightsFetcher(), manifest, [empty.address, server.address], destination)
        assert empty.counters.unknown_version >= 1
    assert np.array_equal(tensors(destination), tensors(source))


def test_withdrawal_ends_a_fetch_that_is_under_way(server: WeightsServer, tmp_path: Path) -> None:
    source, destination = (make_weights(tmp_path / f"{i}.safetensors", i, LARGER_SPECS) for i in (1, 2))
    manifest = serve(server, source)

    def withdraw(number: int, frames: Frames) -> list[Frames]:
        if number == 3:
            server.withdraw(manifest.version)
        return [frames]

    fetcher = WeightsFetcher()
    with FaultyNetwork(server.address, withdraw) as network, pytest.raises(Superseded, match="no longer served"):
        fetch(fetcher, manifest, network.address, destination)
    assert server.counters.unknown_version >= 1
    assert fetcher.counters.chunks > 3


def test_two_versions_are_kept_and_the_oldest_goes(server: WeightsServer, tmp_path: Path) -> None:
    weights = [make_weights(tmp_path / f"{i}.safetensors", seed=i) for i in range(3)]
    manifests = [serve(server, mapped, policy_version=i) for i, mapped in enumerate(weights)]
    destination = make_weights(tmp_path / "destination.safetensors", seed=9)
    fetcher = WeightsFetcher()
    for version in (1, 2):
        fetch(fetcher, manifests[version], server.address, destination)
        assert np.array_equal(tensors(destination), tensors(weights[version]))
    with pytest.raises(Superseded):
        fetch(fetcher, manifests[0], server.address, destination)
    assert [server.is_free(mapped) for mapped in weights] == [True, False, False]


def test_mapping_is_used_again_for_the_next_version(
    server: WeightsServer, source: MappedWeights, destination: MappedWeights
) -> None:
    fetcher = WeightsFetcher()
    for policy_version in range(3):
        fill(source, seed=10 + policy_version)
        manifest = serve(server, source, policy_version)
        fetch(fetcher, manifest, server.address, destination)
        assert np.array_equal(tensors(destination), tensors(source))
        server.withdraw(manifest.version)
        wait_until(lambda: server.is_free(source))


def test_mapping_is_not_free_while_chunks_of_it_are_on_their_way(server: WeightsServer, tmp_path: Path) -> None:
    specs = (TensorSpec("w", "U8", (32 * CHUNK,)),)
    weights = make_weights(tmp_path / "w.safetensors", 1, specs)
    manifest = serve(server, weights)
    offset = manifest.tensors[0].offset
    with peer_that_does_not_read(server.address) as send:
        for i in range(20):  # 80 MB: more than the kernel buffers between two processes
            send(encode(WeightsRequest(version=manifest.version, offset=offset + i % 2 * (4 << 20), length=4 << 20)))
        wait_until(lambda: server.counters.chunks == 20 * 16)
        server.withdraw(manifest.version)
        assert not server.is_free(weights)
    wait_until(lambda: server.is_free(weights))


class peer_that_does_not_read:  # noqa: N801 - reads as a phrase
    """A raw ZMTP 3.1 peer (NULL mechanism, DEALER) that asks and never takes an answer off the wire."""

    def __init__(self, address: str) -> None:
        host, port = address.removeprefix("tcp://").split(":")
        self._socket = stdlib_socket.socket()
        self._socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_RCVBUF, 4096)
        self._socket.settimeout(10)
        self._socket.connect((host, int(port)))

    def __enter__(self) -> Callable[[list[Any]], None]:
        self._socket.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32))
        ready = b"\x05READY" + b"\x0bSocket-Type" + (6).to_bytes(4, "big") + b"DEALER"
        self._socket.sendall(b"\x04" + bytes([len(ready)]) + ready)
        _greeting, (_flags, nbytes) = self._receive(64), self._receive(2)
        self._receive(nbytes)  # its READY: whoever speaks before it is disconnected
        return self._send

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _receive(self, nbytes: int) -> bytes:
        return self._socket.recv(nbytes, stdlib_socket.MSG_WAITALL)

    def _send(self, frames: list[Any]) -> None:
        (header,) = frames
        self._socket.sendall(b"\x00" + bytes([len(header)]) + header)


# A fetch ends when it should.


@pytest.fixture
def silent_address() -> Iterator[str]:
    with bulk_server_socket(LOOPBACK) as socket:
        yield bound_address(socket)


def test_stop_ends_a_fetch_that_hears_nothing(
    silent_address: str, source: MappedWeights, destination: MappedWeights
) -> None:
    stop = threading.Event()
    timer = threading.Timer(0.1, stop.set)
    timer.start()
    begun_s = time.monotonic()
    with pytest.raises(Superseded, match=r"the fetch of version 1\.1 was called off"):
        fetch(WeightsFetcher(), manifest_of(source), silent_address, destination, stop=stop)
    assert time.monotonic() - begun_s < 2
    timer.join()


def test_deadline_ends_a_fetch_that_hears_nothing(
    silent_address: str, source: MappedWeights, destination: MappedWeights
) -> None:
    fetcher = WeightsFetcher()
    with pytest.raises(WeightsError, match=r"version 1\.1: only 0 of 9 chunks had arrived when its time was up"):
        fetch(fetcher, manifest_of(source), silent_address, destination, deadline_s=0.3, stall_s=0.1)
    assert fetcher.counters.reconnects >= 1


def test_stalled_address_is_left_for_the_next(
    silent_address: str, server: WeightsServer, source: MappedWeights, destination: MappedWeights
) -> None:
    fetcher = WeightsFetcher()
    fetch(fetcher, serve(server, source), [silent_address, server.address], destination, stall_s=0.1)
    assert fetcher.counters.reconnects == 1


def test_address_off_loopback_is_refused(source: MappedWeights, destination: MappedWeights) -> None:
    with pytest.raises(WeightsError, match=r"weights cannot be fetched: address tcp://192\.0\.2\.1:5: .*not loopback"):
        fetch(WeightsFetcher(), manifest_of(source), "tcp://192.0.2.1:5", destination)


# The server outlives whatever it is sent.


def test_malformed_requests_are_counted_and_never_fatal(
    server: WeightsServer, source: MappedWeights, destination: MappedWeights
) -> None:
    manifest = serve(server, source)
    beyond = WeightsRequest(version=manifest.version, offset=manifest.file_bytes - 1, length=2)
    bad: list[list[Any]] = [[b""], [b"\xff"] * 40, [b"{}"], encode(Ping(sent_s=0.0)), encode(beyond), [b"x" * 100_000]]
    with bulk_client_socket(server.address) as socket:
        for frames in bad:
            socket.send_multipart(frames)
        socket.send_multipart(encode(WeightsRequest(version=manifest.version, offset=0, length=8)))
        assert socket.poll(5000)
        answer = decode(socket.recv_multipart())
    assert isinstance(answer, WeightsChunk)
    assert answer.data is not None
    assert answer.data.tobytes() == source.path.read_bytes()[:8]
    assert server.counters.malformed == len(bad)
    fetch(WeightsFetcher(), manifest, server.address, destination)


def test_server_splits_a_long_request(server: WeightsServer, source: MappedWeights) -> None:
    manifest = serve(server, source)
    with bulk_client_socket(server.address) as socket:
        socket.send_multipart(encode(WeightsRequest(version=manifest.version, offset=3, length=2 * CHUNK + 5)))
        for offset, nbytes in ((3, CHUNK), (3 + CHUNK, CHUNK), (3 + 2 * CHUNK, 5)):
            assert socket.poll(5000)
            chunk = decode(socket.recv_multipart())
            assert isinstance(chunk, WeightsChunk)
            assert chunk.data is not None
            assert (chunk.offset, chunk.data.size) == (offset, nbytes)


def test_answers_to_a_peer_that_has_gone_are_counted(server: WeightsServer, tmp_path: Path) -> None:
    specs = (TensorSpec("w", "U8", (16 * CHUNK,)),)
    source, destination = (make_weights(tmp_path / f"{i}.safetensors", i, specs) for i in (1, 2))
    manifest = serve(server, source)
    request = WeightsRequest(version=manifest.version, offset=manifest.tensors[0].offset, length=4 << 20)
    for _ in range(20):
        with bulk_client_socket(server.address) as socket:
            for _ in range(100):
                socket.send_multipart(encode(request))
            assert socket.poll(5000)  # and it goes with most of its requests unanswered
        if server.counters.unreachable:
            break
    assert server.counters.unreachable > 0
    fetch(WeightsFetcher(), manifest, server.address, destination)


def test_close_ends_the_thread_and_frees_the_address(source: MappedWeights) -> None:
    server = WeightsServer(LOOPBACK)
    serve(server, source)
    server.close()
    server.close()
    assert "weights-server" not in {thread.name for thread in threading.enumerate()}
    assert server.is_free(source)
    serve_again(server.address).close()


def test_address_in_use_is_one_clear_line(server: WeightsServer) -> None:
    with pytest.raises(ConfigError, match=rf"cannot listen on {server.address}: another process has it"):
        WeightsServer(server.address)


# The two ends on a network that does not. Every test shows that its fault happened.


def changed(frames: Frames, change: Callable[[Any], Any]) -> Frames:
    """Send the chunk with other bytes."""
    chunk = decode(frames)
    assert isinstance(chunk, WeightsChunk)
    assert chunk.data is not None
    data = np.ascontiguousarray(change(chunk.data.copy()))
    return [bytes(f) for f in encode(WeightsChunk(version=chunk.version, offset=chunk.offset, data=data))]


def flip(data: Any) -> Any:
    data[len(data) // 2] ^= 0x10
    return data


FAULTS: dict[str, tuple[Callable[[Frames], list[Frames]], str]] = {
    "flipped bit": (lambda frames: [changed(frames, flip)], "refetched_blocks"),
    "truncated": (lambda frames: [changed(frames, lambda data: data[:-1])], "wrong_size"),
    "emptied": (lambda frames: [changed(frames, lambda data: data[:0]), frames], "not_yet"),
    "oversized": (lambda frames: [changed(frames, lambda data: np.append(data, data))], "wrong_size"),
    "duplicated": (lambda frames: [frames, frames], "duplicate"),
    "of another version": (
        lambda frames: [[bytes(f) for f in encode(WeightsChunk(version=Version(1, 0), offset=0))], frames],
        "foreign",
    ),
    "garbled frame": (lambda frames: [[frames[0][:-3], *frames[1:]], frames], "malformed"),
    "lost": (lambda frames: [], "reconnects"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_counted_and_healed(
    fault: str, server: WeightsServer, source: MappedWeights, destination: MappedWeights
) -> None:
    act, counter = FAULTS[fault]
    manifest = serve(server, source)
    fetcher = WeightsFetcher()
    with FaultyNetwork(server.address, lambda n, frames: act(frames) if n in (1, 6) else [frames]) as network:
        fetch(fetcher, manifest, network.address, destination, stall_s=0.2)
    assert network.faults == 2
    assert asdict(fetcher.counters)[counter] == (1 if fault == "lost" else 2)  # both losses make one stall
    assert np.array_equal(tensors(destination), tensors(source))


def test_answers_in_reverse_are_put_in_place(
    server: WeightsServer, source: MappedWeights, destination: MappedWeights
) -> None:
    manifest = serve(server, source)
    held: list[Frames] = []

    def reverse(number: int, frames: Frames) -> list[Frames]:
        held.append(frames)
        return held[::-1] if len(held) == 9 else []

    fetcher = WeightsFetcher()
    with FaultyNetwork(server.address, reverse) as network:
        fetch(fetcher, manifest, network.address, destination)
    assert network.faults == 9
    assert fetcher.counters.refetched_blocks == 0
    assert np.array_equal(tensors(destination), tensors(source))


def test_path_that_always_corrupts_is_an_integrity_error(
    server: WeightsServer, source: MappedWeights, destination: MappedWeights
) -> None:
    manifest = serve(server, source)
    fetcher = WeightsFetcher()
    with FaultyNetwork(server.address, lambda _, frames: [changed(frames, flip)]) as network:
        with pytest.raises(IntegrityError, match=r"version 1\.1, tensor model\.\S+: its bytes do not hash"):
            fetch(fetcher, manifest, network.address, destination)
    assert network.faults >= 4
    assert 3 <= fetcher.counters.refetched_blocks <= 3 * len(SMALL_SPECS)


def test_cut_in_the_middle_asks_again_only_for_what_is_missing(server: WeightsServer, tmp_path: Path) -> None:
    source, destination = (make_weights(tmp_path / f"{i}.safetensors", i, LARGER_SPECS) for i in (1, 2))
    manifest = serve(server, source)
    arrived: list[int] = []

    def cut_after_23(number: int, frames: Frames) -> list[Frames]:
        if len(network.clients()) == 1 and number >= 23:
            return []
        chunk = decode(frames)
        assert isinstance(chunk, WeightsChunk)
        arrived.append(chunk.offset)
        return [frames]

    fetcher = WeightsFetcher()
    with FaultyNetwork(server.address, cut_after_23) as network:
        report = fetch(fetcher, manifest, network.address, destination, stall_s=0.3)
    _, second = network.clients()
    asked_again = {
        at
        for client, offset, length in network.requests
        if client == second
        for at in range(offset, offset + length, CHUNK)
    }
    every = set(range(manifest.tensors[0].offset, manifest.file_bytes, CHUNK))
    assert network.faults > 0
    assert asked_again == every - set(arrived[:23])
    assert report.bytes == data_bytes(source)
    assert fetcher.counters.duplicate == 0
    assert np.array_equal(tensors(destination), tensors(source))


def test_server_that_restarts_is_found_again(source: MappedWeights, destination: MappedWeights) -> None:
    stopped, restarted = threading.Event(), threading.Event()

    def swallow(number: int, frames: Frames) -> list[Frames]:
        if number == 4:
            stopped.set()
        return [frames] if number < 4 or restarted.is_set() else []

    server = WeightsServer(LOOPBACK)
    manifest = serve(server, source)
    fetcher = WeightsFetcher()
    with FaultyNetwork(server.address, swallow) as network:
        thread = threading.Thread(
            target=fetch, args=(fetcher, manifest, network.address, destination), kwargs={"stall_s": 0.3}
        )
        thread.start()
        assert stopped.wait(10)
        server.close()
        with serve_again(server.address) as again:
            again.serve(manifest, source)
            restarted.set()
            thread.join(20)
            assert again.counters.chunks > 0
    assert fetcher.counters.reconnects >= 1
    assert np.array_equal(tensors(destination), tensors(source))


def test_hundred_pushes_leave_memory_and_descriptors_flat(server: WeightsServer, tmp_path: Path) -> None:
    sources = [make_weights(tmp_path / f"{i}.safetensors", i) for i in range(2)]
    destination = make_weights(tmp_path / "destination.safetensors", 9)
    fetcher = WeightsFetcher()

    def push(policy_version: int) -> None:
        weights = sources[policy_version % 2]
        server.withdraw(Version(1, policy_version - 2))
        wait_until(lambda: server.is_free(weights))
        fetch(fetcher, serve(server, weights, policy_version), server.address, destination)
        assert np.array_equal(tensors(destination), tensors(weights))

    for policy_version in range(20):
        push(policy_version)
    peak_kb, descriptors = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(os.listdir("/proc/self/fd"))
    for policy_version in range(20, 120):
        push(policy_version)
    assert fetcher.counters.bytes == 120 * data_bytes(destination)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kb < 8 << 10
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors + 2)  # sockets are reaped a little later


def test_one_mapping_is_never_served_as_two_versions(server: WeightsServer, source: MappedWeights) -> None:
    serve(server, source, policy_version=1)
    with pytest.raises(AssertionError, match="one mapping, two versions"):
        serve(server, source, policy_version=2)


def test_layout_of_the_manifest_is_the_destinations(source: MappedWeights) -> None:
    assert manifest_of(source).layout == source.layout == Layout(SMALL_SPECS)
