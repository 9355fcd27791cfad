"""One end of the bulk plane: `WeightsFetcher` puts the bytes of a shipment in place (the other is serving.py).

It asks for stretches of a version's file, or of a delta (WeightsRequest), and gets them in chunks (WeightsChunk): one
copy into the final place, hashed there while still in the cache. Nothing is believed but the learner's digests, which
came over the control plane (I5): chunks may be lost, repeated, reordered, cut or forged on the way, and the outcome is
the right bytes, or an error and bytes that nobody uses. Requests are idempotent and name what they want, so a fetch
resumes over any new connection, to whomever, with what is still missing.

The thread that calls `fetch` alone touches the socket. This file must not know engines, training, or who announces
versions to whom.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import zmq

from protocol.channel import bulk_client_socket
from protocol.codec import encode
from protocol.errors import ConfigError, Superseded, WeightsError
from protocol.security import PLAIN, Security
from protocol.weights.assembly import Assembly, FetchCounters
from protocol.weights.chunks import CHUNK_BYTES
from protocol.weights.manifest import Shipment

WINDOW = 32
"""Chunks asked for and not yet here: enough to hide a round trip, little to ask again after a cut."""
CHUNKS_PER_REQUEST = 16
"""4 MiB, the most that a WeightsRequest may ask for."""
STOP_CHECK_MS = 50
"""A fetch that hears nothing looks at its stop event this often."""


@dataclass(frozen=True, slots=True)
class FetchReport:
    """A fetch that succeeded. The two times add up to its wall time."""

    transfer_s: float
    verify_s: float
    bytes: int
    """Put in place, refetches included."""
    refetched_blocks: int


class WeightsFetcher:
    """Fetches versions into memory, in the thread that calls it; one fetch at a time."""

    def __init__(self, security: Security = PLAIN) -> None:
        self.counters = FetchCounters()
        self._security = security

    def fetch(
        self,
        shipment: Shipment,
        addresses: Sequence[str],
        destination: memoryview,
        *,
        stop: threading.Event,
        deadline_s: float,
        stall_s: float,
        on_block: Callable[[int], None] | None = None,
    ) -> FetchReport:
        """Bring a shipment into `destination`, every block verified. After an error its bytes are not to be used.

        Args:
            shipment: What to fetch, from the learner's control plane.
            addresses: Who serves it, best first; the next one is tried when one stalls or no longer has it.
            destination: [shipment.nbytes] writable, which nobody reads.
            stop: Set by anyone to call the fetch off.
            deadline_s: Limit of the whole fetch.
            stall_s: Without a useful chunk for so long, what is outstanding is asked for anew over a fresh socket.
            on_block: Told, by its index, of every block that is here and verified.

        Raises:
            Superseded: `stop` was set, or nobody serves it any more.
            IntegrityError: a block failed verification four times.
            WeightsError: the deadline passed, or an address is refused.
        """
        assembly = Assembly(shipment, destination, self.counters, CHUNK_BYTES, on_block)
        begun_s = time.monotonic()
        limits = _Limits(f"version {shipment.version}", stop, begun_s + deadline_s, stall_s)
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
