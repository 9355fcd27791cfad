"""One end of the bulk plane: `WeightsServer` hands out bytes of versions and of deltas (the other is fetching.py).

It answers a request for a stretch (WeightsRequest) with chunks (WeightsChunk), zero-copy out of the one mapping, and
remembers nothing about who asked. Its thread alone touches its socket. This file must not know engines, training, or
who announces versions to whom.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import zmq

from protocol.channel import bound_address, bulk_server_socket, wake_pair
from protocol.codec import decode, encode
from protocol.errors import ProtocolError, WeightsError
from protocol.free_address import remove_ipc_socket
from protocol.messages import UInt8, WeightsChunk, WeightsRequest
from protocol.security import PLAIN, Security
from protocol.versions import Version
from protocol.weights.chunks import CHUNK_BYTES
from protocol.weights.layout import MappedWeights
from protocol.weights.manifest import Manifest

VERSIONS_KEPT = 2
_REQUESTS_PER_POLL = 64


@dataclass(slots=True)
class ServeCounters:
    """What a WeightsServer has done since its start."""

    chunks: int = 0
    bytes: int = 0
    malformed: int = 0
    """Requests that were none, or for bytes outside the file. They get no answer."""
    unknown_version: int = 0
    unreachable: int = 0
    """Answers to peers that had gone."""


class WeightsServer:
    """Serves versions, up to two whole ones, and deltas to any number of fetchers, from a thread of its own.

    `serve`, `serve_delta`, `withdraw` and `is_free` may be called from any thread and never block.
    """

    def __init__(self, address: str, security: Security = PLAIN) -> None:
        """Bind and start.

        Raises:
            ConfigError: the address is refused or in use.
        """
        self._socket = bulk_server_socket(address, security)
        self._polled, self._waker = wake_pair()
        self.address = bound_address(self._socket)
        self.counters = ServeCounters()
        self._lock = threading.Lock()
        self._served: dict[Version, tuple[MappedWeights, UInt8]] = {}
        self._deltas: dict[tuple[Version, Version], UInt8] = {}
        """By (version, base)."""
        self._withdrawn: list[tuple[MappedWeights, weakref.ref[UInt8]]] = []
        self._thread = threading.Thread(target=self._run, name="weights-server", daemon=True)
        self._thread.start()

    def serve(self, manifest: Manifest, mapped: MappedWeights) -> None:
        """Make a version available; of more than two, the oldest is withdrawn.

        Args:
            manifest: What `build_manifest` said of `mapped`.
            mapped: Not written again until `is_free` says so.
        """
        assert self._thread.is_alive(), "the weights-server thread has died: its traceback is in the log"
        file = np.frombuffer(mapped.bytes(0, manifest.file_bytes), np.uint8)
        with self._lock:
            assert all(mapped is not other for other, _ in self._served.values()), "one mapping, two versions"
            self._served[manifest.version] = (mapped, file)
            surplus = sorted(self._served)[:-VERSIONS_KEPT]
        for version in surplus:
            self.withdraw(version)

    def serve_delta(self, version: Version, base: Version, delta: bytes) -> None:
        """Make what leads from `base` to `version` available until it is withdrawn."""
        with self._lock:
            self._deltas[version, base] = np.frombuffer(delta, np.uint8)

    def withdraw_delta(self, version: Version, base: Version) -> None:
        """Serve a delta no longer. Nothing happens if it is not served."""
        with self._lock:
            self._deltas.pop((version, base), None)

    def withdraw(self, version: Version) -> None:
        """Serve a version no longer: whoever asks for it is told so. Nothing happens if it is not served."""
        with self._lock:
            mapped, file = self._served.pop(version, (None, None))
            if mapped is not None and file is not None:
                self._withdrawn.append((mapped, weakref.ref(file)))

    def is_free(self, mapped: MappedWeights) -> bool:
        """Whether the mapping may be written: neither served nor part of a chunk still on its way out.

        Every zero-copy chunk is a view of one array per version, so that array lives until the last chunk is sent.
        """
        with self._lock:
            self._withdrawn = [(other, file) for other, file in self._withdrawn if file() is not None]
            busy = [other for other, _ in self._served.values()] + [other for other, _ in self._withdrawn]
        return all(other is not mapped for other in busy)

    def close(self, deadline_s: float = 5.0) -> None:
        """Stop serving. Chunks not yet sent are dropped: transfers resume elsewhere.

        Raises:
            WeightsError: the thread did not end within `deadline_s` seconds.
        """
        if self._waker.closed:
            return
        remove_ipc_socket(self.address)
        if self._thread.is_alive():
            self._waker.send(b"")
        self._waker.close()
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            raise WeightsError(f"the thread that serves weights at {self.address} did not end in {deadline_s:g} s")
        with self._lock:
            versions = list(self._served)
        for version in versions:
            self.withdraw(version)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        """Answer requests until woken."""
        with self._socket, self._polled:
            poller = zmq.Poller()
            poller.register(self._socket, zmq.POLLIN)
            poller.register(self._polled, zmq.POLLIN)
            while self._polled not in dict(poller.poll()):
                self._answer_waiting()

    def _answer_waiting(self) -> None:
        for _ in range(_REQUESTS_PER_POLL):  # then look whether to stop
            try:
                peer, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._answer(peer, frames)

    def _answer(self, peer: bytes, frames: list[bytes]) -> None:
        try:
            request = decode(frames)
        except ProtocolError:
            self.counters.malformed += 1
            return
        if not isinstance(request, WeightsRequest):
            self.counters.malformed += 1
            return
        served = self._find(request)
        if served is None:
            self.counters.unknown_version += 1
            self._send(peer, WeightsChunk(version=request.version, offset=request.offset, base=request.base))
            return
        end = request.offset + request.length
        if end > served.size:
            self.counters.malformed += 1
            return
        for offset in range(request.offset, end, CHUNK_BYTES):
            data = served[offset : min(offset + CHUNK_BYTES, end)]
            self._send(peer, WeightsChunk(version=request.version, offset=offset, base=request.base, data=data))

    def _find(self, request: WeightsRequest) -> UInt8 | None:
        with self._lock:
            if request.base is None:
                return self._served.get(request.version, (None, None))[1]
            return self._deltas.get((request.version, request.base))

    def _send(self, peer: bytes, chunk: WeightsChunk) -> None:
        try:
            self._socket.send_multipart([peer, *encode(chunk)], copy=False)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.counters.unreachable += 1
            return
        self.counters.chunks += 1
        self.counters.bytes += 0 if chunk.data is None else chunk.data.size
