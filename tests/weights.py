"""Small mapped weights for tests, filled from a seed, and a network between two ends that misbehaves on purpose."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import zmq

from protocol.channel import bound_address, bulk_client_socket, bulk_server_socket, wake_pair
from protocol.codec import decode
from protocol.messages import UInt8, WeightsRequest
from protocol.versions import Version
from protocol.weights.layout import Layout, MappedWeights, build_manifest
from protocol.weights.manifest import Manifest, TensorSpec

CHUNK = 256 << 10

SMALL_SPECS = (
    TensorSpec("model.embed_tokens.weight", "F32", (700, 512)),
    TensorSpec("model.layers.0.mlp.weight", "BF16", (768, 512)),
    TensorSpec("model.layers.0.norm.weight", "BF16", (512,)),
    TensorSpec("model.layers.0.scale", "F32", ()),
    TensorSpec("model.layers.0.empty", "F32", (0, 4)),
    TensorSpec("model.norm.weight", "F32", (513,)),
)
"""2.2 MB, 9 chunks: large and tiny tensors, a scalar, one without bytes, one that no chunk boundary respects."""


def make_weights(path: Path, seed: int, specs: tuple[TensorSpec, ...] = SMALL_SPECS) -> MappedWeights:
    """Create a mapping and fill its tensors with random bytes."""
    weights = MappedWeights.create(path, Layout(specs))
    fill(weights, seed)
    return weights


def fill(weights: MappedWeights, seed: int) -> None:
    """Write another version's bytes into the mapping."""
    writable = weights.writable_bytes(len(weights.layout.header), data_bytes(weights))
    writable[:] = np.random.default_rng(seed).integers(0, 256, len(writable), np.uint8).data


def data_bytes(weights: MappedWeights) -> int:
    """Bytes of all tensors: the file without its header."""
    return weights.layout.file_bytes - len(weights.layout.header)


def tensors(weights: MappedWeights) -> UInt8:
    """View all tensor bytes."""
    return np.frombuffer(weights.bytes(len(weights.layout.header), data_bytes(weights)), np.uint8)


def manifest_of(weights: MappedWeights, policy_version: int = 1) -> Manifest:
    """Build the manifest as it arrives: through its JSON."""
    return Manifest.from_json(build_manifest(Version(1, policy_version), weights, "xxh3_128").to_json())


def wait_until(condition: Callable[[], bool], deadline_s: float = 10.0) -> None:
    """Wait for what another thread will bring about and cannot announce."""
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, "it did not come about"
        threading.Event().wait(0.005)


Frames = list[bytes]
Fault = Callable[[int, Frames], list[Frames]]
"""(number of the answer, from 0; its frames) -> what the fetcher gets instead."""


CLIENTS_SERVED = 64
"""A fetcher is a new client with every socket that it opens: those before the newest ones are gone."""


class FaultyNetwork:
    """Stands between fetcher and server and changes the answers. `faults` counts what it changed: the witness.

    Every client of it has its own connection to the server, as over a real network.
    """

    def __init__(self, server_address: str, fault: Fault) -> None:
        self._server_address = server_address
        self._fault = fault
        self._front = bulk_server_socket("tcp://127.0.0.1:*")
        self._polled, self._waker = wake_pair()
        self.address = bound_address(self._front)
        self.faults = 0
        self.answers = 0
        self.requests: list[tuple[bytes, int, int]] = []
        """(client, offset, length), as asked."""
        self._thread = threading.Thread(target=self._run, name="faulty-network")

    def clients(self) -> list[bytes]:
        """Return the clients in the order they came."""
        return list(dict.fromkeys(client for client, _, _ in self.requests))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._waker.send(b"")
        self._thread.join(10)
        self._waker.close()
        assert not self._thread.is_alive()

    def _run(self) -> None:
        backs: dict[zmq.Socket[bytes], bytes] = {}
        poller = zmq.Poller()
        poller.register(self._front, zmq.POLLIN)
        poller.register(self._polled, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._polled in ready:
                break
            if self._front in ready:
                client, *frames = self._front.recv_multipart()
                if client not in backs.values():
                    backs[bulk_client_socket(self._server_address)] = client
                    poller.register(list(backs)[-1], zmq.POLLIN)
                    for gone in list(backs)[:-CLIENTS_SERVED]:
                        poller.unregister(gone)
                        gone.close()
                        del backs[gone]
                request = decode(frames)
                assert isinstance(request, WeightsRequest)
                self.requests.append((client, request.offset, request.length))
                next(back for back, owner in backs.items() if owner == client).send_multipart(frames)
            for back in [back for back in ready if back in backs]:
                self._answer(backs[back], back.recv_multipart())
        for socket in [*backs, self._front, self._polled]:
            socket.close()

    def _answer(self, client: bytes, frames: Frames) -> None:
        changed = self._fault(self.answers, frames)
        self.answers += 1
        self.faults += changed != [frames]
        for message in changed:
            with contextlib.suppress(zmq.ZMQError):  # the client gave this connection up
                self._front.send_multipart([client, *message])
