"""One version on its way into one mapping: what arrives is placed, hashed, and believed only when its digest agrees.

Answers go in, requests come out; which connection carries them is transfer.py's business, and so is time. Whatever the
other side sends, a tensor counts as here only after its bytes, read back from their final place, hash to the manifest
(I5). A tensor that does not is forgotten and asked for again, three times at most.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from protocol.codec import Buffer, decode
from protocol.errors import IntegrityError, ProtocolError
from protocol.messages import UInt8, WeightsChunk, WeightsRequest
from protocol.weights.chunks import Arrival, ChunkPlan, Stretch
from protocol.weights.layout import MappedWeights
from protocol.weights.manifest import Hasher, Manifest, new_hasher

MAX_REFETCHES = 3


@dataclass(slots=True)
class FetchCounters:
    """What a WeightsFetcher has seen since its start, failed fetches included. They only grow."""

    chunks: int = 0
    """Chunks put in place."""
    bytes: int = 0
    duplicate: int = 0
    """Answers to what was not outstanding: repeated, or too late."""
    foreign: int = 0
    """Of another version, of no chunk asked for, or another kind of message."""
    wrong_size: int = 0
    malformed: int = 0
    """Frames that are no message."""
    reconnects: int = 0
    """Sockets given up because nothing useful came for `stall_s`."""
    refetched_tensors: int = 0
    """Tensors whose bytes failed verification and were asked for again."""


class Assembly:
    """Owns the destination's tensors until `done`; driven by one thread.

    Args:
        manifest: What the bytes must hash to.
        destination: A writable mapping of the manifest's layout, which nobody reads.
        counters: Where to count what arrives.
        chunk_bytes: Size in which the source answers.
    """

    def __init__(
        self, manifest: Manifest, destination: MappedWeights, counters: FetchCounters, chunk_bytes: int
    ) -> None:
        self.plan = ChunkPlan([Stretch(entry.offset, entry.nbytes) for entry in manifest.tensors], chunk_bytes)
        self.withdrawn = False
        """Whether the source of the moment no longer serves the version."""
        self.chunks = 0
        self.bytes = 0
        self.verify_s = 0.0
        """Spent hashing."""
        self.failures: Counter[int] = Counter()
        """Tensor index -> how often its bytes failed verification."""
        self._manifest = manifest
        self._counters = counters
        self._memory = destination.writable_bytes(0, manifest.file_bytes)
        self._array = np.frombuffer(self._memory, np.uint8)
        self._hashers: dict[int, Hasher] = {}
        self._hashed: Counter[int] = Counter()

    @property
    def done(self) -> bool:
        """Whether every tensor is here and verified: a tensor that fails is missing again at once."""
        return self.plan.done

    def next_request(self, most: int) -> WeightsRequest | None:
        """Return what to ask for next, at most `most` chunks; None when everything missing has been asked for."""
        stretch = self.plan.take(most)
        if stretch is None:
            return None
        return WeightsRequest(version=self._manifest.version, offset=stretch.offset, length=stretch.nbytes)

    def take_in(self, frames: Sequence[Buffer]) -> None:
        """Use an answer, or count why not. It may be anything.

        Raises:
            IntegrityError: a tensor's bytes were wrong for the fourth time.
        """
        try:
            message = decode(frames)
        except ProtocolError:
            self._counters.malformed += 1
            return
        if not isinstance(message, WeightsChunk) or message.version != self._manifest.version:
            self._counters.foreign += 1
        elif message.data is None:
            self.withdrawn = True
        else:
            self._place(message.offset, message.data)

    def disconnected(self) -> None:
        """Nothing that is outstanding will come any more: it is missing again."""
        self.plan.lose_outstanding()
        self.withdrawn = False

    def _place(self, offset: int, data: UInt8) -> None:
        arrival = self.plan.arrive(offset, data.size)
        if arrival is not Arrival.NEW:
            self._counters.duplicate += arrival is Arrival.DUPLICATE
            self._counters.foreign += arrival is Arrival.FOREIGN
            self._counters.wrong_size += arrival is Arrival.WRONG_SIZE
            return
        self._array[offset : offset + data.size] = data.reshape(-1)
        self.chunks += 1
        self.bytes += data.size
        self._counters.chunks += 1
        self._counters.bytes += data.size
        begun_s = time.monotonic()
        for tensor in self.plan.tensors_in(offset, data.size):
            if not self._verify(tensor):
                self._refetch(tensor)
                break  # the chunk and what else is in it are missing again
        self.verify_s += time.monotonic() - begun_s

    def _verify(self, tensor: int) -> bool:
        """Hash what has become contiguous; False if the tensor is complete and its bytes are wrong."""
        entry, hashed = self._manifest.tensors[tensor], self._hashed[tensor]
        here = self.plan.contiguous_bytes(tensor)
        if here == hashed:
            return True
        hasher = self._hashers.get(tensor) or self._hashers.setdefault(tensor, new_hasher(self._manifest.algorithm))
        hasher.update(self._memory[entry.offset + hashed : entry.offset + here])
        self._hashed[tensor] = here
        return here < entry.nbytes or self._hashers.pop(tensor).hexdigest() == entry.digest

    def _refetch(self, tensor: int) -> None:
        for affected in self.plan.refetch(tensor):
            self._hashers.pop(affected, None)
            self._hashed[affected] = 0
        self.failures[tensor] += 1
        if self.failures[tensor] > MAX_REFETCHES:
            raise IntegrityError(
                f"version {self._manifest.version}, tensor {self._manifest.tensors[tensor].spec.name}: its bytes do not"
                f" hash to the manifest after {MAX_REFETCHES} refetches: the source or the path to it corrupts them"
            )
        self._counters.refetched_tensors += 1
