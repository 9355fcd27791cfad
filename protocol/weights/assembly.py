"""A shipment on its way into memory: what arrives is placed, hashed, and believed only when its digest agrees.

Answers go in, requests come out; which connection carries them is fetching.py's business, and so is time. Whatever the
other side sends, a block counts as here only after its bytes, read back from their final place, hash to what the
learner said (I5). A block that does not is forgotten and asked for again, three times at most.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from protocol.codec import Buffer, decode
from protocol.errors import IntegrityError, ProtocolError
from protocol.messages import UInt8, WeightsChunk, WeightsRequest
from protocol.weights.chunks import Arrival, ChunkPlan, Stretch
from protocol.weights.manifest import Hasher, Shipment, new_hasher

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
    refetched_blocks: int = 0
    """Blocks whose bytes failed verification and were asked for again."""


class Assembly:
    """Owns the destination until `done`; driven by one thread.

    Args:
        shipment: What to ask for, and what it must hash to.
        destination: [shipment.nbytes] writable, which nobody reads.
        counters: Where to count what arrives.
        chunk_bytes: Size in which the source answers.
        on_block: Told, by its index, of every block that is here and verified.
    """

    def __init__(
        self,
        shipment: Shipment,
        destination: memoryview,
        counters: FetchCounters,
        chunk_bytes: int,
        on_block: Callable[[int], None] | None = None,
    ) -> None:
        self.plan = ChunkPlan([Stretch(block.offset, block.nbytes) for block in shipment.blocks], chunk_bytes)
        self.withdrawn = False
        """Whether the source of the moment does not, or no longer, serve it."""
        self.chunks = 0
        self.bytes = 0
        self.verify_s = 0.0
        """Spent hashing."""
        self.failures: Counter[int] = Counter()
        """Block index -> how often its bytes failed verification."""
        self._shipment = shipment
        self._counters = counters
        self._memory = destination
        self._array = np.frombuffer(destination, np.uint8)
        self._on_block = on_block
        self._hashers: dict[int, Hasher] = {}
        self._hashed: Counter[int] = Counter()

    @property
    def done(self) -> bool:
        """Whether every block is here and verified: one that fails is missing again at once."""
        return self.plan.done

    def next_request(self, most: int) -> WeightsRequest | None:
        """Return what to ask for next, at most `most` chunks; None when everything missing has been asked for."""
        stretch = self.plan.take(most)
        if stretch is None:
            return None
        version, base = self._shipment.version, self._shipment.base
        return WeightsRequest(version=version, offset=stretch.offset, length=stretch.nbytes, base=base)

    def take_in(self, frames: Sequence[Buffer]) -> None:
        """Use an answer, or count why not. It may be anything.

        Raises:
            IntegrityError: a block's bytes were wrong for the fourth time.
        """
        try:
            message = decode(frames)
        except ProtocolError:
            self._counters.malformed += 1
            return
        wanted = (self._shipment.version, self._shipment.base)
        if not isinstance(message, WeightsChunk) or (message.version, message.base) != wanted:
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
        for index in self.plan.blocks_in(offset, data.size):
            if not self._verify(index):
                self._refetch(index)
                break  # the chunk and what else is in it are missing again
        self.verify_s += time.monotonic() - begun_s

    def _verify(self, index: int) -> bool:
        """Hash what has become contiguous; False if the block is complete and its bytes are wrong."""
        block, hashed = self._shipment.blocks[index], self._hashed[index]
        here = self.plan.contiguous_bytes(index)
        if here == hashed:
            return True
        hasher = self._hashers.get(index) or self._hashers.setdefault(index, new_hasher(self._shipment.algorithm))
        hasher.update(self._memory[block.offset + hashed : block.offset + here])
        self._hashed[index] = here
        if here < block.nbytes:
            return True
        if self._hashers.pop(index).hexdigest() != block.digest:
            return False
        if self._on_block is not None:
            self._on_block(index)
        return True

    def _refetch(self, index: int) -> None:
        for affected in self.plan.refetch(index):
            self._hashers.pop(affected, None)
            self._hashed[affected] = 0
        self.failures[index] += 1
        if self.failures[index] > MAX_REFETCHES:
            block = self._shipment.blocks[index]
            raise IntegrityError(
                f"version {self._shipment.version}, {block.what}: its bytes do not hash to the manifest after"
                f" {MAX_REFETCHES} refetches: the source or the path to it corrupts them"
            )
        self._counters.refetched_blocks += 1
