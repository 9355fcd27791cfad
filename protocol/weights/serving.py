"""One end of the bulk plane: `WeightsServer` hands out bytes of versions and of deltas (the other is fetching.py).

It answers a request for a stretch (WeightsRequest) with chunks (WeightsChunk), zero-copy out of the one mapping, and
remembers nothing about who asked, unless what they want is still on its way here (parking.py): then they are told so,
and get it block by block as it is verified. Its thread alone touches its socket. This file must not know engines,
training, or who announces versions to whom.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

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
from protocol.weights.filling import Filling
from protocol.weights.layout import MappedWeights
from protocol.weights.manifest import Manifest, Shipment
from protocol.weights.parking import TELL_S, UNKNOWN_S, Parked, Parking

VERSIONS_KEPT = 2
_REQUESTS_PER_POLL = 64
_NOTHING = np.zeros(0, np.uint8)
"""Data of a chunk that says: not here yet."""

Key = tuple[Version, Version | None]
"""What is served: a version, whole (None) or as the delta from a base."""


@dataclass(slots=True)
class ServeCounters:
    """What a WeightsServer has done since its start."""

    chunks: int = 0
    bytes: int = 0
    malformed: int = 0
    """Requests that were none, for bytes outside the file, or more than may wait. They get no answer."""
    unknown_version: int = 0
    unreachable: int = 0
    """Answers to peers that had gone."""
    parked: int = 0
    """Requests that had to wait for bytes on their way here."""


class Offer(NamedTuple):
    """Something to pass on while it arrives."""

    shipment: Shipment
    memory: memoryview
    """[shipment.nbytes] where it comes to lie."""
    filling: Filling


@dataclass(frozen=True, slots=True, eq=False)
class _Served:
    array: UInt8
    """Every zero-copy chunk is a view of this one array, so it lives until the last of them is sent."""
    mapped: MappedWeights | None
    """The file that is not written meanwhile."""
    filling: Filling | None
    """What of it is here; None: all."""


class WeightsServer:
    """Serves versions, whole or as they arrive, and deltas to any number of fetchers, from a thread of its own.

    All public methods but `close` may be called from any thread and never block.
    """

    def __init__(self, address: str, security: Security = PLAIN, *, patient: bool = False) -> None:
        """Bind and start.

        Args:
            address: Where to listen.
            security: Who may fetch, and by which keys.
            patient: Keep requests for versions newer than all that were heard of here: those will be announced here,
                too. Else whoever asks is sent on.

        Raises:
            ConfigError: the address is refused or in use.
        """
        self._socket = bulk_server_socket(address, security)
        self._polled, self._waker = wake_pair()
        self.address = bound_address(self._socket)
        self.counters = ServeCounters()
        self._patient = patient
        self._newest: Version | None = None
        self._lock = threading.Lock()
        """Of all below, and of the waker: several threads wake this one."""
        self._served: dict[Key, _Served] = {}
        self._withdrawn: list[tuple[MappedWeights, weakref.ref[UInt8]]] = []
        self._parking = Parking()
        self._ends = False
        self._thread = threading.Thread(target=self._run, name="weights-server", daemon=True)
        self._thread.start()

    def serve(self, manifest: Manifest, mapped: MappedWeights) -> None:
        """Make a version available; of more than two, the oldest is withdrawn.

        Args:
            manifest: What `build_manifest` said of `mapped`.
            mapped: Not written again until `is_free` says so.
        """
        assert self._thread.is_alive(), "the weights-server thread has died: its traceback is in the log"
        array = np.frombuffer(mapped.bytes(0, manifest.file_bytes), np.uint8)
        with self._lock:
            assert all(mapped is not other.mapped for other in self._served.values()), "one mapping, two versions"
            self._add((manifest.version, None), _Served(array, mapped, None))
            surplus = sorted(version for version, base in self._served if base is None)[:-VERSIONS_KEPT]
        for version in surplus:
            self.withdraw(version)

    def serve_delta(self, version: Version, base: Version, delta: bytes) -> None:
        """Make what leads from `base` to `version` available until it is withdrawn."""
        with self._lock:
            self._add((version, base), _Served(np.frombuffer(delta, np.uint8), None, None))

    def pass_on(self, version: Version, offers: Sequence[Offer], mapped: MappedWeights) -> None:
        """Make available what is still arriving, block by block. After every block that has, call `arrived`.

        Args:
            version: What arrives.
            offers: The ways in which it comes, all that will be offered of it: who asks for another is sent away.
            mapped: Where the version's file lies. Not written again, but for what arrives, until `is_free` says so.
        """
        with self._lock:
            self._newest = max(version, self._newest or version)
            for shipment, memory, filling in offers:
                array = np.frombuffer(memory.toreadonly(), np.uint8)
                self._add((version, shipment.base), _Served(array, mapped, filling))
        self.arrived()

    def arrived(self) -> None:
        """Look after those who wait: something new is here."""
        with self._lock, contextlib.suppress(zmq.ZMQError):  # closed: nobody waits
            self._waker.send(b"")

    def withdraw_delta(self, version: Version, base: Version) -> None:
        """Serve a delta no longer. Nothing happens if it is not served."""
        self._remove((version, base))

    def withdraw(self, version: Version) -> None:
        """Serve a version no longer: whoever asks for it is told so. Nothing happens if it is not served."""
        self._remove((version, None))

    def withdraw_all(self) -> None:
        """Serve nothing of what is served now."""
        with self._lock:
            keys = list(self._served)
        for key in keys:
            self._remove(key)

    def is_free(self, mapped: MappedWeights) -> bool:
        """Whether the mapping may be written: neither served nor part of a chunk still on its way out."""
        with self._lock:
            self._withdrawn = [(other, array) for other, array in self._withdrawn if array() is not None]
            served = any(other.mapped is mapped for other in self._served.values())
            return not served and all(other is not mapped for other, _ in self._withdrawn)

    def close(self, deadline_s: float = 5.0) -> None:
        """Stop serving. Chunks not yet sent are dropped: transfers resume elsewhere.

        Raises:
            WeightsError: the thread did not end within `deadline_s` seconds.
        """
        if self._waker.closed:
            return
        remove_ipc_socket(self.address)
        self._ends = True
        if self._thread.is_alive():
            self.arrived()
        with self._lock:
            self._waker.close()
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            raise WeightsError(f"the thread that serves weights at {self.address} did not end in {deadline_s:g} s")
        self.withdraw_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _add(self, key: Key, served: _Served) -> None:
        """With the lock held."""
        replaced = self._served.get(key)
        if replaced is not None and replaced.mapped is not None:
            self._withdrawn.append((replaced.mapped, weakref.ref(replaced.array)))
        self._served[key] = served
        self._newest = max(key[0], self._newest or key[0])

    def _remove(self, key: Key) -> None:
        with self._lock:
            served = self._served.pop(key, None)
            if served is None:
                return
            if served.mapped is not None:
                self._withdrawn.append((served.mapped, weakref.ref(served.array)))
        self.arrived()  # whoever waits for it is told

    def _run(self) -> None:
        """Answer requests, and those that wait, until told to end."""
        with self._socket, self._polled:
            poller = zmq.Poller()
            poller.register(self._socket, zmq.POLLIN)
            poller.register(self._polled, zmq.POLLIN)
            while not self._ends:
                ready = dict(poller.poll(int(TELL_S * 1000) if self._parking else None))
                if self._polled in ready:
                    self._take_wakes()
                self._look_after_parked(time.monotonic())
                self._answer_waiting()

    def _take_wakes(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                self._polled.recv(zmq.NOBLOCK)

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
        now_s, end = time.monotonic(), request.offset + request.length
        wanted = Parked(peer, request.version, request.base, request.offset, end, now_s, now_s)
        if self._advance(wanted, now_s):
            return
        if not self._parking.add(wanted):
            self.counters.malformed += 1
            return
        self.counters.parked += 1
        self._tell(wanted)

    def _look_after_parked(self, now_s: float) -> None:
        for parked in self._parking.take_all():
            if self._advance(parked, now_s):
                continue
            if now_s >= parked.told_s + TELL_S:
                parked.told_s = now_s
                if not self._tell(parked):
                    continue  # who asked has gone
            self._parking.add(parked)

    def _advance(self, wanted: Parked, now_s: float) -> bool:
        """Send what is here of it, in order; True if there is nothing left to do for it."""
        with self._lock:
            served = self._served.get((wanted.version, wanted.base))
            expected = self._patient and (self._newest is None or wanted.version > self._newest)
        if served is None:
            if expected and now_s < wanted.since_s + UNKNOWN_S:
                return False
            self.counters.unknown_version += 1
            self._send(wanted, None)
            return True
        if wanted.end > served.array.size:
            self.counters.malformed += 1
            return True
        while wanted.offset < wanted.end:
            end = min(wanted.offset + CHUNK_BYTES, wanted.end)
            if served.filling is not None and not served.filling.has(wanted.offset, end - wanted.offset):
                return False
            if not self._send(wanted, served.array[wanted.offset : end]):
                return True
            wanted.offset = end
        return True

    def _tell(self, wanted: Parked) -> bool:
        """Say that it is not here yet; False if nobody is there to hear it."""
        return self._send(wanted, _NOTHING)

    def _send(self, to: Parked, data: UInt8 | None) -> bool:
        """Send the chunk that begins where `to` stands; False if the peer has gone."""
        chunk = WeightsChunk(version=to.version, offset=to.offset, base=to.base, data=data)
        try:
            self._socket.send_multipart([to.peer, *encode(chunk)], copy=False)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.counters.unreachable += 1
            return False
        if data is not None and data.size:
            self.counters.chunks += 1
            self.counters.bytes += data.size
        return True
