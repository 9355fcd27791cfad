"""Which bytes of a version are missing, asked for, or here: the bookkeeping of a fetch as a pure state machine.

The bytes are cut into chunks of one size, whatever the boundaries of the blocks that are verified, so that neighbors
can be asked for in one request. A chunk is missing, then outstanding, then done; it goes back to missing when its
connection is lost, when its answer was no good, or when a block with bytes in it fails verification. Chunks of no block
are not asked for. No I/O, no clock, no digests here.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

CHUNK_BYTES = 256 << 10
"""A request is answered in chunks of this size, the last one shorter. Measured best of 64 KiB to 4 MiB: a chunk stays
in the cache between socket, copy and hash. Part of the protocol."""


class Stretch(NamedTuple):
    """Consecutive bytes of the version's file."""

    offset: int
    nbytes: int


class Arrival(Enum):
    """What an answer turned out to be. Only a NEW one's bytes are used."""

    NEW = "new"
    DUPLICATE = "duplicate"
    """Of a chunk that is not outstanding: a repetition, or an answer that came too late."""
    FOREIGN = "foreign"
    """Of no chunk of this plan."""
    WRONG_SIZE = "wrong_size"
    """Longer or shorter than asked for; the chunk is missing again."""


class _State(Enum):
    MISSING = 0
    OUTSTANDING = 1
    DONE = 2


class ChunkPlan:
    """The chunks of one version and their states.

    Args:
        blocks: Where every block lies, in file order; chunks in a gap between them are not asked for.
        chunk_bytes: Size of every chunk but the last.

    Example:
        >>> plan = ChunkPlan([Stretch(8, 2), Stretch(10, 9)], chunk_bytes=4)
        >>> plan.take(2), plan.take(2)
        (Stretch(offset=8, nbytes=8), Stretch(offset=16, nbytes=3))
        >>> plan.arrive(8, 4), plan.contiguous_bytes(1), plan.num_outstanding
        (<Arrival.NEW: 'new'>, 2, 2)
    """

    def __init__(self, blocks: Sequence[Stretch], chunk_bytes: int) -> None:
        self._blocks = list(blocks)
        self._begins = [block.offset for block in blocks]
        self._ends = [block.offset + block.nbytes for block in blocks]
        self._chunk_bytes = chunk_bytes
        self._begin, self._end = (self._begins[0], self._ends[-1]) if blocks else (0, 0)
        self._states = [_State.DONE] * -(-(self._end - self._begin) // chunk_bytes)
        for index in range(len(self._blocks)):
            chunks = self._chunks_of(index)
            self._states[chunks.start : chunks.stop] = [_State.MISSING] * len(chunks)
        self._missing = deque(index for index, state in enumerate(self._states) if state is _State.MISSING)
        self.num_chunks = len(self._missing)
        self._reached = [self._chunks_of(index).start for index in range(len(self._blocks))]
        """For every block, a chunk before which all its chunks are done."""
        self.num_outstanding = 0
        self.num_done = 0

    @property
    def done(self) -> bool:
        """Whether every byte is here."""
        return self.num_done == self.num_chunks

    def take(self, most: int) -> Stretch | None:
        """Mark the next missing chunk, and up to `most` - 1 that follow it, outstanding; None when none is missing."""
        if not self._missing:
            return None
        first = last = self._missing.popleft()
        while self._missing and self._missing[0] == last + 1 < first + most:
            last = self._missing.popleft()
        for index in range(first, last + 1):
            self._states[index] = _State.OUTSTANDING
        self.num_outstanding += last + 1 - first
        offset = self._offset(first)
        return Stretch(offset, self._offset(last + 1) - offset)

    def arrive(self, offset: int, nbytes: int) -> Arrival:
        """Record an answer. The caller copies the bytes if and only if it is NEW."""
        index, astray = divmod(offset - self._begin, self._chunk_bytes)
        if astray or not 0 <= index < len(self._states):
            return Arrival.FOREIGN
        if self._states[index] is not _State.OUTSTANDING:
            return Arrival.DUPLICATE
        self.num_outstanding -= 1
        if nbytes != self._offset(index + 1) - offset:
            self._states[index] = _State.MISSING
            self._missing.append(index)  # last, so that one bad chunk does not hold up the others
            return Arrival.WRONG_SIZE
        self._states[index] = _State.DONE
        self.num_done += 1
        return Arrival.NEW

    def lose_outstanding(self) -> None:
        """The connection is gone: what was asked for over it is missing again, in file order, before the rest."""
        lost = [index for index, state in enumerate(self._states) if state is _State.OUTSTANDING]
        for index in lost:
            self._states[index] = _State.MISSING
        self._missing.extendleft(reversed(lost))
        self.num_outstanding = 0

    def give_back(self, stretch: Stretch) -> None:
        """What is outstanding of a stretch will not come: it is missing again, before the rest."""
        first = (stretch.offset - self._begin) // self._chunk_bytes
        stop = -(-(stretch.offset + stretch.nbytes - self._begin) // self._chunk_bytes)
        lost = [index for index in range(first, stop) if self._states[index] is _State.OUTSTANDING]
        for index in lost:
            self._states[index] = _State.MISSING
        self._missing.extendleft(reversed(lost))
        self.num_outstanding -= len(lost)

    def blocks_in(self, offset: int, nbytes: int) -> range:
        """Return the indices of the blocks that have bytes there."""
        return range(bisect_right(self._ends, offset), bisect_left(self._begins, offset + nbytes))

    def contiguous_bytes(self, block: int) -> int:
        """Return how many bytes of the block are here without a gap, from its first one on."""
        offset, nbytes = self._blocks[block]
        reached, stop = self._reached[block], self._chunks_of(block).stop
        while reached < stop and self._states[reached] is _State.DONE:
            reached += 1
        self._reached[block] = reached
        return min(nbytes, max(0, self._offset(reached) - offset))

    def refetch(self, block: int) -> range:
        """Forget the block's chunks; return all blocks that have bytes in them and are thereby incomplete."""
        chunks = self._chunks_of(block)
        for index in chunks:
            if self._states[index] is _State.DONE:
                self._states[index] = _State.MISSING
                self._missing.append(index)
                self.num_done -= 1
        begin = self._offset(chunks.start)
        affected = self.blocks_in(begin, self._offset(chunks.stop) - begin)
        for neighbor in affected:
            self._reached[neighbor] = self._chunks_of(neighbor).start
        return affected

    def _offset(self, index: int) -> int:
        """File offset of a chunk; of the one after the last, the end of the file."""
        return min(self._begin + index * self._chunk_bytes, self._end)

    def _chunks_of(self, block: int) -> range:
        first = (self._begins[block] - self._begin) // self._chunk_bytes
        return range(first, -(-(self._ends[block] - self._begin) // self._chunk_bytes))
