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
from enum import Enum

import numpy as np

from protocol.codec import Buffer, decode
from protocol.errors import IntegrityError, ProtocolError
from protocol.messages import UInt8, WeightsChunk, WeightsRequest
from protocol.weights.chunks import Arrival, ChunkPlan, Stretch
from protocol.weights.manifest import Block, Hasher, Shipment, new_hasher

MAX_REFETCHES = 3
MIXED = -1


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
    """Sockets given up because no sign of life came for `stall_s`."""
    not_yet: int = 0
    """Signs of life of sources that wait for the bytes themselves."""
    trials: int = 0
    """Stretches asked of the next source, to see whether it is much faster."""
    moves: int = 0
    """Sources left because it was, or because of wrong bytes."""
    refetched_blocks: int = 0
    """Blocks whose bytes failed verification and were asked for again."""


class Outcome(Enum):
    """What became of an answer."""

    USED = 0
    WRONG = 1
    """It completed a block whose bytes are wrong, all of them from this source."""
    NOT_YET = 2
    """The source waits for those bytes itself."""
    WITHDRAWN = 3
    """The source does not, or no longer, serve the shipment."""
    USELESS = 4


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
        self._verified: set[int] = set()
        self._origins: dict[int, int] = {}
        """By block: the source of what is here of it; MIXED where there are several."""
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

    def take_in(self, frames: Sequence[Buffer], source: int = 0) -> Outcome:
        """Use an answer, or count why not. It may be anything; `source` is a number for who sent it.

        Raises:
            IntegrityError: a block's bytes were wrong for the fourth time.
        """
        try:
            message = decode(frames)
        except ProtocolError:
            self._counters.malformed += 1
            return Outcome.USELESS
        wanted = (self._shipment.version, self._shipment.base)
        if not isinstance(message, WeightsChunk) or (message.version, message.base) != wanted:
            self._counters.foreign += 1
            return Outcome.USELESS
        if message.data is None:
            return Outcome.WITHDRAWN
        if message.data.size == 0:
            self._counters.not_yet += 1
            return Outcome.NOT_YET
        return self._place(message.offset, message.data, source)

    def disconnected(self) -> None:
        """Nothing that is outstanding will come any more: it is missing again."""
        self.plan.lose_outstanding()

    def _place(self, offset: int, data: UInt8, source: int) -> Outcome:
        arrival = self.plan.arrive(offset, data.size)
        if arrival is not Arrival.NEW:
            self._counters.duplicate += arrival is Arrival.DUPLICATE
            self._counters.foreign += arrival is Arrival.FOREIGN
            self._counters.wrong_size += arrival is Arrival.WRONG_SIZE
            return Outcome.USELESS
        self.chunks += 1
        self.bytes += data.size
        self._counters.chunks += 1
        self._counters.bytes += data.size
        flat = data.reshape(-1)
        for index in self.plan.blocks_in(offset, data.size):
            if index in self._verified:  # in a chunk that was fetched again for a neighbor's sake
                continue
            if self._origins.setdefault(index, source) != source:
                self._origins[index] = MIXED
            self._copy(offset, flat, self._shipment.blocks[index])
            if not self._verify(index):
                outcome = Outcome.USED if self._origins[index] == MIXED else Outcome.WRONG
                self._refetch(index)
                return outcome  # the chunk and what else is in it are missing again
        return Outcome.USED

    def _copy(self, offset: int, data: UInt8, block: Block) -> None:
        """Put bytes in place: of a block that is not verified, and of nothing that is not asked for.

        What is verified others may have already, and what lies between the blocks of a shipment nobody looks at again.
        """
        first, last = max(offset, block.offset), min(offset + data.size, block.offset + block.nbytes)
        self._array[first:last] = data[first - offset : last - offset]

    def _verify(self, index: int) -> bool:
        """Hash what has become contiguous; False if the block is complete and its bytes are wrong."""
        block, hashed = self._shipment.blocks[index], self._hashed[index]
        here = self.plan.contiguous_bytes(index)
        if here == hashed:
            return True
        begun_s = time.monotonic()
        hasher = self._hashers.get(index) or self._hashers.setdefault(index, new_hasher(self._shipment.algorithm))
        hasher.update(self._memory[block.offset + hashed : block.offset + here])
        self.verify_s += time.monotonic() - begun_s
        self._hashed[index] = here
        if here < block.nbytes:
            return True
        if self._hashers.pop(index).hexdigest() != block.digest:
            return False
        self._verified.add(index)
        if self._on_block is not None:
            self._on_block(index)
        return True

    def _refetch(self, index: int) -> None:
        for affected in self.plan.refetch(index):
            self._hashers.pop(affected, None)
            self._origins.pop(affected, None)
            self._hashed[affected] = 0
        self.failures[index] += 1
        if self.failures[index] > MAX_REFETCHES:
            block = self._shipment.blocks[index]
            raise IntegrityError(
                f"version {self._shipment.version}, {block.what}: its bytes do not hash to the manifest after"
                f" {MAX_REFETCHES} refetches: the source or the path to it corrupts them"
            )
        self._counters.refetched_blocks += 1
