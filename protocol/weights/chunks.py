"""Which bytes of a version are missing, asked for, or here: the bookkeeping of a fetch as a pure state machine.

The tensors' bytes are cut into chunks: a large tensor into several, small neighbors together into one. A chunk is
missing, then outstanding, then done; it goes back to missing when its connection is lost, when its answer was no good,
or when its tensor fails verification. No I/O, no clock, no digests here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple


class Chunk(NamedTuple):
    """A stretch of the version's file, asked for in one request."""

    offset: int
    nbytes: int
    tensors: range
    """Indices of the tensors it holds bytes of: one, or several that it holds whole."""


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
        tensors: (offset, nbytes) of every tensor, in file order, without gaps.
        chunk_bytes: No chunk is longer.

    Example:
        >>> plan = ChunkPlan([(8, 2), (10, 3), (13, 9)], chunk_bytes=6)
        >>> [(chunk.offset, chunk.nbytes) for chunk in plan.chunks]
        [(8, 5), (13, 6), (19, 3)]
        >>> plan.take().offset, plan.arrive(8, 5), plan.contiguous_bytes(1)
        (8, <Arrival.NEW: 'new'>, 3)
    """

    def __init__(self, tensors: Sequence[tuple[int, int]], chunk_bytes: int) -> None:
        self._tensors = list(tensors)
        self.chunks = _cut(self._tensors, chunk_bytes)
        self._by_offset = {chunk.offset: index for index, chunk in enumerate(self.chunks)}
        self._states = [_State.MISSING] * len(self.chunks)
        self._missing = deque(range(len(self.chunks)))
        self._chunks_of: list[range] = [range(0)] * len(self._tensors)
        for index, chunk in enumerate(self.chunks):
            for tensor in chunk.tensors:
                known = self._chunks_of[tensor]
                self._chunks_of[tensor] = range(known.start if known else index, index + 1)
        self._prefix = [chunks.start for chunks in self._chunks_of]
        self.num_outstanding = 0
        self.num_done = 0

    @property
    def num_missing(self) -> int:
        """Chunks that nobody has been asked for."""
        return len(self._missing)

    @property
    def done(self) -> bool:
        """Whether every byte is here."""
        return self.num_done == len(self.chunks)

    def take(self) -> Chunk | None:
        """Mark the next missing chunk outstanding and return it, to be asked for; None when none is missing."""
        if not self._missing:
            return None
        index = self._missing.popleft()
        self._states[index] = _State.OUTSTANDING
        self.num_outstanding += 1
        return self.chunks[index]

    def arrive(self, offset: int, nbytes: int) -> Arrival:
        """Record an answer. The caller copies the bytes if and only if it is NEW."""
        index = self._by_offset.get(offset)
        if index is None:
            return Arrival.FOREIGN
        if self._states[index] is not _State.OUTSTANDING:
            return Arrival.DUPLICATE
        self.num_outstanding -= 1
        if nbytes != self.chunks[index].nbytes:
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

    def tensors_at(self, offset: int) -> range:
        """Return the indices of the tensors in the chunk that starts there."""
        return self.chunks[self._by_offset[offset]].tensors

    def contiguous_bytes(self, tensor: int) -> int:
        """Return how many bytes of the tensor are here without a gap, from its first one on."""
        offset, nbytes = self._tensors[tensor]
        chunks, reached = self._chunks_of[tensor], self._prefix[tensor]
        while reached < chunks.stop and self._states[reached] is _State.DONE:
            reached += 1
        self._prefix[tensor] = reached
        return nbytes if reached == chunks.stop else max(0, self.chunks[reached].offset - offset)

    def refetch(self, tensor: int) -> range:
        """Forget every arrived byte of the tensor's chunks; return the tensors that are thereby incomplete again."""
        chunks = self._chunks_of[tensor]
        for index in chunks:
            if self._states[index] is _State.DONE:
                self._states[index] = _State.MISSING
                self._missing.append(index)
                self.num_done -= 1
        affected = self.chunks[chunks.start].tensors
        for neighbor in affected:
            self._prefix[neighbor] = self._chunks_of[neighbor].start
        return affected


def _cut(tensors: Sequence[tuple[int, int]], chunk_bytes: int) -> list[Chunk]:
    """Cut so that every chunk is either a piece of one tensor or holds whole tensors: a refetch disturbs few others."""
    chunks: list[Chunk] = []
    gathered = range(0)  # whole tensors, `nbytes_gathered` in all, that will make one chunk
    nbytes_gathered = 0
    for tensor, (offset, nbytes) in enumerate(tensors):
        if nbytes_gathered and nbytes_gathered + nbytes > chunk_bytes:
            chunks.append(Chunk(offset - nbytes_gathered, nbytes_gathered, gathered))
            nbytes_gathered = 0
        if nbytes > chunk_bytes:
            only = range(tensor, tensor + 1)
            ends = offset + nbytes
            chunks += [Chunk(at, min(chunk_bytes, ends - at), only) for at in range(offset, ends, chunk_bytes)]
            continue
        gathered = range(gathered.start if nbytes_gathered else tensor, tensor + 1)
        nbytes_gathered += nbytes
    if nbytes_gathered:
        chunks.append(Chunk(sum(tensors[-1]) - nbytes_gathered, nbytes_gathered, gathered))
    return chunks
