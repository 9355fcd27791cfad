"""The two ends of the bulk plane: `WeightsServer` hands out bytes of versions, `WeightsFetcher` puts them in place.

A fetcher asks for stretches of a version's file (WeightsRequest) and gets them in chunks (WeightsChunk): zero-copy out
of the one mapping, one copy into its final place in the other, hashed there while still in the cache. Nothing is
believed but the manifest's digests, which came over the control plane (I5): chunks may be lost, repeated, reordered,
cut or forged on the way, and the outcome is the right bytes, or an error and bytes that nobody uses. Requests are
idempotent and name what they want, so a fetch resumes over any new connection with what is still missing.

Each end has one thread, which alone touches its socket. This file must not know engines, training, or who announces
versions to whom.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import zmq

from protocol.channel import bound_address, bulk_client_socket, bulk_server_socket, wake_pair
from protocol.codec import decode, encode
from protocol.errors import ConfigError, ProtocolError, Superseded, WeightsError
from protocol.messages import UInt8, WeightsChunk, WeightsRequest
from protocol.security import PLAIN, Security
from protocol.versions import Version
from protocol.weights.assembly import Assembly, FetchCounters
from protocol.weights.layout import MappedWeights
from protocol.weights.manifest import Manifest

CHUNK_BYTES = 256 << 10
"""A request is answered in chunks of this size, the last one shorter. Measured best of 64 KiB to 4 MiB: a chunk stays
in the cache between socket, copy and hash. Part of the protocol."""
WINDOW = 32
"""Chunks asked for and not yet here: enough to hide a round trip, little to ask again after a cut."""
CHUNKS_PER_REQUEST = 16
"""4 MiB, the most that a WeightsRequest may ask for."""
VERSIONS_KEPT = 2
STOP_CHECK_MS = 50
"""A fetch that hears nothing looks at its stop event this often."""
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
    """Serves the bytes of up to two versions to any number of fetchers, from a thread of its own.

    `serve`, `withdraw` and `is_free` may be called from any thread and never block.
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
        with self._lock:
            _, file = self._served.get(request.version, (None, None))
        if file is None:
            self.counters.unknown_version += 1
            self._send(peer, WeightsChunk(version=request.version, offset=request.offset))
            return
        end = request.offset + request.length
        if end > file.size:
            self.counters.malformed += 1
            return
        for offset in range(request.offset, end, CHUNK_BYTES):
            data = file[offset : min(offset + CHUNK_BYTES, end)]
            self._send(peer, WeightsChunk(version=request.version, offset=offset, data=data))

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


@dataclass(frozen=True, slots=True)
class FetchReport:
    """A fetch that succeeded. The two times add up to its wall time."""

    transfer_s: float
    verify_s: float
    bytes: int
    """Put in place, refetches included."""
    refetched_tensors: int


class WeightsFetcher:
    """Fetches versions into mappings, in the thread that calls it; one fetch at a time."""

    def __init__(self, security: Security = PLAIN) -> None:
        self.counters = FetchCounters()
        self._security = security

    def fetch(
        self,
        manifest: Manifest,
        addresses: Sequence[str],
        destination: MappedWeights,
        *,
        stop: threading.Event,
        deadline_s: float,
        stall_s: float,
    ) -> FetchReport:
        """Bring a version into `destination`, every tensor verified. After an error its tensors are not to be used.

        Args:
            manifest: What to fetch, from the learner's control plane.
            addresses: Who serves it, best first; the next one is tried when one stalls or no longer has it.
            destination: A writable mapping of the manifest's layout, which nobody reads.
            stop: Set by anyone to call the fetch off.
            deadline_s: Limit of the whole fetch.
            stall_s: Without a useful chunk for so long, what is outstanding is asked for anew over a fresh socket.

        Raises:
            Superseded: `stop` was set, or nobody serves the version any more.
            IntegrityError: a tensor failed verification four times.
            WeightsError: the deadline passed, an address is refused, or `destination` has another layout.
        """
        if destination.layout != manifest.layout:
            raise WeightsError(f"version {manifest.version} has another layout than {destination.path}")
        assembly = Assembly(manifest, destination, self.counters, CHUNK_BYTES)
        begun_s = time.monotonic()
        limits = _Limits(f"version {manifest.version}", stop, begun_s + deadline_s, stall_s)
        sources = deque(addresses)
        while not assembly.done:
            if not sources:
                raise Superseded(f"{limits.what} is no longer served by {', '.join(addresses)}")
            with self._connect(sources[0]) as socket:
                self._converse(socket, assembly, limits)
            if assembly.withdrawn:
                sources.popleft()
            elif not assembly.done:
                self.counters.reconnects += 1
                sources.rotate(-1)
            assembly.disconnected()
        wall_s = time.monotonic() - begun_s
        refetched = sum(assembly.failures.values())
        return FetchReport(wall_s - assembly.verify_s, assembly.verify_s, assembly.bytes, refetched)

    def _connect(self, address: str) -> zmq.Socket[bytes]:
        try:
            return bulk_client_socket(address, self._security)
        except ConfigError as error:  # here it is the learner's word, not this user's configuration
            raise WeightsError(f"weights cannot be fetched: {error}") from error

    def _converse(self, socket: zmq.Socket[bytes], assembly: Assembly, limits: _Limits) -> None:
        """Ask and take in over one socket until the version is complete, withdrawn here, or the source stalls."""
        socket.set(zmq.RCVTIMEO, STOP_CHECK_MS)
        progress_s, chunks = time.monotonic(), assembly.chunks
        while not assembly.done and not assembly.withdrawn:
            now_s = time.monotonic()
            if assembly.chunks > chunks:
                progress_s, chunks = now_s, assembly.chunks
            if limits.stop.is_set():
                raise Superseded(f"the fetch of {limits.what} was called off")
            if now_s >= limits.deadline_s:
                done, wanted = assembly.plan.num_done, assembly.plan.num_chunks
                raise WeightsError(f"{limits.what}: only {done} of {wanted} chunks had arrived when its time was up")
            if now_s >= progress_s + limits.stall_s:
                return
            _ask(socket, assembly)
            with contextlib.suppress(zmq.Again):
                frames = socket.recv_multipart(copy=False)
                assembly.take_in(frames)


def _ask(socket: zmq.Socket[bytes], assembly: Assembly) -> None:
    """Keep up to a window outstanding, asking in large steps: each request wakes the other side up."""
    while assembly.plan.num_outstanding <= WINDOW - CHUNKS_PER_REQUEST:
        request = assembly.next_request(CHUNKS_PER_REQUEST)
        if request is None:
            return
        socket.send_multipart(encode(request))


@dataclass(frozen=True, slots=True)
class _Limits:
    """When a fetch ends without success. Times are of the monotonic clock."""

    what: str
    stop: threading.Event
    deadline_s: float
    stall_s: float
